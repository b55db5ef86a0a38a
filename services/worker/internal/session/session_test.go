package session

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"
	"go.uber.org/goleak"

	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/services/worker/internal/clock"
	"github.com/cmdexec/cmdexec/services/worker/internal/edgetest"
	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
	"github.com/cmdexec/cmdexec/services/worker/internal/process"
	"github.com/cmdexec/cmdexec/services/worker/internal/runner"
	"github.com/cmdexec/cmdexec/services/worker/internal/spool"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	me       = "worker-1"
	patience = 20 * time.Second // for what must happen, on a busy machine
)

// logs keeps what is logged.
type logs struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

type fakeClock struct {
	mu  sync.Mutex
	now time.Duration
}

func (c *fakeClock) Now() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *fakeClock) pass(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now += d
}

// side is the worker's side of a session.
type side struct {
	*Session
	t      *testing.T
	logs   *logs
	runner *runner.Runner
	stop   func() // ends Run and waits for it

	mu     sync.Mutex
	tokens []string // that the edge has sent
}

func (w *side) renewed() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]string(nil), w.tokens...)
}

// newSide makes a worker that does not connect yet.
func newSide(t *testing.T, e *edgetest.Edge, clk clock.Clock, x executor.Executor) *side {
	w := &side{t: t, logs: &logs{}}
	logger := slog.New(slog.NewTextHandler(w.logs, &slog.HandlerOptions{Level: slog.LevelDebug}))
	sp, err := spool.Open(t.TempDir(), spool.Options{})
	if err != nil {
		t.Fatal(err)
	}
	w.runner, err = runner.New(runner.Config{
		WorkerID: me, Offer: runner.Offer{Slots: 4}, Executors: map[string]executor.Executor{x.Name(): x}, Spool: sp, Clock: clk,
		Usage: func() runner.Usage { return runner.Usage{} }, Logger: logger,
	})
	if err != nil {
		t.Fatal(err)
	}
	w.Session = New(Config{
		URL:   e.Server.URL,
		Token: func() (string, error) { return "the-token", nil },
		NewToken: func(token string) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.tokens = append(w.tokens, token)
		},
		Register: func() workerproto.Register { return workerproto.Register{WorkerID: me, OS: "linux", Slots: 4} },
		Runner:   w.runner, Clock: clk, Logger: logger,
	})
	t.Cleanup(func() {
		kill, cancel := context.WithCancel(context.Background())
		cancel()
		w.runner.Stop(kill)
		if err := sp.Close(); err != nil {
			t.Error(err)
		}
	})
	return w
}

func (w *side) start() {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- w.Run(ctx) }()
	w.stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				w.t.Errorf("Run returned %v", err)
			}
		case <-time.After(patience):
			w.t.Error("Run does not return")
		}
	})
	w.t.Cleanup(w.stop)
}

// began starts a worker with commands that end at once.
func began(t *testing.T, e *edgetest.Edge) *side {
	w := newSide(t, e, clock.NewSystem(), instant{})
	w.start()
	return w
}

func (w *side) until(what string, cond func() bool) {
	w.t.Helper()
	deadline := time.Now().Add(patience)
	for !cond() {
		if time.Now().After(deadline) {
			w.t.Fatalf("%s: not within %v; log:\n%s", what, patience, w.logs)
		}
		time.Sleep(time.Millisecond) // between two looks
	}
}

// instant is an executor whose commands end at once.
type instant struct{}

func (instant) Name() string                  { return job.ExecutorProcess }
func (instant) Probe(context.Context) error   { return nil }
func (instant) Recover(context.Context) error { return nil }
func (instant) Prepare(context.Context, executor.Spec) (executor.Attempt, error) {
	return instant{}, nil
}
func (instant) Start(io.Writer, io.Writer) error { return nil }
func (instant) Stop(executor.StopReason)         {}
func (instant) Close() error                     { return nil }
func (instant) Wait() executor.Exit {
	now, code := time.Now(), 0
	return executor.Exit{Code: &code, StartedAt: now, FinishedAt: now}
}

