package socket

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/coder/websocket"

	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
	"github.com/cmdexec/cmdexec/services/worker-edge/internal/session"
)

// Bounds of what waits to be written to one worker. Assignments may take half of
// each, so that there is always room for what keeps a session going.
const (
	maxQueueFrames = 512
	maxQueueBytes  = 8 << 20
	keepBuffer     = 128 << 10 // larger read buffers are not kept
	maxCloseReason = 123       // of a WebSocket close frame
)

// conn is one socket. It is the session.Peer of its session.
type conn struct {
	h      *Handler
	ws     *websocket.Conn
	wire   *wire
	claims auth.WorkerClaims
	client netip.Prefix
	sess   *session.Session // set before the writer starts

	heard    atomic.Int64 // when the worker was last heard, in nanoseconds since started
	handling atomic.Bool  // the reader is not reading
	started  time.Time

	pinger *time.Timer   // runs from the session's start to its end
	closed chan struct{} // the socket is closed; made and closed by the writer's last run

	mu      sync.Mutex
	queue   []frame
	bytes   int
	open    bool // the welcome is out, or in the queue's head
	acksDue bool
	writing bool // write runs
	closing *closing
}

type frame struct {
	data     []byte
	deadline time.Time // zero while the session is not open
}

type closing struct {
	code   int
	reason string
}

func newConn(h *Handler, ws *websocket.Conn, wire *wire, claims auth.WorkerClaims, client netip.Prefix) *conn {
	return &conn{h: h, ws: ws, wire: wire, claims: claims, client: client, started: time.Now(), closed: make(chan struct{})}
}

// run serves the socket until it is closed and its session has been cleaned up.
func (c *conn) run() {
	hello, err := c.readHello()
	c.h.greeted(c.client)
	if err == nil {
		err = c.begin(hello)
	}
	if err != nil {
		c.closeUnopened(err)
		c.h.left()
		return
	}
	// Decoding has grown this goroutine's stack; the one that waits for hours
	// begins with a small one.
	go c.serve()
}

// begin starts the session.
func (c *conn) begin(hello *workerproto.Register) error {
	c.mu.Lock() // the session may send before Start returns
	defer c.mu.Unlock()
	sess, err := c.h.o.Hub.Start(c.claims, hello, "websocket", c)
	if err != nil {
		return err
	}
	c.sess = sess
	// Not all sockets at once.
	c.pinger = time.AfterFunc(rand.N(c.h.o.PingInterval)+1, c.ping)
	return nil
}

// serve reads, and leaves when the socket is closed and the session cleaned up.
func (c *conn) serve() {
	c.read()
	<-c.closed
	c.pinger.Stop()
	<-c.sess.Ended()
	c.h.left()
}

// readHello reads the first message, within the time for it.
func (c *conn) readHello() (*workerproto.Register, error) {
	late := time.AfterFunc(c.h.o.HelloTimeout, func() {
		c.shut(workerproto.CloseProtocol, "hello did not come in time")
	})
	defer late.Stop()
	hello := &workerproto.Register{}
	typ, r, err := c.ws.Reader(context.Background()) // late ends it
	if err != nil {
		return nil, err
	}
	err = c.message(typ, r, func(typ websocket.MessageType, data []byte) error {
		if typ != websocket.MessageText {
			return protocolError("hello must come first")
		}
		if !utf8.Valid(data) {
			return notUTF8()
		}
		t, err := workerproto.TypeOf(data)
		if err != nil {
			return frameError(err)
		}
		c.h.metrics.frame(t)
		if t != workerproto.TypeHello {
			return protocolError("hello must come first")
		}
		return frameError(workerproto.Decode(data, hello))
	})
	return hello, err
}

// closeUnopened ends a socket without a session.
func (c *conn) closeUnopened(err error) {
	var v *session.Violation
	switch {
	case errors.As(err, &v):
		c.shut(v.Code, v.Reason)
	case errors.Is(err, session.ErrNotOpen):
		c.shut(int(websocket.StatusGoingAway), err.Error())
	case c.violates(err):
		c.shut(int(websocket.StatusProtocolError), brokenRules)
	default: // the socket has failed
		_ = c.ws.CloseNow()
	}
}

// shut closes the socket, also when the worker takes no part in that: it may
// have sent half a frame and nothing since. It blocks, but not longer than
// CloseTimeout.
func (c *conn) shut(code int, reason string) {
	c.wire.ended.Store(true)
	late := time.AfterFunc(c.h.o.CloseTimeout, func() { _ = c.wire.Conn.Close() })
	defer late.Stop()
	_ = c.ws.Close(websocket.StatusCode(code), closeReason(reason)) // the worker may be gone
}

// violates reports whether err is about what the worker sent, and not about the
// network or an end that the edge itself has made.
func (c *conn) violates(err error) bool {
	return websocket.CloseStatus(err) == -1 && !c.wire.lost.Load() &&
		!errors.Is(err, net.ErrClosed) && !errors.Is(err, context.DeadlineExceeded)
}

const brokenRules = "that is not WebSocket"

