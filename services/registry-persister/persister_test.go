package persister_test

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
	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/natsd"
	"github.com/cmdexec/cmdexec/libs/natsd/natsdtest"
	"github.com/cmdexec/cmdexec/libs/store"
	"github.com/cmdexec/cmdexec/libs/store/sqlitestore"
	persister "github.com/cmdexec/cmdexec/services/registry-persister"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// clock is a clock that tests move forward, and that goes by itself unless it stands.
type clock struct {
	ahead  atomic.Int64
	stands atomic.Pointer[time.Time]
}

func (c *clock) now() time.Time {
	at := time.Now()
	if t := c.stands.Load(); t != nil {
		at = *t
	}
	return at.Add(time.Duration(c.ahead.Load()))
}

func (c *clock) stop() {
	now := time.Now()
	c.stands.Store(&now)
}

func (c *clock) advance(d time.Duration) { c.ahead.Add(int64(d)) }

// host leads connections to the server that runs at the moment.
type host struct{ server atomic.Pointer[natsd.Server] }

func (h *host) InProcessConn() (net.Conn, error) { return h.server.Load().InProcessConn() }

// rig is a bus and a database, with the test in the place of all other services.
type rig struct {
	t     *testing.T
	dir   string
	host  *host
	conn  *bus.Conn
	db    store.Store
	clock *clock
	log   *slog.Logger
}

func newRig(t *testing.T) *rig {
	r := &rig{t: t, dir: t.TempDir(), host: &host{}, clock: &clock{}, log: slog.New(slog.NewTextHandler(t.Output(), nil))}
	r.host.server.Store(natsdtest.StartIn(t, r.dir))
	r.conn = r.connect()
	require.NoError(t, bus.Apply(t.Context(), r.conn, bus.Sizes{Jobs: 64 << 20, Results: 64 << 20, Logs: 64 << 20}))
	require.NoError(t, r.conn.Bind(t.Context()))
	r.db = r.open("jobs.db")
	return r
}

func (r *rig) connect() *bus.Conn {
	c, err := bus.Connect(r.t.Context(), bus.Options{InProcess: r.host, Name: "test", Logger: r.log})
	require.NoError(r.t, err)
	r.t.Cleanup(c.Close)
	return c
}

func (r *rig) open(name string) store.Store {
	db, err := sqlitestore.Open(r.t.Context(), filepath.Join(r.t.TempDir(), name))
	require.NoError(r.t, err)
	r.t.Cleanup(func() { require.NoError(r.t, db.Close()) })
	return db
}

// running is a persister that runs.
type running struct {
	*persister.Service
	metrics *prometheus.Registry
	stop    func()
}

