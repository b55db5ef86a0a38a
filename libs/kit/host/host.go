// Package host runs one service as a process of its own: it reads the settings,
// serves the admin port from the first moment on (so that readiness can say what
// is still missing), builds the service when what it needs is there, and runs it
// until the process is asked to stop.
//
//	host.Main("scheduler", "127.0.0.1:9102", func(ctx context.Context, cfg settings, env *host.Env) (host.Service, error) { ... })
//
// Beside that each program knows two words: `help` prints its settings, and
// `healthcheck` asks the running process whether it is ready, for containers
// that have no other program to ask with. A program that is not run by Main takes
// the same words by Word.
package host

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cmdexec/cmdexec/libs/kit/config"
	"github.com/cmdexec/cmdexec/libs/kit/failpoint"
	"github.com/cmdexec/cmdexec/libs/kit/httpkit"
	"github.com/cmdexec/cmdexec/libs/kit/lifecycle"
	"github.com/cmdexec/cmdexec/libs/kit/logging"
	"github.com/cmdexec/cmdexec/libs/kit/memory"
	"github.com/cmdexec/cmdexec/libs/kit/ratelimit"
	"github.com/cmdexec/cmdexec/libs/kit/telemetry"
)

// off is the address of an admin port that is not wanted.
const off = "off"

// healthTimeout bounds `healthcheck`.
const healthTimeout = 5 * time.Second

// Settings are what every process of the system takes. A program's own settings
// embed them.
type Settings struct {
	AdminAddr string `envconfig:"ADMIN_ADDR" desc:"where /livez, /readyz and /metrics are; off for none"`
	LogLevel  string `envconfig:"LOG_LEVEL" default:"info" desc:"debug, info, warn or error"`
	LogFormat string `envconfig:"LOG_FORMAT" default:"auto" desc:"auto, text or json"`
	Cores     uint16 `envconfig:"GOMAXPROCS" desc:"how many cores the process itself uses at a time; default half of the machine's"`
}

func (s *Settings) host() *Settings { return s }

// Embeds is satisfied by pointers to structs that embed Settings.
type Embeds[C any] interface {
	*C
	host() *Settings
}

// Service is what a service's root package makes. Run blocks until ctx ends; nil
// is a clean stop. Ready is nil, or says what is missing.
type Service interface {
	Run(ctx context.Context) error
	Ready() error
}

// Env is what a process gives to the service that it builds.
type Env struct {
	Logger  *slog.Logger
	Metrics *prometheus.Registry

	mu      sync.Mutex
	service Service
	waiting string
	notes   []func() string
	closers []func()
}

// Waiting says what the process waits for; readiness shows it until the service
// is built.
func (e *Env) Waiting(what string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.waiting = what
}

// Defer has f called after the service has stopped, last deferred first.
func (e *Env) Defer(f func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.closers = append(e.closers, f)
}

// Inform has readiness show what note returns, as information: it changes no status.
// note must be safe for concurrent use; it may return nothing.
func (e *Env) Inform(note func() string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.notes = append(e.notes, note)
}

// ShareLimits makes the process's rate limiter count in a store that other
// processes count in, and by itself while that does not answer. The store stays
// the caller's to close, by a Defer before this call.
func (e *Env) ShareLimits(remote ratelimit.Remote) (ratelimit.Limiter, error) {
	limiter, err := ratelimit.NewFailover(remote, ratelimit.FailoverOptions{Logger: e.Logger, Metrics: e.Metrics})
	if err != nil {
		return nil, fmt.Errorf("share rate limits: %w", err)
	}
	e.Defer(limiter.Close)
	e.Inform(limiter.Note)
	return limiter, nil
}

func (e *Env) note() string {
	e.mu.Lock()
	notes := e.notes
	e.mu.Unlock()
	var said []string
	for _, note := range notes {
		if n := note(); n != "" {
			said = append(said, n)
		}
	}
	return strings.Join(said, "; ")
}

func (e *Env) ready() error {
	e.mu.Lock()
	service, waiting := e.service, e.waiting
	e.mu.Unlock()
	if service != nil {
		return service.Ready()
	}
	return errors.New("starting: waiting for " + waiting)
}

func (e *Env) close() {
	for i := len(e.closers) - 1; i >= 0; i-- {
		e.closers[i]()
	}
}

