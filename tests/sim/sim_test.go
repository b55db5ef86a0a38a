package sim

import (
	"cmp"
	"context"
	"flag"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

// Seeds that once broke a promise. What they found has tests of its own where it
// was mended; they are kept since they found it.
const (
	// An assignment was on its way to the edge for almost its whole lease, and a worker
	// over plain HTTP began it beside the next attempt.
	seedLateAssignment = 79
	// A job that a crash had brought back was moved on before the sweep, and so looked
	// newer than its end.
	seedGhostMovedOn = 86
)

var (
	oneSeed  = flag.Int64("seed", 0, "run this seed alone, with the log of every process")
	allSeeds = flag.Int64("seeds", 500, "how many seeds to run, from 1 on")
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// together is how many seeds share a bubble, and with it a gateway.
const together = 25

func TestInterleavings(t *testing.T) {
	if *oneSeed != 0 {
		inBubble(t, *oneSeed, *oneSeed, true)
		return
	}
	for from := int64(1); from <= *allSeeds; from += together {
		to := min(from+together-1, *allSeeds)
		t.Run(fmt.Sprintf("seeds=%d-%d", from, to), func(t *testing.T) { inBubble(t, from, to, false) })
	}
}

func TestRegressions(t *testing.T) {
	if *oneSeed != 0 {
		t.Skip("a seed was asked for alone")
	}
	for _, seed := range []int64{seedLateAssignment, seedGhostMovedOn} {
		inBubble(t, seed, seed, false)
	}
}

// inBubble runs seeds in a bubble, one after the other.
func inBubble(t *testing.T, from, to int64, verbose bool) {
	// The NATS client keeps timers in a pool, and a timer must not leave its bubble.
	// Two collections empty every pool.
	runtime.GC()
	runtime.GC()
	synctest.Test(t, func(t *testing.T) {
		log := logger(t, verbose)
		f, ended := &front{}, make(chan error, 1)
		ctx, stop := context.WithCancel(context.Background())
		go func() { ended <- f.run(ctx, log) }()
		for seed := from; seed <= to; seed++ {
			if problems := simulate(seed, f, log); len(problems) > 0 {
				t.Errorf("seed %d broke promises; run it alone by: go test -race ./tests/sim -args -seed %d\n  %s", seed, seed, strings.Join(problems, "\n  "))
			}
		}
		stop()
		if err := <-ended; err != nil {
			t.Errorf("the gateway ended with %v", err)
		}
	})
}

func sortedKeys[K cmp.Ordered, V any](m map[K]V) []K { return slices.Sorted(maps.Keys(m)) }

// pass lets time pass, which is the bubble's: nothing waits for it outside.
func pass(d time.Duration) { time.Sleep(d) }
