package docker

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"
)

// pool keeps warm containers for the shapes that were asked for lately. It is safe
// for concurrent use. Its one goroutine begins with the first question.
//
// Containers are made one at a time, and while no attempt is being prepared or
// started, so that a job seldom shares the engine with one that is meant for another;
// if there is no such moment for a while, one is made all the same. What fails here
// is no job's failure. The attempt takes the cold path, and the pool rests for a
// while.
type pool struct {
	x      *Executor
	limits Warm
	wake   chan struct{} // holds one
	ctx    context.Context
	cancel context.CancelFunc
	all    sync.WaitGroup
	// removals are what is still done when it is closed, for a while.
	removals context.Context
	giveUp   context.CancelFunc

	mu      sync.Mutex
	begun   bool
	closed  bool
	off     bool // nothing is kept now
	never   bool // nor later
	busy    int  // attempts that are being prepared or started
	quietAt time.Time
	dueAt   time.Time // when one is made even if it is not quiet; zero: none is wanted
	shapes  map[shape]*demand
	idle    []*warm // the longest waiting first
	volume  *initVolume
	filled  bool // it has the init
	why     string
}

// demand is what is known of a shape that was asked for.
type demand struct {
	image *imageFacts
	asked time.Time // last
	prior time.Time // and before that
}

const (
	// pause is for an attempt that has just been started, so that it has the engine
	// and the machine for itself until it has said something, or ended if it is short.
	pause = 200 * time.Millisecond
	// patience is how long a container that is wanted waits for a quiet moment.
	patience = time.Second
	// restFor is how long nothing is made after something went wrong.
	restFor = 10 * time.Second
	// maxShapes bounds what is remembered.
	maxShapes = 200
)

func newPool(x *Executor, limits Warm) *pool {
	p := &pool{x: x, limits: limits, wake: make(chan struct{}, 1), shapes: map[shape]*demand{}}
	p.removals, p.giveUp = context.WithCancel(context.Background())
	p.ctx, p.cancel = context.WithCancel(p.removals)
	return p
}

func (p *pool) enabled() bool {
	return p.limits.Containers > 0 && p.limits.MemoryMB > 0 && p.limits.Age > 0
}

// begin notes that an attempt is being prepared, end that it is prepared and
// started, or not.
func (p *pool) begin() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.busy++
}

func (p *pool) end() {
	p.mu.Lock()
	p.busy--
	p.quietAt = later(p.quietAt, time.Now().Add(pause))
	p.mu.Unlock()
	p.poke()
}

