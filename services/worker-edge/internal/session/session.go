package session

import (
	"context"
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/fleet"
	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
	"github.com/cmdexec/cmdexec/libs/kit/failpoint"
	"github.com/cmdexec/cmdexec/libs/kit/lifecycle"
)

var protocolReason = fmt.Sprintf("this edge speaks worker protocol %d to %d: update the worker or the server",
	workerproto.MinVersion, workerproto.Version)

// Times of a session's start.
const (
	registerTimeout = 5 * time.Second // one try
	olderTimeout    = 5 * time.Second // for an older session on this edge to end
	takeoverTimeout = 2 * time.Second // for an older session on another edge to let go of the worker's commands
	contestDelay    = 100 * time.Millisecond
)

// Session is one worker's connection. The methods that take what the worker
// sends (Heartbeat, Progress, Output, Result) are safe for concurrent use, as a
// transport with several requests under way needs it. An error of theirs is a
// *Violation: nothing was taken, and whether that ends the session is for the
// transport to decide; or the context's when the session has ended.
type Session struct {
	hub      *Hub
	id       string
	workerID string
	peer     Peer
	report   report

	ctx     context.Context // ends when the session closes
	cancel  context.CancelFunc
	started chan struct{} // start has returned
	ended   chan struct{} // the session has left nothing behind

	registered atomic.Bool // the registration is in the bucket
	contesting atomic.Bool // one check at a time

	mu         sync.Mutex
	closed     bool
	sub        Subscription
	leases     map[string]*lease  // by lease id; nil while there was none
	sending    map[string]bool    // results under way, by lease id
	stale      [2]map[string]bool // lease ids that the leader called stale, the younger ones first
	inflight   int64              // bytes of output and results that the bus does not have
	room       chan struct{}      // told when inflight shrinks
	ackOutput  []*lease           // with something to acknowledge
	ackResults []workerproto.Lease
	expiry     *time.Timer
	expires    time.Time
	life       time.Duration // of the worker's tokens
}

func newSession(h *Hub, w fleet.Worker, hello *workerproto.Register, claims auth.WorkerClaims, p Peer) *Session {
	s := &Session{
		hub: h, id: w.SessionID, workerID: w.ID, peer: p,
		started: make(chan struct{}), ended: make(chan struct{}), room: make(chan struct{}, 1),
		expires: claims.ExpiresAt, life: auth.MaxLifetime,
	}
	s.ctx, s.cancel = context.WithCancel(h.base)
	s.report.to = s
	if !claims.IssuedAt.IsZero() {
		s.life = min(max(claims.ExpiresAt.Sub(claims.IssuedAt), time.Minute), auth.MaxLifetime)
	}
	now := time.Now()
	for i := range hello.Running {
		s.addLease(hello.Running[i].Lease, job.MaxLogBytes, unknownSeq, false, now)
	}
	return s
}

// ID is the session's id.
func (s *Session) ID() string { return s.id }

// WorkerID is the id from the worker's token.
func (s *Session) WorkerID() string { return s.workerID }

// Context ends when the session closes.
func (s *Session) Context() context.Context { return s.ctx }

// Ended is closed when the session has been cleaned up.
func (s *Session) Ended() <-chan struct{} { return s.ended }

// start brings the session to life; see the package comment. Who the worker is, and
// what it held at its hello, is not kept once the leader has heard it.
func (s *Session) start(older *Session, w *fleet.Worker, running []workerproto.RunningLease) {
	defer close(s.started)
	if older != nil {
		older.replaced()
		wait(s.ctx, older.ended, olderTimeout)
	}
	if !s.retry("register worker", func(ctx context.Context) error { return s.hub.o.Bus.PutWorker(ctx, *w) }) {
		return
	}
	s.registered.Store(true)
	s.awaitTakeover()
	if !s.retry("take commands", func(context.Context) error { return s.takeCommands() }) {
		return
	}
	// The whole list of the hello, also what ended meanwhile: for the scheduler a
	// lease that is missing here has ended without a result.
	var holding []workerproto.Lease
	for i := range running {
		holding = append(holding, running[i].Lease)
	}
	s.hub.beater.hello(&s.report, w, holding)
}

