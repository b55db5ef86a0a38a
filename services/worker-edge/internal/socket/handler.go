package socket

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/coder/websocket"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
	"github.com/cmdexec/cmdexec/libs/kit/httpkit"
	"github.com/cmdexec/cmdexec/libs/kit/ratelimit"
	"github.com/cmdexec/cmdexec/services/worker-edge/internal/entrance"
	"github.com/cmdexec/cmdexec/services/worker-edge/internal/session"
)

// Options of a Handler.
type Options struct {
	Hub             *session.Hub
	Verifier        *auth.WorkerVerifier
	TrustedProxies  []netip.Prefix
	MaxSessions     int // sockets in all
	MaxPendingPerIP int // sockets of one address that have not said hello
	Limiter         ratelimit.Limiter
	RateIP          ratelimit.Rate // of connecting, by address
	RateWorker      ratelimit.Rate // of connecting and of messages other than output, by worker
	HelloTimeout    time.Duration
	PingInterval    time.Duration
	PongTimeout     time.Duration
	WriteTimeout    time.Duration // of a frame, from when it was queued
	CloseTimeout    time.Duration // for the worker to take part in the close
	Logger          *slog.Logger
	Metrics         prometheus.Registerer // may be nil
}

// Handler serves GET /api/workers/connect.
type Handler struct {
	o       Options
	gate    *entrance.Gate
	metrics *metrics

	mu       sync.Mutex
	stopping bool
	sockets  int
	pending  map[netip.Prefix]int
	empty    chan struct{} // closed when stopping and the last socket is gone
}

// New makes a handler. It starts nothing.
func New(o Options) *Handler {
	m := newMetrics(o.Metrics)
	return &Handler{o: o, metrics: m, pending: map[netip.Prefix]int{}, empty: make(chan struct{}), gate: &entrance.Gate{
		Verifier: o.Verifier, TrustedProxies: o.TrustedProxies, Limiter: o.Limiter, RateIP: o.RateIP, RateWorker: o.RateWorker,
		Logger: o.Logger, Refused: m.refused,
	}}
}

// Drain lets no new sockets in and waits until those that are there are closed,
// or ctx ends. Closing them is the hub's business.
func (h *Handler) Drain(ctx context.Context) {
	h.mu.Lock()
	if !h.stopping {
		h.stopping = true
		h.closeIfEmpty()
	}
	h.mu.Unlock()
	select {
	case <-h.empty:
	case <-ctx.Done():
	}
}

func (h *Handler) closeIfEmpty() {
	if h.stopping && h.sockets == 0 {
		close(h.empty)
	}
}

// ServeHTTP answers problems before the upgrade and close codes after it. It
// returns after the upgrade; the socket lives on by itself.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet {
		w.Header().Set("Allow", http.MethodGet)
		h.refuse(w, r, httpkit.Problem{Status: http.StatusMethodNotAllowed, Code: "method_not_allowed", Detail: "only GET is served here"})
		return
	}
	claims, ok := h.gate.Connect(w, r)
	if !ok {
		return
	}
	client := h.gate.Client(r)
	if !isUpgrade(r) {
		w.Header().Set("Upgrade", "websocket")
		h.refuse(w, r, httpkit.Problem{Status: http.StatusUpgradeRequired, Code: "upgrade_required", Detail: "this is a WebSocket"})
		return
	}
	if !offers(r, workerproto.Subprotocol) {
		h.refuse(w, r, httpkit.Problem{
			Status: http.StatusBadRequest, Code: "unsupported_protocol", Detail: "the subprotocol " + workerproto.Subprotocol + " must be offered",
			Hint: "update the worker or the server",
		})
		return
	}
	switch h.admit(client) {
	case notOpen:
		h.refuse(w, r, httpkit.Problem{
			Status: http.StatusServiceUnavailable, Code: "unavailable", Detail: "the edge is starting or stopping", RetryAfter: time.Second,
		})
		return
	case tooManySockets:
		h.refuse(w, r, httpkit.Problem{
			Status: http.StatusServiceUnavailable, Code: "overloaded", Detail: "the edge has all the workers that it can hold", RetryAfter: 5 * time.Second,
		})
		return
	case tooManyPending:
		h.refuse(w, r, httpkit.Problem{
			Status: http.StatusTooManyRequests, Code: "too_many_connections",
			Detail: "too many connections from this address have not said hello", RetryAfter: time.Second,
		})
		return
	case admitted:
	}
	hijacker := &slimHijacker{ResponseWriter: w}
	ws, err := websocket.Accept(hijacker, r, &websocket.AcceptOptions{
		Subprotocols: []string{workerproto.Subprotocol}, CompressionMode: websocket.CompressionDisabled,
	})
	if err != nil { // answered by Accept
		h.o.Logger.Debug("upgrade refused", "err", err)
		h.greeted(client)
		h.left()
		return
	}
	ws.SetReadLimit(workerproto.MaxFrameBytes)
	c := newConn(h, ws, hijacker.wire, claims, client)
	go c.run() // the request, its goroutine and its buffers are not kept
}

