package lead

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/fleet"
	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakeBus is a registry in memory, moved by the real state table, and workers whose
// answers a test decides. Time is the bubble's.
type fakeBus struct {
	mu       sync.Mutex
	rev      uint64
	entries  map[string]bus.Entry
	followed func(bus.Change)
	watched  func(fleet.Worker)
	silent   bool // changes are not reported
	failing  error
	writes   []job.Kind
	sent     []sent
	command  func(workerID string, cmd busmsg.WorkerCommand) (busmsg.WorkerCommandReply, error)
	sessions map[string]string
	slow     time.Duration // of each write, one after the other
	free     time.Time
	server   string
	swept    string
	pending  uint64
}

type sent struct {
	worker string
	cmd    busmsg.WorkerCommand
	at     time.Time
}

func newFakeBus() *fakeBus {
	return &fakeBus{entries: map[string]bus.Entry{}, sessions: map[string]string{}, server: "server-1", swept: "server-1"}
}

func (f *fakeBus) Follow(ctx context.Context, handle func(bus.Change)) error {
	f.mu.Lock()
	var now []bus.Entry
	for _, e := range f.entries {
		now = append(now, e)
	}
	f.followed = handle
	f.mu.Unlock()
	slices.SortFunc(now, func(a, b bus.Entry) int { return int(a.Revision) - int(b.Revision) })
	for _, e := range now {
		handle(bus.Change{Entry: e})
	}
	handle(bus.Change{CaughtUp: true})
	<-ctx.Done()
	f.mu.Lock()
	f.followed = nil
	f.mu.Unlock()
	return ctx.Err()
}

func (f *fakeBus) Scan(_ context.Context, handle func(bus.Entry) error) error {
	f.mu.Lock()
	var now []bus.Entry
	for _, e := range f.entries {
		now = append(now, e)
	}
	f.mu.Unlock()
	for _, e := range now {
		if err := handle(e); err != nil {
			return err
		}
	}
	return nil
}

func (f *fakeBus) GetLatest(_ context.Context, jobID string) (bus.Entry, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.failing != nil {
		return bus.Entry{}, f.failing
	}
	e, ok := f.entries[jobID]
	if !ok {
		return bus.Entry{}, bus.ErrNotFound
	}
	return e, nil
}

func (f *fakeBus) Transition(_ context.Context, jobID string, ev job.Event) (bus.Entry, error) {
	return f.apply(jobID, ev)
}

func (f *fakeBus) TransitionFrom(_ context.Context, e bus.Entry, ev job.Event) (bus.Entry, error) {
	f.mu.Lock()
	wait := time.Duration(0)
	if f.slow > 0 {
		if now := time.Now(); f.free.Before(now) {
			f.free = now
		}
		f.free = f.free.Add(f.slow)
		wait = time.Until(f.free)
	}
	f.mu.Unlock()
	time.Sleep(wait)
	return f.apply(e.Record.ID, ev)
}

func (f *fakeBus) apply(jobID string, ev job.Event) (bus.Entry, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.failing != nil {
		return bus.Entry{}, f.failing
	}
	e, ok := f.entries[jobID]
	if !ok {
		return bus.Entry{}, bus.ErrNotFound
	}
	next, err := job.Apply(e.Record, ev, time.Now())
	if err != nil {
		return e, err
	}
	f.writes = append(f.writes, job.KindOf(ev))
	return f.storeLocked(next), nil
}

func (f *fakeBus) storeLocked(rec job.Record) bus.Entry {
	f.rev++
	e := bus.Entry{Record: rec, Revision: f.rev}
	f.entries[rec.ID] = e
	if handle := f.followed; handle != nil && !f.silent {
		go handle(bus.Change{Entry: e}) // order does not matter: revisions decide
	}
	return e
}

func (f *fakeBus) SendCommand(_ context.Context, workerID string, cmd busmsg.WorkerCommand) (busmsg.WorkerCommandReply, error) {
	f.mu.Lock()
	f.sent = append(f.sent, sent{workerID, cmd, time.Now()})
	command, session := f.command, f.sessions[workerID]
	f.mu.Unlock()
	if command != nil {
		return command(workerID, cmd)
	}
	if session == "" {
		return busmsg.WorkerCommandReply{}, bus.ErrNoResponder
	}
	return delivered(session, cmd), nil
}

func delivered(session string, cmd busmsg.WorkerCommand) busmsg.WorkerCommandReply {
	r := busmsg.WorkerCommandReply{SessionID: session}
	for _, a := range cmd.Assign {
		r.Assign = append(r.Assign, busmsg.Delivery{LeaseID: a.LeaseID, Delivered: true})
	}
	return r
}

func (f *fakeBus) WatchWorkers(ctx context.Context, handle func(fleet.Worker)) error {
	f.mu.Lock()
	f.watched = handle
	f.mu.Unlock()
	<-ctx.Done()
	return ctx.Err()
}

func (f *fakeBus) ServerID() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.server
}

func (f *fakeBus) Swept(context.Context) (string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.swept, nil
}

func (f *fakeBus) ResultsPending(context.Context) (uint64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.pending, nil
}

// world is one term over a fake bus, inside a bubble.
type world struct {
	t      *testing.T
	bus    *fakeBus
	term   *Term
	stop   func()
	result chan error
	most   int // running jobs of one owner
}

