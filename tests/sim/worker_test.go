package sim

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"sync"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
	"github.com/cmdexec/cmdexec/libs/kit/lifecycle"
)

// worker is a worker over plain HTTP. It keeps the rules of a worker about leases
// (docs/protocol.md) and none about reporting in time.
type worker struct {
	w  *world
	id string

	mu      sync.Mutex
	cut     time.Time // until when it reaches nobody
	end     context.CancelFunc
	pause   time.Duration // before it comes back
	session string
	execs   map[string]*exec // by lease
	over    map[string]bool  // leases that it had
	taken   int
}

const slots = 2

// exec is an attempt at this worker.
type exec struct {
	workerproto.Assignment
	x       *worker
	r       *rand.Rand
	phase   workerproto.Phase
	renewed time.Time     // when what confirmed its lease last was sent
	life    time.Duration // it stops itself so long after that
	stop    string        // why it is to stop
	stopped chan struct{}
	silent  bool // nothing of it is reported
}

func newWorker(w *world, workerID string) *worker { return &worker{w: w, id: workerID} }

// run lives until ctx ends, and again after each crash.
func (x *worker) run(ctx context.Context) {
	for n := 1; ctx.Err() == nil; n++ {
		life, end := context.WithCancel(ctx)
		x.mu.Lock()
		x.end, x.pause, x.session = end, 0, ""
		x.execs, x.over = map[string]*exec{}, map[string]bool{}
		x.mu.Unlock()
		x.live(life, source(x.w.seed, fmt.Sprintf("%s life %d", x.id, n)))
		end()
		x.mu.Lock()
		pause := x.pause
		x.mu.Unlock()
		_ = lifecycle.Sleep(ctx, pause)
	}
}

// crash kills the worker, and all that it runs with it.
func (x *worker) crash(pause time.Duration) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.pause = pause
	x.end()
}

// cutOff has the worker reach nobody for a while.
func (x *worker) cutOff(d time.Duration) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.cut = time.Now().Add(d)
}

// live holds one session after the other.
func (x *worker) live(life context.Context, r *rand.Rand) {
	var running sync.WaitGroup
	defer running.Wait()
	for n := 1; life.Err() == nil; n++ {
		if !x.register(life, r) {
			_ = lifecycle.Sleep(life, between(r, 100*time.Millisecond, time.Second))
			continue
		}
		ctx, over := context.WithCancel(life)
		beats := source(x.w.seed, fmt.Sprintf("%s beats %d %d", x.id, n, r.Uint64()))
		polls := source(x.w.seed, fmt.Sprintf("%s polls %d %d", x.id, n, r.Uint64()))
		var parts sync.WaitGroup
		parts.Go(func() {
			defer over()
			x.heartbeats(ctx, beats)
		})
		parts.Go(func() {
			defer over()
			x.polls(ctx, life, polls, &running)
		})
		parts.Wait()
		over()
	}
}

// call sends a request to the edge. A body is JSON; into gets the answer.
func (x *worker) call(ctx context.Context, r *rand.Rand, method, target string, body, into any, timeout time.Duration) (answer, error) {
	x.mu.Lock()
	session, cut := x.session, x.cut
	x.mu.Unlock()
	if time.Now().Before(cut) {
		_ = lifecycle.Sleep(ctx, min(time.Second, time.Until(cut)))
		return answer{}, errNoServer
	}
	token, err := auth.MintWorker([]byte(workerSecret), x.id, time.Hour, time.Now())
	if err != nil {
		return answer{}, err
	}
	var data []byte
	if body != nil {
		if data, err = json.Marshal(body); err != nil {
			return answer{}, err
		}
	}
	header := http.Header{}
	header.Set(workerproto.TokenHeader, token)
	if session != "" && target != workerproto.PathRegister {
		header.Set(workerproto.SessionHeader, session)
	}
	a, err := x.w.call(ctx, r, x.w.names["edge"], method, target, header, data, timeout)
	if err == nil && a.status == http.StatusOK {
		err = json.Unmarshal(a.body, into)
	}
	return a, err
}

const answerTimeout = 5 * time.Second

