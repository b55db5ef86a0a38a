package plan

import (
	"maps"
	"math"
	"slices"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/fleet"
	"github.com/cmdexec/cmdexec/libs/core/job"
)

// Planner holds the queue and what is reserved on each worker. Make one with New.
type Planner struct {
	levels  [job.MaxPriority + 1]level
	jobs    map[string]*waiting
	shapes  map[string]*shape
	classes map[string]*class
	workers map[string]*worker
	fleet   []*worker            // the same
	placed  map[string]placement // by job id
	parked  []*shape
	wakes   wakeHeap
	least   Demand // at most the demand of every shape
	dropped int    // shapes that ended since least was computed
	running running
}

type placement struct {
	owner  string
	worker *worker
	demand Demand
}

// Decision sends a job to a worker. The job has left the queue and its
// reservation is taken.
type Decision struct {
	JobID    string
	WorkerID string
	Ahead    bool // of its turn: it waits there for room
}

// New returns an empty planner. An owner gets no more than maxRunning
// reservations by it, at once; 0 is no limit.
func New(maxRunning int) *Planner {
	p := &Planner{
		jobs:    map[string]*waiting{},
		shapes:  map[string]*shape{},
		classes: map[string]*class{},
		workers: map[string]*worker{},
		placed:  map[string]placement{},
		running: running{most: maxRunning, counts: map[string]int{}},
	}
	for i := range p.levels {
		p.levels[i].owners = map[string]*owner{}
	}
	return p
}

// Job is a waiting job, as the planner sees it.
type Job struct {
	ID, Owner, Queue string
	Priority         int
	Created          time.Time
	Need             *Need
}

// Need returns what jobs of this spec ask of a worker. It is shared with the jobs
// in the queue that ask for the same. The spec is not kept.
func (p *Planner) Need(s *job.Spec) *Need {
	class, key := keys(s)
	if known := p.shapes[key]; known != nil {
		return known.Need
	}
	return &Need{Demand: DemandOf(s), class: class, key: key, spec: narrow(s)}
}

// Enqueue adds a waiting job, or moves it when it was there. The job is not
// given to a worker in avoid before that time.
func (p *Planner) Enqueue(j Job, avoid map[string]time.Time, now time.Time) {
	p.Dequeue(j.ID)
	s := p.shape(j, avoid, now)
	w := &waiting{id: j.ID, created: j.Created, priority: min(max(j.Priority, 0), job.MaxPriority)}
	q := p.levels[w.priority].queue(j.Owner, j.Queue)
	q.owner.held = p.running.full(j.Owner)
	q.add(w, s)
	p.jobs[w.id] = w
}

// Dequeue takes a job out of the queue; it reports whether it was there.
func (p *Planner) Dequeue(jobID string) bool {
	w := p.jobs[jobID]
	if w == nil {
		return false
	}
	delete(p.jobs, jobID)
	s := w.line.shape
	if w.remove() {
		p.unuse(s)
	}
	return true
}

// Waiting is the number of jobs in the queue.
func (p *Planner) Waiting() int { return len(p.jobs) }

// IsWaiting reports whether a job is in the queue.
func (p *Planner) IsWaiting(jobID string) bool { return p.jobs[jobID] != nil }

// shape finds or makes the shape of a job.
func (p *Planner) shape(j Job, avoid map[string]time.Time, now time.Time) *shape {
	key := j.Need.key
	var own map[string]time.Time
	for id, until := range avoid {
		if now.Before(until) {
			if own == nil {
				own = map[string]time.Time{}
			}
			own[id] = until
		}
	}
	if own != nil {
		key += "|" + j.ID
	}
	if s := p.shapes[key]; s != nil {
		return s
	}
	c := p.classes[j.Need.class]
	if c == nil {
		c = &class{key: j.Need.class, spec: j.Need.spec}
		c.spec.Resources = job.Resources{}
		p.classes[c.key] = c
		for _, w := range p.workers {
			c.place(w)
		}
	}
	s := &shape{Need: j.Need, id: key, class: c, avoid: own}
	c.shapes++
	p.shapes[key] = s
	if len(p.shapes) == 1 {
		p.least = s.Demand
	}
	p.least.lower(s.Demand)
	for _, until := range own {
		p.wake(until, nil, s)
	}
	return s
}

// unuse drops a shape that no job has any more.
func (p *Planner) unuse(s *shape) {
	s.lines--
	if s.lines > 0 {
		return
	}
	delete(p.shapes, s.id)
	if s.parked {
		p.unpark(s)
	}
	if p.dropped++; p.dropped > len(p.shapes) {
		p.dropped = 0
		p.least = Demand{CPU: math.MaxInt64, Memory: math.MaxInt64}
		for _, left := range p.shapes {
			p.least.lower(left.Demand)
		}
	}
	s.class.shapes--
	if s.class.shapes == 0 {
		delete(p.classes, s.class.key)
	}
}

// PutWorker sets what a worker is and offers.
func (p *Planner) PutWorker(facts fleet.Worker, now time.Time) {
	w := p.worker(facts.ID)
	w.facts, w.known = facts, true
	w.facts.Labels, w.facts.Executors = maps.Clone(facts.Labels), slices.Clone(facts.Executors)
	w.offers = Demand{CPU: max(1, micro(facts.CPUCores)), Memory: max(1, facts.TotalMemory)}
	for _, c := range p.classes {
		c.place(w)
	}
	p.gained(w, now)
}

