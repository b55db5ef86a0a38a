package bus

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
)

// answerTimeout bounds the wait for one answer where the caller's context does not.
const answerTimeout = 5 * time.Second

// mux sends requests over one connection, any number at a time, and hands each
// its reply. Unlike the client library's own it fails everything that waits when
// the connection is lost, and it separates "was not sent" from "was sent and not
// answered".
type mux struct {
	nc     *nats.Conn
	prefix string

	mu      sync.Mutex
	next    uint64
	waiting map[uint64]chan reply
	idle    chan struct{} // closed when waiting becomes empty; nil when nobody waits for that
}

type reply struct {
	msg *nats.Msg
	err error
}

// call is a request under way.
type call struct {
	token uint64
	reply chan reply
}

func newMux() *mux {
	return &mux{prefix: nats.NewInbox() + ".", waiting: map[uint64]chan reply{}}
}

// attach makes the mux work over nc.
func (m *mux) attach(nc *nats.Conn) error {
	m.nc = nc
	sub, err := nc.Subscribe(m.prefix+"*", m.deliver)
	if err != nil {
		return fmt.Errorf("subscribe to replies: %w", err)
	}
	// What can be pending is bounded by what was asked for.
	if err := sub.SetPendingLimits(-1, -1); err != nil {
		return fmt.Errorf("subscribe to replies: %w", err)
	}
	return nil
}

func (m *mux) deliver(msg *nats.Msg) {
	token, err := strconv.ParseUint(msg.Subject[len(m.prefix):], 36, 64)
	if err != nil {
		return
	}
	if ch := m.take(token); ch != nil {
		ch <- reply{msg: msg}
	}
}

func (m *mux) take(token uint64) chan reply {
	m.mu.Lock()
	defer m.mu.Unlock()
	ch := m.waiting[token]
	delete(m.waiting, token)
	if len(m.waiting) == 0 && m.idle != nil {
		close(m.idle)
		m.idle = nil
	}
	return ch
}

// disconnected fails everything that waits.
func (m *mux) disconnected() {
	m.mu.Lock()
	lost := m.waiting
	m.waiting = map[uint64]chan reply{}
	if m.idle != nil {
		close(m.idle)
		m.idle = nil
	}
	m.mu.Unlock()
	for _, ch := range lost {
		ch <- reply{err: fmt.Errorf("%w: the connection was lost", ErrAmbiguous)}
	}
}

// drain waits until nothing is under way, at most d.
func (m *mux) drain(d time.Duration) {
	m.mu.Lock()
	if len(m.waiting) == 0 {
		m.mu.Unlock()
		return
	}
	if m.idle == nil {
		m.idle = make(chan struct{})
	}
	idle := m.idle
	m.mu.Unlock()
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-idle:
	case <-timer.C:
	}
}

// start sends a request. After an error nothing was sent, unless it is ErrAmbiguous.
func (m *mux) start(subject string, header nats.Header, data []byte) (call, error) {
	c := call{reply: make(chan reply, 1)}
	m.mu.Lock()
	m.next++
	c.token = m.next
	m.waiting[c.token] = c.reply
	m.mu.Unlock()
	err := m.nc.PublishMsg(&nats.Msg{
		Subject: subject, Reply: m.prefix + strconv.FormatUint(c.token, 36), Header: header, Data: data,
	})
	if err != nil {
		m.take(c.token)
		return call{}, sendError(err)
	}
	return c, nil
}

// wait returns the reply of a call. ErrNoResponder: nobody got it. ErrAmbiguous:
// no answer came, for whichever reason.
func (m *mux) wait(ctx context.Context, c call) (*nats.Msg, error) {
	timer := time.NewTimer(answerTimeout)
	defer timer.Stop()
	var r reply
	select {
	case r = <-c.reply:
	case <-ctx.Done():
		m.take(c.token)
		return nil, fmt.Errorf("%w: %w", ErrAmbiguous, context.Cause(ctx))
	case <-timer.C:
		m.take(c.token)
		return nil, fmt.Errorf("%w: no answer within %s", ErrAmbiguous, answerTimeout)
	}
	if r.err != nil {
		return nil, r.err
	}
	if len(r.msg.Data) == 0 && r.msg.Header.Get("Status") == "503" {
		return nil, ErrNoResponder
	}
	return r.msg, nil
}

// request is start and wait. A context that has ended already sends nothing.
func (m *mux) request(ctx context.Context, subject string, header nats.Header, data []byte) (*nats.Msg, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	c, err := m.start(subject, header, data)
	if err != nil {
		return nil, err
	}
	return m.wait(ctx, c)
}

// sendError translates what publishing says.
func sendError(err error) error {
	switch {
	case errors.Is(err, nats.ErrMaxPayload):
		return fmt.Errorf("%w: %w", ErrTooLarge, err)
	case errors.Is(err, nats.ErrReconnectBufExceeded):
		return fmt.Errorf("%w: not connected", ErrUnavailable)
	case errors.Is(err, nats.ErrConnectionClosed), errors.Is(err, nats.ErrConnectionDraining),
		errors.Is(err, nats.ErrConnectionReconnecting), errors.Is(err, nats.ErrHeadersNotSupported),
		errors.Is(err, nats.ErrBadSubject):
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	default:
		return fmt.Errorf("%w: %w", ErrAmbiguous, err)
	}
}