// retry repeats an operation until it succeeds, or the session closes (false).
func (s *Session) retry(what string, op func(ctx context.Context) error) bool {
	backoff := lifecycle.Backoff{Max: 2 * time.Second}
	for s.ctx.Err() == nil {
		if s.hub.writes.Acquire(s.ctx, 1) != nil {
			break
		}
		ctx, cancel := context.WithTimeout(s.ctx, registerTimeout)
		err := op(ctx)
		cancel()
		s.hub.writes.Release(1)
		if err == nil {
			return s.ctx.Err() == nil
		}
		if s.ctx.Err() == nil {
			s.hub.o.Logger.Warn("session cannot start yet", "workerId", s.workerID, "step", what, "err", err)
		}
		_ = lifecycle.Sleep(s.ctx, backoff.Next()) // ends with the session
	}
	return false
}

// awaitTakeover waits until nobody else takes the worker's commands. Two takers
// would both answer, and one of them could call a command undelivered that the
// other has delivered. An edge that does not let go in time is taken for dead.
func (s *Session) awaitTakeover() {
	ctx, cancel := context.WithTimeout(s.ctx, takeoverTimeout)
	defer cancel()
	backoff := lifecycle.Backoff{Min: 10 * time.Millisecond, Max: 200 * time.Millisecond}
	for ctx.Err() == nil {
		if served, err := s.hub.o.Bus.CommandsServed(ctx, s.workerID); err == nil && !served {
			return
		}
		_ = lifecycle.Sleep(ctx, backoff.Next()) // ends with ctx
	}
	if s.ctx.Err() == nil {
		s.hub.o.Logger.Warn("an older session of the worker still takes its commands", "workerId", s.workerID)
	}
}

func (s *Session) takeCommands() error {
	sub, err := s.hub.o.Bus.ServeCommands(s.workerID, s.command)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.sub = sub // teardown waits for start and finds it
	s.mu.Unlock()
	return nil
}

// Close ends the session. It does not block; only the first call counts.
func (s *Session) Close(code int, reason string) { s.end(code, reason, nil) }

func (s *Session) replaced() {
	s.goaway(workerproto.CloseReplaced, "a newer session of this worker took over", 0)
}

func (s *Session) goaway(code int, reason string, after time.Duration) {
	s.end(code, reason, &workerproto.Goaway{RetryAfterMs: int(after / time.Millisecond), Reason: reason})
}

func (s *Session) end(code int, reason string, goaway *workerproto.Goaway) {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return
	}
	s.closed = true
	if s.expiry != nil {
		s.expiry.Stop()
	}
	s.mu.Unlock()
	s.cancel()
	s.hub.o.Metrics.Closed.WithLabelValues(strconv.Itoa(code)).Inc()
	s.hub.o.Logger.Info("worker session closed", "workerId", s.workerID, "sessionId", s.id, "code", code, "reason", reason)
	s.peer.Close(code, reason, goaway)
	go s.teardown()
}

// teardown takes back what start has set up, in the order that the package
// comment promises.
func (s *Session) teardown() {
	defer func() {
		s.discardAll()
		s.hub.remove(s)
		close(s.ended)
	}()
	<-s.started
	s.mu.Lock()
	sub := s.sub
	s.mu.Unlock()
	log := s.hub.o.Logger.With("workerId", s.workerID, "sessionId", s.id)
	if sub != nil {
		if err := sub.Unsubscribe(); err != nil {
			log.Warn("commands could not be unsubscribed", "err", err)
		}
	}
	s.hub.beater.close(&s.report)
	if !s.registered.Load() {
		return
	}
	turn, cancel := context.WithTimeout(s.hub.base, stopTimeout)
	defer cancel()
	if s.hub.writes.Acquire(turn, 1) != nil {
		log.Warn("worker could not be marked offline: too many others are")
		return
	}
	defer s.hub.writes.Release(1)
	ctx, cancel := context.WithTimeout(s.hub.base, endTimeout)
	defer cancel()
	err := s.hub.o.Bus.UpdateWorker(ctx, s.workerID, func(w *fleet.Worker) bool {
		if w.SessionID != s.id || !w.Online {
			return false
		}
		w.Online, w.LastSeenAt = false, time.Now().UTC()
		return true
	})
	if err != nil {
		log.Warn("worker could not be marked offline", "err", err)
	}
}

