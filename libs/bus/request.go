package bus

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/micro"

	"github.com/cmdexec/cmdexec/libs/core/busmsg"
)

const (
	beatHandlers  = 256 // at once
	queryHandlers = 64  // at once, for each endpoint

	serviceName    = "cmdexec"
	serviceVersion = "1.0.0"
)

// Subscription is something that listens. After Unsubscribe returned no handler
// runs any more: it waits for running ones, and must not be called from one.
type Subscription interface{ Unsubscribe() error }

// server is a Subscription that counts its running handlers.
type server struct {
	stop func() error

	mu      sync.Mutex
	ended   bool
	running sync.WaitGroup // grows under mu and only before the end
	ctx     context.Context
	cancel  context.CancelFunc
}

func (c *Conn) newServer() *server {
	s := &server{}
	s.ctx, s.cancel = context.WithCancel(c.life)
	return s
}

// enter counts a handler in; false when it must not run any more.
func (s *server) enter() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return false
	}
	s.running.Add(1)
	return true
}

func (s *server) leave() { s.running.Done() }

// Unsubscribe ends the subscription, ends the context of its handlers, and waits
// for them.
func (s *server) Unsubscribe() error {
	s.mu.Lock()
	s.ended = true
	s.mu.Unlock()
	err := s.stop()
	s.cancel()
	s.running.Wait()
	if ended(err) {
		return nil
	}
	return err
}

// ended reports whether a subscription could not be ended because it had been.
func ended(err error) bool {
	return errors.Is(err, nats.ErrConnectionClosed) || errors.Is(err, nats.ErrBadSubscription) || errors.Is(err, nats.ErrConnectionDraining)
}

// ask sends a request and decodes the reply.
func ask[Resp any](ctx context.Context, c *Conn, subject string, req any) (Resp, *nats.Msg, error) {
	var resp Resp
	data, err := json.Marshal(req)
	if err != nil {
		return resp, nil, fmt.Errorf("encode request: %w", err)
	}
	msg, err := c.mux.request(ctx, subject, nil, data)
	if err != nil {
		return resp, nil, err
	}
	if msg.Header.Get(micro.ErrorCodeHeader) != "" {
		return resp, msg, nil
	}
	if err := json.Unmarshal(msg.Data, &resp); err != nil {
		return resp, nil, fmt.Errorf("%w: reply: %w", ErrMalformed, err)
	}
	return resp, msg, nil
}

// RequestBeat asks the leading scheduler. ErrNoResponder: nobody leads. It waits for
// ctx, and at most five seconds.
func (c *Conn) RequestBeat(ctx context.Context, req busmsg.BeatRequest) (busmsg.BeatReply, error) {
	reply, _, err := ask[busmsg.BeatReply](ctx, c, subjectBeats, req)
	if err != nil {
		return reply, fmt.Errorf("beat: %w", err)
	}
	return reply, nil
}

// ServeBeats answers beats, each on its own goroutine, until Unsubscribe. An error
// of handle means no answer; it is logged.
func (c *Conn) ServeBeats(handle func(context.Context, busmsg.BeatRequest) (busmsg.BeatReply, error)) (Subscription, error) {
	s := c.newServer()
	slots := make(chan struct{}, beatHandlers)
	sub, err := c.nc.Subscribe(subjectBeats, func(msg *nats.Msg) {
		select {
		case slots <- struct{}{}:
		case <-s.ctx.Done():
			return
		}
		if !s.enter() {
			<-slots
			return
		}
		go func() {
			defer s.leave()
			defer func() { <-slots }()
			var reply busmsg.BeatReply
			err := c.guarded("beats", func() error {
				var req busmsg.BeatRequest
				if err := json.Unmarshal(msg.Data, &req); err != nil {
					return fmt.Errorf("%w: beat: %w", ErrMalformed, err)
				}
				var err error
				reply, err = handle(s.ctx, req)
				return err
			})
			if err != nil {
				c.log.Warn("beat was not answered", "err", err)
				return
			}
			c.respond(msg, reply)
		}()
	})
	if err != nil {
		return nil, fmt.Errorf("serve beats: %w", err)
	}
	s.stop = sub.Unsubscribe
	return c.settled(s)
}

