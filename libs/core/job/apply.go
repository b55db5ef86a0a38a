package job

import (
	"errors"
	"fmt"
	"time"
)

// The ways in which Apply refuses. In each case the returned record is the
// argument, unchanged.
var (
	ErrTerminal  = errors.New("the job has ended")               // terminal is absorbing
	ErrStale     = errors.New("not the job's current attempt")   // fence or worker do not match, or already reported
	ErrUnchanged = errors.New("the job is already there")        // a repeat of something that took effect
	ErrRefused   = errors.New("not allowed in this job's state") // the table has no such cell, or its guard says no
)

// transition changes a private copy of a record, or refuses.
type transition func(r *Record, e Event, now time.Time) error

// table is the one place that says what may happen to a job. A missing cell is
// refused; terminal states have none and are answered with ErrTerminal.
func table() map[State]map[Kind]transition {
	unowned := map[Kind]transition{KindCancel: cancelNow}
	reserved := merge(unowned, map[Kind]transition{KindRelease: release, KindDeadline: waitedTooLong})
	waiting := merge(unowned, map[Kind]transition{KindResult: lateResult, KindDeadline: waitedTooLong})
	leased := map[Kind]transition{
		KindReturn: returned, KindResult: result, KindLost: lost,
		KindCancel: cancelLeased, KindDeadline: ranTooLong,
	}
	return map[State]map[Kind]transition{
		Queued:    merge(waiting, map[Kind]transition{KindAssign: assign}),
		Retrying:  merge(waiting, map[Kind]transition{KindRequeue: requeue}),
		Assigned:  merge(leased, map[Kind]transition{KindPrepare: prepare, KindStart: start}),
		Preparing: merge(leased, map[Kind]transition{KindPrepare: repeated, KindStart: start}),
		Running:   merge(leased, map[Kind]transition{KindPrepare: repeated, KindStart: repeated}),
		Canceling: {
			KindReturn: returned, KindResult: result, KindLost: lost,
			KindCancel: repeated, KindGiveUp: giveUp,
		},
		Blocked:   reserved,
		Scheduled: reserved,
		Held:      reserved,
	}
}

// transitions is the table, built once. It is never written after that.
var transitions = table()

// Apply is the only function that moves a job. It returns the record after the
// event, with its version raised, or the unchanged record and one of ErrTerminal,
// ErrStale, ErrUnchanged and ErrRefused (by errors.Is). It is pure and safe for
// concurrent use.
func Apply(r Record, e Event, now time.Time) (Record, error) {
	if r.State.Terminal() {
		return r, ErrTerminal
	}
	f := transitions[r.State][e.kind()]
	if f == nil {
		return r, fmt.Errorf("%w: %s while %s", ErrRefused, e.kind(), r.State)
	}
	next := r.clone()
	now = Timestamp(now)
	if err := f(&next, e, now); err != nil {
		return r, err
	}
	next.Version++
	return next, nil
}

// enter is where a state is assigned, here and nowhere else.
func (r *Record) enter(s State, now time.Time) {
	if r.State != s {
		r.State, r.StateAt = s, now
	}
	if s != Retrying {
		r.RetryAt = time.Time{}
	}
	if s.Terminal() {
		r.FinishedAt = now
	}
}

func (r *Record) end(s State, why Reason, message string, now time.Time) {
	r.Reason, r.Message = why, clip(message, MaxReasonBytes)
	r.enter(s, now)
}

// current checks the fence of a report.
func (r *Record) current(f Fence) error {
	if f.LeaseID == "" || f.Attempt != r.Attempt || f.LeaseID != r.LeaseID {
		return ErrStale
	}
	return nil
}

// owned gives a transition its event and the attempt that it reports on.
func owned[E Event](r *Record, e Event, fence func(E) Fence) (E, *Attempt, error) {
	ev := e.(E)
	if err := r.current(fence(ev)); err != nil {
		return ev, nil, err
	}
	return ev, r.Last(), nil
}

func repeated(r *Record, e Event, _ time.Time) error {
	if f, ok := e.(interface{ fence() Fence }); ok {
		if err := r.current(f.fence()); err != nil {
			return err
		}
	}
	return ErrUnchanged
}

func (f Fence) fence() Fence { return f }

