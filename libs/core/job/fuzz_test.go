package job

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"
)

func FuzzSpecJSON(f *testing.F) {
	for _, s := range []Spec{process(), container(), richSpec()} {
		data, err := json.Marshal(s)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
		n, _ := Normalise(s)
		data, err = json.Marshal(n)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	for _, s := range []string{
		``, `null`, `[]`, `{}`, `{"command":null}`, `{"command":["a",null]}`, `{"command":{"$gt":""}}`, `{"command":"true","env":{"A":null}}`,
		`{"command":"true","files":[null]}`, `{"command":"true","timeout":1e309}`, `{"command":"true","resources":{"cpu":-0.0,"memoryMb":9223372036854775807}}`,
		`{"command":"true","constraints":{"labels":{}},"labels":{},"files":[],"retry":{"onExitCodes":[]}}`, `{"command":"\ud800","stdin":"\u0000"}`,
		`{"command":"true","containerImage":"a@sha256:0"}`, `{"command":"true","secretEnv":{},"webhook":{"url":"http://127.1"}}`,
		`{"command":"true","files":[{"path":"a/../b"},{"path":"./b","mode":"7777"}]}`, `{"command":"true","command":["x"]}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var s Spec
		if json.Unmarshal(data, &s) != nil {
			return
		}
		n, errs := Normalise(s)
		for _, e := range errs {
			if e.Code == "" || e.Detail == "" {
				t.Fatalf("an error without a code or a text: %+v", e)
			}
		}
		if len(errs) > 0 {
			return
		}
		out, err := json.Marshal(n)
		if err != nil || len(out) > MaxSpecBytes {
			t.Fatalf("accepted with %d bytes, %v", len(out), err)
		}
		var back Spec
		if err := json.Unmarshal(out, &back); err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(back, n) {
			t.Fatalf("JSON changes it\nbefore %+v\n after %+v", n, back)
		}
		again, errs := Normalise(back)
		if len(errs) > 0 || !reflect.DeepEqual(again, n) || again.Hash() != n.Hash() {
			t.Fatalf("normalising twice: %v\nbefore %+v\n after %+v", errs, n, again)
		}
	})
}

func FuzzCommand(f *testing.F) {
	for _, s := range []string{
		`"a"`, `""`, `[]`, `["a"]`, `["a","\u0000"]`, `[null]`, `[[]]`, `null`, `{}`, `1`, `"\ud800"`, ` ["a"]`, `["a"`, `"a" "b"`, "\"\xff\"", "",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var direct Command
		_ = direct.UnmarshalJSON(data) // what encoding/json would not hand over must not panic either
		var c Command
		if json.Unmarshal(data, &c) != nil {
			return
		}
		if trimmed := bytes.TrimLeft(data, " \t\r\n"); (trimmed[0] == '[') != (c.Argv != nil) || c.Argv != nil && c.Shell != "" {
			t.Fatalf("%s was read as %+v", data, c)
		}
		out, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		var back Command
		if err := json.Unmarshal(out, &back); err != nil || !reflect.DeepEqual(back, c) {
			t.Fatalf("%+v comes back as %+v, %v", c, back, err)
		}
	})
}

func FuzzImageRef(f *testing.F) {
	for _, s := range []string{
		"", "alpine", "alpine:3", "a/b/c:d", "localhost:5000/a", "Host.example/a:b", "a@sha256:" + strings.Repeat("0", 64), "a:b@sha256:" + strings.Repeat("f", 64),
		"a@sha256:0", "../a", "http://a", "host:/a", "a__b", "a___b", "a..b", "[::1]/a", "A", "a:", ":", "@", "/", "a\x00", "0:0..", "a:..",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if !ValidImage(s) {
			return
		}
		// What an executor may hand to an engine, or into a URL, without a thought. A tag
		// may have two dots, behind its first character.
		path := s
		if tag := strings.LastIndexByte(s, ':'); tag > strings.LastIndexByte(s, '/') {
			path = s[:tag]
			if strings.HasPrefix(s[tag:], ":.") {
				t.Fatalf("%q was accepted", s)
			}
		}
		if s == "" || s[0] == '-' || s[0] == '.' || strings.Contains(path, "..") || strings.Contains(s, "//") || strings.Count(s, "@") > 1 ||
			strings.ContainsFunc(s, func(c rune) bool {
				return c <= ' ' || c >= 0x7f || strings.ContainsRune(`?#\%$&;|<>'"()[]{}*!~`+"`", c)
			}) {
			t.Fatalf("%q was accepted", s)
		}
		name, _, _ := strings.Cut(s, "@")
		parts := strings.Split(name, "/")
		if repo := parts[len(parts)-1]; strings.Count(repo, ":") > 1 {
			t.Fatalf("%q has two tags", s)
		}
		if !ValidImage("registry.example/x/"+name) && !isRegistryHost(parts[0]) {
			t.Fatalf("%q is valid, but not below a registry", name)
		}
		if strings.ContainsRune(s, '@') && !ValidImage(name) {
			t.Fatalf("%q is valid only with its digest", s)
		}
	})
}

