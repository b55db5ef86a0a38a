//go:build unix

package bus_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/core/job"
)

// What was purged, by key or by group, does not come back in any of its versions
// when the server is killed right afterwards; nor does a version that a later one
// has replaced.
func TestPurgedKeysStayAwayAfterAKill(t *testing.T) {
	p := newProcess(t)
	c := connectTo(t, p.url())
	bind(t, c, smallSizes())
	ctx := testContext(t)
	r := c.Registry()

	const each = 200
	made := 0
	var mu sync.Mutex
	makeJob := func(at time.Time) bus.Entry { // in its third version, each tenth in its 23rd
		rec := newRecord(t)
		rec.ID = id.New(id.Job, at)
		e, err := r.Create(ctx, rec)
		mu.Lock()
		made++
		returns := made % 10 / 9 * 10
		mu.Unlock()
		for i := range returns {
			if err == nil {
				e, err = r.TransitionFrom(ctx, e, job.Assign{WorkerID: "worker-a", LeaseID: fmt.Sprintf("lease-%d", i)})
			}
			if err == nil {
				e, err = r.TransitionFrom(ctx, e, job.Return{
					Fence: job.Fence{Attempt: e.Record.Attempt, LeaseID: e.Record.LeaseID}, Outcome: job.OutcomeReturned,
				})
			}
		}
		if err == nil {
			e, err = r.TransitionFrom(ctx, e, job.Assign{WorkerID: "worker-a", LeaseID: "lease-a"})
		}
		if err == nil {
			e, err = r.TransitionFrom(ctx, e, job.CancelRequest{})
		}
		require.NoError(t, err)
		return e
	}
	now := time.Now()
	old := now.Add(-time.Hour)
	var byKey, byGroup, kept []bus.Entry
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for range each / 8 {
				a, b := makeJob(now), makeJob(old)
				mu.Lock()
				byKey, byGroup = append(byKey, a), append(byGroup, b)
				mu.Unlock()
			}
			if w == 0 {
				for range 20 {
					k := makeJob(now.Add(-2 * time.Hour))
					mu.Lock()
					kept = append(kept, k)
					mu.Unlock()
				}
			}
		})
	}
	wg.Wait()

	last := uint64(0)
	for _, e := range byGroup {
		last = max(last, e.Revision)
	}
	group := id.Group(byGroup[0].Record.ID)
	require.NoError(t, r.PurgeGroup(ctx, group, last))
	for _, e := range byKey {
		require.NoError(t, r.Purge(ctx, e.Record.ID, e.Revision))
	}
	p.restart()

	left := map[string]bus.Entry{}
	eventually(t, func() bool { return c.Ready() == nil }, "reconnected")
	require.NoError(t, r.Scan(ctx, func(e bus.Entry) error {
		left[e.Record.ID] = e
		return nil
	}))
	for _, e := range byGroup {
		require.NotContains(t, left, e.Record.ID, "purged by group")
	}
	for _, e := range byKey {
		require.NotContains(t, left, e.Record.ID, "purged by key")
	}
	require.Len(t, left, len(kept))
	for _, e := range kept {
		require.Equal(t, e, left[e.Record.ID], "what was not purged is there in its last revision")
	}
}

// The server is killed again and again while jobs are created and moved: nothing
// acknowledged is lost, nothing refused as surely not written is there, and every
// event counts once.
func TestServerKilledDuringWrites(t *testing.T) {
	p := newProcess(t)
	c := connectTo(t, p.url())
	bind(t, c, smallSizes())
	ctx := testContext(t)
	r := c.Registry()

	var mu sync.Mutex
	acked, refused, ambiguous := map[string]bool{}, map[string]bool{}, map[string]bool{}
	ended := make(chan struct{})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for {
				select {
				case <-ended:
					return
				default:
				}
				rec := newRecord(t)
				_, err := r.Create(ctx, rec)
				mu.Lock()
				switch {
				case err == nil:
					acked[rec.ID] = true
				case errors.Is(err, bus.ErrUnavailable):
					refused[rec.ID] = true
				case errors.Is(err, bus.ErrAmbiguous):
					ambiguous[rec.ID] = true
				default:
					t.Errorf("create: %v", err)
				}
				mu.Unlock()
			}
		})
	}
	moved := create(t, c)
	cycles := 0
	wg.Go(func() {
		for n := 0; ; n++ {
			select {
			case <-ended:
				return
			default:
			}
			lease := fmt.Sprintf("lease-%d", n)
			e, err := untilAnswered(ctx, func() (bus.Entry, error) {
				return r.Transition(ctx, moved.Record.ID, job.Assign{WorkerID: "worker-a", LeaseID: lease})
			})
			if err != nil {
				t.Errorf("assign: %v", err)
				return
			}
			_, err = untilAnswered(ctx, func() (bus.Entry, error) {
				return r.TransitionFrom(ctx, e, job.Return{Fence: e.Record.Fence(), Outcome: job.OutcomeReturned})
			})
			// An answer to an earlier try that was lost: the job is back already.
			if err != nil && !errors.Is(err, job.ErrStale) {
				t.Errorf("return: %v", err)
				return
			}
			cycles++
		}
	})
	for range 4 {
		mu.Lock()
		before := len(acked)
		mu.Unlock()
		eventually(t, func() bool {
			mu.Lock()
			defer mu.Unlock()
			return len(acked) >= before+100
		}, "writes go on")
		p.restart()
	}
	close(ended)
	wg.Wait()
	eventually(t, func() bool { return c.Ready() == nil }, "reconnected")

	for jobID := range acked {
		_, err := r.GetLatest(ctx, jobID)
		require.NoError(t, err, "an acknowledged job is there")
	}
	for jobID := range refused {
		_, err := r.GetLatest(ctx, jobID)
		require.ErrorIs(t, err, bus.ErrNotFound, "what was surely not written is not there")
	}
	e, err := r.GetLatest(ctx, moved.Record.ID)
	require.NoError(t, err)
	require.Equal(t, cycles, e.Record.Attempt)
	require.Equal(t, uint64(1+2*cycles), e.Record.Version, "every event applied exactly once")
	t.Logf("%d acknowledged, %d refused, %d ambiguous, %d cycles, %d writes without an answer",
		len(acked), len(refused), len(ambiguous), cycles, c.Stats().Ambiguous)
}