func inBubble(t *testing.T, f func(w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := &world{t: t, bus: newFakeBus()}
		w.begin()
		defer func() { w.stop() }()
		f(w)
	})
}

func (w *world) begin() {
	m, err := NewMetrics(prometheus.NewRegistry())
	require.NoError(w.t, err)
	w.term = New(w.bus, Config{SchedulerID: "scheduler", LeaseTTL: time.Minute, Heartbeat: 5 * time.Second, MaxRunningPerOwner: w.most}, m, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(context.Background())
	w.result = make(chan error, 1)
	go func() { w.result <- w.term.Run(ctx) }()
	w.stop = sync.OnceFunc(func() {
		cancel()
		require.NoError(w.t, <-w.result)
	})
	<-w.term.CaughtUp()
	synctest.Wait()
}

// takeover ends the term and begins another, which knows nothing.
func (w *world) takeover() {
	w.stop()
	w.begin()
}

func (w *world) submit(change ...func(*job.Record)) string {
	spec, problems := job.Normalise(job.Spec{Command: job.Command{Shell: "true"}})
	require.Empty(w.t, problems)
	rec := job.New(id.New(id.Job, time.Now()), "ann", spec, time.Now())
	for _, c := range change {
		c(&rec)
	}
	w.bus.mu.Lock()
	w.bus.storeLocked(rec)
	w.bus.mu.Unlock()
	synctest.Wait()
	return rec.ID
}

func (w *world) job(jobID string) job.Record {
	w.bus.mu.Lock()
	defer w.bus.mu.Unlock()
	return w.bus.entries[jobID].Record
}

func (w *world) event(jobID string, ev job.Event) job.Record {
	w.t.Helper()
	e, err := w.bus.apply(jobID, ev)
	require.NoError(w.t, err)
	synctest.Wait()
	return e.Record
}

// after lets time pass and everything that it causes happen.
func (w *world) after(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func (w *world) written(k job.Kind) (n int) {
	w.bus.mu.Lock()
	defer w.bus.mu.Unlock()
	for _, x := range w.bus.writes {
		if x == k {
			n++
		}
	}
	return n
}

func (w *world) assigned(workerID string) (out []workerproto.Assignment) {
	w.bus.mu.Lock()
	defer w.bus.mu.Unlock()
	for _, s := range w.bus.sent {
		if s.worker == workerID {
			out = append(out, s.cmd.Assign...)
		}
	}
	return out
}

func (w *world) cancels(workerID string) (out []workerproto.Lease) {
	w.bus.mu.Lock()
	defer w.bus.mu.Unlock()
	for _, s := range w.bus.sent {
		if s.worker == workerID {
			out = append(out, s.cmd.Cancel...)
		}
	}
	return out
}

// machine is a worker's session.
type machine struct {
	w       *world
	facts   fleet.Worker
	running map[string]workerproto.PhaseLease
}

func (w *world) machine(name string, slots int) *machine {
	m := &machine{w: w, running: map[string]workerproto.PhaseLease{}, facts: fleet.Worker{
		ID: name, OS: "linux", Arch: "amd64", CPUCores: float64(slots), TotalMemory: int64(slots) << 30,
		Executors: []string{job.ExecutorProcess}, Slots: slots, Protocol: 1,
	}}
	m.session()
	return m
}

// session makes a new session and says nothing yet.
func (m *machine) session() {
	m.facts.SessionID, m.facts.ConnectedAt, m.facts.Online = id.New(id.Session, time.Now()), job.Timestamp(time.Now()), true
	m.w.bus.mu.Lock()
	m.w.bus.sessions[m.facts.ID] = m.facts.SessionID
	m.w.bus.mu.Unlock()
}

func (m *machine) holds(a workerproto.Assignment, p workerproto.Phase) {
	m.running[a.LeaseID] = workerproto.PhaseLease{Lease: a.Lease, Phase: p}
}

func (m *machine) beat(b busmsg.WorkerBeat) busmsg.WorkerReply {
	m.w.t.Helper()
	b.WorkerID, b.SessionID = m.facts.ID, m.facts.SessionID
	reply, err := m.w.term.Beat(context.Background(), busmsg.BeatRequest{EdgeID: "edge", Workers: []busmsg.WorkerBeat{b}})
	require.NoError(m.w.t, err)
	synctest.Wait()
	if len(reply.Workers) == 0 {
		return busmsg.WorkerReply{}
	}
	return reply.Workers[0]
}

func (m *machine) hello() busmsg.WorkerReply {
	m.w.t.Helper()
	facts := m.facts
	b := busmsg.WorkerBeat{Hello: &facts}
	for _, l := range m.running {
		b.Holding = append(b.Holding, l.Lease)
	}
	return m.beat(b)
}

func (m *machine) heartbeat() busmsg.WorkerReply {
	m.w.t.Helper()
	hb := workerproto.Heartbeat{Status: workerproto.StatusIdle, FreeSlots: m.facts.Slots - len(m.running)}
	for _, l := range m.running {
		hb.Running = append(hb.Running, l)
	}
	return m.beat(busmsg.WorkerBeat{Heartbeat: &hb})
}

// heartbeats beats every five seconds for d.
func (m *machine) heartbeats(d time.Duration) {
	m.w.t.Helper()
	for end := time.Now().Add(d); time.Now().Before(end); {
		m.w.after(5 * time.Second)
		m.heartbeat()
	}
}

func (m *machine) reports(a workerproto.Assignment, step workerproto.Type) {
	m.beat(busmsg.WorkerBeat{Progress: []busmsg.Progress{{Lease: a.Lease, Step: step, At: time.Now()}}})
}

// one makes a worker and a job that is delivered to it.
func (w *world) one(change ...func(*job.Record)) (*machine, workerproto.Assignment) {
	w.t.Helper()
	m := w.machine("m", 4)
	m.hello()
	w.submit(change...)
	a := w.assigned("m")
	require.Len(w.t, a, 1)
	return m, a[0]
}

func TestDispatchTakesNoTime(t *testing.T) {
	inBubble(t, func(w *world) {
		began := time.Now()
		_, a := w.one()
		require.Equal(t, began, time.Now(), "no tick is waited for")
		require.Equal(t, job.Assigned, w.job(a.JobID).State)
	})
}

// A user at the limit keeps waiting, also over a takeover, and is told why;
// others are served.
func TestAUserAtTheLimitWaits(t *testing.T) {
	inBubble(t, func(w *world) {
		w.most = 2
		w.takeover()
		m := w.machine("m", 10)
		m.hello()
		for range 4 {
			w.submit()
		}
		running := w.assigned("m")
		require.Len(t, running, 2)
		for _, a := range running {
			m.holds(a, workerproto.PhaseStarted)
			m.reports(a, workerproto.TypeStarted)
		}
		waiting := w.submit()
		bobs := w.submit(func(r *job.Record) { r.Owner = "bob" })
		require.Equal(t, job.Assigned, w.job(bobs).State)
		ex, err := w.term.Explain(context.Background(), busmsg.Explain{JobID: waiting})
		require.NoError(t, err)
		require.Equal(t, []busmsg.BlockReason{{Reason: fleet.BlockOwner, Workers: 1}}, ex.BlockedBy)
		require.Positive(t, ex.Position)

		w.takeover()
		m.hello()
		m.heartbeat()
		require.Equal(t, job.Queued, w.job(waiting).State, "a new leader counts what runs")

		w.event(running[0].JobID, job.CancelRequest{})
		require.Len(t, w.assigned("m"), 3, "a job that is being stopped still runs")
		w.event(running[0].JobID, job.Result{
			Fence: job.Fence{Attempt: running[0].Attempt, LeaseID: running[0].LeaseID}, WorkerID: "m", Outcome: job.OutcomeSucceeded, ExitCode: new(int),
		})
		require.Len(t, w.assigned("m"), 4, "one more once it has ended")
	})
}

func TestALeaseThatIsConfirmedLasts(t *testing.T) {
	inBubble(t, func(w *world) {
		m, a := w.one()
		m.holds(a, workerproto.PhaseAccepted)
		for range 100 {
			w.after(5 * time.Second)
			require.Equal(t, []string{a.LeaseID}, m.heartbeat().Confirmed)
		}
		require.Zero(t, w.written(job.KindLost))
	})
}

func TestALeaseRunsOutAfterLeaseAndGrace(t *testing.T) {
	inBubble(t, func(w *world) {
		grace := 25
		m, a := w.one(func(r *job.Record) { r.Spec.Stop.GraceSeconds = &grace })
		m.holds(a, workerproto.PhaseAccepted)
		w.after(30 * time.Second)
		m.heartbeat()
		w.after(85*time.Second - time.Millisecond)
		require.True(t, w.job(a.JobID).State.Leased())
		w.after(time.Millisecond)
		rec := w.job(a.JobID)
		require.Equal(t, job.Retrying, rec.State)
		require.Equal(t, job.OutcomeLost, rec.Last().Outcome)
		require.Equal(t, []workerproto.Lease{a.Lease}, m.heartbeat().Stale, "it is told when it comes back")
	})
}

func TestALeaseThatIsNotListedIsNotRenewed(t *testing.T) {
	inBubble(t, func(w *world) {
		m, a := w.one() // delivered to this very session
		m.heartbeats(69 * time.Second)
		require.NotZero(t, w.written(job.KindLost), "the clock ran on")
		require.Equal(t, 1, w.job(a.JobID).InfraFailures)
		require.Equal(t, 70*time.Second, w.job(a.JobID).Attempts[0].FinishedAt.Sub(w.job(a.JobID).Attempts[0].AssignedAt))
	})
}

func TestTakeoverCountsEveryLeaseAsRenewed(t *testing.T) {
	inBubble(t, func(w *world) {
		m, a := w.one()
		m.holds(a, workerproto.PhaseAccepted)
		w.after(65 * time.Second)
		w.takeover()
		w.after(65 * time.Second)
		require.True(t, w.job(a.JobID).State.Leased(), "nobody could renew it")
		require.Equal(t, []string{a.LeaseID}, m.heartbeat().Confirmed)
		w.after(69 * time.Second)
		require.True(t, w.job(a.JobID).State.Leased())
		w.after(time.Second)
		require.Equal(t, job.Retrying, w.job(a.JobID).State)
	})
}

func TestAReconnectCountsEveryLeaseAsRenewed(t *testing.T) {
	inBubble(t, func(w *world) {
		_, a := w.one()
		w.after(69 * time.Second)
		w.term.Reconnected()
		w.after(69 * time.Second)
		require.True(t, w.job(a.JobID).State.Leased())
		w.after(time.Second)
		require.Equal(t, job.Retrying, w.job(a.JobID).State)
	})
}

func TestAnotherServerMeansANewTerm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{t: t, bus: newFakeBus()}
		w.begin()
		w.bus.mu.Lock()
		w.bus.server = "server-2"
		w.bus.mu.Unlock()
		w.term.Reconnected()
		require.ErrorIs(t, <-w.result, ErrRebuild)
		_, err := w.term.Beat(context.Background(), busmsg.BeatRequest{})
		require.Error(t, err, "a term that is over answers nobody")
	})
}

