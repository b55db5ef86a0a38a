package lead

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/fleet"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/services/scheduler/internal/plan"
)

// Bus is what a term needs of the bus. libs/bus says what each call promises.
type Bus interface {
	Follow(ctx context.Context, handle func(bus.Change)) error
	Scan(ctx context.Context, handle func(bus.Entry) error) error
	GetLatest(ctx context.Context, jobID string) (bus.Entry, error)
	Transition(ctx context.Context, jobID string, ev job.Event) (bus.Entry, error)
	TransitionFrom(ctx context.Context, e bus.Entry, ev job.Event) (bus.Entry, error)
	SendCommand(ctx context.Context, workerID string, cmd busmsg.WorkerCommand) (busmsg.WorkerCommandReply, error)
	WatchWorkers(ctx context.Context, handle func(fleet.Worker)) error
	ServerID() string
	Swept(ctx context.Context) (serverID string, err error)
	// ResultsPending is how many results have not become states yet.
	ResultsPending(ctx context.Context) (uint64, error)
}

// Config has the times that a deployment may set.
type Config struct {
	SchedulerID        string
	LeaseTTL           time.Duration // a lease that is not renewed runs out after this and the job's stop grace
	Heartbeat          time.Duration // of workers; a worker is not used when three are missing
	MaxRunningPerOwner int           // jobs of one owner that workers may have at once; 0 is no limit
}

// Times that are not settings. See the package comment for those of leases.
const (
	sendWithin     = 3 * time.Second
	helloMargin    = sendWithin + time.Second
	unlistedAfter  = 3 * sendWithin   // since the assignment, and
	unlistedBeats  = 2                // that many heartbeats in a row did not list it; or
	unlistedAlways = 20 * time.Second // since this term knows of it, where clocks of schedulers differ

	clockGap       = 5 * time.Second        // of the loop: more than this and every lease counts as renewed
	progressDelay  = 100 * time.Millisecond // a job that is past a step by then never costs the write of that step
	commandTimeout = 5 * time.Second
	writeTimeout   = 10 * time.Second
	writePause     = 500 * time.Millisecond // before a write that failed is tried again
	sweepEvery     = 30 * time.Second
	sweptPoll      = 200 * time.Millisecond
	execSlack      = 30 * time.Second // past timeout and grace, for a worker that is away
	resultsWait    = 5 * time.Second  // for results on their way before a loss that would end the job
	stopWithin     = 3 * time.Second  // for dispatches under way at the end of a term

	maxInFlight  = 64
	minInFlight  = 4
	slowWrite    = 500 * time.Millisecond // a write that takes longer halves what may be in flight
	maxDrain     = 512                    // mailbox entries taken before the loop decides
	mailboxSize  = 1024
	keepEntry    = 4 << 10  // bytes of a record that is kept to save a read
	keepEntries  = 32 << 20 // of all of them
	maxChecks    = 256      // unknown leases looked up for one beat
	checksAtOnce = 16
)

// ErrRebuild ends a term whose memory may not match the registry any more: the
// server is another one. Start a new term.
var ErrRebuild = errors.New("the bus server changed")

var errTermOver = errors.New("the term is over")

// Term is one term. Make one with New, call Run once. Its other methods may be
// called from any goroutine while Run runs; afterwards they return an error.
type Term struct {
	bus     Bus
	cfg     Config
	metrics *Metrics
	log     *slog.Logger

	mailbox  chan func(now time.Time)
	over     chan struct{} // closed when the loop has ended
	caughtUp chan struct{} // closed when the state is rebuilt
	ops      sync.WaitGroup
	opsCtx   context.Context
	stopOps  context.CancelFunc

	// All below belongs to the loop.
	plan       *plan.Planner
	jobs       map[string]*tracked
	ended      ended
	workers    map[string]*workerState
	owners     map[string]*busmsg.OwnerCounts
	timers     timerHeap
	deadTimers int // entries of jobs that are gone
	leases     int
	kept       int // bytes of records kept
	serverID   string
	cutoff     time.Time // before the ghost guard is done, only jobs created since
	swept      bool
	gated      map[string]*tracked
	rebuilt    bool
	stopping   bool
	sweep      uint32
	inFlight   int
	window     int            // of dispatches in flight: fewer where writes are slow, so that none is too old to be sent
	dispatches int            // assignments of this term that are not settled
	outgoing   []*workerState // with something in their outbox
	backlog    []func()
	pause      backoff
	last       time.Time // of the loop's clock
	failure    error
}

