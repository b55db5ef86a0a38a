package scheduler

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/kit/lifecycle"
	"github.com/cmdexec/cmdexec/services/scheduler/internal/lead"
)

// Deps is what the scheduler is given. Bus is needed.
type Deps struct {
	Bus     *bus.Conn
	Logger  *slog.Logger          // nil discards
	Metrics prometheus.Registerer // nil: metrics are not shown
}

// Service is a scheduler.
type Service struct {
	cfg     Config
	bus     *bus.Conn
	logger  *slog.Logger
	metrics *lead.Metrics
	leading prometheus.Gauge
	id      string

	mu   sync.Mutex
	term *lead.Term // while one runs
}

// New checks the settings. It starts nothing.
func New(cfg Config, d Deps) (*Service, error) {
	cfg = cfg.withDefaults()
	if err := cfg.check(); err != nil {
		return nil, err
	}
	if d.Bus == nil {
		return nil, errors.New("the scheduler needs a bus")
	}
	if d.Logger == nil {
		d.Logger = slog.New(slog.DiscardHandler)
	}
	if d.Metrics == nil {
		d.Metrics = prometheus.NewRegistry()
	}
	s := &Service{
		cfg: cfg, bus: d.Bus, logger: d.Logger, id: id.New(id.Scheduler, time.Now()),
		leading: prometheus.NewGauge(prometheus.GaugeOpts{
			Namespace: "cmdexec", Subsystem: "scheduler", Name: "leading", Help: "1 while this scheduler leads.",
		}),
	}
	var err error
	if s.metrics, err = lead.NewMetrics(d.Metrics); err != nil {
		return nil, fmt.Errorf("register metrics: %w", err)
	}
	if err := d.Metrics.Register(s.leading); err != nil {
		return nil, fmt.Errorf("register metrics: %w", err)
	}
	d.Bus.OnReconnect(s.reconnected)
	return s, nil
}

// Ready returns nil when this scheduler leads or could, else what is missing.
func (s *Service) Ready() error {
	if err := s.bus.Ready(); err != nil {
		return fmt.Errorf("bus: %w", err)
	}
	return nil
}

// Run campaigns for leadership and does a leader's work while it has it, until
// ctx ends. It blocks and may be called once; nil is a clean stop, after which
// another scheduler can take over at once.
func (s *Service) Run(ctx context.Context) error {
	g := lifecycle.Group{}
	g.Add("lead", func(ctx context.Context) error {
		if err := s.bus.Bind(ctx); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("bind to the bus: %w", err)
		}
		err := s.bus.Lead(ctx, s.id, s.lead)
		if ctx.Err() != nil {
			return nil
		}
		return err
	})
	if err := g.Run(ctx); err != nil {
		return fmt.Errorf("scheduler: %w", err)
	}
	return nil
}

// lead runs terms for as long as leadership lasts: a new one with empty memory
// whenever the old one may not match the registry any more.
func (s *Service) lead(ctx context.Context) error {
	s.logger.Info("leading", "scheduler", s.id)
	s.leading.Set(1)
	defer func() {
		s.leading.Set(0)
		s.logger.Info("not leading any more", "scheduler", s.id)
	}()
	pause := lifecycle.Backoff{Min: 100 * time.Millisecond, Max: 5 * time.Second}
	for ctx.Err() == nil {
		err := s.serve(ctx)
		if ctx.Err() != nil {
			break
		}
		s.logger.Warn("starting over with empty memory", "err", err)
		if !errors.Is(err, lead.ErrRebuild) {
			_ = lifecycle.Sleep(ctx, pause.Next()) // the loop looks at ctx
		}
	}
	return nil
}

// serve runs one term and answers others while its memory is complete.
func (s *Service) serve(ctx context.Context) error {
	term := lead.New(newBusPort(s.bus), lead.Config{
		SchedulerID: s.id, LeaseTTL: s.cfg.lease(), Heartbeat: s.cfg.heartbeat(), MaxRunningPerOwner: s.cfg.MaxRunningPerUser,
	}, s.metrics, s.logger)
	s.setTerm(term)
	defer s.setTerm(nil)

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	answering := make(chan error, 1)
	go func() {
		err := s.answer(ctx, term)
		if err != nil {
			cancel() // a leader that cannot be reached leads nobody
		}
		answering <- err
	}()
	err := term.Run(ctx)
	cancel()
	return errors.Join(err, <-answering)
}

// answer serves beats and queries from when the term is caught up until ctx ends.
func (s *Service) answer(ctx context.Context, term *lead.Term) (err error) {
	select {
	case <-term.CaughtUp():
	case <-ctx.Done():
		return nil
	}
	var subs []bus.Subscription
	defer func() {
		for _, sub := range subs {
			if e := sub.Unsubscribe(); e != nil && s.bus.Ready() == nil {
				err = errors.Join(err, fmt.Errorf("stop answering: %w", e))
			}
		}
	}()
	for _, serve := range []func() (bus.Subscription, error){
		func() (bus.Subscription, error) { return s.bus.ServeBeats(term.Beat) },
		func() (bus.Subscription, error) { return bus.Serve(s.bus, bus.QueryExplain, term.Explain) },
		func() (bus.Subscription, error) { return bus.Serve(s.bus, bus.QueryWorkers, term.Workers) },
		func() (bus.Subscription, error) { return bus.Serve(s.bus, bus.QueryOwner, term.Owner) },
	} {
		sub, err := serve()
		if err != nil {
			return fmt.Errorf("answer others: %w", err)
		}
		subs = append(subs, sub)
	}
	<-ctx.Done()
	return nil
}

func (s *Service) setTerm(t *lead.Term) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.term = t
}

func (s *Service) reconnected() {
	s.mu.Lock()
	t := s.term
	s.mu.Unlock()
	if t != nil {
		t.Reconnected()
	}
}
