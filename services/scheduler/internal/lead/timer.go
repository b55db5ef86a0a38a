package lead

import (
	"container/heap"
	"slices"
	"time"
)

// timerKind says what a timer is about.
type timerKind uint8

const (
	timerLease   timerKind = iota // the lease may have run out
	timerRequeue                  // the backoff is over
	timerQueue                    // the queue timeout
	timerTotal                    // the total timeout
	timerExec                     // the execution timeout of a worker that is away
	timerCancel                   // the deadline of a cancel
	timerPrepare                  // preparing is written now if the job still prepares
	timerStart                    // running is written now if the job still runs
	timerAgain                    // try again what failed
)

// timer reminds the loop to look at a job. It holds nothing: what is to be done
// depends on the job when it fires.
type timer struct {
	at    time.Time
	kind  timerKind
	job   *tracked
	lease string
}

func (t *Term) remind(at time.Time, k timerKind, j *tracked) {
	if j.gone {
		return
	}
	j.timers++
	heap.Push(&t.timers, timer{at, k, j, j.leaseID})
}

// forget notes that a job is gone. Its timers go when they are the greater part
// of the heap: a job may have ended long before its deadlines.
func (t *Term) forget(j *tracked) {
	j.gone = true
	t.deadTimers += j.timers
	if t.deadTimers < 1024 || t.deadTimers < len(t.timers)/2 {
		return
	}
	t.timers = slices.DeleteFunc(t.timers, func(x timer) bool { return x.job.gone })
	heap.Init(&t.timers)
	t.deadTimers = 0
}

// due takes the next timer that has come, if any.
func (t *Term) due(now time.Time) (timer, bool) {
	for len(t.timers) > 0 && !now.Before(t.timers[0].at) {
		x := heap.Pop(&t.timers).(timer)
		if !x.job.gone {
			x.job.timers--
			return x, true
		}
		t.deadTimers--
	}
	return timer{}, false
}

type timerHeap []timer

func (h timerHeap) Len() int           { return len(h) }
func (h timerHeap) Less(i, j int) bool { return h[i].at.Before(h[j].at) }
func (h timerHeap) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *timerHeap) Push(x any)        { *h = append(*h, x.(timer)) }

func (h *timerHeap) Pop() any {
	old := *h
	x := old[len(old)-1]
	old[len(old)-1] = timer{}
	*h = old[:len(old)-1]
	return x
}

// backoff grows by doubling.
type backoff struct {
	least, most time.Duration
	step        int
	until       time.Time
}

// fail returns until when to wait after another failure.
func (b *backoff) fail(now time.Time) time.Time {
	d := b.most
	if b.step < 30 {
		d = min(b.most, b.least<<b.step)
	}
	b.step++
	b.until = now.Add(d)
	return b.until
}

func (b *backoff) reset() { b.step, b.until = 0, time.Time{} }
