package job

import (
	"errors"
	"fmt"
	"testing"
	"time"
)

var t0 = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func testSpec(t *testing.T, change func(*Spec)) Spec {
	t.Helper()
	s := Spec{Command: Command{Shell: "true"}}
	if change != nil {
		change(&s)
	}
	n, errs := Normalise(s)
	if len(errs) > 0 {
		t.Fatal(errs)
	}
	return n
}

func newRecord(t *testing.T, change func(*Spec)) Record {
	t.Helper()
	return New("job-01k00000000000000000000000", "ann", testSpec(t, change), t0)
}

func must(t *testing.T, r Record, e Event, now time.Time) Record {
	t.Helper()
	next, err := Apply(r, e, now)
	if err != nil {
		t.Fatalf("%s while %s: %v", KindOf(e), r.State, err)
	}
	if next.Version != r.Version+1 {
		t.Fatalf("%s raised the version from %d to %d", KindOf(e), r.Version, next.Version)
	}
	return next
}

// inState builds a record in the given state through the table, where the
// table has a way there.
func inState(t *testing.T, s State) Record {
	t.Helper()
	r := newRecord(t, func(s *Spec) { s.Retry.MaxAttempts = 2 })
	at := t0
	step := func(e Event) { at = at.Add(time.Second); r = must(t, r, e, at) }
	assigned := func() { step(Assign{WorkerID: "w1", LeaseID: "lease-1"}) }
	one := 1
	switch s {
	case Queued:
	case Assigned:
		assigned()
	case Preparing:
		assigned()
		step(Prepare{Fence: r.Fence()})
	case Running:
		assigned()
		step(Start{Fence: r.Fence()})
	case Retrying:
		assigned()
		step(Lost{Fence: r.Fence()})
	case Canceling:
		assigned()
		step(CancelRequest{})
	case Succeeded:
		assigned()
		step(Result{Fence: r.Fence(), WorkerID: "w1", Outcome: OutcomeSucceeded})
	case Failed:
		r.Spec.Retry.MaxAttempts = 1
		assigned()
		step(Result{Fence: r.Fence(), WorkerID: "w1", Outcome: OutcomeFailed, ExitCode: &one})
	case TimedOut:
		assigned()
		step(Start{Fence: r.Fence()})
		step(Deadline{Which: ReasonExecutionTimeout})
	case Canceled:
		step(CancelRequest{})
	case Expired:
		step(Deadline{Which: ReasonQueueTimeout})
	case Blocked, Scheduled, Held:
		r.State = s // reserved: nothing leads there yet
	}
	if r.State != s {
		t.Fatalf("the way to %s ends in %s", s, r.State)
	}
	return r
}

