package core

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/job"
	"pgregory.net/rapid"
)

var t0 = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

const jobID = "job-01k00000000000000000000000"

// failer is the part of *testing.T and *rapid.T that the checks need.
type failer interface {
	Helper()
	Fatalf(format string, args ...any)
}

func newJob(t failer, change func(*job.Spec)) job.Record {
	t.Helper()
	s := job.Spec{Command: job.Command{Shell: "true"}}
	if change != nil {
		change(&s)
	}
	n, errs := job.Normalise(s)
	if len(errs) > 0 {
		t.Fatalf("the spec of a test is refused: %v", errs)
	}
	return job.New(jobID, strings.Repeat("<", job.MaxOwnerLen), n, t0)
}

// fullSpec has exactly MaxSpecBytes as JSON.
func fullSpec(t failer) job.Spec {
	t.Helper()
	s := job.Spec{Command: job.Command{Shell: "true"}, Stdin: strings.Repeat(`"`, 200<<10)}
	n, errs := job.Normalise(s)
	data, err := json.Marshal(n)
	if len(errs) > 0 || err != nil {
		t.Fatalf("full spec: %v, %v", errs, err)
	}
	s.Command.Shell += strings.Repeat("a", job.MaxSpecBytes-len(data))
	if n, errs = job.Normalise(s); len(errs) > 0 {
		t.Fatalf("full spec: %v", errs)
	}
	if data, _ = json.Marshal(n); len(data) != job.MaxSpecBytes {
		t.Fatalf("the full spec has %d bytes", len(data))
	}
	return n
}

// machine drives one job and checks after every event what is promised of all.
type machine struct {
	r   job.Record
	now time.Time

	leases  map[string]int // every lease ever given -> its attempt
	began   map[int]bool   // attempts whose command ran
	mayHave map[int]bool   // those, and the ones of which nobody knows
	ends    int            // how often a terminal state was entered
	applied int
	odd     []string // what workers write; nil: only what the test itself writes
}

func newMachine(r job.Record) *machine {
	return &machine{r: r, now: t0, leases: map[string]int{}, began: map[int]bool{}, mayHave: map[int]bool{}}
}

// copy lets two futures be tried from one state.
func (m *machine) copy() *machine {
	c := *m
	c.leases, c.began, c.mayHave = maps.Clone(m.leases), maps.Clone(m.began), maps.Clone(m.mayHave)
	return &c
}

func fenceOf(e job.Event) (job.Fence, bool) {
	switch e := e.(type) {
	case job.Return:
		return e.Fence, true
	case job.Prepare:
		return e.Fence, true
	case job.Start:
		return e.Fence, true
	case job.Result:
		return e.Fence, true
	case job.Lost:
		return e.Fence, true
	case job.GiveUp:
		return e.Fence, true
	default:
		return job.Fence{}, false
	}
}

