package persister

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/kit/failpoint"
	"github.com/cmdexec/cmdexec/libs/kit/lifecycle"
	"github.com/cmdexec/cmdexec/services/registry-persister/internal/purge"
)

const (
	firstScanCost  = 5 * time.Millisecond // before one was measured
	sweepBatch     = 500
	retentionBatch = 200
	retentionMost  = 50_000 // jobs deleted in one go; the rest waits for the next second
)

// upkeep is the state of keepUp, and only its.
type upkeep struct {
	guarded  string        // server id for which the ghost guard is done
	full     bool          // the next sweep stores live jobs too
	sweptAt  time.Time     // zero: never
	failedAt time.Time     // the last step that failed since the last sweep; zero: none
	expireAt time.Time     // when retention is due
	scanCost time.Duration // of the last scan
}

// keepUp does, one after the other and each second where due: the comparison of
// database and registry for a new server, the sweep, purges, retention. A step
// that fails is tried again; none of them is in the way of storing jobs.
func (s *Service) keepUp(ctx context.Context) error {
	for {
		pause := lifecycle.Backoff{Min: 100 * time.Millisecond, Max: 5 * time.Second}
		for {
			what, err := s.round(ctx)
			if err == nil {
				break
			}
			if ctx.Err() != nil {
				return nil
			}
			s.upkeep.failedAt = s.now()
			s.metrics.failures.WithLabelValues(what).Inc()
			s.logger.Warn("upkeep failed, will try again", "step", what, "err", err)
			if !s.rest(ctx, pause.Next()) {
				return nil
			}
		}
		if !s.rest(ctx, upkeepEvery) {
			return nil
		}
	}
}

// rest waits for d or the next reconnect, after which schedulers wait for the
// ghost guard. It reports whether ctx is still on.
func (s *Service) rest(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-s.reconnected:
	case <-ctx.Done():
	}
	return ctx.Err() == nil
}

// round does what is due and names the step that failed.
func (s *Service) round(ctx context.Context) (string, error) {
	now := s.now()
	if err := s.follow(ctx); err != nil {
		return "follow", err
	}
	server := s.bus.ServerID()
	if s.sweepDue(server, now) {
		if err := s.sweep(ctx, server); err != nil {
			return "sweep", err
		}
		s.upkeep.sweptAt, s.upkeep.failedAt = now, time.Time{}
	}
	if err := s.purge(ctx, now); err != nil {
		return "purge", err
	}
	if err := s.expire(ctx, now); err != nil {
		return "retention", err
	}
	return "", nil
}

// sweepDue also says so when something has failed a while ago: of a cluster of
// NATS servers that was divided, a durable consumer may have forgotten a message
// that it had not delivered, and the database lacks an end then.
func (s *Service) sweepDue(server string, now time.Time) bool {
	u := &s.upkeep
	return u.guarded != server || u.sweptAt.IsZero() || now.Sub(u.sweptAt) >= sweepEvery ||
		!u.failedAt.IsZero() && now.Sub(u.failedAt) >= sweepAfter
}

// follow makes sure that the database follows the registry of the server that
// the bus is connected to. Until it has, nothing is stored.
func (s *Service) follow(ctx context.Context) error {
	server := s.bus.ServerID()
	if have := s.confirmed.Load(); have != nil && *have == server {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, upkeepTimeout)
	defer cancel()
	// One service mends what a power cut took from around the registry; the others wait for it.
	made, err := s.bus.Restore(ctx)
	if len(made) > 0 {
		s.logger.Warn("the server had lost a part of the topology, it was made again", "parts", made)
	}
	if err != nil {
		return err
	}
	if err := s.bus.Bind(ctx); err != nil { // reads the generation too
		return err
	}
	registry := s.bus.Registry().Generation()
	if registry == "" {
		return errors.New("the registry's generation is not known")
	}
	database, err := s.store.Generation(ctx)
	if err != nil {
		return err
	}
	if database != "" && database != registry {
		n, err := s.store.ResetNonTerminal(ctx, s.now())
		if err != nil {
			return err
		}
		s.metrics.reset.Add(float64(n))
		s.logger.Error("the registry is a new one: jobs that were live have failed", "jobs", n)
		s.tracker.Clear()
	}
	if database != registry {
		if err := s.store.SetGeneration(ctx, registry); err != nil {
			return err
		}
		s.upkeep.full = true
	}
	first := s.confirmed.Load() == nil
	s.confirmed.Store(&server)
	if first {
		close(s.ready)
	}
	return nil
}

