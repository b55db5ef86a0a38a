package runner

import (
	"context"
	"slices"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
)

// Where jobs are short, the way of a result to the scheduler and of the next
// assignment back takes longer than the job. So the scheduler may send more than
// there is room for, up to Backlog, and the next one starts the moment another
// has ended. patience bounds how long one waits: it goes back then, since the
// jobs here are not short any more and another worker may have room. It ends well
// before the scheduler would write that the attempt is being prepared.
const patience = 100 * time.Millisecond

// Offer is what commands may have of the machine, all together.
type Offer struct {
	Slots  int
	CPU    float64 // cores; 0: only slots are counted
	Memory int64   // bytes; 0: only slots are counted
}

// room is what is offered and what commands have of it.
type room struct {
	offer  Offer
	slots  int
	cpu    float64
	memory int64
}

// rounding is a share of a core that adding up may be off by.
const rounding = 1e-6

func (m *room) fits(r job.Resources) bool {
	o := &m.offer
	return m.slots < o.Slots && (o.CPU == 0 || m.cpu+r.CPU <= o.CPU+rounding) && (o.Memory == 0 || m.memory+r.MemoryMB<<20 <= o.Memory)
}

// never reports whether a job does not even fit into an empty worker.
func (m *room) never(r job.Resources) bool { return !(&room{offer: m.offer}).fits(r) }

func (m *room) take(r job.Resources) {
	m.slots, m.cpu, m.memory = m.slots+1, m.cpu+r.CPU, m.memory+r.MemoryMB<<20
}

func (m *room) give(r job.Resources) {
	m.slots, m.cpu, m.memory = m.slots-1, m.cpu-r.CPU, m.memory-r.MemoryMB<<20
	if m.slots == 0 {
		m.cpu = 0 // whatever adding and subtracting has left
	}
}

// admit gives an attempt its room. The runner's mutex is held.
func (r *Runner) admit(a *attempt) {
	r.room.take(a.spec.Resources)
	a.inside = true
	quiet := quietFor
	if a.spec.ContainerImage != "" {
		quiet = 0 // a container alone takes longer than that to remove
	}
	a.quiet = time.AfterFunc(quiet, func() { r.report(a) })
	close(a.turn)
}

// vacate gives it back, and admits those that wait for it.
func (r *Runner) vacate(a *attempt) {
	if !a.inside {
		r.waiting = slices.DeleteFunc(r.waiting, func(w *attempt) bool { return w == a })
		return
	}
	a.inside = false
	r.room.give(a.spec.Resources)
	for len(r.waiting) > 0 && r.room.fits(r.waiting[0].spec.Resources) {
		next := r.waiting[0]
		r.waiting = slices.Delete(r.waiting, 0, 1)
		next.acceptedAt = job.Timestamp(time.Now())
		r.admit(next)
	}
}

// awaitTurn blocks until the attempt has its room, or ctx ends, in which case it
// was stopped before it had any. False: it has waited too long and went back.
func (a *attempt) awaitTurn(ctx context.Context) bool {
	select {
	case <-a.turn:
		return true
	default:
	}
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-a.turn:
		return true
	case <-ctx.Done():
		return true
	case <-timer.C:
	}
	a.r.mu.Lock()
	defer a.r.mu.Unlock()
	if a.inside || a.stopAsked != 0 {
		return true
	}
	a.r.vacate(a)
	a.phase = workerproto.PhaseEnded
	a.r.forget(a)
	a.r.say(workerproto.TypeRejected, workerproto.Rejected{Lease: a.lease, Reason: busy})
	return false
}

const busy = "busy"