func FuzzRecordJSON(f *testing.F) {
	r := New("job-01k00000000000000000000000", "ann", richSpec(), t0).WithIdempotency()
	add := func() {
		data, err := json.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	add()
	for _, e := range []Event{
		Assign{WorkerID: "w1", LeaseID: "lease-1"},
		Start{Fence: Fence{1, "lease-1"}},
		CancelRequest{},
		Result{Fence: Fence{1, "lease-1"}, WorkerID: "w1", Outcome: OutcomeFailed, ExitCode: ptr(137), Manifest: &Manifest{Chunks: 1}, Stop: &Cancel{GoneAt: t0}},
	} {
		next, err := Apply(r, e, t0)
		if err != nil {
			f.Fatal(err)
		}
		r = next
		add()
	}
	for _, s := range []string{``, `{}`, `null`, `{"schema":2}`, `{"schema":1,"state":"done","attempts":[{}]}`, `{"createdAt":"9999-12-31T23:59:59-23:59","attempts":null}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var r Record
		if json.Unmarshal(data, &r) != nil {
			return
		}
		out, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err) // times keep the offset that they came with, so that what was read can be written
		}
		var back Record
		if err := json.Unmarshal(out, &back); err != nil {
			t.Fatalf("%v in %s", err, out)
		}
		again, err := json.Marshal(back)
		if err != nil || !bytes.Equal(out, again) {
			t.Fatalf("%v: written as\n%s\nthen as\n%s", err, out, again)
		}
		_, _, _, _ = r.Last(), r.Fence(), r.AttemptsLeft(), r.InfraBudgetLeft()
		if c := r.clone(); !reflect.DeepEqual(c, r) {
			t.Fatalf("the clone of %+v is %+v", r, c)
		}
	})
}

// script turns bytes into events: fuzzing chooses, the record's fence is what
// makes most of them apply.
type script struct{ rest []byte }

func (s *script) next(n int) int {
	if len(s.rest) == 0 || n < 1 {
		return 0
	}
	b := s.rest[0]
	s.rest = s.rest[1:]
	return int(b) % n
}

func (s *script) event(r *Record) Event {
	fence := r.Fence()
	switch s.next(8) {
	case 6:
		fence.Attempt--
	case 7:
		fence.LeaseID = "lease-foreign"
	}
	at := []time.Time{{}, t0, t0.Add(time.Hour), t0.AddDate(9000, 0, 0)}[s.next(4)]
	switch Kinds()[s.next(len(Kinds()))] {
	case KindAssign:
		return Assign{WorkerID: fmt.Sprintf("w%d", s.next(2)), LeaseID: fmt.Sprintf("lease-%d", r.Version)}
	case KindReturn:
		return Return{Fence: fence, Outcome: []Outcome{OutcomeReturned, OutcomeRejected}[s.next(2)]}
	case KindPrepare:
		return Prepare{Fence: fence, AcceptedAt: at}
	case KindStart:
		return Start{Fence: fence, StartedAt: at}
	case KindResult:
		return Result{
			Fence: fence, WorkerID: fmt.Sprintf("w%d", s.next(2)), StartedAt: at, FinishedAt: at.Add(time.Duration(s.next(3)) * time.Hour),
			Outcome: []Outcome{OutcomeSucceeded, OutcomeFailed, OutcomeTimedOut, OutcomeCanceled, OutcomeRejected, OutcomeLost, "x"}[s.next(7)],
			Reason:  []Reason{"", ReasonExitCode, ReasonEngineError, ReasonPrepareTimeout, ReasonTotalTimeout, "new_word"}[s.next(6)],
			Stop:    []*Cancel{nil, {}, {GoneAt: at, StopUnconfirmed: true}}[s.next(3)],
		}
	case KindLost:
		return Lost{Fence: fence, Confirmed: s.next(2) == 0}
	case KindCancel:
		return CancelRequest{}
	case KindGiveUp:
		return GiveUp{Fence: fence}
	case KindDeadline:
		return Deadline{Which: []Reason{ReasonQueueTimeout, ReasonExecutionTimeout, ReasonTotalTimeout, ReasonCanceled}[s.next(4)]}
	case KindRequeue:
		return Requeue{}
	default:
		return Release{}
	}
}

func FuzzStateMachine(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte{0, 0, 0, 0, 0, 0, 1, 0, 3, 0, 1, 4, 0, 0, 0, 0, 0})
	f.Add([]byte{1, 1, 0, 0, 0, 0, 0, 0, 5, 1, 9, 9, 0, 0, 0, 1, 0, 0, 4, 0, 1, 1, 2})
	f.Add([]byte{2, 0, 0, 0, 0, 0, 1, 0, 3, 0, 0, 6, 0, 0, 8, 0, 7, 5, 0, 0, 1, 4, 0, 3})
	f.Add(bytes.Repeat([]byte{0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 9}, 12))
	f.Fuzz(func(t *testing.T, data []byte) {
		s := &script{rest: data[:min(len(data), 2048)]}
		spec := process()
		spec.Retry.MaxAttempts = 1 + s.next(3)
		if s.next(2) == 1 {
			spec.OnWorkerLost = OnWorkerLostFail
		}
		spec, errs := Normalise(spec)
		if len(errs) > 0 {
			t.Fatal(errs)
		}
		r := New("job-01k00000000000000000000000", "ann", spec, t0)
		now := t0
		starts := map[int]bool{}
		for len(s.rest) > 0 {
			now = now.Add(time.Duration(s.next(256)-8) * 10 * time.Second) // clocks also step back
			e := s.event(&r)
			before := r
			next, err := Apply(r, e, now)
			if !reflect.DeepEqual(r, before) {
				t.Fatal("Apply changed its argument")
			}
			checkStep(t, before, e, next, err)
			if a := next.Last(); a != nil && !a.StartedAt.IsZero() {
				starts[a.Number] = true
			}
			r = next
		}
		if most := spec.Retry.MaxAttempts + InfraBudget; len(starts) > most {
			t.Fatalf("%d starts, at most %d are allowed", len(starts), most)
		}
		if _, err := json.Marshal(r); err != nil {
			t.Fatal(err)
		}
	})
}

// checkStep holds one step to what is promised of every step.
func checkStep(t *testing.T, before Record, e Event, after Record, err error) {
	t.Helper()
	fail := func(why string) {
		t.Fatalf("%s: %T %+v, %v\nbefore %+v\n after %+v", why, e, e, err, before, after)
	}
	_, assigned := e.(Assign)
	switch {
	case err != nil && !reflect.DeepEqual(before, after):
		fail("a refused event changed the record")
	case err != nil && !errors.Is(err, ErrTerminal) && !errors.Is(err, ErrStale) && !errors.Is(err, ErrUnchanged) && !errors.Is(err, ErrRefused):
		fail("an error that nobody knows")
	case err != nil:
	case before.State.Terminal():
		fail("a terminal state is not absorbing")
	case after.Version != before.Version+1:
		fail("the version is not raised by one")
	case !after.State.Valid():
		fail("no such state")
	case after.Attempt < before.Attempt || after.Attempt > before.Attempt+1 || (after.Attempt != before.Attempt) != assigned:
		fail("the attempt grows by assignments only, one at a time")
	case !assigned && after.LeaseID != before.LeaseID && after.LeaseID != "":
		fail("a lease was made by something else than an assignment")
	case after.State.Leased() && (after.LeaseID == "" || after.WorkerID == ""):
		fail("a leased state without a lease")
	case after.State.Terminal() != !after.FinishedAt.IsZero():
		fail("finishedAt does not go with the state")
	case (after.State == Retrying) != !after.RetryAt.IsZero():
		fail("retryAt does not go with the state")
	case after.State == Canceling && after.Cancel == nil:
		fail("canceling without a receipt to fill")
	case len(after.Attempts) > MaxAttemptsKept:
		fail("too many attempts kept")
	case after.UserFailures < 0 || after.InfraFailures < 0 || after.InfraFailures > InfraBudget+1 || after.UserFailures > after.Spec.Retry.MaxAttempts:
		fail("a budget is overdrawn")
	}
}
