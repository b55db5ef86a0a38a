package poll

import (
	"context"
	"log/slog"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
	"github.com/cmdexec/cmdexec/libs/kit/httpkit"
	"github.com/cmdexec/cmdexec/libs/kit/ratelimit"
	"github.com/cmdexec/cmdexec/services/worker-edge/internal/entrance"
	"github.com/cmdexec/cmdexec/services/worker-edge/internal/session"
)

// Options of a Handler. All fields are needed unless they say otherwise.
type Options struct {
	Hub            *session.Hub
	Verifier       *auth.WorkerVerifier
	TrustedProxies []netip.Prefix
	MaxSessions    int // of the whole hub; past it no worker is let in that has none
	Limiter        ratelimit.Limiter
	RateIP         ratelimit.Rate // of registering and of wrong tokens, by address
	RateWorker     ratelimit.Rate // of requests other than output, by worker
	Lease          time.Duration  // of an assignment that does not say
	Silence        time.Duration  // a session ends when its worker is not heard for so long
	AnswerTimeout  time.Duration  // for the bus or the leading scheduler to let a request be answered
	Logger         *slog.Logger
	Metrics        prometheus.Registerer // may be nil
}

// Handler serves the routes of workers over plain HTTP.
type Handler struct {
	o       Options
	gate    *entrance.Gate
	metrics *metrics
	fetchIn time.Duration

	mu    sync.Mutex
	peers map[string]*peer // by worker id
}

// New makes a handler. It starts nothing; sessions are the hub's to close.
func New(o Options) *Handler {
	m := newMetrics(o.Metrics)
	return &Handler{
		o: o, metrics: m, peers: map[string]*peer{}, fetchIn: min(fetchWithin, o.Lease/4),
		gate: &entrance.Gate{
			Verifier: o.Verifier, TrustedProxies: o.TrustedProxies, Limiter: o.Limiter, RateIP: o.RateIP, RateWorker: o.RateWorker,
			Logger: o.Logger, Refused: m.refused,
		},
	}
}

// Routes are the handler's routes by path. Each answers other methods with 405.
func (h *Handler) Routes() map[string]http.Handler {
	return map[string]http.Handler{
		workerproto.PathRegister:    h.route("register", http.MethodPost, http.HandlerFunc(h.register)),
		workerproto.PathHeartbeat:   h.route("heartbeat", http.MethodPost, h.report(true, (*request).heartbeat)),
		workerproto.PathGetJob:      h.route("get-job", http.MethodGet, h.report(true, (*request).getJob)),
		workerproto.PathOutput:      h.route("stream-output", http.MethodPost, h.report(false, (*request).output)),
		workerproto.PathCheckCancel: h.route("check-cancel", http.MethodGet, h.report(true, (*request).checkCancel)),
		workerproto.PathResult:      h.route("submit-result", http.MethodPost, h.report(true, (*request).result)),
	}
}

func (h *Handler) route(name, method string, next http.Handler) http.Handler {
	requests := h.metrics.requests.WithLabelValues(name)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests.Inc()
		if r.Method != method {
			w.Header().Set("Allow", method)
			h.gate.Refuse(w, r, httpkit.Problem{Status: http.StatusMethodNotAllowed, Code: "method_not_allowed", Detail: "only " + method + " is served here"})
			return
		}
		next.ServeHTTP(w, r)
	})
}

// request is one request of a session.
type request struct {
	*peer
	h       *Handler
	claims  auth.WorkerClaims
	arrived time.Time
	w       http.ResponseWriter
	r       *http.Request
}

// report serves a request that needs a session. counted: it counts for the
// worker's rate limit.
func (h *Handler) report(counted bool, serve func(*request)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		q := &request{h: h, arrived: time.Now(), w: w, r: r}
		var ok bool
		if q.claims, ok = h.gate.Report(w, r, counted); !ok {
			return
		}
		if q.peer = h.find(w, r, q.claims.Subject); q.peer == nil {
			return
		}
		end, ok := q.enter()
		switch {
		case ok:
		case end != nil:
			q.ended(end)
			return
		default:
			q.refuse(httpkit.Problem{
				Status: http.StatusTooManyRequests, Code: "too_many_requests", Detail: "too many requests of this worker are under way", RetryAfter: time.Second,
			})
			return
		}
		defer q.leave()
		if r.Method == http.MethodGet {
			serve(q)
			return
		}
		strict(func(w http.ResponseWriter, r *http.Request) {
			q.w, q.r = w, r
			serve(q)
		}).ServeHTTP(w, r)
	})
}