func (m *machine) apply(t failer, e job.Event) error {
	t.Helper()
	before, kept := m.r, detached(m.r)
	after, err := job.Apply(before, e, m.now)
	bad := func(why string) {
		t.Helper()
		t.Fatalf("%s: %s %.300s, %v\nbefore %+v\n after %+v", why, job.KindOf(e), fmt.Sprintf("%+v", e), err, kept, after)
	}
	if !reflect.DeepEqual(before, kept) {
		bad("Apply changed its argument")
	}
	if again, err2 := job.Apply(before, e, m.now); !reflect.DeepEqual(again, after) || (err == nil) != (err2 == nil) || err != nil && err.Error() != err2.Error() {
		bad("Apply is not a function of its arguments")
	}
	fence, fenced := fenceOf(e)
	stale := fenced && (fence != before.Fence() || fence.LeaseID == "")
	if res, ok := e.(job.Result); ok && res.WorkerID != before.WorkerID {
		stale = true
	}
	if err != nil {
		if !reflect.DeepEqual(after, kept) {
			bad("a refused event changed the record")
		}
		known := errors.Is(err, job.ErrStale) || errors.Is(err, job.ErrUnchanged) || errors.Is(err, job.ErrRefused)
		if before.State.Terminal() != errors.Is(err, job.ErrTerminal) || !before.State.Terminal() && !known {
			bad("the wrong way of refusing")
		}
		if stale && errors.Is(err, job.ErrUnchanged) {
			bad("a stale report is taken for a repeat")
		}
		return err
	}

	assign, assigned := e.(job.Assign)
	last := after.Last()
	switch {
	case before.State.Terminal():
		bad("a terminal state is not absorbing")
	case stale:
		bad("a stale report took effect")
	case after.Version != before.Version+1:
		bad("the version is not raised by one")
	case !after.State.Valid():
		bad("no such state")
	case assigned && (after.Attempt != before.Attempt+1 || after.LeaseID != assign.LeaseID || after.WorkerID != assign.WorkerID):
		bad("an assignment does not make its attempt and lease")
	case !assigned && after.Attempt != before.Attempt:
		bad("the attempt changed without an assignment")
	case !assigned && after.LeaseID != "" && after.LeaseID != before.LeaseID:
		bad("a lease came from something else than an assignment")
	case !assigned && after.WorkerID != before.WorkerID:
		bad("the worker changed without an assignment")
	case after.State.Leased() && after.LeaseID == "":
		bad("a worker's state without a lease")
	case after.LeaseID != "" && (last == nil || last.Number != after.Attempt || last.LeaseID != after.LeaseID):
		bad("the lease is not the last attempt's")
	case before.State.Leased() && assigned:
		bad("a second lease while the first is out")
	case after.State == job.Queued && last != nil && last.Outcome == "":
		bad("queued while an attempt has no outcome")
	case after.State.Terminal() == after.FinishedAt.IsZero():
		bad("finishedAt does not go with the state")
	case (after.State == job.Retrying) == after.RetryAt.IsZero():
		bad("retryAt does not go with the state")
	case len(after.Attempts) > job.MaxAttemptsKept:
		bad("too many attempts are kept")
	case after.InfraFailures < 0 || after.UserFailures < 0:
		bad("a budget was paid back that was not spent")
	case after.InfraFailures > job.InfraBudget && after.State != job.Failed && after.State != job.Canceled:
		bad("the infra budget is overdrawn")
	case after.CreatedAt != before.CreatedAt || after.ID != before.ID || after.Owner != before.Owner || !reflect.DeepEqual(after.Spec, before.Spec):
		bad("what was submitted changed")
	case !before.StartedAt.IsZero() && after.StartedAt != before.StartedAt:
		bad("the first start moved")
	}
	if m.odd != nil {
		checkSize(bad, after)
	}

	if assigned {
		if _, dup := m.leases[assign.LeaseID]; dup {
			bad("a test gave the same lease twice")
		}
		m.leases[assign.LeaseID] = after.Attempt
		if before.Spec.OnWorkerLost == job.OnWorkerLostFail && len(m.mayHave) > before.UserFailures {
			bad("dispatched again though an attempt may have started that did not end by itself")
		}
	}
	if last != nil {
		n := last.Number
		set(m.began, n, !last.StartedAt.IsZero())
		set(m.mayHave, n, !last.StartedAt.IsZero() || last.Outcome == job.OutcomeLost)
		if m.began[n] && (last.Outcome == job.OutcomeReturned || last.Outcome == job.OutcomeRejected) && after.State == job.Queued {
			bad("handed back though it had started")
		}
	}
	if most := after.Spec.Retry.MaxAttempts + job.InfraBudget; len(m.began) > most || len(m.mayHave) > most {
		bad(fmt.Sprintf("%d starts, %d possible ones, allowed are %d", len(m.began), len(m.mayHave), most))
	}
	if after.Spec.OnWorkerLost == job.OnWorkerLostFail && after.Spec.Retry.MaxAttempts == 1 && len(m.mayHave) > 1 {
		bad("started at most once was asked for")
	}
	if after.State.Terminal() {
		m.ends++
	}
	m.applied++
	m.r = after
	return nil
}

func set(m map[int]bool, n int, v bool) {
	if v {
		m[n] = true
	} else {
		delete(m, n)
	}
}

// checkSize measures what the record is beside its spec, which is the same for
// the smallest and the largest spec.
func checkSize(bad func(string), r job.Record) {
	r.Spec = job.Spec{}
	data, err := json.Marshal(r)
	if err != nil {
		bad("the record cannot be written: " + err.Error())
	}
	empty, _ := json.Marshal(job.Spec{})
	if n := len(data) - len(empty) + job.MaxSpecBytes; n > job.MaxRecordBytes {
		bad(fmt.Sprintf("with a full spec the record has %d bytes", n))
	}
}

