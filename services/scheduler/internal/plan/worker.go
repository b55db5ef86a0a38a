package plan

import (
	"cmp"
	"slices"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/fleet"
)

// Availability is what changes about a worker from moment to moment.
type Availability struct {
	Online     bool      // a session is known and was not closed
	FreshUntil time.Time // its last heartbeat counts until then
	Draining   bool      // takes no new work
	Foreign    int       // slots that it says are taken by something that is not reserved here
	NotBefore  time.Time // it could not be reached or refused lately: not tried before
	SetAside   time.Time // it failed attempts lately: not used before

	// Its attempts are short: until AheadUntil it may have Ahead times what it
	// offers, which it lets wait. Not more waits than it has said it lets.
	Ahead      int
	AheadUntil time.Time
}

// Usable reports whether the worker may get work at all.
func (a *Availability) Usable(now time.Time) bool {
	return a.Online && !a.Draining && now.Before(a.FreshUntil) && !now.Before(a.NotBefore) && !now.Before(a.SetAside)
}

// Load is what is reserved on a worker.
type Load struct {
	Jobs   int
	Demand Demand
}

type worker struct {
	id     string
	known  bool // facts are set
	facts  fleet.Worker
	offers Demand
	avail  Availability
	load   Load
}

func (w *worker) freeSlots(times int) int {
	slots := min(w.facts.Slots*times, w.facts.Slots+w.facts.Backlog)
	return slots - w.avail.Foreign - w.load.Jobs
}

// free is what is left of so many times what the worker offers.
func (w *worker) free(times int) Demand {
	return Demand{CPU: w.offers.CPU*int64(times) - w.load.Demand.CPU, Memory: w.offers.Memory*int64(times) - w.load.Demand.Memory}
}

// times is how many times what it offers the worker may have now.
func (w *worker) times(now time.Time) int {
	if w.avail.Ahead > 1 && w.facts.Backlog > 0 && now.Before(w.avail.AheadUntil) {
		return w.avail.Ahead
	}
	return 1
}

func (w *worker) usable(now time.Time) bool { return w.known && w.avail.Usable(now) }

// block says why a shape that the worker could run does not fit now, or "".
func (w *worker) block(s *shape, now time.Time) fleet.Block {
	times := w.times(now)
	free := w.free(times)
	switch {
	case !w.avail.Online || !now.Before(w.avail.FreshUntil):
		return fleet.BlockOffline
	case w.avail.Draining:
		return fleet.BlockDraining
	case now.Before(w.avail.SetAside), now.Before(w.avail.NotBefore), now.Before(s.avoid[w.id]):
		return fleet.BlockSetAside
	case w.freeSlots(times) < 1:
		return fleet.BlockSlots
	case free.CPU < s.Demand.CPU:
		return fleet.BlockCPU
	case free.Memory < s.Demand.Memory:
		return fleet.BlockMemory
	}
	return ""
}

// fits reports whether the worker may get a job of the shape.
func (w *worker) fits(s *shape, now time.Time) bool {
	return w.holds(s, w.times(now)) && w.usable(now) &&
		(s.avoid == nil || !now.Before(s.avoid[w.id]))
}

// holds reports whether so many times what the worker offers has room for a job of
// the shape.
func (w *worker) holds(s *shape, times int) bool {
	free := w.free(times)
	return w.freeSlots(times) > 0 && free.CPU >= s.Demand.CPU && free.Memory >= s.Demand.Memory
}

// fullness is the share of the worker's fullest resource once d is added.
func (w *worker) fullness(d Demand) float64 {
	return max(
		float64(w.load.Jobs+w.avail.Foreign+1)/float64(w.facts.Slots),
		float64(w.load.Demand.CPU+d.CPU)/float64(w.offers.CPU),
		float64(w.load.Demand.Memory+d.Memory)/float64(w.offers.Memory),
	)
}

// choose returns the worker that a shape goes to, or nil.
func choose(s *shape, now time.Time) *worker {
	var best *worker
	var bestFull float64
	for _, w := range s.class.workers {
		if !w.fits(s, now) {
			continue
		}
		full := w.fullness(s.Demand)
		if best == nil || full < bestFull || full == bestFull && prefer(w, best) {
			best, bestFull = w, full
		}
	}
	return best
}

func prefer(a, b *worker) bool {
	return cmp.Or(-cmp.Compare(a.free(1).CPU, b.free(1).CPU), cmp.Compare(a.id, b.id)) < 0
}

// matches reports whether the worker can ever run jobs of the class, size aside.
func (w *worker) matches(c *class) bool {
	if !w.known {
		return false
	}
	_, ok := w.facts.CanEverRun(&c.spec)
	return ok
}

func (c *class) place(w *worker) {
	i := slices.Index(c.workers, w)
	switch ok := w.matches(c); {
	case ok && i < 0:
		c.workers = append(c.workers, w)
	case !ok && i >= 0:
		c.workers = slices.Delete(c.workers, i, i+1)
	}
}
