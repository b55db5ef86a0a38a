package scheduler_test

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/fleet"
	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/natsd/natsdtest"
	"github.com/cmdexec/cmdexec/services/scheduler"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// rig is a bus with everything but the edge, which each test plays itself.
type rig struct {
	t     *testing.T
	ctx   context.Context
	inner bus.InProcessConnProvider
	conn  *bus.Conn
	log   *slog.Logger
}

func newRig(t *testing.T) *rig { return newRigOn(t, natsdtest.Start(t)) }

func newRigOn(t *testing.T, inner bus.InProcessConnProvider) *rig {
	r := &rig{t: t, ctx: t.Context(), inner: inner, log: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))}
	r.conn = r.connect()
	require.NoError(t, bus.Apply(r.ctx, r.conn, bus.Sizes{Jobs: 64 << 20, Results: 64 << 20, Logs: 64 << 20}))
	require.NoError(t, r.conn.Bind(r.ctx))
	require.NoError(t, r.conn.SetSwept(r.ctx, r.conn.ServerID()))
	return r
}

func (r *rig) connect() *bus.Conn {
	c, err := bus.Connect(r.ctx, bus.Options{InProcess: r.inner, Name: "test", Logger: r.log})
	require.NoError(r.t, err)
	r.t.Cleanup(c.Close)
	return c
}

// start runs a scheduler; stop ends it cleanly and waits.
func (r *rig) start(cfg scheduler.Config) (stop func()) {
	s, err := scheduler.New(cfg, scheduler.Deps{Bus: r.connect(), Logger: r.log})
	require.NoError(r.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		require.NoError(r.t, <-done)
	})
	r.t.Cleanup(stop)
	return stop
}

// eventually polls until f reports true.
func (r *rig) eventually(what string, f func() bool) {
	r.t.Helper()
	r.within(10*time.Second, what, f)
}

func (r *rig) within(d time.Duration, what string, f func() bool) {
	r.t.Helper()
	for end := time.Now().Add(d); !f(); {
		if time.Now().After(end) {
			r.t.Fatalf("not within %s: %s", d, what)
		}
		select {
		case <-time.After(2 * time.Millisecond):
		case <-r.ctx.Done():
			r.t.Fatal(r.ctx.Err())
		}
	}
}

func (r *rig) submit(change ...func(*job.Record)) string {
	r.t.Helper()
	spec, problems := job.Normalise(job.Spec{Command: job.Command{Shell: "true"}})
	require.Empty(r.t, problems)
	rec := job.New(id.New(id.Job, time.Now()), "ann", spec, time.Now())
	for _, c := range change {
		c(&rec)
	}
	_, err := r.conn.Registry().Create(r.ctx, rec)
	require.NoError(r.t, err)
	return rec.ID
}

func (r *rig) job(jobID string) job.Record {
	r.t.Helper()
	e, err := r.conn.Registry().GetLatest(r.ctx, jobID)
	require.NoError(r.t, err)
	return e.Record
}

func (r *rig) becomes(jobID string, s job.State) job.Record {
	r.t.Helper()
	var rec job.Record
	r.eventually(fmt.Sprintf("job is %s", s), func() bool {
		rec = r.job(jobID)
		return rec.State == s
	})
	return rec
}

func (r *rig) finish(a workerproto.Assignment, workerID string) {
	r.t.Helper()
	zero := 0
	now := time.Now()
	_, err := r.conn.Registry().Transition(r.ctx, a.JobID, job.Result{
		Fence: a.Fence(), WorkerID: workerID, Outcome: job.OutcomeSucceeded, ExitCode: &zero, StartedAt: now, FinishedAt: now,
	})
	require.NoError(r.t, err)
}

// fake is a worker together with the edge that holds its session.
type fake struct {
	r       *rig
	facts   fleet.Worker
	deliver func(workerproto.Assignment) busmsg.Delivery // nil: delivered

	mu       sync.Mutex
	holding  map[string]workerproto.Lease
	assigned []workerproto.Assignment
	canceled []workerproto.Lease
	phase    workerproto.Phase
	sub      bus.Subscription
}