func TestFirstFrames(t *testing.T) {
	e := edgetest.New(t)
	w := began(t, e)
	if err := w.Ready(); err == nil {
		t.Error("ready before a connection")
	}
	l, reg := e.Hello()
	if reg.WorkerID != me || reg.Protocol != workerproto.Version || reg.Running == nil || len(reg.Running) != 0 {
		t.Errorf("hello is %+v", reg)
	}
	if got := e.Tries(); len(got) != 1 || got[0] != "the-token" {
		t.Errorf("tokens %q", got)
	}
	if err := w.Ready(); err == nil {
		t.Error("ready before the welcome")
	}
	l.Welcome()
	for want := int64(1); want <= 2; want++ {
		var h workerproto.Heartbeat
		l.Decode(l.Next(), workerproto.TypeHeartbeat, &h)
		if h.ID != want || h.WorkerID != me || h.FreeSlots != 4 || h.Status != workerproto.StatusIdle {
			t.Errorf("heartbeat is %+v", h)
		}
	}
	if err := w.Ready(); err != nil {
		t.Error(err)
	}
	w.stop()
	if got := websocket.CloseStatus(l.End()); got != websocket.StatusNormalClosure {
		t.Errorf("a stopping worker closes with %d", got)
	}
	if err := w.Ready(); err == nil {
		t.Error("ready after the end")
	}
}

func TestUnknownFramesAreIgnored(t *testing.T) {
	e := edgetest.New(t)
	w := began(t, e)
	l, _ := e.Hello()
	l.Write([]byte(`{"type":"news","text":"from a later version"}`))
	l.Write([]byte(`{"heartbeatSeconds":1,"leaseSeconds":60,"type":"welcome","protocol":1,"more":{}}`))
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := l.WS.Write(ctx, websocket.MessageBinary, []byte{1, 2, 3}); err != nil {
		t.Fatal(err)
	}
	l.Assign(edgetest.Lease(1))
	l.NextOf(workerproto.TypeResult)
	l.Write([]byte(`not JSON`))
	_ = l.End()
	e.Connected() // it comes back
	w.stop()
}

func TestAssignmentMayOvertakeTheWelcome(t *testing.T) {
	e := edgetest.New(t)
	began(t, e)
	l, _ := e.Hello()
	l.Assign(edgetest.Lease(1))
	l.Welcome()
	var res workerproto.Result
	l.Decode(l.NextOf(workerproto.TypeResult), workerproto.TypeResult, &res)
	if res.Lease != edgetest.Lease(1) || res.Outcome != job.OutcomeSucceeded {
		t.Errorf("result is %+v", res)
	}
}

func TestHelloListsWhatWasNotDelivered(t *testing.T) {
	e := edgetest.New(t)
	w := began(t, e)
	l := e.Connected()
	l.Assign(edgetest.Lease(1), edgetest.Lease(2))
	l.NextOf(workerproto.TypeResult)
	l.NextOf(workerproto.TypeResult)
	l.Cut()
	l, reg := e.Hello()
	if len(reg.Running) != 2 {
		t.Errorf("the hello lists %+v", reg.Running)
	}
	l.Send(workerproto.TypeWelcome, workerproto.Welcome{HeartbeatSeconds: 1, LeaseSeconds: 60, Stale: []workerproto.Lease{edgetest.Lease(1)}})
	var res workerproto.Result
	l.Decode(l.NextOf(workerproto.TypeResult), workerproto.TypeResult, &res)
	if res.Lease == edgetest.Lease(1) { // written before the welcome was read
		l.Decode(l.NextOf(workerproto.TypeResult), workerproto.TypeResult, &res)
	}
	if res.Lease != edgetest.Lease(2) {
		t.Errorf("result of %s", res.JobID)
	}
	l.Send(workerproto.TypeAck, workerproto.Ack{Results: []workerproto.Lease{edgetest.Lease(2)}})
	w.until("everything is delivered or stale", w.runner.Idle)
}

