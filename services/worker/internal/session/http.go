package session

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/lifecycle"
	"github.com/cmdexec/cmdexec/services/worker/internal/runner"
)

const (
	// answerTimeout bounds a request beyond the time that the edge may wait before
	// it answers.
	answerTimeout = 30 * time.Second
	// Idle connections go before the edge closes them.
	idleConn     = 45 * time.Second
	maxIdleConns = 32
	// How many requests of a kind are under way at most. Output waits for the bus,
	// and must not hold up results.
	maxReports = 8
	maxOutputs = 4
	// An edge that does not hold this worker's session is asked again so often,
	// since the next try may reach the one that does.
	wrongEdgeTries = 8
	wrongEdgePause = 50 * time.Millisecond
	// Retries of a request within a session.
	minRetry = 50 * time.Millisecond
	maxRetry = 2 * time.Second
	// A session is over when heartbeats have failed for so many of them, and for
	// leastPatience.
	silentBeats   = 3
	leastPatience = 10 * time.Second
	// beatGap is the least time between heartbeats that report steps of attempts.
	beatGap = 20 * time.Millisecond
	// leastPoll and a quarter of the lease bound the time of a poll.
	leastPoll    = time.Second
	maxReplySize = 2 * workerproto.MaxFrameBytes
)

// refusal is an answer that is not 2xx.
type refusal struct {
	status int
	code   string
	detail string
	after  time.Duration
}

func (e *refusal) Error() string {
	if e.detail == "" {
		return fmt.Sprintf("the server answered %d", e.status)
	}
	return fmt.Sprintf("the server answered %d: %s", e.status, e.detail)
}

// passing reports whether the same request may be taken later.
func (e *refusal) passing() bool {
	return e.status >= 500 || e.status == http.StatusTooManyRequests || e.status == http.StatusRequestTimeout || e.status == http.StatusMisdirectedRequest
}

// meaning is what an error means for the session: nil, it goes on and the request
// is tried again.
func meaning(err error) error {
	r, ok := errors.AsType[*refusal](err)
	switch {
	case !ok, r.passing():
		return nil
	case r.status == http.StatusUnauthorized:
		return ErrToken
	case r.code == workerproto.CodeReplaced:
		return &goaway{after: maxBackoff, reason: "another worker with the same id has registered", replaced: true}
	case r.code == workerproto.CodeRegisterAgain && r.after > 0:
		return &goaway{after: min(r.after, maxAway), reason: r.detail}
	default:
		return r
	}
}

// plain is one session over plain HTTP.
type plain struct {
	*Session
	name string // of the session
	poll time.Duration
	beat chan struct{} // a heartbeat has something to tell

	mu    sync.Mutex
	token string
	found *socket
}

// overHTTP holds one session over plain HTTP from register to its end.
func (s *Session) overHTTP(ctx context.Context) (steady bool, err error) {
	p := &plain{Session: s, beat: make(chan struct{}, 1)}
	if p.token, err = s.cfg.Token(); err != nil {
		return false, err
	}
	welcome, err := p.register(ctx)
	if err != nil {
		if why := meaning(err); why != nil {
			if _, ok := errors.AsType[*refusal](why); !ok {
				return false, why // the server is reached: it is not about the transport
			}
		}
		return false, &noHTTP{err}
	}
	s.cfg.Logger.Info("connected to the server", "transport", HTTP, "heartbeatSeconds", welcome.HeartbeatSeconds, "leaseSeconds", welcome.LeaseSeconds)
	began := time.Now()
	err = p.serve(ctx, welcome)
	return time.Since(began) > steadyAfter, err
}

func (p *plain) register(ctx context.Context) (workerproto.Welcome, error) {
	reg, at := p.hello()
	var w workerproto.Welcome
	header, err := p.post(ctx, workerproto.PathRegister, reg, &w)
	if err != nil {
		return w, err
	}
	p.name = header.Get(workerproto.SessionHeader)
	lease := time.Duration(w.LeaseSeconds) * time.Second
	p.poll = min(max(lease/4, leastPoll), workerproto.DefaultPoll)
	p.welcomed(w, at)
	return w, nil
}

