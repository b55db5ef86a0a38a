package bus_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/core/job"
)

func TestCreateAndRead(t *testing.T) {
	c := start(t)
	ctx := testContext(t)
	r := c.Registry()
	rec := newRecord(t)
	e, err := r.Create(ctx, rec)
	require.NoError(t, err)
	require.Equal(t, rec, e.Record)
	for _, read := range []func(context.Context, string) (bus.Entry, error){r.Get, r.GetLatest} {
		got, err := read(ctx, rec.ID)
		require.NoError(t, err)
		require.Equal(t, e, got)
	}
	again, err := r.Create(ctx, rec)
	require.ErrorIs(t, err, bus.ErrExists)
	require.Equal(t, e, again, "a create that comes second gets what is there")

	absent := id.New(id.Job, time.Now())
	_, err = r.Get(ctx, absent)
	require.ErrorIs(t, err, bus.ErrNotFound)
	_, err = r.GetLatest(ctx, absent)
	require.ErrorIs(t, err, bus.ErrNotFound)
	_, err = r.Transition(ctx, absent, job.CancelRequest{})
	require.ErrorIs(t, err, bus.ErrNotFound)
	for _, bad := range []string{"", ">", "*", "job-", "job-*", absent + ".x", "job-" + absent} {
		_, err := r.Get(ctx, bad)
		require.ErrorIs(t, err, bus.ErrNotFound, "id %q", bad)
		require.Error(t, r.Purge(ctx, bad, 1), "id %q", bad)
	}
	for _, bad := range []string{"", ">", "*", "0000000.>", "00000*0"} {
		require.Error(t, r.PurgeGroup(ctx, bad, 1), "group %q", bad)
	}
	require.NotEmpty(t, r.Generation())
}

// Many writers offer numbered events to one job: each is applied exactly once, in
// an order that the state table allows, and no update is lost.
func TestLostRaces(t *testing.T) {
	c := start(t)
	ctx := testContext(t)
	r := c.Registry()
	e := create(t, c)
	const writers, each = 16, 4
	var wg sync.WaitGroup
	failed := make(chan error, writers)
	for w := range writers {
		wg.Go(func() {
			for n := range each {
				lease := fmt.Sprintf("lease-%d-%d", w, n)
				if err := assignAndReturn(ctx, r, e.Record.ID, lease); err != nil {
					failed <- fmt.Errorf("writer %d: %w", w, err)
					return
				}
			}
		})
	}
	wg.Wait()
	close(failed)
	for err := range failed {
		require.NoError(t, err)
	}
	got, err := r.GetLatest(ctx, e.Record.ID)
	require.NoError(t, err)
	require.Equal(t, writers*each, got.Record.Attempt, "every assignment counted once")
	require.Equal(t, uint64(1+2*writers*each), got.Record.Version, "every event applied exactly once")
	require.Equal(t, job.Queued, got.Record.State)
	for i, a := range got.Record.Attempts {
		require.Equal(t, got.Record.Attempt-len(got.Record.Attempts)+1+i, a.Number, "in order")
		require.Equal(t, job.OutcomeReturned, a.Outcome)
	}
	require.NotZero(t, c.Stats().Conflicts, "there were races")
}

func assignAndReturn(ctx context.Context, r *bus.Registry, jobID, lease string) error {
	for {
		e, err := r.Transition(ctx, jobID, job.Assign{WorkerID: "worker-a", LeaseID: lease})
		if errors.Is(err, job.ErrRefused) {
			if e.Record.State != job.Assigned {
				return fmt.Errorf("refused while %s: %w", e.Record.State, err)
			}
			continue // another writer's turn
		}
		if err != nil {
			return err
		}
		if e.Record.LeaseID != lease {
			return fmt.Errorf("assigned %s, got %s", lease, e.Record.LeaseID)
		}
		_, err = r.TransitionFrom(ctx, e, job.Return{Fence: e.Record.Fence(), Outcome: job.OutcomeReturned})
		return err
	}
}

