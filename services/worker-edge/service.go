package edge

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
	"github.com/cmdexec/cmdexec/libs/kit/config"
	"github.com/cmdexec/cmdexec/libs/kit/httpkit"
	"github.com/cmdexec/cmdexec/libs/kit/lifecycle"
	"github.com/cmdexec/cmdexec/libs/kit/ratelimit"
	"github.com/cmdexec/cmdexec/services/worker-edge/internal/poll"
	"github.com/cmdexec/cmdexec/services/worker-edge/internal/session"
	"github.com/cmdexec/cmdexec/services/worker-edge/internal/socket"
)

// Deps is what the edge is given. Bus and WorkerTokenSecret are needed.
type Deps struct {
	Bus               *bus.Conn
	WorkerTokenSecret config.Secret         // checks workers' tokens and signs the ones that renew them
	Limiter           ratelimit.Limiter     // nil: one in this process
	Logger            *slog.Logger          // nil discards
	Metrics           prometheus.Registerer // nil: metrics are not shown
}

// Service is the edge.
type Service struct {
	bus     *bus.Conn
	hub     *session.Hub
	sockets *socket.Handler
	handler http.Handler
	server  *httpkit.Server // nil without a listener of its own
	logger  *slog.Logger
}

// A worker over plain HTTP that was not heard for so many heartbeats, and not for
// leastSilence, has lost its session. Requests wait for a sixth of a lease for
// their answer, and not less than leastAnswer.
const (
	silentBeats  = 3
	leastSilence = 5 * time.Second
	leastAnswer  = 2 * time.Second
)

// drainTimeout is how long sockets may take to close after their sessions have ended.
const drainTimeout = closeTimeout + time.Second

// closeTimeout is how long a socket waits for the worker's part of a close.
const closeTimeout = 5 * time.Second

// New checks the settings and opens the listener if they ask for one. It starts
// nothing; Run must follow, also to close the listener.
func New(cfg Config, d Deps) (*Service, error) {
	cfg = cfg.withDefaults()
	if err := cfg.check(); err != nil {
		return nil, err
	}
	if err := config.ValidateSecret("WORKER_TOKEN_SECRET", d.WorkerTokenSecret); err != nil {
		return nil, err
	}
	if d.Bus == nil {
		return nil, errors.New("the edge needs a bus")
	}
	if d.Logger == nil {
		d.Logger = slog.New(slog.DiscardHandler)
	}
	if d.Limiter == nil {
		d.Limiter = ratelimit.NewLocal(0)
	}
	secret := []byte(d.WorkerTokenSecret.Reveal())
	s := &Service{bus: d.Bus, logger: d.Logger}
	s.hub = session.NewHub(session.Options{
		Bus: &busPort{Conn: d.Bus}, EdgeID: id.New(id.Edge, time.Now()), Lease: cfg.lease(), Heartbeat: cfg.heartbeat(), Secret: secret,
		MaxInflightBytes: int64(cfg.MaxInflight), Logger: d.Logger, Metrics: session.NewMetrics(d.Metrics),
	})
	s.sockets = socket.New(socket.Options{
		Hub: s.hub, Verifier: auth.NewWorkerVerifier(secret), TrustedProxies: cfg.TrustedProxies,
		MaxSessions: cfg.MaxSessions, MaxPendingPerIP: cfg.MaxPendingPerIP,
		Limiter: d.Limiter, RateIP: cfg.RateLimitIP, RateWorker: cfg.RateLimitWorker,
		HelloTimeout: workerproto.HelloTimeout, PingInterval: workerproto.PingInterval, PongTimeout: workerproto.PongTimeout,
		WriteTimeout: 10 * time.Second, CloseTimeout: closeTimeout, Logger: d.Logger, Metrics: d.Metrics,
	})
	polls := poll.New(poll.Options{
		Hub: s.hub, Verifier: auth.NewWorkerVerifier(secret), TrustedProxies: cfg.TrustedProxies, MaxSessions: cfg.MaxSessions,
		Limiter: d.Limiter, RateIP: cfg.RateLimitIP, RateWorker: cfg.RateLimitWorker, Lease: cfg.lease(),
		Silence: max(silentBeats*cfg.heartbeat(), leastSilence), AnswerTimeout: max(cfg.lease()/6, leastAnswer),
		Logger: d.Logger, Metrics: d.Metrics,
	})
	s.handler = routes(s.sockets, polls, d.Logger)

	if cfg.ListenAddr == "" {
		return s, nil
	}
	ln, err := httpkit.Listen(cfg.ListenAddr)
	if err != nil {
		return nil, err
	}
	s.server, err = httpkit.NewServer(ln, s.handler, d.Logger, httpkit.ServerOptions{
		CertFile: cfg.TLSCertFile, KeyFile: cfg.TLSKeyFile, MaxConns: cfg.MaxConnections, MaxHeaderBytes: int(cfg.MaxHeader),
	})
	if err != nil {
		_ = ln.Close() // nothing was accepted
		return nil, err
	}
	return s, nil
}

