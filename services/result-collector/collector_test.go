package collector_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/natsd"
	"github.com/cmdexec/cmdexec/libs/natsd/natsdtest"
	"github.com/cmdexec/cmdexec/libs/store"
	"github.com/cmdexec/cmdexec/libs/store/sqlitestore"
	collector "github.com/cmdexec/cmdexec/services/result-collector"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// host leads connections to the server that runs at the moment.
type host struct{ server atomic.Pointer[natsd.Server] }

func (h *host) InProcessConn() (net.Conn, error) { return h.server.Load().InProcessConn() }

// rig is a bus and a database, with the test in the place of edge and scheduler.
type rig struct {
	t    *testing.T
	dir  string
	host *host
	conn *bus.Conn
	db   *sqlitestore.Store
	log  *slog.Logger
}

func newRig(t *testing.T) *rig {
	r := &rig{t: t, dir: t.TempDir(), host: &host{}, log: slog.New(slog.NewTextHandler(t.Output(), nil))}
	r.host.server.Store(natsdtest.StartIn(t, r.dir))
	r.conn = r.connect()
	require.NoError(t, bus.Apply(t.Context(), r.conn, bus.Sizes{Jobs: 64 << 20, Results: 64 << 20, Logs: 64 << 20}))
	require.NoError(t, r.conn.Bind(t.Context()))
	db, err := sqlitestore.Open(t.Context(), filepath.Join(t.TempDir(), "jobs.db"))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, db.Close()) })
	r.db = db
	return r
}

func (r *rig) connect() *bus.Conn {
	c, err := bus.Connect(r.t.Context(), bus.Options{InProcess: r.host, Name: "test", Logger: r.log})
	require.NoError(r.t, err)
	r.t.Cleanup(c.Close)
	return c
}

// running is a collector that runs.
type running struct {
	*collector.Service
	metrics *prometheus.Registry
	stop    func()
}

func (r *rig) start(db store.Store) running { return r.startAt(db, nil) }

func (r *rig) startAt(db store.Store, clock func() time.Time) running {
	out := running{metrics: prometheus.NewRegistry()}
	var err error
	out.Service, err = collector.New(collector.Deps{
		Bus: r.connect(), Store: db, Logger: r.log, Metrics: out.metrics, Clock: clock,
	})
	require.NoError(r.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- out.Run(ctx) }()
	out.stop = sync.OnceFunc(func() {
		cancel()
		require.NoError(r.t, <-done)
	})
	r.t.Cleanup(out.stop)
	return out
}

// results is how many results had that verdict.
func (c running) results(t *testing.T, verdict string) float64 {
	t.Helper()
	return c.counted(t, "results_total", verdict)
}

// counted is the value of a counter with one label.
func (c running) counted(t *testing.T, name, label string) float64 {
	t.Helper()
	families, err := c.metrics.Gather()
	require.NoError(t, err)
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == "cmdexec_collector_"+name && m.GetLabel()[0].GetValue() == label {
				return m.GetCounter().GetValue()
			}
		}
	}
	return 0
}

func (r *rig) eventually(what string, f func() bool) {
	r.t.Helper()
	r.within(20*time.Second, what, f)
}

func (r *rig) within(d time.Duration, what string, f func() bool) {
	r.t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(d); !f(); {
		if time.Now().After(end) {
			r.t.Fatalf("not in time: %s", what)
		}
		<-tick.C
	}
}

// running job that a worker holds.
func (r *rig) assigned() bus.Entry {
	spec, problems := job.Normalise(job.Spec{Command: job.Command{Shell: "true"}})
	require.Empty(r.t, problems)
	now := time.Now()
	e, err := r.conn.Registry().Create(r.t.Context(), job.New(id.New(id.Job, now), "alice", spec, now))
	require.NoError(r.t, err)
	return r.assign(e)
}

func (r *rig) assign(e bus.Entry) bus.Entry {
	e, err := r.conn.Registry().TransitionFrom(r.t.Context(), e, job.Assign{WorkerID: "worker-a", LeaseID: id.New(id.Lease, time.Now())})
	require.NoError(r.t, err)
	return e
}

func lease(e bus.Entry) workerproto.Lease {
	return workerproto.Lease{JobID: e.Record.ID, Attempt: e.Record.Attempt, LeaseID: e.Record.LeaseID}
}