// Only the answer to a heartbeat of this session confirms anything, and from the
// moment at which that heartbeat was sent.
func TestOnlyAnswersConfirm(t *testing.T) {
	e := edgetest.New(t)
	clk := &fakeClock{now: time.Hour}
	w := newSide(t, e, clk, instant{})
	w.start()
	l := e.Connected()
	var h workerproto.Heartbeat
	l.Decode(l.NextOf(workerproto.TypeHeartbeat), workerproto.TypeHeartbeat, &h)
	clk.pass(46 * time.Second)
	verdict := func(n int) workerproto.Type {
		t.Helper()
		l.Assign(edgetest.Lease(n))
		return l.NextOf(workerproto.TypeResult, workerproto.TypeRejected).Kind
	}
	l.Send(workerproto.TypeBeat, workerproto.Beat{ID: h.ID + 1000})
	l.Send(workerproto.TypeBeat, workerproto.Beat{})
	l.Send(workerproto.TypeBeat, workerproto.Beat{ID: h.ID}) // sent 46 s ago
	l.Send(workerproto.TypeBeat, workerproto.Beat{ID: h.ID}) // twice
	if got := verdict(1); got != workerproto.TypeRejected {
		t.Errorf("an assignment under a lease that is too old is answered by %s", got)
	}
	l.Decode(l.NextOf(workerproto.TypeHeartbeat), workerproto.TypeHeartbeat, &h)
	l.Decode(l.NextOf(workerproto.TypeHeartbeat), workerproto.TypeHeartbeat, &h) // surely sent after the clock moved
	l.Send(workerproto.TypeBeat, workerproto.Beat{ID: h.ID})
	if got := verdict(2); got != workerproto.TypeResult {
		t.Errorf("after a confirmed heartbeat an assignment is answered by %s", got)
	}
}

func TestDrainCancelStaleAndToken(t *testing.T) {
	e := edgetest.New(t)
	x, err := process.New(process.Options{DataDir: t.TempDir(), WorkerID: me})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = x.Close() })
	w := newSide(t, e, clock.NewSystem(), x)
	w.start()
	l := e.Connected()
	run := func(n int) {
		t.Helper()
		l.Send(workerproto.TypeAssign, workerproto.Assign{Assignments: []workerproto.Assignment{{Lease: edgetest.Lease(n), Job: edgetest.Shell("exec sleep 600")}}})
		var p workerproto.Progress
		for f := l.NextOf(workerproto.TypeStarted); ; f = l.NextOf(workerproto.TypeStarted) {
			l.Decode(f, workerproto.TypeStarted, &p)
			if p.Lease == edgetest.Lease(n) {
				return
			}
		}
	}
	run(1)
	run(2)
	l.Send(workerproto.TypeCancel, workerproto.Cancel{Lease: edgetest.Lease(1)})
	l.Send(workerproto.TypeStale, workerproto.Stale{Leases: []workerproto.Lease{edgetest.Lease(2)}})
	var res workerproto.Result
	l.Decode(l.NextOf(workerproto.TypeResult), workerproto.TypeResult, &res)
	if res.Lease != edgetest.Lease(1) || res.Outcome != job.OutcomeCanceled || res.Signal != "SIGTERM" || res.Stop == nil || res.Stop.GoneAt.IsZero() {
		t.Errorf("result is %+v, stop %+v", res, res.Stop)
	}
	l.Send(workerproto.TypeAck, workerproto.Ack{Results: []workerproto.Lease{edgetest.Lease(1)}})
	w.until("the stale one is gone", w.runner.Idle)

	l.Send(workerproto.TypeDrain, workerproto.Drain{Drain: true})
	l.Assign(edgetest.Lease(3))
	var no workerproto.Rejected
	l.Decode(l.NextOf(workerproto.TypeRejected), workerproto.TypeRejected, &no)
	if no.Lease != edgetest.Lease(3) || no.Reason != "draining" {
		t.Errorf("rejected %+v", no)
	}
	l.Send(workerproto.TypeToken, workerproto.Token{Token: "newer"})
	l.Send(workerproto.TypeBeat, workerproto.Beat{Token: "newest", Drain: true})
	w.until("tokens are taken", func() bool { return fmt.Sprint(w.renewed()) == "[newer newest]" })
}

