package session

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/cmdexec/cmdexec/libs/core/fleet"
	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
	"github.com/cmdexec/cmdexec/libs/kit/lifecycle"
)

// Options of a Hub. All fields are needed unless they say otherwise.
type Options struct {
	Bus       Bus
	EdgeID    string
	Lease     time.Duration // of an assignment without a confirmed heartbeat
	Heartbeat time.Duration // what workers are asked for
	Secret    []byte        // signs the tokens that sessions hand out
	// MaxInflightBytes bounds output and results of all sessions together that
	// the bus does not have yet. Past it sessions stop reading.
	MaxInflightBytes int64
	Logger           *slog.Logger
	Metrics          *Metrics
}

// Hub holds the sessions of one edge.
type Hub struct {
	o      Options
	beater *beater
	budget *semaphore.Weighted
	writes *semaphore.Weighted // of registrations under way
	// base outlives the sessions: a publish that is under way when a session ends
	// is finished, and what a closed session still has to say is said.
	base context.Context

	mu       sync.Mutex
	open     bool
	sessions map[string]*Session // newest of each worker
	running  sync.WaitGroup      // sessions and their publishes
}

// How a hub stops.
const (
	endTimeout  = 5 * time.Second  // for the bus calls at the end of one session
	stopTimeout = 15 * time.Second // for all sessions
	maxGoaway   = 2 * time.Second  // by which workers spread their return
)

// maxWrites is how many registrations are written at once. When thousands of
// workers come together, more would only wait in the bus, which drops what is too
// much, until all of them have lost their patience and come again.
const maxWrites = 64

// ErrNotOpen is returned while the hub does not run.
var ErrNotOpen = errors.New("the edge is starting or stopping")

// NewHub makes a hub; it takes sessions while Run runs.
func NewHub(o Options) *Hub {
	return &Hub{
		o:        o,
		beater:   newBeater(o.EdgeID, o.Bus, o.Logger, o.Metrics),
		budget:   semaphore.NewWeighted(o.MaxInflightBytes),
		writes:   semaphore.NewWeighted(maxWrites),
		base:     context.Background(),
		sessions: map[string]*Session{},
	}
}

// Run takes sessions until ctx ends, then asks every worker to come back
// elsewhere, closes all sessions, and returns when their publishes are done and
// the scheduler knows. It may be called once.
func (h *Hub) Run(ctx context.Context) error {
	beats, stopBeats := context.WithCancel(context.WithoutCancel(ctx))
	beaten := make(chan struct{})
	go func() {
		defer close(beaten)
		h.beater.run(beats)
	}()
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		h.watch(ctx)
	}()

	h.mu.Lock()
	h.open = true
	h.mu.Unlock()
	<-ctx.Done()

	h.mu.Lock()
	h.open = false
	h.mu.Unlock()
	h.Dismiss("the edge stops")
	done := make(chan struct{})
	go func() {
		defer close(done)
		h.running.Wait()
	}()
	var err error
	timer := time.NewTimer(stopTimeout)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
		err = errors.New("sessions did not end in time")
	}
	stopBeats()
	<-beaten
	<-watched
	return err
}

// Dismiss asks every worker that is here to come back in a moment, here or
// elsewhere, and closes the sessions. It does not block.
func (h *Hub) Dismiss(reason string) {
	h.mu.Lock()
	sessions := make([]*Session, 0, len(h.sessions))
	for _, s := range h.sessions {
		sessions = append(sessions, s)
	}
	h.mu.Unlock()
	for _, s := range sessions {
		s.goaway(1001, reason, rand.N(maxGoaway))
	}
}

// Open reports whether sessions are taken.
func (h *Hub) Open() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.open
}

// Len is the number of workers with a session here.
func (h *Hub) Len() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.sessions)
}

// EdgeID is the id of this edge in registrations.
func (h *Hub) EdgeID() string { return h.o.EdgeID }

