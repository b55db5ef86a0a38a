package collector

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/kit/lifecycle"
	"github.com/cmdexec/cmdexec/libs/store"
)

// Deps is what the collector is given. Bus and Store are needed, and stay the
// caller's to close.
type Deps struct {
	Bus     *bus.Conn
	Store   store.Store
	Logger  *slog.Logger          // nil discards
	Metrics prometheus.Registerer // nil: metrics are not shown
	Clock   func() time.Time      // for metrics and for what is due; nil: the system's
}

// Service is a collector.
type Service struct {
	bus     *bus.Conn
	store   store.Store
	logger  *slog.Logger
	metrics *metrics
	now     func() time.Time
	tails   chan tailRequest
}

// New starts nothing.
func New(d Deps) (*Service, error) {
	if d.Bus == nil || d.Store == nil {
		return nil, errors.New("the collector needs a bus and a store")
	}
	if d.Logger == nil {
		d.Logger = slog.New(slog.DiscardHandler)
	}
	if d.Metrics == nil {
		d.Metrics = prometheus.NewRegistry()
	}
	if d.Clock == nil {
		d.Clock = time.Now
	}
	s := &Service{bus: d.Bus, store: d.Store, logger: d.Logger, now: d.Clock, tails: make(chan tailRequest)}
	var err error
	if s.metrics, err = newMetrics(d.Metrics); err != nil {
		return nil, fmt.Errorf("register metrics: %w", err)
	}
	return s, nil
}

// Ready returns nil when the bus is bound and the database answers; else what is
// missing. Results become states also while the database is away.
func (s *Service) Ready() error {
	if err := s.bus.Ready(); err != nil {
		return fmt.Errorf("bus: %w", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	if err := s.store.Ping(ctx); err != nil {
		return fmt.Errorf("database: %w", err)
	}
	return nil
}

// Run does the collector's work until ctx ends. It blocks and may be called
// once; nil is a clean stop.
func (s *Service) Run(ctx context.Context) error {
	g := lifecycle.Group{}
	g.Add("consume", s.consume)
	if err := g.Run(ctx); err != nil {
		return fmt.Errorf("result-collector: %w", err)
	}
	return nil
}

func (s *Service) consume(ctx context.Context) error {
	if err := s.bus.Bind(ctx); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	g := lifecycle.Group{}
	g.Add("trim", s.trim)
	g.Add("logs", s.archiveLogs)
	g.Add("archive", s.archiveResults)
	g.Add("state", s.settleResults)
	g.Add("requests", s.serveResults)
	g.Add("tails", s.storeRequested)
	g.Add("check", s.checkLogs)
	return g.Run(ctx)
}

// trimEvery: RESULTS and LOGS hold what is on its way, not history.
const trimEvery = time.Second

// trim purges what all consumers have acknowledged, until ctx ends.
func (s *Service) trim(ctx context.Context) error {
	for {
		for _, trim := range [...]func(context.Context) error{s.bus.TrimResults, s.bus.TrimLogs} {
			if err := trim(ctx); err != nil && ctx.Err() == nil {
				s.metrics.trimFailures.Inc()
				s.logger.Warn("a stream was not trimmed, will try again", "err", err)
			}
		}
		if lifecycle.Sleep(ctx, trimEvery) != nil {
			return nil
		}
	}
}
