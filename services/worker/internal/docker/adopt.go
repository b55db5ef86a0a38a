package docker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/events"

	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
	"github.com/cmdexec/cmdexec/services/worker/internal/handover"
)

// How a container is taken up that an earlier process of this worker has
// started.
//
// It is found by the id in the handle and must carry the labels of this worker
// and lease, or be a warm one that was given the lease's name. Its output goes on from the engine's log, behind as many bytes as the
// earlier process has kept; see enginelog.go. How it ended is told only where the
// engine was there the whole time: it must remember the end of the container, which
// it does not after a restart, and that nobody else has stopped it.

var (
	_ executor.Adopter  = (*Executor)(nil)
	_ executor.Adopted  = (*attempt)(nil)
	_ executor.Survivor = (*attempt)(nil)
)

// handle is what names a container for a later process.
type handle struct {
	Container   string `json:"container"`
	ImageDigest string `json:"imageDigest,omitempty"`
	// Waited is how long a warm container had run before it was this attempt's; 0:
	// it is none.
	Waited time.Duration `json:"waited,omitempty"`
}

var containerID = regexp.MustCompile(`^[0-9a-f]{12,64}$`)

// past is what there is beside in an attempt of an earlier process.
type past struct {
	executor.Past
	at       time.Time // of the adoption
	output   executor.Continuation
	has      [2]int64  // bytes of each stream that are kept or written by now
	size     int64     // that the log took at most when it was read last
	wholeAt  time.Time // when it was whole
	cut      bool      // it is not whole any more
	vanished bool      // it was being stopped, and is removed
	late     bool      // it ended after its timeout, of itself
	trusted  bool      // valid when ended is closed: what the engine says is
}

func (x *Executor) survives(f facts) bool { return x.opts.Survive && f.keepsLogs }

// Handle names the container for Adopt.
func (a *attempt) Handle() []byte {
	if !a.x.survives(a.facts) || !containerID.MatchString(a.id) {
		return nil
	}
	data, err := json.Marshal(handle{a.id, a.image.digest, a.waited})
	if err != nil {
		return nil // two texts and a number: it never fails
	}
	return data
}

// Fed is closed when the command has all of its input.
func (a *attempt) Fed() <-chan struct{} { return a.fed }

// Adopt claims the container of the handle.
func (x *Executor) Adopt(spec executor.Spec, data []byte, before executor.Past) (executor.Adopted, error) {
	var h handle
	if err := json.Unmarshal(data, &h); err != nil || !containerID.MatchString(h.Container) {
		return nil, errors.New("the handle names no container")
	}
	p := &plan{spec: spec, name: containerName(x.opts.WorkerID, &spec)}
	var ok bool
	if p.signal, p.number, ok = signalNumber(spec.StopSignal); !ok {
		return nil, fmt.Errorf("stop signal %q is not known", spec.StopSignal)
	}
	if !x.claim(p.name) {
		return nil, errors.New("this lease has a container already")
	}
	a := &attempt{
		x: x, plan: p, image: &imageFacts{digest: h.ImageDigest}, id: h.Container, waited: h.Waited, fed: make(chan struct{}),
		past:  &past{Past: before, at: time.Now()},
		ended: make(chan struct{}), stopped: make(chan struct{}), killed: make(chan struct{}),
		// The earlier process may have had no time to remove it.
		delivery: &delivery{engine: x.engine, carrier: p.name + carrierSuffix, lost: make(chan struct{})},
	}
	close(a.fed)
	a.settled.Do(func() {}) // it was never prepared here
	if before.Stop != 0 {
		a.receipt = &executor.StopReceipt{Reason: before.Stop, DeliveredAt: before.StopAt}
		close(a.stopped)
		// It has had a part of its grace.
		p.spec.Grace = max(0, spec.Grace-max(0, time.Since(before.StopAt)))
	}
	return a, nil
}

// Resume goes on with the container.
func (a *attempt) Resume(c executor.Continuation) error {
	a.mu.Lock()
	if a.phase != prepared || a.past == nil {
		a.mu.Unlock()
		return executor.InfraError("the attempt was started before", nil)
	}
	a.phase = starting
	if a.receipt != nil && a.goneBy.IsZero() {
		a.goneBy = time.Now().Add(a.plan.spec.Grace + a.x.opts.KillBound)
	}
	a.mu.Unlock()

	err := a.takeUp(c)
	a.mu.Lock()
	defer a.mu.Unlock()
	if err != nil {
		a.phase = finished
		return err
	}
	a.phase = running
	if limit := a.plan.spec.Timeout; limit > 0 && !a.past.vanished {
		left := limit - a.past.Ran - time.Since(a.past.at)
		a.timeout = time.AfterFunc(max(0, left), func() { a.Stop(executor.StopTimeout) })
	}
	if a.receipt != nil {
		a.beginStop()
	}
	return nil
}

