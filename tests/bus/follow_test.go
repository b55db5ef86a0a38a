package bus_test

import (
	"context"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/fleet"
	"github.com/cmdexec/cmdexec/libs/core/job"
)

// follower keeps what Follow reports.
type follower struct {
	t testing.TB

	mu       sync.Mutex
	entries  map[string]bus.Entry
	changes  int
	caughtUp int
	early    int // entries before CaughtUp
}

func follow(t testing.TB, c *bus.Conn) *follower {
	f := &follower{t: t, entries: map[string]bus.Entry{}}
	ctx, cancel := context.WithCancel(testContext(t))
	done := make(chan error, 1)
	go func() { done <- c.Registry().Follow(ctx, f.handle) }()
	t.Cleanup(func() {
		cancel()
		require.ErrorIs(t, <-done, context.Canceled)
	})
	return f
}

func (f *follower) handle(ch bus.Change) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if ch.CaughtUp {
		f.caughtUp++
		f.early = f.changes
		return
	}
	f.changes++
	if have, ok := f.entries[ch.Entry.Record.ID]; ok && have.Revision >= ch.Entry.Revision {
		return // again, after a restart
	}
	f.entries[ch.Entry.Record.ID] = ch.Entry
}

// sees waits until the follower knows exactly the newest entries.
func (f *follower) sees(want map[string]bus.Entry) {
	f.t.Helper()
	eventually(f.t, func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		for jobID, e := range want {
			if f.entries[jobID].Revision != e.Revision {
				return false
			}
		}
		return true
	}, "the follower sees every change")
	f.mu.Lock()
	defer f.mu.Unlock()
	require.Equal(f.t, want, f.entries)
}

func TestFollow(t *testing.T) {
	c := start(t)
	ctx := testContext(t)
	r := c.Registry()
	empty := follow(t, c)
	eventually(t, func() bool {
		empty.mu.Lock()
		defer empty.mu.Unlock()
		return empty.caughtUp == 1
	}, "an empty registry is caught up with at once")

	want := map[string]bus.Entry{}
	for range 100 {
		e := create(t, c)
		want[e.Record.ID] = e
	}
	late := follow(t, c)
	late.sees(want)
	eventually(t, func() bool {
		late.mu.Lock()
		defer late.mu.Unlock()
		return late.caughtUp == 1
	}, "caught up")
	require.Equal(t, 100, late.early, "every current record comes before CaughtUp")
	for jobID, e := range want {
		e, err := r.TransitionFrom(ctx, e, job.Assign{WorkerID: "worker-a", LeaseID: "lease-a"})
		require.NoError(t, err)
		want[jobID] = e
	}
	empty.sees(want)
	late.sees(want)
	require.Equal(t, 1, empty.caughtUp)
	require.Equal(t, 200, empty.changes, "every change, once, from a connected follower")
	for _, e := range want {
		require.NoError(t, r.Purge(ctx, e.Record.ID, e.Revision))
	}
	e := create(t, c)
	want[e.Record.ID] = e
	late.sees(want) // a purge is not reported
}

// What was purged while a follower reads does not keep it from catching up.
func TestFollowCatchesUpOverAPurge(t *testing.T) {
	c := start(t)
	ctx := testContext(t)
	r := c.Registry()
	var last bus.Entry
	for range 20 {
		last = create(t, c)
	}
	fctx, cancel := context.WithCancel(ctx)
	defer cancel()
	first, caughtUp := true, make(chan struct{})
	done := make(chan error, 1)
	go func() {
		done <- r.Follow(fctx, func(ch bus.Change) {
			if ch.CaughtUp {
				close(caughtUp)
				return
			}
			if first {
				first = false
				if err := r.Purge(ctx, last.Record.ID, last.Revision); err != nil {
					t.Errorf("purge: %v", err)
				}
			}
		})
	}()
	select {
	case <-caughtUp:
	case <-ctx.Done():
		t.Error("never caught up")
	}
	cancel()
	require.ErrorIs(t, <-done, context.Canceled)
}

func TestWorkers(t *testing.T) {
	c := start(t)
	ctx := testContext(t)
	w := c.Workers()
	all, err := w.All(ctx)
	require.NoError(t, err)
	require.Empty(t, all)
	_, err = w.Get(ctx, "worker-a")
	require.ErrorIs(t, err, bus.ErrNotFound)
	require.ErrorIs(t, w.Update(ctx, "worker-a", func(*fleet.Worker) bool { return true }), bus.ErrNotFound)
	require.Error(t, w.Put(ctx, fleet.Worker{ID: "*"}))

	var mu sync.Mutex
	seen := map[string]fleet.Worker{}
	wctx, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() {
		done <- w.Watch(wctx, func(f fleet.Worker) {
			mu.Lock()
			defer mu.Unlock()
			seen[f.ID] = f
		})
	}()
	defer func() { cancel(); require.ErrorIs(t, <-done, context.Canceled) }()

	b, a := fleet.Worker{ID: "worker-b", Slots: 2}, fleet.Worker{ID: "worker-a", Slots: 1}
	require.NoError(t, w.Put(ctx, b))
	require.NoError(t, w.Put(ctx, a))
	require.NoError(t, w.Update(ctx, "worker-a", func(f *fleet.Worker) bool { f.Drain = true; return true }))
	a.Slots = 7
	require.NoError(t, w.Put(ctx, a))
	a.Drain = true // kept over a registration
	got, err := w.Get(ctx, "worker-a")
	require.NoError(t, err)
	require.Equal(t, a, got)
	all, err = w.All(ctx)
	require.NoError(t, err)
	require.Equal(t, []fleet.Worker{a, b}, all)
	eventually(t, func() bool {
		mu.Lock()
		defer mu.Unlock()
		return seen["worker-a"].Drain && seen["worker-a"].Slots == 7 && seen["worker-b"].Slots == 2
	}, "the watcher sees it")

	// Concurrent changes: none is lost.
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 5 {
				if err := w.Update(ctx, "worker-b", func(f *fleet.Worker) bool { f.Slots++; return true }); err != nil {
					t.Errorf("update: %v", err)
				}
			}
		})
	}
	wg.Wait()
	got, err = w.Get(ctx, "worker-b")
	require.NoError(t, err)
	require.Equal(t, 42, got.Slots)
}

func TestSwept(t *testing.T) {
	c := start(t)
	ctx := testContext(t)
	got, err := c.Swept(ctx)
	require.NoError(t, err)
	require.Empty(t, got)
	for _, serverID := range []string{"first", c.ServerID()} {
		require.NoError(t, c.SetSwept(ctx, serverID))
		got, err = c.Swept(ctx)
		require.NoError(t, err)
		require.Equal(t, serverID, got)
	}
}
