package job

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"
)

// TestStartedIsNotGivenBack: handing a job back is free, so it must not be
// possible once the command ran, or a worker could run it for ever.
func TestStartedIsNotGivenBack(t *testing.T) {
	running := inState(t, Running)
	for _, o := range []Outcome{OutcomeReturned, OutcomeRejected} {
		if r, err := Apply(running, Return{Fence: running.Fence(), Outcome: o}, t0.Add(time.Hour)); !errors.Is(err, ErrRefused) {
			t.Errorf("%s after the start leads to %s, %v", o, r.State, err)
		}
	}
	canceling := must(t, running, CancelRequest{}, t0.Add(time.Hour))
	if r, err := Apply(canceling, Return{Fence: canceling.Fence(), Outcome: OutcomeReturned}, t0.Add(time.Hour)); !errors.Is(err, ErrRefused) {
		t.Errorf("returned after the start while canceling leads to %s, %v: nothing proves the stop", r.State, err)
	}
	reject := Result{Fence: running.Fence(), WorkerID: "w1", Outcome: OutcomeRejected, Message: "busy"}
	r := must(t, running, reject, t0.Add(time.Hour))
	if r.State != Retrying || r.InfraFailures != 1 || r.Reason != ReasonWorkerError || r.Last().Outcome != OutcomeFailed {
		t.Errorf("a rejection after the start: %s, %s, %d infra failures, %+v", r.State, r.Reason, r.InfraFailures, r.Last())
	}
	atOnce := inState(t, Assigned) // the start is first heard of in the rejection itself
	reject = Result{Fence: atOnce.Fence(), WorkerID: "w1", Outcome: OutcomeRejected, StartedAt: t0.Add(time.Minute)}
	if r := must(t, atOnce, reject, t0.Add(time.Hour)); r.State != Retrying || r.InfraFailures != 1 {
		t.Errorf("a rejection that tells of a start: %s with %d infra failures", r.State, r.InfraFailures)
	}
	atMostOnce := inState(t, Running)
	atMostOnce.Spec.OnWorkerLost = OnWorkerLostFail
	reject = Result{Fence: atMostOnce.Fence(), WorkerID: "w1", Outcome: OutcomeRejected}
	if r := must(t, atMostOnce, reject, t0.Add(time.Hour)); r.State != Failed {
		t.Errorf("a rejection after the only start: %s", r.State)
	}
}

// TestTimedOutPreparingIsInfra: the reason's class decides which budget is spent.
func TestTimedOutPreparingIsInfra(t *testing.T) {
	r := inState(t, Preparing)
	r.Spec.Retry.MaxAttempts = 1
	got := must(t, r, Result{Fence: r.Fence(), WorkerID: "w1", Outcome: OutcomeTimedOut, Reason: ReasonPrepareTimeout}, t0.Add(time.Hour))
	if got.State != Retrying || got.InfraFailures != 1 || got.UserFailures != 0 {
		t.Errorf("got %s with %d+%d failures", got.State, got.UserFailures, got.InfraFailures)
	}
	got = must(t, r, Result{Fence: r.Fence(), WorkerID: "w1", Outcome: OutcomeTimedOut}, t0.Add(time.Hour))
	if got.State != TimedOut || got.UserFailures != 1 {
		t.Errorf("the command's own timeout: %s with %d failures", got.State, got.UserFailures)
	}
}

// TestHostileTimes: JSON has no times outside of the years 0 to 9999, and a
// record with one could never be written again.
func TestHostileTimes(t *testing.T) {
	for _, s := range []string{"9999-12-31T23:59:59-23:59", "0000-01-01T00:00:00+23:59"} {
		var at time.Time
		if err := json.Unmarshal([]byte(`"`+s+`"`), &at); err != nil {
			t.Fatal(err)
		}
		r := inState(t, Canceling)
		now := t0.Add(time.Hour)
		r = must(t, r, Result{
			Fence: r.Fence(), WorkerID: "w1", Outcome: OutcomeCanceled, AcceptedAt: at, PreparedAt: at, StartedAt: at, FinishedAt: at,
			Stop: &Cancel{RequestedAt: at, DeliveredAt: at, SignalledAt: at, ExitedAt: at, GoneAt: at},
		}, now)
		data, err := json.Marshal(r)
		if err != nil {
			t.Errorf("%s: %v", s, err)
		}
		if strings.Contains(string(data), "9999") || strings.Contains(string(data), `"0000-`) {
			t.Errorf("a time that cannot be is in %s", data)
		}
	}
	r := inState(t, Canceling)
	r = must(t, r, Result{Fence: r.Fence(), WorkerID: "w1", Outcome: OutcomeCanceled, Stop: &Cancel{DeliveredAt: t0.Add(time.Minute)}}, t0.Add(time.Hour))
	if !r.Cancel.DeliveredAt.Equal(t0.Add(time.Minute)) || !r.Cancel.GoneAt.IsZero() || !r.Cancel.SignalledAt.IsZero() {
		t.Errorf("the receipt %+v says what did not happen", r.Cancel)
	}
}