func TestWrongTokenIsToldAndTriedAgain(t *testing.T) {
	e := edgetest.New(t)
	e.Set(http.StatusUnauthorized, "")
	w := began(t, e)
	w.until("a second try", func() bool { return len(e.Tries()) >= 2 })
	if err := w.Ready(); !errors.Is(err, ErrToken) {
		t.Errorf("Ready says %v", err)
	}
	if got := w.logs.String(); !strings.Contains(got, "level=ERROR") || strings.Count(got, "does not accept this worker's token") != 1 || strings.Contains(got, "the-token") {
		t.Errorf("log is\n%s", got)
	}
	e.Set(0, workerproto.Subprotocol)
	e.Connected()
	w.until("ready", func() bool { return w.Ready() == nil })
}

// ending is how one session ends when the edge does f after the welcome.
func ending(t *testing.T, f func(*edgetest.Link)) error {
	t.Helper()
	e := edgetest.New(t)
	w := newSide(t, e, clock.NewSystem(), instant{})
	t.Cleanup(w.socket.CloseIdleConnections)
	got := make(chan error, 1)
	go func() {
		_, err := w.once(context.Background(), nil)
		got <- err
	}()
	f(e.Connected())
	select {
	case err := <-got:
		return err
	case <-time.After(patience):
		t.Fatal("the session does not end")
		return nil
	}
}

