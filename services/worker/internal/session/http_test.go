package session

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/services/worker/internal/clock"
	"github.com/cmdexec/cmdexec/services/worker/internal/edgetest"
	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
)

// noisy is an executor whose commands write as many lines as their command
// says and end when they are let go. It counts the starts of each lease.
type noisy struct {
	hold chan struct{} // closed: commands end

	mu     sync.Mutex
	starts map[string]int
	ended  map[string]executor.StopReason
}

func newNoisy() *noisy {
	return &noisy{hold: make(chan struct{}), starts: map[string]int{}, ended: map[string]executor.StopReason{}}
}

func (n *noisy) Name() string                  { return job.ExecutorProcess }
func (n *noisy) Probe(context.Context) error   { return nil }
func (n *noisy) Recover(context.Context) error { return nil }
func (n *noisy) Prepare(_ context.Context, s executor.Spec) (executor.Attempt, error) {
	return &noise{n: n, spec: s, stop: make(chan struct{})}, nil
}

func (n *noisy) startsOf(l workerproto.Lease) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.starts[l.LeaseID]
}

type noise struct {
	n    *noisy
	spec executor.Spec
	once sync.Once
	why  executor.StopReason
	stop chan struct{}
}

func (a *noise) Start(stdout, _ io.Writer) error {
	a.n.mu.Lock()
	a.n.starts[a.spec.LeaseID]++
	a.n.mu.Unlock()
	_, err := io.WriteString(stdout, noiseOf(a.spec.Shell))
	return err
}

// noiseOf is what a command writes: as many lines as it says.
func noiseOf(command string) string {
	var lines int
	_, _ = fmt.Sscan(command, &lines) // none
	var b strings.Builder
	for i := range lines {
		fmt.Fprintf(&b, "line %d of something that is long enough to fill a few chunks\n", i)
	}
	return b.String()
}

func (a *noise) Stop(why executor.StopReason) {
	a.once.Do(func() {
		a.why = why
		close(a.stop)
	})
}

func (a *noise) Close() error { return nil }

func (a *noise) Wait() executor.Exit {
	now := time.Now()
	select {
	case <-a.n.hold:
		code := 0
		return executor.Exit{Code: &code, StartedAt: now, FinishedAt: time.Now()}
	case <-a.stop:
		return executor.Exit{
			Signal: "SIGTERM", StartedAt: now, FinishedAt: time.Now(),
			Stop: &executor.StopReceipt{Reason: a.why, DeliveredAt: now, SignalledAt: now, ExitedAt: now, GoneAt: now},
		}
	}
}

// over starts a worker with a transport.
func over(t *testing.T, e *edgetest.Edge, transport Transport, x executor.Executor) *side {
	w := newSide(t, e, clock.NewSystem(), x)
	w.cfg.Transport = transport
	w.choice = choice{auto: transport == Auto, http: transport == HTTP}
	w.start()
	return w
}

func open(x *noisy) *noisy {
	close(x.hold)
	return x
}

func outcomes(rs []workerproto.Result) map[string][]job.Outcome {
	out := map[string][]job.Outcome{}
	for _, r := range rs {
		out[r.LeaseID] = append(out[r.LeaseID], r.Outcome)
	}
	return out
}

func TestHTTPDelivers(t *testing.T) {
	e := edgetest.New(t)
	x := open(newNoisy())
	w := over(t, e, HTTP, x)
	for i := range 12 { // more than there are slots: what is too much is rejected
		e.Plain.Run(edgetest.Lease(i), fmt.Sprint(i*200))
	}
	w.until("all results", func() bool { return len(outcomes(e.Plain.Results())) == 12 })
	w.until("acknowledged", w.runner.Idle)
	for i := range 12 {
		l := edgetest.Lease(i)
		got := outcomes(e.Plain.Results())[l.LeaseID]
		if slices.Equal(got, []job.Outcome{job.OutcomeRejected}) {
			continue
		}
		if x.startsOf(l) != 1 || !slices.Equal(got, []job.Outcome{job.OutcomeSucceeded}) {
			t.Errorf("%v started %d times and ended %v", l, x.startsOf(l), got)
		}
		i := slices.IndexFunc(e.Plain.Results(), func(r workerproto.Result) bool { return r.LeaseID == l.LeaseID })
		tail := ""
		for _, c := range e.Plain.Results()[i].Tail {
			tail += string(c.Data)
		}
		if text, whole := e.Plain.Output(l); !whole || text+tail != noiseOf(fmt.Sprint(200*atoi(l.JobID))) {
			t.Errorf("%v: %d bytes of output and %d in the tail, whole: %v", l, len(text), len(tail), whole)
		}
	}
	if err := w.Ready(); err != nil {
		t.Error(err)
	}
}

