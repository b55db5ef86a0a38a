// Package session holds the worker's session with the edge: it connects, says
// hello, sends heartbeats, carries what edge and runner have for each other, and
// connects again for as long as the worker lives.
//
// There are two transports, a WebSocket and plain HTTP with a long poll. Both
// begin a session by listing every lease that the runner holds, so that the
// worker may go from one to the other at any time; what was not acknowledged
// over the one is sent again over the other.
package session

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/lifecycle"
	"github.com/cmdexec/cmdexec/services/worker/internal/clock"
	"github.com/cmdexec/cmdexec/services/worker/internal/runner"
)

const (
	dialTimeout = 10 * time.Second
	minBackoff  = 100 * time.Millisecond
	maxBackoff  = 15 * time.Second
	// steadyAfter is how long a session must have lived for the next one to be
	// tried at once.
	steadyAfter = 30 * time.Second
	// maxAway bounds for how long a goaway can send a worker away.
	maxAway = 5 * time.Minute
	// sendBuffer bounds what is ahead of a heartbeat on a slow line.
	sendBuffer = 256 << 10
	// defaultHeartbeat is used where a welcome names none.
	defaultHeartbeat = 5 * time.Second
)

// ErrToken: the edge does not accept the worker's token. Trying again does not
// help unless the token changes.
var ErrToken = errors.New("the server does not accept this worker's token")

// Transport is how a worker talks to the edge.
type Transport string

// The transports. Auto prefers the WebSocket and uses plain HTTP while no
// WebSocket can be had.
const (
	Auto      Transport = "auto"
	WebSocket Transport = "websocket"
	HTTP      Transport = "http"
)

// Valid reports whether t is one of the transports.
func (t Transport) Valid() bool { return t == Auto || t == WebSocket || t == HTTP }

// Config is what a Session needs.
type Config struct {
	URL       string                      // of the server, http:// or https://, without a slash at its end
	Transport Transport                   // empty: WebSocket
	RetryWS   time.Duration               // Auto: how long plain HTTP is used before a WebSocket is tried again; 0: a minute
	Token     func() (string, error)      // called for every session
	NewToken  func(string)                // the edge renewed it
	Register  func() workerproto.Register // who the worker is; Running is filled in here
	Runner    *runner.Runner
	Clock     clock.Clock
	Logger    *slog.Logger
}

// Session keeps one connection to the edge.
type Session struct {
	cfg    Config
	socket *http.Client  // of WebSockets
	plain  *http.Client  // of requests
	again  chan struct{} // see Reconnect
	choice choice        // Run's

	mu        sync.Mutex
	connected bool
	lastErr   error
}

// New returns a session that is not connected.
func New(cfg Config) *Session {
	if cfg.Transport == "" {
		cfg.Transport = WebSocket
	}
	if cfg.RetryWS == 0 {
		cfg.RetryWS = retryWS
	}
	return &Session{
		cfg: cfg, again: make(chan struct{}, 1), choice: choice{auto: cfg.Transport == Auto, http: cfg.Transport == HTTP},
		socket: &http.Client{Transport: transport(&http.Transport{IdleConnTimeout: maxBackoff}), CheckRedirect: stay},
		plain: &http.Client{
			Transport: transport(&http.Transport{
				IdleConnTimeout: idleConn, MaxIdleConnsPerHost: maxIdleConns, TLSHandshakeTimeout: dialTimeout,
				ForceAttemptHTTP2: true, DisableCompression: true,
			}),
			CheckRedirect: stay,
		},
	}
}

// stay follows no redirect: the token is for the address that the owner has named.
func stay(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

// redirected is the error of an answer that sends the worker elsewhere, else nil.
func redirected(resp *http.Response) error {
	if resp == nil || resp.StatusCode < 300 || resp.StatusCode > 399 {
		return nil
	}
	to := "another address"
	if where, err := resp.Location(); err == nil && where.Host != "" {
		to = where.Scheme + "://" + where.Host // a path or a query may hold what is nobody else's
	}
	return fmt.Errorf("it redirects to %s (%d), where the worker's token is not sent: name the right address in SERVER_URL", to, resp.StatusCode)
}

func transport(t *http.Transport) *http.Transport {
	dialer := net.Dialer{Timeout: dialTimeout}
	t.Proxy = http.ProxyFromEnvironment
	t.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := dialer.DialContext(ctx, network, address)
		if err != nil {
			return nil, err
		}
		if tcp, ok := c.(*net.TCPConn); ok {
			if err := tcp.SetWriteBuffer(sendBuffer); err != nil {
				_ = c.Close()
				return nil, err
			}
		}
		return &cork{Conn: c}, nil
	}
	return t
}

