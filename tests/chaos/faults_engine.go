package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"syscall"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/tests/chaos/history"
	"github.com/cmdexec/cmdexec/tests/chaos/rig"
)

// containerFaults are those of the suite docker, in which every job is a container.
func containerFaults() []entry {
	return []entry{
		{"containers-adopted", "4", suiteDocker, false, func() fault { return &containersAdopted{} }},
		{"containers-outlived", "5", suiteDocker, false, func() fault { return &containersOutlived{} }},
		{"container-worker-killed", "4", suiteDocker, false, func() fault { return &workerKilled{} }},
		{"engine-killed", "17", suiteDocker, false, func() fault { return &engineDown{kill: true} }},
		{"engine-killed-live", "17", suiteDocker, false, func() fault { return &engineDown{kill: true, live: true} }},
		{"engine-restarted", "17", suiteDocker, false, func() fault { return &engineDown{} }},
		{"engine-restarted-live", "17", suiteDocker, false, func() fault { return &engineDown{live: true} }},
		{"engine-frozen", "18", suiteDocker, false, func() fault { return &engineFrozen{} }},
	}
}

// broken says that a promise was broken for which the checker has no facts.
func (s *scene) broken(format string, args ...any) {
	s.w.Add(history.Event{Left: &history.Left{What: fmt.Sprintf(format, args...)}})
}

// running submits a job and waits until its command runs.
func (s *scene) running(ctx context.Context, p history.Plan, args ...string) (*api.Job, error) {
	spec := s.load.spec(p, args...)
	spec["priority"] = 100
	id, err := s.load.submit(ctx, "canary", fmt.Sprintf("%s-%d", p.Kind, s.rng.Uint64()), p, spec)
	if err != nil {
		return nil, err
	}
	var at *api.Job
	return at, s.within(ctx, time.Minute, func() error {
		j, code := s.load.read(ctx, "canary", id)
		if j == nil {
			return fmt.Errorf("the job is answered %d", code)
		}
		if j.Status != job.Running {
			return fmt.Errorf("the job is %s", j.Status)
		}
		at = j
		return nil
	})
}

// ended waits until a job has ended.
func (s *scene) ended(ctx context.Context, within time.Duration, id string) (*api.Job, error) {
	var end *api.Job
	return end, s.within(ctx, within, func() error {
		j, code := s.load.read(ctx, "canary", id)
		switch {
		case j == nil:
			return fmt.Errorf("the job is answered %d", code)
		case !j.Status.Terminal():
			return fmt.Errorf("the job is %s at attempt %d", j.Status, j.Attempt)
		}
		end = j
		return nil
	})
}

// runner is the worker that a job runs on.
func (s *scene) runner(j *api.Job) (*rig.Worker, error) {
	for _, w := range s.rig.Workers() {
		if w.ID == j.WorkerID {
			return w, nil
		}
	}
	return nil, errors.New("the job runs on no worker of the rig")
}

// containers are those of one attempt.
func (s *scene) containers(ctx context.Context, j *api.Job) ([]string, error) {
	all, err := s.rig.Engine.Containers(ctx)
	if err != nil {
		return nil, err
	}
	var ids []string
	for _, c := range all {
		if c.Runs(j.JobID, j.Attempt) {
			ids = append(ids, c.ID)
		}
	}
	return ids, nil
}

// engineDown ends the container engine for some seconds, by kill -9 or cleanly.
// Live: containers go on without it. Whatever becomes of them, no job may be called
// succeeded or failed whose command did not end so; what was cut off is tried again.
type engineDown struct{ kill, live bool }

func (f *engineDown) inject(ctx context.Context, s *scene) error {
	e := s.rig.Engine
	if err := e.KeepContainers(f.live); err != nil {
		return err
	}
	wait(ctx, 500*time.Millisecond) // it has read that
	if _, err := s.running(ctx, history.Plan{Kind: "across", MaxAttempts: 1, Lines: 20}, "-run", "6s", "-lines", "20"); err != nil {
		return err
	}
	if f.kill {
		if err := e.Kill(); err != nil {
			return err
		}
	} else if err := e.Stop(60 * time.Second); err != nil {
		return err
	}
	wait(ctx, s.between(time.Second, 5*time.Second))
	return nil
}

func (f *engineDown) heal(ctx context.Context, s *scene) error {
	if err := s.rig.StartAll(); err != nil {
		return err
	}
	limit, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return s.rig.Engine.Answers(limit)
}

// engineFrozen stops the daemon's process: it accepts and never answers.
// Containers go on.
type engineFrozen struct{}

func (engineFrozen) inject(ctx context.Context, s *scene) error {
	if _, err := s.running(ctx, history.Plan{Kind: "across", MaxAttempts: 1, Lines: 20}, "-run", "6s", "-lines", "20"); err != nil {
		return err
	}
	if err := s.rig.Engine.Signal(syscall.SIGSTOP); err != nil {
		return err
	}
	wait(ctx, 20*time.Second)
	return nil
}