// start runs a persister until the test, or stop, ends it.
func (r *rig) start(db store.Store, cfg persister.Config) running {
	out := running{metrics: prometheus.NewRegistry()}
	var err error
	out.Service, err = persister.New(cfg, persister.Deps{
		Bus: r.connect(), Store: db, Logger: r.log, Metrics: out.metrics, Clock: r.clock.now,
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

// metric sums a counter over the labels that contain all of the given values.
func (p running) metric(t *testing.T, name string, labels ...string) float64 {
	t.Helper()
	families, err := p.metrics.Gather()
	require.NoError(t, err)
	sum := 0.0
	for _, f := range families {
		if f.GetName() != "cmdexec_persister_"+name {
			continue
		}
		for _, m := range f.GetMetric() {
			if strings.Contains(fmt.Sprint(m.GetLabel()), strings.Join(labels, " ")) {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return sum
}

func (r *rig) eventually(what string, f func() bool) {
	r.t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(20 * time.Second); !f(); {
		if time.Now().After(end) {
			r.t.Fatalf("not in time: %s", what)
		}
		<-tick.C
	}
}

// newJob makes a record whose id says that it was created at a time. Its
// CreatedAt is that time too.
func (r *rig) newJob(created time.Time) job.Record {
	spec, problems := job.Normalise(job.Spec{Command: job.Command{Shell: "true"}})
	require.Empty(r.t, problems)
	return job.New(id.New(id.Job, created), "alice", spec, created)
}

func (r *rig) create(rec job.Record) bus.Entry {
	e, err := r.conn.Registry().Create(r.t.Context(), rec)
	require.NoError(r.t, err)
	return e
}

func (r *rig) apply(e bus.Entry, ev job.Event) bus.Entry {
	next, err := r.conn.Registry().TransitionFrom(r.t.Context(), e, ev)
	require.NoError(r.t, err)
	return next
}

func (r *rig) run(e bus.Entry) bus.Entry {
	return r.apply(e, job.Assign{WorkerID: "worker-a", LeaseID: id.New(id.Lease, time.Now())})
}

func succeeded(e bus.Entry) job.Result {
	code := 0
	return job.Result{Fence: e.Record.Fence(), WorkerID: e.Record.WorkerID, Outcome: job.OutcomeSucceeded, ExitCode: &code, FinishedAt: time.Now()}
}

// finish takes a job through its life.
func (r *rig) finish(rec job.Record) bus.Entry {
	e := r.run(r.create(rec))
	return r.apply(e, succeeded(e))
}

func (r *rig) live(jobID string) bool {
	_, err := r.conn.Registry().GetLatest(r.t.Context(), jobID)
	if !errors.Is(err, bus.ErrNotFound) {
		require.NoError(r.t, err)
	}
	return err == nil
}

// has reports whether the database has that version of a job, or a newer one.
func (r *rig) has(db store.Store, e bus.Entry) bool {
	have, err := db.Job(r.t.Context(), e.Record.ID)
	if !errors.Is(err, store.ErrNotFound) {
		require.NoError(r.t, err)
	}
	return err == nil && have.Version >= e.Record.Version
}

func (r *rig) same(db store.Store, want job.Record) {
	r.t.Helper()
	have, err := db.Job(r.t.Context(), want.ID)
	require.NoError(r.t, err)
	require.Equal(r.t, want, have)
}

func TestFollowsTheRegistryAndAnswers(t *testing.T) {
	r := newRig(t)
	p := r.start(r.db, persister.Config{})
	before := time.Now()
	done := r.finish(r.newJob(time.Now()))
	live := r.run(r.create(r.newJob(time.Now())))
	r.eventually("both are stored", func() bool { return r.has(r.db, done) && r.has(r.db, live) })
	require.NoError(t, p.Ready())

	got, err := bus.Query(t.Context(), r.conn, bus.QueryJob, busmsg.GetJob{JobID: done.Record.ID})
	require.NoError(t, err)
	require.Equal(t, done.Record, got)

	var page busmsg.JobPage
	r.eventually("the list is of now", func() bool {
		page, err = bus.Query(t.Context(), r.conn, bus.QueryJobs, busmsg.ListJobs{Owner: "alice", Limit: 10})
		require.NoError(t, err)
		require.Len(t, page.Items, 2)
		return page.AsOf.After(before.Add(time.Second))
	})
	require.False(t, page.AsOf.After(time.Now()))
	require.Empty(t, page.Items[0].Attempts)

	stats, err := bus.Query(t.Context(), r.conn, bus.QueryStats, struct{}{})
	require.NoError(t, err)
	require.Equal(t, map[job.State]int64{job.Succeeded: 1, job.Assigned: 1}, stats.ByState)
	require.False(t, stats.AsOf.IsZero())

	require.NoError(t, r.db.AppendChunks(t.Context(), []store.LogChunk{{JobID: done.Record.ID, Attempt: 1, Chunk: workerproto.Chunk{
		Seq: 1, Stream: workerproto.Stdout, Time: job.Timestamp(time.Now()), Data: []byte("out"),
	}}}))
	logs, err := bus.Query(t.Context(), r.conn, bus.QueryLogs, busmsg.GetLogs{JobID: done.Record.ID, Attempt: 1})
	require.NoError(t, err)
	require.Len(t, logs.Chunks, 1)
	require.Equal(t, "out", string(logs.Chunks[0].Data))
}

// TestBadOutputIsShownWithItsJob: a job of the database says that its stored output
// is not what was declared; the registry does not.
func TestBadOutputIsShownWithItsJob(t *testing.T) {
	r := newRig(t)
	r.start(r.db, persister.Config{})
	e := r.create(r.newJob(time.Now()))
	e, err := r.conn.Registry().TransitionFrom(t.Context(), e, job.Assign{WorkerID: "worker-a", LeaseID: id.New(id.Lease, time.Now())})
	require.NoError(t, err)
	code := 0
	declared := job.Manifest{Chunks: 2, Bytes: 8, SHA256: strings.Repeat("ab", 32)}
	e, err = r.conn.Registry().TransitionFrom(t.Context(), e, job.Result{
		Fence: e.Record.Fence(), WorkerID: "worker-a", Outcome: job.OutcomeSucceeded, ExitCode: &code,
		StartedAt: time.Now(), FinishedAt: time.Now(), Manifest: &declared,
	})
	require.NoError(t, err)
	r.eventually("stored", func() bool { return r.has(r.db, e) })
	incomplete := func() bool {
		got, err := bus.Query(t.Context(), r.conn, bus.QueryJob, busmsg.GetJob{JobID: e.Record.ID})
		require.NoError(t, err)
		flag := got.Last().LogsIncomplete
		require.Equal(t, !flag, api.FromRecord(&got).Logs.Complete)
		got.Last().LogsIncomplete = false
		require.Equal(t, e.Record, got)
		return flag
	}
	for _, c := range []struct {
		verdict busmsg.LogVerdict
		want    bool
	}{{busmsg.LogComplete, false}, {busmsg.LogIncomplete, true}, {busmsg.LogDiffers, true}} {
		require.False(t, incomplete())
		require.NoError(t, r.db.AppendChunks(t.Context(), nil, store.LogManifest{JobID: e.Record.ID, Attempt: 1, Manifest: declared}))
		notes, err := r.db.UncheckedLogs(t.Context(), time.Now().Add(time.Minute), 2)
		require.NoError(t, err)
		require.Len(t, notes, 1)
		taken, err := r.db.JudgeLogs(t.Context(), notes[0], c.verdict)
		require.NoError(t, err)
		require.True(t, taken)
		require.Equal(t, c.want, incomplete())
		seq := map[busmsg.LogVerdict]int64{busmsg.LogComplete: 1, busmsg.LogIncomplete: 2, busmsg.LogDiffers: 3}[c.verdict]
		require.NoError(t, r.db.AppendChunks(t.Context(), []store.LogChunk{{JobID: e.Record.ID, Attempt: 1, Chunk: workerproto.Chunk{
			Seq: seq, Stream: workerproto.Stdout, Time: job.Timestamp(time.Now()), Data: []byte("late"),
		}}}))
	}
}

func TestQueryErrors(t *testing.T) {
	r := newRig(t)
	broken := &faulty{Store: r.db}
	p := r.start(broken, persister.Config{})
	r.eventually("ready", func() bool { return p.Ready() == nil })
	ask := func(f func() error) string {
		var q *busmsg.QueryError
		require.ErrorAs(t, f(), &q)
		return q.Code
	}
	getJob := func(jobID string) func() error {
		return func() error {
			_, err := bus.Query(t.Context(), r.conn, bus.QueryJob, busmsg.GetJob{JobID: jobID})
			return err
		}
	}
	jobs := func(q busmsg.ListJobs) func() error {
		return func() error { _, err := bus.Query(t.Context(), r.conn, bus.QueryJobs, q); return err }
	}
	logs := func(q busmsg.GetLogs) func() error {
		return func() error { _, err := bus.Query(t.Context(), r.conn, bus.QueryLogs, q); return err }
	}
	absent := id.New(id.Job, time.Now())
	require.Equal(t, busmsg.CodeNotFound, ask(getJob(absent)))
	require.Equal(t, busmsg.CodeBadRequest, ask(getJob("job-'; DROP TABLE jobs")))
	require.Equal(t, busmsg.CodeBadRequest, ask(jobs(busmsg.ListJobs{States: []job.State{"sleeping"}})))
	require.Equal(t, busmsg.CodeBadRequest, ask(logs(busmsg.GetLogs{JobID: absent})))
	require.Equal(t, busmsg.CodeBadRequest, ask(logs(busmsg.GetLogs{JobID: absent, Attempt: 1, Stream: "x"})))
	broken.down.Store(true)
	require.Equal(t, busmsg.CodeUnavailable, ask(getJob(absent)), "never not_found")
	require.Equal(t, busmsg.CodeUnavailable, ask(jobs(busmsg.ListJobs{})))
	require.Equal(t, busmsg.CodeUnavailable, ask(logs(busmsg.GetLogs{JobID: absent, Attempt: 1})))
	require.Error(t, p.Ready())
}

func TestEndedJobsLeaveAfterTheirGrace(t *testing.T) {
	r := newRig(t)
	p := r.start(r.db, persister.Config{})
	plain := r.finish(r.newJob(time.Now()))
	keyedRec := r.newJob(time.Now()).WithIdempotency()
	keyedRec.ID = id.Keyed("alice", "key-1")
	keyed := r.finish(keyedRec)
	live := r.run(r.create(r.newJob(time.Now())))
	r.eventually("stored", func() bool { return r.has(r.db, plain) && r.has(r.db, keyed) && r.has(r.db, live) })
	require.True(t, r.live(plain.Record.ID), "the grace is not over")

	r.clock.advance(6 * time.Second)
	r.eventually("the plain job left", func() bool { return !r.live(plain.Record.ID) })
	require.True(t, r.live(keyed.Record.ID), "the key still refuses repeats")
	r.clock.advance(9 * time.Minute)
	sentinel := r.finish(r.newJob(time.Now()))
	r.clock.advance(6 * time.Second)
	r.eventually("a round went by", func() bool { return !r.live(sentinel.Record.ID) })
	require.True(t, r.live(keyed.Record.ID), "under ten minutes")
	_, err := r.conn.Registry().Create(t.Context(), keyedRec)
	require.ErrorIs(t, err, bus.ErrExists)

	r.clock.advance(time.Minute)
	r.eventually("the keyed job left", func() bool { return !r.live(keyed.Record.ID) })
	require.True(t, r.live(live.Record.ID))
	r.same(r.db, plain.Record)
	r.same(r.db, keyed.Record)
	r.eventually("counted", func() bool { return p.metric(t, "purged_jobs_total", "single") == 3 })
}

// TestGroupPurgeLeavesLiveJobsAlone: one purge takes most of a group; its live
// jobs, a keyed one in its grace, and ended ones behind them are untouched by it.
func TestGroupPurgeLeavesLiveJobsAlone(t *testing.T) {
	r := newRig(t)
	r.clock.stop() // nothing is purged while the jobs are made, however long that takes
	p := r.start(r.db, persister.Config{})
	created := time.Now().Add(-2 * time.Minute) // the group's time is over
	var done []bus.Entry
	for range 60 {
		done = append(done, r.finish(r.newJob(created)))
	}
	live := r.run(r.create(r.newJob(created)))
	keyedRec := r.newJob(created).WithIdempotency() // its id happens to be in the group
	keyed := r.finish(keyedRec)
	queued := r.create(r.newJob(created))
	var behind []bus.Entry
	for range 10 {
		behind = append(behind, r.finish(r.newJob(created)))
	}
	other := r.create(r.newJob(created.Add(-time.Hour)))
	r.eventually("stored", func() bool { return r.has(r.db, behind[9]) && r.has(r.db, other) })
	r.clock.advance(30 * time.Second)
	r.eventually("all ended ones left", func() bool { return p.metric(t, "waiting_jobs") == 1 })
	for _, e := range append(done, behind...) {
		require.False(t, r.live(e.Record.ID))
		r.same(r.db, e.Record)
	}
	for _, e := range []bus.Entry{live, keyed, queued, other} {
		have, err := r.conn.Registry().GetLatest(t.Context(), e.Record.ID)
		require.NoError(t, err)
		require.Equal(t, e, have)
	}
	require.EqualValues(t, 60, p.metric(t, "purged_jobs_total", "group"))
	r.eventually("counted", func() bool { return p.metric(t, "purged_jobs_total", "single") == 10 })
	ended := r.apply(live, succeeded(live))
	require.Equal(t, job.Succeeded, ended.Record.State, "the live job goes on")
}

// TestTwoPersisters: each knows only what it stored; together they lose nothing
// and leave nothing behind.
func TestTwoPersisters(t *testing.T) {
	r := newRig(t)
	a := r.start(r.db, persister.Config{})
	b := r.start(r.db, persister.Config{})
	created := time.Now().Add(-2 * time.Minute)
	var done, live []bus.Entry
	for i := range 150 {
		done = append(done, r.finish(r.newJob(created)))
		if i%50 == 25 {
			live = append(live, r.run(r.create(r.newJob(created))))
		}
	}
	for _, e := range append(done, live...) {
		r.eventually("stored", func() bool { return r.has(r.db, e) })
	}
	require.Positive(t, a.metric(t, "records_total", "written"))
	require.Positive(t, b.metric(t, "records_total", "written"))
	r.clock.advance(time.Minute)
	r.eventually("ended jobs left", func() bool {
		for _, e := range done {
			if r.live(e.Record.ID) {
				return false
			}
		}
		return true
	})
	for _, e := range live {
		have, err := r.conn.Registry().GetLatest(t.Context(), e.Record.ID)
		require.NoError(t, err)
		require.Equal(t, e, have)
	}
	for _, e := range done {
		r.same(r.db, e.Record)
	}
}

// faulty is a store whose faults are chosen.
type faulty struct {
	store.Store
	down   atomic.Bool
	keeps  atomic.Bool            // nothing can be deleted
	after  atomic.Pointer[func()] // called after a successful upsert, which then fails
	poison atomic.Pointer[string] // id of a job that cannot be stored
}

var errDown = errors.New("database is locked")

func (f *faulty) UpsertJobs(ctx context.Context, recs []job.Record) (store.Upserted, error) {
	if f.down.Load() {
		return store.Upserted{}, errDown
	}
	var rejected []store.Rejected
	if bad := f.poison.Load(); bad != nil {
		var rest []job.Record
		for _, rec := range recs {
			if rec.ID == *bad {
				rejected = append(rejected, store.Rejected{ID: rec.ID, Err: errors.New("violates a constraint")})
			} else {
				rest = append(rest, rec)
			}
		}
		recs = rest
	}
	up, err := f.Store.UpsertJobs(ctx, recs)
	up.Poison = append(up.Poison, rejected...)
	if then := f.after.Load(); then != nil && err == nil && len(recs) > 0 {
		(*then)()
		return store.Upserted{}, errors.New("died before the acknowledgement")
	}
	return up, err
}

func (f *faulty) DeleteFinished(ctx context.Context, before time.Time, limit int) (int, error) {
	if f.keeps.Load() {
		return 0, errDown
	}
	return f.Store.DeleteFinished(ctx, before, limit)
}

func (f *faulty) Job(ctx context.Context, jobID string) (job.Record, error) {
	if f.down.Load() {
		return job.Record{}, errDown
	}
	return f.Store.Job(ctx, jobID)
}

func (f *faulty) ListJobs(ctx context.Context, q busmsg.ListJobs) ([]job.Record, bool, error) {
	if f.down.Load() {
		return nil, false, errDown
	}
	return f.Store.ListJobs(ctx, q)
}

func (f *faulty) Logs(ctx context.Context, q busmsg.GetLogs) (busmsg.Logs, error) {
	if f.down.Load() {
		return busmsg.Logs{}, errDown
	}
	return f.Store.Logs(ctx, q)
}

func (f *faulty) TerminalVersions(ctx context.Context, ids []string) (map[string]uint64, error) {
	if f.down.Load() {
		return nil, errDown
	}
	return f.Store.TerminalVersions(ctx, ids)
}

func (f *faulty) Ping(ctx context.Context) error {
	if f.down.Load() {
		return errDown
	}
	return f.Store.Ping(ctx)
}

func TestRestartBetweenBulkAndAck(t *testing.T) {
	r := newRig(t)
	db := &faulty{Store: r.db}
	dying := r.start(db, persister.Config{})
	r.eventually("ready", func() bool { return dying.Ready() == nil })
	wrote := make(chan struct{})
	die := func() {}
	stopped := sync.OnceFunc(func() { close(wrote) })
	die = func() { stopped() }
	db.after.Store(&die)
	e := r.finish(r.newJob(time.Now()))
	<-wrote
	dying.stop() // every batch was written and none acknowledged
	db.after.Store(nil)

	pending, err := r.conn.Pending(t.Context(), bus.JobsProjection)
	require.NoError(t, err)
	require.Positive(t, pending)
	second := r.start(db, persister.Config{})
	r.eventually("acknowledged", func() bool {
		pending, err := r.conn.Pending(t.Context(), bus.JobsProjection)
		require.NoError(t, err)
		return pending == 0
	})
	r.eventually("stored", func() bool { return r.has(r.db, e) })
	r.same(r.db, e.Record)
	r.clock.advance(6 * time.Second)
	r.eventually("left the registry", func() bool { return !r.live(e.Record.ID) })
	require.Positive(t, second.metric(t, "records_total", "stale")+second.metric(t, "records_total", "written"))
}

func TestDatabaseAwayLosesNothing(t *testing.T) {
	r := newRig(t)
	db := &faulty{Store: r.db}
	p := r.start(db, persister.Config{})
	r.eventually("ready", func() bool { return p.Ready() == nil })
	db.down.Store(true)
	var done []bus.Entry
	for range 30 {
		done = append(done, r.finish(r.newJob(time.Now().Add(-time.Minute))))
	}
	r.clock.advance(10 * time.Minute) // also past the time of a sweep
	r.eventually("upkeep noticed", func() bool { return p.metric(t, "upkeep_failures_total", "sweep") > 0 })
	for _, e := range done {
		require.True(t, r.live(e.Record.ID), "nothing leaves the registry that is not stored")
	}
	db.down.Store(false)
	r.eventually("all are stored and left", func() bool {
		for _, e := range done {
			if !r.has(r.db, e) || r.live(e.Record.ID) {
				return false
			}
		}
		return true
	})
	for _, e := range done {
		r.same(r.db, e.Record)
	}
}

func TestPoisonRecordDoesNotWedge(t *testing.T) {
	r := newRig(t)
	db := &faulty{Store: r.db}
	bad := r.newJob(time.Now())
	db.poison.Store(&bad.ID)
	p := r.start(db, persister.Config{})
	badEnd := r.finish(bad)
	good := r.finish(r.newJob(time.Now()))
	r.eventually("the good one is stored", func() bool { return r.has(r.db, good) })
	var letters []busmsg.DeadLetter
	r.eventually("a dead letter is kept", func() bool {
		letters = nil
		require.NoError(t, r.conn.DeadLetters(t.Context(), func(d busmsg.DeadLetter) error {
			letters = append(letters, d)
			return nil
		}))
		return len(letters) > 0
	})
	require.Contains(t, letters[0].Reason, "violates a constraint")
	r.clock.advance(time.Minute)
	r.eventually("the good one left", func() bool { return !r.live(good.Record.ID) })
	require.True(t, r.live(badEnd.Record.ID), "what is not stored stays in the registry")
	require.Positive(t, p.metric(t, "records_total", "poison"))
}

// TestSweepFillsANewDatabase: the consumer has acknowledged everything, but this
// database never had it.
func TestSweepFillsANewDatabase(t *testing.T) {
	r := newRig(t)
	first := r.start(r.db, persister.Config{})
	done := r.finish(r.newJob(time.Now()))
	live := r.run(r.create(r.newJob(time.Now())))
	r.eventually("stored and acknowledged", func() bool {
		pending, err := r.conn.Pending(t.Context(), bus.JobsProjection)
		require.NoError(t, err)
		return pending == 0 && r.has(r.db, done) && r.has(r.db, live)
	})
	first.stop()
	fresh := r.open("fresh.db")
	second := r.start(fresh, persister.Config{})
	r.eventually("stored again", func() bool { return r.has(fresh, done) && r.has(fresh, live) })
	r.same(fresh, live.Record)
	r.clock.advance(6 * time.Second)
	r.eventually("left", func() bool { return !r.live(done.Record.ID) })
	require.EqualValues(t, 1, second.metric(t, "repaired_jobs_total"))
}

// A durable consumer of a cluster that was divided may skip a message. Some time
// after a failure the registry is swept, so that the database has all ends soon.
func TestSweepAfterAFailure(t *testing.T) {
	r := newRig(t)
	db := &faulty{Store: r.db}
	db.keeps.Store(true)
	p := r.start(db, persister.Config{JobRetentionDays: 30})
	r.eventually("something fails behind the first sweep", func() bool { return p.metric(t, "upkeep_failures_total", "retention") > 0 })
	// Somebody else acknowledges what it does not store.
	ctx, cancel := context.WithCancel(t.Context())
	eating := make(chan error, 1)
	go func() {
		eating <- r.connect().ConsumeBatch(ctx, bus.JobsProjection, bus.BatchOptions{}, func(context.Context, []bus.Msg) error { return nil })
	}()
	var lost []bus.Entry
	r.eventually("a message is lost", func() bool {
		e := r.finish(r.newJob(time.Now()))
		r.eventually("acknowledged", func() bool {
			pending, err := r.conn.Pending(t.Context(), bus.JobsProjection)
			require.NoError(t, err)
			return pending == 0
		})
		if !r.has(r.db, e) {
			lost = append(lost, e)
		}
		return len(lost) > 0
	})
	cancel()
	<-eating
	db.keeps.Store(false)
	require.Zero(t, p.metric(t, "repaired_jobs_total"))
	r.clock.advance(20 * time.Second)
	r.eventually("repaired", func() bool { return r.has(r.db, lost[0]) && p.metric(t, "repaired_jobs_total") > 0 })
}

// restart starts the server anew on the same data.
func (r *rig) restart() {
	before := r.conn.ServerID()
	r.host.server.Load().Shutdown()
	r.host.server.Store(natsdtest.StartIn(r.t, r.dir))
	r.eventually("connected again", func() bool { return r.conn.ServerID() != before && r.conn.Ready() == nil })
}

func (r *rig) swept() string {
	s, err := r.conn.Swept(r.t.Context())
	require.NoError(r.t, err)
	return s
}

// endedCopy is what the database has of a job whose end the registry forgot.
func (r *rig) endedCopy(rec job.Record) job.Record {
	rec, err := job.Apply(rec, job.Assign{WorkerID: "worker-a", LeaseID: id.New(id.Lease, time.Now())}, time.Now())
	require.NoError(r.t, err)
	rec, err = job.Apply(rec, succeeded(bus.Entry{Record: rec}), time.Now())
	require.NoError(r.t, err)
	return rec
}

func TestGhostsArePurgedBeforeSchedulersHear(t *testing.T) {
	r := newRig(t)
	require.NoError(t, r.conn.SetSwept(t.Context(), "an earlier life"))
	ghost := r.create(r.newJob(time.Now()))
	ghostEnd := r.endedCopy(ghost.Record)
	live := r.run(r.create(r.newJob(time.Now())))
	// An idempotency key that was used again while the database was away.
	again := r.newJob(time.Now()).WithIdempotency()
	again.ID = id.Keyed("alice", "k")
	old := again
	old.CreatedAt = again.CreatedAt.Add(-48 * time.Hour)
	againEntry := r.create(again)
	up, err := r.db.UpsertJobs(t.Context(), []job.Record{ghostEnd, r.endedCopy(old)})
	require.NoError(t, err)
	require.Equal(t, 2, up.Written)
	require.NoError(t, r.db.SetGeneration(t.Context(), r.conn.Registry().Generation()))

	p := r.start(r.db, persister.Config{})
	r.eventually("swept", func() bool { return r.swept() == r.conn.ServerID() })
	require.False(t, r.live(ghost.Record.ID), "gone by the time that schedulers hear")
	r.same(r.db, ghostEnd)
	require.EqualValues(t, 1, p.metric(t, "ghosts_total"))
	for _, e := range []bus.Entry{live, againEntry} {
		have, err := r.conn.Registry().GetLatest(t.Context(), e.Record.ID)
		require.NoError(t, err)
		require.Equal(t, e, have)
	}
	r.eventually("the key's new job is stored", func() bool {
		have, err := r.db.Job(t.Context(), again.ID)
		require.NoError(t, err)
		return have.CreatedAt.Equal(again.CreatedAt)
	})
}

func TestServerRestartWhileRunning(t *testing.T) {
	r := newRig(t)
	p := r.start(r.db, persister.Config{})
	live := r.create(r.newJob(time.Now()))
	r.eventually("swept", func() bool { return r.swept() == r.conn.ServerID() && r.has(r.db, live) })
	// What the database knows better: as after a crash that lost the end.
	ghost := r.create(r.newJob(time.Now()))
	r.eventually("stored", func() bool { return r.has(r.db, ghost) })
	_, err := r.db.UpsertJobs(t.Context(), []job.Record{r.endedCopy(ghost.Record)})
	require.NoError(t, err)

	r.restart()
	r.eventually("swept in the new life", func() bool { return r.swept() == r.conn.ServerID() })
	require.False(t, r.live(ghost.Record.ID))
	require.True(t, r.live(live.Record.ID))
	e := r.run(live)
	e = r.apply(e, succeeded(e))
	r.eventually("it goes on storing", func() bool { return r.has(r.db, e) })
	r.eventually("ready", func() bool { return p.Ready() == nil })
}

func TestRegistryLost(t *testing.T) {
	r := newRig(t)
	lost, ended := r.newJob(time.Now()), r.endedCopy(r.newJob(time.Now()))
	_, err := r.db.UpsertJobs(t.Context(), []job.Record{lost, ended})
	require.NoError(t, err)
	require.NoError(t, r.db.SetGeneration(t.Context(), "generation-before"))
	fresh := r.create(r.newJob(time.Now()))
	p := r.start(r.db, persister.Config{})
	r.eventually("the new registry is followed", func() bool { return r.has(r.db, fresh) })
	have, err := r.db.Job(t.Context(), lost.ID)
	require.NoError(t, err)
	require.Equal(t, job.Failed, have.State)
	require.Equal(t, job.ReasonRegistryReset, have.Reason)
	r.same(r.db, ended)
	r.same(r.db, fresh.Record)
	generation, err := r.db.Generation(t.Context())
	require.NoError(t, err)
	require.Equal(t, r.conn.Registry().Generation(), generation)
	require.EqualValues(t, 1, p.metric(t, "reset_jobs_total"))
}

func TestRetention(t *testing.T) {
	for _, c := range []struct {
		days int
		kept bool
	}{{30, false}, {0, true}} {
		t.Run(fmt.Sprint(c.days), func(t *testing.T) {
			r := newRig(t)
			p := r.start(r.db, persister.Config{JobRetentionDays: c.days})
			done := r.finish(r.newJob(time.Now()))
			live := r.create(r.newJob(time.Now()))
			r.eventually("stored", func() bool { return r.has(r.db, done) && r.has(r.db, live) })
			r.clock.advance(29 * 24 * time.Hour)
			r.eventually("left the registry", func() bool { return !r.live(done.Record.ID) })
			r.same(r.db, done.Record)
			r.clock.advance(2 * 24 * time.Hour)
			if c.kept {
				later := r.newJob(r.clock.now())
				e := r.finish(later)
				r.clock.advance(time.Minute)
				r.eventually("rounds went by", func() bool { return !r.live(e.Record.ID) })
				r.same(r.db, done.Record)
				return
			}
			r.eventually("deleted", func() bool { return !r.has(r.db, done) })
			r.same(r.db, live.Record)
			r.eventually("counted", func() bool { return p.metric(t, "expired_jobs_total") == 1 })
		})
	}
}

func TestNewRefuses(t *testing.T) {
	r := newRig(t)
	_, err := persister.New(persister.Config{JobRetentionDays: -1}, persister.Deps{Bus: r.conn, Store: r.db})
	require.ErrorContains(t, err, "JOB_RETENTION_DAYS")
	_, err = persister.New(persister.Config{}, persister.Deps{Bus: r.conn})
	require.Error(t, err)
	_, err = persister.New(persister.Config{PurgeGraceSeconds: -1}, persister.Deps{Bus: r.conn, Store: r.db})
	require.ErrorContains(t, err, "PURGE_GRACE_SECONDS")
}