// strict reads and checks a body before next sees it.
func strict(next http.HandlerFunc) http.Handler {
	return httpkit.StrictJSON(workerproto.MaxFrameBytes)(next)
}

// find returns the session that a request belongs to, or answers the request.
func (h *Handler) find(w http.ResponseWriter, r *http.Request, workerID string) *peer {
	want := r.Header.Get(workerproto.SessionHeader)
	h.mu.Lock()
	p := h.peers[workerID]
	h.mu.Unlock()
	if p != nil && (want == "" || p.sess.ID() == want) {
		return p
	}
	ctx, cancel := context.WithTimeout(r.Context(), h.o.AnswerTimeout)
	defer cancel()
	known, err := h.o.Hub.Registered(ctx, workerID)
	switch {
	case err != nil:
		h.gate.Refuse(w, r, unavailable("it is not known where this worker's session is"))
	case want != "" && known.SessionID != "" && known.SessionID != want:
		h.gate.Refuse(w, r, replaced(0))
	case known.Online && known.Transport == "http" && known.EdgeID != h.o.Hub.EdgeID():
		// The next try may come over another connection, to another edge.
		w.Header().Set("Connection", "close")
		h.gate.Refuse(w, r, httpkit.Problem{
			Status: http.StatusMisdirectedRequest, Code: workerproto.CodeWrongEdge, Detail: "another edge holds this worker's session",
			Hint: "try again, and register again if that does not help",
		})
	default:
		h.gate.Refuse(w, r, registerAgain(0))
	}
	return nil
}

func (h *Handler) remove(p *peer) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.peers[p.workerID] == p {
		delete(h.peers, p.workerID)
	}
}

func (h *Handler) register(w http.ResponseWriter, r *http.Request) {
	claims, ok := h.gate.Connect(w, r)
	if !ok {
		return
	}
	strict(func(w http.ResponseWriter, r *http.Request) {
		q := &request{h: h, claims: claims, w: w, r: r}
		var hello workerproto.Register
		if !q.decode(&hello) || !q.own(hello.WorkerID, true) {
			return
		}
		if hello.Protocol < workerproto.MinVersion || hello.Protocol > workerproto.Version {
			q.refuse(httpkit.Problem{
				Status: http.StatusUnprocessableEntity, Code: "unsupported_protocol", Detail: "this edge does not speak the worker's protocol",
				Hint: "update the worker or the server", Errors: []httpkit.FieldError{{Field: "protocol", Code: "unsupported"}},
			})
			return
		}
		if h.o.Hub.Len() >= h.o.MaxSessions && !h.has(claims.Subject) {
			q.refuse(httpkit.Problem{
				Status: http.StatusServiceUnavailable, Code: "overloaded", Detail: "the edge has all the workers that it can hold", RetryAfter: 5 * time.Second,
			})
			return
		}
		q.open(&hello)
	}).ServeHTTP(w, r)
}

func (h *Handler) has(workerID string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.peers[workerID] != nil
}

// open starts a session and answers when the leading scheduler knows it.
func (q *request) open(hello *workerproto.Register) {
	q.peer = newPeer(q.h, q.claims.Subject)
	if err := q.begin(q.claims, hello); err != nil {
		q.failed(err)
		return
	}
	q.h.mu.Lock()
	q.h.peers[q.workerID] = q.peer
	q.h.mu.Unlock()
	end, why := q.wait(q.h.o.AnswerTimeout, func() bool { return q.welcome != nil })
	switch {
	case end != nil:
		q.h.remove(q.peer) // it may have ended before it was put there
		q.ended(end)
	case why != met:
		// The worker does not know this session and will begin another.
		q.sess.Close(silent, "the worker could not be welcomed in time")
		q.refuse(unavailable("no scheduler has answered yet"))
	default:
		q.w.Header().Set(workerproto.SessionHeader, q.sess.ID())
		q.answer200(q.welcome)
	}
}

func (q *request) heartbeat() {
	var hb workerproto.Heartbeat
	if !q.decode(&hb) || !q.own(hb.WorkerID, false) {
		return
	}
	q.sess.TokenIs(q.claims, q.arrived)
	n, err := q.peer.heartbeat(hb, q.arrived)
	if err != nil {
		q.failed(err)
		return
	}
	end, why := q.wait(q.h.o.AnswerTimeout, func() bool { return q.beat.ID >= n })
	switch {
	case why == met:
		beat := q.newestBeat()
		beat.ID = hb.ID
		q.answer200(beat)
	case end != nil:
		q.ended(end)
	default:
		q.refuse(unavailable("no scheduler has answered"))
	}
}