func atoi(jobID string) (n int) {
	_, _ = fmt.Sscanf(jobID, "job-%d", &n)
	return n
}

// Answers of every route are lost, again and again: nothing is lost or run twice.
func TestHTTPLostAnswers(t *testing.T) {
	e := edgetest.New(t)
	e.Plain.SetFault(func(_ string, n int) edgetest.Fault { return edgetest.Fault{Drop: n%3 == 2} })
	x := open(newNoisy())
	w := over(t, e, HTTP, x)
	for i := range 8 {
		l := edgetest.Lease(i)
		e.Plain.Run(l, "4000")
		w.until("a result", func() bool { return len(outcomes(e.Plain.Results())[l.LeaseID]) > 0 })
		w.until("acknowledged", w.runner.Idle)
		r := e.Plain.Results()
		tail := ""
		for _, c := range r[len(r)-1].Tail {
			tail += string(c.Data)
		}
		if text, whole := e.Plain.Output(l); !whole || text+tail != noiseOf("4000") {
			t.Errorf("%d bytes of output, whole: %v", len(text), whole)
		}
		if n := x.startsOf(l); n != 1 {
			t.Errorf("started %d times", n)
		}
	}
	if e.Plain.Requests(workerproto.PathOutput) < 4 {
		t.Error("too little was sent for this to show anything")
	}
}

// An edge that has forgotten the session gets a new one, with what is held.
func TestHTTPRegistersAgain(t *testing.T) {
	e := edgetest.New(t)
	x := newNoisy()
	w := over(t, e, HTTP, x)
	l := edgetest.Lease(1)
	e.Plain.Run(l, "10")
	w.until("started", func() bool { return x.startsOf(l) == 1 })
	w.until("the first output has come", func() bool { text, _ := e.Plain.Output(l); return text != "" })
	e.Plain.Forget()
	w.until("registered again", func() bool { return len(e.Plain.Hellos()) == 2 })
	if again := e.Plain.Hellos()[1]; len(again.Running) != 1 || again.Running[0].Lease != l || again.Running[0].LastSeq < 1 {
		t.Errorf("the second registration lists %v", again.Running)
	}
	close(x.hold)
	w.until("a result", func() bool { return len(e.Plain.Results()) == 1 })
	w.until("acknowledged", w.runner.Idle)
	if x.startsOf(l) != 1 {
		t.Error("started twice")
	}
}

// Requests that reach another edge are repeated; when the right one is not found
// the worker registers.
func TestHTTPWrongEdge(t *testing.T) {
	e := edgetest.New(t)
	e.Plain.SetFault(func(path string, n int) edgetest.Fault {
		if path != workerproto.PathRegister && n%2 == 1 {
			return edgetest.Fault{Status: http.StatusMisdirectedRequest, Code: workerproto.CodeWrongEdge}
		}
		return edgetest.Fault{}
	})
	w := over(t, e, HTTP, open(newNoisy()))
	for i := range 4 {
		e.Plain.Run(edgetest.Lease(i), "3000")
		w.until("results", func() bool { return len(e.Plain.Results()) == i+1 })
	}
	w.until("acknowledged", w.runner.Idle)
	if n := len(e.Plain.Hellos()); n != 1 {
		t.Errorf("registered %d times", n)
	}
	e.Plain.SetFault(func(path string, _ int) edgetest.Fault {
		if path != workerproto.PathRegister && len(e.Plain.Hellos()) < 2 {
			return edgetest.Fault{Status: http.StatusMisdirectedRequest, Code: workerproto.CodeWrongEdge}
		}
		return edgetest.Fault{}
	})
	w.until("registered again", func() bool { return len(e.Plain.Hellos()) == 2 })
	e.Plain.Run(edgetest.Lease(9), "1")
	w.until("goes on", func() bool { return len(e.Plain.Results()) == 5 })
}