// worker finds or makes a worker. One that is not known yet can carry
// reservations and gets no work.
func (p *Planner) worker(id string) *worker {
	w := p.workers[id]
	if w == nil {
		w = &worker{id: id, offers: Demand{CPU: 1, Memory: 1}}
		p.workers[id] = w
		p.fleet = append(p.fleet, w)
	}
	return w
}

// UpdateWorker changes a worker's availability. change must not keep its argument.
func (p *Planner) UpdateWorker(id string, now time.Time, change func(*Availability)) {
	w := p.worker(id)
	before, usable, times := w.avail, w.usable(now), w.times(now)
	change(&w.avail)
	for _, t := range []time.Time{w.avail.NotBefore, w.avail.SetAside} {
		if now.Before(t) && !t.Equal(before.NotBefore) && !t.Equal(before.SetAside) {
			p.wake(t, w, nil)
		}
	}
	if w.usable(now) && (!usable || w.avail.Foreign < before.Foreign || w.times(now) > times) {
		p.gained(w, now)
	}
}

// Worker returns a worker's facts, availability and load. known is false where
// its facts have not been set.
func (p *Planner) Worker(id string) (facts fleet.Worker, a Availability, l Load, known bool) {
	w := p.workers[id]
	if w == nil {
		return fleet.Worker{}, Availability{}, Load{}, false
	}
	return w.facts, w.avail, w.load, w.known
}

// Workers lists the known workers' ids in order.
func (p *Planner) Workers() []string {
	ids := make([]string, 0, len(p.workers))
	for id, w := range p.workers {
		if w.known {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}

// Reserve notes that a job holds a slot and its demand on a worker, as the
// registry says, also where that is more than the worker offers or its owner may
// have. It replaces an earlier reservation of the job.
func (p *Planner) Reserve(jobID, ownerName, workerID string, d Demand, now time.Time) {
	if at, ok := p.placed[jobID]; ok {
		if at.worker.id == workerID && at.demand == d {
			return
		}
		p.Release(jobID, now)
	}
	w := p.worker(workerID)
	w.load.Jobs++
	w.load.Demand.CPU += d.CPU
	w.load.Demand.Memory += d.Memory
	p.placed[jobID] = placement{ownerName, w, d}
	p.occupy(ownerName)
}

// Release gives a job's reservation back, if it has one.
func (p *Planner) Release(jobID string, now time.Time) {
	at, ok := p.placed[jobID]
	if !ok {
		return
	}
	delete(p.placed, jobID)
	w := at.worker
	w.load.Jobs--
	w.load.Demand.CPU -= at.demand.CPU
	w.load.Demand.Memory -= at.demand.Memory
	p.vacate(at.owner)
	p.gained(w, now)
}

// gained looks again at the parked shapes that a worker with more room could take.
func (p *Planner) gained(w *worker, now time.Time) {
	if !w.usable(now) || w.freeSlots(w.times(now)) < 1 {
		return
	}
	for i := 0; i < len(p.parked); {
		if s := p.parked[i]; w.fits(s, now) && w.matches(s.class) {
			p.unpark(s) // the last one takes its place
		} else {
			i++
		}
	}
}

func (p *Planner) park(s *shape) {
	s.parked, s.index = true, len(p.parked)
	p.parked = append(p.parked, s)
}

func (p *Planner) unpark(s *shape) {
	last := p.parked[len(p.parked)-1]
	p.parked[s.index], last.index = last, s.index
	p.parked[len(p.parked)-1] = nil
	p.parked = p.parked[:len(p.parked)-1]
	s.parked = false
	for _, ln := range s.off {
		ln.enter()
	}
	s.off = nil
}

// Next decides about one job, or reports that no waiting job can be placed now.
func (p *Planner) Next(now time.Time) (Decision, bool) {
	p.rouse(now)
	if len(p.jobs) == 0 || !p.anyRoom(now) {
		return Decision{}, false
	}
	for i := len(p.levels) - 1; i >= 0; i-- {
		l := &p.levels[i]
		for l.turns.Len() > 0 {
			ln := l.first()
			s := ln.shape
			var to *worker
			if !s.parked {
				if to = choose(s, now); to == nil {
					p.park(s)
				}
			}
			if to == nil {
				ln.leave()
				s.off = append(s.off, ln)
				continue
			}
			w := ln.jobs[0]
			ln.queue.served()
			by := ln.queue.owner.name
			p.Dequeue(w.id)
			ahead := !to.holds(s, 1)
			p.Reserve(w.id, by, to.id, s.Demand, now)
			return Decision{JobID: w.id, WorkerID: to.id, Ahead: ahead}, true
		}
	}
	return Decision{}, false
}

// first is the line whose oldest job has the next turn. The level must have one.
func (l *level) first() *line {
	o := l.turns.Front().Value.(*owner)
	q := o.turns.Front().Value.(*queue)
	return q.ready[0]
}

// anyRoom reports whether some worker has a slot and at least the cpu and memory
// of the least demanding shape. It spares a full fleet the search for a job.
func (p *Planner) anyRoom(now time.Time) bool {
	for _, w := range p.fleet {
		times := w.times(now)
		if free := w.free(times); w.freeSlots(times) > 0 && free.CPU >= p.least.CPU && free.Memory >= p.least.Memory && w.usable(now) {
			return true
		}
	}
	return false
}

// Wake returns when a backoff ends next, which may make a job placeable.
func (p *Planner) Wake() (time.Time, bool) {
	if len(p.wakes) == 0 {
		return time.Time{}, false
	}
	return p.wakes[0].at, true
}