func TestAHelloEndsLeasesOfOlderSessions(t *testing.T) {
	inBubble(t, func(w *world) {
		m, a := w.one()
		w.after(20 * time.Second)
		m.heartbeat() // it has not even listed it
		m.session()
		m.hello()
		rec := w.job(a.JobID)
		require.Equal(t, job.Retrying, rec.State)
		require.Equal(t, job.ReasonWorkerLost, rec.Reason)
		require.Equal(t, 1, w.written(job.KindLost))
	})
}

func TestAHelloDoesNotEndWhatItsOwnSessionGot(t *testing.T) {
	inBubble(t, func(w *world) {
		m, a := w.one()
		w.after(time.Second)
		m.hello() // repeated with the list it had at its start
		m.hello()
		require.Zero(t, w.written(job.KindLost))
		m.holds(a, workerproto.PhaseAccepted)
		require.Equal(t, []string{a.LeaseID}, m.heartbeat().Confirmed)
	})
}

func TestAHelloWhileTheAssignmentIsOnItsWay(t *testing.T) {
	for _, old := range []bool{true, false} {
		t.Run(fmt.Sprintf("reached the old session %t", old), func(t *testing.T) {
			inBubble(t, func(w *world) {
				m := w.machine("m", 4)
				m.hello()
				first := m.facts.SessionID
				w.bus.command = func(_ string, cmd busmsg.WorkerCommand) (busmsg.WorkerCommandReply, error) {
					time.Sleep(time.Second)
					w.bus.mu.Lock()
					defer w.bus.mu.Unlock()
					session := w.bus.sessions["m"]
					if old {
						session = first
					}
					return delivered(session, cmd), nil
				}
				jobID := w.submit()
				w.after(500 * time.Millisecond)
				m.session()
				m.hello() // without the lease
				require.Zero(t, w.written(job.KindLost), "nobody can know yet")
				w.after(500 * time.Millisecond)
				if old {
					require.Equal(t, job.Retrying, w.job(jobID).State, "the session that got it is gone")
				} else {
					require.Equal(t, job.Assigned, w.job(jobID).State)
				}
			})
		})
	}
}

