package lead

import (
	"context"
	"errors"
	"time"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/failpoint"
	"github.com/cmdexec/cmdexec/services/scheduler/internal/plan"
)

// dispatch is an assignment on its way: decided, then written to the registry,
// then in the worker's outbox, then sent. It is settled when it is known to be
// delivered or not, or can no longer be known.
type dispatch struct {
	lease   string
	worker  *workerState
	decided time.Time
	sent    bool
	attempt int
	spec    *job.Spec // once written
}

// outbox collects what goes to one worker. One command is under way at a time:
// what comes meanwhile goes together in the next.
type outbox struct {
	assign []*tracked
	cancel []workerproto.Lease
	drain  *bool
	busy   bool
	queued bool // in Term.outgoing
}

const (
	maxCommandJobs  = 64
	maxCommandBytes = 256 << 10 // of specs; a larger one goes alone
)

// enqueue puts a waiting job in the queue.
func (t *Term) enqueue(j *tracked, now time.Time) {
	if t.plan.IsWaiting(j.id) {
		return
	}
	t.plan.Enqueue(plan.Job{
		ID: j.id, Owner: j.owner, Queue: j.queue, Priority: j.priority, Created: j.created, Need: j.need,
	}, j.avoidUntil(), now)
}

func (j *tracked) avoidUntil() map[string]time.Time {
	if len(j.refused) == 0 {
		return nil
	}
	avoid := make(map[string]time.Time, len(j.refused))
	for worker, b := range j.refused {
		avoid[worker] = b.until
	}
	return avoid
}

// decide starts as many dispatches as there are jobs to place and writes to spare.
func (t *Term) decide(now time.Time) {
	for t.mayDecide(now) {
		d, ok := t.plan.Next(now)
		if !ok {
			return
		}
		t.metrics.decisions.Inc()
		j := t.jobs[d.JobID]
		if j == nil {
			t.plan.Release(d.JobID, now)
			continue
		}
		j.ahead = d.Ahead
		t.begin(j, d.WorkerID, now)
	}
}

// mayDecide: what is known is complete, writes succeed, and not too many are under way.
func (t *Term) mayDecide(now time.Time) bool {
	return t.rebuilt && !t.stopping && !now.Before(t.pause.until) && t.inFlight+len(t.backlog) < t.window
}

// begin writes an assignment.
func (t *Term) begin(j *tracked, workerID string, now time.Time) {
	d := &dispatch{lease: id.New(id.Lease, now), worker: t.worker(workerID), decided: now}
	j.dispatch = d
	t.dispatches++
	failpoint.At(failpoint.SchedulerDecided)
	t.write(j, job.Assign{WorkerID: workerID, LeaseID: d.lease}, func(e bus.Entry, err error, now time.Time) {
		t.pace(now.Sub(d.decided))
		t.written(j, d, err, now)
	})
}

// pace adapts the number of dispatches in flight to how long a write takes.
func (t *Term) pace(took time.Duration) {
	if took > slowWrite {
		t.window = max(minInFlight, t.window/2)
	} else {
		t.window = min(maxInFlight, t.window+1)
	}
}

// settled ends a dispatch and lets the job's state decide again.
func (t *Term) settled(j *tracked, now time.Time) {
	j.dispatch = nil
	t.dispatches--
	t.settle(j, now)
}

// written goes on after the write of an assignment, or after a read that says
// what became of it.
func (t *Term) written(j *tracked, d *dispatch, err error, now time.Time) {
	if j.gone {
		t.settled(j, now)
		return
	}
	if j.leaseID == d.lease && j.state.Leased() {
		failpoint.At(failpoint.SchedulerAssigned)
		t.pause.reset()
		d.attempt = j.attempt
		t.put(j)
		return
	}
	switch {
	case err == nil || refused(err):
		t.settled(j, now)
	case errors.Is(err, bus.ErrUnavailable):
		t.pause.fail(now)
		t.settled(j, now)
	default:
		t.pause.fail(now)
		t.reread(j, func(err error, now time.Time) { t.written(j, d, err, now) })
	}
}

// put puts a written assignment in its worker's outbox.
func (t *Term) put(j *tracked) {
	w := j.dispatch.worker
	w.out.assign = append(w.out.assign, j)
	t.outgo(w)
}

func (t *Term) outgo(w *workerState) {
	if !w.out.queued && !w.out.busy {
		w.out.queued = true
		t.outgoing = append(t.outgoing, w)
	}
}

// cancelNow tells a worker at once that a job is to be stopped. A loss of this
// command is made good by the next beat.
func (t *Term) cancelNow(j *tracked) {
	if j.lease == nil || j.dispatch != nil {
		return // an assignment that is not sent yet is taken back instead
	}
	t.sendCancel(j.lease.worker, workerproto.Lease{JobID: j.id, Attempt: j.attempt, LeaseID: j.leaseID})
}