func (r *rig) worker(name string, slots int) *fake {
	r.t.Helper()
	w := &fake{r: r, holding: map[string]workerproto.Lease{}, phase: workerproto.PhaseAccepted, facts: fleet.Worker{
		ID: name, OS: "linux", Arch: "amd64", CPUCores: float64(slots), TotalMemory: int64(slots) << 30,
		Executors: []string{job.ExecutorProcess}, Slots: slots, Protocol: workerproto.Version, Transport: "websocket",
	}}
	return w
}

// connect begins a session: the worker can get commands and says hello.
func (w *fake) connect() busmsg.WorkerReply {
	w.r.t.Helper()
	w.session()
	w.listen()
	return w.beat(w.hello())
}

func (w *fake) session() {
	w.facts.SessionID, w.facts.ConnectedAt, w.facts.Online = id.New(id.Session, time.Now()), job.Timestamp(time.Now()), true
	require.NoError(w.r.t, w.r.conn.Workers().Put(w.r.ctx, w.facts))
}

func (w *fake) hello() busmsg.WorkerBeat {
	facts := w.facts
	w.mu.Lock()
	defer w.mu.Unlock()
	b := busmsg.WorkerBeat{WorkerID: w.facts.ID, SessionID: w.facts.SessionID, Hello: &facts}
	for _, l := range w.holding {
		b.Holding = append(b.Holding, l)
	}
	return b
}

func (w *fake) listen() {
	w.r.t.Helper()
	session := w.facts.SessionID
	sub, err := w.r.conn.ServeCommands(w.facts.ID, func(_ context.Context, cmd busmsg.WorkerCommand) busmsg.WorkerCommandReply {
		w.mu.Lock()
		defer w.mu.Unlock()
		reply := busmsg.WorkerCommandReply{SessionID: session}
		for _, a := range cmd.Assign {
			d := busmsg.Delivery{LeaseID: a.LeaseID, Delivered: true}
			if w.deliver != nil {
				d = w.deliver(a)
			}
			if d.Delivered {
				w.assigned = append(w.assigned, a)
				w.holding[a.LeaseID] = a.Lease
			}
			reply.Assign = append(reply.Assign, d)
		}
		w.canceled = append(w.canceled, cmd.Cancel...)
		return reply
	})
	require.NoError(w.r.t, err)
	w.sub = sub
	w.r.t.Cleanup(func() { _ = sub.Unsubscribe() })
}

// beat sends one worker's part until a leader answers.
func (w *fake) beat(b busmsg.WorkerBeat) busmsg.WorkerReply {
	w.r.t.Helper()
	var out busmsg.WorkerReply
	w.r.within(20*time.Second, "a leader answers the beat", func() bool {
		reply, err := w.r.conn.RequestBeat(w.r.ctx, busmsg.BeatRequest{EdgeID: "edge", Workers: []busmsg.WorkerBeat{b}})
		if err == nil && len(reply.Workers) == 1 {
			out = reply.Workers[0]
		}
		return err == nil
	})
	return out
}

func (w *fake) heartbeat() busmsg.WorkerReply {
	w.r.t.Helper()
	w.mu.Lock()
	hb := workerproto.Heartbeat{Status: workerproto.StatusIdle, FreeSlots: w.facts.Slots - len(w.holding)}
	for _, l := range w.holding {
		hb.Running = append(hb.Running, workerproto.PhaseLease{Lease: l, Phase: w.phase})
	}
	w.mu.Unlock()
	return w.beat(busmsg.WorkerBeat{WorkerID: w.facts.ID, SessionID: w.facts.SessionID, Heartbeat: &hb})
}

func (w *fake) report(l workerproto.Lease, step workerproto.Type, reason string) {
	w.r.t.Helper()
	w.beat(busmsg.WorkerBeat{WorkerID: w.facts.ID, SessionID: w.facts.SessionID, Progress: []busmsg.Progress{
		{Lease: l, Step: step, At: time.Now(), Reason: reason},
	}})
}

// got waits until n assignments in all have come.
func (w *fake) got(n int) []workerproto.Assignment {
	w.r.t.Helper()
	var out []workerproto.Assignment
	w.r.eventually(fmt.Sprintf("%s has %d assignments", w.facts.ID, n), func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		out = slices.Clone(w.assigned)
		return len(out) >= n
	})
	require.Len(w.r.t, out, n)
	return out
}