// Ready is nil while the edge has welcomed this worker, else the last problem.
func (s *Session) Ready() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.connected:
		return nil
	case s.lastErr != nil:
		return fmt.Errorf("not connected to the server: %w", s.lastErr)
	default:
		return errors.New("not connected to the server yet")
	}
}

// Reconnect ends the connection, if there is one, and makes a new one at once:
// what the worker is has changed. It does not block.
func (s *Session) Reconnect() {
	select {
	case s.again <- struct{}{}:
	default:
	}
}

var errAgain = errors.New("the worker has changed")

// Run connects and reconnects until ctx ends; it returns nil then.
func (s *Session) Run(ctx context.Context) error {
	defer s.socket.CloseIdleConnections() // of refused connections
	defer s.plain.CloseIdleConnections()
	backoff := lifecycle.Backoff{Min: minBackoff, Max: maxBackoff}
	told := ""
	var ws *socket // that is there for the next session
	for ctx.Err() == nil {
		steady, err := s.once(ctx, ws)
		ws = nil
		s.set(false, err)
		if found, ok := errors.AsType[*socketFound](err); ok {
			ws = found.ws
			if ctx.Err() == nil {
				s.cfg.Logger.Info("a WebSocket can be had again, using it")
				s.choice.found()
				continue
			}
			_ = ws.CloseNow() // the worker stops
		}
		if ctx.Err() != nil {
			return nil
		}
		if s.choice.after(err) {
			if s.choice.http {
				s.cfg.Logger.Warn("no WebSocket can be had, using plain HTTP", "error", err)
			}
			continue
		}
		if steady {
			backoff.Reset()
			told = ""
		}
		if errors.Is(err, errAgain) {
			continue
		}
		wait := backoff.Next()
		if away, ok := errors.AsType[*goaway](err); ok && away.after > 0 {
			wait = away.after
			backoff.Reset()
		}
		if err.Error() != told { // a server that stays away is told once
			told = err.Error()
			s.tell(err, wait)
		}
		if lifecycle.Sleep(ctx, wait) != nil {
			return nil
		}
	}
	return nil
}

// once holds one session from its beginning to its end, which its error explains.
// It reports whether the edge had been content with it for long. ws may be nil.
func (s *Session) once(ctx context.Context, ws *socket) (steady bool, err error) {
	if s.choice.http {
		return s.overHTTP(ctx)
	}
	return s.overSocket(ctx, ws)
}

// hello is who the worker is and what it holds, for a new session. It must be
// called only when nothing of the session before can arrive any more: an
// assignment is either in this list or will never be seen by this worker.
func (s *Session) hello() (reg workerproto.Register, at time.Duration) {
	s.cfg.Runner.Connected()
	reg = s.cfg.Register()
	reg.Protocol, reg.Running = workerproto.Version, s.cfg.Runner.Holding()
	return reg, s.cfg.Clock.Now()
}

// welcomed takes in the answer to the hello that was sent at the given time.
func (s *Session) welcomed(w workerproto.Welcome, helloAt time.Duration) {
	s.cfg.Runner.Heard(helloAt)
	if w.LeaseSeconds > 0 {
		s.cfg.Runner.LeaseIs(time.Duration(w.LeaseSeconds) * time.Second)
	}
	for _, l := range w.Stale {
		s.cfg.Runner.Stale(l.LeaseID)
	}
	s.set(true, nil)
}

// every is how often the edge wants a heartbeat.
func every(w workerproto.Welcome) time.Duration {
	if w.HeartbeatSeconds <= 0 {
		return defaultHeartbeat
	}
	return time.Duration(w.HeartbeatSeconds) * time.Second
}

// untilChanged waits until the worker has changed.
func (s *Session) untilChanged(ctx context.Context) error {
	select {
	case <-s.again:
		return errAgain
	case <-ctx.Done():
		return ctx.Err()
	}
}

// tell logs why the worker is not connected.
func (s *Session) tell(err error, wait time.Duration) {
	away, ok := errors.AsType[*goaway](err)
	switch {
	case errors.Is(err, ErrToken):
		s.cfg.Logger.Error("the server does not accept this worker's token, trying on: give it another one")
	case ok && away.replaced:
		s.cfg.Logger.Error("another worker with the same id has connected, trying again later: give each worker its own id", "after", wait)
	case ok:
		s.cfg.Logger.Info("server asked to connect again later", "reason", away.reason, "after", wait)
	default:
		s.cfg.Logger.Warn("not connected to the server, trying again", "error", err)
	}
}

func (s *Session) set(connected bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.connected, s.lastErr = connected, err
}

// goaway is the end of a session with a word when to come back.
type goaway struct {
	after    time.Duration
	reason   string
	replaced bool // by another worker with the same id
}

func (g *goaway) Error() string { return "the server asked this worker to go: " + g.reason }
