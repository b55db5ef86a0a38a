//go:build unix

package runner

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/services/worker/internal/clock"
	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
	"github.com/cmdexec/cmdexec/services/worker/internal/process"
	"github.com/cmdexec/cmdexec/services/worker/internal/spool"
)

// reportCPU adds the CPU time of this process and its children per operation.
func reportCPU(b *testing.B) func() {
	used := func() (sum time.Duration) {
		for _, who := range []int{syscall.RUSAGE_SELF, syscall.RUSAGE_CHILDREN} {
			var u syscall.Rusage
			if err := syscall.Getrusage(who, &u); err != nil {
				b.Fatal(err)
			}
			sum += time.Duration(u.Utime.Nano() + u.Stime.Nano())
		}
		return sum
	}
	begin := used()
	return func() { b.ReportMetric(float64((used()-begin).Microseconds())/float64(b.N), "cpu-us/op") }
}

// BenchmarkBare is the yardstick: the same command by the standard library.
func BenchmarkBare(b *testing.B) {
	defer reportCPU(b)()
	for b.Loop() {
		cmd := exec.Command("/bin/sh", "-c", "true")
		cmd.Stdout, cmd.Stderr = struct{ io.Writer }{io.Discard}, struct{ io.Writer }{io.Discard}
		if err := cmd.Run(); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkAttempt is the worker's whole part of a job that does nothing: from
// the assignment to the acknowledged result, without a socket.
func BenchmarkAttempt(b *testing.B) {
	x, err := process.New(process.Options{DataDir: b.TempDir(), WorkerID: me})
	if err != nil {
		b.Fatal(err)
	}
	defer func() {
		if err := x.Close(); err != nil {
			b.Error(err)
		}
	}()
	benchmarkAttempt(b, x)
}

// BenchmarkAttemptOnly is the same without a process: what the runner and the
// spool cost.
func BenchmarkAttemptOnly(b *testing.B) { benchmarkAttempt(b, instant{}) }

func benchmarkAttempt(b *testing.B, x executor.Executor) {
	sp, err := spool.Open(b.TempDir(), spool.Options{})
	if err != nil {
		b.Fatal(err)
	}
	clk := clock.NewSystem()
	r, err := New(Config{
		WorkerID: me, Offer: Offer{Slots: 1}, Executors: map[string]executor.Executor{job.ExecutorProcess: x}, Spool: sp, Clock: clk,
		Usage: func() Usage { return Usage{} }, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		b.Fatal(err)
	}
	s := spec()
	b.ReportAllocs()
	defer reportCPU(b)()
	n := 0
	for b.Loop() {
		n++
		l := workerproto.Lease{JobID: fmt.Sprintf("job-%d", n), Attempt: 1, LeaseID: fmt.Sprintf("lease-%d", n)}
		r.Assign(workerproto.Assignment{Lease: l, LeaseSeconds: 60, Job: s}, clk.Now())
		for !r.Idle() {
			f, err := r.Next(b.Context())
			if err != nil {
				b.Fatal(err)
			}
			if t, _ := workerproto.TypeOf(f.Data); t == workerproto.TypeResult {
				r.Ack(workerproto.Ack{Results: []workerproto.Lease{l}})
			}
		}
	}
	if err := sp.Close(); err != nil {
		b.Fatal(err)
	}
}

// instant is an executor whose commands have ended before they began.
type instant struct{}

func (instant) Name() string                  { return job.ExecutorProcess }
func (instant) Probe(context.Context) error   { return nil }
func (instant) Recover(context.Context) error { return nil }
func (instant) Prepare(context.Context, executor.Spec) (executor.Attempt, error) {
	return instant{}, nil
}
func (instant) Start(io.Writer, io.Writer) error { return nil }
func (instant) Stop(executor.StopReason)         {}
func (instant) Close() error                     { return nil }
func (instant) Wait() executor.Exit {
	now, code := time.Now(), 0
	return executor.Exit{Code: &code, StartedAt: now, FinishedAt: now}
}