func (t *Term) sendCancel(w *workerState, l workerproto.Lease) {
	w.out.cancel = append(w.out.cancel, l)
	t.outgo(w)
}

// flush sends what the outboxes hold.
func (t *Term) flush(now time.Time) {
	for len(t.outgoing) > 0 {
		ws := t.outgoing
		t.outgoing = nil
		for _, w := range ws {
			w.out.queued = false
			t.send(w, now)
		}
	}
}

// send makes one command of a worker's outbox.
func (t *Term) send(w *workerState, now time.Time) {
	if w.out.busy {
		return
	}
	var cmd busmsg.WorkerCommand
	var sent []*tracked
	bytes := 0
	rest := w.out.assign
	for len(rest) > 0 && len(sent) < maxCommandJobs {
		j := rest[0]
		d := j.dispatch
		if j.gone || j.state == job.Canceling || j.leaseID != d.lease || now.Sub(d.decided) > sendWithin || j.spec() == nil {
			rest = rest[1:]
			t.takeBack(j, "not sent", now)
			continue
		}
		n := specSize(j.spec())
		if len(sent) > 0 && bytes+n > maxCommandBytes {
			break
		}
		rest = rest[1:]
		bytes += n
		d.sent = true
		sent = append(sent, j)
		cmd.Assign = append(cmd.Assign, workerproto.Assignment{
			Lease:        workerproto.Lease{JobID: j.id, Attempt: j.attempt, LeaseID: j.leaseID},
			LeaseSeconds: int(t.cfg.LeaseTTL / time.Second),
			Job:          *j.spec(),
		})
	}
	w.out.assign = append([]*tracked(nil), rest...)
	cmd.Cancel, w.out.cancel = w.out.cancel, nil
	cmd.Drain, w.out.drain = w.out.drain, nil
	if len(cmd.Assign)+len(cmd.Cancel) == 0 && cmd.Drain == nil {
		return
	}
	w.out.busy = true
	t.run(func() func(time.Time) {
		ctx, cancel := context.WithTimeout(t.opsCtx, commandTimeout)
		defer cancel()
		reply, err := t.bus.SendCommand(ctx, w.id, cmd)
		if len(sent) > 0 && err == nil {
			failpoint.At(failpoint.SchedulerPushed)
		}
		return func(now time.Time) { t.answered(w, sent, reply, err, now) }
	})
}

// answered takes in what became of a command.
func (t *Term) answered(w *workerState, sent []*tracked, reply busmsg.WorkerCommandReply, err error, now time.Time) {
	w.out.busy = false
	if len(w.out.assign)+len(w.out.cancel) > 0 || w.out.drain != nil {
		t.outgo(w)
	}
	became := make(map[string]busmsg.Delivery, len(reply.Assign))
	if err == nil {
		for _, d := range reply.Assign {
			became[d.LeaseID] = d
		}
		if len(sent) > 0 && younger(reply.SessionID, w.session) {
			t.meet(w, reply.SessionID, now)
		}
	}
	undelivered := false
	for _, j := range sent {
		d, known := became[j.dispatch.lease]
		switch {
		case errors.Is(err, bus.ErrNoResponder):
			undelivered = true
			t.takeBack(j, "the worker is not connected", now)
		case errors.Is(err, bus.ErrUnavailable), errors.Is(err, bus.ErrTooLarge):
			t.pause.fail(now)
			t.takeBack(j, "the command could not be sent", now)
		case known && !d.Delivered:
			undelivered = true
			t.takeBack(j, d.Reason, now)
		case known:
			w.returns.reset()
			t.metrics.delivered.Inc()
			t.deliveredTo(j, reply.SessionID, now)
		default:
			// Nobody knows: the worker reports, or the lease runs out.
			lease := j.dispatch.lease
			t.settled(j, now)
			t.afterSend(j, lease)
		}
	}
	if undelivered {
		t.backOff(w, w.returns.fail(now), now)
	}
}

// deliveredTo notes the session that has an assignment. That session may have
// been replaced meanwhile by one that said hello without it.
func (t *Term) deliveredTo(j *tracked, session string, now time.Time) {
	lease := j.dispatch.lease
	t.settled(j, now)
	if j.gone || j.lease == nil || j.lease.id != lease {
		return
	}
	w := j.lease.worker
	j.lease.session = session
	if session != w.session && !younger(session, w.session) && w.greeted && !w.holding[lease] {
		t.lose(j, "session", now)
		return
	}
	t.afterSend(j, lease)
}

// afterSend sends the cancel that came while the assignment was on its way.
func (t *Term) afterSend(j *tracked, lease string) {
	if !j.gone && j.leaseID == lease && j.state == job.Canceling {
		t.cancelNow(j)
	}
}