// contested checks whether the worker has registered elsewhere since, and gives
// way. It does not block.
func (s *Session) contested() {
	if !s.registered.Load() || !s.contesting.CompareAndSwap(false, true) {
		return
	}
	go func() {
		defer s.contesting.Store(false)
		// Our own registration came before this check, so another id read now is a
		// newer one. The delay lets a read replica catch up.
		if lifecycle.Sleep(s.ctx, contestDelay) != nil {
			return
		}
		ctx, cancel := context.WithTimeout(s.ctx, registerTimeout)
		defer cancel()
		current, err := s.hub.o.Bus.Worker(ctx, s.workerID)
		if err == nil && current.SessionID != "" && current.SessionID != s.id {
			s.replaced()
		}
	}()
}

// watchToken ends the session when its token does.
func (s *Session) watchToken(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	d := s.expires.Add(auth.Leeway).Sub(now)
	if s.expiry == nil {
		s.expiry = time.AfterFunc(d, func() { s.Close(workerproto.CloseToken, "the token has expired") })
		return
	}
	s.expiry.Reset(d)
}

// TokenIs notes with which token the worker speaks now: the one that it was sent
// last may not have arrived.
func (s *Session) TokenIs(claims auth.WorkerClaims, now time.Time) {
	s.mu.Lock()
	changed := !s.expires.Equal(claims.ExpiresAt)
	s.expires = claims.ExpiresAt
	s.mu.Unlock()
	if changed {
		s.watchToken(now)
	}
}

// renewal mints a token when the worker's own has less than a third of its life left.
func (s *Session) renewal(now time.Time) string {
	s.mu.Lock()
	due := s.expires.Sub(now) < s.life/3
	life := s.life
	s.mu.Unlock()
	if !due {
		return ""
	}
	token, err := auth.MintWorker(s.hub.o.Secret, s.workerID, life.Truncate(time.Second), now)
	if err != nil {
		s.hub.o.Logger.Error("worker token could not be renewed", "workerId", s.workerID, "err", err)
		return ""
	}
	s.mu.Lock()
	s.expires = now.Add(life)
	s.mu.Unlock()
	s.watchToken(now)
	return token
}

// Heartbeat takes a heartbeat. Its beat comes when the leading scheduler has
// answered; while nobody leads none comes.
func (s *Session) Heartbeat(h workerproto.Heartbeat) error {
	switch {
	case h.WorkerID != "" && h.WorkerID != s.workerID:
		return protocolError("workerId is not this session's")
	case len(h.Running) > workerproto.MaxRunning:
		return protocolError("too many leases in running")
	case h.FreeSlots < 0 || h.FreeSlots > fleet.MaxSlots:
		return protocolError("freeSlots out of range")
	case h.Status != workerproto.StatusIdle && h.Status != workerproto.StatusBusy && h.Status != workerproto.StatusDraining:
		return protocolError("status must be idle, busy or draining")
	}
	for i := range h.Running {
		if err := checkLease(&h.Running[i].Lease); err != nil {
			return err
		}
		if !knownPhase(h.Running[i].Phase) { // all heartbeats share a message, so each has its size
			return protocolError("phase must be accepted, preparing, started or ended")
		}
	}
	h.CPUUsage = min(max(h.CPUUsage, 0), 100)
	h.RAMUsage = min(max(h.RAMUsage, 0), fleet.MaxTotalMemory>>20)
	h.WorkerID = s.workerID
	h.Reason = clip(h.Reason, job.MaxReasonBytes)
	s.prune(h.Running, time.Now())
	s.hub.beater.heartbeat(&s.report, h)
	return nil
}

func knownPhase(p workerproto.Phase) bool {
	switch p {
	case "", workerproto.PhaseAccepted, workerproto.PhasePreparing, workerproto.PhaseStarted, workerproto.PhaseEnded:
		return true
	}
	return false
}

// Progress takes accepted, preparing, started or rejected. It is not answered;
// the scheduler judges the lease. It reports stale when the lease is not the
// session's: nothing was taken.
func (s *Session) Progress(step workerproto.Type, l workerproto.Lease, at time.Time, reason string) (stale bool, err error) {
	if err := checkLease(&l); err != nil {
		return false, err
	}
	if _, held := s.Acked(l); !held {
		s.hub.o.Metrics.Stale.Inc()
		return true, nil
	}
	if step == workerproto.TypeRejected {
		s.Reject(l, at, reason)
		return false, nil
	}
	s.hub.beater.progress(&s.report, busmsg.Progress{Lease: l, Step: step, At: at, Reason: clip(reason, job.MaxReasonBytes)})
	return false, nil
}

