package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"syscall"
	"time"

	"github.com/cmdexec/cmdexec/tests/chaos/history"
	"github.com/cmdexec/cmdexec/tests/chaos/rig"
)

// scene is what a fault may touch.
type scene struct {
	rig  *rig.Rig
	load *load
	w    *history.Writer
	rng  *rand.Rand
	disk *smallDisk // of the suite disk only
	log  io.Writer

	storm int // idle workers of a storm; 0 for stormWorkers
}

// fault breaks something and repairs it. Between inject and heal the load goes on;
// inject may itself last as long as the fault does. Each is used once.
type fault interface {
	inject(ctx context.Context, s *scene) error
	heal(ctx context.Context, s *scene) error
}

// entry is a fault of the catalogue.
type entry struct {
	name, row string
	suite     string // which rig it needs
	frozen    bool   // from inject to heal commands exist and do not run
	make      func() fault
}

// The suites: kinds of rigs.
const (
	suiteOne     = "one"     // one NATS server
	suiteCluster = "cluster" // three
	suiteDisk    = "disk"    // one, on a small file system of its own (root)
	suiteSoak    = "soak"    // one, and no fault: for an hour
	suiteDocker  = "docker"  // one; jobs are containers of an engine of its own (root)
)

// catalogue lists every fault, by row of the matrix in docs/reliability.md.
func catalogue() []entry {
	return slices.Concat([]entry{
		{"gateway-killed", "1", suiteOne, false, func() fault { return &serviceKilled{kind: rig.Gateway} }},
		{"scheduler-killed", "2", suiteOne, false, func() fault { return &serviceKilled{kind: rig.Scheduler} }},
		{"edge-killed", "3", suiteOne, false, func() fault { return &serviceKilled{kind: rig.Edge} }},
		{"worker-killed", "4", suiteOne, false, func() fault { return &workerKilled{} }},
		{"host-dead", "5", suiteOne, false, func() fault { return &hostDead{} }},
		{"collector-killed", "6", suiteOne, false, func() fault { return &serviceKilled{kind: rig.Collector} }},
		{"persister-killed", "7", suiteOne, false, func() fault { return &serviceKilled{kind: rig.Persister} }},
		{"everything-killed", "8", suiteOne, false, func() fault { return &everythingKilled{} }},
		{"nats-killed", "9", suiteOne, false, func() fault { return &natsDown{kill: true} }},
		{"nats-restarted", "9", suiteOne, false, func() fault { return &natsDown{} }},
		{"steady", "-", suiteSoak, false, func() fault { return steady{} }},
		{"power-cut", "10", suiteDisk, false, func() fault { return &powerCut{} }},
		{"leader-killed", "11", suiteCluster, false, func() fault { return &natsServerKilled{} }},
		{"cluster-killed", "11", suiteCluster, false, func() fault { return &clusterKilled{} }},
		{"disk-full", "12", suiteDisk, false, func() fault { return &diskFull{} }},
		{"registry-full", "13", suiteOne, false, func() fault { return &registryFull{} }},
		{"nats-frozen", "14", suiteOne, false, func() fault { return &natsFrozen{} }},
		{"database-locked", "15", suiteOne, false, func() fault { return &databaseLocked{} }},
		{"network-cut-briefly", "19", suiteOne, false, func() fault { return &network{mode: rig.Cut, hold: 5 * time.Second} }},
		{"network-cut", "19", suiteOne, false, func() fault { return &network{mode: rig.Cut, hold: rig.Lease + 5*time.Second} }},
		{"worker-frozen", "20", suiteOne, true, func() fault { return &workerFrozen{} }},
		{"worker-throttled", "22", suiteOne, false, func() fault { return &workerThrottled{} }},
		{"network-half-open", "23", suiteOne, false, func() fault { return &network{mode: rig.Hole, hold: rig.Lease + 5*time.Second} }},
		{"slow-consumer", "24", suiteOne, false, func() fault { return &network{mode: rig.Drip, hold: 10 * time.Second} }},
		{"slow-network", "24", suiteOne, false, func() fault { return &network{mode: rig.Delay, hold: 8 * time.Second} }},
		{"reports-repeated", "25,26", suiteOne, false, func() fault { return &reportsRepeated{} }},
		{"cancel-races", "32", suiteOne, false, func() fault { return &cancelRaces{} }},
		{"timeout-offline", "33", suiteOne, false, func() fault { return &timeoutOffline{} }},
		{"tokens-expire", "34", suiteOne, false, func() fault { return &tokensExpire{} }},
		{"garbage-published", "35", suiteOne, false, func() fault { return &garbagePublished{} }},
		{"worker-murdered", "36", suiteOne, false, func() fault { return &workerMurdered{} }},
		{"storm", "37", suiteOne, false, func() fault { return &storm{} }},
		{"rolling-restart", "39", suiteOne, false, func() fault { return &rollingRestart{} }},
		{"bits-flipped", "41", suiteDisk, false, func() fault { return &bitsFlipped{} }},
		{"registry-lost", "40", suiteOne, false, func() fault { return &registryLost{} }},
	}, containerFaults(), clusterFaults(), pointFaults())
}