func TestAHelloOfANewSessionThatOverlapsItsFirstAssignment(t *testing.T) {
	inBubble(t, func(w *world) {
		m := w.machine("m", 4)
		m.hello()
		w.after(time.Minute - time.Second)
		m.heartbeat()
		m.session() // the edge takes commands for it before its hello has arrived
		jobID := w.submit()
		require.Equal(t, job.Assigned, w.job(jobID).State)
		w.after(time.Second)
		m.hello()
		require.Equal(t, job.Assigned, w.job(jobID).State, "delivered to the session that says hello")
		require.Zero(t, w.written(job.KindLost))
	})
}

func TestALateHelloOfAnOlderSessionEndsNothing(t *testing.T) {
	inBubble(t, func(w *world) {
		m := w.machine("m", 4)
		m.hello()
		older := m.facts
		w.after(time.Second)
		m.session()
		m.hello()
		w.submit()
		require.Len(t, w.assigned("m"), 1)
		newer := m.facts
		m.facts = older
		require.Equal(t, newer.SessionID, m.hello().SessionID, "the answer names the session that counts")
		m.facts = newer
		require.Zero(t, w.written(job.KindLost))
		m.holds(w.assigned("m")[0], workerproto.PhaseAccepted)
		require.Len(t, m.heartbeat().Confirmed, 1, "the newer session is still the one that counts")
	})
}

func TestAfterATakeoverSessionsAreNotKnown(t *testing.T) {
	t.Run("a session that began well after the assignment does not have it", func(t *testing.T) {
		inBubble(t, func(w *world) {
			m, a := w.one()
			w.after(10 * time.Second)
			w.takeover()
			m.session()
			m.hello()
			require.Equal(t, job.Retrying, w.job(a.JobID).State)
		})
	})
	t.Run("a session of about that time may have it", func(t *testing.T) {
		inBubble(t, func(w *world) {
			m, a := w.one()
			w.after(time.Second)
			w.takeover()
			m.hello()
			require.True(t, w.job(a.JobID).State.Leased())
			m.holds(a, workerproto.PhaseAccepted)
			require.Equal(t, []string{a.LeaseID}, m.heartbeat().Confirmed)
		})
	})
	t.Run("until its heartbeats have not listed it for long enough", func(t *testing.T) {
		inBubble(t, func(w *world) {
			m, a := w.one()
			w.after(time.Second)
			w.takeover()
			m.session()
			m.hello()
			m.heartbeats(5 * time.Second)
			require.True(t, w.job(a.JobID).State.Leased())
			m.heartbeats(5 * time.Second)
			require.Equal(t, 1, w.job(a.JobID).InfraFailures, "it is gone")
		})
	})
	t.Run("a listed one belongs to the session that lists it", func(t *testing.T) {
		inBubble(t, func(w *world) {
			m, a := w.one()
			m.holds(a, workerproto.PhaseStarted)
			w.takeover()
			m.heartbeat()
			w.after(time.Second)
			clear(m.running)
			m.session()
			m.hello()
			require.Equal(t, job.Retrying, w.job(a.JobID).State)
		})
	})
}

