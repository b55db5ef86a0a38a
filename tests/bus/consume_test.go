package bus_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/natsd/natsdtest"
)

func newResult() busmsg.Result {
	return busmsg.Result{EdgeID: "edge-a", Result: workerproto.Result{
		Lease: workerproto.Lease{JobID: id.New(id.Job, time.Now()), Attempt: 1, LeaseID: "lease-a"}, Outcome: job.OutcomeSucceeded,
	}}
}

func publish(t testing.TB, c *bus.Conn, n int) {
	t.Helper()
	for range n {
		require.NoError(t, c.PublishResult(testContext(t), newResult()))
	}
}

// inBackground runs something that blocks until its context ends.
func inBackground(t testing.TB, run func(context.Context) error) {
	ctx, cancel := context.WithCancel(testContext(t))
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	t.Cleanup(func() {
		cancel()
		require.ErrorIs(t, <-done, context.Canceled)
	})
}

// tally counts handled messages by sequence.
type tally struct {
	mu sync.Mutex
	by map[uint64]int
}

func (x *tally) add(seq uint64) int {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.by == nil {
		x.by = map[uint64]int{}
	}
	x.by[seq]++
	return x.by[seq]
}

func (x *tally) of(seq uint64) int {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.by[seq]
}

func drained(t testing.TB, c *bus.Conn, name bus.ConsumerName) {
	t.Helper()
	eventually(t, func() bool {
		n, err := c.Pending(testContext(t), name)
		return err == nil && n == 0
	}, "everything is acknowledged")
}

func deadLetters(t testing.TB, c *bus.Conn) map[uint64]busmsg.DeadLetter {
	t.Helper()
	all := map[uint64]busmsg.DeadLetter{}
	require.NoError(t, c.DeadLetters(testContext(t), func(d busmsg.DeadLetter) error {
		require.NotContains(t, all, d.Sequence, "one letter for one message")
		all[d.Sequence] = d
		return nil
	}))
	return all
}

func TestConsume(t *testing.T) {
	c := start(t)
	publish(t, c, 40)
	var handled tally
	var atOnce, most int
	var mu sync.Mutex
	inBackground(t, func(ctx context.Context) error {
		return c.Consume(ctx, bus.ResultsState, bus.ConsumeOptions{Concurrency: 4}, func(_ context.Context, m bus.Msg) error {
			mu.Lock()
			atOnce++
			most = max(most, atOnce)
			mu.Unlock()
			defer func() { mu.Lock(); atOnce--; mu.Unlock() }()
			n := handled.add(m.Sequence)
			switch m.Sequence {
			case 3: // fails twice, as with a database that is away
				if n <= 2 {
					require.Equal(t, n, m.Delivered)
					return errors.New("not now")
				}
			case 5:
				return bus.Poison(errors.New("can never be handled"))
			case 7:
				panic("handler bug")
			case 9:
				if n == 1 {
					panic("once only")
				}
			}
			return nil
		})
	})
	drained(t, c, bus.ResultsState)
	for seq := uint64(1); seq <= 40; seq++ {
		want := map[uint64]int{3: 3, 7: 3, 9: 2}[seq]
		require.Equal(t, max(want, 1), handled.of(seq), "message %d", seq)
	}
	dead := deadLetters(t, c)
	require.Len(t, dead, 2)
	require.Equal(t, "can never be handled", dead[5].Reason)
	require.Contains(t, dead[7].Reason, "handler bug")
	require.NotEmpty(t, dead[5].Data)
	require.Equal(t, "state", dead[5].Consumer)
	require.LessOrEqual(t, most, 4)
	require.Equal(t, uint64(2), c.Stats().DeadLetters)
	require.Equal(t, uint64(4), c.Stats().Panics)

	// The other consumer of the stream has seen nothing of this, and until it has
	// nothing is trimmed.
	n, err := c.Pending(testContext(t), bus.ResultsArchive)
	require.NoError(t, err)
	require.Equal(t, uint64(40), n)
	require.NoError(t, c.TrimResults(testContext(t)))
	var archived tally
	inBackground(t, func(ctx context.Context) error {
		return c.ConsumeBatch(ctx, bus.ResultsArchive, bus.BatchOptions{}, func(_ context.Context, ms []bus.Msg) error {
			for _, m := range ms {
				archived.add(m.Sequence)
			}
			return nil
		})
	})
	drained(t, c, bus.ResultsArchive)
	for seq := uint64(1); seq <= 40; seq++ {
		require.Equal(t, 1, archived.of(seq), "message %d", seq)
	}
	require.NoError(t, c.TrimResults(testContext(t)))
	require.NoError(t, c.TrimResults(testContext(t)), "trimming what is trimmed")
	require.ErrorContains(t, c.Consume(testContext(t), "nonsense", bus.ConsumeOptions{}, nil), "nonsense")
}