// TestFencesAreCheckedOnRepeats: a repeat under another lease is stale, not a repeat.
func TestFencesAreCheckedOnRepeats(t *testing.T) {
	r := inState(t, Running)
	for _, e := range []Event{
		Prepare{Fence: Fence{Attempt: 1, LeaseID: "lease-0"}},
		Start{Fence: Fence{Attempt: 2, LeaseID: "lease-1"}},
		Start{},
		Prepare{Fence: Fence{Attempt: -1, LeaseID: "lease-1"}},
	} {
		if _, err := Apply(r, e, t0); !errors.Is(err, ErrStale) {
			t.Errorf("%+v: %v", e, err)
		}
	}
}

func TestAssignNeedsNames(t *testing.T) {
	r := newRecord(t, nil)
	for _, e := range []Assign{{}, {WorkerID: "w"}, {LeaseID: "l"}} {
		if _, err := Apply(r, e, t0); !errors.Is(err, ErrRefused) {
			t.Errorf("%+v: %v", e, err)
		}
	}
}

func TestDeadlines(t *testing.T) {
	for _, c := range []struct {
		from  State
		which Reason
		to    State // empty: refused
	}{
		{Queued, ReasonQueueTimeout, Expired},
		{Queued, ReasonTotalTimeout, Expired},
		{Queued, ReasonExecutionTimeout, ""},
		{Queued, ReasonPrepareTimeout, ""},
		{Queued, "", ""},
		{Retrying, ReasonQueueTimeout, Expired},
		{Assigned, ReasonQueueTimeout, ""},
		{Assigned, ReasonTotalTimeout, ""},
		{Assigned, ReasonExecutionTimeout, ""},
		{Preparing, ReasonTotalTimeout, TimedOut},
		{Preparing, ReasonExecutionTimeout, ""},
		{Preparing, ReasonQueueTimeout, ""},
		{Running, ReasonExecutionTimeout, TimedOut},
		{Running, ReasonTotalTimeout, TimedOut},
		{Running, ReasonQueueTimeout, ""},
		{Canceling, ReasonTotalTimeout, ""},
	} {
		r, err := Apply(inState(t, c.from), Deadline{Which: c.which}, t0.Add(time.Hour))
		switch {
		case c.to == "" && !errors.Is(err, ErrRefused):
			t.Errorf("%s while %s: %s, %v", c.which, c.from, r.State, err)
		case c.to != "" && (err != nil || r.State != c.to || r.Reason != c.which):
			t.Errorf("%s while %s: %s %s, %v", c.which, c.from, r.State, r.Reason, err)
		}
	}
	// Waiting again after it had run: not expired, since it did start.
	r := inState(t, Running)
	r = must(t, r, Lost{Fence: r.Fence()}, t0.Add(time.Minute))
	if r = must(t, r, Deadline{Which: ReasonQueueTimeout}, t0.Add(time.Hour)); r.State != Failed || r.Reason != ReasonQueueTimeout {
		t.Errorf("got %s %s", r.State, r.Reason)
	}
}

// TestReasons: who pays for what. Every reason of the list has a class.
func TestReasons(t *testing.T) {
	want := map[Class][]Reason{
		ClassUser: {ReasonExitCode, ReasonSignaled, ReasonOOMKilled, ReasonStartFailed, ReasonExecutionTimeout, ReasonCanceled, "", "a_new_word"},
		ClassInfra: {
			ReasonWorkerLost, ReasonWorkerStopped, ReasonWorkerError, ReasonLeaseLost, ReasonImagePullFailed, ReasonEngineError,
			ReasonDiskFull, ReasonPrepareTimeout, ReasonNotDelivered,
		},
		ClassPolicy:   {ReasonTotalTimeout, ReasonQueueTimeout, ReasonRejected},
		ClassOperator: {ReasonRegistryReset},
	}
	for c, rs := range want {
		for _, r := range rs {
			if r.Class() != c {
				t.Errorf("%q is of class %s, want %s", r, r.Class(), c)
			}
		}
	}
}

func TestDefaultReasons(t *testing.T) {
	for _, c := range []struct {
		result Result
		want   Reason
	}{
		{Result{Outcome: OutcomeFailed, ExitCode: ptr(1)}, ReasonExitCode},
		{Result{Outcome: OutcomeFailed, Signal: "SIGSEGV"}, ReasonSignaled},
		{Result{Outcome: OutcomeFailed, Signal: "SIGKILL", OOMKilled: true}, ReasonOOMKilled},
		{Result{Outcome: OutcomeTimedOut}, ReasonExecutionTimeout},
		{Result{Outcome: OutcomeSucceeded}, ""},
		{Result{Outcome: OutcomeFailed, Reason: ReasonStartFailed}, ReasonStartFailed},
	} {
		r := inState(t, Running)
		r.Spec.Retry.MaxAttempts = 1
		c.result.Fence, c.result.WorkerID = r.Fence(), "w1"
		if got := must(t, r, c.result, t0.Add(time.Hour)); got.Reason != c.want || got.Last().Reason != c.want {
			t.Errorf("%+v: reason %q and %q, want %q", c.result, got.Reason, got.Last().Reason, c.want)
		}
	}
}

