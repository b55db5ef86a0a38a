package socket_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/fleet"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
	"github.com/cmdexec/cmdexec/libs/kit/ratelimit"
	"github.com/cmdexec/cmdexec/services/worker-edge/internal/session"
	"github.com/cmdexec/cmdexec/services/worker-edge/internal/socket"
	"github.com/cmdexec/cmdexec/services/worker-edge/internal/workertest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type harness struct {
	t    *testing.T
	bus  *memBus
	url  string
	stop func() error // ends the hub; run by cleanup too
}

type tuning struct {
	hub    session.Options
	socket socket.Options
}

func start(t *testing.T, b *memBus, tune ...func(*tuning)) *harness {
	t.Helper()
	logger := slog.New(slog.DiscardHandler)
	o := tuning{
		hub: session.Options{
			Bus: b, EdgeID: "edge-" + strings.ToLower(t.Name()), Lease: 60 * time.Second, Heartbeat: 5 * time.Second, Secret: []byte(workertest.Secret),
			MaxInflightBytes: 64 << 20, Logger: logger, Metrics: session.NewMetrics(nil),
		},
		socket: socket.Options{
			Verifier: auth.NewWorkerVerifier([]byte(workertest.Secret)), MaxSessions: 100, MaxPendingPerIP: 20,
			Limiter: ratelimit.NewLocal(0), HelloTimeout: workerproto.HelloTimeout, PingInterval: workerproto.PingInterval,
			PongTimeout: workerproto.PongTimeout, WriteTimeout: 10 * time.Second, CloseTimeout: time.Second, Logger: logger,
		},
	}
	for _, f := range tune {
		f(&o)
	}
	hub := session.NewHub(o.hub)
	o.socket.Hub = hub
	h := socket.New(o.socket)
	server := httptest.NewServer(h)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- hub.Run(ctx) }()
	require.Eventually(t, hub.Open, workertest.Wait, time.Millisecond)
	stop := sync.OnceValue(func() error {
		cancel()
		err := <-ended
		drain, done := context.WithTimeout(context.Background(), workertest.Wait)
		defer done()
		h.Drain(drain)
		return errors.Join(err, drain.Err())
	})
	t.Cleanup(func() {
		require.NoError(t, stop())
		server.Close()
	})
	return &harness{t: t, bus: b, url: server.URL, stop: stop}
}

// open connects a worker up to its welcome.
func (h *harness) open(workerID string, running ...workerproto.Lease) *workertest.Client {
	h.t.Helper()
	c := workertest.Dial(h.t, h.url, workerID)
	c.Send(workerproto.TypeHello, workertest.Hello(workerID, running...))
	c.NextOf(workerproto.TypeWelcome)
	return c
}

// assign gives a worker a fresh lease.
func (h *harness) assign(workerID string) workerproto.Lease {
	h.t.Helper()
	l := workertest.Lease()
	reply, ok := h.bus.command(workerID, busmsg.WorkerCommand{Assign: []workerproto.Assignment{assignment(l)}})
	require.True(h.t, ok)
	require.True(h.t, reply.Assign[0].Delivered)
	return l
}

func assignment(l workerproto.Lease) workerproto.Assignment {
	spec, errs := job.Normalise(job.Spec{Command: job.Command{Shell: "true"}})
	if len(errs) > 0 {
		panic(errs)
	}
	return workerproto.Assignment{Lease: l, LeaseSeconds: 60, Job: spec}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	require.Eventually(t, ok, workertest.Wait, 2*time.Millisecond, what)
}

func TestHelloAndWelcome(t *testing.T) {
	b := newMemBus()
	gone, kept := workertest.Lease(), workertest.Lease()
	b.scheduler = func(r busmsg.BeatRequest) (busmsg.BeatReply, error) {
		reply, _ := confirmAll(r)
		for i := range reply.Workers {
			if r.Workers[i].Hello != nil {
				reply.Workers[i].Stale = []workerproto.Lease{gone}
				reply.Workers[i].Cancel = []workerproto.Lease{kept}
				reply.Workers[i].Drain = true
			}
		}
		return reply, nil
	}
	h := start(t, b)
	c := workertest.Dial(t, h.url, "worker-a")
	c.Send(workerproto.TypeHello, workertest.Hello("worker-a", gone, kept))
	w := workertest.Decode[workerproto.Welcome](t, c.NextOf(workerproto.TypeWelcome))
	require.Equal(t, 5, w.HeartbeatSeconds)
	require.Equal(t, 60, w.LeaseSeconds)
	require.Equal(t, workerproto.Version, w.Protocol)
	require.Equal(t, []workerproto.Lease{gone}, w.Stale)
	require.Equal(t, kept, workertest.Decode[workerproto.Cancel](t, c.NextOf(workerproto.TypeCancel)).Lease)
	require.True(t, workertest.Decode[workerproto.Drain](t, c.NextOf(workerproto.TypeDrain)).Drain)

	stored := b.worker("worker-a")
	require.True(t, stored.Online)
	require.Equal(t, "websocket", stored.Transport)
	require.Equal(t, 4, stored.Slots)
	beat := b.beats[0].Workers[0]
	require.Equal(t, stored.SessionID, beat.SessionID)
	require.Equal(t, []workerproto.Lease{gone, kept}, beat.Holding)

	c.Close()
	eventually(t, "worker offline", func() bool { return !b.worker("worker-a").Online })
	require.Zero(t, b.serving("worker-a"))
	eventually(t, "closed reported", func() bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		last := b.beats[len(b.beats)-1].Workers[0]
		return last.Closed && last.SessionID == stored.SessionID
	})
}