func TestHowSessionsEnd(t *testing.T) {
	closing := func(code int, reason string) func(*edgetest.Link) {
		return func(l *edgetest.Link) { _ = l.WS.Close(websocket.StatusCode(code), reason) }
	}
	away := func(t *testing.T, err error) *goaway {
		t.Helper()
		g, ok := errors.AsType[*goaway](err)
		if !ok {
			t.Fatalf("ended with %v", err)
		}
		return g
	}
	t.Run("replaced", func(t *testing.T) {
		for _, word := range []bool{false, true} { // the edge says goaway before
			g := away(t, ending(t, func(l *edgetest.Link) {
				if word {
					l.Send(workerproto.TypeGoaway, workerproto.Goaway{Reason: "replaced"})
				}
				closing(workerproto.CloseReplaced, "replaced")(l)
			}))
			if !g.replaced || g.after < 10*time.Second {
				t.Errorf("comes back after %v, replaced %v: two workers would fight for the id", g.after, g.replaced)
			}
		}
	})
	t.Run("goaway", func(t *testing.T) {
		acked := edgetest.Lease(1)
		e := edgetest.New(t)
		w := began(t, e)
		l := e.Connected()
		l.Assign(acked)
		l.NextOf(workerproto.TypeResult)
		l.Send(workerproto.TypeGoaway, workerproto.Goaway{RetryAfterMs: 300, Reason: "the edge stops"})
		l.Send(workerproto.TypeAck, workerproto.Ack{Results: []workerproto.Lease{acked}}) // still taken
		said := time.Now()
		closing(1001, "")(l)
		_, reg := e.Hello()
		if d := time.Since(said); d < 250*time.Millisecond {
			t.Errorf("came back after %v", d)
		}
		if len(reg.Running) != 0 {
			t.Error("an acknowledgement behind the goaway was not read")
		}
		w.stop()
	})
	t.Run("goaway without a close", func(t *testing.T) {
		g := away(t, ending(t, func(l *edgetest.Link) {
			l.Send(workerproto.TypeGoaway, workerproto.Goaway{RetryAfterMs: 1 << 40, Reason: "for ever"})
		}))
		if g.after != maxAway {
			t.Errorf("comes back after %v", g.after)
		}
	})
	t.Run("overload", func(t *testing.T) {
		for _, code := range []int{workerproto.CloseSlowDown, workerproto.CloseOverloaded} {
			if g := away(t, ending(t, closing(code, "too much"))); g.after < time.Second || g.after > 5*time.Second {
				t.Errorf("%d: comes back after %v", code, g.after)
			}
		}
	})
	t.Run("token", func(t *testing.T) {
		if err := ending(t, closing(workerproto.CloseToken, "")); !errors.Is(err, ErrToken) {
			t.Errorf("ended with %v", err)
		}
	})
	t.Run("protocol", func(t *testing.T) {
		if err := ending(t, closing(workerproto.CloseProtocol, "update it")); !strings.Contains(err.Error(), "update it") {
			t.Errorf("ended with %v", err)
		}
	})
	t.Run("cut", func(t *testing.T) {
		if err := ending(t, (*edgetest.Link).Cut); err == nil {
			t.Error("ended without an error")
		}
	})
	t.Run("frame too large", func(t *testing.T) {
		err := ending(t, func(l *edgetest.Link) { l.Write(make([]byte, 2*workerproto.MaxFrameBytes)) })
		if err == nil {
			t.Error("a frame without a bound was read")
		}
	})
	t.Run("another subprotocol", func(t *testing.T) {
		e := edgetest.New(t)
		e.Set(0, "cmdexec.v0")
		w := began(t, e)
		w.until("the reason", func() bool {
			err := w.Ready()
			return err != nil && strings.Contains(err.Error(), workerproto.Subprotocol)
		})
	})
}

// A worker that stops does not wait for an edge that is not there any more.
func TestStopDoesNotHang(t *testing.T) {
	for name, reach := range map[string]func(t *testing.T, e *edgetest.Edge) *side{
		"before the welcome": func(t *testing.T, e *edgetest.Edge) *side {
			w := began(t, e)
			e.Hello()
			return w
		},
		"edge does not read": func(t *testing.T, e *edgetest.Edge) *side {
			w := began(t, e)
			e.Accept().Welcome()
			w.until("connected", func() bool { return w.Ready() == nil })
			return w
		},
		"nobody listens": func(t *testing.T, e *edgetest.Edge) *side {
			e.Server.Close()
			w := began(t, e)
			w.until("a failed try", func() bool { return strings.Contains(w.logs.String(), "not connected") })
			return w
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := reach(t, edgetest.New(t))
			began := time.Now()
			w.stop()
			if d := time.Since(began); d > closeWait+5*time.Second {
				t.Errorf("stopping took %v", d)
			}
		})
	}
}