// A refusal is decided on what is there, not on what the caller happens to hold.
func TestRefusalsAreDecidedOnFreshState(t *testing.T) {
	c := start(t)
	ctx := testContext(t)
	r := c.Registry()
	queued := create(t, c)
	lease := func(e bus.Entry) job.Fence { return e.Record.Fence() }

	assigned, err := r.TransitionFrom(ctx, queued, job.Assign{WorkerID: "worker-a", LeaseID: "lease-a"})
	require.NoError(t, err)
	// On the queued entry this report would be stale; on the stored one it is current.
	running, err := r.TransitionFrom(ctx, queued, job.Start{Fence: lease(assigned)})
	require.NoError(t, err)
	require.Equal(t, job.Running, running.Record.State)

	got, err := r.TransitionFrom(ctx, queued, job.Start{Fence: job.Fence{Attempt: 7, LeaseID: "lease-x"}})
	require.ErrorIs(t, err, job.ErrStale)
	require.Equal(t, running, got, "a refusal comes with the current entry")

	zero := 0
	done, err := r.TransitionFrom(ctx, assigned, job.Result{
		Fence: lease(assigned), WorkerID: "worker-a",
		Outcome: job.OutcomeSucceeded, ExitCode: &zero, StartedAt: time.Now(), FinishedAt: time.Now(),
	})
	require.NoError(t, err)
	require.Equal(t, job.Succeeded, done.Record.State)
	got, err = r.TransitionFrom(ctx, queued, job.CancelRequest{})
	require.ErrorIs(t, err, job.ErrTerminal)
	require.Equal(t, done, got)
	require.NotZero(t, c.Stats().Refused)
}

// After the registry is full for creates, all jobs still end, before any of them
// leaves: an update does not make what is there larger.
func TestBucketAtItsLimit(t *testing.T) {
	for name, size := range map[string]int{"large jobs": 32 << 10, "small jobs": 6 << 10} {
		t.Run(name, func(t *testing.T) {
			c := startSized(t, bus.Sizes{Jobs: 4 << 20, Results: 16 << 20, Logs: 16 << 20})
			ctx := testContext(t)
			r := c.Registry()
			var live []bus.Entry
			for {
				rec := newRecord(t)
				rec.Spec.Stdin = strings.Repeat("x", size)
				e, err := r.Create(ctx, rec)
				if err != nil {
					require.ErrorIs(t, err, bus.ErrQueueFull)
					break
				}
				live = append(live, e)
				require.Less(t, len(live), 1000, "the limit was never met")
			}
			used, limit := r.Usage()
			require.Equal(t, int64(4<<20), limit)
			require.Greater(t, used, limit/2)
			require.NotEmpty(t, live)
			for i, e := range live {
				e, err := r.TransitionFrom(ctx, e, job.Assign{WorkerID: "worker-a", LeaseID: "lease-a"})
				require.NoError(t, err)
				e, err = r.TransitionFrom(ctx, e, job.CancelRequest{})
				require.NoError(t, err)
				live[i], err = r.TransitionFrom(ctx, e, job.Lost{Fence: e.Record.Fence()})
				require.NoError(t, err)
				require.Equal(t, job.Canceled, live[i].Record.State)
			}
			for _, e := range live {
				require.NoError(t, r.Purge(ctx, e.Record.ID, e.Revision))
			}
			eventually(t, func() bool {
				_, err := r.Create(ctx, newRecord(t))
				return err == nil
			}, "the registry takes jobs again")
		})
	}
}