// serve runs the session until ctx ends or it is over, and returns why.
func (p *plain) serve(ctx context.Context, w workerproto.Welcome) error {
	life := ctx
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	parts := []func() error{
		func() error { return p.heartbeats(ctx, every(w)) },
		func() error { return p.polls(ctx) },
		func() error { return p.deliver(ctx, cancel) },
		func() error { return p.untilChanged(ctx) },
	}
	if p.cfg.Transport == Auto {
		parts = append(parts, func() error { return p.findSocket(ctx) })
	}
	var all sync.WaitGroup
	for _, f := range parts {
		all.Go(func() { cancel(f()) })
	}
	all.Wait()
	err := context.Cause(ctx)
	if _, ok := errors.AsType[*socketFound](err); !ok && p.found != nil {
		_ = p.found.CloseNow() // the session has ended for another reason
	}
	if life.Err() != nil {
		// The worker stops: the last heartbeat says that it takes nothing any more.
		last, cancel := context.WithTimeout(context.WithoutCancel(life), closeWait)
		defer cancel()
		_ = p.heartbeat(last) // silence tells the same, later
	}
	return err
}

// findSocket tries now and then whether a WebSocket can be had.
func (p *plain) findSocket(ctx context.Context) error {
	for wait := p.cfg.RetryWS; ; wait = min(2*wait, max(p.cfg.RetryWS, maxRetryWS)) {
		if err := lifecycle.Sleep(ctx, wait); err != nil {
			return err
		}
		ws, err := p.dial(ctx)
		if err != nil {
			continue
		}
		p.found = ws
		return &socketFound{ws}
	}
}

// heartbeats sends a heartbeat at intervals, and whenever there is something to
// tell.
func (p *plain) heartbeats(ctx context.Context, every time.Duration) error {
	backoff := lifecycle.Backoff{Min: minRetry, Max: maxRetry}
	patience := max(silentBeats*every, leastPatience)
	content := time.Now()
	for {
		began := time.Now()
		err := p.heartbeat(ctx)
		wait := every
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err == nil:
			content = began
			backoff.Reset()
		case meaning(err) != nil:
			return meaning(err)
		case time.Since(content) > patience:
			return fmt.Errorf("the server does not answer heartbeats: %w", err)
		default:
			wait = p.pause(&backoff, err)
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-p.told(err):
			_ = lifecycle.Sleep(ctx, beatGap) // more may come with it
		case <-ctx.Done():
		}
		timer.Stop()
	}
}

// told is the channel of what a heartbeat has to tell, unless the last one
// failed: then the next one tells it.
func (p *plain) told(err error) <-chan struct{} {
	if err != nil {
		return nil
	}
	return p.beat
}

func (p *plain) tellSoon() {
	select {
	case p.beat <- struct{}{}:
	default:
	}
}

func (p *plain) heartbeat(ctx context.Context) error {
	h := p.cfg.Runner.Heartbeat()
	sentAt := p.cfg.Clock.Now()
	var b workerproto.Beat
	if _, err := p.post(ctx, workerproto.PathHeartbeat, h, &b); err != nil {
		return err
	}
	if b.Token != "" {
		p.cfg.NewToken(b.Token)
		if token, err := p.cfg.Token(); err == nil {
			p.mu.Lock()
			p.token = token
			p.mu.Unlock()
		}
	}
	p.cfg.Runner.Beat(b, sentAt)
	return nil
}