// takeUp looks for the container, and tries again while the engine does not answer.
func (a *attempt) takeUp(c executor.Continuation) error {
	a.past.output, a.past.has = c, [2]int64{c.HasStdout, c.HasStderr}
	a.past.size, a.past.wholeAt = logWhole, c.Since
	for since := time.Now(); ; {
		err := a.tryTakeUp()
		if failed, ok := errors.AsType[*executor.PrepareError](err); ok || err == nil {
			if ok {
				return failed
			}
			return nil
		}
		if time.Since(since) > a.patience() {
			return a.x.unready(context.Background(), a.x.engine.describe(err))
		}
		_ = sleep(context.Background(), 250*time.Millisecond)
	}
}

// tryTakeUp does it once. An error that is a *executor.PrepareError is the last word.
func (a *attempt) tryTakeUp() error {
	state, err := a.find()
	if err != nil || a.past.vanished {
		return err
	}
	a.mu.Lock()
	a.startedAt = a.began(state, a.past.StartedAt)
	a.mu.Unlock()
	if err := a.delivery.end(context.Background()); err != nil {
		return err
	}
	if err := a.unbroken(state); err != nil {
		return err
	}
	a.copied = make(chan struct{})
	a.outlets = [2]*outlet{newOutlet(nil), newOutlet(nil)} // nobody has to wait for a writer
	a.workers.Go(func() {
		a.copyErr = a.readOn()
		close(a.copied)
	})
	return nil
}

// unbroken sees to engines that let containers run while they are restarted:
// they may lose output then, and do not say so. That such an engine was not
// restarted is known only while it remembers the start of the container.
func (a *attempt) unbroken(state *container.State) error {
	ctx, cancel := a.x.engine.call(context.Background())
	defer cancel()
	f, err := a.x.engine.look(ctx)
	if err != nil || !f.restores {
		return err
	}
	now, err := a.engineNow()
	if err != nil {
		return err
	}
	from, to := engineTime(state.StartedAt, time.Time{}), now
	if minute := from.Add(time.Minute); minute.Before(to) {
		to = minute
	}
	starts, err := a.events(events.ActionStart, from.Add(-time.Minute), to)
	if err == nil && len(starts) == 0 {
		a.past.output.Missing(0, "the worker was restarted here, and perhaps the container engine as well: some output may be missing")
	}
	return err
}

// find looks for the container.
func (a *attempt) find() (*container.State, error) {
	ctx, cancel := a.x.engine.call(context.Background())
	defer cancel()
	got, err := a.x.engine.api.ContainerInspect(ctx, a.id)
	lost := func(why string) error {
		failed := executor.InfraError(why, nil)
		failed.Code = executor.CodeEngine
		return failed
	}
	switch {
	case gone(err) && a.past.Stop != 0:
		a.past.vanished = true // removed with the last step of the stop
		return nil, nil
	case gone(err):
		return nil, lost("the container was removed while its worker was restarted")
	case err != nil:
		return nil, err
	case got.ContainerJSONBase == nil || got.State == nil || got.Config == nil:
		return nil, errors.New("the engine described a container without its state")
	case !a.owns(got):
		a.mu.Lock()
		a.removed = true // it is not ours to remove
		a.mu.Unlock()
		return nil, lost("the container is another one than its worker has started")
	case got.State.Status == container.StateCreated:
		return nil, lost("the worker was restarted before the command was started")
	}
	return got.State, nil
}

// owns reports whether a container is that of this lease. Only this worker gives a
// warm container the name that goes with a lease.
func (a *attempt) owns(got container.InspectResponse) bool {
	labels := got.Config.Labels
	if labels[labelMark] != a.x.opts.Mark {
		return false
	}
	return labels[labelLease] == a.plan.spec.LeaseID || a.waited > 0 && labels[labelWarm] != "" && got.Name == "/"+a.plan.name
}

// Bounds of the pause between two looks at the log: it takes a twentieth of the
// time at most to read it.
const (
	minLogPause = 200 * time.Millisecond
	maxLogPause = 5 * time.Second
)

// readOn writes what comes into the log, until all of it is written or the
// engine is not trusted any more.
func (a *attempt) readOn() error {
	pause := time.Duration(0)
	var failing time.Time
	for {
		timer := time.NewTimer(pause)
		last := false
		select {
		case <-timer.C:
		case <-a.ended:
			last = true
		}
		timer.Stop()
		if last && !a.past.trusted {
			return nil // and it is not told how the command ended
		}
		began := time.Now()
		err := a.readLog(last)
		switch {
		case err == nil && last:
			return nil
		case err == nil:
			failing = time.Time{}
		case failing.IsZero():
			failing = began
		case last && time.Since(failing) > a.x.opts.CallTimeout:
			return err
		}
		pause = min(max(20*time.Since(began), minLogPause), maxLogPause)
		if last {
			_ = sleep(context.Background(), minLogPause) // once more
		}
	}
}

