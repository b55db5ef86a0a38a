package lead

import (
	"slices"
	"time"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/services/scheduler/internal/plan"
)

// tracked is what memory has of one live job.
type tracked struct {
	id       string
	owner    string
	rev      uint64
	state    job.State
	created  time.Time
	attempt  int
	leaseID  string
	workerID string
	retryAt  time.Time
	waitFrom time.Time // since when the job waits, for its queue timeout
	began    time.Time // of the current attempt's command, while running
	canceled time.Time // when the cancel was asked for

	queueTimeout, totalTimeout, execTimeout, grace time.Duration // zero: none
	fragile                                        bool          // a lost attempt would end it
	queue                                          string
	priority                                       int
	need                                           *plan.Need

	entry  *bus.Entry // the newest record, where it is small
	kept   int        // bytes that it is counted as
	seen   uint32     // the last sweep that found it
	timers int        // in the heap
	gone   bool
	ahead  bool // the dispatch of the current lease was

	lease    *lease              // while a worker may hold one
	dispatch *dispatch           // while an assignment of this term is not settled
	refused  map[string]*backoff // by worker: rejections of this job
	counted  *busmsg.OwnerCounts // where it is counted
	again    []func()            // to be tried once more
}

// lease is what this term knows of a job's current lease beside the record.
type lease struct {
	id       string
	worker   *workerState
	learned  time.Time // when this term first saw it
	assigned time.Time // by the record
	renewed  time.Time
	session  string // that holds it; empty where not known
	phase    phase
	missed   int  // heartbeats in a row that did not list it, while the session is not known
	losing   bool // its loss is being written
	accepted time.Time
	prepared time.Time
	started  time.Time
}

// phase is how far a worker has reported to be.
type phase uint8

const (
	phaseNone phase = iota
	phaseAccepted
	phaseStarted
	phaseEnded
)

func (j *tracked) fence() job.Fence { return job.Fence{Attempt: j.attempt, LeaseID: j.leaseID} }

func (j *tracked) waiting() bool { return j.state == job.Queued || j.state == job.Retrying }

// observe takes in a record: from the follower, a scan, a read, or a write of our
// own. Older ones than what is known change nothing.
func (t *Term) observe(e bus.Entry, now time.Time) *tracked {
	r := &e.Record
	j := t.jobs[r.ID]
	switch {
	case j != nil && e.Revision <= j.rev:
		j.seen = t.sweep
		return j
	case j == nil && (t.ended.knows(r.ID, e.Revision) || r.State.Terminal()):
		return nil
	case j == nil:
		j = &tracked{id: r.ID, owner: r.Owner, created: r.CreatedAt, counted: &busmsg.OwnerCounts{}}
		j.fromSpec(&r.Spec)
		j.need = t.plan.Need(&r.Spec)
		t.jobs[j.id] = j
		if j.totalTimeout > 0 {
			t.remind(now.Add(r.CreatedAt.Add(j.totalTimeout).Sub(now)), timerTotal, j)
		}
	}
	t.learn(j, r, now)
	if r.State.Terminal() {
		t.ended.add(r.ID, e.Revision)
		t.drop(j, now)
		return nil
	}
	before := j.state
	j.rev, j.seen = e.Revision, t.sweep
	j.state, j.attempt, j.leaseID, j.workerID = r.State, r.Attempt, r.LeaseID, r.WorkerID
	j.retryAt, j.waitFrom = r.RetryAt, waitFrom(r)
	j.fragile = r.Spec.OnWorkerLost == job.OnWorkerLostFail || r.InfraBudgetLeft() == 0 || r.State == job.Canceling
	if a := r.Last(); a != nil {
		j.began = a.StartedAt
	}
	if r.Cancel != nil {
		j.canceled = r.Cancel.RequestedAt
	}
	t.keep(j, e)
	t.count(j)
	t.hold(j, r, now)
	if j.dispatch == nil {
		t.settle(j, now)
	}
	if before != j.state {
		t.entered(j, now)
	}
	return j
}