func TestALossThatWouldEndTheJobWaitsForResults(t *testing.T) {
	inBubble(t, func(w *world) {
		m, a := w.one(func(r *job.Record) { r.Spec.OnWorkerLost = job.OnWorkerLostFail })
		w.bus.pending = 1
		w.after(time.Second)
		m.session()
		m.hello()
		w.after(time.Second)
		require.Equal(t, job.Assigned, w.job(a.JobID).State, "its result may be on its way")
		zero := 0
		w.event(a.JobID, job.Result{Fence: a.Fence(), WorkerID: "m", Outcome: job.OutcomeSucceeded, ExitCode: &zero, StartedAt: time.Now(), FinishedAt: time.Now()})
		w.bus.mu.Lock()
		w.bus.pending = 0
		w.bus.mu.Unlock()
		w.after(time.Minute)
		require.Equal(t, job.Succeeded, w.job(a.JobID).State)
		require.Zero(t, w.written(job.KindLost))
	})
}

func TestALateResultIsWaitedForNotLetGo(t *testing.T) {
	inBubble(t, func(w *world) {
		m, a := w.one()
		m.holds(a, workerproto.PhaseEnded)
		w.event(a.JobID, job.Lost{Fence: a.Fence()})
		reply := m.heartbeat()
		require.Empty(t, reply.Stale, "its result would still be taken")
		require.Empty(t, reply.Confirmed)
		m.holds(a, workerproto.PhaseStarted)
		require.Equal(t, []workerproto.Lease{a.Lease}, m.heartbeat().Stale, "a command that runs without a lease must stop")
	})
}

func TestShortJobsCostNoProgressWrites(t *testing.T) {
	inBubble(t, func(w *world) {
		m, a := w.one()
		m.reports(a, workerproto.TypeAccepted)
		w.after(50 * time.Millisecond)
		m.reports(a, workerproto.TypeStarted)
		w.after(90 * time.Millisecond)
		zero := 0
		w.event(a.JobID, job.Result{Fence: a.Fence(), WorkerID: "m", Outcome: job.OutcomeSucceeded, ExitCode: &zero, StartedAt: time.Now(), FinishedAt: time.Now()})
		w.after(time.Hour)
		require.Equal(t, []job.Kind{job.KindAssign, job.KindResult}, w.bus.writes)
	})
}

func TestProgressIsWritten100msLater(t *testing.T) {
	inBubble(t, func(w *world) {
		m, a := w.one()
		m.reports(a, workerproto.TypeAccepted)
		w.after(100*time.Millisecond - 1)
		require.Equal(t, job.Assigned, w.job(a.JobID).State)
		w.after(1)
		require.Equal(t, job.Preparing, w.job(a.JobID).State)
		w.after(time.Second)
		began := time.Now()
		m.reports(a, workerproto.TypeStarted)
		m.reports(a, workerproto.TypeStarted)
		w.after(100 * time.Millisecond)
		rec := w.job(a.JobID)
		require.Equal(t, job.Running, rec.State)
		require.True(t, rec.StartedAt.Equal(job.Timestamp(began)))
		require.Equal(t, 1, w.written(job.KindStart))
	})
}

func TestALostReportIsMadeGoodByTheHeartbeat(t *testing.T) {
	inBubble(t, func(w *world) {
		m, a := w.one()
		m.holds(a, workerproto.PhaseStarted)
		m.heartbeat()
		w.after(100 * time.Millisecond)
		require.Equal(t, job.Running, w.job(a.JobID).State)
	})
}

func TestACancelThatIsNotConfirmedIsGivenUp(t *testing.T) {
	inBubble(t, func(w *world) {
		m, a := w.one()
		m.holds(a, workerproto.PhaseStarted)
		w.event(a.JobID, job.CancelRequest{})
		require.Equal(t, []workerproto.Lease{a.Lease}, w.cancels("m"))
		m.heartbeats(60 * time.Second)
		require.Equal(t, job.Canceling, w.job(a.JobID).State)
		m.heartbeats(10 * time.Second)
		rec := w.job(a.JobID)
		require.Equal(t, job.Canceled, rec.State)
		require.True(t, rec.Cancel.StopUnconfirmed)
		require.Equal(t, 1, w.written(job.KindGiveUp))
	})
}