// read feeds the session until the socket ends. Its frame and those of what it
// waits in are all that an idle connection has on a stack.
func (c *conn) read() {
	for {
		// No context: it would cost a registration per frame header. The socket's
		// end ends the read.
		typ, r, err := c.ws.Reader(context.Background())
		if err == nil {
			err = c.message(typ, r, c.take)
		}
		if err != nil {
			c.broken(err)
			return // a close handshake reads on by itself
		}
	}
}

// broken closes the session for an error of the socket or of what came over it.
func (c *conn) broken(err error) {
	var v *session.Violation
	status := websocket.CloseStatus(err)
	switch {
	case errors.As(err, &v):
		c.sess.Close(v.Code, v.Reason)
	case status != -1:
		c.sess.Close(int(status), "the worker closed the connection")
	case errors.Is(err, websocket.ErrMessageTooBig):
		c.sess.Close(int(websocket.StatusMessageTooBig), "a message is too big")
	case c.violates(err):
		c.sess.Close(int(websocket.StatusProtocolError), brokenRules)
	default:
		c.sess.Close(abnormal, "the connection was lost")
	}
}

// abnormal is what ends without a close frame.
const abnormal = int(websocket.StatusAbnormalClosure)

var buffers = sync.Pool{New: func() any { return new(bytes.Buffer) }}

// message reads one message and has it taken. Its bytes are gone when take
// returns.
func (c *conn) message(typ websocket.MessageType, r io.Reader, take func(websocket.MessageType, []byte) error) error {
	c.hear()
	c.wire.earn(0)
	buf := buffers.Get().(*bytes.Buffer)
	buf.Reset()
	defer func() {
		if buf.Cap() <= keepBuffer {
			buffers.Put(buf)
		}
	}()
	if _, err := buf.ReadFrom(hearing{c, r}); err != nil {
		return err
	}
	if c.wire.lost.Load() {
		return io.ErrUnexpectedEOF // the WebSocket takes a connection's end for the message's
	}
	c.handling.Store(true)
	defer func() {
		c.hear()
		c.handling.Store(false)
	}()
	return c.guarded(func() error { return take(typ, buf.Bytes()) })
}

// guarded makes a panic of f the end of the session.
func (c *conn) guarded(f func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			c.h.o.Logger.Error("message of a worker made the edge panic", "workerId", c.claims.Subject, "panic", fmt.Sprint(v), "stack", string(debug.Stack()))
			err = &session.Violation{Code: int(websocket.StatusInternalError), Reason: "the edge made a mistake"}
		}
	}()
	return f()
}

// aside runs f on a goroutine of its own and waits for it. Decoding grows a stack: a
// reader to which nothing but heartbeats comes would keep twice what it waits in.
func (c *conn) aside(f func() error) error {
	done := make(chan error, 1)
	go func() { done <- c.guarded(f) }()
	return <-done
}

// hear notes that the worker is alive.
func (c *conn) hear() { c.heard.Store(int64(time.Since(c.started))) }

// hearing notes every piece of a long message. The pieces are small, so that a
// worker with a slow line is heard while its message comes.
type hearing struct {
	c *conn
	r io.Reader
}

func (h hearing) Read(p []byte) (int, error) {
	n, err := h.r.Read(p[:min(len(p), maxPiece)])
	if n > 0 {
		h.c.hear()
		h.c.wire.earn(int64(n))
	}
	return n, err
}

// signal makes sure that write runs. mu is held.
func (c *conn) signal() {
	if !c.writing {
		c.writing = true
		go c.write()
	}
}

// write writes what there is, and in the end closes the socket. It runs only
// while there is something to write.
func (c *conn) write() {
	for {
		f, acks, end := c.pop()
		switch {
		case f.data != nil:
			c.writeFrame(f)
		case acks:
			c.writeAcks(c.sess.TakeAcks())
		case end != nil:
			c.shut(end.code, end.reason)
			close(c.closed)
			return
		default:
			return
		}
	}
}

// pop takes the next thing to do. When there is none, or the socket is to be
// closed, write ends; nothing starts it again after a close.
func (c *conn) pop() (f frame, acks bool, end *closing) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closing == nil && !c.open {
		c.writing = false
		return frame{}, false, nil
	}
	if len(c.queue) > 0 {
		f = c.queue[0]
		c.queue[0] = frame{}
		c.queue = c.queue[1:]
		if len(c.queue) == 0 {
			c.queue = nil // an idle connection keeps nothing
		}
		c.bytes -= len(f.data)
		return f, false, nil
	}
	if c.closing != nil {
		return frame{}, false, c.closing
	}
	acks, c.acksDue = c.acksDue, false
	c.writing = acks
	return frame{}, acks, nil
}

// writeFrame writes one frame. When that fails the session ends, and so does
// what else is to be written.
func (c *conn) writeFrame(f frame) {
	deadline := f.deadline
	if deadline.IsZero() {
		deadline = time.Now().Add(c.h.o.WriteTimeout)
	}
	ctx, cancel := context.WithDeadline(context.Background(), deadline)
	defer cancel()
	if err := c.ws.Write(ctx, websocket.MessageText, f.data); err != nil {
		c.sess.Close(abnormal, "the worker does not read")
		_ = c.ws.CloseNow()
		c.mu.Lock()
		c.queue, c.bytes = nil, 0
		c.mu.Unlock()
	}
}