func (j *tracked) fromSpec(s *job.Spec) {
	j.queueTimeout = time.Duration(s.Timeouts.Queue) * time.Second
	j.totalTimeout = time.Duration(s.Timeouts.Total) * time.Second
	j.execTimeout = time.Duration(s.Timeout) * time.Second
	j.grace = time.Duration(s.GraceSeconds()) * time.Second
	j.queue, j.priority = s.Queue, s.PriorityValue()
}

// waitFrom is since when a job waits for a worker. An assignment that came back
// does not start the wait anew.
func waitFrom(r *job.Record) time.Time {
	if r.State == job.Retrying {
		return r.RetryAt
	}
	from := r.StateAt
	for i := len(r.Attempts) - 1; i >= 0; i-- {
		switch a := &r.Attempts[i]; a.Outcome {
		case job.OutcomeReturned, job.OutcomeRejected:
			from = a.AssignedAt
		default:
			return from
		}
	}
	return r.CreatedAt
}

// hold keeps the lease in step with the record.
func (t *Term) hold(j *tracked, r *job.Record, now time.Time) {
	if j.lease != nil && (!r.State.Leased() || j.lease.id != r.LeaseID) {
		t.unhold(j)
	}
	if !r.State.Leased() || j.lease != nil {
		return
	}
	w := t.worker(r.WorkerID)
	j.lease = &lease{id: r.LeaseID, worker: w, learned: now, renewed: now, assigned: r.StateAt}
	if a := r.Last(); a != nil {
		j.lease.assigned = a.AssignedAt
	}
	w.leases[r.LeaseID] = j
	t.leases++
	t.remind(t.expiry(j), timerLease, j)
}

func (t *Term) unhold(j *tracked) {
	delete(j.lease.worker.leases, j.lease.id)
	j.lease = nil
	t.leases--
}

// expiry is when the job's lease runs out.
func (t *Term) expiry(j *tracked) time.Time { return j.lease.renewed.Add(t.cfg.LeaseTTL + j.grace) }

// settle makes queue and reservation what the job's state asks for.
func (t *Term) settle(j *tracked, now time.Time) {
	switch {
	case j.gone:
	case j.state.Leased():
		t.plan.Dequeue(j.id)
		t.plan.Reserve(j.id, j.owner, j.workerID, j.need.Demand, now)
	case j.state == job.Queued:
		t.plan.Release(j.id, now)
		if !t.swept && j.created.Before(t.cutoff) {
			t.gated[j.id] = j
			return
		}
		t.enqueue(j, now)
	default:
		t.plan.Release(j.id, now)
		t.plan.Dequeue(j.id)
	}
	delete(t.gated, j.id)
}

// entered starts what a state brings with it.
func (t *Term) entered(j *tracked, now time.Time) {
	switch j.state {
	case job.Retrying:
		t.remind(now.Add(j.retryAt.Sub(now)), timerRequeue, j)
	case job.Running:
		t.remind(now.Add(j.execBy().Sub(now)), timerExec, j)
	case job.Canceling:
		t.remind(now.Add(t.giveUpAt(j).Sub(now)), timerCancel, j)
		t.cancelNow(j)
	}
	if j.waiting() && j.queueTimeout > 0 {
		t.remind(now.Add(j.waitFrom.Add(j.queueTimeout).Sub(now)), timerQueue, j)
	}
	if j.totalTimeout > 0 && !j.waiting() {
		// It may have passed while the job could not be ended.
		t.remind(now.Add(j.created.Add(j.totalTimeout).Sub(now)), timerTotal, j)
	}
}

// execBy is when the execution of a job whose worker is away counts as timed out.
func (j *tracked) execBy() time.Time { return j.began.Add(j.execTimeout + j.grace + execSlack) }

// giveUpAt is when a cancel is given up on. It leaves time to ask, also where the
// cancel is older than this term.
func (t *Term) giveUpAt(j *tracked) time.Time {
	at := j.canceled.Add(j.grace + t.cfg.LeaseTTL)
	if j.lease != nil {
		if least := j.lease.learned.Add(j.grace + 2*t.cfg.Heartbeat); at.Before(least) {
			return least
		}
	}
	return at
}