func TestConsumeBatchWithPoison(t *testing.T) {
	c := start(t)
	publish(t, c, 30)
	var handled tally
	var mu sync.Mutex
	fail, order := 2, []uint64{}
	inBackground(t, func(ctx context.Context) error {
		return c.ConsumeBatch(ctx, bus.ResultsArchive, bus.BatchOptions{MaxMessages: 10}, func(_ context.Context, ms []bus.Msg) error {
			mu.Lock()
			defer mu.Unlock()
			if fail > 0 {
				fail--
				return errors.New("the database is away")
			}
			poison := map[int]error{}
			for i, m := range ms {
				switch {
				case m.Sequence == 4 || m.Sequence == 25:
					poison[i] = fmt.Errorf("poison %d", m.Sequence)
				case m.Sequence == 15:
					panic("cannot stand this one")
				}
			}
			for _, m := range ms {
				if handled.add(m.Sequence) == 1 {
					order = append(order, m.Sequence)
				}
			}
			if len(poison) > 0 {
				return &bus.BatchError{Poison: poison}
			}
			return nil
		})
	})
	drained(t, c, bus.ResultsArchive)
	dead := deadLetters(t, c)
	require.Len(t, dead, 3)
	require.Equal(t, "poison 4", dead[4].Reason)
	require.Equal(t, "poison 25", dead[25].Reason)
	require.Contains(t, dead[15].Reason, "cannot stand this one")
	mu.Lock()
	defer mu.Unlock()
	require.Len(t, order, 29, "every other message was handled")
	require.IsIncreasing(t, order, "in order")
	for _, seq := range order {
		require.Equal(t, 1, handled.of(seq), "message %d", seq)
	}
}

// A consumer that stops gives back what it has not handled: the next one need not
// wait for the acknowledgement timeout.
func TestConsumerHandsOver(t *testing.T) {
	c := start(t)
	publish(t, c, 20)
	ctx, cancel := context.WithCancel(testContext(t))
	err := c.Consume(ctx, bus.ResultsState, bus.ConsumeOptions{Concurrency: 2}, func(ctx context.Context, _ bus.Msg) error {
		cancel()
		<-ctx.Done()
		return ctx.Err()
	})
	require.ErrorIs(t, err, context.Canceled)
	var handled tally
	began := time.Now()
	inBackground(t, func(ctx context.Context) error {
		return c.Consume(ctx, bus.ResultsState, bus.ConsumeOptions{}, func(_ context.Context, m bus.Msg) error {
			handled.add(m.Sequence)
			return nil
		})
	})
	drained(t, c, bus.ResultsState)
	require.Less(t, time.Since(began), 20*time.Second)
	for seq := uint64(1); seq <= 20; seq++ {
		require.Equal(t, 1, handled.of(seq), "message %d", seq)
	}
}

func TestJobsProjection(t *testing.T) {
	c := start(t)
	ctx := testContext(t)
	created := create(t, c)
	e, err := c.Registry().TransitionFrom(ctx, created, job.CancelRequest{})
	require.NoError(t, err)
	got := make(chan bus.Entry, 8)
	inBackground(t, func(ctx context.Context) error {
		return c.ConsumeBatch(ctx, bus.JobsProjection, bus.BatchOptions{}, func(_ context.Context, ms []bus.Msg) error {
			for _, m := range ms {
				e, err := bus.DecodeRecord(m)
				if err != nil {
					return err
				}
				got <- e
			}
			return nil
		})
	})
	for _, want := range []bus.Entry{created, e} {
		require.Equal(t, want, <-got, "every version, in order, under the revision that it has in the registry")
	}
	drained(t, c, bus.JobsProjection)
	_, err = bus.DecodeRecord(bus.Msg{Subject: "elsewhere", Data: []byte(`{"id":"job-x"}`)})
	require.ErrorIs(t, err, bus.ErrMalformed)
}

func frames(t testing.TB, lease workerproto.Lease, from, n, size int) [][]byte {
	out := make([][]byte, n)
	for i := range out {
		seq := int64(from + i)
		frame, err := workerproto.EncodeChunk(lease, workerproto.Chunk{
			Seq: seq, Offset: int64(size) * (seq - 1), Stream: workerproto.Stdout, Time: time.Now(), Data: make([]byte, size),
		})
		require.NoError(t, err)
		out[i] = frame
	}
	return out
}