func TestTokens(t *testing.T) {
	h := start(t, newMemBus())
	user, err := auth.MintUser([]byte(workertest.Secret), "worker-a", auth.RoleAdmin, time.Hour, time.Now())
	require.NoError(t, err)
	forged, err := auth.MintWorker([]byte("another secret of thirty-two bytes"), "worker-a", time.Hour, time.Now())
	require.NoError(t, err)
	expired, err := auth.MintWorker([]byte(workertest.Secret), "worker-a", time.Minute, time.Now().Add(-time.Hour))
	require.NoError(t, err)
	badID, err := auth.MintWorker([]byte(workertest.Secret), "worker.*", time.Hour, time.Now())
	require.NoError(t, err)
	good := workertest.Token(t, "worker-a", time.Hour)

	bodies := map[string]bool{}
	for name, header := range map[string]http.Header{
		"none":      {},
		"empty":     {workerproto.TokenHeader: {""}},
		"two":       {workerproto.TokenHeader: {good, good}},
		"user":      {workerproto.TokenHeader: {user}},
		"forged":    {workerproto.TokenHeader: {forged}},
		"expired":   {workerproto.TokenHeader: {expired}},
		"bad id":    {workerproto.TokenHeader: {badID}},
		"truncated": {workerproto.TokenHeader: {good[:len(good)-2]}},
		"long":      {workerproto.TokenHeader: {strings.Repeat("a", 9000)}},
		"bearer":    {"Authorization": {"Bearer " + good}},
	} {
		t.Run(name, func(t *testing.T) {
			_, resp, err := workertest.Try(t, h.url, header)
			require.Error(t, err)
			require.Equal(t, http.StatusUnauthorized, resp.StatusCode)
			require.Equal(t, "application/problem+json", resp.Header.Get("Content-Type"))
			body := new(bytes.Buffer)
			_, err = body.ReadFrom(resp.Body)
			require.NoError(t, err)
			require.Contains(t, body.String(), `"code":"unauthorized"`)
			bodies[body.String()] = true
		})
	}
	require.Len(t, bodies, 1, "all refusals look the same")
}

func TestRefusedBeforeUpgrade(t *testing.T) {
	h := start(t, newMemBus(), func(o *tuning) { o.socket.MaxSessions = 1 })
	do := func(method string, header http.Header) *http.Response {
		req, err := http.NewRequestWithContext(t.Context(), method, h.url+"/api/workers/connect", nil)
		require.NoError(t, err)
		req.Header = header
		resp, err := http.DefaultTransport.RoundTrip(req)
		require.NoError(t, err)
		t.Cleanup(func() { _ = resp.Body.Close() })
		return resp
	}
	token := http.Header{"X-Worker-Token": {workertest.Token(t, "worker-a", time.Hour)}}
	require.Equal(t, http.StatusMethodNotAllowed, do(http.MethodPost, token).StatusCode)
	require.Equal(t, http.StatusUpgradeRequired, do(http.MethodGet, token).StatusCode)
	upgrade := token.Clone()
	upgrade.Set("Connection", "Upgrade")
	upgrade.Set("Upgrade", "websocket")
	upgrade.Set("Sec-Websocket-Protocol", "cmdexec.v0, other")
	require.Equal(t, http.StatusBadRequest, do(http.MethodGet, upgrade).StatusCode)

	h.open("worker-a")
	_, resp, err := workertest.Try(t, h.url, http.Header{workerproto.TokenHeader: {workertest.Token(t, "worker-b", time.Hour)}})
	require.Error(t, err)
	require.Equal(t, http.StatusServiceUnavailable, resp.StatusCode)
	require.NotEmpty(t, resp.Header.Get("Retry-After"))
	http.DefaultTransport.(*http.Transport).CloseIdleConnections()
}

func TestPendingPerAddress(t *testing.T) {
	h := start(t, newMemBus(), func(o *tuning) { o.socket.MaxPendingPerIP = 2 })
	first := workertest.Dial(t, h.url, "worker-a")
	workertest.Dial(t, h.url, "worker-b")
	_, resp, err := workertest.Try(t, h.url, http.Header{workerproto.TokenHeader: {workertest.Token(t, "worker-c", time.Hour)}})
	require.Error(t, err)
	require.Equal(t, http.StatusTooManyRequests, resp.StatusCode)
	first.Send(workerproto.TypeHello, workertest.Hello("worker-a"))
	first.NextOf(workerproto.TypeWelcome)
	h.open("worker-c") // the first no longer counts
}

func TestRateLimits(t *testing.T) {
	h := start(t, newMemBus(), func(o *tuning) { o.socket.RateWorker = ratelimit.Rate{Count: 5, Per: time.Minute} })
	c := h.open("worker-a") // one connect
	for range 5 {
		c.Send(workerproto.TypeHeartbeat, workerproto.Heartbeat{Status: workerproto.StatusIdle})
	}
	code, _ := c.Ended()
	require.Equal(t, workerproto.CloseSlowDown, code)
	_, resp, err := workertest.Try(t, h.url, http.Header{workerproto.TokenHeader: {workertest.Token(t, "worker-a", time.Hour)}})
	require.Error(t, err)
	require.Equal(t, http.StatusTooManyRequests, resp.StatusCode)
	require.NotEmpty(t, resp.Header.Get("Retry-After"))
}

