package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cmdexec/cmdexec/tests/chaos/check"
	"github.com/cmdexec/cmdexec/tests/chaos/history"
	"github.com/cmdexec/cmdexec/tests/chaos/rig"
)

// stormWorkers is how many idle workers a storm has unless the run says so.
const stormWorkers = 1000

// storm connects very many idle workers, kills one of the two edges and starts it
// again: all who were there come at once. No lease of a working one may be lost.
type storm struct{ crowd *rig.Process }

// reconnect is what is promised of the slowest.
const reconnect = time.Minute

func (f *storm) inject(ctx context.Context, s *scene) error {
	n := s.storm
	if n == 0 {
		n = stormWorkers
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return err
	}
	if limit.Max < uint64(2*n+500) {
		return fmt.Errorf("%d workers need %d open files in one process, %d are allowed (ulimit -n)", n, 2*n+500, limit.Max)
	}
	var err error
	if f.crowd, err = s.rig.Crowd(n); err != nil {
		return err
	}
	began := time.Now()
	if err := f.all(ctx, s, n, 2*time.Minute); err != nil {
		return err
	}
	e := history.Fault{Name: "storm", Row: "37"}
	s.told(e, "%d workers were connected after %.1fs", n, time.Since(began).Seconds())
	before, err := leasesLost(ctx, s)
	if err != nil {
		return err
	}
	edges := s.rig.Kind(rig.Edge)
	victim := edges[s.rng.IntN(len(edges))]
	files := victim.Files()
	if err := victim.Kill(); err != nil {
		return err
	}
	wait(ctx, time.Second)
	if err := victim.Start(); err != nil {
		return err
	}
	if err := f.all(ctx, s, n, 2*reconnect); err != nil {
		return err
	}
	took, err := f.reconnects()
	if err != nil {
		return err
	}
	if len(took) < n/4 {
		return fmt.Errorf("%d of %d workers lost their connection with one of two edges", len(took), n)
	}
	p99 := check.Percentile(took, 99)
	s.told(e, "%d of them were connected again after p50 %.1fs p99 %.1fs at most %.1fs; the edge had %d open files", len(took),
		check.Percentile(took, 50).Seconds(), p99.Seconds(), took[len(took)-1].Seconds(), files)
	if p99 > reconnect {
		s.broken("a storm of %d workers: p99 of connecting again is %v, %v is promised", n, p99, reconnect)
	}
	after, err := leasesLost(ctx, s)
	if err != nil {
		return err
	}
	if after != before {
		s.broken("%g leases were lost in a storm of %d workers", after-before, n)
	}
	return nil
}

// heal ends the crowd. The edges note of each that it has gone, which takes a moment.
func (f *storm) heal(ctx context.Context, s *scene) error {
	if f.crowd == nil {
		return nil
	}
	if err := f.crowd.Stop(30 * time.Second); err != nil {
		return err
	}
	return s.within(ctx, time.Minute, func() error {
		for _, edge := range s.rig.Kind(rig.Edge) {
			n, err := edge.Metric(ctx, "go_goroutines")
			if err != nil {
				return err
			}
			if n > quietGoroutines {
				return fmt.Errorf("%s has %g goroutines after all idle workers have gone", edge.Name, n)
			}
		}
		return nil
	})
}

// quietGoroutines is more than an edge has with the workers of a rig.
const quietGoroutines = 120

// leasesLost sums what both schedulers have counted.
func leasesLost(ctx context.Context, s *scene) (float64, error) {
	sum := 0.0
	for _, sv := range s.rig.Kind(rig.Scheduler) {
		n, err := sv.Metric(ctx, "cmdexec_scheduler_leases_lost_total")
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return sum, nil
}

// all waits until so many are connected at once.
func (f *storm) all(ctx context.Context, s *scene, n int, within time.Duration) error {
	return s.within(ctx, within, func() error {
		connected := map[string]bool{}
		if err := f.read(func(event, id string, _ int64) {
			connected[id] = event == "connected"
			if !connected[id] {
				delete(connected, id)
			}
		}); err != nil {
			return err
		}
		if len(connected) < n {
			wait(ctx, 200*time.Millisecond)
			return fmt.Errorf("%d of %d idle workers are connected", len(connected), n)
		}
		if !f.crowd.Running() {
			return errors.New("the idle workers have ended")
		}
		return nil
	})
}

// reconnects are the times from a connection that was lost to the next one, sorted.
func (f *storm) reconnects() ([]time.Duration, error) {
	lost := map[string]int64{}
	var took []time.Duration
	err := f.read(func(event, id string, at int64) {
		switch {
		case event == "lost":
			lost[id] = at
		case lost[id] != 0:
			took = append(took, time.Duration(at-lost[id]))
			delete(lost, id)
		}
	})
	slices.Sort(took)
	return took, err
}

func (f *storm) read(use func(event, id string, at int64)) error {
	file, err := os.Open(f.crowd.Log())
	if err != nil {
		return err
	}
	defer file.Close()
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 3 || fields[0] != "connected" && fields[0] != "lost" {
			continue
		}
		at, err := strconv.ParseInt(fields[2], 10, 64)
		if err != nil {
			return fmt.Errorf("the idle workers say %q: %w", lines.Text(), err)
		}
		use(fields[0], fields[1], at)
	}
	return lines.Err()
}