func TestPurgeIsBoundedByRevision(t *testing.T) {
	c := start(t)
	ctx := testContext(t)
	r := c.Registry()
	first := create(t, c)
	second, err := r.TransitionFrom(ctx, first, job.CancelRequest{})
	require.NoError(t, err)
	require.NoError(t, r.Purge(ctx, first.Record.ID, first.Revision))
	got, err := r.GetLatest(ctx, first.Record.ID)
	require.NoError(t, err, "a newer revision stays")
	require.Equal(t, second, got)
	require.NoError(t, r.PurgeGroup(ctx, id.Group(first.Record.ID), first.Revision))
	_, err = r.GetLatest(ctx, first.Record.ID)
	require.NoError(t, err, "a newer revision stays")
	require.NoError(t, r.PurgeGroup(ctx, id.Group(first.Record.ID), second.Revision))
	_, err = r.GetLatest(ctx, first.Record.ID)
	require.ErrorIs(t, err, bus.ErrNotFound)
	require.NoError(t, r.Purge(ctx, first.Record.ID, second.Revision), "purging what is gone is no error")

	// Nothing but a create makes the key again.
	_, err = r.TransitionFrom(ctx, first, job.CancelRequest{})
	require.ErrorIs(t, err, bus.ErrNotFound)
	_, err = r.GetLatest(ctx, first.Record.ID)
	require.ErrorIs(t, err, bus.ErrNotFound)
}

func TestScanSeesEveryJobOnce(t *testing.T) {
	c := start(t)
	ctx := testContext(t)
	r := c.Registry()
	require.NoError(t, r.Scan(ctx, func(bus.Entry) error { return errors.New("there is none") }))
	want := map[string]uint64{}
	for range 300 {
		e := create(t, c)
		want[e.Record.ID] = e.Revision
	}
	got := map[string]uint64{}
	require.NoError(t, r.Scan(ctx, func(e bus.Entry) error {
		require.NotContains(t, got, e.Record.ID)
		got[e.Record.ID] = e.Revision
		return nil
	}))
	require.Equal(t, want, got)
	stop := errors.New("enough")
	require.ErrorIs(t, r.Scan(ctx, func(bus.Entry) error { return stop }), stop)
}

// A record at the limit goes through every path; one past it is refused here.
func TestLargeRecords(t *testing.T) {
	c := start(t)
	ctx := testContext(t)
	r := c.Registry()
	f := follow(t, c)
	rec := newRecord(t)
	rec.Spec.Stdin = strings.Repeat("x", job.MaxRecordBytes-4096)
	e, err := r.Create(ctx, rec)
	require.NoError(t, err)
	e, err = r.TransitionFrom(ctx, e, job.CancelRequest{})
	require.NoError(t, err)
	got, err := r.Get(ctx, rec.ID)
	require.NoError(t, err)
	require.Equal(t, e, got)
	got, err = r.GetLatest(ctx, rec.ID)
	require.NoError(t, err)
	require.Equal(t, e, got)
	f.sees(map[string]bus.Entry{rec.ID: e})

	rec = newRecord(t)
	rec.Spec.Stdin = strings.Repeat("x", job.MaxRecordBytes)
	_, err = r.Create(ctx, rec)
	require.ErrorIs(t, err, bus.ErrTooLarge)
	_, err = r.GetLatest(ctx, rec.ID)
	require.ErrorIs(t, err, bus.ErrNotFound)
}

// Of many who create one key, as with an idempotency key, one succeeds and all see
// the same job.
func TestConcurrentCreatesOfOneKey(t *testing.T) {
	c := start(t)
	ctx := testContext(t)
	jobID := id.Keyed("owner", "key")
	var mu sync.Mutex
	won, seen := 0, map[uint64]bool{}
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			rec := newRecord(t)
			rec.ID = jobID
			e, err := c.Registry().Create(ctx, rec.WithIdempotency())
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				won++
			case !errors.Is(err, bus.ErrExists):
				t.Errorf("create: %v", err)
			}
			seen[e.Revision] = true
		})
	}
	wg.Wait()
	require.Equal(t, 1, won)
	require.Len(t, seen, 1)
}