// TestEveryStateTimesEveryEvent holds the whole table against what design says:
// the state after the event, or the way of refusing.
func TestEveryStateTimesEveryEvent(t *testing.T) {
	type cell struct {
		to  State
		err error
	}
	to := func(s State) cell { return cell{to: s} }
	refused, stale, same := cell{err: ErrRefused}, cell{err: ErrStale}, cell{err: ErrUnchanged}
	// The events are built for the record's own fence; a queued record has none.
	events := map[Kind]func(r Record) Event{
		KindAssign:   func(Record) Event { return Assign{WorkerID: "w2", LeaseID: "lease-2"} },
		KindReturn:   func(r Record) Event { return Return{Fence: r.Fence(), Outcome: OutcomeReturned} },
		KindPrepare:  func(r Record) Event { return Prepare{Fence: r.Fence()} },
		KindStart:    func(r Record) Event { return Start{Fence: r.Fence()} },
		KindResult:   func(r Record) Event { return Result{Fence: r.Fence(), WorkerID: "w1", Outcome: OutcomeSucceeded} },
		KindLost:     func(r Record) Event { return Lost{Fence: r.Fence()} },
		KindCancel:   func(Record) Event { return CancelRequest{} },
		KindGiveUp:   func(r Record) Event { return GiveUp{Fence: r.Fence()} },
		KindDeadline: func(Record) Event { return Deadline{Which: ReasonTotalTimeout} },
		KindRequeue:  func(Record) Event { return Requeue{} },
		KindRelease:  func(Record) Event { return Release{} },
	}
	want := map[State]map[Kind]cell{
		Queued: {
			KindAssign: to(Assigned), KindReturn: refused, KindPrepare: refused, KindStart: refused, KindResult: stale,
			KindLost: refused, KindCancel: to(Canceled), KindGiveUp: refused, KindDeadline: to(Expired),
			KindRequeue: refused, KindRelease: refused,
		},
		Assigned: {
			KindAssign: refused, KindReturn: to(Queued), KindPrepare: to(Preparing), KindStart: to(Running),
			KindResult: to(Succeeded), KindLost: to(Retrying), KindCancel: to(Canceling), KindGiveUp: refused,
			KindDeadline: refused, KindRequeue: refused, KindRelease: refused,
		},
		Preparing: {
			KindAssign: refused, KindReturn: to(Queued), KindPrepare: same, KindStart: to(Running),
			KindResult: to(Succeeded), KindLost: to(Retrying), KindCancel: to(Canceling), KindGiveUp: refused,
			KindDeadline: to(TimedOut), KindRequeue: refused, KindRelease: refused,
		},
		Running: {
			KindAssign: refused, KindReturn: refused, KindPrepare: same, KindStart: same,
			KindResult: to(Succeeded), KindLost: to(Retrying), KindCancel: to(Canceling), KindGiveUp: refused,
			KindDeadline: to(TimedOut), KindRequeue: refused, KindRelease: refused,
		},
		Retrying: {
			KindAssign: refused, KindReturn: refused, KindPrepare: refused, KindStart: refused, KindResult: to(Succeeded),
			KindLost: refused, KindCancel: to(Canceled), KindGiveUp: refused, KindDeadline: to(Expired),
			KindRequeue: to(Queued), KindRelease: refused,
		},
		Canceling: {
			KindAssign: refused, KindReturn: to(Canceled), KindPrepare: refused, KindStart: refused,
			KindResult: to(Succeeded), KindLost: to(Canceled), KindCancel: same, KindGiveUp: to(Canceled),
			KindDeadline: refused, KindRequeue: refused, KindRelease: refused,
		},
	}
	for _, s := range []State{Blocked, Scheduled, Held} {
		want[s] = map[Kind]cell{
			KindAssign: refused, KindReturn: refused, KindPrepare: refused, KindStart: refused, KindResult: refused,
			KindLost: refused, KindCancel: to(Canceled), KindGiveUp: refused, KindDeadline: to(Expired),
			KindRequeue: refused, KindRelease: to(Queued),
		}
	}
	ended := cell{err: ErrTerminal}
	for _, s := range States() {
		for _, k := range Kinds() {
			t.Run(fmt.Sprintf("%s/%s", s, k), func(t *testing.T) {
				r := inState(t, s)
				w, ok := want[s][k]
				if s.Terminal() {
					w, ok = ended, true
				}
				if !ok {
					t.Fatal("the expectation lacks this cell")
				}
				before := fmt.Sprintf("%+v", r)
				next, err := Apply(r, events[k](r), t0.Add(time.Hour))
				if got := fmt.Sprintf("%+v", r); got != before {
					t.Fatal("Apply changed its argument")
				}
				switch {
				case w.err != nil && !errors.Is(err, w.err):
					t.Fatalf("got %v, want %v", err, w.err)
				case w.err != nil && fmt.Sprintf("%+v", next) != before:
					t.Fatal("a refused event changed the record")
				case w.err == nil && err != nil:
					t.Fatalf("got %v, want state %s", err, w.to)
				case w.err == nil && next.State != w.to:
					t.Fatalf("got state %s, want %s", next.State, w.to)
				}
			})
		}
	}
}

