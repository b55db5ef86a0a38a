package worker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/lifecycle"
	"github.com/cmdexec/cmdexec/services/worker/internal/clock"
	"github.com/cmdexec/cmdexec/services/worker/internal/docker"
	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
	"github.com/cmdexec/cmdexec/services/worker/internal/journal"
	"github.com/cmdexec/cmdexec/services/worker/internal/process"
	"github.com/cmdexec/cmdexec/services/worker/internal/runner"
	"github.com/cmdexec/cmdexec/services/worker/internal/session"
	"github.com/cmdexec/cmdexec/services/worker/internal/spool"
)

const (
	spoolMaxBytes = 2 << 30
	probeEvery    = 10 * time.Second
	reapEvery     = 2 * time.Minute
	reapTimeout   = 30 * time.Second
	// lastWords is how long a stopping worker tries to get its results to the edge.
	lastWords = 5 * time.Second
	// longestGrace is how long a command's own stop grace holds when the worker stops.
	longestGrace = 20 * time.Second
)

// StopTimeout is how long Run may take to return after its context has ended:
// the grace of commands, their kill, and the delivery of their results.
const StopTimeout = 45 * time.Second

// Deps is what a worker is given.
type Deps struct {
	Logger  *slog.Logger
	Metrics prometheus.Registerer // nil: not exported
}

// Service is a worker.
type Service struct {
	cfg       Config
	log       *slog.Logger
	id        string
	mark      string // of what runs here, kept in dir
	dir       string
	facts     Facts
	executors []executor.Executor
	spool     *spool.Spool
	journal   *journal.Journal
	runner    *runner.Runner
	session   *session.Session
	token     *tokenSource

	mu      sync.Mutex
	unready map[string]string // executors that take nothing now, and why
}

// New checks the settings, opens the data folder, claims the containers of an
// earlier life of this worker that Run goes on with, and removes what else that
// left running. It starts nothing.
func New(ctx context.Context, cfg Config, deps Deps) (*Service, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	if err := hideMemory(); err != nil {
		return nil, err
	}
	url, err := cfg.serverURL()
	if err != nil {
		return nil, err
	}
	names, err := cfg.executorNames()
	if err != nil {
		return nil, err
	}
	s := &Service{cfg: cfg, log: deps.Logger}
	if err := s.open(ctx, url, names); err != nil {
		return nil, errors.Join(err, s.close())
	}
	s.export(deps.Metrics)
	return s, nil
}

func (s *Service) open(ctx context.Context, url string, names []string) error {
	if err := s.openData(); err != nil {
		return err
	}
	var err error
	if s.facts, err = gatherFacts(&s.cfg); err != nil {
		return err
	}
	if err := s.openExecutors(ctx, names); err != nil {
		return err
	}
	clk := clock.NewSystem()
	byName := map[string]executor.Executor{}
	for _, x := range s.executors {
		byName[x.Name()] = x
	}
	s.runner, err = runner.New(runner.Config{
		Offer:    runner.Offer{Slots: s.slots(), CPU: s.facts.CPUCores, Memory: s.facts.TotalMemory},
		Backlog:  backlog,
		WorkerID: s.id, Executors: byName, Spool: s.spool, Clock: clk,
		Usage: machineUsage, Logger: s.log, Journal: s.journal, Boot: clock.Boot(),
	})
	if err != nil {
		return fmt.Errorf("DATA_DIR %s: take up what was not delivered: %w", s.dir, err)
	}
	for _, x := range s.executors { // all but what the runner has claimed
		if err := x.Recover(ctx); err != nil {
			s.log.Warn("something of an earlier run could not be removed", "executor", x.Name(), "error", err)
		}
	}
	s.session = session.New(session.Config{
		URL: url, Transport: session.Transport(s.cfg.Transport), Token: s.token.get, NewToken: s.token.set, Register: s.register,
		Runner: s.runner, Clock: clk, Logger: s.log,
	})
	return nil
}

// openData takes the data folder, before anything in it is read or written.
func (s *Service) openData() error {
	dir, err := s.cfg.dataDir()
	if err != nil {
		return err
	}
	s.dir = dir
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("DATA_DIR: %w", err)
	}
	s.spool, err = spool.Open(filepath.Join(dir, "spool"), spool.Options{MaxBytes: spoolMaxBytes, Log: s.log})
	if errors.Is(err, spool.ErrInUse) {
		return fmt.Errorf("DATA_DIR %s is in use by another worker: stop it, or name another folder", dir)
	}
	if err != nil {
		return fmt.Errorf("DATA_DIR: %w", err)
	}
	if s.journal, err = journal.Open(filepath.Join(dir, "attempts")); err != nil {
		return fmt.Errorf("DATA_DIR: %w", err)
	}
	if s.token, err = newTokenSource(&s.cfg, dir, s.log); err != nil {
		return err
	}
	s.id = s.token.workerID
	s.mark, err = keptMark(dir)
	return err
}

