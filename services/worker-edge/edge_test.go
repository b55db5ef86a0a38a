package edge_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/config"
	"github.com/cmdexec/cmdexec/libs/natsd"
	"github.com/cmdexec/cmdexec/libs/natsd/natsdtest"
	edge "github.com/cmdexec/cmdexec/services/worker-edge"
	"github.com/cmdexec/cmdexec/services/worker-edge/internal/workertest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is a real bus with a scheduler that does what a test says.
type world struct {
	t    *testing.T
	conn *bus.Conn // of the test and its scheduler

	mu    sync.Mutex
	beats []busmsg.WorkerBeat
	reply func(busmsg.WorkerBeat) busmsg.WorkerReply
}

func newWorld(t *testing.T, o bus.Options) *world {
	t.Helper()
	w := &world{t: t, conn: connect(t, o), reply: confirm}
	require.NoError(t, bus.Apply(t.Context(), w.conn, bus.Sizes{Jobs: 16 << 20, Results: 16 << 20, Logs: 64 << 20}))
	require.NoError(t, w.conn.Bind(t.Context()))
	return w
}

func connect(t *testing.T, o bus.Options) *bus.Conn {
	t.Helper()
	c, err := bus.Connect(t.Context(), o)
	require.NoError(t, err)
	t.Cleanup(c.Close)
	return c
}

func confirm(b busmsg.WorkerBeat) busmsg.WorkerReply {
	r := busmsg.WorkerReply{WorkerID: b.WorkerID, SessionID: b.SessionID}
	for _, l := range b.Holding {
		r.Confirmed = append(r.Confirmed, l.LeaseID)
	}
	if b.Heartbeat != nil {
		for _, l := range b.Heartbeat.Running {
			r.Confirmed = append(r.Confirmed, l.LeaseID)
		}
	}
	return r
}

// lead starts the scheduler's part.
func (w *world) lead() {
	w.t.Helper()
	sub, err := w.conn.ServeBeats(func(_ context.Context, req busmsg.BeatRequest) (busmsg.BeatReply, error) {
		w.mu.Lock()
		defer w.mu.Unlock()
		reply := busmsg.BeatReply{SchedulerID: "scheduler-test"}
		for _, b := range req.Workers {
			w.beats = append(w.beats, b)
			if b.Hello != nil || b.Heartbeat != nil {
				reply.Workers = append(reply.Workers, w.reply(b))
			}
		}
		return reply, nil
	})
	require.NoError(w.t, err)
	w.t.Cleanup(func() { _ = sub.Unsubscribe() })
}

func (w *world) seen(want func(busmsg.WorkerBeat) bool) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, b := range w.beats {
		if want(b) {
			return true
		}
	}
	return false
}

// edge starts an edge of its own connection.
func (w *world) edge(o bus.Options, tune ...func(*edge.Config)) (url string, stop func() error, metrics *prometheus.Registry) {
	w.t.Helper()
	var cfg edge.Config
	for _, f := range tune {
		f(&cfg)
	}
	conn, err := bus.Connect(w.t.Context(), o)
	require.NoError(w.t, err)
	metrics = prometheus.NewRegistry()
	s, err := edge.New(cfg, edge.Deps{
		Bus: conn, WorkerTokenSecret: workertest.Secret, Logger: slog.New(slog.DiscardHandler), Metrics: metrics,
	})
	require.NoError(w.t, err)
	server := httptest.NewServer(s.Handler())
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	require.Eventually(w.t, func() bool { return s.Ready() == nil }, workertest.Wait, 2*time.Millisecond)
	stop = sync.OnceValue(func() error {
		cancel()
		err := <-ended
		conn.Close()
		server.Close()
		return err
	})
	w.t.Cleanup(func() { require.NoError(w.t, stop()) })
	return server.URL, stop, metrics
}

func (w *world) eventually(what string, ok func() bool) {
	w.t.Helper()
	require.Eventually(w.t, ok, workertest.Wait, 5*time.Millisecond, what)
}

func open(t *testing.T, url, workerID string, running ...workerproto.Lease) *workertest.Client {
	t.Helper()
	c := workertest.Dial(t, url, workerID)
	c.Send(workerproto.TypeHello, workertest.Hello(workerID, running...))
	c.NextOf(workerproto.TypeWelcome)
	return c
}

