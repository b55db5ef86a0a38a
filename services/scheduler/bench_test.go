package scheduler_test

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/fleet"
	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/natsd/natsdtest"
	"github.com/cmdexec/cmdexec/services/scheduler"
)

// benchRig is a scheduler with one worker of many slots on an embedded server.
// arrived gets the time at which each assignment reached the edge.
func benchRig(b *testing.B, slots int, arrived func(jobID string, at time.Time)) *bus.Conn {
	server := natsdtest.Start(b)
	ctx := b.Context()
	connect := func() *bus.Conn {
		c, err := bus.Connect(ctx, bus.Options{InProcess: server, Name: "bench", Logger: slog.New(slog.DiscardHandler)})
		require.NoError(b, err)
		b.Cleanup(c.Close)
		return c
	}
	conn := connect()
	require.NoError(b, bus.Apply(ctx, conn, bus.Sizes{Jobs: 512 << 20, Results: 64 << 20, Logs: 64 << 20}))
	require.NoError(b, conn.Bind(ctx))
	require.NoError(b, conn.SetSwept(ctx, conn.ServerID()))
	s, err := scheduler.New(scheduler.Config{}, scheduler.Deps{Bus: connect()})
	require.NoError(b, err)
	run, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(run) }()
	b.Cleanup(func() { cancel(); require.NoError(b, <-done) })

	session := id.New(id.Session, time.Now())
	sub, err := conn.ServeCommands("w", func(_ context.Context, cmd busmsg.WorkerCommand) busmsg.WorkerCommandReply {
		now := time.Now()
		reply := busmsg.WorkerCommandReply{SessionID: session}
		for _, a := range cmd.Assign {
			reply.Assign = append(reply.Assign, busmsg.Delivery{LeaseID: a.LeaseID, Delivered: true})
			arrived(a.JobID, now)
		}
		return reply
	})
	require.NoError(b, err)
	b.Cleanup(func() { _ = sub.Unsubscribe() })
	hello := busmsg.BeatRequest{EdgeID: "edge", Workers: []busmsg.WorkerBeat{{WorkerID: "w", SessionID: session, Hello: &fleet.Worker{
		ID: "w", OS: "linux", Arch: "amd64", CPUCores: float64(slots), TotalMemory: int64(slots) << 30, Executors: []string{job.ExecutorProcess},
		Slots: slots, Protocol: 1, SessionID: session, ConnectedAt: time.Now(), Online: true,
	}}}}
	for {
		if _, err := conn.RequestBeat(ctx, hello); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	go func() { // stays fresh
		tick := time.NewTicker(5 * time.Second)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				_, _ = conn.RequestBeat(ctx, hello)
			case <-run.Done():
				return
			}
		}
	}()
	return conn
}

func newJob(b *testing.B) job.Record {
	spec, problems := job.Normalise(job.Spec{Command: job.Command{Shell: "true"}, Resources: job.Resources{CPU: 0.01, MemoryMB: 4}})
	require.Empty(b, problems)
	return job.New(id.New(id.Job, time.Now()), "ann", spec, time.Now())
}

// BenchmarkIdleDispatch is the time from the acknowledged submit to the
// assignment's arrival at the edge, with nothing else going on: the follower's
// report, one registry write, one command.
func BenchmarkIdleDispatch(b *testing.B) {
	arrivals := make(chan time.Time, 1)
	conn := benchRig(b, fleet.MaxSlots, func(_ string, at time.Time) { arrivals <- at })
	reg := conn.Registry()
	var submit, dispatch time.Duration
	b.ResetTimer()
	for range min(b.N, fleet.MaxSlots) {
		began := time.Now()
		_, err := reg.Create(b.Context(), newJob(b))
		require.NoError(b, err)
		acked := time.Now()
		at := <-arrivals
		submit += acked.Sub(began)
		dispatch += at.Sub(acked)
	}
	b.ReportMetric(float64(submit.Microseconds())/float64(b.N), "us-submit/op")
	b.ReportMetric(float64(dispatch.Microseconds())/float64(b.N), "us-dispatch/op")
}

// BenchmarkBusyDispatch is dispatch while 32 clients submit. Run it with
// -benchtime 3000x: the worker has fleet.MaxSlots slots and nothing ends.
func BenchmarkBusyDispatch(b *testing.B) {
	jobs := int64(min(b.N, fleet.MaxSlots))
	var seen, next atomic.Int64
	all := make(chan struct{})
	conn := benchRig(b, fleet.MaxSlots, func(string, time.Time) {
		if seen.Add(1) == jobs {
			close(all)
		}
	})
	reg := conn.Registry()
	b.ResetTimer()
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			for next.Add(1) <= jobs {
				if _, err := reg.Create(b.Context(), newJob(b)); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	b.ReportMetric(float64(jobs)/b.Elapsed().Seconds(), "submits/s")
	<-all
	b.ReportMetric(float64(jobs)/b.Elapsed().Seconds(), "dispatches/s")
}
