package persister

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/kit/lifecycle"
	"github.com/cmdexec/cmdexec/libs/store"
	"github.com/cmdexec/cmdexec/services/registry-persister/internal/purge"
)

// Deps is what the persister is given. Bus and Store are needed, and stay the
// caller's to close.
type Deps struct {
	Bus     *bus.Conn
	Store   store.Store
	Logger  *slog.Logger          // nil discards
	Metrics prometheus.Registerer // nil: metrics are not shown
	Clock   func() time.Time      // nil: the system's
}

// Service is a persister.
type Service struct {
	cfg     Config
	bus     *bus.Conn
	store   store.Store
	logger  *slog.Logger
	metrics *metrics
	now     func() time.Time

	tracker purge.Tracker
	upkeep  upkeep

	// confirmed is the server id for which the database was found, or made, to
	// follow this registry. Nothing is stored for another one.
	confirmed atomic.Pointer[string]
	ready     chan struct{} // closed when confirmed is set first

	reconnected chan struct{} // holds one token after a reconnect

	position position
	stats    statsCache
}

// New checks the settings. It starts nothing.
func New(cfg Config, d Deps) (*Service, error) {
	if err := cfg.Check(); err != nil {
		return nil, err
	}
	if d.Bus == nil || d.Store == nil {
		return nil, errors.New("the persister needs a bus and a store")
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
	s := &Service{
		cfg: cfg, bus: d.Bus, store: d.Store, logger: d.Logger, now: d.Clock,
		ready: make(chan struct{}), reconnected: make(chan struct{}, 1),
	}
	s.upkeep.scanCost = firstScanCost
	var err error
	if s.metrics, err = newMetrics(d.Metrics, func() float64 { return float64(s.tracker.Len()) }); err != nil {
		return nil, fmt.Errorf("register metrics: %w", err)
	}
	d.Bus.OnReconnect(func() {
		select {
		case s.reconnected <- struct{}{}:
		default:
		}
	})
	return s, nil
}

// Ready returns nil when the bus is bound, the database answers and is known to
// follow this registry; else what is missing.
func (s *Service) Ready() error {
	if err := s.bus.Ready(); err != nil {
		return fmt.Errorf("bus: %w", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	if err := s.store.Ping(ctx); err != nil {
		return fmt.Errorf("database: %w", err)
	}
	if !s.confirmedNow() {
		return errNotConfirmed
	}
	return nil
}

var errNotConfirmed = errors.New("the database has not been compared with the registry yet")

func (s *Service) confirmedNow() bool {
	have := s.confirmed.Load()
	return have != nil && *have == s.bus.ServerID()
}

// Run does the persister's work until ctx ends. It blocks and may be called
// once; nil is a clean stop.
func (s *Service) Run(ctx context.Context) error {
	g := lifecycle.Group{}
	g.Add("upkeep", s.keepUp)
	g.Add("projection", s.project)
	g.Add("queries", s.serveQueries)
	if err := g.Run(ctx); err != nil {
		return fmt.Errorf("registry-persister: %w", err)
	}
	return nil
}