func TestACancelOfAnAssignmentThatIsNotSentYet(t *testing.T) {
	inBubble(t, func(w *world) {
		m := w.machine("m", 4)
		m.hello()
		hold := make(chan struct{})
		w.bus.command = func(_ string, cmd busmsg.WorkerCommand) (busmsg.WorkerCommandReply, error) {
			<-hold
			return delivered(m.facts.SessionID, cmd), nil
		}
		w.submit()
		second := w.submit() // waits in the outbox behind the first
		require.Equal(t, job.Assigned, w.job(second).State)
		w.event(second, job.CancelRequest{})
		close(hold)
		w.after(time.Second)
		require.Equal(t, job.Canceled, w.job(second).State, "nobody ever saw it")
		require.Len(t, w.assigned("m"), 1)
	})
}

func TestACancelWhileTheAssignmentIsSent(t *testing.T) {
	inBubble(t, func(w *world) {
		m := w.machine("m", 4)
		m.hello()
		hold := make(chan struct{})
		w.bus.command = func(_ string, cmd busmsg.WorkerCommand) (busmsg.WorkerCommandReply, error) {
			<-hold
			return delivered(m.facts.SessionID, cmd), nil
		}
		jobID := w.submit()
		w.event(jobID, job.CancelRequest{})
		require.Empty(t, w.cancels("m"))
		close(hold)
		w.after(0)
		require.Len(t, w.cancels("m"), 1, "the cancel follows")
		require.Equal(t, job.Canceling, w.job(jobID).State)
	})
}

func TestWhatComesTogetherGoesTogether(t *testing.T) {
	inBubble(t, func(w *world) {
		m := w.machine("m", 50)
		m.hello()
		w.bus.command = func(_ string, cmd busmsg.WorkerCommand) (busmsg.WorkerCommandReply, error) {
			time.Sleep(time.Millisecond)
			return delivered(m.facts.SessionID, cmd), nil
		}
		for range 40 {
			w.submit()
		}
		w.after(time.Second)
		require.Len(t, w.assigned("m"), 40)
		require.LessOrEqual(t, len(w.bus.sent), 3)
	})
}

func TestACommandWithoutAnAnswerIsLeftToTheLease(t *testing.T) {
	inBubble(t, func(w *world) {
		m := w.machine("m", 4)
		m.hello()
		w.bus.command = func(string, busmsg.WorkerCommand) (busmsg.WorkerCommandReply, error) {
			return busmsg.WorkerCommandReply{}, bus.ErrAmbiguous
		}
		jobID := w.submit()
		require.Equal(t, job.Assigned, w.job(jobID).State)
		require.Zero(t, w.written(job.KindReturn), "the worker may have it")
		w.after(69 * time.Second)
		require.Equal(t, job.Assigned, w.job(jobID).State)
		w.after(time.Second)
		require.Equal(t, job.Retrying, w.job(jobID).State)
	})
}

func TestAnOldDecisionIsNotSent(t *testing.T) {
	inBubble(t, func(w *world) {
		m := w.machine("m", 4)
		m.hello()
		w.bus.command = func(_ string, cmd busmsg.WorkerCommand) (busmsg.WorkerCommandReply, error) {
			time.Sleep(sendWithin + time.Second) // longer than commands are waited for: the fake does not look at its context
			return delivered(m.facts.SessionID, cmd), nil
		}
		w.submit()
		second := w.submit()
		w.after(sendWithin + time.Second)
		require.Equal(t, job.OutcomeReturned, w.job(second).Attempts[0].Outcome)
	})
}

func TestAnUnreachableWorkerIsBackedOff(t *testing.T) {
	inBubble(t, func(w *world) {
		m := w.machine("m", 4)
		m.hello()
		w.bus.mu.Lock()
		delete(w.bus.sessions, "m")
		w.bus.mu.Unlock()
		jobID := w.submit()
		w.after(14 * time.Second) // then it is late anyhow
		n := len(w.job(jobID).Attempts)
		require.Greater(t, n, 4)
		require.Less(t, n, 9, "100, 200, 400, 800 ms, ...")
		require.Equal(t, job.Queued, w.job(jobID).State)
		m.session()
		m.hello()
		require.Equal(t, job.Assigned, w.job(jobID).State, "a hello ends the wait")
	})
}

func TestAWorkerWhoseHeartbeatIsLateGetsNothing(t *testing.T) {
	inBubble(t, func(w *world) {
		m := w.machine("m", 4)
		m.hello()
		w.after(15 * time.Second)
		jobID := w.submit()
		require.Equal(t, job.Queued, w.job(jobID).State)
		list, err := w.term.Workers(context.Background(), busmsg.ListWorkers{})
		require.NoError(t, err)
		require.Equal(t, fleet.StatusUnknown, list.Items[0].Status)
		m.heartbeat()
		require.Equal(t, job.Assigned, w.job(jobID).State)
	})
}

