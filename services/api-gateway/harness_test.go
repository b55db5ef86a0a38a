package gateway

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/client"
	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
	"github.com/cmdexec/cmdexec/libs/natsd"
	"github.com/cmdexec/cmdexec/libs/natsd/natsdtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const testSecret = "fJ3k9sPq0vX7tYz2LmN8bWc5RdE1hGu6"

// env is a gateway on its own listener, over a real bus, with a scripted
// persister and a scripted scheduler.
type env struct {
	testing.TB
	nats  *natsd.Server
	conn  *bus.Conn
	svc   *Service
	base  string
	store *persister
	sched *scheduler
	http  *http.Client
	stop  func() // ends the gateway
}

func start(t testing.TB, change func(*Config)) *env {
	t.Helper()
	e := &env{TB: t, nats: natsdtest.Start(t), store: newPersister(), sched: &scheduler{}}
	ctx := t.Context()
	var err error
	e.conn, err = bus.Connect(ctx, bus.Options{InProcess: e.nats, Name: "test"})
	require.NoError(t, err)
	t.Cleanup(e.conn.Close)
	require.NoError(t, bus.Apply(ctx, e.conn, bus.Sizes{Jobs: 64 << 20, Results: 16 << 20, Logs: 64 << 20}))
	require.NoError(t, e.conn.Bind(ctx))
	e.store.serve(t, e.conn)
	e.sched.serve(t, e.conn)

	cfg := Config{ListenAddr: "127.0.0.1:0", JWTSecret: testSecret}
	if change != nil {
		change(&cfg)
	}
	e.svc, err = New(cfg, Deps{Bus: e.conn, Logger: slog.New(slog.DiscardHandler), Durability: e.nats.Durability})
	require.NoError(t, err)
	e.svc.archiveWait = 2 * time.Second
	e.base = "http://" + e.svc.Addr().String()
	run, cancel := context.WithCancel(context.WithoutCancel(ctx))
	done := make(chan error, 1)
	go func() { done <- e.svc.Run(run) }()
	e.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("gateway stopped with %v", err)
		}
	})
	t.Cleanup(e.stop)
	e.http = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 100}}
	t.Cleanup(e.http.CloseIdleConnections)
	return e
}

func token(t testing.TB, user string, role auth.Role) string {
	t.Helper()
	tok, err := auth.MintUser([]byte(testSecret), user, role, time.Hour, time.Now())
	require.NoError(t, err)
	return tok
}

func (e *env) sdk(user string) *client.Client {
	e.Helper()
	c, err := client.New(e.base, token(e, user, auth.RoleUser), client.Options{Tries: 1, HTTP: e.http})
	require.NoError(e, err)
	return c
}

// answer is a response that was read.
type answer struct {
	status int
	header http.Header
	body   []byte
}

func (a answer) problem(t testing.TB) api.Problem {
	t.Helper()
	require.Equal(t, "application/problem+json", a.header.Get("Content-Type"), "%d %s", a.status, a.body)
	var p api.Problem
	require.NoError(t, json.Unmarshal(a.body, &p))
	require.Equal(t, a.status, p.Status)
	require.NotEmpty(t, p.Code)
	require.NotEmpty(t, p.Title)
	require.NotEmpty(t, p.RequestID)
	require.Equal(t, a.header.Get("X-Request-Id"), p.RequestID)
	return p
}

func (a answer) job(t testing.TB) api.Job {
	t.Helper()
	require.Less(t, a.status, 300, "%s", a.body)
	var j api.Job
	require.NoError(t, json.Unmarshal(a.body, &j))
	return j
}