func (w *world) assign(workerID string) workerproto.Lease {
	w.t.Helper()
	spec, errs := job.Normalise(job.Spec{Command: job.Command{Shell: "true"}})
	require.Empty(w.t, errs)
	l := workertest.Lease()
	reply, err := w.conn.SendCommand(w.t.Context(), workerID, busmsg.WorkerCommand{Assign: []workerproto.Assignment{{Lease: l, LeaseSeconds: 60, Job: spec}}})
	require.NoError(w.t, err)
	require.Equal(w.t, []busmsg.Delivery{{LeaseID: l.LeaseID, Delivered: true}}, reply.Assign)
	return l
}

// results collects what RESULTS has until the test ends.
func (w *world) results() func() []busmsg.Result {
	var mu sync.Mutex
	var got []busmsg.Result
	w.background(func(ctx context.Context) {
		_ = w.conn.Consume(ctx, bus.ResultsState, bus.ConsumeOptions{}, func(_ context.Context, m bus.Msg) error {
			var r busmsg.Result
			if err := json.Unmarshal(m.Data, &r); err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			got = append(got, r)
			return nil
		})
	})
	return func() []busmsg.Result {
		mu.Lock()
		defer mu.Unlock()
		return append([]busmsg.Result(nil), got...)
	}
}

// output reads a job's output back from LOGS.
func (w *world) output(jobID string) func() []workerproto.Chunk {
	var mu sync.Mutex
	var got []workerproto.Chunk
	w.background(func(ctx context.Context) {
		_ = w.conn.FollowLogs(ctx, jobID, func(_ workerproto.Lease, c workerproto.Chunk) {
			c.Data = bytes.Clone(c.Data)
			mu.Lock()
			defer mu.Unlock()
			got = append(got, c)
		})
	})
	return func() []workerproto.Chunk {
		mu.Lock()
		defer mu.Unlock()
		return append([]workerproto.Chunk(nil), got...)
	}
}

func (w *world) background(f func(ctx context.Context)) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		f(ctx)
	}()
	w.t.Cleanup(func() {
		cancel()
		<-done
	})
}

func inProcess(s *natsd.Server) bus.Options { return bus.Options{InProcess: s, Name: "test"} }