// Main runs a program and ends the process by exit: 0 after a clean stop, 1 after
// an error, which is printed as one line. admin is the address of the admin port
// where ADMIN_ADDR is not set. build may block until its dependencies answer; it
// must return when ctx ends. Settings with a method Check() error are checked before
// anything is waited for.
func Main[C any, P Embeds[C]](name, admin string, exit func(code int), build func(ctx context.Context, cfg C, env *Env) (Service, error)) {
	if err := run[C, P](name, admin, os.Args[1:], os.Stdout, exit, build); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
		exit(1)
	}
}

func run[C any, P Embeds[C]](name, admin string, args []string, out io.Writer, exit func(int), build func(context.Context, C, *Env) (Service, error)) error {
	load := func() (C, *Settings, error) {
		cfg, err := config.Load[C]()
		settings := P(&cfg).host()
		settings.AdminAddr = cmp.Or(settings.AdminAddr, admin)
		return cfg, settings, err
	}
	intro := fmt.Sprintf("%s takes its settings from the environment (ADMIN_ADDR is %s by default):", name, admin)
	done, err := Word(args, out, intro, *new(C), func() (string, error) {
		_, settings, err := load()
		return settings.AdminAddr, err
	})
	if done || err != nil {
		return err
	}
	if err := failpoint.Check(); err != nil {
		return err
	}
	cfg, settings, err := load()
	if err != nil {
		return err
	}
	config.UseCores(int(settings.Cores))
	if c, ok := any(cfg).(interface{ Check() error }); ok {
		if err := c.Check(); err != nil {
			return err
		}
	}
	ctx, stop := lifecycle.SignalContext(context.Background(), exit)
	defer stop()
	return serve(ctx, name, cfg, settings, build)
}

// Word carries out the word that a program was started with: `help` writes intro
// and the variables of cfg (a struct) to out, `healthcheck` asks at the address that
// admin returns and is an error unless the process there is ready; it blocks for
// five seconds at most. Without a word it reports false: the program is to be run.
func Word(args []string, out io.Writer, intro string, cfg any, admin func() (string, error)) (done bool, err error) {
	switch word := strings.Join(args, " "); word {
	case "":
		return false, nil
	case "help", "--help", "-h":
		fmt.Fprintf(out, "%s\n\n", intro)
		return true, config.Usage(out, cfg)
	case "healthcheck":
		addr, err := admin()
		if err != nil {
			return true, err
		}
		return true, healthcheck(addr)
	default:
		return true, fmt.Errorf("unknown word %q: it is started without any; `help` prints its settings, `healthcheck` asks whether it is ready", word)
	}
}

func serve[C any](ctx context.Context, name string, cfg C, settings *Settings, build func(context.Context, C, *Env) (Service, error)) error {
	logger, err := logging.New(os.Stderr, settings.LogLevel, settings.LogFormat)
	if err != nil {
		return err
	}
	env := &Env{Logger: logger, Metrics: telemetry.NewRegistry(), waiting: "its dependencies"}
	var group lifecycle.Group
	if settings.AdminAddr != off {
		ln, err := httpkit.Listen(settings.AdminAddr)
		if err != nil {
			return fmt.Errorf("ADMIN_ADDR: %w", err)
		}
		server, err := httpkit.NewServer(ln, httpkit.Admin(env.ready, env.Metrics, env.note), logger, httpkit.ServerOptions{})
		if err != nil {
			return err
		}
		group.Add("admin", server.Run)
	}
	group.Add("memory", memory.ReturnWhenQuiet)
	group.Add(name, func(ctx context.Context) error {
		defer env.close()
		service, err := build(ctx, cfg, env)
		if err != nil {
			if ctx.Err() != nil {
				return nil // asked to stop while it waited
			}
			return err
		}
		env.mu.Lock()
		env.service = service
		env.mu.Unlock()
		logger.Info("started", "service", name)
		return service.Run(ctx)
	})
	return group.Run(ctx)
}

// healthcheck asks the process that serves an admin address whether it is ready.
func healthcheck(addr string) error {
	if addr == off {
		return errors.New("ADMIN_ADDR is off: nobody can be asked")
	}
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return fmt.Errorf("ADMIN_ADDR: %w", err)
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	client := &http.Client{Timeout: healthTimeout}
	resp, err := client.Get("http://" + net.JoinHostPort(host, port) + "/readyz")
	if err != nil {
		return fmt.Errorf("not running: %w", err)
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 4096))
	if err != nil {
		return fmt.Errorf("not ready: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("not ready: %s", strings.TrimSpace(string(text)))
	}
	return nil
}