// result is what the edge publishes when the job's worker reports success.
func result(e bus.Entry, tail ...workerproto.Chunk) busmsg.Result {
	code := 0
	now := time.Now().UTC()
	return busmsg.Result{
		Result: workerproto.Result{
			WorkerID: e.Record.WorkerID, Lease: lease(e), Outcome: job.OutcomeSucceeded, ExitCode: &code,
			StartedAt: now, FinishedAt: now, Tail: tail, Manifest: declare(tail...),
		},
		EdgeID: "edge-1", ReceivedAt: now,
	}
}

func chunk(seq int64, data string) workerproto.Chunk {
	return workerproto.Chunk{Seq: seq, Stream: workerproto.Stdout, Time: job.Timestamp(time.Now()), Data: []byte(data)}
}

func (r *rig) publish(results ...busmsg.Result) {
	r.t.Helper()
	for _, res := range results {
		require.NoError(r.t, r.conn.PublishResult(r.t.Context(), res))
	}
}

func (r *rig) publishChunks(e bus.Entry, chunks ...workerproto.Chunk) {
	r.t.Helper()
	var frames [][]byte
	for _, c := range chunks {
		f, err := workerproto.EncodeChunk(lease(e), c)
		require.NoError(r.t, err)
		frames = append(frames, f)
	}
	n, err := r.conn.PublishChunks(r.t.Context(), e.Record.ID, frames)
	require.NoError(r.t, err)
	require.Equal(r.t, len(frames), n)
}

func (r *rig) get(e bus.Entry) bus.Entry {
	have, err := r.conn.Registry().GetLatest(r.t.Context(), e.Record.ID)
	require.NoError(r.t, err)
	return have
}

func (r *rig) pending(name bus.ConsumerName) uint64 {
	n, err := r.conn.Pending(r.t.Context(), name)
	require.NoError(r.t, err)
	return n
}

func (r *rig) settled() {
	r.t.Helper()
	// What was on its way to a collector when the server went comes again after 30 s.
	r.within(time.Minute, "everything is acknowledged", func() bool {
		return r.pending(bus.ResultsState) == 0 && r.pending(bus.ResultsArchive) == 0 && r.pending(bus.LogsArchive) == 0
	})
}

func (r *rig) output(e bus.Entry) (string, busmsg.Logs) {
	r.t.Helper()
	logs, err := r.db.Logs(r.t.Context(), busmsg.GetLogs{JobID: e.Record.ID, Attempt: e.Record.Attempt})
	require.NoError(r.t, err)
	var b strings.Builder
	for _, c := range logs.Chunks {
		b.Write(c.Data)
	}
	return b.String(), logs
}

func (r *rig) deadLetters() []busmsg.DeadLetter {
	var out []busmsg.DeadLetter
	require.NoError(r.t, r.conn.DeadLetters(r.t.Context(), func(d busmsg.DeadLetter) error {
		out = append(out, d)
		return nil
	}))
	return out
}

func TestResultBecomesStateAndOutputIsKept(t *testing.T) {
	r := newRig(t)
	c := r.start(r.db)
	e := r.assigned()
	r.publishChunks(e, chunk(1, "one\n"), chunk(2, "two\n"))
	r.publish(result(e, chunk(3, "three\n")))
	r.eventually("the job ended", func() bool { return r.get(e).Record.State == job.Succeeded })
	r.settled()
	text, logs := r.output(e)
	require.Equal(t, "one\ntwo\nthree\n", text)
	require.EqualValues(t, 3, logs.StoredChunks)
	require.EqualValues(t, 1, c.results(t, "applied"))
	require.NoError(t, c.Ready())
	require.Empty(t, r.deadLetters())
}

// TestHundredDifferentResults: whatever is reported for one lease, and however
// often, one of them is recorded, once.
func TestHundredDifferentResults(t *testing.T) {
	r := newRig(t)
	e := r.assigned()
	var all []busmsg.Result
	for i := range 100 {
		res := result(e)
		code := i % 3
		res.ExitCode = &code
		if code != 0 {
			res.Outcome = job.OutcomeFailed
		}
		res.Message, res.CPUMs = fmt.Sprintf("variant %d", i), int64(i)
		all = append(all, res)
	}
	r.publish(all...)
	c := r.start(r.db)
	r.settled()
	first := r.get(e)
	require.True(t, first.Record.State.Terminal())
	require.Equal(t, e.Record.Version+1, first.Record.Version, "one transition")
	require.Len(t, first.Record.Attempts, 1)
	require.EqualValues(t, 1, c.results(t, "applied"))
	require.EqualValues(t, 99, c.results(t, "terminal")+c.results(t, "stale"))
	r.publish(all...)
	r.eventually("all are answered", func() bool { return c.results(t, "terminal")+c.results(t, "stale") == 199 })
	require.Equal(t, first, r.get(e))
}

