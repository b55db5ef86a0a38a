package persister

import (
	"context"
	"fmt"
	"time"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/kit/failpoint"
	"github.com/cmdexec/cmdexec/services/registry-persister/internal/purge"
)

// project stores what the registry writes. Storing is the only thing that must
// succeed before a batch is acknowledged; purges come later and from elsewhere,
// since unacknowledged messages make them slow.
func (s *Service) project(ctx context.Context) error {
	select {
	case <-s.ready:
	case <-ctx.Done():
		return nil
	}
	err := s.bus.ConsumeBatch(ctx, bus.JobsProjection, bus.BatchOptions{MaxWait: batchWait}, s.storeBatch)
	if ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("follow the registry: %w", err)
}

// change is a record of a batch.
type change struct {
	bus.Entry
	index int // of its message
}

// storeBatch is safe to repeat.
func (s *Service) storeBatch(ctx context.Context, msgs []bus.Msg) error {
	if !s.confirmedNow() {
		// Another server: perhaps another registry. Upkeep finds out.
		return errNotConfirmed
	}
	newest, poison := coalesce(msgs)
	unreadable := len(poison)
	recs := make([]job.Record, 0, len(newest))
	for _, c := range newest {
		recs = append(recs, c.Record)
	}
	begin := time.Now()
	up, err := s.store.UpsertJobs(ctx, recs)
	if err != nil {
		return fmt.Errorf("store %d jobs: %w", len(recs), err)
	}
	failpoint.At(failpoint.PersisterStored)
	s.metrics.batch.Observe(time.Since(begin).Seconds())
	for _, r := range up.Poison {
		poison[newest[r.ID].index] = r.Err
		delete(newest, r.ID)
	}
	s.metrics.records.WithLabelValues("written").Add(float64(up.Written))
	s.metrics.records.WithLabelValues("stale").Add(float64(up.Stale))
	s.metrics.records.WithLabelValues("poison").Add(float64(len(poison)))
	s.metrics.records.WithLabelValues("coalesced").Add(float64(len(msgs) - len(recs) - unreadable))

	now := s.now()
	var keys []purge.Key
	for _, c := range newest {
		if c.Record.State.Terminal() {
			keys = append(keys, s.cfg.graces().KeyOf(&c.Record, c.Revision, now))
		}
	}
	s.tracker.Note(keys...)
	s.position.handled(msgs[len(msgs)-1].Time)
	if len(poison) > 0 {
		return &bus.BatchError{Poison: poison}
	}
	return nil
}

// coalesce keeps the newest record of each job, and says which messages cannot
// be read.
func coalesce(msgs []bus.Msg) (map[string]change, map[int]error) {
	newest := make(map[string]change, len(msgs))
	poison := map[int]error{}
	for i, m := range msgs {
		e, err := bus.DecodeRecord(m)
		if err != nil {
			poison[i] = err
			continue
		}
		// By revision: an idempotency key that was used again is another job, with a lower version.
		if have, ok := newest[e.Record.ID]; !ok || have.Revision < e.Revision {
			newest[e.Record.ID] = change{e, i}
		}
	}
	return newest, poison
}
