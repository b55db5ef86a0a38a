package core

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/job"
	"pgregory.net/rapid"
)

// run drives a fresh job through up to most random events, in which workers
// write the odd texts.
func run(t *rapid.T, odd []string, most int) *machine {
	m := newMachine(newJob(t, drawSpec(t)))
	m.odd = odd
	for range rapid.IntRange(0, most).Draw(t, "events") {
		m.tick(t)
		_ = m.apply(t, m.draw(t)) // refused ones are part of it
	}
	return m
}

func TestRandomSequences(t *testing.T) {
	full, odd := fullSpec(t), texts()
	reached := map[job.State]int{}
	rapid.Check(t, func(t *rapid.T) {
		m := run(t, odd, 80)
		reached[m.r.State]++
		if m.ends > 1 || (m.ends == 1) != m.r.State.Terminal() {
			t.Fatalf("%d ends, in state %s", m.ends, m.r.State)
		}
		if m.r.Version != uint64(1+m.applied) {
			t.Fatalf("version %d after %d events", m.r.Version, m.applied)
		}
		// Once in full, beside the arithmetic of every step.
		r := m.r
		r.Spec = full
		data, err := json.Marshal(r)
		if err != nil || len(data) > job.MaxRecordBytes {
			t.Fatalf("%d bytes, %v", len(data), err)
		}
	})
	t.Logf("states at the end of the sequences: %v", reached)
	if reached[job.Failed] == 0 || reached[job.Canceled] == 0 { // a quarter of all sequences each
		t.Error("the sequences do not get deep enough")
	}
}

// TestCancelAlwaysEnds: a cancel is possible wherever a job has not ended, and
// each of the three answers to it ends the job, as does giving up.
func TestCancelAlwaysEnds(t *testing.T) {
	odd := texts()
	rapid.Check(t, func(t *rapid.T) {
		m := run(t, odd, 25)
		if m.r.State.Terminal() {
			return
		}
		m.tick(t)
		err := m.apply(t, job.CancelRequest{})
		if err != nil && (m.r.State != job.Canceling || !errors.Is(err, job.ErrUnchanged)) {
			t.Fatalf("cancel while %s: %v", m.r.State, err)
		}
		if m.r.State == job.Canceled {
			return
		}
		if m.r.State != job.Canceling || m.r.Cancel == nil || m.r.Cancel.RequestedAt.IsZero() {
			t.Fatalf("a cancel leads to %s with receipt %+v", m.r.State, m.r.Cancel)
		}
		answers := []job.Event{
			job.Lost{Fence: m.r.Fence()}, job.Lost{Fence: m.r.Fence(), Confirmed: true}, job.GiveUp{Fence: m.r.Fence()},
		}
		for _, o := range []job.Outcome{job.OutcomeSucceeded, job.OutcomeFailed, job.OutcomeTimedOut, job.OutcomeCanceled, job.OutcomeRejected} {
			for _, why := range []job.Reason{"", job.ReasonEngineError, "a_new_word"} {
				answers = append(answers, job.Result{Fence: m.r.Fence(), WorkerID: m.r.WorkerID, Outcome: o, Reason: why})
			}
		}
		for _, e := range answers {
			try := m.copy()
			try.tick(t)
			if err := try.apply(t, e); err != nil || !try.r.State.Terminal() {
				t.Fatalf("%s %+v while canceling leads to %s, %v", job.KindOf(e), e, try.r.State, err)
			}
			if res, ok := e.(job.Result); ok && res.Outcome == job.OutcomeCanceled && try.r.State != job.Canceled {
				t.Fatalf("the worker said canceled, the job is %s", try.r.State)
			}
			switch e := e.(type) {
			case job.GiveUp:
				if !try.r.Cancel.StopUnconfirmed {
					t.Fatalf("giving up does not say that the stop is not proven")
				}
			case job.Lost:
				if try.r.Cancel.StopUnconfirmed == e.Confirmed {
					t.Fatalf("lost, confirmed %v, leaves %+v", e.Confirmed, try.r.Cancel)
				}
			}
		}
	})
}

