package gateway

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
	"github.com/cmdexec/cmdexec/libs/kit/config"
	"github.com/cmdexec/cmdexec/libs/kit/httpkit"
	"github.com/cmdexec/cmdexec/libs/kit/ratelimit"
)

// Config is what an operator may set. The zero value, with a JWTSecret, is a
// gateway without a listener of its own, without rate limits and without limits
// of queued jobs and open streams.
type Config struct {
	ListenAddr        string          `envconfig:"LISTEN_ADDR" default:":3000" desc:"address of the API"`
	TLSCertFile       string          `envconfig:"TLS_CERT_FILE" desc:"PEM file; with TLS_KEY_FILE the API is served by TLS"`
	TLSKeyFile        string          `envconfig:"TLS_KEY_FILE" desc:"PEM file of the certificate's key"`
	JWTSecret         config.Secret   `envconfig:"JWT_SECRET" required:"true" desc:"signs user tokens; 32 bytes at least"`
	TrustedProxies    config.Prefixes `envconfig:"TRUSTED_PROXIES" desc:"networks whose X-Forwarded-For is believed"`
	RateLimitUser     config.Rate     `envconfig:"RATE_LIMIT_USER" default:"100/s" desc:"requests of one user: N/s, N/m or off"`
	RateLimitIP       config.Rate     `envconfig:"RATE_LIMIT_IP" default:"200/s" desc:"requests from one address: N/s, N/m or off"`
	MaxQueuedPerUser  int             `envconfig:"MAX_QUEUED_PER_USER" default:"100000" desc:"jobs of one user that may wait; 0 is no limit"`
	MaxStreamsPerUser int             `envconfig:"MAX_STREAMS_PER_USER" default:"100" desc:"streams and waiting calls of one user in this gateway; 0 is no limit"`
	MaxConnections    int             `envconfig:"MAX_CONNECTIONS" default:"20000" desc:"connections at once; further clients wait"`
	MaxHeader         config.Bytes    `envconfig:"MAX_HEADER" default:"80Ki" desc:"bytes of a request's header"`
}

// Bounds of MAX_HEADER: a token has to fit, and a header is memory before anybody
// is known.
const (
	minHeader = 4 << 10
	maxHeader = 1 << 20
)

// Deps is what a gateway needs of its process.
type Deps struct {
	Bus     *bus.Conn
	Logger  *slog.Logger
	Metrics prometheus.Registerer // nil: none
	Limiter ratelimit.Limiter     // nil: in this process's memory
	// Durability says what an acknowledged job survives, as the server has it:
	// committed or replicated. It is called for each GET /api/info.
	Durability func() string
}

// Service is a gateway. Its handler may be served while Run runs.
type Service struct {
	cfg      Config
	bus      *bus.Conn
	registry *bus.Registry
	logger   *slog.Logger
	metrics  *metrics

	verifier   *auth.UserVerifier
	limiter    ratelimit.Limiter
	local      *ratelimit.Local
	durability func() string
	cursors    cursorKey
	quota      *quota
	streams    *streams
	hub        *hub
	batches    chan struct{} // a slot for each batch at work
	yamls      chan struct{} // a slot for each YAML body that is read
	started    time.Time
	// archiveWait bounds how long readers wait for output that is not stored yet.
	archiveWait time.Duration

	handler http.Handler
	server  *httpkit.Server // nil without a listener
	running atomic.Bool
}

// Check refuses settings that cannot be meant.
func (c Config) Check() error {
	if err := config.ValidateSecret("JWT_SECRET", c.JWTSecret); err != nil {
		return err
	}
	if c.MaxQueuedPerUser < 0 {
		return errors.New("MAX_QUEUED_PER_USER must not be negative")
	}
	if c.MaxStreamsPerUser < 0 {
		return errors.New("MAX_STREAMS_PER_USER must not be negative")
	}
	if c.MaxConnections < 0 {
		return errors.New("MAX_CONNECTIONS must not be negative")
	}
	if c.MaxHeader != 0 && (c.MaxHeader < minHeader || c.MaxHeader > maxHeader) {
		return fmt.Errorf("MAX_HEADER must be from %s to %s", config.Bytes(minHeader), config.Bytes(maxHeader))
	}
	return nil
}