// takeBack returns an assignment that definitively did not reach its worker.
func (t *Term) takeBack(j *tracked, why string, now time.Time) {
	lease, attempt := j.dispatch.lease, j.dispatch.attempt
	if j.gone || j.leaseID != lease || !j.state.Leased() {
		t.settled(j, now)
		return
	}
	t.settled(j, now)
	t.metrics.returned.WithLabelValues(string(job.OutcomeReturned)).Inc()
	t.persist(j, job.Return{
		Fence:   job.Fence{Attempt: attempt, LeaseID: lease},
		Outcome: job.OutcomeReturned, Message: why,
	})
}

// spec is the job's spec while it is dispatched.
func (j *tracked) spec() *job.Spec {
	switch {
	case j.dispatch != nil && j.dispatch.spec != nil:
		return j.dispatch.spec
	case j.entry != nil:
		return &j.entry.Record.Spec
	}
	return nil
}

// refused reports whether the state table, or the absence of the job, said no.
func refused(err error) bool {
	return errors.Is(err, job.ErrTerminal) || errors.Is(err, job.ErrStale) || errors.Is(err, job.ErrUnchanged) ||
		errors.Is(err, job.ErrRefused) || errors.Is(err, bus.ErrNotFound)
}

// write offers an event to the registry and takes the outcome in. then, which may
// be nil, runs in the loop afterwards. For a refusal the outcome is the current
// record; where there is none the job is forgotten.
func (t *Term) write(j *tracked, ev job.Event, then func(e bus.Entry, err error, now time.Time)) {
	from := j.entry
	t.run(func() func(time.Time) {
		ctx, cancel := context.WithTimeout(t.opsCtx, writeTimeout)
		defer cancel()
		var e bus.Entry
		var err error
		if from != nil {
			e, err = t.bus.TransitionFrom(ctx, *from, ev)
		} else {
			e, err = t.bus.Transition(ctx, j.id, ev)
		}
		return func(now time.Time) {
			t.take(j, e, err, now)
			if then != nil {
				then(e, err, now)
			}
		}
	})
}

// take takes in what a write or a read returned.
func (t *Term) take(j *tracked, e bus.Entry, err error, now time.Time) {
	switch {
	case errors.Is(err, bus.ErrNotFound):
		t.drop(j, now)
	case e.Revision != 0 && e.Record.ID == j.id:
		if d := j.dispatch; d != nil && e.Record.LeaseID == d.lease {
			d.spec = &e.Record.Spec
		}
		t.observe(e, now)
	}
	if err != nil && !refused(err) {
		t.metrics.failures.Inc()
		t.log.Debug("a registry request failed", "job", j.id, "err", err)
	}
}

// persist is write for an event that must come to pass: it is offered again while
// the bus is away. Whether it still applies is the registry's to say.
func (t *Term) persist(j *tracked, ev job.Event) {
	t.write(j, ev, func(_ bus.Entry, err error, now time.Time) {
		if err != nil && !refused(err) && !j.gone {
			t.later(j, now, func() { t.persist(j, ev) })
		}
	})
}

// later has f run after a pause, unless the job is gone by then.
func (t *Term) later(j *tracked, now time.Time, f func()) {
	j.again = append(j.again, f)
	t.remind(now.Add(writePause), timerAgain, j)
}

// reread reads a job from the registry until it gets an answer, takes it in and
// runs then.
func (t *Term) reread(j *tracked, then func(err error, now time.Time)) {
	t.run(func() func(time.Time) {
		ctx, cancel := context.WithTimeout(t.opsCtx, writeTimeout)
		defer cancel()
		e, err := t.bus.GetLatest(ctx, j.id)
		return func(now time.Time) {
			if err != nil && !errors.Is(err, bus.ErrNotFound) {
				t.metrics.failures.Inc()
				if t.stopping && j.dispatch != nil {
					t.settled(j, now)
					return
				}
				t.later(j, now, func() { t.reread(j, then) })
				return
			}
			t.take(j, e, err, now)
			if then != nil {
				then(err, now)
			}
		}
	})
}

// run has op run on a goroutine of its own and what it returns by the loop. At
// most maxInFlight run at once, others wait in order.
func (t *Term) run(op func() func(now time.Time)) {
	start := func() {
		t.inFlight++
		t.ops.Go(func() {
			after := op()
			t.post(func(now time.Time) {
				t.inFlight--
				if len(t.backlog) > 0 {
					next := t.backlog[0]
					t.backlog[0] = nil
					t.backlog = t.backlog[1:]
					next()
				}
				after(now)
			})
		})
	}
	if t.inFlight >= maxInFlight {
		t.backlog = append(t.backlog, start)
		return
	}
	start()
}
