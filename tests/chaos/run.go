package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/tests/chaos/check"
	"github.com/cmdexec/cmdexec/tests/chaos/history"
	"github.com/cmdexec/cmdexec/tests/chaos/rig"
)

// options of a run.
type options struct {
	Suite    string
	Seed     uint64
	Faults   []string      // names; all of the suite when empty
	Duration time.Duration // the schedule is repeated until it is over; 0 for once
	Rate     float64       // jobs a second, all clients together
	Jobs     int           // most jobs of the mix; 0 for no limit
	Storm    int           // idle workers of a storm; 0 for stormWorkers
	BinDir   string
	Dir      string // of the run; made, and removed where the run is good unless Keep
	Keep     bool
	Log      io.Writer
}

func (o options) command() string {
	c := fmt.Sprintf("make chaos SEED=%d SUITE=%s RATE=%g", o.Seed, o.Suite, o.Rate)
	if o.Duration > 0 {
		c += " DURATION=" + o.Duration.String()
	}
	if len(o.Faults) > 0 {
		c += " FAULTS=" + strings.Join(o.Faults, ",")
	}
	return c
}

// The bounds of a busy machine of two cores.
var bounds = history.Bounds{Recovery: 90 * time.Second, Drain: 3 * time.Minute, Overlap: 3 * time.Second}

// replicaLag is how old an answer may be that one of three NATS servers gives by
// itself. Nothing is decided on such a read.
const replicaLag = 2 * time.Second

const clients = 8

// run makes one run and judges it. The error says that the run itself could not
// be made; broken promises are in the verdict.
func run(ctx context.Context, o options) (v check.Verdict, err error) {
	entries, err := byName(o.Suite, o.Faults)
	if err != nil {
		return v, err
	}
	if len(entries) == 0 {
		return v, fmt.Errorf("there is no fault to inject in suite %q", o.Suite)
	}
	path := filepath.Join(o.Dir, "history.jsonl")
	w, err := history.Create(path)
	if err != nil {
		return v, err
	}
	runErr := live(ctx, o, entries, w)
	if err := errors.Join(runErr, w.Close()); err != nil {
		return v, err
	}
	f, err := os.Open(path)
	if err != nil {
		return v, err
	}
	defer f.Close()
	events, err := history.Read(f)
	if err != nil {
		return v, err
	}
	return check.Check(events), nil
}

// live is the part of a run with processes.
func live(ctx context.Context, o options, entries []entry, w *history.Writer) (err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ro := rig.Options{
		Dir: o.Dir, BinDir: o.BinDir, Workers: 3,
		// The registry is small so that it can be filled; the rest follows.
		Sizes: bus.Sizes{Jobs: 16 << 20, Results: 64 << 20, Logs: 128 << 20},
	}
	s := &scene{w: w, rng: rand.New(rand.NewPCG(o.Seed, 0)), log: o.Log, storm: o.Storm}
	switch o.Suite {
	case suiteCluster:
		ro.NATSServers = 3
	case suiteDocker:
		ro.Containers, ro.Workers = true, 2
	case suiteDisk:
		if s.disk, err = newSmallDisk(o.Dir); err != nil {
			return fmt.Errorf("a file system of the run's own (this needs root): %w", err)
		}
		defer func() { err = errors.Join(err, s.disk.unmount()) }()
		ro.NATSDir = filepath.Join(s.disk.dir, "nats")
	}
	r, err := rig.New(ro)
	if err != nil {
		return err
	}
	defer r.Close()
	s.rig = r
	starting, done := context.WithTimeout(ctx, 2*time.Minute)
	defer done()
	if err := r.Start(starting); err != nil {
		return fmt.Errorf("start the product: %w", err)
	}
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.name
	}
	promised := bounds
	if o.Suite == suiteCluster {
		promised.Stale = replicaLag
	}
	w.Add(history.Event{Run: &history.Run{Seed: o.Seed, Faults: names, Command: o.command(), Bounds: promised}})

	loading, stopLoad := context.WithCancel(ctx)
	defer stopLoad()
	l := newLoad(r, w, o.Jobs)
	l.stop = loading
	s.load = l
	if _, err := l.canary(starting); err != nil {
		return fmt.Errorf("nothing runs before the first fault: %w", err)
	}
	before := measure(ctx, r)

	var submitting, watching sync.WaitGroup
	clientErrs := make([]error, clients)
	users := []string{"ann", "bob", "cid"}
	for i := range clients {
		rng := rand.New(rand.NewPCG(o.Seed, uint64(i)+1))
		submitting.Go(func() {
			clientErrs[i] = l.client(ctx, users[i%len(users)], rng, o.Rate/clients)
		})
	}
	watch, stopWatching := context.WithCancel(ctx)
	defer stopWatching()
	for range 2 {
		watching.Go(func() { l.reader(watch) })
	}
	for _, u := range append(users, "canary", "racer") {
		watching.Go(func() { l.follow(watch, u) })
	}
	faultErr := s.schedule(ctx, o, entries)
	stopLoad()
	if faultErr != nil {
		cancel() // clients would try again until they are answered
	}
	submitting.Wait()
	if err := errors.Join(append(clientErrs, faultErr)...); err != nil {
		return err
	}
	s.quiet(ctx)
	stopWatching()
	watching.Wait()
	return s.collect(ctx, before)
}

