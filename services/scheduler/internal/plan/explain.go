package plan

import (
	"time"

	"github.com/cmdexec/cmdexec/libs/core/fleet"
)

// Position counts from 1 where a waiting job stands in the order in which jobs
// are looked at, placeable or not; 0 for a job that is not in the queue. Turns
// are counted as if every owner and queue kept its jobs. It takes time in
// proportion to the queue.
func (p *Planner) Position(jobID string) int {
	w := p.jobs[jobID]
	if w == nil {
		return 0
	}
	pos := 1
	for i := w.priority + 1; i < len(p.levels); i++ {
		pos += p.levels[i].count
	}
	q := w.line.queue
	o := q.owner
	inQueue := 0
	for _, ln := range q.lines {
		for _, other := range ln.jobs {
			if other.before(w) {
				inQueue++
			}
		}
	}
	// The job is the k-th of its queue, so every other queue of the owner has had
	// k turns before it, one more where its turn comes first.
	rank := map[*queue]int{}
	for e := o.turns.Front(); e != nil; e = e.Next() {
		rank[e.Value.(*queue)] = len(rank) + 1
	}
	inOwner := inQueue
	for _, other := range o.queues {
		if other != q {
			inOwner += min(other.count, turnsBefore(inQueue, rank[other], rank[q]))
		}
	}
	ranks := map[*owner]int{}
	for e := o.level.turns.Front(); e != nil; e = e.Next() {
		ranks[e.Value.(*owner)] = len(ranks) + 1
	}
	pos += inOwner
	for _, other := range o.level.owners {
		if other != o {
			pos += min(other.count, turnsBefore(inOwner, ranks[other], ranks[o]))
		}
	}
	return pos
}

// turnsBefore is how many turns another has before our k-th (from 0). A rank of
// 0 means that nothing of it is ready: it comes after those that are.
func turnsBefore(k, other, own int) int {
	if other != 0 && (own == 0 || other < own) {
		return k + 1
	}
	return k
}

// Blocked counts, for each reason, the workers that do not take a waiting job
// now. Workers that would take it are not counted; nil for a job that is not in
// the queue.
func (p *Planner) Blocked(jobID string, now time.Time) map[fleet.Block]int {
	w := p.jobs[jobID]
	if w == nil {
		return nil
	}
	return p.blocked(w.line.shape, w.line.queue.owner.held, now)
}

// blocked: of an owner who is held, what else keeps a worker from the job at the
// moment does not matter.
func (p *Planner) blocked(s *shape, held bool, now time.Time) map[fleet.Block]int {
	out := map[fleet.Block]int{}
	for _, w := range p.workers {
		if !w.known {
			continue
		}
		reason, ok := w.facts.CanEverRun(&s.spec)
		switch {
		case ok && held:
			reason = fleet.BlockOwner
		case ok:
			reason = w.block(s, now)
		}
		if reason != "" {
			out[reason]++
		}
	}
	return out
}
