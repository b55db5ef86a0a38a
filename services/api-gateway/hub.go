package gateway

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/kit/lifecycle"
)

const (
	// listenerQueue is how many changes a listener may be behind. The oldest are
	// dropped then: whoever waits needs the newest.
	listenerQueue = 16
	// hubLinger is how long the follower goes on when nobody listens any more.
	hubLinger = 30 * time.Second
	// reread is how often a waiting call reads its job by itself: a follower can
	// be late or silent.
	reread = 5 * time.Second
)

// hub hands the changes of jobs to the calls that wait for them: to listeners
// those of one job, to watchers those of many. One follower of the registry serves
// all; it runs only while somebody is there, since it decodes every change of
// every job.
type hub struct {
	logger     *slog.Logger
	generation func() string // of the registry
	wake       chan struct{} // a first listener or watcher came

	mu        sync.Mutex
	listeners map[string]map[*listener]struct{} // by job
	watchers  map[*watcher]struct{}
	count     int    // of both
	caughtUp  bool   // the follower has seen all that was there
	last      uint64 // revision up to which it has seen everything
	life      string // generation that last belongs to
}

// listener receives the states of one job. Call close.
type listener struct {
	hub     *hub
	jobID   string
	changes chan *job.Record // what is received is shared: read only
}

func newHub(logger *slog.Logger, generation func() string) *hub {
	return &hub{
		logger: logger, generation: generation, wake: make(chan struct{}, 1),
		listeners: map[string]map[*listener]struct{}{}, watchers: map[*watcher]struct{}{},
	}
}

// listen subscribes to a job. Read the job after that, else a change between the
// two is missed.
func (h *hub) listen(jobID string) *listener {
	l := &listener{hub: h, jobID: jobID, changes: make(chan *job.Record, listenerQueue)}
	h.mu.Lock()
	defer h.mu.Unlock()
	set := h.listeners[jobID]
	if set == nil {
		set = map[*listener]struct{}{}
		h.listeners[jobID] = set
	}
	set[l] = struct{}{}
	h.add()
	return l
}

// add counts one more who is there. The caller holds mu.
func (h *hub) add() {
	if h.count++; h.count == 1 {
		select {
		case h.wake <- struct{}{}:
		default:
		}
	}
}

func (l *listener) close() {
	h := l.hub
	h.mu.Lock()
	defer h.mu.Unlock()
	set := h.listeners[l.jobID]
	if _, ok := set[l]; !ok {
		return
	}
	delete(set, l)
	if len(set) == 0 {
		delete(h.listeners, l.jobID)
	}
	h.count--
}

func (h *hub) idle() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.count == 0
}

// rest is idle, and forgets what the follower has seen if it may end.
func (h *hub) rest() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.count > 0 {
		return false
	}
	h.caughtUp, h.last = false, 0
	return true
}

// publish is called by the follower's goroutine only.
func (h *hub) publish(c bus.Change) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if c.CaughtUp {
		h.caughtUp, h.life = true, h.generation()
		for w := range h.watchers {
			w.begin()
		}
		return
	}
	if c.Entry.Revision > h.last { // else it was seen: the follower began anew
		h.last = c.Entry.Revision
		for w := range h.watchers {
			w.offer(&c.Entry)
		}
	}
	set := h.listeners[c.Entry.Record.ID]
	if len(set) == 0 {
		return
	}
	rec := c.Entry.Record
	for l := range set {
		for {
			select {
			case l.changes <- &rec:
			default:
				select { // make room; the listener may be faster
				case <-l.changes:
				default:
				}
				continue
			}
			break
		}
	}
}

// run follows the registry whenever somebody listens, until ctx ends.
func (h *hub) run(ctx context.Context, follow func(context.Context, func(bus.Change)) error) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-h.wake:
		}
		h.follow(ctx, follow)
	}
}

// follow returns when nobody has listened for a while, or ctx ends.
func (h *hub) follow(ctx context.Context, follow func(context.Context, func(bus.Change)) error) {
	var retry lifecycle.Backoff
	for ctx.Err() == nil {
		inner, cancel := context.WithCancel(ctx)
		ended := make(chan error, 1)
		go func() { ended <- follow(inner, h.publish) }()
		idleFor := time.Duration(0)
		tick := time.NewTicker(reread)
		var err error
		for running := true; running; {
			select {
			case err = <-ended:
				running = false
			case <-tick.C:
				h.checkLife()
				if !h.idle() {
					idleFor = 0
				} else if idleFor += reread; idleFor >= hubLinger {
					cancel()
				}
			}
		}
		tick.Stop()
		quit := inner.Err() != nil
		cancel()
		if quit {
			// A listener that came meanwhile has not woken run: it was not the first.
			if !h.rest() {
				continue
			}
			return
		}
		h.logger.WarnContext(ctx, "registry follower ended", "err", err)
		_ = lifecycle.Sleep(ctx, retry.Next())
	}
}