func TestFailingWorkersAreSetAside(t *testing.T) {
	inBubble(t, func(w *world) {
		m := w.machine("m", 1)
		m.hello()
		fails := func(n int) {
			as := w.assigned("m")
			require.Len(t, as, n)
			a := as[n-1]
			w.event(a.JobID, job.Result{Fence: a.Fence(), WorkerID: "m", Outcome: job.OutcomeFailed, Reason: job.ReasonDiskFull, FinishedAt: time.Now()})
		}
		for i := range 3 {
			w.submit(func(r *job.Record) { r.InfraFailures = job.InfraBudget })
			fails(i + 1)
		}
		next := w.submit()
		require.Equal(t, job.Queued, w.job(next).State)
		list, err := w.term.Workers(context.Background(), busmsg.ListWorkers{})
		require.NoError(t, err)
		require.WithinDuration(t, time.Now().Add(10*time.Second), list.Items[0].SetAsideUntil, time.Second)
		require.Contains(t, list.Items[0].Reason, "disk_full")
		ex, err := w.term.Explain(context.Background(), busmsg.Explain{JobID: next})
		require.NoError(t, err)
		require.Equal(t, []busmsg.BlockReason{{Reason: fleet.BlockSetAside, Workers: 1}}, ex.BlockedBy)
		w.after(9 * time.Second)
		m.heartbeat()
		require.Equal(t, job.Queued, w.job(next).State)
		w.after(time.Second)
		require.Equal(t, job.Assigned, w.job(next).State, "it gets another chance")
	})
}

func TestOneCrashDoesNotSetAWorkerAside(t *testing.T) {
	inBubble(t, func(w *world) {
		m := w.machine("m", 8)
		m.hello()
		for range 8 {
			w.submit()
		}
		require.Len(t, w.assigned("m"), 8)
		m.session()
		m.hello()
		require.Equal(t, 8, w.written(job.KindLost))
		require.Len(t, w.assigned("m"), 8)
		w.after(2 * time.Second)
		require.Len(t, w.assigned("m"), 16)
	})
}

func TestASilentFollowerIsMadeGoodByTheSweep(t *testing.T) {
	inBubble(t, func(w *world) {
		m := w.machine("m", 4)
		m.hello()
		gone := w.submit(func(r *job.Record) { r.Spec.Constraints.OS = "plan9" })
		w.bus.mu.Lock()
		w.bus.silent = true
		delete(w.bus.entries, gone) // ended and purged, unseen
		w.bus.mu.Unlock()
		jobID := w.submit()
		require.Equal(t, job.Queued, w.job(jobID).State)
		w.after(sweepEvery - 1)
		m.heartbeat()
		w.after(time.Second)
		require.Equal(t, job.Assigned, w.job(jobID).State)
		_, err := w.term.Explain(context.Background(), busmsg.Explain{JobID: gone})
		var qe *busmsg.QueryError
		require.ErrorAs(t, err, &qe)
	})
}

func TestTheBusGoesAwayInTheMiddle(t *testing.T) {
	for _, failure := range []error{bus.ErrUnavailable, bus.ErrAmbiguous} {
		t.Run(failure.Error(), func(t *testing.T) {
			inBubble(t, func(w *world) {
				m := w.machine("m", 4)
				m.hello()
				w.bus.mu.Lock()
				w.bus.failing = failure
				w.bus.mu.Unlock()
				jobID := w.submit()
				w.after(10 * time.Second)
				require.Equal(t, job.Queued, w.job(jobID).State)
				w.bus.mu.Lock()
				w.bus.failing = nil
				w.bus.mu.Unlock()
				m.heartbeat()
				w.after(5 * time.Second)
				require.Equal(t, job.Assigned, w.job(jobID).State)
				require.Equal(t, 1, w.job(jobID).Attempt)
				require.Len(t, w.assigned("m"), 1)
			})
		})
	}
}

func TestLossesAreWrittenWhenTheBusIsBack(t *testing.T) {
	inBubble(t, func(w *world) {
		_, a := w.one()
		w.after(65 * time.Second)
		w.bus.mu.Lock()
		w.bus.failing = bus.ErrUnavailable
		w.bus.mu.Unlock()
		w.after(time.Minute)
		require.Equal(t, job.Assigned, w.job(a.JobID).State)
		w.bus.mu.Lock()
		w.bus.failing = nil
		w.bus.mu.Unlock()
		w.after(time.Second)
		require.Equal(t, job.Retrying, w.job(a.JobID).State)
	})
}

func TestTimeouts(t *testing.T) {
	seconds := func(n int) func(*job.Record) {
		return func(r *job.Record) { r.Spec.Timeout, r.Spec.Stop.GraceSeconds = n, new(int) }
	}
	t.Run("execution, worker away", func(t *testing.T) {
		inBubble(t, func(w *world) {
			m, a := w.one(seconds(10))
			m.reports(a, workerproto.TypeStarted)
			w.after(40*time.Second - time.Millisecond)
			require.Equal(t, job.Running, w.job(a.JobID).State)
			w.after(time.Second)
			rec := w.job(a.JobID)
			require.Equal(t, job.TimedOut, rec.State)
			require.Equal(t, job.ReasonExecutionTimeout, rec.Reason)
		})
	})
	t.Run("execution, worker there", func(t *testing.T) {
		inBubble(t, func(w *world) {
			m, a := w.one(seconds(10))
			m.reports(a, workerproto.TypeStarted)
			m.holds(a, workerproto.PhaseStarted)
			m.heartbeats(100 * time.Second)
			require.Equal(t, job.Running, w.job(a.JobID).State, "it watches its own time")
		})
	})
	t.Run("queue, counted from the start of the wait", func(t *testing.T) {
		inBubble(t, func(w *world) {
			m := w.machine("m", 1)
			m.hello()
			jobID := w.submit(func(r *job.Record) {
				r.Spec.Timeouts.Queue = 30
				r.Spec.Retry.MaxAttempts = 2
			})
			a := w.assigned("m")[0]
			w.after(10 * time.Second)
			one := 1
			m.facts.Slots = 0
			m.hello()
			rec := w.event(jobID, job.Result{Fence: a.Fence(), WorkerID: "m", Outcome: job.OutcomeFailed, ExitCode: &one, StartedAt: time.Now(), FinishedAt: time.Now()})
			require.Equal(t, job.Retrying, rec.State)
			w.after(time.Until(rec.RetryAt) + 29*time.Second)
			require.Equal(t, job.Queued, w.job(jobID).State)
			w.after(1100 * time.Millisecond)
			require.Equal(t, job.Failed, w.job(jobID).State)
			require.Equal(t, job.ReasonQueueTimeout, w.job(jobID).Reason)
		})
	})
	t.Run("total, noticed when it can be", func(t *testing.T) {
		inBubble(t, func(w *world) {
			m, a := w.one(func(r *job.Record) { r.Spec.Timeouts.Total = 5 })
			w.after(10 * time.Second)
			require.Equal(t, job.Assigned, w.job(a.JobID).State)
			m.holds(a, workerproto.PhasePreparing)
			m.heartbeat()
			w.after(100 * time.Millisecond)
			require.Equal(t, job.TimedOut, w.job(a.JobID).State)
			require.Len(t, w.cancels("m"), 1)
		})
	})
}