// Registered returns the newest registration of a worker, wherever its session
// is; the zero Worker where there is none.
func (h *Hub) Registered(ctx context.Context, workerID string) (fleet.Worker, error) {
	return h.o.Bus.Worker(ctx, workerID)
}

// Start makes the session of a worker that has said hello. It does not block:
// the session is still to be registered, and the worker's further messages may
// already be fed to it. The error is a *Violation, or ErrNotOpen.
func (h *Hub) Start(claims auth.WorkerClaims, hello *workerproto.Register, transport string, p Peer) (*Session, error) {
	now := time.Now()
	w, err := registration(claims.Subject, hello)
	if err != nil {
		return nil, err
	}
	w.Transport, w.EdgeID, w.Online = transport, h.o.EdgeID, true
	if transport == "http" {
		w.Backlog = 0 // it has room only while its poll is open
	}
	w.SessionID = id.New(id.Session, now)
	w.ConnectedAt, w.LastSeenAt = now.UTC(), now.UTC()
	s := newSession(h, w, hello, claims, p)

	h.mu.Lock()
	if !h.open {
		h.mu.Unlock()
		s.cancel()
		return nil, ErrNotOpen
	}
	older := h.sessions[w.ID]
	h.sessions[w.ID] = s
	h.running.Add(1)
	h.mu.Unlock()

	h.o.Metrics.Sessions.Inc()
	s.watchToken(now)
	go s.start(older, &w, hello.Running)
	return s, nil
}

func (h *Hub) remove(s *Session) {
	h.mu.Lock()
	if h.sessions[s.workerID] == s {
		delete(h.sessions, s.workerID)
	}
	h.mu.Unlock()
	h.o.Metrics.Sessions.Dec()
	h.running.Done()
}

// watch follows the registrations, to notice workers that came to another edge.
func (h *Hub) watch(ctx context.Context) {
	backoff := lifecycle.Backoff{Max: 5 * time.Second}
	for ctx.Err() == nil {
		started := time.Now()
		err := h.o.Bus.WatchWorkers(ctx, func(w fleet.Worker) {
			h.mu.Lock()
			s := h.sessions[w.ID]
			h.mu.Unlock()
			if s != nil && w.SessionID != s.id {
				s.contested()
			}
		})
		if ctx.Err() != nil {
			return
		}
		h.o.Logger.Warn("watch of workers ended; watching again", "err", err)
		if time.Since(started) > time.Minute {
			backoff.Reset()
		}
		_ = lifecycle.Sleep(ctx, backoff.Next()) // ends with ctx
	}
}

// registration checks a hello against the token's subject and gives the facts
// to be stored. The error is a *Violation.
func registration(workerID string, hello *workerproto.Register) (fleet.Worker, error) {
	w := fleet.Worker{
		ID: workerID, Hostname: hello.Hostname, OS: hello.OS, Arch: hello.Arch, CPUCores: hello.CPUCores, TotalMemory: hello.TotalMemory,
		Labels: hello.Labels, Executors: hello.Executors, Slots: hello.Slots, Backlog: hello.Backlog, Version: hello.Version, Protocol: hello.Protocol,
	}
	if w.Executors == nil {
		w.Executors = []string{}
	}
	switch {
	case hello.WorkerID != workerID:
		return w, &Violation{Code: workerproto.CloseToken, Reason: "the token is another worker's: workerId must be the token's subject"}
	case hello.Protocol < workerproto.MinVersion || hello.Protocol > workerproto.Version:
		return w, protocolError(protocolReason)
	case len(hello.Running) > workerproto.MaxRunning:
		return w, protocolError("too many leases in running")
	}
	for i := range hello.Running {
		if err := checkLease(&hello.Running[i].Lease); err != nil {
			return w, err
		}
	}
	if err := w.Validate(); err != nil {
		return w, protocolError("registration refused: " + err.Error())
	}
	return w, nil
}