// between draws a time.
func (s *scene) between(least, most time.Duration) time.Duration {
	return least + time.Duration(s.rng.Int64N(int64(most-least)))
}

// worker draws one that runs.
func (s *scene) worker() (*rig.Worker, error) {
	var up []*rig.Worker
	for _, w := range s.rig.Workers() {
		if w.Running() {
			up = append(up, w)
		}
	}
	if len(up) == 0 {
		return nil, errors.New("no worker runs")
	}
	return up[s.rng.IntN(len(up))], nil
}

// serviceKilled kills the copies of a service at seeded moments: first one after
// the other, then all at once.
type serviceKilled struct{ kind string }

func (f *serviceKilled) inject(ctx context.Context, s *scene) error {
	copies := s.rig.Kind(f.kind)
	for range 3 {
		victim := copies[s.rng.IntN(len(copies))]
		if err := victim.Kill(); err != nil {
			return err
		}
		wait(ctx, s.between(200*time.Millisecond, 1200*time.Millisecond))
		if err := victim.Start(); err != nil {
			return err
		}
		wait(ctx, s.between(200*time.Millisecond, 1500*time.Millisecond))
	}
	for _, victim := range copies {
		if err := victim.Kill(); err != nil {
			return err
		}
	}
	wait(ctx, s.between(200*time.Millisecond, 2*time.Second))
	return nil
}

func (f *serviceKilled) heal(_ context.Context, s *scene) error { return s.rig.StartAll() }

// workerKilled kills a worker. Its commands live on until it is back.
type workerKilled struct{}

func (workerKilled) inject(ctx context.Context, s *scene) error {
	for range 2 {
		w, err := s.worker()
		if err != nil {
			return err
		}
		if err := w.Kill(); err != nil {
			return err
		}
		wait(ctx, s.between(100*time.Millisecond, 3*time.Second))
		if err := w.Start(); err != nil {
			return err
		}
		wait(ctx, s.between(time.Second, 2*time.Second))
	}
	return nil
}

func (workerKilled) heal(_ context.Context, s *scene) error { return s.rig.StartAll() }

// hostDead kills a worker with all of its commands. It never returns; another
// worker with another id takes its place.
type hostDead struct{}

func (hostDead) inject(ctx context.Context, s *scene) error {
	w, err := s.worker()
	if err != nil {
		return err
	}
	if err := w.KillTree(); err != nil {
		return err
	}
	s.rig.Forget(w)
	wait(ctx, s.between(time.Second, 4*time.Second))
	return nil
}

func (hostDead) heal(_ context.Context, s *scene) error {
	_, err := s.rig.AddWorker()
	return err
}

// everythingKilled kills something drawn from all processes every moment, NATS
// and workers too, and starts it again.
type everythingKilled struct{}

