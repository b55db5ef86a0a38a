package socket

import (
	"bytes"
	"testing"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/workerproto"
)

// taking takes everything and keeps nothing.
type taking struct{}

func (taking) Heartbeat(workerproto.Heartbeat) error { return nil }

func (taking) Progress(workerproto.Type, workerproto.Lease, time.Time, string) (stale bool, err error) {
	return false, nil
}

func (taking) Output(workerproto.Lease, *workerproto.Chunk, []byte) (stale bool, err error) {
	return false, nil
}

func (taking) Result(workerproto.Result, int) error { return nil }

// BenchmarkDispatch is what the edge does with a worker's frame before its session.
func BenchmarkDispatch(b *testing.B) {
	lease := workerproto.Lease{JobID: "job-01kp8s6q9v7h3m5d2c4x6z8b0n", Attempt: 1, LeaseID: "lease-01kp8s6q9v7h3m5d2c4x6z8b0n"}
	heartbeat, err := workerproto.Encode(workerproto.TypeHeartbeat, workerproto.Heartbeat{
		ID: 7, Status: workerproto.StatusBusy, FreeSlots: 3, Running: []workerproto.PhaseLease{{Lease: lease, Phase: workerproto.PhaseStarted}},
	})
	if err != nil {
		b.Fatal(err)
	}
	chunk, err := workerproto.EncodeChunk(lease, workerproto.Chunk{
		Seq: 1, Stream: workerproto.Stdout, Time: time.Unix(1_800_000_000, 0).UTC(), Data: bytes.Repeat([]byte("x"), 32<<10),
	})
	if err != nil {
		b.Fatal(err)
	}
	for _, f := range []struct {
		name   string
		binary bool
		frame  []byte
	}{{"heartbeat", false, heartbeat}, {"chunk", true, chunk}} {
		b.Run(f.name, func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(int64(len(f.frame)))
			for b.Loop() {
				if _, _, err := dispatch(taking{}, f.binary, f.frame); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