func (w *fake) drop(l workerproto.Lease) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.holding, l.LeaseID)
}

func TestDispatchesWhatIsThereAndWhatComes(t *testing.T) {
	r := newRig(t)
	before := r.submit()
	r.start(scheduler.Config{})
	w := r.worker("w1", 4)
	w.connect()
	first := w.got(1)[0]
	require.Equal(t, before, first.JobID)
	require.Equal(t, 1, first.Attempt)
	require.Equal(t, 60, first.LeaseSeconds)
	require.Equal(t, "true", first.Job.Command.Shell)
	require.NoError(t, id.Check(id.Lease, first.LeaseID))
	rec := r.job(before)
	require.Equal(t, job.Assigned, rec.State)
	require.Equal(t, first.LeaseID, rec.LeaseID)
	require.Equal(t, "w1", rec.WorkerID)

	after := r.submit()
	require.Equal(t, after, w.got(2)[1].JobID)

	w.report(first.Lease, workerproto.TypeAccepted, "")
	rec = r.becomes(before, job.Preparing)
	require.False(t, rec.Last().AcceptedAt.IsZero())
	w.report(first.Lease, workerproto.TypeStarted, "")
	rec = r.becomes(before, job.Running)
	require.False(t, rec.StartedAt.IsZero())
	reply := w.heartbeat()
	require.ElementsMatch(t, []string{first.LeaseID, w.got(2)[1].LeaseID}, reply.Confirmed)
	require.Empty(t, reply.Stale)
}

func TestAnUndeliveredAssignmentGoesElsewhere(t *testing.T) {
	for name, deaf := range map[string]func(w *fake){
		"nobody listens": func(w *fake) { w.session(); w.beat(w.hello()) },
		"socket is gone": func(w *fake) {
			w.deliver = func(a workerproto.Assignment) busmsg.Delivery {
				return busmsg.Delivery{LeaseID: a.LeaseID, Reason: "the session is closing"}
			}
			w.connect()
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			r.start(scheduler.Config{})
			bad := r.worker("a-bad", 8) // emptier, so it is asked first
			deaf(bad)
			good := r.worker("b-good", 4)
			good.connect()
			jobID := r.submit()
			a := good.got(1)[0]
			require.Equal(t, jobID, a.JobID)
			require.Equal(t, 2, a.Attempt)
			rec := r.job(jobID)
			require.Len(t, rec.Attempts, 2)
			require.Equal(t, "a-bad", rec.Attempts[0].WorkerID)
			require.Equal(t, job.OutcomeReturned, rec.Attempts[0].Outcome)
			require.Equal(t, job.InfraBudget, rec.InfraBudgetLeft(), "no budget is spent")
			require.Empty(t, bad.assigned)

			r.eventually("the list says that it is not tried for a while", func() bool {
				list, err := bus.Query(r.ctx, r.conn, bus.QueryWorkers, busmsg.ListWorkers{})
				require.NoError(t, err)
				if !list.Items[0].SetAsideUntil.IsZero() {
					return true
				}
				r.submit() // the first while is short, and each that follows is longer
				return false
			})
		})
	}
}

func TestARejectedJobGoesElsewhere(t *testing.T) {
	r := newRig(t)
	r.start(scheduler.Config{})
	picky := r.worker("a-picky", 8)
	picky.connect()
	jobID := r.submit()
	first := picky.got(1)[0]
	other := r.worker("b-other", 4)
	other.connect()
	picky.drop(first.Lease)
	picky.report(first.Lease, workerproto.TypeRejected, "busy")
	a := other.got(1)[0]
	require.Equal(t, jobID, a.JobID)
	require.Equal(t, 2, a.Attempt)
	rec := r.job(jobID)
	require.Equal(t, job.OutcomeRejected, rec.Attempts[0].Outcome)
	require.Equal(t, job.InfraBudget, rec.InfraBudgetLeft())
	require.Len(t, picky.got(1), 1)
}

