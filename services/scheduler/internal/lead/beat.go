package lead

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/services/scheduler/internal/plan"
)

// check is a lease that memory does not know: the registry has to be asked before
// a worker is told to let go of it.
type check struct {
	reply int // index of the worker in the answer
	lease workerproto.PhaseLease
}

// Beat takes in what an edge's workers said and answers it. It blocks while the
// registry is asked about leases that are not known here, not for the writes
// that the reports cause.
func (t *Term) Beat(ctx context.Context, req busmsg.BeatRequest) (busmsg.BeatReply, error) {
	reply := busmsg.BeatReply{SchedulerID: t.cfg.SchedulerID}
	var checks []check
	err := t.ask(ctx, func(now time.Time) {
		for i := range req.Workers {
			r, unknown, answer := t.beat(&req.Workers[i], now)
			if !answer {
				continue
			}
			for _, l := range unknown {
				checks = append(checks, check{len(reply.Workers), l})
			}
			reply.Workers = append(reply.Workers, r)
		}
	})
	if err != nil {
		return busmsg.BeatReply{}, err
	}
	t.verify(ctx, checks, reply.Workers)
	return reply, nil
}

// verify asks the registry about unknown leases and adds those that are stale to
// the answer. What could not be asked stays undecided.
func (t *Term) verify(ctx context.Context, checks []check, workers []busmsg.WorkerReply) {
	checks = checks[:min(len(checks), maxChecks)]
	stale := make([]bool, len(checks))
	slots := make(chan struct{}, checksAtOnce)
	var wg sync.WaitGroup
	for i := range checks {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			l := &checks[i].lease
			e, err := t.bus.GetLatest(ctx, l.JobID)
			switch {
			case errors.Is(err, bus.ErrNotFound):
				stale[i] = true
			case err == nil:
				r := &e.Record
				stale[i] = r.State.Terminal() || !named(l.Lease, r.Attempt, r.LeaseID) || !r.State.Leased() && !mayHaveEnded(l.Phase)
				if !r.State.Terminal() {
					t.post(func(now time.Time) { t.observe(e, now) })
				}
			}
		})
	}
	wg.Wait()
	for i, c := range checks {
		if stale[i] {
			t.metrics.stale.Inc()
			workers[c.reply].Stale = append(workers[c.reply].Stale, c.lease.Lease)
		}
	}
}

func named(l workerproto.Lease, attempt int, leaseID string) bool {
	return l.Attempt == attempt && l.LeaseID == leaseID && leaseID != ""
}

// mayHaveEnded: a hello does not say how far a worker is.
func mayHaveEnded(p workerproto.Phase) bool { return p == "" || p == workerproto.PhaseEnded }

// beat takes in one worker's part.
func (t *Term) beat(b *busmsg.WorkerBeat, now time.Time) (r busmsg.WorkerReply, unknown []workerproto.PhaseLease, answer bool) {
	w := t.worker(b.WorkerID)
	answer = b.Hello != nil || b.Heartbeat != nil
	r = busmsg.WorkerReply{WorkerID: b.WorkerID, SessionID: b.SessionID, Drain: w.facts.Drain}
	replaced := slices.Contains(w.past, b.SessionID)
	if !t.speaksFor(w, b.SessionID, b.Hello, now) {
		// An older session: it confirms nothing, and the answer names the one that
		// counts. Its reports carry fences and are taken.
		r.SessionID = w.session
		t.progress(w, b, now)
		return r, nil, answer
	}
	if b.Hello != nil {
		t.hello(w, b, replaced, now)
		for _, l := range b.Holding {
			unknown = t.listed(w, workerproto.PhaseLease{Lease: l}, &r, unknown, now)
		}
	}
	t.progress(w, b, now)
	if hb := b.Heartbeat; hb != nil {
		r.Confirmed, r.Stale, unknown = nil, nil, nil // the heartbeat is newer than the hello
		for _, l := range hb.Running {
			unknown = t.listed(w, l, &r, unknown, now)
		}
		w.seen, w.beat = now, *hb
		t.unlisted(w, hb, now)
	}
	if answer {
		t.plan.UpdateWorker(w.id, now, func(a *plan.Availability) { a.Online = true })
		if now.Before(w.returns.until) && b.Hello != nil {
			w.returns.reset()
		}
		t.backOff(w, w.refusals.until, now)
		for _, j := range w.leases {
			if j.state == job.Canceling && j.dispatch == nil {
				r.Cancel = append(r.Cancel, workerproto.Lease{JobID: j.id, Attempt: j.attempt, LeaseID: j.leaseID})
			}
		}
	}
	if b.Closed {
		t.plan.UpdateWorker(w.id, now, func(a *plan.Availability) { a.Online = false })
	}
	t.available(w, now)
	return r, unknown, answer
}

