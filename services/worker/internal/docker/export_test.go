package docker

import (
	"slices"
	"testing"
	"time"

	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
)

// MeasureLog is what the log of a container is assumed to take.
func MeasureLog(t *testing.T, x *Executor, id string) int64 {
	t.Helper()
	if err := x.Probe(t.Context()); err != nil {
		t.Fatal(err)
	}
	m, err := (&attempt{x: x, id: id}).measure()
	if err != nil {
		t.Fatal(err)
	}
	return m.atMost()
}

// Prime waits until a container waits for the job; false: none ever does.
func Prime(t testing.TB, x *Executor, spec executor.Spec) bool {
	t.Helper()
	if !x.pool.enabled() {
		return false
	}
	s, img, ok := shapeFor(t, x, spec)
	if !ok || s.memoryMB > x.pool.limits.MemoryMB {
		return false
	}
	x.pool.ask(s, img, time.Now())
	x.pool.ask(s, img, time.Now())
	x.pool.poke()
	for deadline := time.Now().Add(30 * time.Second); !slices.ContainsFunc(x.pool.waiting(), func(w *warm) bool { return w.shape == s }); {
		if time.Now().After(deadline) {
			t.Fatalf("no container waits for the job: %s", x.pool.why)
		}
		time.Sleep(5 * time.Millisecond) // polling, with a deadline
	}
	return true
}

func shapeFor(t testing.TB, x *Executor, spec executor.Spec) (shape, *imageFacts, bool) {
	t.Helper()
	if err := x.Probe(t.Context()); err != nil {
		t.Fatal(err)
	}
	p, err := makePlan(spec, x.opts.WorkerID, x.opts.AllowBridge)
	if err != nil {
		return shape{}, nil, false
	}
	f, err := x.engine.look(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	img, err := x.images.get(t.Context(), p)
	if err != nil {
		return shape{}, nil, false
	}
	s, ok := x.shapeOf(p, img, f)
	return s, img, ok
}

func (p *pool) waiting() []*warm {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.idle)
}

// Waiting are the ids of the containers that wait.
func Waiting(x *Executor) []string {
	var ids []string
	for _, w := range x.pool.waiting() {
		ids = append(ids, w.id)
	}
	return ids
}
