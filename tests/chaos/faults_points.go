package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"syscall"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/kit/failpoint"
	"github.com/cmdexec/cmdexec/tests/chaos/history"
	"github.com/cmdexec/cmdexec/tests/chaos/rig"
)

// pointFaults are those that kill a program exactly between two of its steps. All
// points of a program are one fault, one after the other. The figure is how often
// a program passes the point before it dies: the first times are those of its start,
// where other work may be missing.
func pointFaults() []entry {
	return []entry{
		{"point-gateway", "1", suiteOne, false, func() fault {
			return points{
				{kind: rig.Gateway, name: failpoint.GatewayBeforeCreate, action: "kill@2"},
				{kind: rig.Gateway, name: failpoint.GatewayAfterCreate, action: "kill@2"},
				{kind: rig.Gateway, name: failpoint.GatewayBeforeCreate, action: "kill=400ms", do: createdUnacknowledged},
			}
		}},
		{"point-scheduler", "2", suiteOne, false, func() fault {
			return points{
				{kind: rig.Scheduler, name: failpoint.SchedulerPushed, action: "kill@2", alone: true},
				{kind: rig.Scheduler, name: failpoint.SchedulerAssigned, action: "kill@3", alone: true},
				{kind: rig.Scheduler, name: failpoint.SchedulerDecided, action: "kill@3", alone: true},
			}
		}},
		{"point-edge", "3", suiteOne, false, func() fault {
			return points{
				{kind: rig.Edge, name: failpoint.EdgeLogged, action: "kill@2", alone: true},
				{kind: rig.Edge, name: failpoint.EdgeReported, action: "kill@2", alone: true},
				{kind: rig.Edge, name: failpoint.EdgeDelivered, action: "kill@2", alone: true},
			}
		}},
		{"point-worker", "4", suiteOne, false, func() fault {
			return points{
				{name: failpoint.WorkerStarted, action: "kill@2"},
				{name: failpoint.WorkerEnded, action: "kill@2"},
				{name: failpoint.WorkerSpooled, action: "kill@2"},
				{name: failpoint.WorkerAcked, action: "kill@2"},
			}
		}},
		{"point-collector", "6", suiteOne, false, func() fault {
			return points{
				{kind: rig.Collector, name: failpoint.CollectorSettled, action: "kill@2"},
				{kind: rig.Collector, name: failpoint.CollectorArchived, action: "kill@2"},
			}
		}},
		{"point-persister", "7", suiteOne, false, func() fault {
			return points{
				{kind: rig.Persister, name: failpoint.PersisterStored, action: "kill@2"},
				{kind: rig.Persister, name: failpoint.PersisterBeforePurge, action: "kill@2"},
			}
		}},
	}
}

// point is a moment at which one process of a kind dies.
type point struct {
	kind   string // of service; empty: a worker
	name   failpoint.Name
	action string
	alone  bool // the other copies are down, so that the work comes to this one

	do func(context.Context, *scene, *point, *rig.Service) error // instead of waiting for jobs of the load
}

// fires bounds how long a program may take to come to a point: a scheduler first
// has to become the leader.
const fires = time.Minute

// points is a fault: at each of them one process after the other kills itself.
type points []point

func (f points) inject(ctx context.Context, s *scene) error {
	for _, p := range f {
		if err := p.inject(ctx, s); err != nil {
			return fmt.Errorf("failpoint %s: %w", p.name, err)
		}
		wait(ctx, s.between(0, 500*time.Millisecond))
		if p.alone {
			continue // the other copies stay down until it is their turn
		}
		if err := s.rig.StartAll(); err != nil {
			return err
		}
	}
	return nil
}

func (f points) heal(_ context.Context, s *scene) error { return s.rig.StartAll() }

func (p *point) inject(ctx context.Context, s *scene) error {
	victim, service, err := p.victim(s)
	if err != nil {
		return err
	}
	if p.do != nil {
		return p.do(ctx, s, p, service)
	}
	if err := victim.Kill(); err != nil {
		return err
	}
	if err := victim.StartArmed(string(p.name) + ":" + p.action); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, fires)
	defer cancel()
	working, done := context.WithCancel(ctx)
	worked := make(chan error, 1)
	go func() { worked <- s.work(working) }()
	err = victim.AwaitKill(ctx)
	done()
	return errors.Join(err, <-worked)
}