// hello takes in who a worker is and ends leases of its older sessions. One that
// is itself old (a session that was replaced, or that began before the one
// that is known) ends nothing.
func (t *Term) hello(w *workerState, b *busmsg.WorkerBeat, replaced bool, now time.Time) {
	facts := *b.Hello
	facts.ID, facts.SessionID, facts.Drain, facts.Online = b.WorkerID, b.SessionID, w.facts.Drain, true
	old := replaced || w.known && facts.ConnectedAt.Before(w.facts.ConnectedAt)
	if !w.greeted {
		w.beat = workerproto.Heartbeat{}
		w.connected = earlier(facts.ConnectedAt, now)
	}
	w.facts, w.known, w.seen, w.greeted = facts, true, now, true
	t.plan.PutWorker(facts, now)
	w.holding = make(map[string]bool, len(b.Holding))
	for _, l := range b.Holding {
		w.holding[l.LeaseID] = true
	}
	if old {
		return
	}
	for _, j := range w.leases {
		switch l := j.lease; {
		case w.holding[l.id], j.dispatch != nil, l.session == w.session:
			// Held, or on its way: what becomes of it decides; or newer than this hello.
		case l.session != "" && younger(l.session, w.session):
			// Delivered to a session that this term has not heard of yet.
		case l.session != "", l.assigned.Add(helloMargin).Before(w.connected):
			t.lose(j, "session", now)
		}
	}
}

// listed takes in a lease that a worker says it has.
func (t *Term) listed(w *workerState, l workerproto.PhaseLease, r *busmsg.WorkerReply, unknown []workerproto.PhaseLease, now time.Time) []workerproto.PhaseLease {
	j := t.jobs[l.JobID]
	switch {
	case j == nil && !t.ended.has(l.JobID), j != nil && l.Attempt > j.attempt:
		return append(unknown, l)
	case j == nil:
		// It ended. Where the worker has only to hear that its result arrived, letting go is right too.
	case named(l.Lease, j.attempt, j.leaseID) && j.workerID == w.id && j.lease != nil:
		j.lease.renewed, j.lease.session = now, w.session
		r.Confirmed = append(r.Confirmed, l.LeaseID)
		t.reached(j, l.Phase, now)
		return unknown
	case named(l.Lease, j.attempt, j.leaseID) && j.workerID == w.id && mayHaveEnded(l.Phase):
		return unknown // counted as lost, but its result would still be taken
	}
	t.metrics.stale.Inc()
	r.Stale = append(r.Stale, l.Lease)
	return unknown
}

// reached makes good for a report that was lost, from what a heartbeat lists.
func (t *Term) reached(j *tracked, p workerproto.Phase, now time.Time) {
	l := j.lease
	switch p {
	case workerproto.PhaseAccepted, workerproto.PhasePreparing:
		if l.phase < phaseAccepted {
			t.accepted(j, now, now)
		}
	case workerproto.PhaseStarted:
		if l.phase < phaseStarted {
			t.started(j, now, now)
		}
	case workerproto.PhaseEnded:
		l.phase = phaseEnded
	}
}