// close gives back what is open. What is spooled stays on the disk.
func (s *Service) close() error {
	var errs []error
	for _, x := range s.executors {
		if c, ok := x.(io.Closer); ok {
			errs = append(errs, c.Close())
		}
	}
	if s.spool != nil {
		errs = append(errs, s.spool.Close())
	}
	return errors.Join(errs...)
}

func (s *Service) openExecutors(ctx context.Context, names []string) error {
	for _, name := range names {
		switch name {
		case job.ExecutorProcess:
			x, err := process.New(process.Options{DataDir: s.dir, WorkerID: s.id, Mark: s.mark, Log: s.log})
			if err != nil {
				return fmt.Errorf("process executor: %w", err)
			}
			s.executors = append(s.executors, x)
		case job.ExecutorDocker, executorAuto:
			x, err := docker.New(docker.Options{
				Host: s.cfg.DockerHost, CertDir: s.cfg.DockerCertPath, ConfigDir: s.cfg.dockerConfig(), WorkerID: s.id, Mark: s.mark,
				Runtime: s.cfg.ContainerRuntime, AllowBridge: s.cfg.AllowNetwork, Survive: s.cfg.AdoptContainers, Log: s.log,
				Warm: docker.Warm{
					Containers: min(s.cfg.WarmContainers, s.slots()), MemoryMB: int64(s.cfg.WarmMemory) >> 20,
					Age: time.Duration(s.cfg.WarmSeconds) * time.Second,
				},
			})
			if err != nil {
				return fmt.Errorf("docker executor: %w", err)
			}
			// An engine that is away may have what this worker is to go on with.
			if name == executorAuto && s.journal.Empty() && !s.answers(ctx, x) {
				continue
			}
			s.executors = append(s.executors, x)
		}
	}
	if len(s.executors) == 0 {
		return errors.New("no executor: no Docker engine answers here; start one, or set EXECUTORS=process to let jobs run as " +
			"processes of this machine, with the rights of this user")
	}
	return nil
}

// answers reports whether an executor that nobody asked for by name can be had,
// and gives it back where not.
func (s *Service) answers(ctx context.Context, x *docker.Executor) bool {
	probe, cancel := context.WithTimeout(ctx, probeEvery/2)
	defer cancel()
	err := x.Probe(probe)
	if err == nil {
		return true
	}
	s.log.Info("containers are not run here", "because", err)
	if err := x.Close(); err != nil {
		s.log.Debug("docker client not closed", "error", err)
	}
	return false
}

// Describe says what this worker offers, for the person who started it.
func (s *Service) Describe() Description {
	d := Description{WorkerID: s.id, Slots: s.slots(), Facts: s.facts, DataDir: s.dir}
	for _, x := range s.executors {
		d.Executors = append(d.Executors, x.Name())
	}
	return d
}

// Description is what a worker offers.
type Description struct {
	WorkerID  string
	Executors []string
	Slots     int
	DataDir   string
	Facts
}

// backlog is how many assignments may wait here for room. It bounds what goes back
// when jobs turn out to be long.
const backlog = 64

func (s *Service) slots() int { return s.cfg.slots(s.facts.CPUCores) }

