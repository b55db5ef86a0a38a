package persister

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/kit/lifecycle"
	"github.com/cmdexec/cmdexec/libs/store"
)

// serveQueries answers until ctx ends.
func (s *Service) serveQueries(ctx context.Context) error {
	var subs []bus.Subscription
	stop := func() error {
		var errs []error
		for _, sub := range subs {
			errs = append(errs, sub.Unsubscribe())
		}
		return errors.Join(errs...)
	}
	for _, serve := range []func() (bus.Subscription, error){
		func() (bus.Subscription, error) { return bus.Serve(s.bus, bus.QueryJob, s.queryJob) },
		func() (bus.Subscription, error) { return bus.Serve(s.bus, bus.QueryJobs, s.queryJobs) },
		func() (bus.Subscription, error) { return bus.Serve(s.bus, bus.QueryStats, s.queryStats) },
		func() (bus.Subscription, error) { return bus.Serve(s.bus, bus.QueryLogs, s.queryLogs) },
	} {
		sub, err := serve()
		if err != nil {
			return errors.Join(err, stop())
		}
		subs = append(subs, sub)
	}
	<-ctx.Done()
	if err := stop(); err != nil {
		s.logger.Debug("queries were not ended in order", "err", err) // the bus is away
	}
	return nil
}

func badRequest(message string) error {
	return &busmsg.QueryError{Code: busmsg.CodeBadRequest, Message: message}
}

func (s *Service) queryJob(ctx context.Context, q busmsg.GetJob) (job.Record, error) {
	if id.Check(id.Job, q.JobID) != nil {
		return job.Record{}, badRequest("jobId is not a job's id")
	}
	r, err := s.store.Job(ctx, q.JobID)
	if errors.Is(err, store.ErrNotFound) {
		return r, &busmsg.QueryError{Code: busmsg.CodeNotFound, Message: "the database has no such job"}
	}
	if err != nil {
		return r, err
	}
	if a := r.Last(); a != nil && a.Manifest != nil && a.Manifest.Chunks > 0 {
		a.LogsIncomplete, err = s.store.BadLogs(ctx, r.ID, a.Number)
	}
	return r, err
}

func (s *Service) queryJobs(ctx context.Context, q busmsg.ListJobs) (busmsg.JobPage, error) {
	for _, st := range q.States {
		if !st.Valid() {
			return busmsg.JobPage{}, badRequest("states has a word that is none")
		}
	}
	if len(q.States) > len(job.States()) || len(q.Labels) > job.MaxLabels {
		return busmsg.JobPage{}, badRequest("too many states or labels")
	}
	asOf, err := s.asOf(ctx) // before the page, which is at least that new
	if err != nil {
		return busmsg.JobPage{}, err
	}
	items, more, err := s.store.ListJobs(ctx, q)
	return busmsg.JobPage{Items: items, More: more, AsOf: asOf}, err
}

func (s *Service) queryLogs(ctx context.Context, q busmsg.GetLogs) (busmsg.Logs, error) {
	switch {
	case id.Check(id.Job, q.JobID) != nil:
		return busmsg.Logs{}, badRequest("jobId is not a job's id")
	case q.Attempt < 1 || q.After < 0:
		return busmsg.Logs{}, badRequest("attempt is at least 1 and after at least 0")
	case q.Stream != "" && !q.Stream.Valid():
		return busmsg.Logs{}, badRequest("stream is no stream")
	}
	return s.store.Logs(ctx, q)
}

func (s *Service) queryStats(ctx context.Context, _ struct{}) (busmsg.Stats, error) {
	return s.stats.get(ctx, func() (busmsg.Stats, error) {
		asOf, err := s.asOf(ctx)
		if err != nil {
			return busmsg.Stats{}, err
		}
		counts, err := s.store.Stats(ctx)
		return busmsg.Stats{ByState: counts, AsOf: asOf}, err
	})
}

// statsCache keeps counting, which reads an index over all jobs, to a tenth of
// the time.
type statsCache struct {
	mu    sync.Mutex
	value busmsg.Stats
	until time.Time
}

func (c *statsCache) get(ctx context.Context, count func() (busmsg.Stats, error)) (busmsg.Stats, error) {
	c.mu.Lock() // the second of two callers gets the first one's answer
	defer c.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return busmsg.Stats{}, err
	}
	begin := time.Now()
	if begin.Before(c.until) {
		return c.value, nil
	}
	value, err := count()
	if err != nil {
		return busmsg.Stats{}, err
	}
	c.value, c.until = value, time.Now().Add(max(statsFresh, 10*time.Since(begin)))
	return value, nil
}

// position is how far the database has followed the registry.
type position struct {
	mu      sync.Mutex
	newest  time.Time // of the messages handled here
	idleAt  time.Time // when nothing was pending last
	askedAt time.Time
}

// handled notes the time of a message up to which all are stored.
func (p *position) handled(t time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if t.After(p.newest) {
		p.newest = t
	}
}

// askEvery bounds how often the bus is asked what is pending.
const askEvery = 100 * time.Millisecond

// firstAnswer bounds how long a query waits, right after a start, for a first
// position.
const firstAnswer = 2 * time.Second

var errNoPosition = errors.New("it is not known yet how far the database has followed the registry")

// asOf is the time up to which the database has seen the registry: now when
// nothing is pending for any persister, else the time of the newest record that
// this one stored. It never goes back.
func (s *Service) asOf(ctx context.Context) (time.Time, error) {
	ctx, cancel := context.WithTimeout(ctx, firstAnswer)
	defer cancel()
	for {
		at := s.position.now(func() bool {
			pending, err := s.bus.Pending(ctx, bus.JobsProjection)
			return err == nil && pending == 0 && s.confirmedNow()
		})
		if !at.IsZero() {
			return job.Timestamp(at), nil
		}
		if err := lifecycle.Sleep(ctx, askEvery/4); err != nil {
			return time.Time{}, errNoPosition
		}
	}
}

// now returns the position, zero when there is none yet. idle reports whether
// nothing was pending at some moment after it was called.
func (p *position) now(idle func() bool) time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	if now := time.Now(); now.Sub(p.askedAt) >= askEvery {
		p.askedAt = now
		if idle() {
			p.idleAt = now
		}
	}
	if p.idleAt.After(p.newest) {
		return p.idleAt
	}
	return p.newest
}
