package bus_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
)

func TestCommands(t *testing.T) {
	c := start(t)
	ctx := testContext(t)
	drain := true
	cmd := busmsg.WorkerCommand{Drain: &drain}
	_, err := c.SendCommand(ctx, "worker-a", cmd)
	require.ErrorIs(t, err, bus.ErrNoResponder, "definitive")
	_, err = c.SendCommand(ctx, "worker.*", cmd)
	require.ErrorIs(t, err, bus.ErrNoResponder)

	block, entered := make(chan struct{}), make(chan struct{}, 4)
	var handled atomic.Int64
	sub, err := c.ServeCommands("worker-a", func(_ context.Context, got busmsg.WorkerCommand) busmsg.WorkerCommandReply {
		entered <- struct{}{}
		if got.Drain == nil || !*got.Drain {
			<-block
		}
		handled.Add(1)
		return busmsg.WorkerCommandReply{SessionID: "session-a"}
	})
	require.NoError(t, err)
	reply, err := c.SendCommand(ctx, "worker-a", cmd)
	require.NoError(t, err)
	require.Equal(t, "session-a", reply.SessionID)
	<-entered
	_, err = c.SendCommand(ctx, "worker-b", cmd)
	require.ErrorIs(t, err, bus.ErrNoResponder, "another worker's commands are its own")

	// Somebody who listens and does not answer in time is not nobody.
	short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel()
	_, err = c.SendCommand(short, "worker-a", busmsg.WorkerCommand{})
	require.NotErrorIs(t, err, bus.ErrNoResponder)
	require.ErrorIs(t, err, bus.ErrAmbiguous)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	<-entered

	// Unsubscribe waits for the handler that runs.
	unsubscribed := make(chan error, 1)
	go func() { unsubscribed <- sub.Unsubscribe() }()
	select {
	case <-unsubscribed:
		t.Fatal("Unsubscribe returned while a handler ran")
	default:
	}
	close(block)
	require.NoError(t, <-unsubscribed)
	require.Equal(t, int64(2), handled.Load())
	_, err = c.SendCommand(ctx, "worker-a", cmd)
	require.ErrorIs(t, err, bus.ErrNoResponder)

	sub, err = c.ServeCommands("worker-a", func(context.Context, busmsg.WorkerCommand) busmsg.WorkerCommandReply { panic("bug") })
	require.NoError(t, err)
	short, cancel = context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	_, err = c.SendCommand(short, "worker-a", cmd)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.NoError(t, sub.Unsubscribe())
	require.Equal(t, uint64(1), c.Stats().Panics)
}

// Workers of one connection share what takes their commands: each still gets its
// own, in the order of their sending, and the end of one is not that of another.
func TestCommandsOfManyWorkers(t *testing.T) {
	c := start(t)
	ctx := testContext(t)
	const workers, each = 50, 20
	var mu sync.Mutex
	got := map[string][]string{} // lease ids of assignments, by worker
	subs := make([]bus.Subscription, workers)
	name := func(i int) string { return fmt.Sprintf("worker-%d", i) }
	for i := range subs {
		var err error
		subs[i], err = c.ServeCommands(name(i), func(_ context.Context, cmd busmsg.WorkerCommand) busmsg.WorkerCommandReply {
			mu.Lock()
			defer mu.Unlock()
			got[name(i)] = append(got[name(i)], cmd.Cancel[0].LeaseID)
			return busmsg.WorkerCommandReply{SessionID: name(i)}
		})
		require.NoError(t, err)
	}
	var all sync.WaitGroup
	for i := range workers {
		all.Go(func() {
			for n := range each {
				reply, err := c.SendCommand(ctx, name(i), busmsg.WorkerCommand{Cancel: []workerproto.Lease{{LeaseID: fmt.Sprint(n)}}})
				if err != nil || reply.SessionID != name(i) {
					t.Errorf("command of %s: %v, answered by %q", name(i), err, reply.SessionID)
				}
			}
		})
	}
	all.Wait()
	for i := range workers {
		want := make([]string, each)
		for n := range want {
			want[n] = fmt.Sprint(n)
		}
		require.Equal(t, want, got[name(i)])
	}
	for i := range workers {
		if i%2 == 0 {
			require.NoError(t, subs[i].Unsubscribe())
		}
	}
	for i := range workers {
		_, err := c.SendCommand(ctx, name(i), busmsg.WorkerCommand{Cancel: []workerproto.Lease{{LeaseID: "last"}}})
		if i%2 == 0 {
			require.ErrorIs(t, err, bus.ErrNoResponder)
		} else {
			require.NoError(t, err)
		}
	}
}