// Reject gives an assignment back in the worker's name.
func (s *Session) Reject(l workerproto.Lease, at time.Time, reason string) {
	s.dropLease(l.LeaseID)
	s.hub.beater.progress(&s.report, busmsg.Progress{Lease: l, Step: workerproto.TypeRejected, At: at, Reason: clip(reason, job.MaxReasonBytes)})
}

// answered takes the leader's reply to one beat of this session.
func (s *Session) answered(sent *busmsg.WorkerBeat, r *busmsg.WorkerReply) {
	s.settle(r)
	now := time.Now()
	if sent.Hello != nil {
		s.hub.o.Logger.Info("worker session open", "workerId", s.workerID, "sessionId", s.id, "executors", sent.Hello.Executors, "slots", sent.Hello.Slots)
		s.peer.Welcome(workerproto.Welcome{
			HeartbeatSeconds: int(s.hub.o.Heartbeat / time.Second), LeaseSeconds: int(s.hub.o.Lease / time.Second),
			ServerTime: now.UTC(), Protocol: sent.Hello.Protocol, Stale: r.Stale,
		})
		for _, l := range r.Cancel {
			s.peer.Send(workerproto.TypeCancel, workerproto.Cancel{Lease: l})
		}
		if r.Drain {
			s.peer.Send(workerproto.TypeDrain, workerproto.Drain{Drain: true})
		}
	}
	if sent.Heartbeat != nil {
		beat := workerproto.Beat{
			ID: sent.Heartbeat.ID, Confirmed: r.Confirmed, Cancel: r.Cancel, Drain: r.Drain,
			Token: s.renewal(now), ServerTime: now.UTC(),
		}
		for i := range r.Stale {
			beat.Stale = append(beat.Stale, r.Stale[i].LeaseID)
		}
		s.peer.Send(workerproto.TypeBeat, beat)
	}
}

// command takes a command of the scheduler. It does not block.
func (s *Session) command(_ context.Context, c busmsg.WorkerCommand) busmsg.WorkerCommandReply {
	reply := busmsg.WorkerCommandReply{SessionID: s.id}
	if len(c.Assign) > 0 {
		reply.Assign = s.assign(c.Assign)
		failpoint.At(failpoint.EdgeDelivered)
	}
	s.noteCancel(c.Cancel)
	for _, l := range c.Cancel {
		s.peer.Send(workerproto.TypeCancel, workerproto.Cancel{Lease: l})
	}
	if c.Drain != nil {
		s.peer.Send(workerproto.TypeDrain, workerproto.Drain{Drain: *c.Drain})
	}
	return reply
}

func (s *Session) assign(as []workerproto.Assignment) []busmsg.Delivery {
	now := time.Now()
	s.mu.Lock()
	closed := s.closed
	added := make([]bool, len(as))
	if !closed { // before the worker can answer
		for i := range as {
			added[i] = s.addLease(as[i].Lease, as[i].Job.LogMaxBytes, 0, true, now)
		}
	}
	s.mu.Unlock()

	out := make([]busmsg.Delivery, len(as))
	var errs []error
	if !closed {
		errs = s.peer.Assign(as)
	}
	for i := range as {
		err := ErrClosing
		if errs != nil {
			err = errs[i]
		}
		out[i] = busmsg.Delivery{LeaseID: as[i].LeaseID, Delivered: err == nil}
		outcome := "delivered"
		if err != nil {
			outcome = "refused"
			out[i].Reason = err.Error()
			if added[i] {
				s.dropLease(as[i].LeaseID)
			}
		}
		s.hub.o.Metrics.Assignments.WithLabelValues(outcome).Inc()
	}
	return out
}

// checkLease refuses what must not get near a subject, a key or a query.
func checkLease(l *workerproto.Lease) error {
	if id.Check(id.Job, l.JobID) != nil || id.Check(id.Lease, l.LeaseID) != nil || l.Attempt < 1 {
		return protocolError("a lease needs a valid jobId, attempt and leaseId")
	}
	return nil
}

// clip cuts text from a worker to what a record keeps.
func clip(s string, most int) string {
	if len(s) <= most {
		return s
	}
	for most > 0 && !utf8.RuneStart(s[most]) {
		most--
	}
	return s[:most]
}

// wait waits for ch, but not longer than ctx or d.
func wait(ctx context.Context, ch <-chan struct{}, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ch:
	case <-timer.C:
	case <-ctx.Done():
	}
}