// sweep compares every live key with the database. Ended jobs that are not
// stored are stored, the others are noted for their purge. In a new life of the
// server, jobs that have ended in the database and are live in the registry are
// ghosts, which a crash brought back: they are purged before schedulers hear
// that the sweep is done.
func (s *Service) sweep(ctx context.Context, server string) error {
	guard := s.upkeep.guarded != server
	if guard {
		swept, err := s.bus.Swept(ctx)
		if err != nil {
			return err
		}
		guard = swept != server
	}
	begin := time.Now()
	batch := make([]bus.Entry, 0, sweepBatch)
	flush := func() error {
		err := s.sweepEntries(ctx, batch, guard)
		batch = batch[:0]
		return err
	}
	err := s.bus.Registry().Scan(ctx, func(e bus.Entry) error {
		if batch = append(batch, e); len(batch) < sweepBatch {
			return nil
		}
		return flush()
	})
	if err == nil {
		err = flush()
	}
	if err != nil {
		return err
	}
	if s.bus.ServerID() != server {
		return errors.New("the server was restarted meanwhile")
	}
	if guard {
		if err := s.bus.SetSwept(ctx, server); err != nil {
			return err
		}
		s.logger.Info("registry was swept for this life of the server", "server", server, "took", time.Since(begin))
	}
	s.upkeep.guarded, s.upkeep.full = server, false
	return nil
}

func (s *Service) sweepEntries(ctx context.Context, entries []bus.Entry, guard bool) error {
	var ask []string
	for _, e := range entries {
		if guard || e.Record.State.Terminal() && !s.tracker.Has(e.Record.ID, e.Revision) {
			ask = append(ask, e.Record.ID)
		}
	}
	stored, err := s.store.TerminalVersions(ctx, ask)
	if err != nil {
		return err
	}
	now := s.now()
	var keys []purge.Key
	var missing []job.Record
	byID := map[string]bus.Entry{}
	for _, e := range entries {
		version, ended := stored[e.Record.ID]
		// A ghost may have been moved on since it came back, by the end of its lease for
		// example: no version of it is newer than an end.
		same := ended && (guard || version >= e.Record.Version)
		if same && (e.Record.Keyed || !e.Record.State.Terminal()) {
			// Not of an earlier job under the same key?
			if same, err = s.sameJob(ctx, &e.Record); err != nil {
				return err
			}
		}
		switch {
		case e.Record.State.Terminal() && (same || s.tracker.Has(e.Record.ID, e.Revision)):
			keys = append(keys, s.cfg.graces().KeyOf(&e.Record, e.Revision, now))
		case same && guard:
			if err := s.purgeGhost(ctx, e); err != nil {
				return err
			}
			s.metrics.ghosts.Inc()
			s.logger.Warn("purged a job that a crash brought back", "job", e.Record.ID, "version", e.Record.Version, "ended", version)
		case e.Record.State.Terminal() || s.upkeep.full:
			missing = append(missing, e.Record)
			byID[e.Record.ID] = e
		}
	}
	up, err := s.store.UpsertJobs(ctx, missing)
	if err != nil {
		return err
	}
	for _, r := range up.Poison {
		s.logger.Error("job cannot be stored and stays in the registry", "job", r.ID, "err", r.Err)
		delete(byID, r.ID)
	}
	for _, e := range byID {
		if e.Record.State.Terminal() {
			keys = append(keys, s.cfg.graces().KeyOf(&e.Record, e.Revision, now))
			s.metrics.repaired.Inc()
		}
	}
	s.tracker.Note(keys...)
	return nil
}

// purgeGhost purges a ghost until it is gone: it may be moved on at any moment before
// that, and nothing can write to it afterwards.
func (s *Service) purgeGhost(ctx context.Context, e bus.Entry) error {
	for {
		if err := s.bus.Registry().Purge(ctx, e.Record.ID, e.Revision); err != nil {
			return err
		}
		now, err := s.bus.Registry().GetLatest(ctx, e.Record.ID)
		switch {
		case errors.Is(err, bus.ErrNotFound):
			return nil
		case err != nil:
			return err
		case !now.Record.CreatedAt.Equal(e.Record.CreatedAt):
			return nil // the key was used again since
		}
		e = now
	}
}