// polls asks for work, one poll after the other, also while none is wanted: the
// answer is how the edge asks for a heartbeat.
func (p *plain) polls(ctx context.Context) error {
	backoff := lifecycle.Backoff{Min: minRetry, Max: maxRetry}
	query := url.Values{"waitSeconds": {strconv.Itoa(int(p.poll / time.Second))}}
	for ctx.Err() == nil {
		sentAt := p.cfg.Clock.Now()
		var asg workerproto.Assignment
		header, err := p.do(ctx, http.MethodGet, workerproto.PathGetJob+"?"+query.Encode(), nil, p.poll+answerTimeout/2, &asg)
		if err != nil {
			if why := meaning(err); why != nil {
				return why
			}
			// What the answer would have been is handed over again when a heartbeat
			// shows that it is not here.
			p.tellSoon()
			_ = lifecycle.Sleep(ctx, p.pause(&backoff, err))
			continue
		}
		backoff.Reset()
		if asg.LeaseID != "" {
			p.cfg.Runner.AssignPolled(asg, sentAt)
		}
		if header.Get(workerproto.HeartbeatHeader) != "" {
			if err := p.heartbeat(ctx); err != nil {
				if why := meaning(err); why != nil {
					return why
				}
				_ = lifecycle.Sleep(ctx, p.pause(&backoff, err))
			}
		}
	}
	return ctx.Err()
}

// pause is how long to wait before a request is tried again.
func (p *plain) pause(backoff *lifecycle.Backoff, err error) time.Duration {
	wait := backoff.Next()
	if r, ok := errors.AsType[*refusal](err); ok {
		wait = max(wait, min(r.after, maxBackoff))
	}
	return wait
}

// deliver sends what the runner has, several things at once, and ends the
// session by fail when that is not possible.
func (p *plain) deliver(ctx context.Context, fail func(error)) error {
	reports, outputs := make(chan struct{}, maxReports), make(chan struct{}, maxOutputs)
	free := make(chan struct{}, 1)
	var all sync.WaitGroup
	defer all.Wait()
	for {
		parcel, ok := p.cfg.Runner.Take(len(reports) < maxReports, len(outputs) < maxOutputs)
		if !ok {
			select {
			case <-p.cfg.Runner.Wake():
			case <-free:
			case <-ctx.Done():
				return ctx.Err()
			}
			continue
		}
		var send func(context.Context, runner.Parcel) error
		slots := reports
		switch parcel.Type {
		case workerproto.TypeOutput:
			send, slots = p.sendOutput, outputs
		case workerproto.TypeResult:
			send = p.sendResult
		case workerproto.TypeRejected:
			send = p.sendRejection
		default: // a step: heartbeats list them
			p.tellSoon()
			continue
		}
		slots <- struct{}{}
		all.Go(func() {
			if err := p.insist(ctx, func() error { return send(ctx, parcel) }); err != nil && ctx.Err() == nil {
				fail(err)
			}
			p.cfg.Runner.Done(parcel)
			<-slots
			select {
			case free <- struct{}{}:
			default:
			}
		})
	}
}

// insist repeats a request until it is answered, or the session is over (the error).
func (p *plain) insist(ctx context.Context, request func() error) error {
	backoff := lifecycle.Backoff{Min: minRetry, Max: maxRetry}
	for {
		err := request()
		if err == nil {
			return nil
		}
		if why := meaning(err); why != nil {
			return why
		}
		if err := lifecycle.Sleep(ctx, p.pause(&backoff, err)); err != nil {
			return err
		}
	}
}

// errPart: not all of the output is stored yet.
var errPart = errors.New("the server has not stored all output yet")

// sendOutput sends the part of a parcel that is not acknowledged. A repeat is
// acknowledged like the first.
func (p *plain) sendOutput(ctx context.Context, parcel runner.Parcel) error {
	var reply workerproto.OutputReply
	_, err := p.post(ctx, workerproto.PathOutput, workerproto.Output{Lease: parcel.Lease, Chunks: parcel.Chunks}, &reply)
	switch {
	case err != nil:
		return err
	case reply.Stale:
		p.cfg.Runner.Stale(parcel.Lease.LeaseID)
		return nil
	}
	p.cfg.Runner.Ack(workerproto.Ack{JobID: parcel.Lease.JobID, Attempt: parcel.Lease.Attempt, AckedSeq: reply.AckedSeq})
	if reply.AckedSeq < parcel.Chunks[len(parcel.Chunks)-1].Seq {
		return errPart
	}
	return nil
}