func TestLogs(t *testing.T) {
	c := startSized(t, bus.Sizes{Jobs: 16 << 20, Results: 16 << 20, Logs: 8 << 20})
	ctx := testContext(t)
	lease := workerproto.Lease{JobID: id.New(id.Job, time.Now()), Attempt: 1, LeaseID: "lease-a"}
	other := workerproto.Lease{JobID: id.New(id.Job, time.Now()), Attempt: 1, LeaseID: "lease-b"}
	stored, err := c.PublishChunks(ctx, lease.JobID, frames(t, lease, 1, 60, 1000))
	require.NoError(t, err)
	require.Equal(t, 60, stored)
	stored, err = c.PublishChunks(ctx, other.JobID, frames(t, other, 1, 1, 1000))
	require.NoError(t, err)
	require.Equal(t, 1, stored)

	var mu sync.Mutex
	var seqs []int64
	inBackground(t, func(ctx context.Context) error {
		return c.FollowLogs(ctx, lease.JobID, func(l workerproto.Lease, ch workerproto.Chunk) {
			mu.Lock()
			defer mu.Unlock()
			require.Equal(t, lease, l)
			seqs = append(seqs, ch.Seq)
		})
	})
	stored, err = c.PublishChunks(ctx, lease.JobID, frames(t, lease, 61, 40, 1000))
	require.NoError(t, err)
	require.Equal(t, 40, stored)
	eventually(t, func() bool { mu.Lock(); defer mu.Unlock(); return len(seqs) == 100 }, "stored and live output")
	for i, seq := range seqs {
		require.Equal(t, int64(i+1), seq)
	}

	// A full stream refuses: what is stored is known, and trimming makes room.
	for full := false; !full; {
		stored, err = c.PublishChunks(ctx, other.JobID, frames(t, other, 2, 40, 60_000))
		if err != nil {
			require.ErrorIs(t, err, bus.ErrFull)
			require.Less(t, stored, 40)
			full = true
		}
	}
	bytes := sha256.New()
	inBackground(t, func(ctx context.Context) error {
		return c.ConsumeBatch(ctx, bus.LogsArchive, bus.BatchOptions{}, func(_ context.Context, ms []bus.Msg) error {
			for _, m := range ms {
				bytes.Write(m.Data)
			}
			return nil
		})
	})
	drained(t, c, bus.LogsArchive)
	require.NoError(t, c.TrimLogs(ctx))
	stored, err = c.PublishChunks(ctx, other.JobID, frames(t, other, 100, 40, 60_000))
	require.NoError(t, err)
	require.Equal(t, 40, stored)
	_, err = c.PublishChunks(ctx, "job-*", frames(t, other, 1, 1, 10))
	require.Error(t, err)
}

// What was being handled when an all-in-one died is handled at once by its next
// life: nobody else can still be at it.
func TestDeliveriesOfAnEarlierLife(t *testing.T) {
	dir := t.TempDir()
	s := natsdtest.StartIn(t, dir)
	first := connect(t, s)
	bind(t, first, smallSizes())
	publish(t, first, 6)
	taken := make(chan struct{}, 6)
	inBackground(t, func(ctx context.Context) error {
		return first.Consume(ctx, bus.ResultsState, bus.ConsumeOptions{Concurrency: 6}, func(ctx context.Context, m bus.Msg) error {
			if m.Sequence > 1 {
				taken <- struct{}{}
				<-ctx.Done()
			}
			return ctx.Err()
		})
	})
	for range 5 {
		<-taken
	}
	s.Shutdown()
	second := connect(t, natsdtest.StartIn(t, dir))
	n, err := second.Pending(testContext(t), bus.ResultsState)
	require.NoError(t, err)
	require.Equal(t, uint64(5), n)
	var handled tally
	began := time.Now()
	for range 2 { // a second consumer of the same life takes nothing from the first
		inBackground(t, func(ctx context.Context) error {
			return second.Consume(ctx, bus.ResultsState, bus.ConsumeOptions{}, func(_ context.Context, m bus.Msg) error {
				handled.add(m.Sequence)
				return nil
			})
		})
	}
	drained(t, second, bus.ResultsState)
	require.Less(t, time.Since(began), 20*time.Second)
	for seq := uint64(2); seq <= 6; seq++ {
		require.GreaterOrEqual(t, handled.of(seq), 1, "message %d", seq)
	}
}
