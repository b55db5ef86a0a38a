package ratelimit

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cmdexec/cmdexec/libs/kit/lifecycle"
)

// Times and numbers of Failover.
const (
	RemoteTimeout = 50 * time.Millisecond // for one decision of the remote

	breakAfter = 3                      // failures in a row until the remote counts as away
	probeFirst = 100 * time.Millisecond // from then on to the first probe
	probeMost  = 2 * time.Second        // between two probes
	settled    = 10 * time.Second       // a remote that stays this long is not held to its past
	probeKey   = "probe"
)

// FailoverOptions of NewFailover. Its zero value can be used.
type FailoverOptions struct {
	MaxKeys int                   // of the local limiter, see NewLocal
	Logger  *slog.Logger          // nil discards
	Metrics prometheus.Registerer // nil: none
}

// Failover is a Limiter of two: every event is counted by the local limiter first, and what that allows by the remote one, as long as that
// answers. So
//
//   - the local limiter is warm when the remote goes away, and nothing is let through that it would refuse: whatever happens to the remote,
//     a key gets at most its local limit in each process;
//   - nobody can make this process ask the remote more often than the limit of their key.
//
// A key that a process has charged and the remote refuses keeps the charge: it is never more than the rate. After three failures in a
// row the remote counts as away and is not asked; a goroutine probes it until it answers, so that no caller waits for it meanwhile. It
// begins that way too: no request pays for the first connection. Its methods never fail. Make one with NewFailover, end it with Close.
type Failover struct {
	local  *Local
	shared Shared
	log    *slog.Logger

	away     atomic.Bool
	failures atomic.Int32 // in a row
	stop     context.CancelFunc
	ctx      context.Context // of probes
	probes   sync.WaitGroup

	mu      sync.Mutex
	closed  bool
	since   time.Time // of the state
	pause   lifecycle.Backoff
	known   bool // a first probe has said what the state is
	metrics failoverMetrics
}

type failoverMetrics struct {
	up        prometheus.Gauge
	changes   *prometheus.CounterVec
	failures  prometheus.Counter
	decisions *prometheus.CounterVec
	byShared  prometheus.Counter
	byLocal   prometheus.Counter
	refused   prometheus.Counter
}

func newFailoverMetrics(r prometheus.Registerer) (failoverMetrics, error) {
	m := failoverMetrics{
		up: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "cmdexec_ratelimit_remote_up", Help: "1 while rate limits are shared with other processes, 0 while each counts by itself.",
		}),
		changes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "cmdexec_ratelimit_remote_changes_total", Help: "How often the shared store of rate limits came or went.",
		}, []string{"to"}),
		failures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "cmdexec_ratelimit_remote_failures_total", Help: "Decisions and probes that the shared store did not answer in time.",
		}),
		decisions: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "cmdexec_ratelimit_decisions_total", Help: "Decisions by who made them: shared, local because the store is away, refused locally.",
		}, []string{"by"}),
	}
	m.byShared, m.byLocal, m.refused = m.decisions.WithLabelValues("shared"), m.decisions.WithLabelValues("local"), m.decisions.WithLabelValues("refused_locally")
	if r == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.up, m.changes, m.failures, m.decisions} {
		if err := r.Register(c); err != nil {
			return m, err
		}
	}
	return m, nil
}

// NewFailover begins to probe the remote in a goroutine of its own; the local limiter decides until it answers.
func NewFailover(remote Remote, o FailoverOptions) (*Failover, error) {
	m, err := newFailoverMetrics(o.Metrics)
	if err != nil {
		return nil, err
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	f := &Failover{
		local: NewLocal(o.MaxKeys), shared: Shared{remote}, log: o.Logger, metrics: m,
		since: time.Now(), pause: lifecycle.Backoff{Min: probeFirst, Max: probeMost},
	}
	f.ctx, f.stop = context.WithCancel(context.Background())
	f.away.Store(true)
	f.probes.Go(func() { f.probe(0) })
	return f, nil
}

// Close ends the probing and waits for it. The limiter goes on by itself, without the remote once that fails.
func (f *Failover) Close() {
	f.mu.Lock()
	f.closed = true
	f.mu.Unlock()
	f.stop()
	f.probes.Wait()
}

// Note says what an operator should know about the remote: empty while it answers.
func (f *Failover) Note() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.away.Load() {
		return ""
	}
	return "rate limits: the shared store does not answer since " + f.since.UTC().Format(time.RFC3339) + ", each process counts by itself"
}

// Allow blocks for RemoteTimeout at most and never returns an error.
func (f *Failover) Allow(ctx context.Context, key string, rate Rate) (Decision, error) {
	return f.AllowAll(ctx, Event{Key: key, Rate: rate})
}

// AllowAll blocks for RemoteTimeout at most and never returns an error. It asks the remote once.
func (f *Failover) AllowAll(ctx context.Context, events ...Event) (Decision, error) {
	local, _ := f.local.AllowAll(ctx, events...) // never fails
	switch {
	case local.Limit == 0 && local.Allowed: // nothing is limited
		return local, nil
	case !local.Allowed:
		f.metrics.refused.Inc()
		return local, nil
	case f.away.Load():
		f.metrics.byLocal.Inc()
		return local, nil
	}
	bound, cancel := context.WithTimeout(ctx, RemoteTimeout)
	defer cancel()
	shared, err := f.shared.AllowAll(bound, events...)
	if err != nil {
		f.metrics.byLocal.Inc()
		if ctx.Err() == nil { // the remote's fault, not that of a caller who went away
			f.failed(err)
		}
		return local, nil
	}
	if f.failures.Load() != 0 {
		f.failures.Store(0)
	}
	f.metrics.byShared.Inc()
	return tighter(local, shared), nil
}

// failed counts a failure, and gives the remote up after some in a row.
func (f *Failover) failed(err error) {
	f.metrics.failures.Inc()
	if f.failures.Add(1) < breakAfter {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.away.Load() {
		return // by another caller
	}
	if time.Since(f.since) > settled {
		f.pause.Reset()
	}
	f.changed(true, err)
	if !f.closed {
		pause := f.pause.Next()
		f.probes.Go(func() { f.probe(pause) })
	}
}

// changed notes a new state. The caller holds mu.
func (f *Failover) changed(away bool, err error) {
	f.away.Store(away)
	f.since, f.known = time.Now(), true
	f.failures.Store(0)
	if away {
		f.metrics.up.Set(0)
		f.metrics.changes.WithLabelValues("away").Inc()
		f.log.Warn("the shared store of rate limits does not answer, this process counts by itself", "err", err)
		return
	}
	f.metrics.up.Set(1)
	f.metrics.changes.WithLabelValues("up").Inc()
	f.log.Info("rate limits are shared with other processes")
}

// probe asks the remote from time to time, first after pause, until it answers. It asks for a decision, not for a sign of life: a store
// that answers and may not be written to is of no use.
func (f *Failover) probe(pause time.Duration) {
	for {
		if pause > 0 && lifecycle.Sleep(f.ctx, pause) != nil {
			return
		}
		ctx, cancel := context.WithTimeout(f.ctx, RemoteTimeout)
		_, err := f.shared.Allow(ctx, probeKey, Rate{Count: 1000, Per: time.Second})
		cancel()
		if f.ctx.Err() != nil {
			return
		}
		f.mu.Lock()
		if err == nil {
			f.changed(false, nil)
			f.mu.Unlock()
			return
		}
		f.metrics.failures.Inc()
		if !f.known { // the first word about it
			f.changed(true, err)
		}
		pause = f.pause.Next()
		f.mu.Unlock()
	}
}