// schedule injects faults one after the other, in an order drawn by the seed, as
// often as there is time.
func (s *scene) schedule(ctx context.Context, o options, entries []entry) error {
	end := time.Now().Add(o.Duration)
	for round := 0; round == 0 || time.Now().Before(end); round++ {
		order := slices.Clone(entries)
		s.rng.Shuffle(len(order), func(i, k int) { order[i], order[k] = order[k], order[i] })
		for _, e := range order {
			if round > 0 && !time.Now().Before(end) {
				break
			}
			if err := s.one(ctx, o, e); err != nil {
				return err
			}
		}
	}
	return ctx.Err()
}

func (s *scene) one(ctx context.Context, o options, e entry) error {
	wait(ctx, s.between(500*time.Millisecond, 2*time.Second)) // jobs are under way
	note := func(phase string, took time.Duration) {
		s.w.Add(history.Event{Fault: &history.Fault{Name: e.name, Row: e.row, Phase: phase, Took: took, Frozen: e.frozen}})
	}
	f := e.make()
	began := time.Now()
	note(history.Inject, 0)
	injectErr := f.inject(ctx, s)
	healErr := f.heal(ctx, s)
	note(history.Heal, 0)
	if err := errors.Join(injectErr, healErr); err != nil {
		return fmt.Errorf("fault %s: %w", e.name, err)
	}
	recovering, cancel := context.WithTimeout(ctx, 2*bounds.Recovery)
	defer cancel()
	took, err := s.load.canary(recovering)
	if err != nil {
		return fmt.Errorf("no job runs %v after fault %s: %w", took, e.name, err)
	}
	note(history.Recover, took)
	fmt.Fprintf(o.Log, "%-20s row %-5s lasted %5.1fs, a new job had run after %5.2fs; %d jobs acknowledged, %d open\n",
		e.name, e.row, (time.Since(began) - took).Seconds(), took.Seconds(), s.load.acked.Load(), len(s.load.openJobs()))
	return nil
}

// quiet waits until every job has ended and the database is the registry.
func (s *scene) quiet(ctx context.Context) {
	began := time.Now()
	limit, cancel := context.WithTimeout(ctx, 2*bounds.Drain)
	defer cancel()
	_ = until(limit, func() error { // what is open then is counted
		if n := len(s.load.openJobs()); n > 0 {
			return fmt.Errorf("%d jobs are open", n)
		}
		return nil
	})
	_ = s.projected(limit) // the checker says what differs
	s.w.Add(history.Event{Quiet: &history.Quiet{Took: time.Since(began), Open: len(s.load.openJobs())}})
}

// stored reads the registry and the database.
func (s *scene) stored(ctx context.Context) ([]history.Stored, error) {
	conn, err := s.rig.Bus(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	var all []history.Stored
	if err := conn.Registry().Scan(ctx, func(e bus.Entry) error {
		all = append(all, history.Stored{
			Where: history.Registry, JobID: e.Record.ID, Version: e.Record.Version, State: e.Record.State, Key: e.Record.Spec.Labels["key"],
		})
		return nil
	}); err != nil {
		return nil, fmt.Errorf("read the registry: %w", err)
	}
	rows, err := readDatabase(ctx, s.rig.Database())
	return append(all, rows...), err
}

// projected waits until every live key of the registry is in the database as it
// is in the registry.
func (s *scene) projected(ctx context.Context) error {
	return until(ctx, func() error {
		all, err := s.stored(ctx)
		if err != nil {
			return err
		}
		have := map[string]uint64{}
		for _, x := range all {
			if x.Where == history.Database {
				have[x.JobID] = x.Version
			}
		}
		for _, x := range all {
			if x.Where == history.Registry && have[x.JobID] != x.Version {
				return fmt.Errorf("%s: the registry has version %d, the database %d", x.JobID, x.Version, have[x.JobID])
			}
		}
		return nil
	})
}

// readJournals adds what the commands wrote themselves.
func readJournals(dir string, w *history.Writer) error {
	files, err := filepath.Glob(filepath.Join(dir, "journal-*.jsonl"))
	if err != nil {
		return err
	}
	for _, name := range files {
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		worker := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(name), "journal-"), ".jsonl")
		for lines := bufio.NewScanner(f); lines.Scan(); {
			var n history.Journal
			if err := json.Unmarshal(lines.Bytes(), &n); err != nil {
				_ = f.Close()
				return fmt.Errorf("%s has the line %q: %w", name, lines.Text(), err)
			}
			n.Worker = worker
			w.Add(history.Event{Journal: &n})
		}
		_ = f.Close()
	}
	return nil
}