func (h *Handler) refuse(w http.ResponseWriter, r *http.Request, p httpkit.Problem) {
	h.gate.Refuse(w, r, p)
}

type admission int

const (
	admitted admission = iota
	notOpen
	tooManySockets
	tooManyPending
)

func (h *Handler) admit(client netip.Prefix) admission {
	open := h.o.Hub.Open()
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case !open || h.stopping:
		return notOpen
	case h.sockets >= h.o.MaxSessions:
		return tooManySockets
	case h.pending[client] >= h.o.MaxPendingPerIP:
		return tooManyPending
	}
	h.sockets++
	h.pending[client]++
	return admitted
}

// greeted: a socket has said hello, or will not.
func (h *Handler) greeted(client netip.Prefix) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.pending[client]--; h.pending[client] <= 0 {
		delete(h.pending, client)
	}
}

func (h *Handler) left() {
	h.mu.Lock()
	h.sockets--
	h.closeIfEmpty()
	h.mu.Unlock()
}

func isUpgrade(r *http.Request) bool {
	return hasToken(r.Header.Values("Connection"), "upgrade") && hasToken(r.Header.Values("Upgrade"), "websocket")
}

func offers(r *http.Request, subprotocol string) bool {
	return hasToken(r.Header.Values("Sec-WebSocket-Protocol"), subprotocol)
}

func hasToken(values []string, want string) bool {
	for _, v := range values {
		for token := range strings.SplitSeq(v, ",") {
			if strings.EqualFold(strings.TrimSpace(token), want) {
				return true
			}
		}
	}
	return false
}

// slimHijacker gives the WebSocket small buffers instead of the 4 KiB ones of
// the HTTP server. What an idle worker and the edge say to each other fits; larger
// reads and writes go past them.
type slimHijacker struct {
	http.ResponseWriter
	wire *wire // set by Hijack
}

const slimBuffer = 1 << 8

// Hijack implements http.Hijacker.
func (s *slimHijacker) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	c, rw, err := http.NewResponseController(s.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	s.wire = &wire{Conn: c}
	var in io.Reader = s.wire
	if n := rw.Reader.Buffered(); n > 0 {
		ahead, _ := rw.Reader.Peek(n) // they are there
		in = io.MultiReader(bytes.NewReader(bytes.Clone(ahead)), s.wire)
	}
	r := bufio.NewReaderSize(in, slimBuffer)
	if n := rw.Reader.Buffered(); n > 0 {
		// The caller looks only at what is in the buffer before it reads from the
		// connection itself, so all that was sent ahead must be in there.
		if n > slimBuffer {
			r = bufio.NewReaderSize(in, n)
		}
		if _, err := r.Peek(n); err != nil {
			return s.wire, nil, err
		}
	}
	return s.wire, bufio.NewReadWriter(r, bufio.NewWriterSize(s.wire, slimBuffer)), nil
}