// unlisted looks at the leases that a heartbeat does not list. They are not renewed;
// of those whose session is not known the loss is certain after a while.
func (t *Term) unlisted(w *workerState, hb *workerproto.Heartbeat, now time.Time) {
	if len(w.leases) == 0 {
		return
	}
	has := make(map[string]bool, len(hb.Running))
	for i := range hb.Running {
		has[hb.Running[i].LeaseID] = true
	}
	for id, j := range w.leases {
		l := j.lease
		if has[id] || j.dispatch != nil || l.session != "" {
			l.missed = 0
			continue
		}
		if l.missed++; l.missed >= unlistedBeats &&
			(now.Sub(l.assigned) > unlistedAfter || now.Sub(l.learned) > unlistedAlways) {
			t.lose(j, "unlisted", now)
		}
	}
}

// progress takes in what a worker reports about its leases.
func (t *Term) progress(w *workerState, b *busmsg.WorkerBeat, now time.Time) {
	for i := range b.Progress {
		p := &b.Progress[i]
		j := t.jobs[p.JobID]
		if j == nil || j.lease == nil || j.lease.worker != w || !named(p.Lease, j.attempt, j.leaseID) {
			continue
		}
		if b.SessionID == w.session {
			j.lease.session = b.SessionID
		}
		switch p.Step {
		case workerproto.TypeAccepted:
			t.accepted(j, p.At, now)
		case workerproto.TypePreparing:
			t.accepted(j, p.At, now)
			if j.lease.prepared.IsZero() {
				j.lease.prepared = p.At
			}
		case workerproto.TypeStarted:
			t.started(j, p.At, now)
		case workerproto.TypeRejected:
			t.rejected(j, p.Reason)
		}
	}
}

func (t *Term) accepted(j *tracked, at, now time.Time) {
	l := j.lease
	if l.phase >= phaseAccepted {
		return
	}
	l.phase, l.accepted = phaseAccepted, at
	l.worker.refusals.reset()
	t.remind(now.Add(progressDelay), timerPrepare, j)
}

func (t *Term) started(j *tracked, at, now time.Time) {
	l := j.lease
	if l.phase >= phaseStarted {
		return
	}
	if l.accepted.IsZero() {
		l.accepted = at
	}
	l.phase, l.started = phaseStarted, at
	l.worker.refusals.reset()
	t.remind(now.Add(progressDelay), timerStart, j)
}

func (t *Term) rejected(j *tracked, why string) {
	if j.lease.losing || j.lease.phase > phaseAccepted {
		return
	}
	j.lease.losing = true
	t.metrics.returned.WithLabelValues(string(job.OutcomeRejected)).Inc()
	t.persist(j, job.Return{Fence: j.fence(), Outcome: job.OutcomeRejected, Message: why})
}

// lose ends a lease that its worker does not hold. Where that would end the job,
// results on their way are waited for: the attempt may be over rather than lost.
func (t *Term) lose(j *tracked, cause string, now time.Time) {
	if j.lease.losing {
		return
	}
	j.lease.losing = true
	t.metrics.lost.WithLabelValues(cause).Inc()
	t.log.Info("a lease ended without a result", "job", j.id, "attempt", j.attempt, "worker", j.workerID, "cause", cause)
	ev := job.Lost{Fence: j.fence(), Confirmed: true}
	if !j.fragile {
		t.persist(j, ev)
		return
	}
	t.run(func() func(time.Time) {
		t.awaitResults()
		return func(now time.Time) {
			if !j.gone {
				t.persist(j, ev)
			}
		}
	})
}

// awaitResults waits until no result waits to become a state, or for resultsWait.
func (t *Term) awaitResults() {
	ctx, cancel := context.WithTimeout(t.opsCtx, resultsWait)
	defer cancel()
	for {
		if n, err := t.bus.ResultsPending(ctx); err == nil && n == 0 {
			return
		}
		select {
		case <-time.After(progressDelay):
		case <-ctx.Done():
			return
		}
	}
}