func assign(r *Record, e Event, now time.Time) error {
	ev := e.(Assign)
	if ev.LeaseID == "" || ev.WorkerID == "" {
		return fmt.Errorf("%w: an assignment needs a worker and a lease", ErrRefused)
	}
	r.Attempt++
	r.LeaseID, r.WorkerID = ev.LeaseID, ev.WorkerID
	r.Reason, r.Message = "", ""
	r.ExitCode, r.Signal, r.OOMKilled = nil, "", false // of an earlier attempt, which keeps them
	if len(r.Attempts) >= MaxAttemptsKept {
		r.Attempts = r.Attempts[len(r.Attempts)-MaxAttemptsKept+1:]
	}
	r.Attempts = append(r.Attempts, Attempt{
		Number: r.Attempt, LeaseID: ev.LeaseID, WorkerID: ev.WorkerID, AssignedAt: now,
	})
	r.enter(Assigned, now)
	return nil
}

// returned puts a job back that its worker never took. No budget is spent, and
// nothing that comes later under this lease is believed. Where a start was
// reported the command may still run, so that only its result or the end of the
// lease frees the job.
func returned(r *Record, e Event, now time.Time) error {
	ev, a, err := owned(r, e, Return.fence)
	if err != nil {
		return err
	}
	if !a.StartedAt.IsZero() {
		return fmt.Errorf("%w: the attempt has started", ErrRefused)
	}
	return r.giveBack(a, ev.Outcome, ev.Message, now)
}

func (r *Record) giveBack(a *Attempt, o Outcome, message string, now time.Time) error {
	a.Outcome, a.FinishedAt, a.Reason = o, now, ReasonNotDelivered
	if o == OutcomeRejected {
		a.Reason = ReasonRejected
	}
	r.LeaseID = ""
	if r.State == Canceling {
		r.Cancel.GoneAt = now
		r.end(Canceled, ReasonCanceled, "", now)
		return nil
	}
	r.Reason, r.Message = a.Reason, clip(message, MaxReasonBytes)
	r.enter(Queued, now)
	return nil
}

func prepare(r *Record, e Event, now time.Time) error {
	ev, a, err := owned(r, e, Prepare.fence)
	if err != nil {
		return err
	}
	a.AcceptedAt = within(ev.AcceptedAt, a.AssignedAt, now)
	r.enter(Preparing, now)
	return nil
}

func start(r *Record, e Event, now time.Time) error {
	ev, a, err := owned(r, e, Start.fence)
	if err != nil {
		return err
	}
	a.AcceptedAt = within(ev.AcceptedAt, a.AssignedAt, now)
	a.PreparedAt = within(ev.PreparedAt, a.AssignedAt, now)
	a.StartedAt = within(ev.StartedAt, a.AssignedAt, now)
	r.noteStart(a.StartedAt)
	r.enter(Running, now)
	return nil
}

func (r *Record) noteStart(t time.Time) {
	if r.StartedAt.IsZero() {
		r.StartedAt = t
	}
}

// lateResult takes the result of an attempt that was counted as lost, as long
// as no later one was dispatched: it did the work.
func lateResult(r *Record, e Event, now time.Time) error {
	_, a, err := owned(r, e, Result.fence)
	if err != nil {
		return err
	}
	if a.Outcome == OutcomeLost {
		a.Outcome = ""
		r.InfraFailures--
	}
	return result(r, e, now)
}

func result(r *Record, e Event, now time.Time) error {
	ev, a, err := owned(r, e, Result.fence)
	switch {
	case err != nil:
		return err
	case ev.WorkerID != r.WorkerID || a.Outcome != "":
		return ErrStale
	case !ev.Outcome.FromWorker():
		return fmt.Errorf("%w: a worker cannot report this outcome", ErrRefused)
	}
	r.record(a, ev, now)
	if r.State == Canceling {
		return r.canceledResult(a, ev, now)
	}
	infra := a.Reason.Class() == ClassInfra
	switch {
	case ev.Outcome == OutcomeSucceeded:
		r.end(Succeeded, "", "", now)
	case ev.Outcome == OutcomeRejected && a.StartedAt.IsZero():
		return r.giveBack(a, OutcomeRejected, ev.Message, now)
	case ev.Outcome == OutcomeRejected:
		// Refusing what it had started is the worker's own failure, and not free.
		r.workerFailure(a, ReasonWorkerError, ev.Message, now)
	case ev.Outcome == OutcomeCanceled:
		// Nobody asked for a cancel: the worker stopped the command for a reason of its own.
		r.workerFailure(a, ReasonWorkerStopped, ev.Message, now)
	case infra:
		r.infraFailure(a, ev.Message, now)
	case ev.Outcome == OutcomeTimedOut:
		r.userFailure(TimedOut, a, ev.Message, now)
	default:
		r.userFailure(Failed, a, ev.Message, now)
	}
	return nil
}