// One attempt from the welcome to the acknowledged result, over the real bus.
func TestAttempt(t *testing.T) {
	o := inProcess(natsdtest.Start(t))
	w := newWorld(t, o)
	url, stop, metrics := w.edge(o)

	c := workertest.Dial(t, url, "worker-a")
	c.Send(workerproto.TypeHello, workertest.Hello("worker-a"))
	w.eventually("registered before anybody leads", func() bool {
		stored, err := w.conn.Workers().Get(t.Context(), "worker-a")
		return err == nil && stored.Online && stored.Transport == "websocket" && stored.Slots == 4 && stored.Backlog == 8
	})
	require.Empty(t, c.Types(), "no welcome before the leader has answered")
	w.lead()
	c.NextOf(workerproto.TypeWelcome)

	l := w.assign("worker-a")
	got := workertest.Decode[workerproto.Assign](t, c.NextOf(workerproto.TypeAssign))
	require.Equal(t, l, got.Assignments[0].Lease)
	require.Equal(t, "true", got.Assignments[0].Job.Command.Shell)
	c.Send(workerproto.TypeAccepted, workerproto.Progress{Lease: l, At: time.Now().UTC()})
	c.Send(workerproto.TypeStarted, workerproto.Progress{Lease: l, At: time.Now().UTC()})
	w.eventually("progress arrives", func() bool {
		return w.seen(func(b busmsg.WorkerBeat) bool {
			return len(b.Progress) > 0 && b.Progress[len(b.Progress)-1].Step == workerproto.TypeStarted
		})
	})
	c.Send(workerproto.TypeHeartbeat, workerproto.Heartbeat{ID: 3, Status: workerproto.StatusBusy, FreeSlots: 3, Running: []workerproto.PhaseLease{{Lease: l, Phase: workerproto.PhaseStarted}}})
	beat := workertest.Decode[workerproto.Beat](t, c.NextOf(workerproto.TypeBeat))
	require.Equal(t, int64(3), beat.ID)
	require.Equal(t, []string{l.LeaseID}, beat.Confirmed)

	output := w.output(l.JobID)
	var want bytes.Buffer
	for i := range int64(50) {
		data := make([]byte, 8<<10)
		_, _ = rand.Read(data)
		c.Chunk(l, workertest.Chunk(i+1, int64(want.Len()), data))
		want.Write(data)
	}
	for workertest.Decode[workerproto.Ack](t, c.NextOf(workerproto.TypeAck)).AckedSeq < 50 {
	}
	w.eventually("all output is stored", func() bool { return len(output()) == 50 })
	var stored bytes.Buffer
	for i, chunk := range output() {
		require.Equal(t, int64(i+1), chunk.Seq)
		stored.Write(chunk.Data)
	}
	require.True(t, bytes.Equal(want.Bytes(), stored.Bytes()))

	results := w.results()
	zero := 0
	c.Send(workerproto.TypeResult, workerproto.Result{Lease: l, Outcome: job.OutcomeSucceeded, ExitCode: &zero, FinishedAt: time.Now().UTC()})
	require.Equal(t, []workerproto.Lease{l}, workertest.Decode[workerproto.Ack](t, c.NextOf(workerproto.TypeAck)).Results)
	w.eventually("the result is stored", func() bool { return len(results()) == 1 })
	r := results()[0]
	require.Equal(t, l, r.Lease)
	require.Equal(t, "worker-a", r.WorkerID)
	require.NotEmpty(t, r.EdgeID)
	c.Chunk(l, workertest.Chunk(51, 0, []byte("late")))
	c.NextOf(workerproto.TypeStale)

	c.Close()
	w.eventually("worker offline", func() bool {
		stored, err := w.conn.Workers().Get(t.Context(), "worker-a")
		return err == nil && !stored.Online
	})
	w.eventually("the scheduler knows", func() bool { return w.seen(func(b busmsg.WorkerBeat) bool { return b.Closed }) })
	_, err := w.conn.SendCommand(t.Context(), "worker-a", busmsg.WorkerCommand{Cancel: []workerproto.Lease{l}})
	require.ErrorIs(t, err, bus.ErrNoResponder, "definitive")

	require.Equal(t, float64(0), value(t, metrics, "cmdexec_edge_sessions"))
	require.Equal(t, float64(want.Len()), value(t, metrics, "cmdexec_edge_output_bytes_total"))
	require.Equal(t, float64(1), value(t, metrics, "cmdexec_edge_stale_total"))
	require.Equal(t, float64(0), value(t, metrics, "cmdexec_edge_inflight_bytes"))
	require.NoError(t, stop())
}

