// Package up runs the whole system in one process: an embedded NATS JetStream
// server, SQLite, every service by its own constructor, and one local worker
// that talks to the edge over its WebSocket like any other.
package up

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/config"
	"github.com/cmdexec/cmdexec/libs/kit/httpkit"
	"github.com/cmdexec/cmdexec/libs/kit/lifecycle"
	"github.com/cmdexec/cmdexec/libs/kit/logging"
	"github.com/cmdexec/cmdexec/libs/kit/memory"
	"github.com/cmdexec/cmdexec/libs/kit/ratelimit"
	"github.com/cmdexec/cmdexec/libs/kit/telemetry"
	"github.com/cmdexec/cmdexec/libs/natsd"
	"github.com/cmdexec/cmdexec/libs/store/redisstore"
	"github.com/cmdexec/cmdexec/libs/store/sqlitestore"
	gateway "github.com/cmdexec/cmdexec/services/api-gateway"
	cliContext "github.com/cmdexec/cmdexec/services/cmdexec/internal/context"
	persister "github.com/cmdexec/cmdexec/services/registry-persister"
	collector "github.com/cmdexec/cmdexec/services/result-collector"
	"github.com/cmdexec/cmdexec/services/scheduler"
	"github.com/cmdexec/cmdexec/services/worker"
	edge "github.com/cmdexec/cmdexec/services/worker-edge"
)

const (
	startTimeout = 2 * time.Minute // recovery of large streams included
	stopTimeout  = 60 * time.Second
	readyPoll    = 2 * time.Millisecond
)

// Run starts everything, tells the person who started it what there is, and
// blocks until ctx ends or something fails. The only clean end is that of ctx.
func Run(ctx context.Context, cfg Config, out, errOut io.Writer) error {
	if err := cfg.check(); err != nil {
		return err
	}
	dir, err := cfg.dataDir()
	if err != nil {
		return err
	}
	logger, err := logging.New(errOut, cfg.LogLevel, cfg.LogFormat)
	if err != nil {
		return err
	}
	s := &stack{cfg: cfg, dir: dir, log: logger, metrics: telemetry.NewRegistry()}
	defer s.close()
	if err := s.open(ctx); err != nil {
		return err
	}
	return s.run(ctx, &announcer{stack: s, out: out})
}

// stack is what runs, from the bottom up.
type stack struct {
	cfg     Config
	dir     string
	log     *slog.Logger
	metrics *prometheus.Registry

	keys      secrets
	listener  net.Listener
	admin     net.Listener // nil: none
	natsd     *natsd.Server
	bus       *bus.Conn
	store     *sqlitestore.Store
	persister *persister.Service
	collector *collector.Service
	scheduler *scheduler.Service
	edge      *edge.Service
	gateway   *gateway.Service
	worker    *worker.Service     // nil: none
	redis     *redisstore.Limits  // nil: none
	limiter   *ratelimit.Failover // nil without redis: each service has its own
}

// open acquires everything that can be refused, in the order in which the
// refusals are easiest to understand: address, data folder, bus, database.
func (s *stack) open(ctx context.Context) (err error) {
	if err := s.limits(); err != nil {
		return err
	}
	if s.listener, err = httpkit.Listen(s.cfg.Listen); err != nil {
		return err
	}
	if s.cfg.AdminAddr != "" {
		if s.admin, err = httpkit.Listen(s.cfg.AdminAddr); err != nil {
			return err
		}
	}
	s.natsd, err = natsd.Start(natsd.Options{StoreDir: filepath.Join(s.dir, "nats"), Logger: s.log})
	if errors.Is(err, natsd.ErrInUse) {
		return fmt.Errorf("the data folder %s is in use by another instance: stop that one, or name another folder with --data-dir", s.dir)
	}
	if err != nil {
		return err
	}
	given := secrets{JWT: s.cfg.JWTSecret.Reveal(), Worker: s.cfg.WorkerTokenSecret.Reveal()}
	if s.keys, err = loadSecrets(s.dir, given); err != nil {
		return err
	}
	starting, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if s.bus, err = bus.Connect(starting, bus.Options{InProcess: s.natsd, Name: "cmdexec", Logger: s.log}); err != nil {
		return err
	}
	if err := bus.Apply(starting, s.bus, bus.SizesWithin(s.natsd.MaxStore())); err != nil {
		return err
	}
	if err := s.bus.Bind(starting); err != nil {
		return err
	}
	if s.store, err = sqlitestore.Open(starting, filepath.Join(s.dir, "cmdexec.db")); err != nil {
		return err
	}
	return s.services(ctx)
}