// workerFailure counts as an infra failure what the worker did not call one.
func (r *Record) workerFailure(a *Attempt, why Reason, message string, now time.Time) {
	a.Outcome = OutcomeFailed
	if a.Reason.Class() != ClassInfra {
		a.Reason = why
	}
	r.infraFailure(a, message, now)
}

// canceledResult ends a job that was being canceled: as canceled when the stop
// is what ended the command, or when it did not end by itself; else as what it was.
func (r *Record) canceledResult(a *Attempt, ev Result, now time.Time) error {
	infra := a.Reason.Class() == ClassInfra
	switch {
	case ev.Outcome == OutcomeSucceeded:
		r.end(Succeeded, "", "", now)
	case ev.Outcome == OutcomeTimedOut && !infra:
		r.end(TimedOut, a.Reason, ev.Message, now)
	case ev.Outcome == OutcomeFailed && !infra:
		r.end(Failed, a.Reason, ev.Message, now)
	default:
		r.end(Canceled, ReasonCanceled, ev.Message, now)
	}
	return nil
}

// record notes in the attempt and the record what the worker reports.
func (r *Record) record(a *Attempt, ev Result, now time.Time) {
	a.Outcome, a.Reason = ev.Outcome, Reason(clip(string(ev.Reason), 64))
	if a.Reason == "" {
		a.Reason = defaultReason(ev)
	}
	a.ExitCode, a.Signal, a.OOMKilled = ev.ExitCode, clip(ev.Signal, 32), ev.OOMKilled
	a.ImageDigest, a.PeakMemoryMB, a.CPUMs, a.Warm = clip(ev.ImageDigest, MaxImageDigestLen), ev.PeakMemoryMB, ev.CPUMs, ev.Warm
	if m := ev.Manifest; m != nil {
		kept := *m
		kept.SHA256 = clip(kept.SHA256, 64)
		a.Manifest = &kept
	}
	if a.AcceptedAt.IsZero() && !ev.AcceptedAt.IsZero() {
		a.AcceptedAt = within(ev.AcceptedAt, a.AssignedAt, now)
	}
	if a.PreparedAt.IsZero() && !ev.PreparedAt.IsZero() {
		a.PreparedAt = within(ev.PreparedAt, a.AssignedAt, now)
	}
	if !ev.StartedAt.IsZero() {
		if a.StartedAt.IsZero() {
			a.StartedAt = within(ev.StartedAt, a.AssignedAt, now)
		}
		r.noteStart(a.StartedAt)
		a.DurationMs = max(0, ev.FinishedAt.Sub(ev.StartedAt).Milliseconds())
	}
	a.FinishedAt = within(ev.FinishedAt, a.AssignedAt, now)
	r.ExitCode, r.Signal, r.OOMKilled = a.ExitCode, a.Signal, a.OOMKilled
	if s := ev.Stop; s != nil && r.Cancel != nil {
		step := func(t time.Time) time.Time {
			if t.IsZero() { // it did not happen
				return time.Time{}
			}
			return within(t, r.Cancel.RequestedAt, now)
		}
		r.Cancel.DeliveredAt, r.Cancel.SignalledAt = step(s.DeliveredAt), step(s.SignalledAt)
		r.Cancel.ExitedAt, r.Cancel.GoneAt = step(s.ExitedAt), step(s.GoneAt)
		r.Cancel.StopUnconfirmed = s.StopUnconfirmed
	}
}

func defaultReason(ev Result) Reason {
	switch {
	case ev.Outcome == OutcomeTimedOut:
		return ReasonExecutionTimeout
	case ev.Outcome == OutcomeCanceled:
		return ReasonCanceled
	case ev.Outcome != OutcomeFailed:
		return ""
	case ev.OOMKilled:
		return ReasonOOMKilled
	case ev.Signal != "":
		return ReasonSignaled
	default:
		return ReasonExitCode
	}
}

func (r *Record) userFailure(final State, a *Attempt, message string, now time.Time) {
	r.UserFailures++
	if !r.retries(a.Outcome, a.ExitCode) {
		r.end(final, a.Reason, message, now)
		return
	}
	r.retry(ClassUser, a.Reason, message, now)
}

// infraFailure spends the infra budget. A job that asked to start at most once
// is not tried again after an attempt that started, or may have.
func (r *Record) infraFailure(a *Attempt, message string, now time.Time) {
	r.InfraFailures++
	mayHaveStarted := a.Outcome == OutcomeLost || !a.StartedAt.IsZero()
	if r.InfraFailures > InfraBudget || mayHaveStarted && r.Spec.OnWorkerLost == OnWorkerLostFail {
		r.end(Failed, a.Reason, message, now)
		return
	}
	r.retry(ClassInfra, a.Reason, message, now)
}