func (p *plain) sendResult(ctx context.Context, parcel runner.Parcel) error {
	var reply workerproto.ResultReply
	_, err := p.post(ctx, workerproto.PathResult, json.RawMessage(parcel.Frame), &reply)
	switch {
	case err != nil:
		return err
	case reply.Stale:
		p.cfg.Runner.Stale(parcel.Lease.LeaseID)
	case reply.Accepted:
		p.cfg.Runner.Ack(workerproto.Ack{Results: []workerproto.Lease{parcel.Lease}})
	default:
		return errors.New("the server has not taken the result")
	}
	return nil
}

// sendRejection sends a rejection as the result that it is over plain HTTP.
func (p *plain) sendRejection(ctx context.Context, parcel runner.Parcel) error {
	var r workerproto.Rejected
	if err := workerproto.Decode(parcel.Frame, &r); err != nil { // the runner made it
		return nil
	}
	_, err := p.post(ctx, workerproto.PathResult, workerproto.Result{
		Lease: r.Lease, Outcome: job.OutcomeRejected, Message: r.Reason, FinishedAt: job.Timestamp(time.Now()),
	}, &workerproto.ResultReply{})
	return err
}

func (p *plain) post(ctx context.Context, path string, body, into any) (http.Header, error) {
	data, err := json.Marshal(body)
	if err != nil {
		return nil, err
	}
	return p.do(ctx, http.MethodPost, path, data, answerTimeout, into)
}

// do sends a request, and again where another edge is meant. An answer 204
// leaves into as it is. The error is a *refusal, or one of the network's.
func (p *plain) do(ctx context.Context, method, path string, body []byte, timeout time.Duration, into any) (http.Header, error) {
	for try := 1; ; try++ {
		header, err := p.try(ctx, method, path, body, timeout, into)
		r, ok := errors.AsType[*refusal](err)
		switch {
		case !ok || r.status != http.StatusMisdirectedRequest:
			return header, err
		case try == wrongEdgeTries:
			// The edge that had the session is not there any more.
			return header, &refusal{status: http.StatusConflict, code: workerproto.CodeRegisterAgain, detail: r.detail}
		}
		if err := lifecycle.Sleep(ctx, rand.N(wrongEdgePause)); err != nil {
			return nil, err
		}
	}
}

func (p *plain) try(ctx context.Context, method, path string, body []byte, timeout time.Duration, into any) (http.Header, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, p.cfg.URL+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	req.Header.Set(workerproto.TokenHeader, p.token)
	p.mu.Unlock()
	if p.name != "" {
		req.Header.Set(workerproto.SessionHeader, p.name)
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := p.plain.Do(req)
	if err != nil {
		return nil, fmt.Errorf("connect to the server: %w", err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxReplySize))
	if err != nil {
		return nil, fmt.Errorf("read the server's answer: %w", err)
	}
	switch {
	case resp.StatusCode == http.StatusNoContent:
		return resp.Header, nil
	case resp.StatusCode != http.StatusOK:
		return resp.Header, newRefusal(resp, data)
	}
	if err := json.Unmarshal(data, into); err != nil {
		return nil, errors.New("the server's answer is not what a worker expects: is there something else at its address?")
	}
	return resp.Header, nil
}

// newRefusal reads a problem document. What is not one comes from something on the way.
func newRefusal(resp *http.Response, data []byte) *refusal {
	r := &refusal{status: resp.StatusCode}
	if n, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && n > 0 {
		r.after = time.Duration(min(n, int(maxAway/time.Second))) * time.Second
	}
	var problem struct {
		Code   string `json:"code"`
		Detail string `json:"detail"`
	}
	if slices.Contains([]string{"application/problem+json", "application/json"}, resp.Header.Get("Content-Type")) && json.Unmarshal(data, &problem) == nil {
		r.code, r.detail = problem.Code, problem.Detail
	}
	if err := redirected(resp); err != nil {
		r.detail = err.Error()
	}
	return r
}