// New checks the configuration and opens the listener, where one is configured.
// It starts nothing.
func New(cfg Config, deps Deps) (*Service, error) {
	if err := cfg.Check(); err != nil {
		return nil, err
	}
	s := &Service{
		cfg: cfg, bus: deps.Bus, registry: deps.Bus.Registry(), logger: deps.Logger,
		verifier:   auth.NewUserVerifier([]byte(cfg.JWTSecret.Reveal())),
		limiter:    deps.Limiter,
		local:      ratelimit.NewLocal(0),
		durability: deps.Durability,
		cursors:    newCursorKey(cfg.JWTSecret.Reveal()),
		started:    time.Now(),

		archiveWait: defaultArchiveWait,
	}
	if s.logger == nil {
		s.logger = slog.New(slog.DiscardHandler)
	}
	if s.limiter == nil {
		s.limiter = s.local
	}
	if s.durability == nil {
		s.durability = func() string { return "unknown" }
	}
	s.hub = newHub(s.logger, s.registry.Generation)
	s.batches = make(chan struct{}, maxBatches)
	s.yamls = make(chan struct{}, maxYAMLs)
	s.quota = newQuota(cfg.MaxQueuedPerUser, s.countQueued)
	m, err := newMetrics(deps.Metrics)
	if err != nil {
		return nil, fmt.Errorf("register metrics: %w", err)
	}
	s.metrics = m
	s.streams = newStreams(cfg.MaxStreamsPerUser, m.streams)
	if s.handler, err = s.routes(); err != nil {
		return nil, err
	}
	if cfg.ListenAddr == "" {
		return s, nil
	}
	ln, err := httpkit.Listen(cfg.ListenAddr)
	if err != nil {
		return nil, err
	}
	s.server, err = httpkit.NewServer(ln, s.handler, s.logger, httpkit.ServerOptions{
		CertFile: cfg.TLSCertFile, KeyFile: cfg.TLSKeyFile, MaxConns: cfg.MaxConnections, MaxHeaderBytes: int(cfg.MaxHeader),
	})
	if err != nil {
		_ = ln.Close()
		return nil, err
	}
	return s, nil
}

// Handler serves the API. It may be mounted on another listener; waiting calls
// need Run to be running.
func (s *Service) Handler() http.Handler { return s.handler }

// Addr is the address of the gateway's own listener, nil where it has none.
func (s *Service) Addr() net.Addr {
	if s.server == nil {
		return nil
	}
	return s.server.Addr()
}

// Run serves until ctx ends. Nil is a clean stop.
func (s *Service) Run(ctx context.Context) error {
	s.running.Store(true)
	stop := context.AfterFunc(ctx, func() { s.running.Store(false) })
	defer stop()
	defer s.running.Store(false)

	// The follower outlives the listener: requests that finish during the
	// shutdown still wait for changes.
	hubCtx, stopHub := context.WithCancel(context.WithoutCancel(ctx))
	hubDone := make(chan error, 1)
	go func() { hubDone <- s.hub.run(hubCtx, s.registry.Follow) }()
	var err error
	if s.server != nil {
		s.logger.InfoContext(ctx, "gateway listens", "addr", s.server.Addr().String())
		err = s.server.Run(ctx)
	} else {
		<-ctx.Done()
	}
	stopHub()
	return errors.Join(err, <-hubDone)
}

// Close releases the listener of a gateway that is not going to Run.
func (s *Service) Close() error {
	if s.server == nil {
		return nil
	}
	return s.server.Close()
}

// Ready reports what keeps the gateway from serving: nil while Run runs, has
// not been asked to stop, and the bus is connected and bound.
func (s *Service) Ready() error {
	if !s.running.Load() {
		return errors.New("gateway is not running")
	}
	return s.bus.Ready()
}