// limits shares rate limits by Redis, where one is named. It waits for nothing.
func (s *stack) limits() (err error) {
	if s.cfg.RedisURL == "" {
		return nil
	}
	if s.redis, err = redisstore.Open(s.cfg.RedisURL.Reveal(), ratelimit.RemoteTimeout); err != nil {
		return fmt.Errorf("REDIS_URL %w", err)
	}
	s.limiter, err = ratelimit.NewFailover(s.redis, ratelimit.FailoverOptions{Logger: s.log, Metrics: s.metrics})
	return err
}

// shared is the limiter of gateway and edge, nil where each has its own.
func (s *stack) shared() ratelimit.Limiter {
	if s.limiter == nil {
		return nil // and not an interface that holds nil
	}
	return s.limiter
}

func (s *stack) notes() string {
	if s.limiter == nil {
		return ""
	}
	return s.limiter.Note()
}

func (s *stack) services(ctx context.Context) (err error) {
	named := func(name string) *slog.Logger { return s.log.With("service", name) }
	if s.persister, err = persister.New(persister.Config{
		PurgeGraceSeconds: s.cfg.PurgeGrace, IdempotencyGraceSeconds: s.cfg.IdempotencyGrace, JobRetentionDays: s.cfg.JobRetentionDays,
	}, persister.Deps{
		Bus: s.bus, Store: s.store, Logger: named("registry-persister"), Metrics: s.metrics,
	}); err != nil {
		return err
	}
	if s.collector, err = collector.New(collector.Deps{
		Bus: s.bus, Store: s.store, Logger: named("result-collector"), Metrics: s.metrics,
	}); err != nil {
		return err
	}
	if s.scheduler, err = scheduler.New(scheduler.Config{
		LeaseSeconds: s.cfg.LeaseSeconds, HeartbeatSeconds: s.cfg.HeartbeatSeconds, MaxRunningPerUser: s.cfg.MaxRunningPerUser,
	}, scheduler.Deps{Bus: s.bus, Logger: named("scheduler"), Metrics: s.metrics}); err != nil {
		return err
	}
	if s.edge, err = edge.New(edge.Config{
		LeaseSeconds: s.cfg.LeaseSeconds, HeartbeatSeconds: s.cfg.HeartbeatSeconds,
		RateLimitIP: s.cfg.RateLimitIP, RateLimitWorker: s.cfg.RateLimitWorker,
	}, edge.Deps{
		Bus: s.bus, Limiter: s.shared(), WorkerTokenSecret: config.Secret(s.keys.Worker), Logger: named("worker-edge"), Metrics: s.metrics,
	}); err != nil {
		return err
	}
	if s.gateway, err = gateway.New(gateway.Config{
		JWTSecret: config.Secret(s.keys.JWT), RateLimitUser: s.cfg.RateLimitUser, RateLimitIP: s.cfg.RateLimitIP,
		MaxQueuedPerUser: s.cfg.MaxQueuedPerUser, MaxStreamsPerUser: s.cfg.MaxStreamsPerUser,
	}, gateway.Deps{
		Bus: s.bus, Limiter: s.shared(), Logger: named("api-gateway"), Metrics: s.metrics, Durability: s.natsd.Durability,
	}); err != nil {
		return err
	}
	if s.cfg.Executor == "none" {
		return nil
	}
	s.worker, err = worker.New(ctx, worker.Config{
		ServerURL: s.url(), WorkerTokenSecret: config.Secret(s.keys.Worker), DataDir: filepath.Join(s.dir, "worker"),
		Executors: s.cfg.executors(), DockerHost: s.cfg.DockerHost, DockerCertPath: s.cfg.DockerCertPath, DockerConfig: s.cfg.DockerConfig,
		ContainerRuntime: s.cfg.ContainerRuntime, AllowNetwork: s.cfg.AllowNetwork, Slots: s.cfg.Slots, CPULimit: s.cfg.CPULimit, RAMLimit: s.cfg.RAMLimit,
		AdoptContainers: true, WarmContainers: s.cfg.WarmContainers, WarmMemory: s.cfg.WarmMemory, WarmSeconds: s.cfg.WarmSeconds,
	}, worker.Deps{Logger: named("worker"), Metrics: s.metrics})
	return err
}

// url is where this machine reaches the API.
func (s *stack) url() string {
	addr := s.listener.Addr().(*net.TCPAddr)
	host := addr.IP.String()
	if addr.IP.IsUnspecified() {
		host = "127.0.0.1"
	}
	return "http://" + net.JoinHostPort(host, fmt.Sprint(addr.Port))
}