func TestTheOnlyWorkerIsAskedAgainAfterItRejected(t *testing.T) {
	r := newRig(t)
	r.start(scheduler.Config{})
	w := r.worker("w", 1)
	w.connect()
	r.submit()
	first := w.got(1)[0]
	w.drop(first.Lease)
	w.report(first.Lease, workerproto.TypeRejected, "busy")
	require.Equal(t, 2, w.got(2)[1].Attempt)
}

func TestAHelloWithoutTheLeaseEndsItAtOnce(t *testing.T) {
	r := newRig(t)
	r.start(scheduler.Config{})
	w := r.worker("w", 2)
	w.connect()
	lost, kept := r.submit(), r.submit()
	leases := map[string]workerproto.Lease{}
	for _, a := range w.got(2) {
		leases[a.JobID] = a.Lease
	}
	require.NoError(t, w.sub.Unsubscribe())
	w.drop(leases[lost])
	w.beat(busmsg.WorkerBeat{WorkerID: "w", SessionID: w.facts.SessionID, Closed: true})
	began := time.Now()
	reply := w.connect() // a new session that lists one of the two
	require.Equal(t, []string{leases[kept].LeaseID}, reply.Confirmed)
	rec := r.becomes(lost, job.Retrying)
	require.Less(t, time.Since(began), 2*time.Second)
	require.Equal(t, job.ReasonWorkerLost, rec.Reason)
	again := w.got(3)[2]
	require.Equal(t, lost, again.JobID)
	require.Equal(t, 2, again.Attempt)
	rec = r.job(kept)
	require.Equal(t, 1, rec.Attempt, "what the worker still holds goes on")
	require.True(t, rec.State.Leased())
}

func TestALeaseRunsOut(t *testing.T) {
	r := newRig(t)
	r.start(scheduler.Config{LeaseSeconds: 4, HeartbeatSeconds: 1})
	dead := r.worker("dead", 8)
	dead.connect()
	zero := 0
	jobID := r.submit(func(rec *job.Record) { rec.Spec.Stop.GraceSeconds = &zero })
	dead.got(1)
	began := time.Now()
	rec := r.becomes(jobID, job.Retrying)
	require.Greater(t, time.Since(began), 3*time.Second)
	require.Equal(t, job.OutcomeLost, rec.Last().Outcome)
	alive := r.worker("alive", 1)
	alive.connect()
	r.within(10*time.Second, "another worker gets it", func() bool {
		alive.heartbeat()
		alive.mu.Lock()
		defer alive.mu.Unlock()
		return len(alive.assigned) == 1
	})
	require.Equal(t, 2, alive.got(1)[0].Attempt)
	require.Len(t, dead.got(1), 1)
}

func TestTakeoverRenewsAndStartsNothingTwice(t *testing.T) {
	r := newRig(t)
	stop := r.start(scheduler.Config{LeaseSeconds: 8, HeartbeatSeconds: 1})
	w := r.worker("w", 20)
	w.connect()
	for range 10 {
		r.submit()
	}
	leases := w.got(10)
	r.start(scheduler.Config{LeaseSeconds: 8, HeartbeatSeconds: 1})
	_, err := bus.Query(r.ctx, r.conn, bus.QueryOwner, busmsg.OwnerCount{Owner: "ann"})
	require.NoError(t, err)
	stop()
	began := time.Now()
	reply := w.heartbeat() // answered by the next leader, without a hello
	require.Less(t, time.Since(began), 5*time.Second, "a clean stop hands over at once")
	require.Len(t, reply.Confirmed, 10)
	fresh := r.submit()
	require.Equal(t, fresh, w.got(11)[10].JobID)
	for _, a := range leases {
		rec := r.job(a.JobID)
		require.Equal(t, a.LeaseID, rec.LeaseID)
		require.Equal(t, 1, rec.Attempt)
	}
	counts, err := bus.Query(r.ctx, r.conn, bus.QueryOwner, busmsg.OwnerCount{Owner: "ann"})
	require.NoError(t, err)
	require.Equal(t, busmsg.OwnerCounts{Running: 11}, counts)
}

