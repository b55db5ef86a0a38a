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

func (w *worker) freeSlots() int { return w.facts.Slots - w.avail.Foreign - w.load.Jobs }

func (w *worker) free() Demand {
	return Demand{CPU: w.offers.CPU - w.load.Demand.CPU, Memory: w.offers.Memory - w.load.Demand.Memory}
}

func (w *worker) usable(now time.Time) bool { return w.known && w.avail.Usable(now) }

// block says why a shape that the worker could run does not fit now, or "".
func (w *worker) block(s *shape, now time.Time) fleet.Block {
	free := w.free()
	switch {
	case !w.avail.Online || !now.Before(w.avail.FreshUntil):
		return fleet.BlockOffline
	case w.avail.Draining:
		return fleet.BlockDraining
	case now.Before(w.avail.SetAside), now.Before(w.avail.NotBefore), now.Before(s.avoid[w.id]):
		return fleet.BlockSetAside
	case w.freeSlots() < 1:
		return fleet.BlockSlots
	case free.CPU < s.Demand.CPU:
		return fleet.BlockCPU
	case free.Memory < s.Demand.Memory:
		return fleet.BlockMemory
	}
	return ""
}

func (w *worker) fits(s *shape, now time.Time) bool {
	return w.freeSlots() > 0 &&
		w.load.Demand.CPU+s.Demand.CPU <= w.offers.CPU &&
		w.load.Demand.Memory+s.Demand.Memory <= w.offers.Memory &&
		w.usable(now) &&
		(s.avoid == nil || !now.Before(s.avoid[w.id]))
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
	return cmp.Or(-cmp.Compare(a.free().CPU, b.free().CPU), cmp.Compare(a.id, b.id)) < 0
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
