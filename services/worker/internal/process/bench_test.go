//go:build linux

package process

import (
	"context"
	"io"
	"os/exec"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
)

// The yardstick: what the standard library needs for the same command.
func BenchmarkBare(b *testing.B) {
	defer reportCPU(b)()
	for b.Loop() {
		cmd := exec.Command("/bin/sh", "-c", "true")
		cmd.Stdout, cmd.Stderr = writerOnly{io.Discard}, writerOnly{io.Discard}
		if err := cmd.Run(); err != nil {
			b.Fatal(err)
		}
	}
}

// writerOnly hides io.Discard's other methods, so that pipes are really read.
type writerOnly struct{ io.Writer }

func benchmarkAttempt(b *testing.B, allowed tracking) {
	e := newTestExecutor(b, allowed, "worker-bench")
	spec := shell("true")
	spec.WorkerID = "worker-bench"
	b.Log(e.Describe())
	defer reportCPU(b)()
	for b.Loop() {
		attemptOnce(b, e, spec)
	}
}

// reportCPU adds the CPU time of this process and its children per operation,
// which tells more than the wall time on a busy machine.
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

func attemptOnce(b *testing.B, e *Executor, spec executor.Spec) {
	a, err := e.Prepare(context.Background(), spec)
	if err != nil {
		b.Fatal(err)
	}
	if err := a.Start(writerOnly{io.Discard}, writerOnly{io.Discard}); err != nil {
		b.Fatal(err)
	}
	if exit := a.Wait(); exit.Code == nil || *exit.Code != 0 {
		b.Fatal(show(exit))
	}
	if err := a.Close(); err != nil {
		b.Fatal(err)
	}
}

func BenchmarkAttempt(b *testing.B)      { benchmarkAttempt(b, anyTracking) }
func BenchmarkAttemptV1(b *testing.B)    { benchmarkAttempt(b, onlyV1) }
func BenchmarkAttemptTable(b *testing.B) { benchmarkAttempt(b, noGroups) }

func BenchmarkBareParallel(b *testing.B) {
	defer reportCPU(b)()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			cmd := exec.Command("/bin/sh", "-c", "true")
			cmd.Stdout, cmd.Stderr = writerOnly{io.Discard}, writerOnly{io.Discard}
			if err := cmd.Run(); err != nil {
				b.Error(err)
			}
		}
	})
}

func BenchmarkAttemptParallel(b *testing.B) {
	e := newTestExecutor(b, anyTracking, "worker-bench")
	var next atomic.Int64
	defer reportCPU(b)()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			spec := shell("true")
			spec.WorkerID = "worker-bench"
			spec.JobID = "job-" + strconv.FormatInt(next.Add(1), 10)
			attemptOnce(b, e, spec)
		}
	})
}