func TestStaleResultsChangeNothing(t *testing.T) {
	r := newRig(t)
	c := r.start(r.db)
	e := r.assigned()
	otherLease, otherAttempt, otherWorker := result(e), result(e), result(e)
	otherLease.LeaseID = id.New(id.Lease, time.Now())
	otherAttempt.Attempt = 7
	otherWorker.WorkerID = "worker-b"
	never := result(e)
	never.JobID = id.New(id.Job, time.Now())
	r.publish(otherLease, otherAttempt, otherWorker, never)
	r.settled()
	require.Equal(t, e, r.get(e))
	require.EqualValues(t, 3, c.results(t, "stale"))
	require.EqualValues(t, 1, c.results(t, "missing"))
	_, err := r.conn.Registry().GetLatest(t.Context(), never.JobID)
	require.ErrorIs(t, err, bus.ErrNotFound, "a result creates nothing")

	// Its lease ran out, it waits for another worker, and then the first reports.
	_, err = r.conn.Registry().TransitionFrom(t.Context(), e, job.Lost{Fence: e.Record.Fence()})
	require.NoError(t, err)
	r.publish(result(e))
	r.eventually("it did the work after all", func() bool { return r.get(e).Record.State == job.Succeeded })
	require.Zero(t, r.get(e).Record.InfraFailures)
}

func TestPoisonIsKeptApart(t *testing.T) {
	r := newRig(t)
	c := r.start(r.db)
	e := r.assigned()
	bad := result(e, chunk(1, "never stored"))
	bad.Outcome = "exploded"
	badChunk := result(e, chunk(0, "seq 0"))
	r.publish(bad, badChunk)
	frame, err := workerproto.EncodeChunk(lease(e), chunk(1, "good"))
	require.NoError(t, err)
	invalid, err := workerproto.EncodeChunk(lease(e), chunk(-3, "seq below 1"))
	require.NoError(t, err)
	huge, err := workerproto.EncodeChunk(lease(e), chunk(2, strings.Repeat("x", workerproto.MaxChunkBytes+1)))
	require.NoError(t, err)
	other := r.assigned()
	foreign, err := workerproto.EncodeChunk(lease(other), chunk(1, "of another job"))
	require.NoError(t, err)
	_, err = r.conn.PublishChunks(t.Context(), e.Record.ID, [][]byte{[]byte("garbage"), invalid, frame, huge, foreign})
	require.NoError(t, err)
	r.publish(result(e))
	r.eventually("the good result counts", func() bool { return r.get(e).Record.State == job.Succeeded })
	r.settled()
	text, _ := r.output(e)
	require.Equal(t, "good", text)
	text, _ = r.output(other)
	require.Empty(t, text)
	require.EqualValues(t, 2, c.results(t, "poison"))
	byConsumer := map[string]int{}
	for _, d := range r.deadLetters() {
		byConsumer[d.Consumer]++
		require.NotEmpty(t, d.Reason)
	}
	require.Equal(t, map[string]int{string(bus.ResultsState): 2, string(bus.LogsArchive): 4}, byConsumer, "each is kept once")
}

// faulty is a store whose faults are chosen.
type faulty struct {
	store.Store
	down  atomic.Bool
	after atomic.Pointer[func()] // called after a successful append, which then fails
}

func (f *faulty) AppendChunks(ctx context.Context, chunks []store.LogChunk, manifests ...store.LogManifest) error {
	if f.down.Load() {
		return errors.New("database is locked")
	}
	err := f.Store.AppendChunks(ctx, chunks, manifests...)
	if then := f.after.Load(); then != nil && err == nil {
		(*then)()
		return errors.New("died before the acknowledgement")
	}
	return err
}