func TestACancelReachesTheWorkerAndIsRepeated(t *testing.T) {
	r := newRig(t)
	r.start(scheduler.Config{})
	w := r.worker("w", 1)
	w.connect()
	jobID := r.submit()
	a := w.got(1)[0]
	_, err := r.conn.Registry().Transition(r.ctx, jobID, job.CancelRequest{})
	require.NoError(t, err)
	r.eventually("the worker hears of it by a command", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return slices.Contains(w.canceled, a.Lease)
	})
	for range 2 {
		reply := w.heartbeat()
		require.Equal(t, []workerproto.Lease{a.Lease}, reply.Cancel)
		require.Equal(t, []string{a.LeaseID}, reply.Confirmed, "it holds the lease until it is done")
	}
	now := time.Now()
	_, err = r.conn.Registry().Transition(r.ctx, jobID, job.Result{
		Fence: a.Fence(), WorkerID: "w", Outcome: job.OutcomeCanceled, StartedAt: now, FinishedAt: now,
	})
	require.NoError(t, err)
	r.eventually("the cancel is not repeated any more", func() bool { return len(w.heartbeat().Cancel) == 0 })
	require.Equal(t, job.Canceled, r.job(jobID).State)
}

func TestARetryWaitsForItsBackoff(t *testing.T) {
	r := newRig(t)
	r.start(scheduler.Config{})
	w := r.worker("w", 1)
	w.connect()
	one := 1
	jobID := r.submit(func(rec *job.Record) { rec.Spec.Retry.MaxAttempts, rec.Spec.Retry.BackoffSeconds = 2, &one })
	a := w.got(1)[0]
	w.drop(a.Lease)
	now := time.Now()
	e, err := r.conn.Registry().Transition(r.ctx, jobID, job.Result{
		Fence: a.Fence(), WorkerID: "w", Outcome: job.OutcomeFailed, ExitCode: &one, StartedAt: now, FinishedAt: now,
	})
	require.NoError(t, err)
	require.Equal(t, job.Retrying, e.Record.State)
	again := w.got(2)[1]
	require.Equal(t, 2, again.Attempt)
	rec := r.job(jobID)
	require.False(t, rec.Last().AssignedAt.Before(e.Record.RetryAt), "not before the backoff is over")
	require.Less(t, rec.Last().AssignedAt.Sub(e.Record.RetryAt), time.Second)
}

func TestDeadlines(t *testing.T) {
	r := newRig(t)
	r.start(scheduler.Config{})
	waits := r.submit(func(rec *job.Record) { rec.Spec.Timeouts.Queue = 1 })
	total := r.submit(func(rec *job.Record) { rec.Spec.Timeouts.Total = 1 })
	require.Equal(t, job.ReasonQueueTimeout, r.becomes(waits, job.Expired).Reason)
	require.Equal(t, job.ReasonTotalTimeout, r.becomes(total, job.Expired).Reason)

	w := r.worker("w", 1)
	w.connect()
	runs := r.submit(func(rec *job.Record) { rec.Spec.Timeouts.Total = 2 })
	a := w.got(1)[0]
	w.report(a.Lease, workerproto.TypeStarted, "")
	require.Equal(t, job.ReasonTotalTimeout, r.becomes(runs, job.TimedOut).Reason)
	r.eventually("the worker is told to stop it", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return slices.Contains(w.canceled, a.Lease)
	})
	require.Equal(t, []workerproto.Lease{a.Lease}, w.heartbeat().Stale)
}

func TestOwnersTakeTurnsAndPriorityGoesFirst(t *testing.T) {
	r := newRig(t)
	many := map[string]bool{}
	for range 20 {
		many[r.submit(func(rec *job.Record) { rec.Owner = "many" })] = true
	}
	few := r.submit(func(rec *job.Record) { rec.Owner = "few" })
	hundred := 100
	first := r.submit(func(rec *job.Record) { rec.Owner = "many"; rec.Spec.Priority = &hundred })
	r.start(scheduler.Config{})
	w := r.worker("w", 1)
	w.connect()
	var order []string
	for i := range 3 {
		a := w.got(i + 1)[i]
		order = append(order, a.JobID)
		w.drop(a.Lease)
		r.finish(a, "w")
	}
	require.Equal(t, first, order[0])
	require.Contains(t, order[1:], few, "one of the next two turns is the other owner's")
}