func (p *pool) poke() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// ask notes that a shape was asked for. img is the image of it.
func (p *pool) ask(s shape, img *imageFacts, now time.Time) {
	if !p.enabled() {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || p.off || p.never || s.memoryMB > p.limits.MemoryMB {
		return
	}
	d := p.shapes[s]
	if d == nil {
		d = &demand{}
		p.shapes[s] = d
	}
	d.image, d.prior, d.asked = img, d.asked, now
	if len(p.shapes) > maxShapes {
		p.forgetOldest()
	}
	if !p.begun {
		p.begun = true
		p.all.Go(p.run)
	}
}

func (p *pool) forgetOldest() {
	var oldest shape
	var at time.Time
	for s, d := range p.shapes {
		if at.IsZero() || d.asked.Before(at) {
			oldest, at = s, d.asked
		}
	}
	delete(p.shapes, oldest)
}

// take gives a container of the shape that waits, and nobody else has; nil: there is
// none.
func (p *pool) take(s shape) *warm {
	for {
		w := p.first(s)
		if w == nil || w.release() {
			return w
		}
		p.all.Go(func() { p.lost(w) })
	}
}

func (p *pool) first(s shape) *warm {
	p.mu.Lock()
	defer p.mu.Unlock()
	i := slices.IndexFunc(p.idle, func(w *warm) bool { return w.shape == s })
	if i < 0 {
		return nil
	}
	w := p.idle[i]
	p.idle = slices.Delete(p.idle, i, i+1)
	return w
}

// keep sets whether containers are kept at all.
func (p *pool) keep(on bool) {
	p.mu.Lock()
	p.off = !on
	p.mu.Unlock()
	p.poke()
}

// uses reports whether a volume is that of the warm containers.
func (p *pool) uses(volume string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.volume != nil && p.volume.name == volume
}

// step is what is to be done next. At most one of its parts is set, beside the time
// of the next look.
type step struct {
	drop  *warm
	make  *shape
	image *imageFacts // of make
	empty bool        // nothing is kept any more
	look  time.Time   // zero: when something has changed
}

// next decides. What it says to drop is not in the pool any more.
func (p *pool) next(now time.Time) step {
	p.mu.Lock()
	defer p.mu.Unlock()
	var s step
	for sh, d := range p.shapes {
		over := d.asked.Add(p.limits.Age)
		if p.off || !now.Before(over) {
			delete(p.shapes, sh)
			continue
		}
		s.look = sooner(s.look, over)
	}
	count, memory := map[shape]int{}, int64(0)
	for _, w := range p.idle {
		if p.shapes[w.shape] == nil {
			return step{drop: p.remove(w)}
		}
		count[w.shape]++
		memory += w.shape.memoryMB
	}
	if len(p.idle) == 0 && len(p.shapes) == 0 {
		s.empty = true
		return s
	}
	sh, drop := p.choose(count, memory)
	if sh == nil {
		p.dueAt = time.Time{}
		return s
	}
	if at := p.makeAt(now); now.Before(at) {
		s.look = sooner(s.look, at)
		return s
	}
	if drop != nil {
		return step{drop: p.remove(drop)}
	}
	p.dueAt = time.Time{}
	s.make, s.image = sh, p.shapes[*sh].image
	return s
}

// choose gives the shape that a container should be made for, nil: none, and the
// container that has to go first, nil: there is room.
func (p *pool) choose(count map[shape]int, memory int64) (*shape, *warm) {
	for _, sh := range p.wanted(count) {
		if len(p.idle) < p.limits.Containers && memory+sh.memoryMB <= p.limits.MemoryMB {
			return &sh, nil
		}
		if w := p.yielding(sh, count, memory); w != nil {
			return &sh, w
		}
	}
	return nil, nil
}

// makeAt is when the container that is wanted may be made: once it is quiet, or has
// not been for long.
func (p *pool) makeAt(now time.Time) time.Time {
	if p.dueAt.IsZero() {
		p.dueAt = later(p.quietAt, now).Add(patience)
	}
	if p.busy > 0 {
		return p.dueAt
	}
	return sooner(p.dueAt, p.quietAt)
}

// wanted are the shapes worth a container: first those that have the fewest, then
// those that were asked for last.
func (p *pool) wanted(count map[shape]int) []shape {
	var found []shape
	for sh, d := range p.shapes {
		if !d.prior.IsZero() {
			found = append(found, sh)
		}
	}
	slices.SortFunc(found, func(a, b shape) int {
		return cmp.Or(cmp.Compare(count[a], count[b]), p.shapes[b].asked.Compare(p.shapes[a].asked))
	})
	return found
}

// yielding is the first container that is given up for one of a shape that has
// none; nil: it would not have room in any case.
func (p *pool) yielding(sh shape, count map[shape]int, memory int64) *warm {
	var first *warm
	left := maps.Clone(count)
	for _, w := range p.idle {
		if !p.yields(w.shape, sh, left) {
			continue
		}
		if first == nil {
			first = w
		}
		left[w.shape]--
		if memory -= w.shape.memoryMB; memory+sh.memoryMB <= p.limits.MemoryMB {
			return first
		}
	}
	return nil
}

// yields reports whether a shape gives up a container for another, which has none:
// because it has more of them, or the other was asked for twice since it was itself.
// With less, two shapes that take turns would only ever drive each other out.
func (p *pool) yields(s, other shape, count map[shape]int) bool {
	return count[other] == 0 && (count[s] > 1 || p.shapes[other].prior.After(p.shapes[s].asked))
}

func (p *pool) remove(w *warm) *warm {
	p.idle = slices.DeleteFunc(p.idle, func(other *warm) bool { return other == w })
	return w
}

// run does one step after the other until the pool is closed.
func (p *pool) run() {
	for p.ctx.Err() == nil {
		s := p.next(time.Now())
		switch {
		case s.drop != nil:
			s.drop.release()
			p.discard(s.drop)
			continue
		case s.make != nil:
			if err := p.fill(*s.make, s.image); err != nil {
				p.failed(err)
			}
			continue
		case s.empty:
			p.dropVolume(p.ctx)
		}
		p.await(s.look)
	}
}

func (p *pool) await(look time.Time) {
	var due <-chan time.Time
	if !look.IsZero() {
		timer := time.NewTimer(time.Until(look))
		defer timer.Stop()
		due = timer.C
	}
	select {
	case <-due:
	case <-p.wake:
	case <-p.ctx.Done():
	}
}

// fill makes one container.
func (p *pool) fill(s shape, img *imageFacts) error {
	f, err := p.x.engine.look(p.ctx)
	if err != nil {
		return err
	}
	v, err := p.prepareVolume(img, f)
	if err != nil {
		return err
	}
	if err := p.ctx.Err(); err != nil {
		return err
	}
	// Not called off by close: the engine would make it all the same, and later.
	w, err := p.x.makeWarm(p.removals, s, img, f, v)
	if err != nil {
		return err
	}
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return p.x.discard(w)
	}
	p.idle = append(p.idle, w)
	p.why = ""
	p.mu.Unlock()
	p.all.Go(func() {
		w.watch()
		p.mu.Lock()
		waits := slices.Contains(p.idle, w)
		p.remove(w)
		p.mu.Unlock()
		if waits { // nobody has asked it to end
			p.lost(w)
		}
	})
	return nil
}