// handler is what the one listener serves: the routes of workers by the edge, all
// others by the gateway.
func (s *stack) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/", s.gateway.Handler())
	for _, path := range workerproto.Paths() {
		mux.Handle(path, s.edge.Handler())
	}
	return mux
}

// run runs the services. They stop in the reverse order: the worker first, so
// that its results still find everything that records them.
func (s *stack) run(ctx context.Context, a *announcer) error {
	group := lifecycle.Group{StopEach: stopTimeout, StopAll: 2 * stopTimeout}
	group.Add("registry-persister", s.persister.Run)
	group.Add("result-collector", s.collector.Run)
	group.Add("scheduler", s.scheduler.Run)
	group.Add("api-gateway", s.gateway.Run)
	group.Add("worker-edge", s.edge.Run)
	server, err := httpkit.NewServer(s.listener, s.handler(), s.log, httpkit.ServerOptions{MaxConns: s.cfg.MaxConnections})
	if err != nil {
		return err
	}
	group.Add("api", server.Run)
	if s.admin != nil {
		admin, err := httpkit.NewServer(s.admin, httpkit.Admin(s.ready, s.metrics, s.notes), s.log, httpkit.ServerOptions{})
		if err != nil {
			return err
		}
		group.Add("admin", admin.Run)
	}
	if s.worker != nil {
		group.Add("worker", s.runWorker)
	}
	group.Add("announcements", a.run)
	group.Add("memory", memory.ReturnWhenQuiet)
	err = group.Run(ctx)
	if ctx.Err() != nil && err == nil {
		a.goodbye()
	}
	return err
}

// runWorker starts the local worker once there is something to connect to.
func (s *stack) runWorker(ctx context.Context) error {
	for s.serverReady() != nil {
		if lifecycle.Sleep(ctx, readyPoll) != nil {
			return nil
		}
	}
	return s.worker.Run(ctx)
}

// ready is nil once everything works, the local worker included.
func (s *stack) ready() error {
	if err := s.serverReady(); err != nil || s.worker == nil {
		return err
	}
	if err := s.worker.Ready(); err != nil {
		return fmt.Errorf("worker: %w", err)
	}
	return nil
}

func (s *stack) serverReady() error {
	var missing []string
	note := func(name string, err error) {
		if err != nil {
			missing = append(missing, name+": "+err.Error())
		}
	}
	note("bus", s.bus.Ready())
	note("registry-persister", s.persister.Ready())
	note("result-collector", s.collector.Ready())
	note("scheduler", s.scheduler.Ready())
	note("worker-edge", s.edge.Ready())
	note("api-gateway", s.gateway.Ready())
	if len(missing) > 0 {
		return errors.New(strings.Join(missing, "; "))
	}
	return nil
}

// close releases what open acquired, from the top down. It is called once,
// after everything has stopped.
func (s *stack) close() {
	if s.limiter != nil {
		s.limiter.Close()
	}
	if s.redis != nil {
		_ = s.redis.Close() // nothing in it is worth a word
	}
	if s.bus != nil {
		s.bus.Close()
	}
	if s.store != nil {
		if err := s.store.Close(); err != nil {
			s.log.Error("database not closed cleanly", "error", err)
		}
	}
	if s.natsd != nil {
		s.natsd.Shutdown()
	}
	if s.listener != nil {
		_ = s.listener.Close() // served ones are closed by now
	}
	if s.admin != nil {
		_ = s.admin.Close()
	}
}

// Secrets finds the secrets of the local instance: those of the environment,
// else those that `up` keeps in its data folder, which is that of the instance that was
// started last where nothing is said.
func Secrets(dir string) (Keys, error) {
	cfg, err := config.Load[Config]()
	if err != nil {
		return Keys{}, err
	}
	if dir != "" {
		cfg.DataDir = dir
	}
	if cfg.DataDir == "" {
		last, err := cliContext.Load()
		if err != nil {
			return Keys{}, err
		}
		cfg.DataDir = last.DataDir
	}
	given := secrets{JWT: cfg.JWTSecret.Reveal(), Worker: cfg.WorkerTokenSecret.Reveal()}
	if given.JWT != "" && given.Worker != "" {
		return Keys(given), nil
	}
	if dir, err = cfg.dataDir(); err != nil {
		return Keys{}, err
	}
	kept, err := loadSecrets(dir, given)
	return Keys(kept), err
}

// Keys sign tokens.
type Keys secrets