func (everythingKilled) inject(ctx context.Context, s *scene) error {
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end) && ctx.Err() == nil; {
		all := s.rig.Processes()
		victim := all[s.rng.IntN(len(all))]
		if err := victim.Kill(); err != nil {
			return err
		}
		wait(ctx, s.between(50*time.Millisecond, 1500*time.Millisecond))
		if err := victim.Start(); err != nil {
			return err
		}
		wait(ctx, s.between(100*time.Millisecond, time.Second))
	}
	return nil
}

func (everythingKilled) heal(_ context.Context, s *scene) error { return s.rig.StartAll() }

// natsDown ends the NATS server for some seconds, by kill -9 or cleanly. Every
// submit meanwhile must be answered within the time that is promised, and never
// by a success.
type natsDown struct{ kill bool }

func (f natsDown) inject(ctx context.Context, s *scene) error {
	n := s.rig.NATS[0]
	if f.kill {
		if err := n.Kill(); err != nil {
			return err
		}
	} else if err := n.Stop(30 * time.Second); err != nil {
		return err
	}
	if err := s.refusedQuickly(ctx); err != nil {
		return err
	}
	wait(ctx, s.between(500*time.Millisecond, 4*time.Second))
	return nil
}

func (natsDown) heal(_ context.Context, s *scene) error { return s.rig.StartAll() }

// refusedQuickly submits while NATS is away: 503 within two seconds, and what a
// busy machine adds.
func (s *scene) refusedQuickly(ctx context.Context) error {
	const promised, slack = 2 * time.Second, 2 * time.Second
	began := time.Now()
	a := s.load.call(ctx, "canary", "POST", "/api/jobs/create", map[string]any{"command": "true"}, "", 10*time.Second)
	took := time.Since(began)
	switch {
	case ctx.Err() != nil:
		return nil
	case a.code != 503:
		return fmt.Errorf("a submit without NATS is answered %d (%v)", a.code, a.err)
	case took > promised+slack:
		return fmt.Errorf("a submit without NATS took %v", took)
	}
	return nil
}

// natsFrozen stops the server's process: connections stand and nothing answers.
type natsFrozen struct{}

func (natsFrozen) inject(ctx context.Context, s *scene) error {
	if err := s.rig.NATS[0].Signal(syscall.SIGSTOP); err != nil {
		return err
	}
	wait(ctx, s.between(3*time.Second, rig.Lease+4*time.Second))
	return nil
}

func (natsFrozen) heal(_ context.Context, s *scene) error {
	return s.rig.NATS[0].Signal(syscall.SIGCONT)
}

// network disturbs what is between one worker and the edges.
type network struct {
	mode rig.Mode
	hold time.Duration
	w    *rig.Worker
}

func (f *network) inject(ctx context.Context, s *scene) error {
	w, err := s.worker()
	if err != nil {
		return err
	}
	f.w = w
	w.Proxy.Set(f.mode)
	wait(ctx, f.hold)
	return nil
}

func (f *network) heal(context.Context, *scene) error {
	f.w.Proxy.Set(rig.Pass)
	return nil
}

// workerFrozen stops a worker and its commands past the end of its leases, as the
// sleep of a laptop does, and lets them go on.
type workerFrozen struct{ w *rig.Worker }

func (f *workerFrozen) inject(ctx context.Context, s *scene) error {
	w, err := s.worker()
	if err != nil {
		return err
	}
	f.w = w
	w.SignalTree(syscall.SIGSTOP)
	wait(ctx, rig.Lease+s.between(3*time.Second, 8*time.Second))
	return nil
}

func (f *workerFrozen) heal(context.Context, *scene) error {
	f.w.SignalTree(syscall.SIGCONT)
	return nil
}

// workerThrottled gives a worker a tenth of the time, in slices. None of its
// leases may be lost for that.
type workerThrottled struct{ w *rig.Worker }

func (f *workerThrottled) inject(ctx context.Context, s *scene) error {
	w, err := s.worker()
	if err != nil {
		return err
	}
	f.w = w
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end) && ctx.Err() == nil; {
		if err := w.Signal(syscall.SIGSTOP); err != nil {
			return err
		}
		wait(ctx, 180*time.Millisecond)
		if err := w.Signal(syscall.SIGCONT); err != nil {
			return err
		}
		wait(ctx, 20*time.Millisecond)
	}
	return nil
}

