package session

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptrace"
	"sync"
	"time"

	"github.com/coder/websocket"

	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/lifecycle"
)

const (
	writeTimeout = 10 * time.Second
	welcomeWait  = 90 * time.Second // an edge without a leading scheduler keeps a worker waiting
	// closeWait is how long a worker that stops waits for the edge to hear it.
	closeWait = time.Second
	// maxBeats is how many heartbeats may be unanswered and still be remembered.
	maxBeats = 64
)

// conn is one connection.
type conn struct {
	*Session
	ws      *socket
	helloAt time.Duration // by the worker's clock
	away    *goaway       // the reader's: the edge has asked this worker to go
	told    bool          // the reader's: its error is what the edge has said

	mu    sync.Mutex
	beats map[int64]time.Duration // heartbeats that are not answered, by id, and when each was sent
	next  int64
}

// overSocket holds one WebSocket from dial, unless there is one already, to its end.
func (s *Session) overSocket(ctx context.Context, ws *socket) (steady bool, err error) {
	if ws == nil {
		if ws, err = s.dial(ctx); err != nil {
			return false, err
		}
	}
	defer ws.CloseNow() //nolint:errcheck // it is over, whatever it says
	ws.SetReadLimit(workerproto.MaxFrameBytes + 4096)
	c := &conn{Session: s, ws: ws, beats: map[int64]time.Duration{}}
	welcome, err := c.hello(ctx)
	if err != nil {
		return false, unopened(err, c.told)
	}
	s.choice.opened()
	s.cfg.Logger.Info("connected to the server", "transport", WebSocket, "heartbeatSeconds", welcome.HeartbeatSeconds, "leaseSeconds", welcome.LeaseSeconds)
	began := time.Now()
	err = c.serve(ctx, welcome)
	return time.Since(began) > steadyAfter, err
}

func (s *Session) dial(ctx context.Context) (*socket, error) {
	token, err := s.cfg.Token()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	var below *cork
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(i httptrace.GotConnInfo) { below = corkOf(i.Conn) }})
	ws, resp, err := websocket.Dial(ctx, s.cfg.URL+workerproto.PathConnect, &websocket.DialOptions{
		HTTPClient:      s.socket,
		HTTPHeader:      http.Header{workerproto.TokenHeader: {token}},
		Subprotocols:    []string{workerproto.Subprotocol},
		CompressionMode: websocket.CompressionDisabled,
	})
	switch {
	case err == nil && ws.Subprotocol() != workerproto.Subprotocol:
		ws.CloseNow() //nolint:errcheck // it never began
		return nil, &noSocket{err: errors.New("the server does not speak " + workerproto.Subprotocol), certain: true}
	case err == nil:
		return &socket{ws, below}, nil
	case resp != nil && resp.StatusCode == http.StatusUnauthorized:
		return nil, ErrToken
	case redirected(resp) != nil:
		// Says nothing about WebSockets.
		return nil, fmt.Errorf("the server refuses the connection: %w", redirected(resp))
	case resp != nil:
		return nil, notUpgraded(resp.StatusCode, fmt.Errorf("the server answered %s to the connection", resp.Status))
	default:
		return nil, notUpgraded(0, fmt.Errorf("connect to the server: %w", err))
	}
}