func (x *worker) register(ctx context.Context, r *rand.Rand) bool {
	reg := workerproto.Register{
		WorkerID: x.id, Hostname: x.id, OS: "linux", Arch: "amd64", CPUCores: 8, TotalMemory: 64 << 30,
		Executors: []string{job.ExecutorProcess}, Slots: slots, Protocol: workerproto.Version, Running: []workerproto.RunningLease{},
	}
	x.mu.Lock()
	for _, l := range sortedKeys(x.execs) {
		if e := x.execs[l]; !e.silent {
			reg.Running = append(reg.Running, workerproto.RunningLease{Lease: e.Lease})
		}
	}
	x.mu.Unlock()
	var w workerproto.Welcome
	a, err := x.call(ctx, r, http.MethodPost, workerproto.PathRegister, reg, &w, answerTimeout)
	if err != nil || a.status != http.StatusOK {
		return false
	}
	x.mu.Lock()
	x.session = a.header.Get(workerproto.SessionHeader)
	x.mu.Unlock()
	for _, l := range w.Stale {
		x.drop(l.LeaseID)
	}
	return true
}

// gone says that an answer ends the session.
func gone(a answer, err error) bool {
	return err == nil && (a.status == http.StatusConflict || a.status == http.StatusMisdirectedRequest)
}

func (x *worker) heartbeats(ctx context.Context, r *rand.Rand) {
	content := time.Now()
	for ctx.Err() == nil {
		sent := time.Now()
		hb := workerproto.Heartbeat{WorkerID: x.id, Status: workerproto.StatusIdle, Running: []workerproto.PhaseLease{}}
		x.mu.Lock()
		hb.FreeSlots = max(0, slots-x.taken)
		for _, l := range sortedKeys(x.execs) {
			if e := x.execs[l]; !e.silent {
				hb.Running = append(hb.Running, workerproto.PhaseLease{Lease: e.Lease, Phase: e.phase})
			}
		}
		if x.taken > 0 {
			hb.Status = workerproto.StatusBusy
		}
		x.mu.Unlock()
		var b workerproto.Beat
		a, err := x.call(ctx, r, http.MethodPost, workerproto.PathHeartbeat, hb, &b, answerTimeout)
		switch {
		case gone(a, err):
			return
		case err == nil && a.status == http.StatusOK:
			content = sent
			x.beat(b, sent)
		case time.Since(content) > 5*beatSeconds*time.Second:
			return
		}
		_ = lifecycle.Sleep(ctx, beatSeconds*time.Second)
	}
}

func (x *worker) beat(b workerproto.Beat, sent time.Time) {
	x.mu.Lock()
	for _, l := range b.Confirmed {
		if e := x.execs[l]; e != nil && sent.After(e.renewed) {
			e.renewed = sent
		}
	}
	for _, l := range b.Cancel {
		if e := x.execs[l.LeaseID]; e != nil {
			e.halt("cancel")
		}
	}
	x.mu.Unlock()
	for _, l := range b.Stale {
		x.drop(l)
	}
}

// drop stops what is not this worker's any more; nothing of it is reported.
func (x *worker) drop(leaseID string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if e := x.execs[leaseID]; e != nil {
		e.silent = true
		e.halt("stale")
	}
}

// halt asks an attempt to stop; the caller holds mu.
func (e *exec) halt(why string) {
	if e.stop == "" {
		e.stop = why
		close(e.stopped)
	}
}

func (x *worker) polls(ctx, life context.Context, r *rand.Rand, running *sync.WaitGroup) {
	for n := 1; ctx.Err() == nil; n++ {
		sent := time.Now()
		var asg workerproto.Assignment
		a, err := x.call(ctx, r, http.MethodGet, workerproto.PathGetJob+"?waitSeconds=3", nil, &asg, answerTimeout+3*time.Second)
		switch {
		case gone(a, err):
			return
		case err == nil && a.status == http.StatusOK:
			x.take(life, source(x.w.seed, fmt.Sprintf("%s %s %d %d", x.id, "attempt", n, r.Uint64())), asg, sent, running)
		case err == nil && a.status == http.StatusNoContent:
			_ = lifecycle.Sleep(ctx, time.Millisecond)
		default:
			_ = lifecycle.Sleep(ctx, between(r, 100*time.Millisecond, time.Second))
		}
		if ctx.Err() == nil && a.header.Get(workerproto.HeartbeatHeader) != "" {
			var b workerproto.Beat
			sent := time.Now()
			hb := workerproto.Heartbeat{WorkerID: x.id, Status: workerproto.StatusIdle, FreeSlots: slots, Running: x.listed()}
			if a, err := x.call(ctx, r, http.MethodPost, workerproto.PathHeartbeat, hb, &b, answerTimeout); err == nil && a.status == http.StatusOK {
				x.beat(b, sent)
			}
		}
	}
}