func (f *workerThrottled) heal(context.Context, *scene) error { return f.w.Signal(syscall.SIGCONT) }

// rollingRestart stops and starts every process of the server, one after the
// other, as an upgrade does. Each must stop cleanly. (That old and new programs
// understand each other is shown by the goldens of libs/core.)
type rollingRestart struct{}

func (rollingRestart) inject(ctx context.Context, s *scene) error {
	for _, p := range s.rig.Services {
		if err := p.Stop(60 * time.Second); err != nil {
			return err
		}
		if err := p.Start(); err != nil {
			return err
		}
		if err := s.rig.Ready(ctx); err != nil {
			return err
		}
	}
	w, err := s.worker()
	if err != nil {
		return err
	}
	if err := w.Stop(70 * time.Second); err != nil {
		return err
	}
	return w.Start()
}

func (rollingRestart) heal(_ context.Context, s *scene) error { return s.rig.StartAll() }

// registryLost removes the store of NATS while it is down. What the database has
// as live ends as failed, registry_reset; jobs that it did not have yet would be
// gone, which is not promised otherwise, so that the load rests before.
type registryLost struct{}

func (registryLost) inject(ctx context.Context, s *scene) error {
	if err := s.load.pause(ctx); err != nil {
		return err
	}
	for range 10 {
		p := history.Plan{Kind: "reset", MaxAttempts: 1}
		if _, err := s.load.submit(ctx, "canary", fmt.Sprintf("reset-%d", s.rng.Uint64()), p, s.load.spec(p, "-run", "8s")); err != nil {
			return err
		}
	}
	if err := s.projected(ctx); err != nil {
		return fmt.Errorf("before the loss: %w", err)
	}
	if err := s.rig.NATS[0].Kill(); err != nil {
		return err
	}
	for _, dir := range s.rig.StoreDirs() {
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	return nil
}

func (registryLost) heal(ctx context.Context, s *scene) error {
	if err := s.rig.StartAll(); err != nil {
		return err
	}
	if err := s.rig.Apply(ctx); err != nil {
		return err
	}
	s.load.resume()
	return s.rig.Ready(ctx)
}

// natsServerKilled kills one of three servers, leaders as it happens, and then
// another one after the first is back.
type natsServerKilled struct{}

func (natsServerKilled) inject(ctx context.Context, s *scene) error {
	for range 2 {
		n := s.rig.NATS[s.rng.IntN(len(s.rig.NATS))]
		if err := n.Kill(); err != nil {
			return err
		}
		wait(ctx, s.between(2*time.Second, 6*time.Second))
		if err := n.Start(); err != nil {
			return err
		}
		wait(ctx, s.between(4*time.Second, 6*time.Second))
	}
	return nil
}

func (natsServerKilled) heal(_ context.Context, s *scene) error { return s.rig.StartAll() }

// clusterKilled kills all three servers at once.
type clusterKilled struct{}

func (clusterKilled) inject(ctx context.Context, s *scene) error {
	for _, n := range s.rig.NATS {
		if err := n.Kill(); err != nil {
			return err
		}
	}
	wait(ctx, s.between(time.Second, 3*time.Second))
	return nil
}

func (clusterKilled) heal(_ context.Context, s *scene) error { return s.rig.StartAll() }

// byName finds faults of a suite; all of them for no names.
func byName(suite string, names []string) ([]entry, error) {
	var out []entry
	for _, e := range catalogue() {
		if e.suite == suite && (len(names) == 0 || slices.Contains(names, e.name)) {
			out = append(out, e)
		}
	}
	for _, n := range names {
		if !slices.ContainsFunc(catalogue(), func(e entry) bool { return e.name == n }) {
			return nil, fmt.Errorf("there is no fault %q", n)
		}
	}
	return out, nil
}