// victim draws the process, and ends the other copies where it has to be alone.
// They end cleanly: a scheduler that is killed keeps its successor waiting.
func (p *point) victim(s *scene) (*rig.Process, *rig.Service, error) {
	if p.kind == "" {
		w, err := s.worker()
		if err != nil {
			return nil, nil, err
		}
		return w.Process, nil, nil
	}
	copies := s.rig.Kind(p.kind)
	victim := copies[s.rng.IntN(len(copies))]
	if p.alone {
		for _, c := range copies {
			if err := c.Stop(time.Minute); err != nil {
				return nil, nil, err
			}
		}
	}
	return victim.Process, victim, nil
}

// work submits jobs, with output that is sent while they run, until ctx ends: the
// load may pause, and a point must be passed all the same.
func (s *scene) work(ctx context.Context) error {
	began := time.Now().UnixNano()
	for n := 0; ctx.Err() == nil; n++ {
		p := history.Plan{Kind: "pointed", MaxAttempts: 1, Lines: 12}
		spec := s.load.spec(p, "-run", "400ms", "-lines", strconv.Itoa(p.Lines))
		s.load.http.CloseIdleConnections() // else a gateway that was started just now gets none
		if _, err := s.load.submit(ctx, "canary", fmt.Sprintf("pointed-%d-%d", began, n), p, spec); err != nil {
			return err
		}
		wait(ctx, 300*time.Millisecond)
	}
	return nil
}

// createdUnacknowledged kills a gateway between a create and its acknowledgement:
// NATS is frozen, so that the create is in its socket and nothing comes back, and
// thawed when the gateway is dead. Whoever repeats the submit must get that job.
func createdUnacknowledged(ctx context.Context, s *scene, point *point, gateway *rig.Service) error {
	if err := gateway.Kill(); err != nil {
		return err
	}
	// Where the load does not find it, so that no other create comes to the point.
	addr, err := s.rig.StartAside(gateway, string(point.name)+":"+point.action)
	if err != nil {
		return err
	}
	if err := s.rig.Ready(ctx); err != nil {
		return err
	}
	const user = "canary"
	key := fmt.Sprintf("unacknowledged-%d", s.rng.Uint64())
	p := history.Plan{Kind: "unacknowledged", MaxAttempts: 1}
	spec := s.load.spec(p, "-run", "100ms")
	spec["labels"] = map[string]string{"key": key}
	if err := s.rig.NATS[0].Signal(syscall.SIGSTOP); err != nil {
		return err
	}
	begin := time.Now().UnixNano()
	answered := s.load.by(addr).call(ctx, user, http.MethodPost, "/api/jobs/create", spec, key, 10*time.Second)
	dying, cancel := context.WithTimeout(ctx, fires)
	defer cancel()
	err = errors.Join(gateway.AwaitKill(dying), s.rig.NATS[0].Signal(syscall.SIGCONT))
	s.w.Add(history.Event{Submit: &history.Submit{Key: key, Plan: p, Begin: begin, Code: answered.code, Target: "create"}})
	switch {
	case err != nil:
		return err
	case answered.code != 0:
		return fmt.Errorf("a gateway answers %d without NATS before it is killed", answered.code)
	}
	if err := s.rig.StartAll(); err != nil {
		return err
	}
	want := id.Keyed(user, key)
	if err := s.stays(ctx, want); err != nil {
		return err
	}
	have, err := s.load.submit(ctx, user, key, p, spec)
	if err == nil && have != want {
		err = fmt.Errorf("the repeated submit is answered with job %s and not %s", have, want)
	}
	return err
}

// stays waits until the registry has a job whose create nobody was told of.
func (s *scene) stays(ctx context.Context, jobID string) error {
	conn, err := s.rig.Bus(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := until(ctx, func() error {
		_, err := conn.Registry().GetLatest(ctx, jobID)
		return err
	}); err != nil {
		return fmt.Errorf("the create of a gateway that died did not come through: %w", err)
	}
	return nil
}

// by is the same users at one copy of a service.
func (l *load) by(addr string) *load {
	var dialer net.Dialer
	return &load{users: map[string]string{}, http: &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "tcp", addr)
		},
	}}}
}