func TestAStopDeliversWhatIsDecided(t *testing.T) {
	inBubble(t, func(w *world) {
		m := w.machine("m", 4)
		m.hello()
		w.bus.command = func(_ string, cmd busmsg.WorkerCommand) (busmsg.WorkerCommandReply, error) {
			time.Sleep(time.Second)
			return delivered(m.facts.SessionID, cmd), nil
		}
		jobID := w.submit()
		second := w.submit()
		w.stop()
		require.Len(t, w.assigned("m"), 2)
		require.Equal(t, job.Assigned, w.job(jobID).State)
		require.Equal(t, job.Assigned, w.job(second).State)
	})
}

func TestTimersOfEndedJobsAreDropped(t *testing.T) {
	inBubble(t, func(w *world) {
		for range 5000 {
			jobID := w.submit(func(r *job.Record) { r.Spec.Timeouts.Total = job.MaxWaitSeconds })
			w.event(jobID, job.CancelRequest{})
		}
		require.NoError(t, w.term.ask(context.Background(), func(time.Time) {
			require.Less(t, len(w.term.timers), 2100)
			require.Empty(t, w.term.jobs)
			require.Empty(t, w.term.owners)
			require.Zero(t, w.term.kept)
		}))
	})
}

func TestAStallCountsEveryLeaseAsRenewed(t *testing.T) {
	for stall, renewed := range map[time.Duration]bool{4 * time.Second: false, 6 * time.Second: true} {
		t.Run(stall.String(), func(t *testing.T) {
			inBubble(t, func(w *world) {
				_, a := w.one()
				w.after(68500 * time.Millisecond)
				require.NoError(t, w.term.ask(context.Background(), func(time.Time) { time.Sleep(stall) }))
				w.after(time.Second)
				require.Equal(t, renewed, w.job(a.JobID).State.Leased())
			})
		})
	}
}

func TestTheLastRegistrationCountsWhateverTheEdgesClockSays(t *testing.T) {
	inBubble(t, func(w *world) {
		m := w.machine("m", 4)
		m.hello()
		first := m.facts
		w.after(time.Second)
		m.session()
		m.facts.ConnectedAt = first.ConnectedAt.Add(-time.Minute) // of another edge
		m.facts.SessionID = id.New(id.Session, m.facts.ConnectedAt)
		w.bus.sessions["m"] = m.facts.SessionID
		require.Equal(t, first.SessionID, m.hello().SessionID)
		w.bus.watched(m.facts)
		synctest.Wait()
		require.Equal(t, m.facts.SessionID, m.hello().SessionID)
		w.bus.watched(first) // what a slow watch still reports
		synctest.Wait()
		require.Equal(t, m.facts.SessionID, m.heartbeat().SessionID)
		w.submit()
		require.Len(t, w.assigned("m"), 1)
		m.holds(w.assigned("m")[0], workerproto.PhaseAccepted)
		require.Len(t, m.heartbeat().Confirmed, 1)
	})
}

func TestASessionThatFallsSilentIsFollowedByWhoeverSpeaks(t *testing.T) {
	inBubble(t, func(w *world) {
		m := w.machine("m", 4)
		older := m.facts
		w.after(time.Second)
		m.session()
		m.hello()
		w.after(10*time.Second + 1)
		m.facts = older
		require.Equal(t, older.SessionID, m.heartbeat().SessionID)
	})
}

func TestSlowWritesNarrowTheWindow(t *testing.T) {
	inBubble(t, func(w *world) {
		m := w.machine("m", 500)
		m.hello()
		w.bus.mu.Lock()
		w.bus.slow = 50 * time.Millisecond // each, one after the other: 64 at once would take more than sendWithin
		w.bus.mu.Unlock()
		for range 300 {
			w.submit()
		}
		for range 10 {
			w.after(4 * time.Second)
			m.heartbeat()
		}
		require.Len(t, w.assigned("m"), 300)
		require.LessOrEqual(t, w.written(job.KindReturn), 32, "only at first was a decision too old to be sent")
	})
}