// New prepares a term; it starts nothing.
func New(b Bus, cfg Config, m *Metrics, log *slog.Logger) *Term {
	ctx, cancel := context.WithCancel(context.Background())
	return &Term{
		bus: b, cfg: cfg, metrics: m, log: log,
		mailbox: make(chan func(time.Time), mailboxSize), over: make(chan struct{}), caughtUp: make(chan struct{}),
		opsCtx: ctx, stopOps: cancel,
		plan: plan.New(cfg.MaxRunningPerOwner), jobs: map[string]*tracked{}, workers: map[string]*workerState{},
		window: maxInFlight,
		owners: map[string]*busmsg.OwnerCounts{}, gated: map[string]*tracked{},
		pause: backoff{least: 100 * time.Millisecond, most: 5 * time.Second},
	}
}

// CaughtUp is closed when everything in the registry is known. Before that the
// term must not answer anybody.
func (t *Term) CaughtUp() <-chan struct{} { return t.caughtUp }

// Run blocks until ctx ends, or returns ErrRebuild. Assignments that are under
// way then are delivered first, for at most stopWithin.
func (t *Term) Run(ctx context.Context) error {
	defer t.stopOps()
	t.serverID = t.bus.ServerID()
	t.last = time.Now()
	t.cutoff = job.Timestamp(t.last)

	feeds, stopFeeds := context.WithCancel(ctx)
	var running sync.WaitGroup
	for _, feed := range []func(context.Context){t.follow, t.watchWorkers, t.pollSwept, t.sweeper} {
		running.Go(func() { feed(feeds) })
	}
	t.loop(ctx)
	stopFeeds()
	t.stopOps()
	close(t.over)
	running.Wait()
	t.ops.Wait()
	t.metrics.reset()
	if ctx.Err() != nil {
		return nil
	}
	return t.failure
}

// post has f run by the loop. It blocks while the mailbox is full and reports
// false when the term is over.
func (t *Term) post(f func(now time.Time)) bool {
	select {
	case t.mailbox <- f:
		return true
	case <-t.over:
		return false
	}
}

// ask has f run by the loop and waits for it.
func (t *Term) ask(ctx context.Context, f func(now time.Time)) error {
	done := make(chan struct{})
	select {
	case t.mailbox <- func(now time.Time) { f(now); close(done) }:
	case <-t.over:
		return errTermOver
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case <-done:
		return nil
	case <-t.over:
		return errTermOver
	}
}

func (t *Term) loop(ctx context.Context) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	done := ctx.Done()
	var stopBy <-chan time.Time
	for {
		select {
		case f := <-t.mailbox:
			now := t.clock()
			f(now)
			t.drain(now)
		case at := <-tick.C:
			now := t.clock()
			t.metrics.loopLag.Observe(max(0, now.Sub(at)).Seconds())
		case <-timer.C:
			t.clock()
		case <-done:
			done, t.stopping = nil, true
			stop := time.NewTimer(stopWithin)
			defer stop.Stop()
			stopBy = stop.C
		case <-stopBy:
			return
		}
		if t.failure != nil && !t.stopping {
			return
		}
		if t.stopping && t.dispatches == 0 {
			return
		}
		now := t.clock() // a stall while events were handled counts too
		t.fire(now)
		t.decide(now)
		t.flush(now)
		t.arm(timer, now)
		t.gauges()
	}
}

// drain takes what else is in the mailbox, so that what came together is
// decided together.
func (t *Term) drain(now time.Time) {
	for range maxDrain {
		select {
		case f := <-t.mailbox:
			f(now)
		default:
			return
		}
	}
}

// clock reads the time and looks for a gap: after a stall of this process or its
// machine nobody could renew anything.
func (t *Term) clock() time.Time {
	now := time.Now()
	if gap := now.Sub(t.last); gap > clockGap {
		t.log.Warn("the scheduler stood still, all leases count as renewed", "gap", gap)
		t.renewAll(now)
	}
	t.last = now
	return now
}

