package lead

import (
	"time"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
)

// fire handles the timers that have come.
func (t *Term) fire(now time.Time) {
	if t.stopping {
		return
	}
	for {
		x, ok := t.due(now)
		if !ok {
			return
		}
		t.fired(x, now)
	}
}

func (t *Term) fired(x timer, now time.Time) {
	j := x.job
	if !t.rebuilt { // what is known may be old
		t.remind(now.Add(time.Second), x.kind, j)
		return
	}
	current := j.lease != nil && j.lease.id == x.lease
	switch x.kind {
	case timerAgain:
		again := j.again
		j.again = nil
		for _, f := range again {
			f()
		}
	case timerLease:
		if current {
			t.leaseDue(j, now)
		}
	case timerRequeue:
		if j.state == job.Retrying {
			t.deadline(x, j.retryAt, now, job.Requeue{})
		}
	case timerQueue:
		if j.waiting() {
			t.deadline(x, j.waitFrom.Add(j.queueTimeout), now, job.Deadline{Which: job.ReasonQueueTimeout})
		}
	case timerTotal:
		// An assignment that nobody has reported on yet cannot be ended: its next step
		// or its loss brings the job back here.
		if j.state != job.Assigned && j.state != job.Canceling {
			t.deadline(x, j.created.Add(j.totalTimeout), now, job.Deadline{Which: job.ReasonTotalTimeout})
		}
	case timerExec:
		t.execDue(x, now)
	case timerCancel:
		if current && j.state == job.Canceling {
			t.deadline(x, t.giveUpAt(j), now, job.GiveUp{Fence: j.fence()})
		}
	case timerPrepare:
		if current && j.state == job.Assigned && j.lease.phase == phaseAccepted && j.dispatch == nil {
			t.write(j, job.Prepare{Fence: j.fence(), AcceptedAt: j.lease.accepted}, nil)
		}
	case timerStart:
		if current && (j.state == job.Assigned || j.state == job.Preparing) && j.lease.phase == phaseStarted {
			t.writeStart(j)
		}
	}
}

// deadline offers an event when its time has come; else it waits on. A job that is
// being dispatched is looked at again when that is over.
func (t *Term) deadline(x timer, at, now time.Time, ev job.Event) {
	switch {
	case now.Before(at):
		t.remind(now.Add(at.Sub(now)), x.kind, x.job)
		return
	case x.job.dispatch != nil:
		t.remind(now.Add(progressDelay), x.kind, x.job)
		return
	}
	j := x.job
	was := workerproto.Lease{JobID: j.id, Attempt: j.attempt, LeaseID: j.leaseID}
	var holder *workerState
	if j.lease != nil {
		holder = j.lease.worker
	}
	t.write(j, ev, func(e bus.Entry, err error, now time.Time) {
		switch {
		case err == nil:
			if d, ok := ev.(job.Deadline); ok {
				t.metrics.deadlines.WithLabelValues(string(d.Which)).Inc()
			}
			if e.Record.State.Terminal() && holder != nil {
				t.sendCancel(holder, was) // the command may still run
			}
		case !j.gone:
			// Refused for now, or the bus is away. The next look is at what is then.
			t.remind(now.Add(writePause), x.kind, j)
		}
	})
}

// leaseDue ends a lease that was not renewed in time.
func (t *Term) leaseDue(j *tracked, now time.Time) {
	if at := t.expiry(j); now.Before(at) {
		t.remind(at, timerLease, j)
		return
	}
	t.metrics.lost.WithLabelValues("expired").Inc()
	t.log.Info("a lease ran out", "job", j.id, "attempt", j.attempt, "worker", j.workerID)
	fence := j.fence()
	t.write(j, job.Lost{Fence: fence}, func(_ bus.Entry, err error, now time.Time) {
		if err != nil && !j.gone && j.leaseID == fence.LeaseID && j.state.Leased() {
			t.remind(now.Add(writePause), timerLease, j)
		}
	})
}

// execDue ends an execution that is long over, where the worker is not there to
// say so. One that is there watches its own time.
func (t *Term) execDue(x timer, now time.Time) {
	j := x.job
	if j.state != job.Running || j.lease == nil {
		return
	}
	at := j.execBy()
	_, a, _, _ := t.plan.Worker(j.workerID)
	if !now.Before(at) && a.Online && now.Before(a.FreshUntil) {
		at = now.Add(t.cfg.Heartbeat)
	}
	t.deadline(x, at, now, job.Deadline{Which: job.ReasonExecutionTimeout})
}

// writeStart writes that a job runs. A failed write is tried again for as long as
// it still does.
func (t *Term) writeStart(j *tracked) {
	l := j.lease
	t.write(j, job.Start{Fence: j.fence(), AcceptedAt: l.accepted, PreparedAt: l.started, StartedAt: l.started},
		func(_ bus.Entry, err error, now time.Time) {
			if err != nil && !refused(err) && j.lease == l {
				t.remind(now.Add(writePause), timerStart, j)
			}
		})
}