func TestForeignLeasesAreStale(t *testing.T) {
	r := newRig(t)
	r.start(scheduler.Config{})
	w := r.worker("w", 4)
	w.connect()
	a := func() workerproto.Assignment { r.submit(); return w.got(1)[0] }()
	never := workerproto.Lease{JobID: id.New(id.Job, time.Now()), Attempt: 1, LeaseID: id.New(id.Lease, time.Now())}
	older := a.Lease
	older.Attempt, older.LeaseID = 0, id.New(id.Lease, time.Now())
	w.mu.Lock()
	w.holding[never.LeaseID], w.holding[older.LeaseID] = never, older
	w.mu.Unlock()
	reply := w.heartbeat()
	require.ElementsMatch(t, []workerproto.Lease{never, older}, reply.Stale)
	require.Equal(t, []string{a.LeaseID}, reply.Confirmed)

	thief := r.worker("thief", 1)
	thief.mu.Lock()
	thief.holding[a.LeaseID] = a.Lease
	thief.mu.Unlock()
	thief.connect()
	require.Equal(t, []workerproto.Lease{a.Lease}, thief.heartbeat().Stale, "another worker's lease")
}

func TestOnlyNewJobsUntilTheGhostGuardIsDone(t *testing.T) {
	r := newRig(t)
	require.NoError(t, r.conn.SetSwept(r.ctx, "an earlier life"))
	old := r.submit(func(rec *job.Record) { rec.CreatedAt = rec.CreatedAt.Add(-time.Minute) })
	r.start(scheduler.Config{})
	w := r.worker("w", 4)
	w.connect()
	young := r.submit()
	require.Equal(t, young, w.got(1)[0].JobID)
	require.Equal(t, job.Queued, r.job(old).State)
	require.NoError(t, r.conn.SetSwept(r.ctx, r.conn.ServerID()))
	require.Equal(t, old, w.got(2)[1].JobID)
}

func TestQueries(t *testing.T) {
	r := newRig(t)
	_, err := bus.Query(r.ctx, r.conn, bus.QueryWorkers, busmsg.ListWorkers{})
	require.ErrorIs(t, err, bus.ErrNoResponder)
	r.start(scheduler.Config{})
	w := r.worker("w", 1)
	w.connect()
	running := r.submit()
	w.got(1)
	waiting := r.submit()
	behind := r.submit()
	r.eventually("both wait", func() bool {
		c, err := bus.Query(r.ctx, r.conn, bus.QueryOwner, busmsg.OwnerCount{Owner: "ann"})
		require.NoError(t, err)
		return c == busmsg.OwnerCounts{Queued: 2, Running: 1}
	})
	ex, err := bus.Query(r.ctx, r.conn, bus.QueryExplain, busmsg.Explain{JobID: behind})
	require.NoError(t, err)
	require.Equal(t, busmsg.Explanation{
		JobID: behind, Position: 2, BlockedBy: []busmsg.BlockReason{{Reason: fleet.BlockSlots, Workers: 1}},
	}, ex)
	ex, err = bus.Query(r.ctx, r.conn, bus.QueryExplain, busmsg.Explain{JobID: running})
	require.NoError(t, err)
	require.Equal(t, busmsg.Explanation{JobID: running}, ex)
	_, err = bus.Query(r.ctx, r.conn, bus.QueryExplain, busmsg.Explain{JobID: id.New(id.Job, time.Now())})
	var qe *busmsg.QueryError
	require.ErrorAs(t, err, &qe)
	require.Equal(t, busmsg.CodeNotFound, qe.Code)
	_ = waiting

	list, err := bus.Query(r.ctx, r.conn, bus.QueryWorkers, busmsg.ListWorkers{})
	require.NoError(t, err)
	require.Len(t, list.Items, 1)
	require.Equal(t, fleet.StatusBusy, list.Items[0].Status)
	require.Equal(t, 0, list.Items[0].FreeSlots)
	require.Equal(t, 1, list.Items[0].Running)
}