func (x *worker) listed() []workerproto.PhaseLease {
	x.mu.Lock()
	defer x.mu.Unlock()
	out := []workerproto.PhaseLease{}
	for _, l := range sortedKeys(x.execs) {
		if e := x.execs[l]; !e.silent {
			out = append(out, workerproto.PhaseLease{Lease: e.Lease, Phase: e.phase})
		}
	}
	return out
}

// take begins an assignment or rejects it.
func (x *worker) take(life context.Context, r *rand.Rand, asg workerproto.Assignment, sent time.Time, running *sync.WaitGroup) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.over[asg.LeaseID] || x.execs[asg.LeaseID] != nil {
		return // a repeat
	}
	x.over[asg.LeaseID] = true
	limit := selfStop
	if asg.LeaseSeconds > 0 {
		limit = min(limit, time.Duration(asg.LeaseSeconds)*time.Second/4*3)
	}
	reject := x.taken >= slots || time.Since(sent) > limit || chance(r, 0.04)
	for _, e := range x.execs {
		if e.JobID == asg.JobID && e.phase != workerproto.PhaseEnded {
			e.silent = true
			e.halt("stale")
			reject = true
		}
	}
	if reject {
		running.Go(func() {
			mark := x.w.oracle.send(asg.Lease, x.id, job.OutcomeRejected, false)
			res := workerproto.Result{Lease: asg.Lease, Outcome: job.OutcomeRejected, CPUMs: mark, FinishedAt: job.Timestamp(time.Now())}
			_, _ = x.call(life, r, http.MethodPost, workerproto.PathResult, res, &workerproto.ResultReply{}, answerTimeout)
		})
		return
	}
	e := &exec{Assignment: asg, x: x, r: r, phase: workerproto.PhaseAccepted, renewed: sent, life: limit, stopped: make(chan struct{})}
	x.execs[asg.LeaseID] = e
	x.taken++
	running.Go(func() { e.run(life) })
}

// wait waits for d, and less when the attempt is to stop, also because its lease was
// not confirmed for too long. It reports whether d has passed.
func (e *exec) wait(life context.Context, d time.Duration) bool {
	until := time.Now().Add(d)
	for {
		e.x.mu.Lock()
		now := time.Now()
		giveUp := e.renewed.Add(e.life)
		if !giveUp.After(now) {
			e.halt("lease lost")
		}
		stop := e.stop != ""
		e.x.mu.Unlock()
		switch {
		case life.Err() != nil || stop:
			return false
		case !until.After(now):
			return true
		}
		// A worker looks at its clock a few times in a lease.
		timer := time.NewTimer(min(until.Sub(now), max(giveUp.Sub(now), 0)+selfStop/20))
		select {
		case <-timer.C:
		case <-e.stopped:
		case <-life.Done():
		}
		timer.Stop()
	}
}

func (e *exec) run(life context.Context) {
	x, o, r := e.x, e.x.w.oracle, e.r
	defer func() {
		x.mu.Lock()
		delete(x.execs, e.LeaseID)
		x.mu.Unlock()
	}()
	defer func() {
		x.mu.Lock()
		if e.phase != workerproto.PhaseEnded {
			x.taken--
		}
		x.mu.Unlock()
	}()
	var ms, code int
	if _, err := fmt.Sscanf(e.Job.Command.Shell, "%d %d", &ms, &code); err != nil {
		o.wrong("a command came as %q", e.Job.Command.Shell)
		return
	}
	if chance(r, 0.05) {
		e.forge(life)
	}
	res := workerproto.Result{WorkerID: x.id, Lease: e.Lease, AcceptedAt: job.Timestamp(time.Now())}
	prepare := between(r, 0, 300*time.Millisecond)
	if chance(r, 0.1) {
		e.is(workerproto.PhasePreparing)
		prepare = between(r, 0, 10*time.Second)
	}
	if e.wait(life, prepare) {
		res.StartedAt = job.Timestamp(time.Now())
		o.started(e.Lease, x.id, &e.Job)
		e.is(workerproto.PhaseStarted)
		e.command(life, &res, time.Duration(ms)*time.Millisecond, code)
	} else {
		e.unstarted(&res)
	}
	if life.Err() != nil {
		o.stopped(e.Lease, "crash")
		return
	}
	res.FinishedAt = job.Timestamp(time.Now())
	x.mu.Lock()
	e.phase = workerproto.PhaseEnded
	x.taken--
	silent := e.silent
	x.mu.Unlock()
	if !silent {
		e.report(life, res)
	}
}

