// Package memory gives memory back that a process needed while it was busy.
//
// Go keeps what a busy hour needed for minutes after it, since it may be needed
// again. On a machine that people work at, a process that does nothing should be as
// small as it can.
package memory

import (
	"context"
	"runtime/debug"
	"runtime/metrics"
	"time"

	"github.com/cmdexec/cmdexec/libs/kit/lifecycle"
)

const (
	lookEvery = time.Second
	// quietBytes is what a process may allocate in a second and be called quiet.
	quietBytes = 1 << 20
	// worthBytes is what must have been allocated since memory was given back last: a
	// collection is not worth less.
	worthBytes = 16 << 20
)

// quietFor is after how long a quiet time memory is given back: soon, and once more
// when caches that nobody asks for have been dropped.
var quietFor = []time.Duration{3 * time.Second, 30 * time.Second}

// ReturnWhenQuiet gives memory back to the system while the process has little to do.
// It blocks until ctx ends. A collection of what is alive is all that it costs, twice
// for each quiet time at most.
func ReturnWhenQuiet(ctx context.Context) error {
	allocs := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	var w watch
	for lifecycle.Sleep(ctx, lookEvery) == nil {
		metrics.Read(allocs)
		if w.due(time.Now(), allocs[0].Value.Uint64()) {
			debug.FreeOSMemory()
		}
	}
	return nil
}

// watch decides when memory is given back.
type watch struct {
	allocated uint64 // in all, at the last look
	returned  uint64 // the same, when memory was given back in an earlier quiet time
	since     time.Time
	times     int // that memory was given back in this quiet time
}

// due reports whether memory should be given back. allocated is what the process has
// allocated in all.
func (w *watch) due(now time.Time, allocated uint64) bool {
	before := w.allocated
	quiet := allocated-before <= quietBytes
	w.allocated = allocated
	switch {
	case !quiet && w.times > 0:
		w.returned = before
		fallthrough
	case !quiet || w.since.IsZero():
		w.since, w.times = now, 0
		return false
	case w.times == len(quietFor) || now.Sub(w.since) < quietFor[w.times] || allocated-w.returned < worthBytes:
		return false
	}
	w.times++
	return true
}