func TestBadHello(t *testing.T) {
	h := start(t, newMemBus(), func(o *tuning) { o.socket.HelloTimeout = 300 * time.Millisecond })
	edit := func(f func(*workerproto.Register)) string {
		r := workertest.Hello("worker-a")
		f(&r)
		data, err := workerproto.Encode(workerproto.TypeHello, r)
		require.NoError(t, err)
		return string(data)
	}
	for name, tc := range map[string]struct {
		text   string
		code   int
		reason string
	}{
		"late":           {"", workerproto.CloseProtocol, "in time"},
		"not first":      {`{"type":"heartbeat","status":"idle"}`, workerproto.CloseProtocol, "hello must come first"},
		"not JSON":       {`hello`, workerproto.CloseProtocol, "malformed"},
		"another worker": {edit(func(r *workerproto.Register) { r.WorkerID = "worker-b" }), workerproto.CloseToken, "token"},
		"old protocol":   {edit(func(r *workerproto.Register) { r.Protocol = workerproto.MinVersion - 1 }), workerproto.CloseProtocol, "protocol"},
		"new protocol":   {edit(func(r *workerproto.Register) { r.Protocol = workerproto.Version + 1 }), workerproto.CloseProtocol, "protocol"},
		"too many slots": {edit(func(r *workerproto.Register) { r.Slots = 1_000_000_000 }), workerproto.CloseProtocol, "slots"},
		"no slots":       {edit(func(r *workerproto.Register) { r.Slots = -1 }), workerproto.CloseProtocol, "slots"},
		"bad lease": {edit(func(r *workerproto.Register) {
			r.Running = []workerproto.RunningLease{{Lease: workerproto.Lease{JobID: "job.*"}}}
		}), workerproto.CloseProtocol, "lease"},
		"wrong type":      {`{"type":"hello","slots":"many"}`, workerproto.CloseProtocol, "wrong type"},
		"invalid os name": {edit(func(r *workerproto.Register) { r.OS = "Linux >" }), workerproto.CloseProtocol, "os"},
	} {
		t.Run(name, func(t *testing.T) {
			c := workertest.Dial(t, h.url, "worker-a")
			if tc.text != "" {
				c.Text(tc.text)
			}
			code, reason := c.Ended()
			require.Equal(t, tc.code, code)
			require.Contains(t, reason, tc.reason)
		})
	}
	require.Empty(t, h.bus.worker("worker-a").ID, "nothing was registered")
}

func TestHelloTwice(t *testing.T) {
	h := start(t, newMemBus())
	c := h.open("worker-a")
	c.Send(workerproto.TypeHello, workertest.Hello("worker-a"))
	code, reason := c.Ended()
	require.Equal(t, workerproto.CloseProtocol, code)
	require.Contains(t, reason, "once")
}

// A worker that comes before the scheduler waits, and so does what it says.
func TestNobodyLeads(t *testing.T) {
	b := newMemBus()
	b.scheduler = nil
	h := start(t, b)
	c := workertest.Dial(t, h.url, "worker-a")
	c.Send(workerproto.TypeHello, workertest.Hello("worker-a"))
	eventually(t, "commands are taken", func() bool { return b.serving("worker-a") == 1 })
	l := h.assign("worker-a")
	c.Send(workerproto.TypeAccepted, workerproto.Progress{Lease: l, At: time.Now().UTC()})
	c.Send(workerproto.TypeHeartbeat, workerproto.Heartbeat{ID: 1, Status: workerproto.StatusIdle})
	c.Send(workerproto.TypeHeartbeat, workerproto.Heartbeat{ID: 2, Status: workerproto.StatusBusy, Running: []workerproto.PhaseLease{{Lease: l, Phase: workerproto.PhaseAccepted}}})
	c.Send(workerproto.TypeResult, workerproto.Result{Lease: workertest.Lease(), Outcome: job.OutcomeFailed, FinishedAt: time.Now()})
	eventually(t, "results do not wait for a leader", func() bool { b.mu.Lock(); defer b.mu.Unlock(); return len(b.results) == 1 })
	require.Empty(t, c.Types(), "nothing before the welcome")

	b.set(func() { b.scheduler = confirmAll })
	c.NextOf(workerproto.TypeWelcome)
	c.NextOf(workerproto.TypeAssign)
	beat := workertest.Decode[workerproto.Beat](t, c.NextOf(workerproto.TypeBeat))
	require.Equal(t, int64(2), beat.ID, "the newest heartbeat")
	require.Equal(t, []string{l.LeaseID}, beat.Confirmed)
	b.mu.Lock()
	defer b.mu.Unlock()
	var steps []workerproto.Type
	for _, r := range b.beats {
		for _, w := range r.Workers {
			for _, p := range w.Progress {
				steps = append(steps, p.Step)
			}
		}
	}
	require.Equal(t, []workerproto.Type{workerproto.TypeAccepted}, steps)
}

func TestBeats(t *testing.T) {
	b := newMemBus()
	stale, cancel, fine := workertest.Lease(), workertest.Lease(), workertest.Lease()
	h := start(t, b)
	c := h.open("worker-a")
	b.set(func() {
		b.scheduler = func(r busmsg.BeatRequest) (busmsg.BeatReply, error) {
			reply := busmsg.BeatReply{}
			for _, w := range r.Workers {
				reply.Workers = append(reply.Workers, busmsg.WorkerReply{
					WorkerID: w.WorkerID, SessionID: w.SessionID, Confirmed: []string{fine.LeaseID, cancel.LeaseID},
					Stale: []workerproto.Lease{stale}, Cancel: []workerproto.Lease{cancel}, Drain: true,
				})
			}
			return reply, nil
		}
	})
	c.Send(workerproto.TypeHeartbeat, workerproto.Heartbeat{ID: 7, Status: workerproto.StatusBusy})
	beat := workertest.Decode[workerproto.Beat](t, c.NextOf(workerproto.TypeBeat))
	require.Equal(t, int64(7), beat.ID)
	require.Equal(t, []string{fine.LeaseID, cancel.LeaseID}, beat.Confirmed)
	require.Equal(t, []string{stale.LeaseID}, beat.Stale)
	require.Equal(t, []workerproto.Lease{cancel}, beat.Cancel)
	require.True(t, beat.Drain)
	require.Empty(t, beat.Token, "an hour of an hour is left")
}