func TestBeats(t *testing.T) {
	c := start(t)
	ctx := testContext(t)
	_, err := c.RequestBeat(ctx, busmsg.BeatRequest{EdgeID: "edge-a"})
	require.ErrorIs(t, err, bus.ErrNoResponder)
	sub, err := c.ServeBeats(func(_ context.Context, req busmsg.BeatRequest) (busmsg.BeatReply, error) {
		if req.EdgeID == "edge-x" {
			return busmsg.BeatReply{}, errors.New("not led here")
		}
		return busmsg.BeatReply{SchedulerID: "scheduler-a", Workers: []busmsg.WorkerReply{{WorkerID: req.Workers[0].WorkerID}}}, nil
	})
	require.NoError(t, err)
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			reply, err := c.RequestBeat(ctx, busmsg.BeatRequest{EdgeID: "edge-a", Workers: []busmsg.WorkerBeat{{WorkerID: "worker-a"}}})
			if err != nil || len(reply.Workers) != 1 || reply.Workers[0].WorkerID != "worker-a" {
				t.Errorf("reply %+v, %v", reply, err)
			}
		})
	}
	wg.Wait()
	short, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	_, err = c.RequestBeat(short, busmsg.BeatRequest{EdgeID: "edge-x"})
	require.ErrorIs(t, err, context.DeadlineExceeded, "an error is no answer")
	require.NoError(t, sub.Unsubscribe())
}

func TestQueries(t *testing.T) {
	c := start(t)
	ctx := testContext(t)
	_, err := bus.Query(ctx, c, bus.QueryJob, busmsg.GetJob{JobID: "job-a"})
	require.ErrorIs(t, err, bus.ErrNoResponder)

	want := newRecord(t)
	sub, err := bus.Serve(c, bus.QueryJob, func(_ context.Context, req busmsg.GetJob) (job.Record, error) {
		switch req.JobID {
		case want.ID:
			return want, nil
		case "panic":
			panic("bug")
		case "secret":
			return job.Record{}, errors.New("the password is wrong")
		default:
			return job.Record{}, &busmsg.QueryError{Code: busmsg.CodeNotFound, Message: "no such job"}
		}
	})
	require.NoError(t, err)
	stats, err := bus.Serve(c, bus.QueryStats, func(context.Context, struct{}) (busmsg.Stats, error) {
		return busmsg.Stats{ByState: map[job.State]int64{job.Queued: 1}}, nil
	})
	require.NoError(t, err)

	got, err := bus.Query(ctx, c, bus.QueryJob, busmsg.GetJob{JobID: want.ID})
	require.NoError(t, err)
	require.Equal(t, want, got)
	n, err := bus.Query(ctx, c, bus.QueryStats, struct{}{})
	require.NoError(t, err)
	require.Equal(t, int64(1), n.ByState[job.Queued])

	code := func(jobID string) *busmsg.QueryError {
		_, err := bus.Query(ctx, c, bus.QueryJob, busmsg.GetJob{JobID: jobID})
		var q *busmsg.QueryError
		require.ErrorAs(t, err, &q)
		return q
	}
	require.Equal(t, &busmsg.QueryError{Code: busmsg.CodeNotFound, Message: "no such job"}, code("other"))
	require.Equal(t, busmsg.CodeUnavailable, code("secret").Code)
	require.NotContains(t, code("secret").Message, "password")
	require.Equal(t, busmsg.CodeUnavailable, code("panic").Code)

	require.NoError(t, sub.Unsubscribe())
	_, err = bus.Query(ctx, c, bus.QueryJob, busmsg.GetJob{JobID: want.ID})
	require.ErrorIs(t, err, bus.ErrNoResponder)
	_, err = bus.Query(ctx, c, bus.QueryStats, struct{}{})
	require.NoError(t, err, "other endpoints go on")
	require.NoError(t, stats.Unsubscribe())
}