func (r *Record) retry(class Class, why Reason, message string, now time.Time) {
	r.Reason, r.Message = why, clip(message, MaxReasonBytes)
	r.RetryAt = Timestamp(now.Add(r.backoff(class)))
	r.enter(Retrying, now)
}

func lost(r *Record, e Event, now time.Time) error {
	ev, a, err := owned(r, e, Lost.fence)
	if err != nil {
		return err
	}
	a.Outcome, a.Reason, a.FinishedAt = OutcomeLost, ReasonWorkerLost, now
	if r.State != Canceling {
		r.infraFailure(a, "", now)
		return nil
	}
	r.Cancel.StopUnconfirmed = !ev.Confirmed
	if ev.Confirmed {
		r.Cancel.GoneAt = now
	}
	r.end(Canceled, ReasonCanceled, "", now)
	return nil
}

func cancelNow(r *Record, _ Event, now time.Time) error {
	r.Cancel = &Cancel{RequestedAt: now}
	r.end(Canceled, ReasonCanceled, "", now)
	return nil
}

func cancelLeased(r *Record, _ Event, now time.Time) error {
	r.Cancel = &Cancel{RequestedAt: now}
	r.Reason = ReasonCanceled
	r.enter(Canceling, now)
	return nil
}

func giveUp(r *Record, e Event, now time.Time) error {
	_, a, err := owned(r, e, GiveUp.fence)
	if err != nil {
		return err
	}
	a.Outcome, a.Reason, a.FinishedAt = OutcomeLost, ReasonCanceled, now
	r.Cancel.StopUnconfirmed = true
	r.end(Canceled, ReasonCanceled, "the worker did not confirm the stop in time", now)
	return nil
}

// waitedTooLong ends a job that no worker holds.
func waitedTooLong(r *Record, e Event, now time.Time) error {
	ev := e.(Deadline)
	if ev.Which != ReasonQueueTimeout && ev.Which != ReasonTotalTimeout {
		return fmt.Errorf("%w: deadline %s while %s", ErrRefused, ev.Which, r.State)
	}
	if r.StartedAt.IsZero() {
		r.end(Expired, ev.Which, "", now)
	} else {
		r.end(Failed, ev.Which, "", now)
	}
	return nil
}

// ranTooLong ends what a worker holds and does not end itself. There is no
// deadline for preparing here: a worker that is alive reports its own, one that
// is not loses its lease, and only the end of a lease allows another attempt.
func ranTooLong(r *Record, e Event, now time.Time) error {
	ev := e.(Deadline)
	a := r.Last()
	switch {
	case (ev.Which == ReasonExecutionTimeout && r.State == Running) ||
		(ev.Which == ReasonTotalTimeout && r.State != Assigned):
		a.Outcome, a.Reason, a.FinishedAt = OutcomeTimedOut, ev.Which, now
		r.end(TimedOut, ev.Which, "", now)
	default:
		return fmt.Errorf("%w: deadline %s while %s", ErrRefused, ev.Which, r.State)
	}
	return nil
}

func requeue(r *Record, _ Event, now time.Time) error {
	if now.Before(r.RetryAt) {
		return fmt.Errorf("%w: the backoff is not over", ErrRefused)
	}
	r.enter(Queued, now)
	return nil
}

func release(r *Record, _ Event, now time.Time) error {
	r.enter(Queued, now)
	return nil
}

// within keeps a time from a worker's clock between two of the server's.
func within(t, least, most time.Time) time.Time {
	t = Timestamp(t)
	switch {
	case t.Before(least):
		return least
	case t.After(most):
		return most
	default:
		return t
	}
}

func merge(ms ...map[Kind]transition) map[Kind]transition {
	out := map[Kind]transition{}
	for _, m := range ms {
		for k, f := range m {
			out[k] = f
		}
	}
	return out
}

// Reset ends a job that the database has as live while the registry that kept
// it is gone. It is the only end that is not reached through Apply. It reports
// false, and returns r unchanged, when the job had ended.
func Reset(r Record, now time.Time) (Record, bool) {
	if r.State.Terminal() {
		return r, false
	}
	next := r.clone()
	next.end(Failed, ReasonRegistryReset, "the registry was lost; submit the job again if it should run", Timestamp(now))
	next.Version++
	return next, true
}