// sameJob tells a record from one of an earlier job under the same idempotency key.
func (s *Service) sameJob(ctx context.Context, r *job.Record) (bool, error) {
	have, err := s.store.Job(ctx, r.ID)
	if err != nil {
		return false, err
	}
	return have.CreatedAt.Equal(r.CreatedAt), nil
}

// purge takes out of the registry what is stored and has had its grace.
func (s *Service) purge(ctx context.Context, now time.Time) error {
	plan := s.tracker.Plan(now, s.upkeep.scanCost)
	if plan.Groups != nil {
		if err := s.purgeGroups(ctx, now, plan.Groups); err != nil {
			return err
		}
	}
	for _, k := range plan.Singles {
		failpoint.At(failpoint.PersisterBeforePurge)
		if err := s.bus.Registry().Purge(ctx, k.JobID, k.Revision); err != nil {
			return err
		}
		s.tracker.Forget(k)
		s.metrics.purged.WithLabelValues("single").Inc()
	}
	return nil
}

// groupView is what a scan found of a group.
type groupView struct {
	stay, mayGo []uint64
}

// purgeGroups purges groups up to the first key of each that must stay. Which
// keys there are is asked of the registry and not of memory: other persisters
// store jobs that this one knows nothing of.
func (s *Service) purgeGroups(ctx context.Context, now time.Time, groups map[string][]purge.Key) error {
	due := map[string]purge.Key{}
	views := map[string]*groupView{}
	for g, keys := range groups {
		views[g] = &groupView{}
		for _, k := range keys {
			due[k.JobID] = k
		}
	}
	unreadable := s.bus.Stats().Malformed
	var others []bus.Entry
	begin := time.Now()
	err := s.bus.Registry().Scan(ctx, func(e bus.Entry) error {
		v := views[id.Group(e.Record.ID)]
		if v == nil {
			return nil
		}
		if k, ok := due[e.Record.ID]; ok && k.Revision >= e.Revision {
			v.mayGo = append(v.mayGo, e.Revision)
			return nil
		}
		v.stay = append(v.stay, e.Revision)
		if e.Record.State.Terminal() && !s.tracker.Has(e.Record.ID, e.Revision) {
			others = append(others, e) // stored by another persister: goes next time
		}
		return nil
	})
	if err != nil {
		return err
	}
	s.upkeep.scanCost = time.Since(begin)
	if s.bus.Stats().Malformed != unreadable {
		// What cannot be read here may be live for a newer version, in any group.
		for _, keys := range groups {
			s.tracker.Alone(keys...)
		}
		return nil
	}
	for g, v := range views {
		upTo := purge.Bound(v.stay, v.mayGo)
		if upTo > 0 {
			if err := s.bus.Registry().PurgeGroup(ctx, g, upTo); err != nil {
				return err
			}
		}
		purged := 0
		for _, k := range groups[g] {
			if k.Revision <= upTo {
				s.tracker.Forget(k)
				purged++
			} else {
				s.tracker.Alone(k)
			}
		}
		s.metrics.purged.WithLabelValues("group").Add(float64(purged))
	}
	for len(others) > 0 {
		n := min(sweepBatch, len(others))
		if err := s.sweepEntries(ctx, others[:n], false); err != nil {
			return fmt.Errorf("jobs of other persisters: %w", err)
		}
		others = others[n:]
	}
	return nil
}

// expire deletes old jobs, once an hour and then until none is left.
func (s *Service) expire(ctx context.Context, now time.Time) error {
	if s.cfg.JobRetentionDays == 0 || now.Before(s.upkeep.expireAt) {
		return nil
	}
	before := now.AddDate(0, 0, -s.cfg.JobRetentionDays)
	total := 0
	for total < retentionMost {
		n, err := s.store.DeleteFinished(ctx, before, retentionBatch)
		if err != nil {
			return err
		}
		s.metrics.expired.Add(float64(n))
		if total += n; n == 0 {
			s.upkeep.expireAt = now.Add(retentionEvery)
			break
		}
	}
	if total > 0 {
		s.logger.Info("old jobs were deleted", "jobs", total, "before", before)
	}
	return nil
}