// prepareVolume gives the volume with the init.
func (p *pool) prepareVolume(img *imageFacts, f facts) (*initVolume, error) {
	p.mu.Lock()
	v, filled := p.volume, p.filled
	p.mu.Unlock()
	if filled {
		return v, nil
	}
	program, err := initFor(p.limits.Init, f.arch)
	if err != nil {
		return nil, err
	}
	v = newInitVolume(program, &p.x.opts)
	p.x.claim(v.name)
	defer p.x.release(v.name)
	p.mu.Lock()
	p.volume = v
	p.mu.Unlock()
	if err := v.fill(p.removals, p.x.engine, img.id); err != nil {
		return nil, err
	}
	p.mu.Lock()
	p.filled = true
	p.mu.Unlock()
	return v, nil
}

// dropVolume removes the volume with the init. One that a running job's container
// still has is left to Reap.
func (p *pool) dropVolume(ctx context.Context) {
	p.mu.Lock()
	v := p.volume
	p.volume, p.filled = nil, false
	p.mu.Unlock()
	if v == nil {
		return
	}
	if err := v.drop(ctx, p.x.engine); err != nil {
		p.x.log.Debug("the volume of warm containers is still there, it is removed later", "volume", v.name, "error", err)
	}
}

// lost removes a container that does not wait any more.
func (p *pool) lost(w *warm) {
	p.mu.Lock()
	p.filled = false // it may be the init that is missing
	p.mu.Unlock()
	p.discard(w)
	p.failed(errors.Join(errors.New("a container that waited has ended"), w.ended))
}

func (p *pool) discard(w *warm) {
	if err := p.x.discard(w); err != nil {
		p.x.log.Debug("a warm container is still there, it is removed later", "container", w.id, "error", err)
	}
}

// failed lets the pool rest, and says why once.
func (p *pool) failed(err error) {
	if p.ctx.Err() != nil {
		return
	}
	p.mu.Lock()
	p.quietAt, p.dueAt = later(p.quietAt, time.Now().Add(restFor)), time.Time{}
	text := p.x.engine.describe(err).Error()
	if errors.Is(err, errNoInit) {
		text = err.Error()
		p.never = true // it will not come
		clear(p.shapes)
	}
	known := p.why == text
	p.why = text
	p.mu.Unlock()
	if !known {
		p.x.log.Info("no containers are kept warm for now", "because", text)
	}
}

// close removes what waits, in a bounded time. What cannot be removed is left to the
// next life's Recover.
func (p *pool) close() {
	p.mu.Lock()
	p.closed = true
	idle := p.idle
	p.idle = nil
	p.mu.Unlock()
	p.cancel()
	defer p.giveUp()
	bound := time.AfterFunc(p.x.opts.CallTimeout, p.giveUp)
	defer bound.Stop()
	for _, w := range idle {
		w.release()
	}
	p.all.Wait()
	for _, w := range idle {
		p.all.Go(func() { p.discard(w) })
	}
	p.all.Wait()
	p.dropVolume(p.removals)
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// sooner is the earlier of two times; a zero one is never.
func sooner(a, b time.Time) time.Time {
	if a.IsZero() || b.Before(a) {
		return b
	}
	return a
}