// TestStates holds the three predicates to the list.
func TestStates(t *testing.T) {
	leased := map[State]bool{Assigned: true, Preparing: true, Running: true, Canceling: true}
	ended := map[State]bool{Succeeded: true, Failed: true, TimedOut: true, Canceled: true, Expired: true}
	for _, s := range States() {
		if !s.Valid() || s.Leased() != leased[s] || s.Terminal() != ended[s] {
			t.Errorf("%s: valid %v, leased %v, terminal %v", s, s.Valid(), s.Leased(), s.Terminal())
		}
	}
	for _, s := range []State{"", "Queued", "done", "unknown"} {
		if s.Valid() || s.Terminal() || s.Leased() {
			t.Errorf("%q is taken for a state", s)
		}
	}
}

func TestClip(t *testing.T) {
	for _, c := range []struct {
		in   string
		most int
		want string
	}{
		{"abc", 3, "abc"}, {"abcd", 3, "abc"}, {"aé", 2, "a"}, {"aé", 3, "aé"}, {"é", 1, ""}, {"é", 0, ""}, {"a\xff", 9, "a\uFFFD"}, {"", 5, ""},
	} {
		if got := clip(c.in, c.most); got != c.want {
			t.Errorf("clip(%q, %d) is %q, want %q", c.in, c.most, got, c.want)
		}
	}
}

// TestRecordHasRoomBesideTheSpec: what a record adds to a spec is bounded by the
// constants, whatever workers report. tests/core looks for a way past this.
func TestRecordHasRoomBesideTheSpec(t *testing.T) {
	r := New("job-01k00000000000000000000000", strings.Repeat("<", MaxOwnerLen), testSpec(t, nil), t0)
	spec, err := json.Marshal(r.Spec)
	if err != nil {
		t.Fatal(err)
	}
	long := strings.Repeat("<", 1<<16)
	for range 3 * MaxAttemptsKept {
		r = must(t, r, Assign{WorkerID: strings.Repeat("w", 63), LeaseID: "lease-01k00000000000000000000000"}, t0)
		r = must(t, r, Result{
			Fence: r.Fence(), WorkerID: r.WorkerID, Outcome: OutcomeRejected, Reason: Reason(long), Message: long, ExitCode: ptr(-1 << 62),
			Signal: long, OOMKilled: true, AcceptedAt: t0, PreparedAt: t0, ImageDigest: long, PeakMemoryMB: 1 << 62, CPUMs: 1 << 62,
			Manifest: &Manifest{Chunks: 1 << 62, Bytes: 1 << 62, SHA256: long, TruncatedBytes: 1 << 62},
		}, t0)
	}
	if len(r.Attempts) != MaxAttemptsKept || r.Attempt != 3*MaxAttemptsKept || r.Last().Number != r.Attempt {
		t.Fatalf("%d attempts kept of %d", len(r.Attempts), r.Attempt)
	}
	data, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	if extra := len(data) - len(spec); extra > recordOverheadSize {
		t.Errorf("%d bytes beside the spec, %d are allowed", extra, recordOverheadSize)
	}
}

// TestOutcomeIsTheNewestAttempts: what an earlier attempt ended with must not
// stand beside the reason of a later one that ended otherwise.
func TestOutcomeIsTheNewestAttempts(t *testing.T) {
	r := inState(t, Running)
	r = must(t, r, Result{Fence: r.Fence(), WorkerID: "w1", Outcome: OutcomeFailed, ExitCode: ptr(137), Signal: "SIGKILL", OOMKilled: true}, t0.Add(time.Minute))
	if r.State != Retrying || *r.ExitCode != 137 {
		t.Fatalf("got %s, exit code %v", r.State, r.ExitCode)
	}
	r = must(t, r, Requeue{}, r.RetryAt)
	r = must(t, r, Assign{WorkerID: "w2", LeaseID: "lease-2"}, r.StateAt)
	if r.ExitCode != nil || r.Signal != "" || r.OOMKilled {
		t.Errorf("attempt 2 begins with exit code %v, signal %q, oom %v", r.ExitCode, r.Signal, r.OOMKilled)
	}
	if a := r.Attempts[0]; *a.ExitCode != 137 || a.Signal != "SIGKILL" || !a.OOMKilled {
		t.Errorf("attempt 1 lost what it ended with: %+v", a)
	}
}