// A server in trouble, or that wants less, is asked again within the session.
func TestHTTPTroublePasses(t *testing.T) {
	e := edgetest.New(t)
	statuses := []int{http.StatusServiceUnavailable, http.StatusTooManyRequests, http.StatusBadGateway, http.StatusInternalServerError}
	e.Plain.SetFault(func(path string, n int) edgetest.Fault {
		if path != workerproto.PathRegister && n%5 != 0 {
			return edgetest.Fault{Status: statuses[n%len(statuses)]}
		}
		return edgetest.Fault{}
	})
	w := over(t, e, HTTP, open(newNoisy()))
	e.Plain.Run(edgetest.Lease(1), "3000")
	w.until("a result", func() bool { return len(e.Plain.Results()) == 1 })
	w.until("acknowledged", w.runner.Idle)
	if n := len(e.Plain.Hellos()); n != 1 {
		t.Errorf("registered %d times", n)
	}
}

func TestHTTPCancelAndToken(t *testing.T) {
	e := edgetest.New(t)
	x := newNoisy()
	w := over(t, e, HTTP, x)
	l := edgetest.Lease(1)
	e.Plain.Run(l, "1")
	w.until("started", func() bool { return x.startsOf(l) == 1 })
	w.until("told as started", func() bool {
		return slices.ContainsFunc(e.Plain.Beats(), func(b workerproto.Heartbeat) bool {
			return len(b.Running) == 1 && b.Running[0].Phase == workerproto.PhaseStarted
		})
	})
	e.Plain.Renew("a-newer-token")
	w.until("the token is kept", func() bool { return slices.Contains(w.renewed(), "a-newer-token") })
	e.Plain.Cancel(l)
	w.until("a result", func() bool { return len(e.Plain.Results()) == 1 })
	if r := e.Plain.Results()[0]; r.Outcome != job.OutcomeCanceled {
		t.Errorf("ended %s", r.Outcome)
	}
}

// How sessions over plain HTTP end, by the answer to a heartbeat.
func TestHowHTTPSessionsEnd(t *testing.T) {
	for _, c := range []struct {
		status int
		code   string
		check  func(error) bool
	}{
		{http.StatusUnauthorized, "unauthorized", func(err error) bool { return errors.Is(err, ErrToken) }},
		{http.StatusConflict, workerproto.CodeReplaced, func(err error) bool {
			g, ok := errors.AsType[*goaway](err)
			return ok && g.replaced && g.after == maxBackoff
		}},
		{http.StatusConflict, workerproto.CodeRegisterAgain, func(err error) bool { return strings.Contains(err.Error(), "wants it so") }},
		{http.StatusUnprocessableEntity, "invalid_report", func(err error) bool { return strings.Contains(err.Error(), "422") }},
		{http.StatusFound, "", func(err error) bool { return strings.Contains(err.Error(), "302") }},
	} {
		e := edgetest.New(t)
		e.Plain.SetFault(func(path string, _ int) edgetest.Fault {
			if path == workerproto.PathHeartbeat {
				return edgetest.Fault{Status: c.status, Code: c.code}
			}
			return edgetest.Fault{}
		})
		w := newSide(t, e, clock.NewSystem(), instant{})
		t.Cleanup(w.plain.CloseIdleConnections)
		if _, err := w.overHTTP(t.Context()); err == nil || !c.check(err) {
			t.Errorf("%d %s: ended with %v", c.status, c.code, err)
		}
	}
}

// The token goes to the address that the owner has named and nowhere else.
func TestRedirectsAreNotFollowed(t *testing.T) {
	elsewhere := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("somebody else was asked") }))
	defer elsewhere.Close()
	for _, status := range []int{http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther, http.StatusTemporaryRedirect, http.StatusPermanentRedirect} {
		server := httptest.NewServer(http.RedirectHandler(elsewhere.URL+"/?key=s3cret", status))
		e := edgetest.New(t)
		w := newSide(t, e, clock.NewSystem(), instant{})
		w.cfg.URL = server.URL
		_, plain := w.overHTTP(t.Context())
		_, socket := w.overSocket(t.Context(), nil)
		for what, err := range map[string]error{"plain HTTP": plain, "WebSocket": socket} {
			if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("redirects to %s (%d)", elsewhere.URL, status)) ||
				!strings.Contains(err.Error(), "SERVER_URL") || strings.Contains(err.Error(), "s3cret") {
				t.Errorf("%s, %d: ended with %v", what, status, err)
			}
		}
		if _, ok := errors.AsType[*noSocket](socket); ok {
			t.Errorf("%d is taken for a word about WebSockets", status)
		}
		w.plain.CloseIdleConnections()
		w.socket.CloseIdleConnections()
		server.Close()
	}
}