func TestBudgets(t *testing.T) {
	one := 1
	run := func(r Record, e func(Record) Event) Record {
		if r.State == Retrying {
			r = must(t, r, Requeue{}, r.RetryAt)
		}
		r = must(t, r, Assign{WorkerID: "w1", LeaseID: fmt.Sprintf("lease-%d", r.Attempt+1)}, t0)
		return must(t, r, e(r), t0.Add(time.Minute))
	}
	fail := func(r Record) Event {
		return Result{Fence: r.Fence(), WorkerID: "w1", Outcome: OutcomeFailed, ExitCode: &one, StartedAt: t0}
	}
	lose := func(r Record) Event { return Lost{Fence: r.Fence()} }

	t.Run("a failure of the command ends it by default", func(t *testing.T) {
		if r := run(newRecord(t, nil), fail); r.State != Failed || r.Reason != ReasonExitCode || *r.ExitCode != 1 {
			t.Errorf("got %s, %s", r.State, r.Reason)
		}
	})
	t.Run("attempts and infra budget are apart", func(t *testing.T) {
		r := newRecord(t, func(s *Spec) { s.Retry.MaxAttempts = 2 })
		for range InfraBudget {
			r = run(r, lose)
		}
		r = run(r, fail)
		if r.State != Retrying {
			t.Fatalf("after %d losses and one failure: %s", InfraBudget, r.State)
		}
		if r = run(r, fail); r.State != Failed || r.Attempt != InfraBudget+2 {
			t.Errorf("ended %s at attempt %d", r.State, r.Attempt)
		}
	})
	t.Run("one loss more than the budget fails", func(t *testing.T) {
		r := newRecord(t, nil)
		for range InfraBudget + 1 {
			r = run(r, lose)
		}
		if r.State != Failed || r.Reason != ReasonWorkerLost {
			t.Errorf("got %s, %s", r.State, r.Reason)
		}
	})
	t.Run("a returned assignment is free", func(t *testing.T) {
		r := newRecord(t, nil)
		for range 40 {
			r = run(r, func(r Record) Event { return Return{Fence: r.Fence(), Outcome: OutcomeRejected} })
		}
		if r.State != Queued || r.UserFailures+r.InfraFailures != 0 || len(r.Attempts) != MaxAttemptsKept {
			t.Errorf("got %s with %d+%d failures and %d attempts kept", r.State, r.UserFailures, r.InfraFailures, len(r.Attempts))
		}
	})
	t.Run("fail on a lost worker starts at most once", func(t *testing.T) {
		atMostOnce := func(s *Spec) { s.OnWorkerLost = OnWorkerLostFail }
		if r := run(newRecord(t, atMostOnce), lose); r.State != Failed {
			t.Errorf("lost: %s", r.State)
		}
		stopped := func(r Record) Event {
			return Result{Fence: r.Fence(), WorkerID: "w1", Outcome: OutcomeFailed, Reason: ReasonWorkerStopped, StartedAt: t0}
		}
		if r := run(newRecord(t, atMostOnce), stopped); r.State != Failed {
			t.Errorf("stopped after its start: %s", r.State)
		}
		unstarted := func(r Record) Event {
			return Result{Fence: r.Fence(), WorkerID: "w1", Outcome: OutcomeFailed, Reason: ReasonWorkerError}
		}
		if r := run(newRecord(t, atMostOnce), unstarted); r.State != Retrying {
			t.Errorf("failed before its start: %s", r.State)
		}
	})
	t.Run("only the named exit codes are retried", func(t *testing.T) {
		r := newRecord(t, func(s *Spec) { s.Retry.MaxAttempts, s.Retry.OnExitCodes = 5, []int{75} })
		if r := run(r, fail); r.State != Failed {
			t.Errorf("exit code 1: %s", r.State)
		}
		code := 75
		tmp := func(r Record) Event {
			return Result{Fence: r.Fence(), WorkerID: "w1", Outcome: OutcomeFailed, ExitCode: &code}
		}
		if r := run(r, tmp); r.State != Retrying {
			t.Errorf("exit code 75: %s", r.State)
		}
	})
}

