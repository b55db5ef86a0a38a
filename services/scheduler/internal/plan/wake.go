package plan

import (
	"container/heap"
	"time"
)

// wake is a moment at which a worker or a job's own shape may fit again.
type wake struct {
	at     time.Time
	worker *worker
	shape  *shape
}

func (p *Planner) wake(at time.Time, w *worker, s *shape) {
	heap.Push(&p.wakes, wake{at, w, s})
}

// rouse handles the moments that have come.
func (p *Planner) rouse(now time.Time) {
	for len(p.wakes) > 0 && !now.Before(p.wakes[0].at) {
		w := heap.Pop(&p.wakes).(wake)
		switch {
		case w.worker != nil:
			p.gained(w.worker, now)
		case w.shape.parked && p.shapes[w.shape.id] == w.shape:
			p.unpark(w.shape)
		}
	}
}

type wakeHeap []wake

func (h wakeHeap) Len() int           { return len(h) }
func (h wakeHeap) Less(i, j int) bool { return h[i].at.Before(h[j].at) }
func (h wakeHeap) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *wakeHeap) Push(x any)        { *h = append(*h, x.(wake)) }

func (h *wakeHeap) Pop() any {
	old := *h
	w := old[len(old)-1]
	old[len(old)-1] = wake{}
	*h = old[:len(old)-1]
	return w
}
