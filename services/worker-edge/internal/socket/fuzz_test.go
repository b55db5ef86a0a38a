package socket

import (
	"testing"
	"time"
	"unicode/utf8"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/services/worker-edge/internal/session"
	"github.com/cmdexec/cmdexec/services/worker-edge/internal/workertest"
)

// collector takes everything, and holds dispatch to what a session relies on.
type collector struct {
	t       *testing.T
	message []byte
	calls   int
}

func (c *collector) Heartbeat(workerproto.Heartbeat) error { c.calls++; return nil }

func (c *collector) Progress(workerproto.Type, workerproto.Lease, time.Time, string) (bool, error) {
	c.calls++
	return false, nil
}

func (c *collector) Output(l workerproto.Lease, chunk *workerproto.Chunk, frame []byte) (bool, error) {
	c.calls++
	gotLease, got, err := workerproto.DecodeChunk(frame)
	if chunk.Validate() != nil {
		return false, nil // a session refuses it
	}
	require.NoError(c.t, err, "what is stored can be read")
	require.Equal(c.t, l, gotLease)
	require.Equal(c.t, chunk.Data, got.Data)
	require.Equal(c.t, chunk.Seq, got.Seq)
	// The session keeps the frame; the message's buffer is used again.
	before := string(frame)
	for i := range c.message {
		c.message[i] ^= 0xff
	}
	require.Equal(c.t, before, string(frame), "the frame is the session's own")
	for i := range c.message {
		c.message[i] ^= 0xff
	}
	return false, nil
}

func (c *collector) Result(workerproto.Result, int) error { c.calls++; return nil }

func FuzzFrame(f *testing.F) {
	l := workerproto.Lease{JobID: "job-01jdbq5p6mh7v9w0x1y2z3a4b5", Attempt: 1, LeaseID: "lease-01jdbq5p6mh7v9w0x1y2z3a4b5"}
	add := func(t workerproto.Type, body any) {
		data, err := workerproto.Encode(t, body)
		require.NoError(f, err)
		f.Add(false, data)
	}
	chunk := workerproto.Chunk{Seq: 1, Stream: workerproto.Stdout, Time: time.Unix(1, 0).UTC(), Data: []byte("x")}
	add(workerproto.TypeHello, workertest.Hello("worker-a", l))
	add(workerproto.TypeHeartbeat, workerproto.Heartbeat{ID: 1, Status: workerproto.StatusBusy, Running: []workerproto.PhaseLease{{Lease: l, Phase: workerproto.PhaseStarted}}})
	add(workerproto.TypeStarted, workerproto.Progress{Lease: l, At: time.Unix(1, 0).UTC()})
	add(workerproto.TypeRejected, workerproto.Rejected{Lease: l, Reason: "busy"})
	add(workerproto.TypeOutput, workerproto.Output{Lease: l, Chunks: []workerproto.Chunk{chunk, chunk}})
	add(workerproto.TypeResult, workerproto.Result{Lease: l, Outcome: job.OutcomeFailed, FinishedAt: time.Unix(1, 0).UTC(), Tail: []workerproto.Chunk{chunk}})
	f.Add(false, []byte(`{"id":1,"type":"heartbeat"}`))
	f.Add(false, []byte(`{"type":"`))
	frame, err := workerproto.EncodeChunk(l, chunk)
	require.NoError(f, err)
	f.Add(true, frame)
	f.Add(true, []byte{0, 0, 4, 1})
	f.Fuzz(func(t *testing.T, binary bool, data []byte) {
		c := &collector{t: t, message: data}
		typ, stale, err := dispatch(c, binary, data)
		require.Nil(t, stale)
		if err != nil {
			var v *session.Violation
			require.ErrorAs(t, err, &v)
			require.NotEmpty(t, v.Reason)
			require.True(t, utf8.ValidString(closeReason(v.Reason)))
			return
		}
		if c.calls == 0 && !binary {
			require.NotEmpty(t, typ, "only unknown types, and output without chunks, are passed over")
		}
	})
}
