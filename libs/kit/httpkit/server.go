package httpkit

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"syscall"
	"time"
)

// ServerOptions tunes a Server. Zero values are the defaults.
type ServerOptions struct {
	CertFile, KeyFile string // PEM files; both or neither. With them the server speaks TLS 1.2 or later, and HTTP/2 beside HTTP/1.1

	ReadHeaderTimeout time.Duration // 5 s
	ReadTimeout       time.Duration // 15 s for the whole request
	WriteTimeout      time.Duration // 30 s for the whole response; see LongLived
	IdleTimeout       time.Duration // 60 s
	ShutdownTimeout   time.Duration // 10 s for requests that are running when Run is asked to stop
	MaxHeaderBytes    int           // 80 KiB: a token of 64 KiB is refused as a token
	MaxConns          int           // 20,000; further clients wait in the kernel's queue
}

func (o ServerOptions) withDefaults() ServerOptions {
	setDefault(&o.ReadHeaderTimeout, 5*time.Second)
	setDefault(&o.ReadTimeout, 15*time.Second)
	setDefault(&o.WriteTimeout, 30*time.Second)
	setDefault(&o.IdleTimeout, 60*time.Second)
	setDefault(&o.ShutdownTimeout, 10*time.Second)
	setDefault(&o.MaxHeaderBytes, 80<<10)
	setDefault(&o.MaxConns, 20_000)
	return o
}

func setDefault[T ~int | ~int64](v *T, def T) {
	if *v <= 0 {
		*v = def
	}
}

// Server serves a handler on a listener until it is told to stop.
type Server struct {
	http     *http.Server
	ln       net.Listener
	logger   *slog.Logger
	opts     ServerOptions
	stopping chan struct{}
	stopOnce sync.Once
}

type stoppingKey struct{}

// NewServer returns a server that owns ln; it starts nothing. It fails if the certificate cannot be read; ln is then still the caller's.
func NewServer(ln net.Listener, h http.Handler, logger *slog.Logger, opts ServerOptions) (*Server, error) {
	opts = opts.withDefaults()
	s := &Server{
		ln:       limitListener(ln, opts.MaxConns),
		logger:   logger,
		opts:     opts,
		stopping: make(chan struct{}),
	}
	s.http = &http.Server{
		Handler:           h,
		ReadHeaderTimeout: opts.ReadHeaderTimeout,
		ReadTimeout:       opts.ReadTimeout,
		WriteTimeout:      opts.WriteTimeout,
		IdleTimeout:       opts.IdleTimeout,
		MaxHeaderBytes:    opts.MaxHeaderBytes,
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: 100},
		ErrorLog:          slog.NewLogLogger(logger.Handler(), slog.LevelDebug), // mostly broken clients
	}
	switch {
	case opts.CertFile != "" && opts.KeyFile != "":
		cert, err := tls.LoadX509KeyPair(opts.CertFile, opts.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("read TLS certificate: %w", err)
		}
		s.http.TLSConfig = &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}
	case opts.CertFile != "" || opts.KeyFile != "":
		return nil, errors.New("TLS needs both a certificate file and a key file")
	}
	return s, nil
}

// Addr returns the address that the server listens on.
func (s *Server) Addr() net.Addr { return s.ln.Addr() }

// Run serves until ctx ends and then stops: no new connections, Stopping closes, running requests get ShutdownTimeout to finish, and what is
// left is cut off with its context canceled. Connections that a handler has hijacked are the handler's to close, by Stopping. Run
// blocks, closes the listener, and may be called once; nil means that it stopped because it was asked to.
func (s *Server) Run(ctx context.Context) error {
	base, cancel := context.WithCancel(context.WithValue(context.WithoutCancel(ctx), stoppingKey{}, s.stopping))
	defer cancel()
	s.http.BaseContext = func(net.Listener) context.Context { return base }

	served := make(chan error, 1)
	go func() {
		if s.http.TLSConfig != nil {
			served <- s.http.ServeTLS(s.ln, "", "")
		} else {
			served <- s.http.Serve(s.ln)
		}
	}()
	select {
	case err := <-served:
		s.stop()
		_ = s.http.Close() // what was accepted before
		return fmt.Errorf("serve on %s: %w", s.ln.Addr(), err)
	case <-ctx.Done():
	}

	s.stop()
	bound, cancelBound := context.WithTimeout(context.WithoutCancel(ctx), s.opts.ShutdownTimeout)
	defer cancelBound()
	if err := s.http.Shutdown(bound); err != nil {
		s.logger.Warn("requests were cut off at shutdown", "after", s.opts.ShutdownTimeout, "err", err)
		// Connections first: a handler that returns because its context ended would otherwise send an empty 200.
		_ = s.http.Close()
		cancel()
	}
	<-served
	return nil
}