// TestRaces: whichever of a result, a lost lease and a cancel is first, the
// job has one end, and nothing that comes later moves it.
func TestRaces(t *testing.T) {
	type event struct {
		name string
		make func(job.Record) job.Event
	}
	events := []event{
		{"lost", func(r job.Record) job.Event { return job.Lost{Fence: r.Fence()} }},
		{"cancel", func(job.Record) job.Event { return job.CancelRequest{} }},
	}
	for _, o := range []job.Outcome{job.OutcomeSucceeded, job.OutcomeFailed, job.OutcomeTimedOut, job.OutcomeCanceled} {
		events = append(events, event{string(o), func(r job.Record) job.Event {
			return job.Result{Fence: r.Fence(), WorkerID: "w1", Outcome: o, StartedAt: t0.Add(time.Second), ExitCode: new(1)}
		}})
	}
	// What the spec makes of a pair is one of these; "" is: still on its way.
	want := map[string][]job.State{
		"lost,cancel": {job.Canceled}, "cancel,lost": {job.Canceled}, "lost,succeeded": {job.Succeeded}, "succeeded,lost": {job.Succeeded},
		"cancel,succeeded": {job.Succeeded}, "succeeded,cancel": {job.Succeeded}, "cancel,failed": {job.Failed}, "failed,cancel": {job.Failed},
		"cancel,timed_out": {job.TimedOut}, "timed_out,cancel": {job.TimedOut}, "cancel,canceled": {job.Canceled}, "canceled,cancel": {job.Canceled},
		"lost,failed": {job.Failed}, "failed,lost": {job.Failed}, "lost,timed_out": {job.TimedOut}, "timed_out,lost": {job.TimedOut},
		"lost,canceled": {job.Retrying}, "canceled,lost": {job.Retrying}, // nobody asked for the stop: the worker's own failure
	}
	steps := map[string][]func(job.Record) job.Event{
		"assigned":  nil,
		"preparing": {func(r job.Record) job.Event { return job.Prepare{Fence: r.Fence()} }},
		"running":   {func(r job.Record) job.Event { return job.Start{Fence: r.Fence(), StartedAt: t0.Add(time.Second)} }},
	}
	for from, way := range steps {
		for _, a := range events {
			for _, b := range events {
				if a.name == b.name || a.name != "lost" && a.name != "cancel" && b.name != "lost" && b.name != "cancel" {
					continue
				}
				t.Run(fmt.Sprintf("%s/%s then %s", from, a.name, b.name), func(t *testing.T) {
					m := newMachine(newJob(t, nil))
					must := func(e job.Event) {
						t.Helper()
						m.now = m.now.Add(time.Second)
						if err := m.apply(t, e); err != nil {
							t.Fatal(err)
						}
					}
					must(job.Assign{WorkerID: "w1", LeaseID: "lease-1"})
					for _, step := range way {
						must(step(m.r))
					}
					first, second := a.make(m.r), b.make(m.r)
					must(first)
					m.now = m.now.Add(time.Second)
					_ = m.apply(t, second)
					expected := want[a.name+","+b.name]
					if len(expected) == 0 {
						t.Fatal("the expectation lacks this pair")
					}
					if m.r.State != expected[0] {
						t.Errorf("got %s, want %s", m.r.State, expected[0])
					}
					// Everything again, twice, in both orders: one end, for ever.
					for range 2 {
						for _, e := range []job.Event{second, first, job.CancelRequest{}, first, second} {
							m.now = m.now.Add(time.Second)
							_ = m.apply(t, e)
						}
					}
					if m.ends != 1 || !m.r.State.Terminal() {
						t.Errorf("%d ends, state %s", m.ends, m.r.State)
					}
				})
			}
		}
	}
}

// TestPermutations walks every sequence of up to seven distinct events of some
// sets, as reordering and reconnects may produce them.
func TestPermutations(t *testing.T) {
	first := job.Fence{Attempt: 1, LeaseID: "lease-1"}
	result := func(o job.Outcome, why job.Reason) job.Result {
		return job.Result{Fence: first, WorkerID: "w1", Outcome: o, Reason: why, ExitCode: new(1), StartedAt: t0}
	}
	var (
		assign1  = job.Assign{WorkerID: "w1", LeaseID: "lease-1"}
		assign2  = job.Assign{WorkerID: "w2", LeaseID: "lease-2"}
		prepare  = job.Prepare{Fence: first}
		start    = job.Start{Fence: first}
		lost     = job.Lost{Fence: first}
		returned = job.Return{Fence: first, Outcome: job.OutcomeReturned}
		giveUp   = job.GiveUp{Fence: first}
		second   = job.Result{Fence: job.Fence{Attempt: 2, LeaseID: "lease-2"}, WorkerID: "w2", Outcome: job.OutcomeSucceeded}
		late     = job.Deadline{Which: job.ReasonTotalTimeout}
	)
	plain := func(*job.Spec) {}
	retries := func(s *job.Spec) { s.Retry.MaxAttempts = 2 }
	once := func(s *job.Spec) { s.OnWorkerLost = job.OnWorkerLostFail }
	for name, set := range map[string]struct {
		events []job.Event
		specs  []func(*job.Spec)
	}{
		"the plain way":         {[]job.Event{assign1, prepare, start, result(job.OutcomeSucceeded, ""), lost, job.CancelRequest{}, late}, []func(*job.Spec){plain}},
		"a failure and a retry": {[]job.Event{assign1, start, result(job.OutcomeFailed, ""), lost, job.Requeue{}, assign2, second}, []func(*job.Spec){retries, once}},
		"a failing worker":      {[]job.Event{assign1, start, result(job.OutcomeFailed, job.ReasonEngineError), lost, job.Requeue{}, assign2, second}, []func(*job.Spec){plain, once}},
		"a rejecting worker":    {[]job.Event{assign1, start, result(job.OutcomeRejected, ""), returned, job.Requeue{}, assign2, job.CancelRequest{}}, []func(*job.Spec){plain, once}},
		"a cancel":              {[]job.Event{assign1, start, job.CancelRequest{}, result(job.OutcomeCanceled, ""), giveUp, lost, returned}, []func(*job.Spec){plain}},
		"two results":           {[]job.Event{assign1, start, result(job.OutcomeSucceeded, ""), result(job.OutcomeFailed, ""), lost, job.Requeue{}, assign2}, []func(*job.Spec){retries}},
	} {
		for i, change := range set.specs {
			t.Run(fmt.Sprintf("%s/spec %d", name, i+1), func(t *testing.T) {
				t.Parallel()
				sequences := 0
				var walk func(m *machine, used, left int)
				walk = func(m *machine, used, left int) {
					if m.ends > 1 || (m.ends == 1) != m.r.State.Terminal() {
						t.Fatalf("%d ends, in state %s", m.ends, m.r.State)
					}
					if m.ends == 1 {
						// Each event by itself changes nothing, and so no sequence of them does.
						for i, e := range set.events {
							if used&(1<<i) == 0 {
								_ = m.apply(t, e)
							}
						}
						sequences += arrangements(left)
						return
					}
					sequences++
					for i, e := range set.events {
						if used&(1<<i) == 0 {
							next := m.copy()
							next.now = next.now.Add(time.Hour)
							_ = next.apply(t, e)
							walk(next, used|1<<i, left-1)
						}
					}
				}
				walk(newMachine(newJob(t, change)), 0, len(set.events))
				if sequences != 13700 { // the sum of 7!/(7-k)! over k from 0 to 7
					t.Errorf("walked %d sequences", sequences)
				}
			})
		}
	}
}