// drop forgets a job that ended or is not in the registry any more.
func (t *Term) drop(j *tracked, now time.Time) {
	if t.jobs[j.id] != j {
		return
	}
	delete(t.jobs, j.id)
	delete(t.gated, j.id)
	t.plan.Dequeue(j.id)
	t.plan.Release(j.id, now)
	if j.lease != nil {
		t.unhold(j)
	}
	t.keep(j, bus.Entry{})
	j.state = ""
	t.count(j)
	t.forget(j)
}

// count keeps the numbers of jobs per owner.
func (t *Term) count(j *tracked) {
	c := t.owners[j.owner]
	if c == nil {
		c = &busmsg.OwnerCounts{}
		t.owners[j.owner] = c
	}
	c.Queued -= j.counted.Queued
	c.Running -= j.counted.Running
	*j.counted = busmsg.OwnerCounts{}
	switch {
	case j.state.Leased():
		j.counted.Running = 1
	case j.state != "":
		j.counted.Queued = 1
	}
	c.Queued += j.counted.Queued
	c.Running += j.counted.Running
	if *c == (busmsg.OwnerCounts{}) {
		delete(t.owners, j.owner)
	}
}

// keep remembers a small record, as long as all of them together stay small.
func (t *Term) keep(j *tracked, e bus.Entry) {
	t.kept -= j.kept
	j.entry, j.kept = nil, 0
	if e.Revision == 0 {
		return
	}
	if n := size(&e.Record); n <= keepEntry && t.kept+n <= keepEntries {
		j.entry, j.kept = &e, n
		t.kept += n
	}
}

// size estimates what a record takes in memory.
func size(r *job.Record) int {
	const record, attempt = 1200, 400
	return record + len(r.Attempts)*attempt + len(r.Message) + specSize(&r.Spec)
}

func specSize(s *job.Spec) int {
	const pair = 64
	n := len(s.Command.Shell) + len(s.Stdin) + len(s.ContainerImage)
	for _, a := range s.Command.Argv {
		n += len(a) + 16
	}
	for _, f := range s.Files {
		n += len(f.Path) + len(f.Content) + pair
	}
	for _, m := range []map[string]string{s.Env, s.Labels, s.Constraints.Labels} {
		for k, v := range m {
			n += len(k) + len(v) + pair
		}
	}
	return n
}

// learn draws conclusions about a worker from how an attempt ended.
func (t *Term) learn(j *tracked, r *job.Record, now time.Time) {
	l := j.lease
	if l == nil {
		return
	}
	i := slices.IndexFunc(r.Attempts, func(a job.Attempt) bool { return a.LeaseID == l.id })
	if i < 0 || r.Attempts[i].Outcome == "" {
		return
	}
	a := &r.Attempts[i]
	w := l.worker
	switch {
	case a.Outcome == job.OutcomeReturned, a.Outcome == job.OutcomeCanceled:
	case a.Outcome == job.OutcomeRejected:
		t.refuse(j, w, now)
	case a.Outcome == job.OutcomeLost && a.Reason == job.ReasonCanceled:
	case a.Outcome == job.OutcomeLost, a.Outcome == job.OutcomeFailed && a.Reason.Class() == job.ClassInfra:
		t.failed(w, j, a, now)
	default:
		w.succeeded()
		w.tempo.ended(held(a), now)
		t.hurry(w, now)
	}
}

// ended remembers jobs that ended lately, so that what arrives late about them
// does not bring them back. It holds the last few thousand.
type ended struct{ young, old map[string]uint64 }

const endedHalf = 8192

func (m *ended) add(jobID string, rev uint64) {
	if m.young == nil || len(m.young) >= endedHalf {
		m.old, m.young = m.young, make(map[string]uint64, endedHalf)
	}
	m.young[jobID] = rev
}

// knows reports whether the job ended at or after a revision.
func (m *ended) knows(jobID string, rev uint64) bool {
	at, ok := m.young[jobID]
	if !ok {
		at, ok = m.old[jobID]
	}
	return ok && rev <= at
}

// has reports whether the job is known to have ended.
func (m *ended) has(jobID string) bool { return m.knows(jobID, 0) }