// readLog writes what is new in the log. last: the command has ended.
func (a *attempt) readLog(last bool) error {
	p := a.past
	if p.size >= logWhole/2 && !p.cut { // see first whether it can be read by numbers of bytes
		m, err := a.measure()
		if err != nil {
			return err
		}
		p.size = m.atMost()
		p.cut = p.size >= logWhole
	}
	if p.cut {
		if !last {
			return nil // the end of the output will be there
		}
		return a.readCut()
	}
	stdout, stderr := &lines{w: p.output.Stdout, skip: p.has[0]}, &lines{w: p.output.Stderr, skip: p.has[1]}
	began := time.Now()
	m, err := a.unpackLog(time.Time{}, stdout, stderr)
	p.has[0], p.has[1] = max(p.has[0], stdout.seen), max(p.has[1], stderr.seen)
	if err != nil {
		return err
	}
	p.size = m.atMost()
	switch {
	case p.size >= logWhole: // since it was measured
		p.cut = true
		p.output.Missing(0, "the worker was restarted while this ran, and the container engine does not keep so much output: some is missing or repeated here")
	case last && (stdout.seen < p.output.HasStdout || stderr.seen < p.output.HasStderr):
		p.output.Missing(0, "the container engine has not kept all output from before its worker was restarted: some may be missing")
	case last && (stdout.owed || stderr.owed) && a.x.engine.forgetsLineEnds():
		p.output.Missing(0, "the worker was restarted while this ran, and the container engine has not kept whether the last line had an end")
	}
	p.wholeAt = began
	return nil
}

// readCut writes what is left of a log of which too much was thrown away.
func (a *attempt) readCut() error {
	p := a.past
	p.output.Missing(0, "the worker was restarted while this ran, and the container engine does not keep so much output: some is missing or repeated here")
	_, err := a.unpackLog(p.wholeAt, &lines{w: p.output.Stdout}, &lines{w: p.output.Stderr})
	if err != nil {
		p.output.Missing(0, "and what follows could not be read")
	}
	return nil
}

// endedAway judges the end of a container that was taken up. Nothing has held a
// connection to the engine all the time, so that it must remember the end.
func (a *attempt) endedAway(state *container.State) error {
	from, to := a.began(state, time.Time{}), engineTime(state.FinishedAt, time.Time{})
	if from.IsZero() || to.Before(from.Add(-a.waited)) {
		return errors.New("the container engine does not know when the command ended")
	}
	if a.waited > 0 && state.ExitCode == handover.Failed {
		return errors.New("the worker was restarted when the command was to begin, and it is not known whether it did")
	}
	now, err := a.engineNow()
	if err != nil {
		return fmt.Errorf("the container engine went away: %w", err)
	}
	ends, err := a.events(events.ActionDie, from, now)
	if err == nil && len(ends) == 0 {
		return errors.New("the worker was restarted while the command ran, and the container engine was restarted as well or does not remember its end")
	}
	if err != nil {
		return fmt.Errorf("the container engine went away: %w", err)
	}
	kills, err := a.events(events.ActionKill, from, now)
	switch {
	case err != nil:
		return fmt.Errorf("the container engine went away: %w", err)
	case len(kills) > 0 && !a.wereOurs(kills, to.Sub(from)):
		return errOthers
	case len(kills) == 0 && !a.wasStopped():
		a.past.late = a.plan.spec.Timeout > 0 && to.Sub(from) > a.plan.spec.Timeout
	}
	return nil
}

// engineNow is the end of any time that the engine is asked about: its clock is
// not this one's, and asked for events of a time to come it waits for them.
func (a *attempt) engineNow() (time.Time, error) {
	ctx, cancel := a.x.engine.call(context.Background())
	defer cancel()
	info, err := a.x.engine.api.Info(ctx)
	if err != nil {
		return time.Time{}, err
	}
	return engineTime(info.SystemTime, time.Now()), nil
}

// wereOurs reports whether it was the earlier process that has sent these
// signals, to a command that was to stop or had run for longer than it may; and
// notes them.
func (a *attempt) wereOurs(kills []events.Message, ran time.Duration) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.sentStop || a.sentKill {
		return true // by this process
	}
	if a.past.Stop == 0 {
		limit := a.plan.spec.Timeout
		if limit <= 0 || ran < limit {
			return false
		}
		if a.receipt == nil {
			a.receipt = &executor.StopReceipt{Reason: executor.StopTimeout, DeliveredAt: a.startedAt.Add(limit)}
		}
	}
	for _, k := range kills {
		if k.Actor.Attributes["signal"] == "9" {
			a.sentKill = true
		} else {
			a.sentStop = true
		}
		if a.receipt.SignalledAt.IsZero() {
			a.receipt.SignalledAt = time.Unix(0, k.TimeNano)
		}
	}
	return true
}

// wasStopped reports whether a stop was asked for, other than by the timeout.
func (a *attempt) wasStopped() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.receipt != nil && a.receipt.Reason != executor.StopTimeout
}

// waitVanished ends an attempt whose container the earlier process has stopped
// and removed.
func (a *attempt) waitVanished() executor.Exit {
	close(a.ended)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.phase, a.removed = finished, true
	now := time.Now()
	receipt := *a.receipt
	receipt.SignalledAt, receipt.ExitedAt, receipt.GoneAt = receipt.DeliveredAt, now, now
	return executor.Exit{
		ImageDigest: a.image.digest, StartedAt: a.past.StartedAt, FinishedAt: now,
		TimedOut: receipt.Reason == executor.StopTimeout, Reason: "stopped, and the worker was restarted meanwhile", Stop: &receipt,
	}
}