// Something on the way does not let WebSockets through.
func TestAutoWithoutWebSockets(t *testing.T) {
	for _, status := range []int{http.StatusUpgradeRequired, http.StatusBadRequest, http.StatusForbidden, http.StatusBadGateway, http.StatusOK} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			e := edgetest.New(t)
			e.Set(status, "")
			x := newNoisy()
			w := newSide(t, e, clock.NewSystem(), x)
			w.cfg.Transport, w.cfg.RetryWS, w.choice = Auto, 300*time.Millisecond, choice{auto: true}
			w.start()
			w.until("registered", func() bool { return len(e.Plain.Hellos()) == 1 })
			l := edgetest.Lease(1)
			e.Plain.Run(l, "100")
			w.until("started", func() bool { return x.startsOf(l) == 1 })

			// It is gone: the worker goes over with the lease, and nothing starts again.
			e.Set(0, workerproto.Subprotocol)
			link, reg := e.Hello()
			if len(reg.Running) != 1 || reg.Running[0].Lease != l {
				t.Errorf("the hello lists %v", reg.Running)
			}
			link.Welcome()

			// And there again, in the middle of the attempt.
			e.Set(status, "")
			link.Cut()
			w.until("registered again", func() bool { return len(e.Plain.Hellos()) == 2 })
			if reg := e.Plain.Hellos()[1]; len(reg.Running) != 1 || reg.Running[0].Lease != l {
				t.Errorf("the second registration lists %v", reg.Running)
			}
			close(x.hold)
			w.until("a result", func() bool { return len(e.Plain.Results()) == 1 })
			w.until("acknowledged", w.runner.Idle)
			if x.startsOf(l) != 1 {
				t.Error("started twice")
			}
			w.stop()
		})
	}
}

func TestAutoStaysWhereHTTPIsNoBetter(t *testing.T) {
	e := edgetest.New(t)
	e.Set(http.StatusNotFound, "")
	e.Plain.SetFault(func(string, int) edgetest.Fault { return edgetest.Fault{Status: http.StatusNotFound} })
	w := over(t, e, Auto, instant{})
	w.until("both were tried, in turns", func() bool {
		return len(e.Tries()) >= 3 && e.Plain.Requests(workerproto.PathRegister) >= 3
	})
	e.Set(0, workerproto.Subprotocol)
	e.Connected()
	w.until("ready", func() bool { return w.Ready() == nil })
	w.stop()
}

func TestChoice(t *testing.T) {
	doubtful, certain := &noSocket{err: io.EOF}, &noSocket{err: io.EOF, certain: true}
	for name, c := range map[string]struct {
		errs []error
		http bool
	}{
		"a refusal":                {[]error{certain}, true},
		"doubts":                   {[]error{doubtful, doubtful}, false},
		"enough doubts":            {[]error{doubtful, doubtful, doubtful}, true},
		"a token":                  {[]error{ErrToken, ErrToken, ErrToken, ErrToken}, false},
		"no HTTP either":           {[]error{certain, &noHTTP{io.EOF}}, false},
		"doubts begin anew":        {[]error{certain, &noHTTP{io.EOF}, doubtful, doubtful}, false},
		"HTTP that was cut":        {[]error{certain, io.EOF}, true},
		"HTTP that was told to go": {[]error{certain, &goaway{}}, true},
	} {
		choice := choice{auto: true}
		for _, err := range c.errs {
			choice.after(fmt.Errorf("wrapped: %w", err))
		}
		if choice.http != c.http {
			t.Errorf("%s: HTTP %v", name, choice.http)
		}
	}
	for _, fixed := range []choice{{http: true}, {http: false}} {
		was := fixed
		fixed.after(certain)
		fixed.after(&noHTTP{io.EOF})
		if fixed != was {
			t.Error("what the owner has named is not for the worker to change")
		}
	}
	if _, ok := errors.AsType[*noSocket](notUpgraded(0, fmt.Errorf("dial: %w", &net.OpError{Op: "dial", Err: io.EOF}))); ok {
		t.Error("a server that cannot be reached says nothing about WebSockets")
	}
	for _, status := range []int{401, 429, 503} {
		if _, ok := errors.AsType[*noSocket](notUpgraded(status, io.EOF)); ok {
			t.Errorf("%d says nothing about WebSockets", status)
		}
	}
}