// do makes a request; headers are pairs.
func (e *env) do(method, path, tok, body string, headers ...string) answer {
	e.Helper()
	var r io.Reader
	if body != "" {
		r = bytes.NewReader([]byte(body))
	}
	req, err := http.NewRequestWithContext(e.Context(), method, e.base+path, r)
	require.NoError(e, err)
	if tok != "" {
		req.Header.Set("Authorization", "Bearer "+tok)
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	for i := 0; i+1 < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	resp, err := e.http.Do(req)
	require.NoError(e, err)
	defer func() { _ = resp.Body.Close() }()
	data, err := io.ReadAll(resp.Body)
	require.NoError(e, err)
	return answer{status: resp.StatusCode, header: resp.Header, body: data}
}

func (e *env) create(user string) string {
	e.Helper()
	a := e.do("POST", "/api/jobs/create", token(e, user, auth.RoleUser), `{"command":"true"}`)
	require.Equal(e, 201, a.status, "%s", a.body)
	return a.job(e).JobID
}

// move applies events to a job, as scheduler and collector would.
func (e *env) move(jobID string, events ...job.Event) job.Record {
	e.Helper()
	var rec job.Record
	for _, ev := range events {
		entry, err := e.conn.Registry().Transition(e.Context(), jobID, ev)
		require.NoError(e, err, "%T", ev)
		rec = entry.Record
	}
	return rec
}

func lease(attempt int) job.Fence {
	return job.Fence{Attempt: attempt, LeaseID: fmt.Sprintf("lease-%d", attempt)}
}

// runs brings a job to running, on its given attempt.
func (e *env) runs(jobID string, attempt int) {
	e.Helper()
	e.move(jobID, job.Assign{WorkerID: "w1", LeaseID: lease(attempt).LeaseID}, job.Start{Fence: lease(attempt), StartedAt: time.Now()})
}

func ended(attempt int, outcome job.Outcome, exit int, m *job.Manifest) job.Result {
	return job.Result{
		Fence: lease(attempt), WorkerID: "w1", Outcome: outcome, ExitCode: &exit, Manifest: m,
		StartedAt: time.Now().Add(-50 * time.Millisecond), FinishedAt: time.Now(),
	}
}

// leave takes a job out of the registry, into the persister.
func (e *env) leave(jobID string) {
	e.Helper()
	entry, err := e.conn.Registry().GetLatest(e.Context(), jobID)
	require.NoError(e, err)
	e.store.put(entry.Record)
	require.NoError(e, e.conn.Registry().Purge(e.Context(), jobID, entry.Revision))
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func chunk(seq int64, stream workerproto.Stream, data string) workerproto.Chunk {
	return workerproto.Chunk{Seq: seq, Stream: stream, Time: time.Now().UTC(), Data: []byte(data)}
}

// publish puts chunks of an attempt on the LOGS stream, as the edge would.
func (e *env) publish(jobID string, attempt int, chunks ...workerproto.Chunk) {
	e.Helper()
	var frames [][]byte
	for _, c := range chunks {
		frame, err := workerproto.EncodeChunk(workerproto.Lease{JobID: jobID, Attempt: attempt, LeaseID: lease(attempt).LeaseID}, c)
		require.NoError(e, err)
		frames = append(frames, frame)
	}
	n, err := e.conn.PublishChunks(e.Context(), jobID, frames)
	require.NoError(e, err)
	require.Equal(e, len(chunks), n)
}

// persister is a scripted one: it has what it is given.
type persister struct {
	mu     sync.Mutex
	away   bool
	jobs   map[string]job.Record
	chunks map[string][]workerproto.Chunk // by job and attempt, in order of seq
	checks map[string]busmsg.LogVerdict   // by job and attempt
	asked  int
}

func newPersister() *persister {
	return &persister{jobs: map[string]job.Record{}, chunks: map[string][]workerproto.Chunk{}, checks: map[string]busmsg.LogVerdict{}}
}

func (p *persister) put(r job.Record) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.jobs[r.ID] = r
}

func (p *persister) setAway(away bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.away = away
}

func (p *persister) archive(jobID string, attempt int, chunks ...workerproto.Chunk) {
	p.mu.Lock()
	defer p.mu.Unlock()
	k := fmt.Sprint(jobID, attempt)
	p.chunks[k] = append(p.chunks[k], chunks...)
	slices.SortFunc(p.chunks[k], func(a, b workerproto.Chunk) int { return cmp.Compare(a.Seq, b.Seq) })
}

func (p *persister) judge(jobID string, attempt int, v busmsg.LogVerdict) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.checks[fmt.Sprint(jobID, attempt)] = v
}

func (p *persister) check() error {
	p.asked++
	if p.away {
		return &busmsg.QueryError{Code: busmsg.CodeUnavailable, Message: "away"}
	}
	return nil
}