func (s *Service) register() workerproto.Register {
	reg := workerproto.Register{
		WorkerID: s.id, Hostname: s.facts.Hostname, OS: s.facts.OS, Arch: s.facts.Arch,
		CPUCores: s.facts.CPUCores, TotalMemory: s.facts.TotalMemory, Labels: s.cfg.Labels,
		Slots: s.slots(), Backlog: backlog, Version: api.Version, Executors: []string{},
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, x := range s.executors {
		if s.unready[x.Name()] == "" {
			reg.Executors = append(reg.Executors, x.Name())
		}
	}
	slices.Sort(reg.Executors)
	return reg
}

// Ready is nil while the worker is connected and can take work.
func (s *Service) Ready() error {
	if err := s.session.Ready(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, why := range s.unready {
		return fmt.Errorf("%s: %s", name, why)
	}
	return nil
}

// Run works until ctx ends. Then it stops the commands (signal, grace, kill),
// tries for a few seconds to deliver their results, and returns nil within
// StopTimeout; what was not delivered is sent after the next start. It may be
// called once.
func (s *Service) Run(ctx context.Context) error {
	online, disconnect := context.WithCancel(context.WithoutCancel(ctx))
	defer disconnect()
	s.runner.Begin()
	var all sync.WaitGroup
	all.Go(func() { _ = s.session.Run(online) }) // returns nil only
	all.Go(func() { s.watchLeases(online) })
	all.Go(func() { s.watchExecutors(online) })

	<-ctx.Done()
	s.keepWarm(func(string) bool { return false })
	grace, cancel := context.WithTimeout(online, longestGrace)
	s.runner.Stop(grace)
	cancel()
	s.deliver()
	disconnect()
	all.Wait()
	return s.close()
}

// watchLeases gives up leases in time, whatever an executor is busy with.
func (s *Service) watchLeases(ctx context.Context) {
	for lifecycle.Sleep(ctx, s.runner.GiveUpLeases()) == nil {
	}
}

// watchExecutors asks the executors whether they can work, and lets them reap.
func (s *Service) watchExecutors(ctx context.Context) {
	reaped := time.Now()
	for {
		s.probe(ctx)
		if time.Since(reaped) >= reapEvery || s.untidy() {
			s.reap(ctx)
			reaped = time.Now()
		}
		if lifecycle.Sleep(ctx, probeEvery) != nil {
			return
		}
	}
}

func (s *Service) probe(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, probeEvery/2)
	defer cancel()
	unready := map[string]string{}
	for _, x := range s.executors {
		if err := x.Probe(ctx); err != nil {
			unready[x.Name()] = err.Error()
		}
	}
	s.mu.Lock()
	before := s.unready
	s.unready = unready
	s.mu.Unlock()
	s.runner.Unready(unready)
	draining := s.runner.Draining()
	s.keepWarm(func(name string) bool { return !draining && unready[name] == "" })
	changed := false
	for _, x := range s.executors {
		switch was, is := before[x.Name()], unready[x.Name()]; {
		case was == "" && is != "":
			s.log.Error("executor takes no work until this is repaired", "executor", x.Name(), "problem", is)
			changed = true
		case was != "" && is == "":
			s.log.Info("executor takes work again", "executor", x.Name())
			changed = true
		}
	}
	if changed && before != nil {
		s.session.Reconnect() // a new hello says what this worker runs now
	}
}

// keepWarm tells the executors that can keep something ready whether they should.
func (s *Service) keepWarm(should func(name string) bool) {
	for _, x := range s.executors {
		if w, ok := x.(interface{ KeepWarm(on bool) }); ok {
			w.KeepWarm(should(x.Name()))
		}
	}
}

// reap removes what nobody holds any more of the executors that know how.
func (s *Service) reap(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, reapTimeout)
	defer cancel()
	held := map[string]bool{}
	for _, l := range s.runner.Holding() {
		held[l.LeaseID] = true
	}
	for _, x := range s.executors {
		if r, ok := x.(reaper); ok {
			if err := r.Reap(ctx, func(leaseID string) bool { return held[leaseID] }); err != nil {
				s.log.Warn("leftovers not removed, tried again", "executor", x.Name(), "error", err)
			}
		}
	}
}

// reaper is an executor that can leave something behind while the worker lives.
type reaper interface {
	Reap(ctx context.Context, holds func(leaseID string) bool) error
	Untidy() bool // something may be left just now
}

func (s *Service) untidy() bool {
	return slices.ContainsFunc(s.executors, func(x executor.Executor) bool {
		r, ok := x.(reaper)
		return ok && r.Untidy()
	})
}

// deliver waits until every result is acknowledged, while there is a connection
// and not for long.
func (s *Service) deliver() {
	deadline := time.NewTimer(lastWords)
	defer deadline.Stop()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !s.runner.Idle() && s.session.Ready() == nil {
		select {
		case <-tick.C:
		case <-deadline.C:
			s.log.Warn("some results were not delivered, they are sent after the next start")
			return
		}
	}
}

func (s *Service) export(reg prometheus.Registerer) {
	if reg == nil {
		return
	}
	gauge := func(name, help string, f func() float64) {
		reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Namespace: "cmdexec", Subsystem: "worker", Name: name, Help: help,
		}, f))
	}
	gauge("slots", "Jobs that this worker runs at once.", func() float64 { return float64(s.slots()) })
	gauge("slots_used", "Jobs that run now.", func() float64 { return float64(s.runner.Busy()) })
	gauge("connected", "1 while the edge has welcomed this worker.", func() float64 {
		if s.session.Ready() == nil {
			return 1
		}
		return 0
	})
}
