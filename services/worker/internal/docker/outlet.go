package docker

import (
	"io"
	"sync"
)

// What an outlet holds for a writer that is slower than the command.
const (
	// backlog is for a command that runs: beyond it the command has to wait.
	backlog = 256 << 10
	// stopBacklog is for one that was asked to stop and may ignore it.
	stopBacklog = 4 << 20
	// killBacklog is for one that is being killed. A dead command's output is at
	// most what pipes and the engine held of it, so that all of it finds room: an
	// engine does not notice the end of a container whose output nobody takes.
	killBacklog = 16 << 20
)

// outlet hands one stream of a command to its writer, from one goroutine of
// its own, so that a writer that blocks does not keep the engine from ending
// the container. The zero value is not ready for use.
type outlet struct {
	w io.Writer

	mu      sync.Mutex
	changed sync.Cond
	queue   []byte
	size    int // of queue, and of what the writer has in hand
	limit   int
	waiting bool // somebody waits for room
	failed  bool // the writer; all else is thrown away
	closed  bool
}

func newOutlet(w io.Writer) *outlet {
	o := &outlet{w: w, limit: backlog, failed: w == nil}
	o.changed.L = &o.mu
	return o
}

// Write takes p, and waits for room. It never fails.
func (o *outlet) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for o.size > 0 && o.size+len(p) > o.limit && !o.failed {
		o.waiting = true
		o.changed.Wait()
	}
	o.waiting = false
	if !o.failed {
		o.queue = append(o.queue, p...)
		o.size += len(p)
		o.changed.Broadcast()
	}
	return len(p), nil
}

// raise makes more room.
func (o *outlet) raise(limit int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.limit = max(o.limit, limit)
	o.changed.Broadcast()
}

// full reports whether the command has to wait for the writer.
func (o *outlet) full() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.waiting
}

// close says that nothing more comes.
func (o *outlet) close() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.closed = true
	o.changed.Broadcast()
}

// run writes until everything up to close is written.
func (o *outlet) run() {
	var spare []byte
	o.mu.Lock()
	defer o.mu.Unlock()
	for {
		for len(o.queue) == 0 && !o.closed {
			o.changed.Wait()
		}
		if len(o.queue) == 0 {
			return
		}
		data := o.queue
		o.queue = spare[:0]
		o.mu.Unlock()
		_, err := o.w.Write(data)
		o.mu.Lock()
		o.size -= len(data)
		spare = data
		if cap(spare) > 2*backlog {
			spare = nil // it was for a stop
		}
		if err != nil {
			o.failed, o.size, o.queue = true, 0, nil
		}
		o.changed.Broadcast()
	}
}
