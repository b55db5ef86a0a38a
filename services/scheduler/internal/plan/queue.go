package plan

import (
	"cmp"
	"container/heap"
	"container/list"
	"time"
)

// waiting is one job in the queue.
type waiting struct {
	id       string
	priority int
	created  time.Time
	line     *line
	index    int // in line.jobs
}

func (a *waiting) before(b *waiting) bool {
	return cmp.Or(a.created.Compare(b.created), cmp.Compare(a.id, b.id)) < 0
}

// line holds the jobs of one priority, owner, queue and shape, oldest first.
type line struct {
	queue *queue
	shape *shape
	jobs  jobHeap
	index int // in queue.ready; -1 while out of it
}

// queue is one owner's named queue at one priority.
type queue struct {
	name  string
	owner *owner
	lines map[*shape]*line
	ready lineHeap      // lines whose shape is not known to fit nowhere, by their oldest job
	turn  *list.Element // in owner.turns; nil while nothing is ready
	count int
}

// owner is one user's part of a priority.
type owner struct {
	name   string
	level  *level
	queues map[string]*queue
	turns  list.List // of *queue with ready lines; the front has the next turn
	turn   *list.Element
	held   bool // has no turn, for as many of its jobs run as may
	count  int
}

// level is one priority.
type level struct {
	owners map[string]*owner
	turns  list.List // of *owner with ready queues; the front has the next turn
	count  int
}

func (l *level) queue(ownerName, queueName string) *queue {
	o := l.owners[ownerName]
	if o == nil {
		o = &owner{name: ownerName, level: l, queues: map[string]*queue{}}
		l.owners[ownerName] = o
	}
	q := o.queues[queueName]
	if q == nil {
		q = &queue{name: queueName, owner: o, lines: map[*shape]*line{}}
		o.queues[queueName] = q
	}
	return q
}

// add puts a job in its place and gives its owner a turn if it had none.
func (q *queue) add(w *waiting, s *shape) {
	ln := q.lines[s]
	if ln == nil {
		ln = &line{queue: q, shape: s, index: -1}
		q.lines[s] = ln
		s.lines++
	}
	w.line = ln
	heap.Push(&ln.jobs, w)
	q.count++
	q.owner.count++
	q.owner.level.count++
	switch {
	case ln.index >= 0:
		heap.Fix(&q.ready, ln.index)
	case s.parked:
		if len(ln.jobs) == 1 {
			s.off = append(s.off, ln)
			s.compact()
		}
	default:
		ln.enter()
	}
}

// enter puts a line among those that are looked at.
func (ln *line) enter() {
	q := ln.queue
	if ln.index >= 0 || len(ln.jobs) == 0 {
		return
	}
	heap.Push(&q.ready, ln)
	if q.turn == nil {
		q.turn = q.owner.turns.PushBack(q)
	}
	q.owner.await()
}

// leave takes a line out of those that are looked at.
func (ln *line) leave() {
	if ln.index < 0 {
		return
	}
	q := ln.queue
	heap.Remove(&q.ready, ln.index)
	if len(q.ready) > 0 {
		return
	}
	o := q.owner
	o.turns.Remove(q.turn)
	q.turn = nil
	if o.turns.Len() == 0 && o.turn != nil {
		o.level.turns.Remove(o.turn)
		o.turn = nil
	}
}

// served ends the turn of a queue and of its owner.
func (q *queue) served() {
	if q.turn != nil {
		q.owner.turns.MoveToBack(q.turn)
	}
	if q.owner.turn != nil {
		q.owner.level.turns.MoveToBack(q.owner.turn)
	}
}

// remove takes a job out, and what became empty by that. It reports whether
// the job's line is gone.
func (w *waiting) remove() (gone bool) {
	ln := w.line
	q, o := ln.queue, ln.queue.owner
	heap.Remove(&ln.jobs, w.index)
	q.count--
	o.count--
	o.level.count--
	if len(ln.jobs) > 0 {
		if ln.index >= 0 {
			heap.Fix(&q.ready, ln.index)
		}
		return false
	}
	ln.leave()
	delete(q.lines, ln.shape)
	if q.count == 0 {
		delete(o.queues, q.name)
	}
	if o.count == 0 {
		delete(o.level.owners, o.name)
	}
	return true
}

type jobHeap []*waiting

func (h jobHeap) Len() int           { return len(h) }
func (h jobHeap) Less(i, j int) bool { return h[i].before(h[j]) }
func (h jobHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}

func (h *jobHeap) Push(x any) {
	w := x.(*waiting)
	w.index = len(*h)
	*h = append(*h, w)
}

func (h *jobHeap) Pop() any {
	old := *h
	w := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	w.index = -1
	return w
}

type lineHeap []*line

func (h lineHeap) Len() int           { return len(h) }
func (h lineHeap) Less(i, j int) bool { return h[i].jobs[0].before(h[j].jobs[0]) }
func (h lineHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}

func (h *lineHeap) Push(x any) {
	ln := x.(*line)
	ln.index = len(*h)
	*h = append(*h, ln)
}

func (h *lineHeap) Pop() any {
	old := *h
	ln := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	ln.index = -1
	return ln
}