func (q *request) getJob() {
	wait, ok := q.waitSeconds()
	if !ok || !q.own(q.r.URL.Query().Get("workerId"), false) {
		return
	}
	q.longLived()
	q.openPoll()
	defer q.closePoll()
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for late := false; ; {
		now := time.Now()
		if q.r.Context().Err() != nil {
			return // nobody is there to take one
		}
		a, nudge, end, news := q.next(now)
		if nudge {
			q.w.Header().Set(workerproto.HeartbeatHeader, workerproto.HeartbeatNow)
		}
		switch {
		case a != nil:
			q.handOver(a, now)
			return
		case end != nil:
			q.ended(end)
			return
		case nudge || late:
			q.soon()
			q.w.WriteHeader(http.StatusNoContent)
			return
		}
		select {
		case <-news:
		case <-timer.C:
			late = true
		case <-q.r.Context().Done():
			return
		case <-httpkit.Stopping(q.r.Context()):
			q.refuse(stopping())
			return
		}
	}
}

// handOver answers a poll with an assignment. Where that fails for certain the
// next poll gets it again, else when a heartbeat shows that it is missing.
func (q *request) handOver(a *handover, now time.Time) {
	data, err := q.encode(a, now)
	if err != nil { // it was encoded before
		q.h.o.Logger.Error("assignment could not be encoded", "jobId", a.JobID, "err", err)
		q.refuse(httpkit.Problem{Status: http.StatusInternalServerError, Code: "internal_error"})
		return
	}
	if err := q.write(data); err != nil {
		q.lost(a.LeaseID)
	}
}

func (q *request) output() {
	var o workerproto.Output
	if !q.decode(&o) || !q.own(o.WorkerID, false) {
		return
	}
	q.longLived() // a session that has too much in flight keeps it waiting
	last := int64(0)
	for i := range o.Chunks {
		frame, err := workerproto.EncodeChunk(o.Lease, o.Chunks[i])
		if err != nil {
			q.refuse(invalid("output cannot be read"))
			return
		}
		stale, err := q.sess.Output(o.Lease, &o.Chunks[i], frame)
		switch {
		case err != nil:
			q.failed(err)
			return
		case stale:
			q.answer200(workerproto.OutputReply{Stale: true})
			return
		}
		last = max(last, o.Chunks[i].Seq)
	}
	q.peer.has(o.LeaseID)
	var reply workerproto.OutputReply
	end, why := q.wait(q.h.o.AnswerTimeout, func() bool {
		acked, held := q.sess.Acked(o.Lease)
		reply = workerproto.OutputReply{AckedSeq: acked, Stale: !held}
		return !held || acked >= last
	})
	if end != nil && why != met {
		q.ended(end)
		return
	}
	q.answer200(reply) // what the bus has so far, when it is slow
}

func (q *request) result() {
	var res workerproto.Result
	if !q.decode(&res) || !q.own(res.WorkerID, false) {
		return
	}
	if q.sess.Stale(res.LeaseID) {
		q.answer200(workerproto.ResultReply{Stale: true})
		return
	}
	q.longLived()
	w, done := q.expect(res.LeaseID)
	defer done()
	if err := q.sess.Result(res, int(q.r.ContentLength)); err != nil {
		q.failed(err)
		return
	}
	q.peer.has(res.LeaseID)
	end, why := q.wait(q.h.o.AnswerTimeout, func() bool { return w.done })
	switch {
	case why == met:
		q.answer200(workerproto.ResultReply{Accepted: true})
	case end != nil:
		q.ended(end)
	default:
		q.refuse(unavailable("the result could not be stored yet"))
	}
}

func (q *request) checkCancel() {
	jobID, attempt, ok := q.attempt()
	if !ok || !q.own(q.r.URL.Query().Get("workerId"), false) {
		return
	}
	cancel, held := q.sess.Canceled(jobID, attempt)
	q.answer200(workerproto.CancelReply{Cancel: cancel, Stale: !held})
}

// why a wait is over.
type why int

const (
	met     why = iota
	timeout     // or the client has gone, or the server stops
)

// wait waits until a condition is met, the session ends or d has passed. The
// condition is asked with the peer's mutex held.
func (q *request) wait(d time.Duration, done func() bool) (*closing, why) {
	q.longLived()
	timer := time.NewTimer(d)
	defer timer.Stop()
	for {
		ok, end, news := q.state(done)
		switch {
		case ok:
			return nil, met
		case end != nil:
			return end, timeout
		}
		select {
		case <-news:
		case <-timer.C:
			return nil, timeout
		case <-q.r.Context().Done():
			return nil, timeout
		case <-httpkit.Stopping(q.r.Context()):
			return nil, timeout
		}
	}
}