// What is reported while a beat is under way goes into the next one, together.
func TestBeatsAreGathered(t *testing.T) {
	b := newMemBus()
	h := start(t, b)
	var cs []*workertest.Client
	for i := range 8 {
		cs = append(cs, h.open(fmt.Sprintf("worker-%d", i)))
	}
	leases := make([]workerproto.Lease, len(cs))
	for i := range leases {
		leases[i] = h.assign(fmt.Sprintf("worker-%d", i))
	}
	entered, release := make(chan struct{}), make(chan struct{})
	var inFlight, most atomic.Int32
	first := true
	b.set(func() {
		b.beats = nil
		b.scheduler = func(r busmsg.BeatRequest) (busmsg.BeatReply, error) {
			most.Store(max(most.Load(), inFlight.Add(1)))
			defer inFlight.Add(-1)
			if first { // called by one beater, one at a time
				first = false
				close(entered)
				<-release
			}
			return confirmAll(r)
		}
	})
	cs[0].Send(workerproto.TypeStarted, workerproto.Progress{Lease: leases[0], At: time.Now()})
	<-entered
	for i, c := range cs[1:] {
		c.Send(workerproto.TypeStarted, workerproto.Progress{Lease: leases[i+1], At: time.Now()})
		c.Send(workerproto.TypeHeartbeat, workerproto.Heartbeat{ID: 1, Status: workerproto.StatusBusy})
		c.Write(websocket.MessageText, []byte(`{"type":"from the future"}`))
		c.Text(`{"type":"result"}`) // ends the session: all before it was taken
		c.Ended()
	}
	close(release)
	eventually(t, "all arrived", func() bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		n := 0
		for _, r := range b.beats {
			for _, w := range r.Workers {
				n += len(w.Progress)
			}
		}
		return n == 8
	})
	b.mu.Lock()
	defer b.mu.Unlock()
	require.LessOrEqual(t, len(b.beats), 3)
	require.Equal(t, int32(1), most.Load())
}

func TestTokenRenewal(t *testing.T) {
	h := start(t, newMemBus())
	// Two minutes of which 20 s are left.
	token, err := auth.MintWorker([]byte(workertest.Secret), "worker-a", 2*time.Minute, time.Now().Add(-100*time.Second))
	require.NoError(t, err)
	c, _, err := workertest.Try(t, h.url, http.Header{workerproto.TokenHeader: {token}})
	require.NoError(t, err)
	c.Send(workerproto.TypeHello, workertest.Hello("worker-a"))
	c.NextOf(workerproto.TypeWelcome)
	c.Send(workerproto.TypeHeartbeat, workerproto.Heartbeat{ID: 1, Status: workerproto.StatusIdle})
	beat := workertest.Decode[workerproto.Beat](t, c.NextOf(workerproto.TypeBeat))
	claims, err := auth.NewWorkerVerifier([]byte(workertest.Secret)).Verify(beat.Token, time.Now())
	require.NoError(t, err)
	require.Equal(t, "worker-a", claims.Subject)
	require.InDelta(t, 120, time.Until(claims.ExpiresAt).Seconds(), 5)
	c.Send(workerproto.TypeHeartbeat, workerproto.Heartbeat{ID: 2, Status: workerproto.StatusIdle})
	beat = workertest.Decode[workerproto.Beat](t, c.NextOf(workerproto.TypeBeat))
	require.Empty(t, beat.Token, "one is enough")
}

func TestTokenExpiry(t *testing.T) {
	h := start(t, newMemBus())
	// It ends when the leeway for clocks does, which is in one or two seconds.
	token, err := auth.MintWorker([]byte(workertest.Secret), "worker-a", time.Minute, time.Now().Add(-2*time.Minute+2*time.Second))
	require.NoError(t, err)
	c, _, err := workertest.Try(t, h.url, http.Header{workerproto.TokenHeader: {token}})
	require.NoError(t, err)
	c.Send(workerproto.TypeHello, workertest.Hello("worker-a"))
	code, reason := c.Ended()
	require.Equal(t, workerproto.CloseToken, code)
	require.Contains(t, reason, "expired")
}

func TestCommands(t *testing.T) {
	b := newMemBus()
	h := start(t, b)
	c := h.open("worker-a")
	a1, a2 := assignment(workertest.Lease()), assignment(workertest.Lease())
	drain := true
	cancel := workertest.Lease()
	reply, ok := b.command("worker-a", busmsg.WorkerCommand{Assign: []workerproto.Assignment{a1, a2}, Cancel: []workerproto.Lease{cancel}, Drain: &drain})
	require.True(t, ok)
	require.Equal(t, b.worker("worker-a").SessionID, reply.SessionID)
	require.Equal(t, []busmsg.Delivery{{LeaseID: a1.LeaseID, Delivered: true}, {LeaseID: a2.LeaseID, Delivered: true}}, reply.Assign)
	got := workertest.Decode[workerproto.Assign](t, c.NextOf(workerproto.TypeAssign))
	require.Equal(t, []workerproto.Assignment{a1, a2}, got.Assignments)
	require.Equal(t, cancel, workertest.Decode[workerproto.Cancel](t, c.NextOf(workerproto.TypeCancel)).Lease)
	require.True(t, workertest.Decode[workerproto.Drain](t, c.NextOf(workerproto.TypeDrain)).Drain)

	// Together larger than a frame: several frames. One that is larger alone is refused.
	var many []workerproto.Assignment
	for range 5 {
		a := assignment(workertest.Lease())
		a.Job.Stdin = strings.Repeat("x", 400<<10)
		many = append(many, a)
	}
	huge := assignment(workertest.Lease())
	huge.Job.Stdin = strings.Repeat("x", workerproto.MaxFrameBytes)
	reply, _ = b.command("worker-a", busmsg.WorkerCommand{Assign: append(many, huge)})
	n := 0
	for n < 5 {
		n += len(workertest.Decode[workerproto.Assign](t, c.NextOf(workerproto.TypeAssign)).Assignments)
	}
	require.Equal(t, 5, n)
	require.False(t, reply.Assign[5].Delivered)

	c.Cut()
	eventually(t, "nobody takes commands", func() bool { return b.serving("worker-a") == 0 })
}