// hello opens the session.
func (c *conn) hello(ctx context.Context) (workerproto.Welcome, error) {
	var reg workerproto.Register
	reg, c.helloAt = c.Session.hello()
	if err := c.send(ctx, workerproto.TypeHello, reg); err != nil {
		return workerproto.Welcome{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, welcomeWait)
	defer cancel()
	for {
		t, frame, err := c.read(ctx)
		if err != nil {
			return workerproto.Welcome{}, err
		}
		if t != workerproto.TypeWelcome {
			if err := c.handle(t, frame); err != nil { // an assignment may overtake the welcome
				return workerproto.Welcome{}, err
			}
			continue
		}
		var w workerproto.Welcome
		if err := workerproto.Decode(frame, &w); err != nil {
			return w, err
		}
		c.welcomed(w, c.helloAt)
		return w, nil
	}
}

// serve runs the reader, the writer and the heartbeat of a welcomed session
// until ctx ends or one of them fails, and returns why. What is written goes on
// with the context wire, which ends with the connection.
func (c *conn) serve(ctx context.Context, w workerproto.Welcome) error {
	// A read or write that is cut off takes the connection with it, so those that
	// are under way live on for the goodbye.
	wire, unplug := context.WithCancel(context.WithoutCancel(ctx))
	defer unplug()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var all sync.WaitGroup
	read := make(chan error, 1)
	all.Go(func() {
		err := c.readAll(wire)
		read <- err
		cancel(err)
	})
	for _, f := range []func() error{
		func() error { return c.writeAll(ctx, wire) },
		func() error { return c.heartbeats(ctx, wire, every(w)) },
		func() error { return c.pings(ctx, wire) },
		func() error { return c.untilChanged(ctx) },
	} {
		all.Go(func() { cancel(f()) })
	}
	<-ctx.Done()
	err := context.Cause(ctx)
	hurry := time.AfterFunc(closeWait, unplug)
	if errors.Is(err, context.Canceled) || errors.Is(err, errAgain) {
		c.ws.Close(websocket.StatusNormalClosure, "worker stops") //nolint:errcheck // it is over
	} else if last := <-read; c.told {
		err = last // a write may have failed first, but the edge has said why
	}
	hurry.Stop()
	unplug()
	c.ws.CloseNow() //nolint:errcheck // it is over
	all.Wait()
	return err
}

func (c *conn) readAll(ctx context.Context) error {
	for {
		t, frame, err := c.read(ctx)
		if err != nil {
			return err
		}
		if err := c.handle(t, frame); err != nil {
			return err
		}
	}
}

// read reads one frame. After a goaway it goes on for a moment, for the close
// code that says why and the acknowledgements that are on their way.
func (c *conn) read(ctx context.Context) (workerproto.Type, []byte, error) {
	if c.away != nil {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, closeWait)
		defer cancel()
	}
	kind, frame, err := c.ws.Read(ctx)
	if err != nil {
		c.told = c.away != nil || websocket.CloseStatus(err) != -1
		err = readError(err)
		if away, ok := errors.AsType[*goaway](err); c.away != nil && !(ok && away.replaced) {
			err = c.away
		}
		return "", nil, err
	}
	if kind != websocket.MessageText {
		return "", nil, nil // a newer edge; nothing binary is known here
	}
	t, err := workerproto.TypeOf(frame)
	return t, frame, err
}

func readError(err error) error {
	var closed websocket.CloseError
	if !errors.As(err, &closed) {
		if errors.Is(err, io.EOF) {
			return errors.New("the server closed the connection")
		}
		return fmt.Errorf("read from the server: %w", err)
	}
	switch closed.Code {
	case workerproto.CloseToken:
		return ErrToken
	case workerproto.CloseReplaced:
		return &goaway{after: maxBackoff, reason: "another worker with the same id has connected", replaced: true}
	case workerproto.CloseSlowDown, workerproto.CloseOverloaded:
		return &goaway{after: time.Second + rand.N(4*time.Second), reason: closed.Reason}
	case workerproto.CloseProtocol:
		return fmt.Errorf("the server refused this worker: %s", closed.Reason)
	default:
		return fmt.Errorf("the server closed the connection: %s (%d)", closed.Reason, closed.Code)
	}
}