func (e *exec) is(p workerproto.Phase) {
	e.x.mu.Lock()
	defer e.x.mu.Unlock()
	e.phase = p
}

// command runs the command: its time, its timeout, and its end when it is stopped,
// which may take as long as its grace.
func (e *exec) command(life context.Context, res *workerproto.Result, d time.Duration, code int) {
	timeout := time.Duration(e.Job.Timeout) * time.Second
	switch {
	case e.wait(life, min(d, timeout)) && d <= timeout:
		e.x.w.oracle.stopped(e.Lease, "")
		res.ExitCode = &code
		if res.Outcome = job.OutcomeSucceeded; code != 0 {
			res.Outcome, res.Reason = job.OutcomeFailed, job.ReasonExitCode
		}
		return
	case life.Err() != nil:
		return
	}
	signalled := time.Now()
	_ = lifecycle.Sleep(life, between(e.r, 0, time.Duration(e.Job.GraceSeconds())*time.Second))
	if life.Err() != nil {
		return
	}
	e.x.mu.Lock()
	why := e.stop
	e.x.mu.Unlock()
	res.Signal = "SIGTERM"
	switch why {
	case "":
		why = "timeout"
		res.Outcome, res.Reason = job.OutcomeTimedOut, job.ReasonExecutionTimeout
	case "cancel":
		res.Outcome, res.Reason = job.OutcomeCanceled, job.ReasonCanceled
		res.Stop = &job.Cancel{
			DeliveredAt: job.Timestamp(signalled), SignalledAt: job.Timestamp(signalled),
			ExitedAt: job.Timestamp(time.Now()), GoneAt: job.Timestamp(time.Now()),
		}
	default:
		res.Outcome, res.Reason = job.OutcomeFailed, job.ReasonLeaseLost
	}
	e.x.w.oracle.stopped(e.Lease, why)
}

// unstarted is the result of an attempt that was stopped before its command began.
func (e *exec) unstarted(res *workerproto.Result) {
	e.x.mu.Lock()
	defer e.x.mu.Unlock()
	if res.Outcome, res.Reason = job.OutcomeFailed, job.ReasonLeaseLost; e.stop == "cancel" {
		now := job.Timestamp(time.Now())
		res.Outcome, res.Reason = job.OutcomeCanceled, job.ReasonCanceled
		res.Stop = &job.Cancel{DeliveredAt: now, GoneAt: now}
	}
}

// report delivers the result: soon, late, more than once, or never.
func (e *exec) report(life context.Context, res workerproto.Result) {
	r := e.r
	res.CPUMs = e.x.w.oracle.send(e.Lease, e.x.id, res.Outcome, false)
	times := 1
	switch p := r.Float64(); {
	case e.x.w.calm.Load():
	case p < 0.12:
		_ = lifecycle.Sleep(life, between(r, 0, 12*time.Second))
	case p < 0.22:
		times = 2 + r.IntN(2)
	case p < 0.27:
		return // it forgets what it had
	}
	for done := 0; done < times && life.Err() == nil; {
		var reply workerproto.ResultReply
		a, err := e.x.call(life, r, http.MethodPost, workerproto.PathResult, res, &reply, answerTimeout)
		if err == nil && a.status == http.StatusOK {
			if done++; done < times {
				_ = lifecycle.Sleep(life, between(r, 0, 6*time.Second))
			}
			continue
		}
		_ = lifecycle.Sleep(life, between(r, 100*time.Millisecond, time.Second))
	}
}

// forge sends a success under a lease that is not, not yet or not any more the one
// that this worker has.
func (e *exec) forge(life context.Context) {
	l := e.Lease
	switch e.r.IntN(3) {
	case 0:
		l.LeaseID = id.New(id.Lease, time.Now())
	case 1:
		l.Attempt++
	case 2:
		if l.Attempt--; l.Attempt == 0 {
			l.Attempt = 7
		}
	}
	code := 0
	res := workerproto.Result{
		WorkerID: e.x.id, Lease: l, Outcome: job.OutcomeSucceeded, ExitCode: &code,
		CPUMs: e.x.w.oracle.send(l, e.x.id, job.OutcomeSucceeded, true), FinishedAt: job.Timestamp(time.Now()),
	}
	_, _ = e.x.call(life, e.r, http.MethodPost, workerproto.PathResult, res, &workerproto.ResultReply{}, answerTimeout)
}
