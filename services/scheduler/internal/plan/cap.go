package plan

// running is how many jobs of each owner hold a reservation, where that is
// limited. An owner at the limit has no turn at any priority, so that what waits
// of it costs nothing and holds up nobody.
type running struct {
	most   int // of one owner; 0: no limit, nothing is counted
	counts map[string]int
}

func (r *running) full(owner string) bool { return r.most > 0 && r.counts[owner] >= r.most }

// occupy counts a reservation of an owner.
func (p *Planner) occupy(name string) {
	if p.running.most == 0 {
		return
	}
	p.running.counts[name]++
	if p.running.counts[name] == p.running.most {
		p.eachLevel(name, (*owner).hold)
	}
}

// vacate gives a reservation of an owner back.
func (p *Planner) vacate(name string) {
	if p.running.most == 0 {
		return
	}
	n := p.running.counts[name] - 1
	if n > 0 {
		p.running.counts[name] = n
	} else {
		delete(p.running.counts, name)
	}
	if n == p.running.most-1 {
		p.eachLevel(name, (*owner).resume)
	}
}

func (p *Planner) eachLevel(name string, do func(*owner)) {
	for i := range p.levels {
		if o := p.levels[i].owners[name]; o != nil {
			do(o)
		}
	}
}

// hold takes an owner's turn away until resume.
func (o *owner) hold() {
	o.held = true
	if o.turn != nil {
		o.level.turns.Remove(o.turn)
		o.turn = nil
	}
}

// resume gives an owner a turn again, the last, if something of it is ready.
func (o *owner) resume() {
	o.held = false
	o.await()
}

// await gives an owner a turn, if it may have one and has none.
func (o *owner) await() {
	if o.turn == nil && !o.held && o.turns.Len() > 0 {
		o.turn = o.level.turns.PushBack(o)
	}
}