// arm sets the timer to the next moment at which something may be due and can be
// done: a moment that has passed and has to wait for something else would have the
// loop turn without rest.
func (t *Term) arm(timer *time.Timer, now time.Time) {
	next := now.Add(time.Hour)
	if len(t.timers) > 0 && !t.stopping {
		next = earlier(next, t.timers[0].at)
	}
	if at, ok := t.plan.Wake(); ok && t.mayDecide(now) {
		next = earlier(next, at)
	}
	if now.Before(t.pause.until) {
		next = earlier(next, t.pause.until)
	}
	timer.Reset(max(0, next.Sub(now)))
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

func (t *Term) follow(ctx context.Context) {
	_ = t.bus.Follow(ctx, func(c bus.Change) {
		if c.CaughtUp {
			t.post(func(now time.Time) { t.complete() })
			return
		}
		t.post(func(now time.Time) { t.observe(c.Entry, now) })
	}) // ends with ctx only
}

func (t *Term) complete() {
	if !t.rebuilt {
		t.rebuilt = true
		t.log.Info("the queue is rebuilt", "jobs", len(t.jobs), "waiting", t.plan.Waiting()+len(t.gated), "leased", t.leases)
		close(t.caughtUp)
	}
}

func (t *Term) watchWorkers(ctx context.Context) {
	_ = t.bus.WatchWorkers(ctx, func(w fleet.Worker) {
		t.post(func(now time.Time) { t.registered(w, now) })
	}) // ends with ctx only
}

// Reconnected tells the term that the bus was away.
func (t *Term) Reconnected() {
	t.post(func(now time.Time) {
		if id := t.bus.ServerID(); id != t.serverID {
			t.failure = ErrRebuild
			return
		}
		t.renewAll(now)
	})
}

func (t *Term) renewAll(now time.Time) {
	for _, w := range t.workers {
		for _, j := range w.leases {
			j.lease.renewed = now
		}
	}
}

// pollSwept waits for the ghost guard of this life of the server.
func (t *Term) pollSwept(ctx context.Context) {
	tick := time.NewTicker(sweptPoll)
	defer tick.Stop()
	for {
		if id, err := t.bus.Swept(ctx); err == nil && id != "" && id == t.serverID {
			t.post(func(now time.Time) {
				t.swept = true
				for _, j := range t.gated {
					t.settle(j, now)
				}
			})
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// sweeper compares memory with the registry from time to time, since a
// follower can go silent.
func (t *Term) sweeper(ctx context.Context) {
	timer := time.NewTimer(sweepEvery)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-ctx.Done():
			return
		}
		began := time.Now()
		if t.ask(ctx, func(time.Time) { t.sweep++ }) != nil {
			return
		}
		var batch []bus.Entry
		flush := func() {
			entries := batch
			batch = nil
			t.post(func(now time.Time) {
				for _, e := range entries {
					t.swipe(e, now)
				}
			})
		}
		err := t.bus.Scan(ctx, func(e bus.Entry) error {
			if batch = append(batch, e); len(batch) == 256 {
				flush()
			}
			return ctx.Err()
		})
		flush()
		if err == nil {
			t.post(func(now time.Time) { t.missing() })
		} else if ctx.Err() == nil {
			t.log.Warn("the registry could not be swept", "err", err)
		}
		// A long scan makes the next one wait: at most a tenth of the time is spent on it.
		timer.Reset(max(sweepEvery, 10*time.Since(began)))
	}
}

// swipe takes in a record that a scan found.
func (t *Term) swipe(e bus.Entry, now time.Time) {
	if j := t.jobs[e.Record.ID]; (j == nil || j.rev < e.Revision) && !t.ended.knows(e.Record.ID, e.Revision) {
		t.metrics.missed.Inc()
	}
	t.observe(e, now)
}

// missing looks up what a complete scan did not have.
func (t *Term) missing() {
	for _, j := range t.jobs {
		if j.seen != t.sweep && j.dispatch == nil {
			t.reread(j, nil)
		}
	}
}
