package lifecycle_test

import (
	"context"
	"errors"
	"os"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/cmdexec/cmdexec/libs/kit/lifecycle"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var errBroken = errors.New("broken")

// journal collects what components did, in order.
type journal struct {
	mu    sync.Mutex
	lines []string
}

func (j *journal) add(line string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.lines = append(j.lines, line)
}

// until returns a component that runs until it is stopped and then takes d to stop.
func (j *journal) until(name string, d time.Duration) func(context.Context) error {
	return func(ctx context.Context) error {
		<-ctx.Done()
		time.Sleep(d) // on the bubble's clock
		j.add(name)
		return ctx.Err()
	}
}

func TestGroupStopsInReverseOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var j journal
		var g lifecycle.Group
		for _, name := range []string{"bus", "scheduler", "gateway"} {
			g.Add(name, j.until(name, time.Second))
		}
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Minute, cancel)
		start := time.Now()
		require.NoError(t, g.Run(ctx))
		require.Equal(t, []string{"gateway", "scheduler", "bus"}, j.lines)
		require.Equal(t, time.Minute+3*time.Second, time.Since(start), "one after the other")
	})
}

func TestGroupReturnsTheFirstErrorWithItsName(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var j journal
		var g lifecycle.Group
		g.Add("bus", j.until("bus", 0))
		g.Add("edge", func(context.Context) error { time.Sleep(time.Second); return errBroken })
		g.Add("gateway", func(ctx context.Context) error { <-ctx.Done(); j.add("gateway"); return errors.New("later") })
		err := g.Run(t.Context())
		require.ErrorIs(t, err, errBroken)
		require.EqualError(t, err, "edge: broken")
		require.Equal(t, []string{"gateway", "bus"}, j.lines)
	})
}

func TestGroupReportsAnErrorOfStopping(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var g lifecycle.Group
		g.Add("store", func(ctx context.Context) error { <-ctx.Done(); return errBroken })
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		require.EqualError(t, g.Run(ctx), "store: broken")
	})
}

func TestGroupGoesOnWhenAComponentIsDone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var j journal
		var g lifecycle.Group
		g.Add("sample", func(context.Context) error { return nil })
		g.Add("edge", j.until("edge", 0))
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		start := time.Now()
		require.NoError(t, g.Run(ctx))
		require.Equal(t, time.Hour, time.Since(start))
	})
	synctest.Test(t, func(t *testing.T) {
		var g lifecycle.Group
		g.Add("a", func(context.Context) error { return nil })
		require.NoError(t, g.Run(t.Context()), "all are done")
		require.NoError(t, (&lifecycle.Group{}).Run(t.Context()), "nothing to do")
	})
}

func TestGroupRecoversPanics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var j journal
		var g lifecycle.Group
		g.Add("bus", j.until("bus", 0))
		g.Add("edge", func(context.Context) error { panic(errBroken) })
		err := g.Run(t.Context())
		var p *lifecycle.PanicError
		require.ErrorAs(t, err, &p)
		require.ErrorIs(t, err, errBroken)
		require.Contains(t, err.Error(), "edge: panic: broken")
		require.Contains(t, string(p.Stack), "TestGroupRecoversPanics")
		require.Equal(t, []string{"bus"}, j.lines)
	})
}

func TestGroupAbandonsWhatDoesNotStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var j journal
		g := lifecycle.Group{StopEach: 2 * time.Second, StopAll: 3 * time.Second}
		release := make(chan struct{})
		hang := func(context.Context) error { <-release; return nil }
		g.Add("bus", j.until("bus", 0))
		g.Add("stuck", hang)
		g.Add("also stuck", hang)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		start := time.Now()
		err := g.Run(ctx)
		require.EqualError(t, err, "also stuck: did not stop within 2s")
		var timeout *lifecycle.StopTimeoutError
		require.ErrorAs(t, err, &timeout)
		require.Equal(t, 3*time.Second, time.Since(start), "both bounds hold")
		close(release)
		synctest.Wait()
		require.Equal(t, []string{"bus"}, j.lines, "the others are still stopped")
	})
}

func TestGroupKeepsTheContextsValues(t *testing.T) {
	type key struct{}
	var g lifecycle.Group
	g.Add("a", func(ctx context.Context) error {
		if ctx.Value(key{}) != "v" {
			return errBroken
		}
		return nil
	})
	require.NoError(t, g.Run(context.WithValue(t.Context(), key{}, "v")))
}

func TestSignalContext(t *testing.T) {
	exits := make(chan int, 1)
	ctx, stop := lifecycle.SignalContext(t.Context(), func(code int) { exits <- code })
	defer stop()
	self, err := os.FindProcess(os.Getpid())
	require.NoError(t, err)
	require.NoError(t, ctx.Err())

	require.NoError(t, self.Signal(syscall.SIGTERM))
	select {
	case <-ctx.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("the first signal did not end the context")
	}
	require.ErrorContains(t, context.Cause(ctx), "terminated")
	require.Empty(t, exits, "the first signal must not exit")

	require.NoError(t, self.Signal(os.Interrupt))
	select {
	case code := <-exits:
		require.Equal(t, 130, code)
	case <-time.After(10 * time.Second):
		t.Fatal("the second signal did not exit")
	}
	stop()
	stop() // again is harmless
}

func TestSignalContextStopEndsIt(t *testing.T) {
	ctx, stop := lifecycle.SignalContext(t.Context(), func(int) { t.Error("exit without a signal") })
	stop()
	require.ErrorIs(t, ctx.Err(), context.Canceled)

	parent, cancel := context.WithCancel(t.Context())
	ctx, stop = lifecycle.SignalContext(parent, func(int) { t.Error("exit without a signal") })
	defer stop()
	cancel()
	require.ErrorIs(t, ctx.Err(), context.Canceled)
}

func TestBackoffGrowsWithFullJitter(t *testing.T) {
	b := lifecycle.Backoff{Min: 100 * time.Millisecond, Max: time.Second}
	ceilings := []time.Duration{100, 200, 400, 800, 1000, 1000, 1000}
	var low, high bool
	for range 500 {
		b.Reset()
		for _, c := range ceilings {
			c *= time.Millisecond
			d := b.Next()
			require.Positive(t, d)
			require.LessOrEqual(t, d, c)
			low, high = low || d < c/10, high || d > c*9/10
		}
	}
	require.True(t, low && high, "the whole range is used")

	var zero lifecycle.Backoff
	for range 100 {
		require.LessOrEqual(t, zero.Next(), lifecycle.DefaultBackoffMax)
	}
	huge := lifecycle.Backoff{Min: 1 << 62, Max: 1<<63 - 1}
	for range 5 {
		require.Positive(t, huge.Next())
	}
	swapped := lifecycle.Backoff{Min: time.Minute, Max: time.Second}
	require.LessOrEqual(t, swapped.Next(), time.Minute)
}

func TestSleep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		require.NoError(t, lifecycle.Sleep(t.Context(), time.Minute))
		require.Equal(t, time.Minute, time.Since(start))

		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		require.ErrorIs(t, lifecycle.Sleep(ctx, time.Hour), context.DeadlineExceeded)
		require.Equal(t, time.Minute+time.Second, time.Since(start))
		require.Error(t, lifecycle.Sleep(ctx, 0), "an ended context does not count as slept")
	})
}