// Close releases the listener of a server that is not going to Run.
func (s *Server) Close() error {
	s.stop()
	return s.ln.Close()
}

func (s *Server) stop() { s.stopOnce.Do(func() { close(s.stopping) }) }

// Stopping returns a channel that is closed when the server that serves this request begins to stop. Handlers that stream or wait select on it;
// for others the request's context is enough. It blocks for ever (nil) outside of a Server.
func Stopping(ctx context.Context) <-chan struct{} {
	ch, _ := ctx.Value(stoppingKey{}).(chan struct{})
	return ch
}

// LongLived lifts the server's read and write timeouts for this response; a handler that streams or waits calls it first, and sets deadlines for
// each write by http.ResponseController if its client may be slow. Without it the request's context ends at the read timeout.
func LongLived(w http.ResponseWriter) error {
	c := http.NewResponseController(w)
	return errors.Join(c.SetReadDeadline(time.Time{}), c.SetWriteDeadline(time.Time{}))
}

// Listen opens a TCP listener. The error is one line that names the address and says what to do.
func Listen(addr string) (net.Listener, error) {
	ln, err := net.Listen("tcp", addr)
	if err == nil {
		return ln, nil
	}
	reason, hint := err.Error(), ""
	if op, ok := errors.AsType[*net.OpError](err); ok {
		reason = op.Err.Error()
	}
	errno, _ := errors.AsType[syscall.Errno](err)
	switch {
	case errno == syscall.EADDRINUSE || errno == windowsAddrInUse:
		reason, hint = "the address is in use by another program", "; stop that program or choose another address"
	case errno == syscall.EACCES:
		reason, hint = "permission denied", "; ports below 1024 need privileges, choose a higher one"
	case errno == syscall.EADDRNOTAVAIL:
		reason, hint = "this machine does not have that address", "; 127.0.0.1 is always there"
	}
	return nil, &listenError{text: fmt.Sprintf("cannot listen on %s: %s%s", addr, reason, hint), err: err}
}

// windowsAddrInUse is WSAEADDRINUSE; syscall.EADDRINUSE is an invented number on Windows.
const windowsAddrInUse = syscall.Errno(10048)

type listenError struct {
	text string
	err  error
}

func (e *listenError) Error() string { return e.text }
func (e *listenError) Unwrap() error { return e.err }

// limitListener stops accepting while n connections are open.
func limitListener(ln net.Listener, n int) net.Listener {
	return &limitedListener{Listener: ln, slots: make(chan struct{}, n), closed: make(chan struct{})}
}

type limitedListener struct {
	net.Listener
	slots     chan struct{}
	closed    chan struct{}
	closeOnce sync.Once
}

func (l *limitedListener) Accept() (net.Conn, error) {
	select {
	case l.slots <- struct{}{}:
	case <-l.closed:
		return nil, net.ErrClosed
	}
	conn, err := l.Listener.Accept()
	if err != nil {
		<-l.slots
		return nil, err
	}
	return &limitedConn{Conn: conn, release: sync.OnceFunc(func() { <-l.slots })}, nil
}

func (l *limitedListener) Close() error {
	l.closeOnce.Do(func() { close(l.closed) })
	return l.Listener.Close()
}

type limitedConn struct {
	net.Conn
	release func()
}

func (c *limitedConn) Close() error {
	defer c.release()
	return c.Conn.Close()
}

// CloseWrite lets net/http end a response whose request it did not read to the end without a reset that would destroy the response.
func (c *limitedConn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return nil
}