// settled makes sure that the server knows a new subscription, so that requests
// which are sent after it returns are not answered by "no responder".
func (c *Conn) settled(s Subscription) (Subscription, error) {
	if c.nc.Status() != nats.CONNECTED {
		return s, nil // the client subscribes when it reconnects
	}
	if err := c.nc.FlushTimeout(answerTimeout); err != nil && c.nc.IsClosed() {
		_ = s.Unsubscribe()
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return s, nil
}

func (c *Conn) respond(msg *nats.Msg, reply any) {
	data, err := json.Marshal(reply)
	if err == nil {
		err = msg.Respond(data)
	}
	if err != nil && !errors.Is(err, nats.ErrMsgNoReply) {
		c.log.Warn("reply was not sent", "subject", msg.Subject, "err", err)
	}
}

// Query asks an endpoint. ErrNoResponder: nobody serves it. The other side's
// error is a *busmsg.QueryError (errors.As). It waits for ctx, and at most five
// seconds.
func Query[Req, Resp any](ctx context.Context, c *Conn, e Endpoint[Req, Resp], req Req) (Resp, error) {
	resp, msg, err := ask[Resp](ctx, c, e.subject(), req)
	if err != nil {
		if !errors.Is(err, ErrNoResponder) && !errors.Is(err, ErrMalformed) && !errors.Is(err, ErrTooLarge) {
			err = readError(err)
		}
		return resp, fmt.Errorf("query %s: %w", e.name, err)
	}
	if code := msg.Header.Get(micro.ErrorCodeHeader); code != "" {
		return resp, fmt.Errorf("query %s: %w", e.name,
			&busmsg.QueryError{Code: code, Message: msg.Header.Get(micro.ErrorHeader)})
	}
	return resp, nil
}

// Serve answers an endpoint until Unsubscribe, together with every other process
// that serves it (each request reaches one of them). Requests run on goroutines of
// their own, bounded. A *busmsg.QueryError is passed on; another error is logged
// and answered as CodeUnavailable with a generic text.
func Serve[Req, Resp any](c *Conn, e Endpoint[Req, Resp], handle func(context.Context, Req) (Resp, error)) (Subscription, error) {
	s := c.newServer()
	slots := make(chan struct{}, queryHandlers)
	answer := func(req micro.Request) {
		var data []byte
		err := c.guarded("query "+e.name, func() error {
			var in Req
			if err := json.Unmarshal(req.Data(), &in); err != nil {
				return &busmsg.QueryError{Code: busmsg.CodeBadRequest, Message: "the request cannot be read"}
			}
			out, err := handle(s.ctx, in)
			if err != nil {
				return err
			}
			data, err = json.Marshal(out)
			return err
		})
		// The reply goes past req: it is written here and read by the service's own
		// accounting at the same time, since this is not the service's goroutine.
		if err == nil {
			err = c.nc.PublishMsg(&nats.Msg{Subject: req.Reply(), Data: data})
		}
		if err == nil {
			return
		}
		var q *busmsg.QueryError
		if !errors.As(err, &q) {
			c.log.Warn("query failed", "query", e.name, "err", err)
			q = &busmsg.QueryError{Code: busmsg.CodeUnavailable, Message: "the query failed on the answering side"}
		}
		header := nats.Header{micro.ErrorCodeHeader: {q.Code}, micro.ErrorHeader: {q.Message}}
		if err := c.nc.PublishMsg(&nats.Msg{Subject: req.Reply(), Header: header}); err != nil {
			c.log.Warn("reply was not sent", "query", e.name, "err", err)
		}
	}
	svc, err := micro.AddService(c.nc, micro.Config{
		Name: serviceName + "-" + e.name, Version: serviceVersion, QueueGroup: serviceName,
	})
	if err != nil {
		return nil, fmt.Errorf("serve %s: %w", e.name, err)
	}
	s.stop = svc.Stop
	err = svc.AddEndpoint(e.name, micro.HandlerFunc(func(req micro.Request) {
		select {
		case slots <- struct{}{}:
		case <-s.ctx.Done():
			return
		}
		if !s.enter() {
			<-slots
			_ = req.Error(busmsg.CodeUnavailable, "the answering side is stopping", nil)
			return
		}
		go func() {
			defer s.leave()
			defer func() { <-slots }()
			answer(req)
		}()
	}), micro.WithEndpointSubject(e.subject()))
	if err != nil {
		_ = s.Unsubscribe()
		return nil, fmt.Errorf("serve %s: %w", e.name, err)
	}
	return c.settled(s)
}
