package lead

import (
	"time"

	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/services/scheduler/internal/plan"
)

// A worker whose attempts take less time than a result takes to come here and the
// next assignment to go there would stand still most of the time. Where many
// short ones end it is assigned more than it has room for; it starts the next
// when one ends.
const (
	shortest    = 5 * time.Millisecond  // on average, up to which it gets mostAhead times what it offers
	short       = 20 * time.Millisecond // up to which it gets twice that
	mostAhead   = 4
	manyEnds    = 16 // within the second before
	aheadFor    = 250 * time.Millisecond
	tempoSpan   = time.Second
	tempoWeight = 8 // of the average so far, in parts of it and the newest together
)

// tempo is how quickly a worker's attempts end.
type tempo struct {
	mean  time.Duration
	since time.Time // begin of the current span
	ends  int       // in it
}

// ended takes in an attempt that ended by itself and held its room for so long.
func (p *tempo) ended(held time.Duration, now time.Time) {
	p.mean += (held - p.mean) / tempoWeight
	if now.Sub(p.since) > tempoSpan {
		p.since, p.ends = now, p.ends/4 // what is going on is not forgotten at once
	}
	p.ends++
}

// slow notes that what was sent ahead did not get its turn.
func (p *tempo) slow(now time.Time) { *p = tempo{mean: tempoSpan, since: now} }

// ahead is how many times what it offers the worker may have.
func (p *tempo) ahead() int {
	switch {
	case p.ends < manyEnds || p.mean > short:
		return 1
	case p.mean > shortest:
		return 2
	default:
		return mostAhead
	}
}

// held is how long an attempt had its room.
func held(a *job.Attempt) time.Duration {
	from := a.AcceptedAt
	if from.IsZero() {
		from = a.StartedAt
	}
	return a.FinishedAt.Sub(from)
}

// hurry tells the planner how far ahead a worker may be assigned.
func (t *Term) hurry(w *workerState, now time.Time) {
	t.plan.UpdateWorker(w.id, now, func(a *plan.Availability) {
		a.Ahead, a.AheadUntil = w.tempo.ahead(), now.Add(aheadFor)
	})
}