func TestADrainedWorkerGetsNothing(t *testing.T) {
	r := newRig(t)
	r.start(scheduler.Config{})
	w := r.worker("w", 1)
	w.connect()
	require.NoError(t, r.conn.Workers().Update(r.ctx, "w", func(f *fleet.Worker) bool { f.Drain = true; return true }))
	r.eventually("it is told", func() bool { return w.heartbeat().Drain })
	jobID := r.submit()
	r.eventually("explain says why", func() bool {
		ex, err := bus.Query(r.ctx, r.conn, bus.QueryExplain, busmsg.Explain{JobID: jobID})
		return err == nil && len(ex.BlockedBy) == 1 && ex.BlockedBy[0].Reason == fleet.BlockDraining
	})
	require.Equal(t, job.Queued, r.job(jobID).State)
	require.NoError(t, r.conn.Workers().Update(r.ctx, "w", func(f *fleet.Worker) bool { f.Drain = false; return true }))
	require.Equal(t, jobID, w.got(1)[0].JobID)
}

func TestABigJobIsDispatchedWhole(t *testing.T) {
	r := newRig(t)
	r.start(scheduler.Config{})
	w := r.worker("w", 4)
	text := make([]byte, 200<<10)
	for i := range text {
		text[i] = 'a' + byte(i%26)
	}
	for range 3 {
		r.submit(func(rec *job.Record) { rec.Spec.Stdin = string(text) })
	}
	w.connect()
	for _, a := range w.got(3) {
		require.Equal(t, string(text), a.Job.Stdin)
	}
}

// restartable is a server that can be replaced under its clients.
type restartable struct {
	mu     sync.Mutex
	server bus.InProcessConnProvider
}

func (s *restartable) InProcessConn() (net.Conn, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.server.InProcessConn()
}

func TestARestartOfTheServerRebuildsMemory(t *testing.T) {
	dir := t.TempDir()
	server := natsdtest.StartIn(t, dir)
	inner := &restartable{server: server}
	r := newRigOn(t, inner)
	r.start(scheduler.Config{})
	w := r.worker("w", 4)
	w.connect()
	running := r.submit()
	lease := w.got(1)[0].LeaseID
	stuck := r.submit(func(rec *job.Record) { rec.Spec.Constraints.OS = "plan9" })

	server.Shutdown()
	next := natsdtest.StartIn(t, dir)
	inner.mu.Lock()
	inner.server = next
	inner.mu.Unlock()
	r.within(20*time.Second, "the connection is back", func() bool {
		return r.conn.Ready() == nil && r.conn.ServerID() == next.ID()
	})
	// What the old memory has in its queue the rebuilt one leaves to the ghost guard.
	r.within(20*time.Second, "memory is rebuilt", func() bool {
		ex, err := bus.Query(r.ctx, r.conn, bus.QueryExplain, busmsg.Explain{JobID: stuck})
		return err == nil && ex.Position == 0
	})
	r.within(20*time.Second, "the lease is confirmed by the rebuilt memory", func() bool {
		return slices.Contains(w.heartbeat().Confirmed, lease)
	})
	fresh := r.submit()
	require.Equal(t, fresh, w.got(2)[1].JobID, "what was submitted since is dispatched before the ghost guard")
	old := r.job(stuck)
	require.Equal(t, job.Queued, old.State)
	require.NoError(t, r.conn.SetSwept(r.ctx, next.ID()))
	require.Equal(t, 1, r.job(running).Attempt, "nothing was started twice")
	r.eventually("the rest is in the queue again", func() bool {
		ex, err := bus.Query(r.ctx, r.conn, bus.QueryExplain, busmsg.Explain{JobID: stuck})
		return err == nil && ex.Position == 1
	})
}

func TestConfig(t *testing.T) {
	r := newRig(t)
	for _, c := range []scheduler.Config{
		{LeaseSeconds: 10, HeartbeatSeconds: 5}, {LeaseSeconds: 19, HeartbeatSeconds: 5}, {HeartbeatSeconds: -1}, {LeaseSeconds: -60},
	} {
		_, err := scheduler.New(c, scheduler.Deps{Bus: r.conn})
		require.Error(t, err, "%+v", c)
	}
	require.Equal(t, 45, scheduler.Config{LeaseSeconds: 60}.SelfStopSeconds())
	_, err := scheduler.New(scheduler.Config{}, scheduler.Deps{})
	require.Error(t, err)
}