// The connection breaks several times in the middle of a long output, without
// anything being acknowledged at some of them. Every byte arrives, in order.
func TestOutputSurvivesBrokenConnections(t *testing.T) {
	const lines = 150_000
	e := edgetest.New(t)
	x, err := process.New(process.Options{DataDir: t.TempDir(), WorkerID: me})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = x.Close() })
	w := newSide(t, e, clock.NewSystem(), x)
	w.start()
	var want bytes.Buffer
	for i := 1; i <= lines; i++ {
		fmt.Fprintf(&want, "%d\n", i)
	}
	l := e.Connected()
	l.Send(workerproto.TypeAssign, workerproto.Assign{Assignments: []workerproto.Assignment{{
		Lease: edgetest.Lease(1), LeaseSeconds: 60, Job: edgetest.Shell(fmt.Sprintf("seq 1 %d", lines)),
	}}})
	var (
		got    []workerproto.Chunk
		result workerproto.Result
		breaks = 0
		inConn = 0
	)
	take := func(c workerproto.Chunk) {
		t.Helper()
		if c.Seq > int64(len(got))+1 {
			t.Fatalf("chunk %d came after %d", c.Seq, len(got))
		}
		if c.Seq == int64(len(got))+1 {
			got = append(got, c)
		}
	}
	for result.Outcome == "" {
		f := l.NextOf(workerproto.TypeOutput, workerproto.TypeResult)
		if f.Kind == workerproto.TypeResult {
			l.Decode(f, workerproto.TypeResult, &result)
			break
		}
		take(f.Chunk)
		inConn++
		if inConn == 5 && breaks < 4 {
			breaks++
			inConn = 0
			l.Cut()
			var reg workerproto.Register
			l, reg = e.Hello()
			if len(reg.Running) != 1 || reg.Running[0].Lease != edgetest.Lease(1) || reg.Running[0].LastSeq < int64(len(got)) {
				t.Fatalf("the hello lists %+v", reg.Running)
			}
			l.Welcome()
			continue
		}
		if breaks%2 == 0 {
			l.Send(workerproto.TypeAck, workerproto.Ack{JobID: edgetest.Lease(1).JobID, Attempt: 1, AckedSeq: int64(len(got))})
		} else if breaks == 3 && inConn == 4 {
			l.Send(workerproto.TypeAck, workerproto.Ack{JobID: edgetest.Lease(1).JobID, Attempt: 1, AckedSeq: int64(len(got)) - 1})
		}
	}
	for _, c := range result.Tail {
		take(c)
	}
	if breaks != 4 {
		t.Errorf("the connection broke %d times", breaks)
	}
	sum := sha256.New()
	var all bytes.Buffer
	for _, c := range got {
		sum.Write(c.Data)
		all.Write(c.Data)
	}
	if !bytes.Equal(all.Bytes(), want.Bytes()) {
		t.Errorf("%d bytes arrived, want %d, or not the same", all.Len(), want.Len())
	}
	m := result.Manifest
	if m.Chunks != int64(len(got)) || m.Bytes != int64(all.Len()) || m.SHA256 != hex.EncodeToString(sum.Sum(nil)) || m.TruncatedBytes != 0 {
		t.Errorf("manifest is %+v", m)
	}
	l.Send(workerproto.TypeAck, workerproto.Ack{Results: []workerproto.Lease{edgetest.Lease(1)}})
	w.until("delivered", w.runner.Idle)
}

// While a runner has more to send than the line takes, heartbeats go on.
func TestOutputDoesNotHoldUpHeartbeats(t *testing.T) {
	e := edgetest.New(t)
	x, err := process.New(process.Options{DataDir: t.TempDir(), WorkerID: me})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = x.Close() })
	w := newSide(t, e, clock.NewSystem(), x)
	w.start()
	l := e.Connected()
	l.NextOf(workerproto.TypeHeartbeat) // the first one
	for n := range 4 {
		l.Send(workerproto.TypeAssign, workerproto.Assign{Assignments: []workerproto.Assignment{{
			Lease: edgetest.Lease(n), LeaseSeconds: 60, Job: edgetest.Shell("exec cat /dev/zero"),
		}}})
	}
	last := map[workerproto.Lease]int64{}
	for beats := 0; beats < 3; {
		f := l.NextOf(workerproto.TypeOutput, workerproto.TypeHeartbeat)
		if f.Kind == workerproto.TypeHeartbeat {
			beats++
			continue
		}
		last[f.Lease] = f.Chunk.Seq
		l.Send(workerproto.TypeAck, workerproto.Ack{JobID: f.Lease.JobID, Attempt: 1, AckedSeq: f.Chunk.Seq})
	}
	if len(last) != 4 {
		t.Errorf("output of %d attempts came, want all 4 in turns", len(last))
	}
}