func serveAll[Req, Resp any](t testing.TB, c *bus.Conn, e bus.Endpoint[Req, Resp], h func(context.Context, Req) (Resp, error)) {
	t.Helper()
	sub, err := bus.Serve(c, e, h)
	require.NoError(t, err)
	t.Cleanup(func() { _ = sub.Unsubscribe() })
}

func (p *persister) serve(t testing.TB, c *bus.Conn) {
	serveAll(t, c, bus.QueryJob, func(_ context.Context, q busmsg.GetJob) (job.Record, error) {
		p.mu.Lock()
		defer p.mu.Unlock()
		if err := p.check(); err != nil {
			return job.Record{}, err
		}
		r, ok := p.jobs[q.JobID]
		if !ok {
			return r, &busmsg.QueryError{Code: busmsg.CodeNotFound, Message: "no such job"}
		}
		return r, nil
	})
	serveAll(t, c, bus.QueryJobs, func(_ context.Context, q busmsg.ListJobs) (busmsg.JobPage, error) {
		p.mu.Lock()
		defer p.mu.Unlock()
		if err := p.check(); err != nil {
			return busmsg.JobPage{}, err
		}
		var all []job.Record
		for _, r := range p.jobs {
			after := q.BeforeID == "" || r.CreatedAt.Before(q.BeforeAt) || r.CreatedAt.Equal(q.BeforeAt) && r.ID < q.BeforeID
			if after && (q.Owner == "" || r.Owner == q.Owner) && (len(q.States) == 0 || slices.Contains(q.States, r.State)) {
				all = append(all, r)
			}
		}
		slices.SortFunc(all, func(a, b job.Record) int {
			return cmp.Or(b.CreatedAt.Compare(a.CreatedAt), cmp.Compare(b.ID, a.ID))
		})
		page := busmsg.JobPage{Items: all, AsOf: time.Now().UTC()}
		if len(all) > q.Limit {
			page.Items, page.More = all[:q.Limit], true
		}
		return page, nil
	})
	serveAll(t, c, bus.QueryLogs, func(_ context.Context, q busmsg.GetLogs) (busmsg.Logs, error) {
		p.mu.Lock()
		defer p.mu.Unlock()
		if err := p.check(); err != nil {
			return busmsg.Logs{}, err
		}
		all := p.chunks[fmt.Sprint(q.JobID, q.Attempt)]
		out := busmsg.Logs{StoredChunks: int64(len(all)), Verdict: p.checks[fmt.Sprint(q.JobID, q.Attempt)]}
		size := 0
		for _, c := range all {
			out.StoredBytes += int64(len(c.Data))
			if c.Seq <= q.After || q.Stream != "" && c.Stream != q.Stream || out.More {
				continue
			}
			if len(out.Chunks) > 0 && (len(out.Chunks) >= q.Limit || size+len(c.Data) > q.MaxBytes) {
				out.More = true
				continue
			}
			size += len(c.Data)
			out.Chunks = append(out.Chunks, c)
		}
		return out, nil
	})
}

// scheduler is a scripted one.
type scheduler struct {
	mu      sync.Mutex
	queued  int
	asked   int
	explain busmsg.Explanation
	workers []busmsg.WorkerState
}

func (s *scheduler) set(change func(*scheduler)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(s)
}

func (s *scheduler) serve(t testing.TB, c *bus.Conn) {
	serveAll(t, c, bus.QueryExplain, func(_ context.Context, q busmsg.Explain) (busmsg.Explanation, error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		e := s.explain
		e.JobID = q.JobID
		return e, nil
	})
	serveAll(t, c, bus.QueryWorkers, func(context.Context, busmsg.ListWorkers) (busmsg.WorkerList, error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		return busmsg.WorkerList{Items: s.workers, AsOf: time.Now().UTC()}, nil
	})
	serveAll(t, c, bus.QueryOwner, func(context.Context, busmsg.OwnerCount) (busmsg.OwnerCounts, error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.asked++
		return busmsg.OwnerCounts{Queued: s.queued}, nil
	})
}

func newID() string { return id.New(id.Job, time.Now()) }