func TestOutputIsAckedWhenStored(t *testing.T) {
	b := newMemBus()
	gate := make(chan struct{})
	b.onChunks = func(_ string, frames [][]byte) (int, error) {
		<-gate
		return len(frames), nil
	}
	h := start(t, b)
	c := h.open("worker-a")
	l := h.assign("worker-a")
	c.Chunk(l, workertest.Chunk(1, 0, []byte("one")))
	c.Send(workerproto.TypeOutput, workerproto.Output{Lease: l, Chunks: []workerproto.Chunk{workertest.Chunk(2, 3, []byte("two")), workertest.Chunk(3, 6, []byte("three"))}})
	c.Send(workerproto.TypeHeartbeat, workerproto.Heartbeat{ID: 1, Status: workerproto.StatusBusy})
	c.NextOf(workerproto.TypeBeat)
	require.NotContains(t, c.Types(), workerproto.TypeAck)
	close(gate)
	acked := int64(0)
	for acked < 3 {
		ack := workertest.Decode[workerproto.Ack](t, c.NextOf(workerproto.TypeAck))
		require.Equal(t, l.JobID, ack.JobID)
		require.Equal(t, 1, ack.Attempt)
		require.Greater(t, ack.AckedSeq, acked)
		acked = ack.AckedSeq
	}
	require.Equal(t, int64(3), acked)
	var text string
	for i, f := range b.stored(l.JobID) {
		got, chunk, err := workerproto.DecodeChunk(f)
		require.NoError(t, err)
		require.Equal(t, l, got)
		require.Equal(t, int64(i+1), chunk.Seq)
		text += string(chunk.Data)
	}
	require.Equal(t, "onetwothree", text)

	// A repeat is acknowledged again and not stored again.
	c.Chunk(l, workertest.Chunk(2, 3, []byte("two")))
	require.Equal(t, int64(3), workertest.Decode[workerproto.Ack](t, c.NextOf(workerproto.TypeAck)).AckedSeq)
	require.Len(t, b.stored(l.JobID), 3)
}

func TestOutputUnderAnotherLease(t *testing.T) {
	b := newMemBus()
	h := start(t, b)
	c := h.open("worker-a")
	own := h.assign("worker-a")
	foreign := workertest.Lease()
	mixed := own
	mixed.JobID = foreign.JobID
	later := own
	later.Attempt = 2
	for _, l := range []workerproto.Lease{foreign, mixed, later} {
		c.Chunk(l, workertest.Chunk(1, 0, []byte("x")))
		require.Equal(t, []workerproto.Lease{l}, workertest.Decode[workerproto.Stale](t, c.NextOf(workerproto.TypeStale)).Leases)
	}
	require.Empty(t, b.stored(foreign.JobID))
	require.Empty(t, b.stored(own.JobID))
}

// Leases that a hello claims are believed when the leader confirms them.
func TestClaimedLeases(t *testing.T) {
	b := newMemBus()
	confirmed, undecided, stale := workertest.Lease(), workertest.Lease(), workertest.Lease()
	b.scheduler = func(r busmsg.BeatRequest) (busmsg.BeatReply, error) {
		reply := busmsg.BeatReply{}
		for _, w := range r.Workers {
			reply.Workers = append(reply.Workers, busmsg.WorkerReply{
				WorkerID: w.WorkerID, SessionID: w.SessionID, Confirmed: []string{confirmed.LeaseID}, Stale: []workerproto.Lease{stale},
			})
		}
		return reply, nil
	}
	h := start(t, b)
	c := h.open("worker-a", confirmed, undecided, stale)
	c.Chunk(stale, workertest.Chunk(4, 0, []byte("x")))
	require.Equal(t, []workerproto.Lease{stale}, workertest.Decode[workerproto.Stale](t, c.NextOf(workerproto.TypeStale)).Leases)
	c.Chunk(undecided, workertest.Chunk(9, 0, []byte("x")))
	c.Chunk(confirmed, workertest.Chunk(5, 0, []byte("x"))) // whatever it goes on with
	ack := workertest.Decode[workerproto.Ack](t, c.NextOf(workerproto.TypeAck))
	require.Equal(t, confirmed.JobID, ack.JobID)
	require.Equal(t, int64(5), ack.AckedSeq)
	require.Empty(t, b.stored(undecided.JobID))

	b.set(func() { b.scheduler = confirmAll })
	c.Send(workerproto.TypeHeartbeat, workerproto.Heartbeat{ID: 1, Status: workerproto.StatusBusy, Running: []workerproto.PhaseLease{{Lease: undecided, Phase: workerproto.PhaseStarted}}})
	ack = workertest.Decode[workerproto.Ack](t, c.NextOf(workerproto.TypeAck))
	require.Equal(t, undecided.JobID, ack.JobID)
	require.Len(t, b.stored(undecided.JobID), 1)
}

func TestOutputIsTriedAgain(t *testing.T) {
	b := newMemBus()
	var calls atomic.Int32
	b.onChunks = func(_ string, frames [][]byte) (int, error) {
		switch calls.Add(1) {
		case 1:
			return 0, errAway
		case 2:
			return 1, errors.New("full")
		}
		return len(frames), nil
	}
	h := start(t, b)
	c := h.open("worker-a")
	l := h.assign("worker-a")
	c.Send(workerproto.TypeOutput, workerproto.Output{Lease: l, Chunks: []workerproto.Chunk{
		workertest.Chunk(1, 0, []byte("a")), workertest.Chunk(2, 1, []byte("b")), workertest.Chunk(3, 2, []byte("c")),
	}})
	for workertest.Decode[workerproto.Ack](t, c.NextOf(workerproto.TypeAck)).AckedSeq < 3 {
	}
	require.Len(t, b.stored(l.JobID), 3, "in order, none left out, none twice")
	for i, f := range b.stored(l.JobID) {
		_, chunk, err := workerproto.DecodeChunk(f)
		require.NoError(t, err)
		require.Equal(t, int64(i+1), chunk.Seq)
	}
}