// refusable is how many connections past MaxSessions are accepted, to be told so.
const refusable = 1000

// routes are the worker routes. Everything else is a problem document too.
func routes(connect http.Handler, polls *poll.Handler, logger *slog.Logger) http.Handler {
	mux := http.NewServeMux()
	mux.Handle(workerproto.PathConnect, connect)
	for path, handler := range polls.Routes() {
		mux.Handle(path, handler)
	}
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		httpkit.Write(w, r, httpkit.Problem{Status: http.StatusNotFound, Code: "not_found", Detail: "there is nothing here"})
	})
	return httpkit.RequestID(httpkit.AccessLog(logger)(httpkit.Recover(logger, nil)(httpkit.SecurityHeaders(mux))))
}

// Handler serves the worker routes, for mounting beside others. Before and after
// Run it answers 503.
func (s *Service) Handler() http.Handler { return s.handler }

// Ready returns nil when workers can be served, else what is missing.
func (s *Service) Ready() error {
	if !s.hub.Open() {
		return errors.New("the edge is starting or stopping")
	}
	if err := s.bus.Ready(); err != nil {
		return fmt.Errorf("bus: %w", err)
	}
	return nil
}

// Run serves until ctx ends: it then refuses new workers, asks those that are
// here to come back, finishes what is under way and tells the scheduler. It
// blocks and may be called once; nil is a clean stop. It waits for the bus to be
// as it must be before it takes workers.
func (s *Service) Run(ctx context.Context) error {
	g := lifecycle.Group{StopEach: 25 * time.Second, StopAll: 40 * time.Second}
	g.Add("sessions", func(ctx context.Context) error {
		if err := s.bus.Bind(ctx); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("bind to the bus: %w", err)
		}
		watched := make(chan struct{})
		go func() {
			defer close(watched)
			s.watchRegistry(ctx)
		}()
		err := s.hub.Run(ctx)
		<-watched
		drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
		defer cancel()
		s.sockets.Drain(drain)
		return err
	})
	if s.server != nil {
		s.logger.Info("listening for workers", "addr", s.server.Addr().String())
		g.Add("listener", s.server.Run)
	}
	if err := g.Run(ctx); err != nil {
		return fmt.Errorf("edge: %w", err)
	}
	return nil
}

// watchRegistry notices when the registry was lost and made anew. Registrations
// are gone with it, and workers register only with their hello: without a new one
// nobody would know them.
func (s *Service) watchRegistry(ctx context.Context) {
	known := s.bus.Registry().Generation()
	for lifecycle.Sleep(ctx, time.Second) == nil {
		now := s.bus.Registry().Generation()
		if now == "" || now == known {
			continue
		}
		if known != "" {
			s.logger.Error("the registry is a new one: workers are asked to register again", "workers", s.hub.Len())
			s.hub.Dismiss("the registry is a new one")
		}
		known = now
	}
}