func TestDatabaseAwayDelaysOutputOnly(t *testing.T) {
	r := newRig(t)
	db := &faulty{Store: r.db}
	db.down.Store(true)
	r.start(db)
	var all []bus.Entry
	for i := range 20 {
		e := r.assigned()
		r.publishChunks(e, chunk(1, fmt.Sprintf("job %d ", i)), chunk(2, "and "))
		r.publish(result(e, chunk(3, "its tail")))
		all = append(all, e)
	}
	for _, e := range all {
		r.eventually("states go on", func() bool { return r.get(e).Record.State == job.Succeeded })
	}
	r.eventually("states are acknowledged", func() bool { return r.pending(bus.ResultsState) == 0 })
	require.Positive(t, r.pending(bus.ResultsArchive))
	require.Positive(t, r.pending(bus.LogsArchive))
	db.down.Store(false)
	r.settled()
	for i, e := range all {
		text, _ := r.output(e)
		require.Equal(t, fmt.Sprintf("job %d and its tail", i), text)
	}
}

func TestRestartBetweenStoreAndAck(t *testing.T) {
	r := newRig(t)
	db := &faulty{Store: r.db}
	wrote := make(chan struct{})
	once := sync.OnceFunc(func() { close(wrote) })
	db.after.Store(&once)
	dying := r.start(db)
	e := r.assigned()
	r.publishChunks(e, chunk(1, "once"))
	<-wrote
	dying.stop()
	require.Positive(t, r.pending(bus.LogsArchive))
	r.start(r.db)
	r.settled()
	text, logs := r.output(e)
	require.Equal(t, "once", text)
	require.EqualValues(t, 1, logs.StoredChunks)
	require.EqualValues(t, len("once"), logs.StoredBytes)
}

func TestTwoCollectorsAndAServerRestart(t *testing.T) {
	r := newRig(t)
	a, b := r.start(r.db), r.start(r.db)
	var all []bus.Entry
	submit := func() {
		for range 40 {
			e := r.assigned()
			r.publishChunks(e, chunk(1, "a"))
			r.publish(result(e, chunk(2, "b")))
			all = append(all, e)
		}
	}
	submit()
	before := r.conn.ServerID()
	r.host.server.Load().Shutdown()
	r.host.server.Store(natsdtest.StartIn(t, r.dir))
	r.eventually("connected again", func() bool { return r.conn.ServerID() != before && r.conn.Ready() == nil })
	submit()
	for _, e := range all {
		r.eventually("ended", func() bool { return r.get(e).Record.State == job.Succeeded })
		require.Equal(t, e.Record.Version+1, r.get(e).Record.Version)
	}
	r.settled()
	for _, e := range all {
		text, _ := r.output(e)
		require.Equal(t, "ab", text)
	}
	// A result whose write was not answered because the server went is proposed
	// again and found terminal; no more than one was applied for each job.
	require.LessOrEqual(t, a.results(t, "applied")+b.results(t, "applied"), float64(len(all)))
}

func TestStreamsAreTrimmed(t *testing.T) {
	r := newRig(t)
	e := r.assigned()
	r.publishChunks(e, chunk(1, "kept until stored"))
	seen := func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		found := false
		_ = r.conn.FollowLogs(ctx, e.Record.ID, func(workerproto.Lease, workerproto.Chunk) { found = true; cancel() }) // ends with ctx
		return found
	}
	require.True(t, seen())
	r.start(r.db)
	r.settled()
	r.eventually("LOGS is empty", func() bool { return !seen() })
	text, _ := r.output(e)
	require.Equal(t, "kept until stored", text)
}

func TestNewRefuses(t *testing.T) {
	r := newRig(t)
	_, err := collector.New(collector.Deps{Bus: r.conn})
	require.Error(t, err)
	_, err = collector.New(collector.Deps{Store: r.db})
	require.Error(t, err)
}

func TestStopsWhileWaitingForTheTopology(t *testing.T) {
	h := &host{}
	h.server.Store(natsdtest.Start(t))
	conn, err := bus.Connect(t.Context(), bus.Options{InProcess: h, Name: "test"})
	require.NoError(t, err)
	t.Cleanup(conn.Close)
	db, err := sqlitestore.Open(t.Context(), filepath.Join(t.TempDir(), "jobs.db"))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, db.Close()) })
	c, err := collector.New(collector.Deps{Bus: conn, Store: db})
	require.NoError(t, err)
	require.Error(t, c.Ready(), "nothing is bound")
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	require.NoError(t, c.Run(ctx))
}