func TestSlowJobKeepsUpNoOther(t *testing.T) {
	b := newMemBus()
	h := start(t, b)
	c := h.open("worker-a")
	slow, fast := h.assign("worker-a"), h.assign("worker-a")
	gate := make(chan struct{})
	b.set(func() {
		b.onChunks = func(jobID string, frames [][]byte) (int, error) {
			if jobID == slow.JobID {
				<-gate
			}
			return len(frames), nil
		}
	})
	c.Chunk(slow, workertest.Chunk(1, 0, []byte("x")))
	c.Chunk(fast, workertest.Chunk(1, 0, []byte("x")))
	require.Equal(t, fast.JobID, workertest.Decode[workerproto.Ack](t, c.NextOf(workerproto.TypeAck)).JobID)
	close(gate)
	require.Equal(t, slow.JobID, workertest.Decode[workerproto.Ack](t, c.NextOf(workerproto.TypeAck)).JobID)
}

func TestBadOutput(t *testing.T) {
	h := start(t, newMemBus())
	big := make([]byte, workerproto.MaxChunkBytes)
	for name, tc := range map[string]struct {
		chunks []workerproto.Chunk
		reason string
	}{
		"gap":        {[]workerproto.Chunk{workertest.Chunk(1, 0, []byte("x")), workertest.Chunk(3, 1, []byte("x"))}, "left out"},
		"not from 1": {[]workerproto.Chunk{workertest.Chunk(2, 0, []byte("x"))}, "left out"},
		"no seq":     {[]workerproto.Chunk{workertest.Chunk(0, 0, []byte("x"))}, "seq"},
		"empty":      {[]workerproto.Chunk{workertest.Chunk(1, 0, nil)}, "data"},
		"too large":  {[]workerproto.Chunk{workertest.Chunk(1, 0, append(big, 'x'))}, "data"},
		"offset":     {[]workerproto.Chunk{workertest.Chunk(1, -1, []byte("x"))}, "offset"},
		"stream":     {[]workerproto.Chunk{{Seq: 1, Stream: "stdlog", Data: []byte("x")}}, "stream"},
		"over the cap": {func() (cs []workerproto.Chunk) {
			for i := range int64(6) { // the cap is 1 KiB, the slack four chunks
				cs = append(cs, workertest.Chunk(i+1, i*int64(len(big)), big))
			}
			return cs
		}(), "more than the job keeps"},
	} {
		t.Run(name, func(t *testing.T) {
			id := "worker-" + strings.ReplaceAll(name, " ", "-")
			c := h.open(id)
			a := assignment(workertest.Lease())
			a.Job.LogMaxBytes = job.MinLogBytes
			reply, ok := h.bus.command(id, busmsg.WorkerCommand{Assign: []workerproto.Assignment{a}})
			require.True(t, ok)
			require.True(t, reply.Assign[0].Delivered)
			for _, chunk := range tc.chunks {
				c.Chunk(a.Lease, chunk)
			}
			code, reason := c.Ended()
			require.Equal(t, workerproto.CloseProtocol, code)
			require.Contains(t, reason, tc.reason)
		})
	}
}

// A worker that does not wait for acknowledgements is not read any further, and
// closed when that takes longer than its heartbeats can bear.
func TestTooMuchUnacknowledged(t *testing.T) {
	b := newMemBus()
	b.onChunks = func(string, [][]byte) (int, error) { return 0, errAway }
	h := start(t, b, func(o *tuning) { o.hub.Lease = 3 * time.Second })
	c := h.open("worker-a")
	l := h.assign("worker-a")
	data := make([]byte, workerproto.MaxChunkBytes)
	for i := range int64(1000) {
		frame, err := workerproto.EncodeChunk(l, workertest.Chunk(i+1, i*int64(len(data)), data))
		require.NoError(t, err)
		if !c.WriteFor(workertest.Wait, websocket.MessageBinary, frame) {
			break
		}
	}
	code, _ := c.Ended()
	require.Contains(t, []int{workerproto.CloseSlowDown, -1}, code, "closed; the reason is lost where it was still sending")
	require.Empty(t, b.stored(l.JobID))
}

func TestResults(t *testing.T) {
	b := newMemBus()
	fails := true
	gate := make(chan struct{})
	b.onResult = func(busmsg.Result) error {
		<-gate
		if fails { // one result in this test, one try at a time
			fails = false
			return errAway
		}
		return nil
	}
	h := start(t, b)
	c := h.open("worker-a")
	l := h.assign("worker-a")
	zero := 0
	r := workerproto.Result{
		Lease: l, Outcome: job.OutcomeSucceeded, ExitCode: &zero, FinishedAt: time.Now().UTC(), Message: strings.Repeat("ä", job.MaxReasonBytes),
		Tail: []workerproto.Chunk{workertest.Chunk(1, 0, []byte("tail"))},
	}
	c.Send(workerproto.TypeResult, r)
	c.Send(workerproto.TypeResult, r) // while the first is under way
	c.Send(workerproto.TypeHeartbeat, workerproto.Heartbeat{ID: 1, Status: workerproto.StatusBusy})
	c.NextOf(workerproto.TypeBeat)
	require.NotContains(t, c.Types(), workerproto.TypeAck)
	close(gate)
	require.Equal(t, []workerproto.Lease{l}, workertest.Decode[workerproto.Ack](t, c.NextOf(workerproto.TypeAck)).Results)
	b.mu.Lock()
	require.Len(t, b.results, 1)
	got := b.results[0]
	b.mu.Unlock()
	require.Equal(t, "worker-a", got.WorkerID)
	require.NotEmpty(t, got.EdgeID)
	require.WithinDuration(t, time.Now(), got.ReceivedAt, time.Minute)
	require.LessOrEqual(t, len(got.Message), job.MaxReasonBytes)
	require.Equal(t, r.Tail[0].Data, got.Tail[0].Data)

	c.Send(workerproto.TypeResult, r) // again, as after a lost acknowledgement
	require.Equal(t, []workerproto.Lease{l}, workertest.Decode[workerproto.Ack](t, c.NextOf(workerproto.TypeAck)).Results)
}