func value(t *testing.T, reg *prometheus.Registry, name string) float64 {
	t.Helper()
	families, err := reg.Gather()
	require.NoError(t, err)
	for _, f := range families {
		if f.GetName() == name {
			m := f.GetMetric()[0]
			return m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	require.Fail(t, "no such metric", name)
	return 0
}

func TestTakeover(t *testing.T) {
	server := natsdtest.Start(t)
	o := inProcess(server)
	w := newWorld(t, o)
	w.lead()
	first, _, _ := w.edge(o)
	second, _, _ := w.edge(o)
	for _, to := range []string{first, second, first} { // the same edge, another one, and back
		older := open(t, first, "worker-a")
		l := w.assign("worker-a")
		newer := open(t, to, "worker-a", l)
		older.NextOf(workerproto.TypeGoaway)
		code, _ := older.Ended()
		require.Equal(t, workerproto.CloseReplaced, code)

		// The newer has the commands to itself and goes on with the lease.
		for range 5 {
			l := w.assign("worker-a")
			got := newer.Next(func(f workertest.Frame) bool { return f.Type == workerproto.TypeAssign })
			require.Equal(t, l, workertest.Decode[workerproto.Assign](t, got).Assignments[0].Lease)
		}
		newer.Chunk(l, workertest.Chunk(7, 0, []byte("on")))
		require.Equal(t, int64(7), workertest.Decode[workerproto.Ack](t, newer.NextOf(workerproto.TypeAck)).AckedSeq)
		stored, err := w.conn.Workers().Get(t.Context(), "worker-a")
		require.NoError(t, err)
		require.True(t, stored.Online)
		newer.Close()
		w.eventually("offline", func() bool {
			stored, err := w.conn.Workers().Get(t.Context(), "worker-a")
			return err == nil && !stored.Online
		})
	}
}

// The bus goes away under an edge with work in flight and comes back: the
// session lives, and nothing is acknowledged before it is stored.
func TestBusRestart(t *testing.T) {
	dir := t.TempDir()
	server, err := natsd.Start(natsd.Options{StoreDir: dir, Listen: "127.0.0.1:0"})
	require.NoError(t, err)
	t.Cleanup(func() { server.Shutdown() })
	o := bus.Options{URL: server.ClientURL(), Name: "test"}
	addr := server.ClientURL()
	w := newWorld(t, o)
	w.lead()
	url, _, _ := w.edge(o)
	c := open(t, url, "worker-a")
	l := w.assign("worker-a")
	c.Chunk(l, workertest.Chunk(1, 0, []byte("before")))
	c.NextOf(workerproto.TypeAck)

	server.Shutdown()
	c.Chunk(l, workertest.Chunk(2, 6, []byte("during")))
	c.Send(workerproto.TypeResult, workerproto.Result{Lease: workertest.Lease(), Outcome: job.OutcomeFailed, FinishedAt: time.Now().UTC()})
	c.Send(workerproto.TypeHeartbeat, workerproto.Heartbeat{ID: 9, Status: workerproto.StatusBusy})
	pings := time.Now().Add(time.Second)
	require.Never(t, func() bool { return len(c.Types()) > 1 }, time.Until(pings), 20*time.Millisecond, "nothing is acknowledged; the assignment was there before")

	server, err = natsd.Start(natsd.Options{StoreDir: dir, Listen: addr[len("nats://"):]})
	require.NoError(t, err)
	require.Equal(t, int64(9), workertest.Decode[workerproto.Beat](t, c.NextOf(workerproto.TypeBeat)).ID)
	var seq int64
	var results []workerproto.Lease
	for seq < 2 || len(results) < 1 {
		ack := workertest.Decode[workerproto.Ack](t, c.NextOf(workerproto.TypeAck))
		seq = max(seq, ack.AckedSeq)
		results = append(results, ack.Results...)
	}
	output, stored := w.output(l.JobID), w.results()
	w.eventually("both chunks are stored", func() bool {
		got := output()
		return len(got) >= 2 && string(got[0].Data) == "before" && string(got[len(got)-1].Data) == "during"
	})
	w.eventually("the result is stored", func() bool { return len(stored()) >= 1 })
	w.eventually("commands reach the worker again", func() bool {
		_, err := w.conn.SendCommand(t.Context(), "worker-a", busmsg.WorkerCommand{})
		return err == nil
	})
}

// The store of NATS is lost under an edge, and with it all registrations. Its
// workers are asked to come again: the new registry does not know them otherwise.
func TestRegistryLost(t *testing.T) {
	server, err := natsd.Start(natsd.Options{StoreDir: t.TempDir(), Listen: "127.0.0.1:0"})
	require.NoError(t, err)
	t.Cleanup(func() { server.Shutdown() })
	addr := server.ClientURL()
	o := bus.Options{URL: addr, Name: "test"}
	w := newWorld(t, o)
	w.lead()
	url, _, _ := w.edge(o)
	c := open(t, url, "worker-a")

	server.Shutdown()
	server, err = natsd.Start(natsd.Options{StoreDir: t.TempDir(), Listen: addr[len("nats://"):]})
	require.NoError(t, err)
	again := connect(t, o)
	require.NoError(t, bus.Apply(t.Context(), again, bus.Sizes{Jobs: 16 << 20, Results: 16 << 20, Logs: 64 << 20}))

	workertest.Decode[workerproto.Goaway](t, c.NextOf(workerproto.TypeGoaway))
	c.Ended()
	workertest.Dial(t, url, "worker-a").Send(workerproto.TypeHello, workertest.Hello("worker-a"))
	w.eventually("the worker is registered with the new registry", func() bool {
		have, err := again.Workers().Get(t.Context(), "worker-a")
		return err == nil && have.Online
	})
}

// Many workers at once, each with jobs: everything is stored and acknowledged.
func TestManyWorkers(t *testing.T) {
	o := inProcess(natsdtest.Start(t))
	w := newWorld(t, o)
	w.lead()
	url, stop, _ := w.edge(o, func(c *edge.Config) { c.MaxPendingPerIP = 1000 })
	results := w.results()
	const workers, jobs = 20, 10
	leases := make([][]workerproto.Lease, workers)
	clients := make([]*workertest.Client, workers)
	for i := range clients {
		id := fmt.Sprintf("worker-%d", i)
		clients[i] = open(t, url, id)
		for range jobs {
			leases[i] = append(leases[i], w.assign(id))
		}
	}
	var wg sync.WaitGroup
	for i, c := range clients {
		wg.Go(func() {
			zero := 0
			for _, l := range leases[i] {
				c.Chunk(l, workertest.Chunk(1, 0, []byte("out")))
				c.Send(workerproto.TypeResult, workerproto.Result{Lease: l, Outcome: job.OutcomeSucceeded, ExitCode: &zero, FinishedAt: time.Now().UTC()})
			}
		})
	}
	wg.Wait()
	for _, c := range clients {
		for n := 0; n < jobs; {
			n += len(workertest.Decode[workerproto.Ack](t, c.Next(func(f workertest.Frame) bool {
				return f.Type == workerproto.TypeAck && bytes.Contains(f.Data, []byte("results"))
			})).Results)
		}
	}
	// A publish whose answer is late is repeated, so a result may be stored twice:
	// its consumers know it by its lease.
	w.eventually("every result is stored", func() bool {
		stored := map[string]bool{}
		for _, r := range results() {
			stored[r.LeaseID] = true
		}
		return len(stored) == workers*jobs
	})
	require.NoError(t, stop())
	for i := range clients {
		stored, err := w.conn.Workers().Get(t.Context(), fmt.Sprintf("worker-%d", i))
		require.NoError(t, err)
		require.False(t, stored.Online)
	}
}

func TestSettings(t *testing.T) {
	conn := connect(t, inProcess(natsdtest.Start(t)))
	for name, tc := range map[string]struct {
		cfg    edge.Config
		secret config.Secret
		want   string
	}{
		"short lease":  {edge.Config{LeaseSeconds: 10, HeartbeatSeconds: 5}, workertest.Secret, "LEASE_SECONDS"},
		"heartbeat":    {edge.Config{HeartbeatSeconds: -1}, workertest.Secret, "HEARTBEAT_SECONDS"},
		"inflight":     {edge.Config{MaxInflight: 1}, workertest.Secret, "MAX_INFLIGHT"},
		"weak secret":  {edge.Config{}, "short", "WORKER_TOKEN_SECRET"},
		"known secret": {edge.Config{}, "change-me-change-me-change-me-change-me", "WORKER_TOKEN_SECRET"},
		"half TLS":     {edge.Config{ListenAddr: "127.0.0.1:0", TLSCertFile: "cert.pem"}, workertest.Secret, "TLS"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := edge.New(tc.cfg, edge.Deps{Bus: conn, WorkerTokenSecret: tc.secret})
			require.ErrorContains(t, err, tc.want)
		})
	}
}

// Before Run the handler refuses, and unknown paths are problems.
func TestHandlerOutsideOfRun(t *testing.T) {
	conn := connect(t, inProcess(natsdtest.Start(t)))
	s, err := edge.New(edge.Config{}, edge.Deps{Bus: conn, WorkerTokenSecret: workertest.Secret})
	require.NoError(t, err)
	server := httptest.NewServer(s.Handler())
	defer server.Close()
	require.Error(t, s.Ready())
	_, resp, err := workertest.Try(t, server.URL, http.Header{workerproto.TokenHeader: {workertest.Token(t, "worker-a", time.Hour)}})
	require.Error(t, err)
	require.Equal(t, http.StatusServiceUnavailable, resp.StatusCode)
	resp, err = server.Client().Get(server.URL + "/api/nothing")
	require.NoError(t, err)
	defer resp.Body.Close()
	require.Equal(t, http.StatusNotFound, resp.StatusCode)
	require.Equal(t, "application/problem+json", resp.Header.Get("Content-Type"))
	require.NotEmpty(t, resp.Header.Get("X-Request-Id"))
}

// The edge's own listeners, as the separate process has them.
func TestListeners(t *testing.T) {
	o := inProcess(natsdtest.Start(t))
	w := newWorld(t, o)
	w.lead()
	_, stop, _ := w.edge(o, func(c *edge.Config) { c.ListenAddr = "127.0.0.1:0" })
	require.NoError(t, stop())

	conn := connect(t, o)
	taken := httptest.NewServer(http.NotFoundHandler())
	defer taken.Close()
	_, err := edge.New(edge.Config{ListenAddr: taken.Listener.Addr().String()}, edge.Deps{Bus: conn, WorkerTokenSecret: workertest.Secret})
	require.ErrorContains(t, err, "in use")
}