func (c *conn) writeAcks(acks []workerproto.Ack) {
	for i := range acks {
		data, err := workerproto.Encode(workerproto.TypeAck, acks[i])
		if err != nil {
			c.h.o.Logger.Error("frame could not be encoded", "type", workerproto.TypeAck, "err", err)
			continue
		}
		c.writeFrame(frame{data: data})
	}
}

// ping closes the connection when the worker is not heard any more, else sees to
// the next ping. Any byte from the worker counts, and so does that the edge
// itself is not reading. A worker that was heard within the last interval, as by
// each heartbeat, is not asked.
func (c *conn) ping() {
	c.mu.Lock() // begin has to be over
	gone := c.sess.Context()
	c.mu.Unlock()
	if gone.Err() != nil {
		return
	}
	sent := int64(time.Since(c.started))
	if next := time.Duration(c.heard.Load()-sent) + c.h.o.PingInterval; next > 0 {
		c.pinger.Reset(next)
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), c.h.o.PongTimeout)
	defer cancel()
	switch {
	case c.ws.Ping(ctx) == nil:
		c.hear()
	case c.handling.Load(), c.heard.Load() > sent:
	default:
		c.sess.Close(abnormal, "the worker does not answer pings")
		_ = c.ws.CloseNow()
		return
	}
	if gone.Err() != nil {
		return
	}
	c.pinger.Reset(max(c.h.o.PingInterval-(time.Since(c.started)-time.Duration(sent)), time.Millisecond))
}

// Welcome implements session.Peer.
func (c *conn) Welcome(w workerproto.Welcome) {
	data, err := workerproto.Encode(workerproto.TypeWelcome, w)
	if err != nil {
		c.h.o.Logger.Error("frame could not be encoded", "type", workerproto.TypeWelcome, "err", err)
		return
	}
	deadline := time.Now().Add(c.h.o.WriteTimeout)
	c.mu.Lock()
	if c.closing == nil && !c.open {
		c.open = true
		c.queue = append([]frame{{data: data}}, c.queue...)
		c.bytes += len(data)
		for i := range c.queue {
			c.queue[i].deadline = deadline
		}
	}
	c.signal()
	c.mu.Unlock()
}

// Send implements session.Peer. A worker for which there is no room does not
// read: its session ends.
func (c *conn) Send(t workerproto.Type, body any) {
	data, err := workerproto.Encode(t, body)
	if err != nil {
		c.h.o.Logger.Error("frame could not be encoded", "type", t, "err", err)
		return
	}
	if errors.Is(c.push(data, maxQueueFrames, maxQueueBytes), session.ErrBusy) {
		c.session().Close(workerproto.CloseSlowDown, "the worker does not read what it is sent")
	}
}

// session waits for run to know the session: frames may be sent as soon as it starts.
func (c *conn) session() *session.Session {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.sess
}

func (c *conn) push(data []byte, frames, size int) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.closing != nil:
		return session.ErrClosing
	case len(c.queue) >= frames || c.bytes+len(data) > size:
		return session.ErrBusy
	}
	f := frame{data: data}
	if c.open {
		f.deadline = time.Now().Add(c.h.o.WriteTimeout)
	}
	c.queue = append(c.queue, f)
	c.bytes += len(data)
	if c.open {
		c.signal()
	}
	return nil
}

// Assign implements session.Peer. Several assignments share a frame while they fit.
func (c *conn) Assign(as []workerproto.Assignment) []error {
	errs := make([]error, len(as))
	for first := 0; first < len(as); {
		data, n, err := encodeAssign(as[first:])
		if err == nil {
			err = c.push(data, maxQueueFrames/2, maxQueueBytes/2)
		}
		for i := range n {
			errs[first+i] = err
		}
		first += n
	}
	return errs
}

// AcksReady implements session.Peer.
func (c *conn) AcksReady() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.acksDue = true
	if c.open && c.closing == nil {
		c.signal()
	}
}

// Close implements session.Peer.
func (c *conn) Close(code int, reason string, goaway *workerproto.Goaway) {
	var last []byte
	if goaway != nil {
		last, _ = workerproto.Encode(workerproto.TypeGoaway, goaway) // a string and an int
	}
	c.mu.Lock()
	if c.closing == nil {
		c.closing = &closing{code: code, reason: reason}
		if goaway == nil {
			c.queue, c.bytes = nil, 0
		} else {
			if !c.open {
				c.queue, c.bytes = nil, 0 // nothing before the welcome
			}
			c.queue = append(c.queue, frame{data: last, deadline: time.Now().Add(c.h.o.WriteTimeout)})
			c.bytes += len(last)
		}
	}
	c.signal()
	c.mu.Unlock()
}

func closeReason(s string) string {
	if len(s) > maxCloseReason {
		s = s[:maxCloseReason]
	}
	return strings.ToValidUTF8(s, "") // a rune may have been cut
}