func TestLateAndStaleResults(t *testing.T) {
	result := func(f Fence, worker string) Result {
		return Result{Fence: f, WorkerID: worker, Outcome: OutcomeSucceeded}
	}
	r := must(t, newRecord(t, nil), Assign{WorkerID: "w1", LeaseID: "lease-1"}, t0)
	first := r.Fence()
	lost := must(t, r, Lost{Fence: first}, t0.Add(time.Minute))

	t.Run("a lost attempt that did the work counts", func(t *testing.T) {
		got := must(t, lost, result(first, "w1"), t0.Add(2*time.Minute))
		if got.State != Succeeded || got.InfraFailures != 0 {
			t.Errorf("got %s with %d infra failures", got.State, got.InfraFailures)
		}
	})
	t.Run("not once a later attempt was dispatched", func(t *testing.T) {
		next := must(t, must(t, lost, Requeue{}, lost.RetryAt), Assign{WorkerID: "w2", LeaseID: "lease-2"}, t0.Add(time.Hour))
		if _, err := Apply(next, result(first, "w1"), t0.Add(time.Hour)); !errors.Is(err, ErrStale) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("not from another worker", func(t *testing.T) {
		if _, err := Apply(r, result(first, "w2"), t0); !errors.Is(err, ErrStale) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a repeat changes nothing", func(t *testing.T) {
		one := 1
		retried := newRecord(t, func(s *Spec) { s.Retry.MaxAttempts = 2 })
		retried = must(t, retried, Assign{WorkerID: "w1", LeaseID: "lease-1"}, t0)
		fail := Result{Fence: retried.Fence(), WorkerID: "w1", Outcome: OutcomeFailed, ExitCode: &one}
		retried = must(t, retried, fail, t0)
		if _, err := Apply(retried, fail, t0); !errors.Is(err, ErrStale) {
			t.Errorf("got %v", err)
		}
	})
}

func TestCanceling(t *testing.T) {
	one := 1
	base := must(t, newRecord(t, func(s *Spec) { s.Retry.MaxAttempts = 3 }), Assign{WorkerID: "w1", LeaseID: "l"}, t0)
	base = must(t, base, Start{Fence: base.Fence(), StartedAt: t0}, t0)
	base = must(t, base, CancelRequest{}, t0.Add(time.Second))
	gone := t0.Add(3 * time.Second)
	for _, c := range []struct {
		name string
		e    Event
		want State
	}{
		{"the cancel ended it", Result{Fence: base.Fence(), WorkerID: "w1", Outcome: OutcomeCanceled, Stop: &Cancel{SignalledAt: gone, GoneAt: gone}}, Canceled},
		{"it had succeeded", Result{Fence: base.Fence(), WorkerID: "w1", Outcome: OutcomeSucceeded}, Succeeded},
		{"it had failed: no retry", Result{Fence: base.Fence(), WorkerID: "w1", Outcome: OutcomeFailed, ExitCode: &one}, Failed},
		{"it had timed out: no retry", Result{Fence: base.Fence(), WorkerID: "w1", Outcome: OutcomeTimedOut}, TimedOut},
		{"its worker failed", Result{Fence: base.Fence(), WorkerID: "w1", Outcome: OutcomeFailed, Reason: ReasonEngineError}, Canceled},
		{"its lease ran out", Lost{Fence: base.Fence()}, Canceled},
		{"nobody confirmed", GiveUp{Fence: base.Fence()}, Canceled},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := must(t, base, c.e, t0.Add(4*time.Second))
			if r.State != c.want {
				t.Errorf("got %s", r.State)
			}
		})
	}
	r := must(t, base, Result{Fence: base.Fence(), WorkerID: "w1", Outcome: OutcomeCanceled, Stop: &Cancel{SignalledAt: gone, GoneAt: gone}}, gone)
	if !r.Cancel.GoneAt.Equal(gone) || r.Cancel.RequestedAt.IsZero() || r.Cancel.StopUnconfirmed {
		t.Errorf("receipt is %+v", r.Cancel)
	}
	if r := must(t, base, Lost{Fence: base.Fence()}, gone); !r.Cancel.StopUnconfirmed {
		t.Error("an unproven stop is not marked")
	}
}

func TestBackoff(t *testing.T) {
	const base, most = 2 * time.Second, 30 * time.Second
	previous := time.Duration(0)
	for n := 1; n < 12; n++ {
		ceiling := min(base<<(n-1), most)
		d := Backoff("job-x", n, base, most)
		if d < ceiling/2 || d > ceiling {
			t.Errorf("failure %d waits %v, want %v to %v", n, d, ceiling/2, ceiling)
		}
		if d != Backoff("job-x", n, base, most) {
			t.Error("two services would compute different waits")
		}
		previous = d
	}
	if previous < most/2 {
		t.Errorf("the wait does not grow: %v", previous)
	}
	if Backoff("j", 1, 0, most) != 0 {
		t.Error("no backoff was asked for")
	}
}

func TestWorkerClockIsNotTrusted(t *testing.T) {
	r := must(t, newRecord(t, nil), Assign{WorkerID: "w1", LeaseID: "l"}, t0)
	far := t0.Add(1000 * time.Hour)
	r = must(t, r, Result{
		Fence: r.Fence(), WorkerID: "w1", Outcome: OutcomeSucceeded, StartedAt: far, FinishedAt: far.Add(1500 * time.Millisecond),
	}, t0.Add(time.Second))
	a := r.Last()
	if a.StartedAt.After(t0.Add(time.Second)) || r.FinishedAt.After(t0.Add(time.Second)) || a.DurationMs != 1500 {
		t.Errorf("started %v, finished %v, %d ms", a.StartedAt, r.FinishedAt, a.DurationMs)
	}
}

func TestReset(t *testing.T) {
	r, changed := Reset(inState(t, Running), t0)
	if !changed || r.State != Failed || r.Reason != ReasonRegistryReset || r.Reason.Class() != ClassOperator {
		t.Errorf("got %s %s", r.State, r.Reason)
	}
	if again, changed := Reset(r, t0); changed || again.Version != r.Version {
		t.Error("an ended job was reset")
	}
}