// untilAnswered repeats a call while the bus is away, as services do.
func untilAnswered(ctx context.Context, call func() (bus.Entry, error)) (bus.Entry, error) {
	for {
		e, err := call()
		if !errors.Is(err, bus.ErrUnavailable) || ctx.Err() != nil {
			return e, err
		}
		select {
		case <-ctx.Done():
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// A server that accepts and does not answer: a submit gives up within its two
// seconds and says that it does not know; a transition waits and finds out.
func TestServerThatDoesNotAnswer(t *testing.T) {
	p := newProcess(t)
	c := connectTo(t, p.url())
	bind(t, c, smallSizes())
	ctx := testContext(t)
	r := c.Registry()
	e := create(t, c)

	require.NoError(t, p.cmd.Process.Signal(syscall.SIGSTOP))
	resumed := time.AfterFunc(6*time.Second, func() { _ = p.cmd.Process.Signal(syscall.SIGCONT) })
	defer resumed.Stop()
	type outcome struct {
		e   bus.Entry
		err error
	}
	transition := make(chan outcome, 1)
	go func() {
		got, err := r.TransitionFrom(ctx, e, job.Assign{WorkerID: "worker-a", LeaseID: "lease-a"})
		transition <- outcome{got, err}
	}()
	rec := newRecord(t)
	began := time.Now()
	_, err := r.Create(ctx, rec)
	require.ErrorIs(t, err, bus.ErrAmbiguous)
	require.Less(t, time.Since(began), 2500*time.Millisecond)

	got := <-transition
	require.NoError(t, got.err)
	require.Equal(t, "lease-a", got.e.Record.LeaseID)
	now, err := r.GetLatest(ctx, e.Record.ID)
	require.NoError(t, err)
	require.Equal(t, got.e, now)
	require.Equal(t, uint64(2), now.Record.Version, "written once, although it was sent twice")
	require.Equal(t, 1, now.Record.Attempt)
	// The submit that was not answered happened, and its repetition finds it.
	again, err := r.Create(ctx, rec)
	require.ErrorIs(t, err, bus.ErrExists)
	require.Equal(t, rec, again.Record)
}

// While the bus is away writes fail at once, and afterwards everything goes on by
// itself, followers included.
func TestReconnect(t *testing.T) {
	p := newProcess(t)
	c := connectTo(t, p.url())
	bind(t, c, smallSizes())
	ctx := testContext(t)
	r := c.Registry()
	called := make(chan struct{}, 16)
	c.OnReconnect(func() { called <- struct{}{} })
	before := c.ServerID()
	require.NotEmpty(t, before)

	f := follow(t, c)
	known := map[string]bus.Entry{}
	for range 50 {
		e := create(t, c)
		known[e.Record.ID] = e
	}
	f.sees(known)
	for round := range 2 {
		p.kill()
		eventually(t, func() bool { return c.Ready() != nil }, "it says that it is away")
		began := time.Now()
		_, err := r.Create(ctx, newRecord(t))
		require.ErrorIs(t, err, bus.ErrUnavailable)
		_, err = r.Get(ctx, newRecord(t).ID)
		require.ErrorIs(t, err, bus.ErrUnavailable, "away is not the same as not found")
		require.Less(t, time.Since(began), 2*time.Second)
		p.start()
		<-called
		require.NotEqual(t, before, c.ServerID(), "another life of the server")
		before = c.ServerID()
		eventually(t, func() bool { return c.Ready() == nil }, "it says that it is back")
		for jobID, e := range known {
			e, err := r.TransitionFrom(ctx, e, job.Assign{WorkerID: "worker-a", LeaseID: fmt.Sprintf("lease-%d", round)})
			require.NoError(t, err)
			e, err = r.TransitionFrom(ctx, e, job.Return{Fence: e.Record.Fence(), Outcome: job.OutcomeReturned})
			require.NoError(t, err)
			known[jobID] = e
		}
		e := create(t, c)
		known[e.Record.ID] = e
		f.sees(known)
	}
	require.Equal(t, uint64(2), c.Stats().Reconnects)
}