// arrangements counts the sequences of up to n distinct events out of n.
func arrangements(n int) int {
	if n == 0 {
		return 1
	}
	return 1 + n*arrangements(n-1)
}

// TestHostileWorkers: reports that are all current and never end the job by
// themselves, with as much text as they like. The budgets end it; only what
// never started goes on for free, and then the record still fits.
func TestHostileWorkers(t *testing.T) {
	huge := strings.Repeat("<", 1<<16)
	var mostStarts, mostAttempts int
	rapid.Check(t, func(t *rapid.T) {
		maxAttempts := rapid.IntRange(1, 4).Draw(t, "maxAttempts")
		free := rapid.IntRange(0, 2*job.MaxAttemptsKept).Draw(t, "free")
		m := newMachine(newJob(t, func(s *job.Spec) { s.Retry.MaxAttempts = maxAttempts }))
		m.odd = []string{huge}
		must := func(e job.Event) {
			m.now = m.now.Add(time.Second)
			if err := m.apply(t, e); err != nil {
				t.Fatalf("%s while %s: %v", job.KindOf(e), m.r.State, err)
			}
		}
		for !m.r.State.Terminal() {
			if m.r.State == job.Retrying {
				m.now = m.r.RetryAt
				must(job.Requeue{})
			}
			must(job.Assign{WorkerID: strings.Repeat("w", 63), LeaseID: fmt.Sprintf("lease-%026d", m.r.Version)})
			res := job.Result{
				Fence: m.r.Fence(), WorkerID: m.r.WorkerID, Reason: job.Reason(huge), Message: huge, Signal: huge, ImageDigest: huge, ExitCode: new(-1 << 62),
				OOMKilled: true, AcceptedAt: m.now, PreparedAt: m.now, FinishedAt: m.now, PeakMemoryMB: 1 << 62, CPUMs: 1 << 62, Warm: true,
				Manifest: &job.Manifest{Chunks: 1 << 62, Bytes: 1 << 62, SHA256: huge, TruncatedBytes: 1 << 62},
			}
			if free > 0 {
				free--
				res.Outcome = job.OutcomeRejected
				must(res)
				continue
			}
			if rapid.Bool().Draw(t, "says that it started") {
				must(job.Start{Fence: m.r.Fence(), StartedAt: m.now})
			}
			res.StartedAt = m.now
			switch rapid.IntRange(0, 5).Draw(t, "how it ends") {
			case 0:
				must(job.Lost{Fence: m.r.Fence()})
			case 1: // it comes back after all, and has failed
				must(job.Lost{Fence: m.r.Fence()})
				if m.r.State == job.Retrying {
					res.Outcome, res.Reason = job.OutcomeFailed, job.ReasonWorkerError
					must(res)
				}
			case 2:
				res.Outcome, res.Reason = job.OutcomeFailed, job.ReasonEngineError
				must(res)
			case 3:
				res.Outcome = job.OutcomeRejected
				must(res)
			case 4:
				res.Outcome = job.OutcomeCanceled
				must(res)
			default:
				res.Outcome = job.OutcomeFailed
				must(res)
			}
		}
		if most := maxAttempts + job.InfraBudget; len(m.mayHave) > most {
			t.Fatalf("%d starts, %d are allowed", len(m.mayHave), most)
		}
		mostStarts, mostAttempts = max(mostStarts, len(m.mayHave)-maxAttempts), max(mostAttempts, m.r.Attempt)
	})
	if mostStarts != job.InfraBudget || mostAttempts <= job.MaxAttemptsKept {
		t.Errorf("at most %d starts beyond maxAttempts and %d attempts were seen: the limits were not reached", mostStarts, mostAttempts)
	}
}