func (engineFrozen) heal(_ context.Context, s *scene) error {
	return s.rig.Engine.Signal(syscall.SIGCONT)
}

// containersAdopted kills a worker in the middle of a container and starts it
// again within the lease: the same container must go on, started once, with every
// line of its output.
type containersAdopted struct{}

const (
	// backWithin is when a killed worker must be connected again for its lease to be
	// confirmed in time: some of the lease has passed before, and it gives up before it is over.
	backWithin = rig.Lease / 2
	// adoptions is how often a machine that is too slow for that has another try.
	adoptions = 4
)

func (f containersAdopted) inject(ctx context.Context, s *scene) error {
	for range adoptions {
		inTime, err := f.adopt(ctx, s)
		if inTime || err != nil {
			return err
		}
	}
	return fmt.Errorf("in %d tries no worker was connected again within %v", adoptions, backWithin)
}

// adopt reports whether the worker was back in time, each time that it was killed:
// else nothing is promised.
func (containersAdopted) adopt(ctx context.Context, s *scene) (inTime bool, err error) {
	const lines = 100
	p := history.Plan{Kind: "adopted", MaxAttempts: 1, Lines: lines}
	j, err := s.running(ctx, p, "-run", "12s", "-lines", strconv.Itoa(lines))
	if err != nil {
		return false, err
	}
	w, err := s.runner(j)
	if err != nil {
		return false, err
	}
	before, err := s.containers(ctx, j)
	if err != nil {
		return false, err
	}
	inTime = true
	for range 2 {
		away, err := s.killedAndBack(ctx, w)
		if err != nil {
			return false, err
		}
		inTime = inTime && away < backWithin
	}
	after, err := s.containers(ctx, j)
	if err != nil {
		return false, err
	}
	end, err := s.ended(ctx, time.Minute, j.JobID)
	switch {
	case err != nil || !inTime:
		return false, err
	case len(before) != 1 || !slices.Equal(before, after):
		s.broken("job %s was in the containers %v, and is in %v after its worker was killed and back", j.JobID, before, after)
	case end.Status != job.Succeeded || end.Attempt != j.Attempt || end.Logs == nil || !end.Logs.Complete:
		s.broken("job %s was not gone on with after its worker was killed and back: %s at attempt %d of %d, output %+v",
			j.JobID, end.Status, end.Attempt, j.Attempt, end.Logs)
	}
	return true, nil
}

// killedAndBack kills a worker, starts it again after a moment, and says how long it
// was not connected.
func (s *scene) killedAndBack(ctx context.Context, w *rig.Worker) (away time.Duration, err error) {
	connections := func() (int, error) {
		log, err := os.ReadFile(w.Log())
		return bytes.Count(log, []byte("connected to the server")), err
	}
	before, err := connections()
	if err != nil {
		return 0, err
	}
	began := time.Now()
	if err := w.Kill(); err != nil {
		return 0, err
	}
	wait(ctx, s.between(200*time.Millisecond, 2*time.Second))
	if err := w.Start(); err != nil {
		return 0, err
	}
	err = s.within(ctx, time.Minute, func() error {
		n, err := connections()
		if err == nil && n == before {
			err = errors.New("the worker is not connected again")
		}
		return err
	})
	return time.Since(began), err
}

func (containersAdopted) heal(_ context.Context, s *scene) error { return s.rig.StartAll() }

// containersOutlived kills a worker and starts it again when its leases are over:
// what it finds it must remove, and not go on with. (Its job may start once only:
// what runs on while nobody can end it is not promised to be alone.)
type containersOutlived struct{}

func (containersOutlived) inject(ctx context.Context, s *scene) error {
	j, err := s.running(ctx, history.Plan{Kind: "outlived", MaxAttempts: 1, LostFails: true}, "-run", "3m")
	if err != nil {
		return err
	}
	w, err := s.runner(j)
	if err != nil {
		return err
	}
	if err := w.Kill(); err != nil {
		return err
	}
	end, err := s.ended(ctx, rig.Lease+rig.GraceSeconds*time.Second+20*time.Second, j.JobID)
	if err != nil {
		return err
	}
	if end.Status != job.Failed || end.Reason != job.ReasonWorkerLost {
		s.broken("job %s ended %s (%s) when its worker was lost", j.JobID, end.Status, end.Reason)
	}
	if err := w.Start(); err != nil {
		return err
	}
	return s.within(ctx, time.Minute, func() error {
		left, err := s.containers(ctx, j)
		if err == nil && len(left) > 0 {
			err = fmt.Errorf("container %s is there after its worker is back and its lease is over", left[0])
		}
		return err
	})
}

func (containersOutlived) heal(_ context.Context, s *scene) error { return s.rig.StartAll() }