func TestBadFrames(t *testing.T) {
	h := start(t, newMemBus())
	l := workertest.JSON(t, workertest.Lease())
	fields := strings.TrimSuffix(strings.TrimPrefix(l, "{"), "}")
	for name, tc := range map[string]struct {
		typ  websocket.MessageType
		data string
		code int
	}{
		"empty text":        {websocket.MessageText, "", workerproto.CloseProtocol},
		"array":             {websocket.MessageText, "[]", workerproto.CloseProtocol},
		"null":              {websocket.MessageText, "null", workerproto.CloseProtocol},
		"no type":           {websocket.MessageText, "{}", workerproto.CloseProtocol},
		"type is a number":  {websocket.MessageText, `{"type":1}`, workerproto.CloseProtocol},
		"not UTF-8":         {websocket.MessageText, "{\"type\":\"x\xff\"}", int(websocket.StatusInvalidFramePayloadData)},
		"half":              {websocket.MessageText, `{"type":"heartbeat","status":`, workerproto.CloseProtocol},
		"trailing":          {websocket.MessageText, `{"type":"heartbeat","status":"idle"}{}`, workerproto.CloseProtocol},
		"status":            {websocket.MessageText, `{"type":"heartbeat","status":"zombie"}`, workerproto.CloseProtocol},
		"free slots":        {websocket.MessageText, `{"type":"heartbeat","status":"idle","freeSlots":-1}`, workerproto.CloseProtocol},
		"another worker":    {websocket.MessageText, `{"type":"heartbeat","status":"idle","workerId":"worker-z"}`, workerproto.CloseProtocol},
		"running":           {websocket.MessageText, `{"type":"heartbeat","status":"idle","running":[{"jobId":"job-*"}]}`, workerproto.CloseProtocol},
		"progress":          {websocket.MessageText, `{"type":"started","jobId":"../../x"}`, workerproto.CloseProtocol},
		"year 10000":        {websocket.MessageText, `{"type":"started",` + fields + `,"at":"10000-01-01T00:00:00Z"}`, workerproto.CloseProtocol},
		"negative attempt":  {websocket.MessageText, strings.Replace(`{"type":"started",`+fields+`,"at":"2026-01-01T00:00:00Z"}`, `"attempt":1`, `"attempt":-1`, 1), workerproto.CloseProtocol},
		"outcome":           {websocket.MessageText, `{"type":"result",` + fields + `,"outcome":"lost","finishedAt":"2026-01-01T00:00:00Z"}`, workerproto.CloseProtocol},
		"result of another": {websocket.MessageText, `{"type":"result","workerId":"worker-z",` + fields + `,"outcome":"failed","finishedAt":"2026-01-01T00:00:00Z"}`, workerproto.CloseProtocol},
		"empty binary":      {websocket.MessageBinary, "", workerproto.CloseProtocol},
		"header length":     {websocket.MessageBinary, "\xff\xff\xff\xff{}", workerproto.CloseProtocol},
		"header":            {websocket.MessageBinary, "\x00\x00\x00\x02{]", workerproto.CloseProtocol},
		"too big":           {websocket.MessageText, `{"type":"` + strings.Repeat("x", workerproto.MaxFrameBytes) + `"}`, int(websocket.StatusMessageTooBig)},
	} {
		t.Run(name, func(t *testing.T) {
			c := h.open("worker-a")
			c.Write(tc.typ, []byte(tc.data))
			code, reason := c.Ended()
			require.Equal(t, tc.code, code, reason)
			require.NotContains(t, reason, "zombie")
		})
	}
	c := h.open("worker-a")
	c.Text(`{"type":"from the future","x":[1,2,3]}`)
	c.Text(`{"type":"heartbeat","status":"idle","id":5,"new field":{}}`)
	require.Equal(t, int64(5), workertest.Decode[workerproto.Beat](t, c.NextOf(workerproto.TypeBeat)).ID)
}