// detached copies what Apply could reach through its argument.
func detached(r job.Record) job.Record {
	r.Attempts = slices.Clone(r.Attempts)
	for i := range r.Attempts {
		if m := r.Attempts[i].Manifest; m != nil {
			r.Attempts[i].Manifest = new(*m)
		}
	}
	if r.Cancel != nil {
		r.Cancel = new(*r.Cancel)
	}
	return r
}

// texts are what workers may write into free fields.
func texts() []string {
	return []string{"", "no space left", strings.Repeat("<", 1<<14), strings.Repeat("\x01", 5000), strings.Repeat("é\xff", 3000), strings.Repeat("\u2028", 2000)}
}

func times(now time.Time) []time.Time {
	return []time.Time{
		{},
		now, now.Add(-time.Second), now.Add(-1000 * time.Hour), now.Add(time.Hour), time.Unix(0, 0),
		time.Date(9999, 12, 31, 23, 59, 59, 0, time.FixedZone("", -23*3600)), time.Date(0, 1, 1, 0, 0, 0, 0, time.FixedZone("", 23*3600)),
	}
}

// draw picks an event: mostly one that has a chance in the job's state, under
// mostly the right fence, so that runs get deep and still meet everything.
func (m *machine) draw(t *rapid.T) job.Event {
	pick := func(name string, weighted ...int) int { // index by weight
		total := 0
		for _, w := range weighted {
			total += w
		}
		n := rapid.IntRange(0, total-1).Draw(t, name)
		for i, w := range weighted {
			if n -= w; n < 0 {
				return i
			}
		}
		return 0
	}
	likely := map[job.State][]job.Kind{
		job.Queued:    {job.KindAssign, job.KindAssign, job.KindAssign, job.KindResult, job.KindDeadline},
		job.Retrying:  {job.KindRequeue, job.KindRequeue, job.KindRequeue, job.KindResult, job.KindCancel},
		job.Assigned:  {job.KindPrepare, job.KindStart, job.KindStart, job.KindReturn, job.KindLost, job.KindResult},
		job.Preparing: {job.KindStart, job.KindStart, job.KindReturn, job.KindResult, job.KindLost},
		job.Running:   {job.KindResult, job.KindResult, job.KindLost, job.KindLost, job.KindReturn, job.KindCancel, job.KindDeadline},
		job.Canceling: {job.KindResult, job.KindLost, job.KindGiveUp, job.KindReturn},
	}[m.r.State]
	kinds := job.Kinds()
	if len(likely) > 0 && pick("likely", 1, 4) == 1 {
		kinds = likely
	}
	fence := m.r.Fence()
	switch pick("fence", 12, 1, 1, 1, 1) {
	case 1:
		fence.Attempt += rapid.SampledFrom([]int{-1, 1, 1 << 40, -1 << 40}).Draw(t, "attempt off by")
	case 2:
		fence.LeaseID = "lease-foreign"
	case 3:
		fence = job.Fence{}
	case 4:
		for lease, n := range m.leases { // the first attempt's, if there was one
			if n == 1 {
				fence = job.Fence{Attempt: n, LeaseID: lease}
			}
		}
	}
	at := func(name string) time.Time { return rapid.SampledFrom(times(m.now)).Draw(t, name) }
	text := func(name string) string { return rapid.SampledFrom(m.odd).Draw(t, name) }
	switch rapid.SampledFrom(kinds).Draw(t, "kind") {
	case job.KindAssign:
		// A lease id is fresh by construction: here by the version, which only grows.
		return job.Assign{WorkerID: rapid.SampledFrom([]string{"w1", "w2", strings.Repeat("w", 63)}).Draw(t, "worker"), LeaseID: fmt.Sprintf("lease-%d", m.r.Version)}
	case job.KindReturn:
		return job.Return{Fence: fence, Outcome: rapid.SampledFrom([]job.Outcome{job.OutcomeReturned, job.OutcomeRejected}).Draw(t, "outcome"), Message: text("message")}
	case job.KindPrepare:
		return job.Prepare{Fence: fence, AcceptedAt: at("accepted")}
	case job.KindStart:
		return job.Start{Fence: fence, AcceptedAt: at("accepted"), PreparedAt: at("prepared"), StartedAt: at("started")}
	case job.KindResult:
		res := job.Result{
			Fence: fence, WorkerID: m.r.WorkerID, Reason: job.Reason(text("odd reason")), Message: text("message"), Signal: text("signal"),
			AcceptedAt: at("accepted"), PreparedAt: at("prepared"), StartedAt: at("started"), FinishedAt: at("finished"), ImageDigest: text("digest"),
			OOMKilled: rapid.Bool().Draw(t, "oom"), PeakMemoryMB: rapid.Int64().Draw(t, "peak"), CPUMs: rapid.Int64().Draw(t, "cpu"), Warm: true,
			Outcome: rapid.SampledFrom([]job.Outcome{
				job.OutcomeSucceeded, job.OutcomeFailed, job.OutcomeFailed, job.OutcomeFailed, job.OutcomeTimedOut, job.OutcomeCanceled,
				job.OutcomeRejected, job.OutcomeRejected, job.OutcomeLost, job.OutcomeReturned, "", "won",
			}).Draw(t, "outcome"),
			ExitCode: rapid.SampledFrom([]*int{nil, new(0), new(1), new(-1 << 62)}).Draw(t, "exit code"),
		}
		if pick("reason", 1, 3) == 1 {
			res.Reason = rapid.SampledFrom([]job.Reason{
				"", job.ReasonExitCode, job.ReasonWorkerStopped, job.ReasonEngineError, job.ReasonPrepareTimeout, job.ReasonTotalTimeout, job.ReasonRegistryReset,
			}).Draw(t, "known reason")
		}
		if rapid.Bool().Draw(t, "stop") {
			res.Stop = &job.Cancel{
				RequestedAt: at("requested"), DeliveredAt: at("delivered"), SignalledAt: at("signalled"), ExitedAt: at("exited"), GoneAt: at("gone"),
				StopUnconfirmed: rapid.Bool().Draw(t, "unconfirmed"),
			}
		}
		if rapid.Bool().Draw(t, "manifest") {
			n := rapid.Int64Min(0).Draw(t, "bytes")
			res.Manifest = &job.Manifest{Chunks: n, Bytes: n, SHA256: text("sum"), TruncatedBytes: n}
		}
		if pick("from", 6, 1) == 1 {
			res.WorkerID = "w-foreign"
		}
		return res
	case job.KindLost:
		return job.Lost{Fence: fence, Confirmed: rapid.Bool().Draw(t, "confirmed")}
	case job.KindCancel:
		return job.CancelRequest{}
	case job.KindGiveUp:
		return job.GiveUp{Fence: fence}
	case job.KindDeadline:
		return job.Deadline{Which: rapid.SampledFrom([]job.Reason{job.ReasonQueueTimeout, job.ReasonExecutionTimeout, job.ReasonTotalTimeout, job.ReasonPrepareTimeout, ""}).Draw(t, "which")}
	case job.KindRequeue:
		return job.Requeue{}
	default:
		return job.Release{}
	}
}

// tick moves the server's clock, sometimes back, sometimes far.
func (m *machine) tick(t *rapid.T) {
	m.now = m.now.Add(rapid.SampledFrom([]time.Duration{
		0, time.Millisecond, time.Second, time.Minute, time.Hour, 30 * 24 * time.Hour, -time.Second, -time.Hour, -400 * 24 * time.Hour,
	}).Draw(t, "tick"))
}

func drawSpec(t *rapid.T) func(*job.Spec) {
	return func(s *job.Spec) {
		s.Retry.MaxAttempts = rapid.IntRange(1, 4).Draw(t, "maxAttempts")
		s.Retry.BackoffSeconds = new(rapid.IntRange(0, 3).Draw(t, "backoff"))
		if rapid.Bool().Draw(t, "fail when lost") {
			s.OnWorkerLost = job.OnWorkerLostFail
		}
		if rapid.Bool().Draw(t, "some exit codes") {
			s.Retry.OnExitCodes = []int{1}
		}
	}
}