// handle takes in one frame. Types that are not known are ignored.
func (c *conn) handle(t workerproto.Type, frame []byte) error {
	switch t {
	case workerproto.TypeAssign:
		return with(frame, func(b workerproto.Assign) {
			for _, a := range b.Assignments {
				c.cfg.Runner.Assign(a, c.helloAt)
			}
		})
	case workerproto.TypeAck:
		return with(frame, c.cfg.Runner.Ack)
	case workerproto.TypeBeat:
		return with(frame, c.beat)
	case workerproto.TypeCancel:
		return with(frame, func(b workerproto.Cancel) { c.cfg.Runner.Cancel(b.Lease) })
	case workerproto.TypeStale:
		return with(frame, func(b workerproto.Stale) {
			for _, l := range b.Leases {
				c.cfg.Runner.Stale(l.LeaseID)
			}
		})
	case workerproto.TypeDrain:
		return with(frame, func(b workerproto.Drain) { c.cfg.Runner.Drain(b.Drain) })
	case workerproto.TypeToken:
		return with(frame, func(b workerproto.Token) { c.cfg.NewToken(b.Token) })
	case workerproto.TypeGoaway:
		var g workerproto.Goaway
		if err := workerproto.Decode(frame, &g); err != nil {
			return err
		}
		after := time.Duration(min(g.RetryAfterMs, int(maxAway/time.Millisecond))) * time.Millisecond
		c.away = &goaway{after: max(after, 0), reason: g.Reason}
	}
	return nil
}

func with[T any](frame []byte, f func(T)) error {
	var body T
	if err := workerproto.Decode(frame, &body); err != nil {
		return err
	}
	f(body)
	return nil
}

// beat takes in the answer to one heartbeat. Leases count as confirmed from
// the moment at which that heartbeat was sent, not from when the answer came.
func (c *conn) beat(b workerproto.Beat) {
	c.mu.Lock()
	sentAt, ok := c.beats[b.ID]
	for id := range c.beats {
		if id <= b.ID {
			delete(c.beats, id)
		}
	}
	c.mu.Unlock()
	if b.Token != "" {
		c.cfg.NewToken(b.Token)
	}
	if ok {
		c.cfg.Runner.Beat(b, sentAt)
		return
	}
	// Not the answer to a heartbeat of this session: it confirms nothing.
	c.cfg.Runner.Stale(b.Stale...)
	for _, l := range b.Cancel {
		c.cfg.Runner.Cancel(l)
	}
}

func (c *conn) heartbeats(ctx, wire context.Context, every time.Duration) error {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		h := c.cfg.Runner.Heartbeat()
		c.mu.Lock()
		c.next++
		h.ID = c.next
		c.beats[h.ID] = c.cfg.Clock.Now()
		delete(c.beats, h.ID-maxBeats)
		c.mu.Unlock()
		if err := c.send(wire, workerproto.TypeHeartbeat, h); err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// pings notices a connection whose other end is gone without a word.
func (c *conn) pings(ctx, wire context.Context) error {
	for {
		if err := lifecycle.Sleep(ctx, workerproto.PingInterval); err != nil {
			return err
		}
		wait, cancel := context.WithTimeout(wire, workerproto.PongTimeout)
		err := c.ws.Ping(wait)
		cancel()
		if err != nil {
			return fmt.Errorf("the server does not answer: %w", err)
		}
	}
}

func (c *conn) writeAll(ctx, wire context.Context) error {
	for {
		f, err := c.cfg.Runner.Next(ctx)
		if err != nil {
			return err
		}
		kind := websocket.MessageText
		if f.Binary {
			kind = websocket.MessageBinary
		}
		if err := c.write(wire, kind, f.Data); err != nil {
			return err
		}
	}
}

func (c *conn) send(ctx context.Context, t workerproto.Type, body any) error {
	frame, err := workerproto.Encode(t, body)
	if err != nil {
		return err
	}
	return c.write(ctx, websocket.MessageText, frame)
}

func (c *conn) write(ctx context.Context, kind websocket.MessageType, data []byte) error {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	if err := c.ws.Write(ctx, kind, data); err != nil {
		return fmt.Errorf("write to the server: %w", err)
	}
	return nil
}