// Workers that come all at once are registered some at a time, and one that goes
// away while it waits is not in the way of others.
func TestRegistrationsAreBounded(t *testing.T) {
	const crowd, most = 90, 64
	b := newMemBus()
	var now, highest atomic.Int64
	open := make(chan struct{})
	b.onPut = func(ctx context.Context) error {
		n := now.Add(1)
		defer now.Add(-1)
		for h := highest.Load(); n > h && !highest.CompareAndSwap(h, n); h = highest.Load() {
		}
		select {
		case <-open:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	h := start(t, b)
	var all []*workertest.Client
	for i := range crowd {
		id := fmt.Sprintf("worker-%d", i)
		c := workertest.Dial(t, h.url, id)
		c.Send(workerproto.TypeHello, workertest.Hello(id))
		all = append(all, c)
	}
	eventually(t, "the first ones are being registered", func() bool { return now.Load() == most })
	for _, c := range all[crowd-10:] {
		c.Close()
	}
	close(open)
	eventually(t, "those who stayed are registered", func() bool {
		for i := range crowd - 10 {
			if !b.worker(fmt.Sprintf("worker-%d", i)).Online {
				return false
			}
		}
		return true
	})
	require.EqualValues(t, most, highest.Load())
}

func TestTakeoverOnOneEdge(t *testing.T) {
	b := newMemBus()
	h := start(t, b)
	older := h.open("worker-a")
	newer := h.open("worker-a")
	older.NextOf(workerproto.TypeGoaway)
	code, _ := older.Ended()
	require.Equal(t, workerproto.CloseReplaced, code)
	require.Equal(t, 1, b.serving("worker-a"))
	require.True(t, b.worker("worker-a").Online, "the older one leaves the newer's registration alone")
	l := h.assign("worker-a")
	got := workertest.Decode[workerproto.Assign](t, newer.NextOf(workerproto.TypeAssign))
	require.Equal(t, l, got.Assignments[0].Lease)
}

func TestTakeoverByAnotherEdge(t *testing.T) {
	b := newMemBus()
	first, second := start(t, b), start(t, b, func(o *tuning) { o.hub.EdgeID = "edge-second" })
	older := first.open("worker-a")
	second.open("worker-a")
	older.NextOf(workerproto.TypeGoaway)
	code, _ := older.Ended()
	require.Equal(t, workerproto.CloseReplaced, code)
	eventually(t, "one session takes commands", func() bool { return b.serving("worker-a") == 1 })
	require.True(t, b.worker("worker-a").Online)
	require.Equal(t, "edge-second", b.worker("worker-a").EdgeID)
}

// An edge whose watch is silent learns of a newer session from the scheduler.
func TestTakeoverByReply(t *testing.T) {
	b := newMemBus()
	h := start(t, b)
	c := h.open("worker-a")
	b.set(func() {
		b.workers["worker-a"] = fleet.Worker{ID: "worker-a", SessionID: "session-newer", Online: true}
		b.scheduler = func(r busmsg.BeatRequest) (busmsg.BeatReply, error) {
			return busmsg.BeatReply{Workers: []busmsg.WorkerReply{{WorkerID: "worker-a", SessionID: "session-newer"}}}, nil
		}
	})
	c.Send(workerproto.TypeHeartbeat, workerproto.Heartbeat{ID: 1, Status: workerproto.StatusIdle})
	code, _ := c.Ended()
	require.Equal(t, workerproto.CloseReplaced, code)
	require.True(t, b.worker("worker-a").Online)
}

// A worker that does not read gets no more assignments, then loses its session;
// nobody else notices.
func TestSlowConsumer(t *testing.T) {
	b := newMemBus()
	h := start(t, b, func(o *tuning) { o.socket.WriteTimeout = time.Second })
	deaf := workertest.DialDeaf(t, h.url, "worker-deaf")
	deaf.Send(workerproto.TypeHello, workertest.Hello("worker-deaf"))
	c := h.open("worker-a")
	eventually(t, "commands are taken", func() bool { return b.serving("worker-deaf") == 1 })
	big := strings.Repeat("x", 256<<10)
	refused := 0
	for range 200 {
		a := assignment(workertest.Lease())
		a.Job.Stdin = big
		reply, ok := b.command("worker-deaf", busmsg.WorkerCommand{Assign: []workerproto.Assignment{a}})
		if !ok || !reply.Assign[0].Delivered {
			refused++
		}
	}
	require.Positive(t, refused)
	for i := range int64(20) {
		sent := time.Now()
		c.Send(workerproto.TypeHeartbeat, workerproto.Heartbeat{ID: i, Status: workerproto.StatusIdle})
		c.NextOf(workerproto.TypeBeat)
		require.Less(t, time.Since(sent), 2*time.Second)
	}
	eventually(t, "the deaf worker's session ended", func() bool { return b.serving("worker-deaf") == 0 })
	eventually(t, "and it is offline", func() bool { return !b.worker("worker-deaf").Online })
}

func TestNoPong(t *testing.T) {
	b := newMemBus()
	h := start(t, b, func(o *tuning) {
		o.socket.PingInterval, o.socket.PongTimeout = 200*time.Millisecond, 300*time.Millisecond
	})
	deaf := workertest.DialDeaf(t, h.url, "worker-deaf") // does not read, so does not answer
	deaf.Send(workerproto.TypeHello, workertest.Hello("worker-deaf"))
	c := h.open("worker-a")
	eventually(t, "the deaf worker was there", func() bool { return b.worker("worker-deaf").SessionID != "" })
	eventually(t, "the deaf worker's session ended", func() bool { return !b.worker("worker-deaf").Online })
	c.Send(workerproto.TypeHeartbeat, workerproto.Heartbeat{ID: 1, Status: workerproto.StatusIdle})
	c.NextOf(workerproto.TypeBeat)
}

func TestGracefulStop(t *testing.T) {
	b := newMemBus()
	h := start(t, b)
	var cs []*workertest.Client
	for i := range 5 {
		cs = append(cs, h.open(fmt.Sprintf("worker-%d", i)))
	}
	l := h.assign("worker-0")
	entered, gate := make(chan struct{}), make(chan struct{})
	b.set(func() {
		b.onResult = func(busmsg.Result) error {
			close(entered)
			<-gate
			return nil
		}
	})
	cs[0].Send(workerproto.TypeResult, workerproto.Result{Lease: l, Outcome: job.OutcomeFailed, FinishedAt: time.Now()})
	<-entered
	stopped := make(chan error, 1)
	go func() { stopped <- h.stop() }()
	for _, c := range cs {
		g := workertest.Decode[workerproto.Goaway](t, c.NextOf(workerproto.TypeGoaway))
		require.GreaterOrEqual(t, g.RetryAfterMs, 0)
		require.LessOrEqual(t, g.RetryAfterMs, 5000)
		code, _ := c.Ended()
		require.Equal(t, int(websocket.StatusGoingAway), code)
	}
	select {
	case err := <-stopped:
		require.Fail(t, "stopped while a result was under way", "%v", err)
	default:
	}
	close(gate)
	require.NoError(t, <-stopped)
	require.Len(t, b.results, 1, "what was under way is finished")
	closed := map[string]bool{}
	for _, r := range b.beats {
		for _, w := range r.Workers {
			closed[w.WorkerID] = closed[w.WorkerID] || w.Closed
		}
	}
	for i := range cs {
		id := fmt.Sprintf("worker-%d", i)
		require.False(t, b.worker(id).Online)
		require.True(t, closed[id], "the scheduler was told")
	}
	_, resp, err := workertest.Try(t, h.url, http.Header{workerproto.TokenHeader: {workertest.Token(t, "worker-a", time.Hour)}})
	require.Error(t, err)
	require.Equal(t, http.StatusServiceUnavailable, resp.StatusCode)
}
