package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/coder/websocket"

	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
	"github.com/cmdexec/cmdexec/libs/kit/lifecycle"
)

// fleetWord is the word by which this program starts itself once more as a fleet:
// a process of many workers that speak the worker protocol and execute nothing.
const fleetWord = "fleet"

// The times of a worker that connects again are those of services/worker.
const (
	fleetDial       = 10 * time.Second
	fleetMinBackoff = 100 * time.Millisecond
	fleetMaxBackoff = 15 * time.Second
	fleetSelfStop   = 45 * time.Second // without a confirmed heartbeat a worker kills its attempts
	fleetReport     = 50 * time.Millisecond
)

// fleetStatus is what a fleet says of itself, a line of JSON each.
type fleetStatus struct {
	Up       int       // workers that are welcome now
	LastUp   time.Time // when the last of them was
	Running  int       // attempts
	First    time.Time // when the first attempt came
	Last     time.Time // when the last one did
	Taken    int       // attempts that came, ever
	Stale    int       // leases that the edge called stale
	Lapsed   int       // leases that were not confirmed in time
	Repeated int       // attempts of a job that had one before
	Failed   string    // the last error that kept a worker away
}

// fleet is all workers of this process.
type fleet struct {
	edge string
	http *http.Client

	mu     sync.Mutex
	status fleetStatus
	jobs   map[string]bool // that had an attempt here
}

// runFleet is the program as a fleet. It reports to standard output; a line on
// standard input has all attempts end.
func runFleet(args []string) error {
	flags := flag.NewFlagSet(fleetWord, flag.ContinueOnError)
	n := flags.Int("n", 1, "workers")
	slots := flags.Int("slots", 1, "of each")
	kinds := flags.Int("kinds", 1, "of labels: a worker has the label kind, from 0")
	busy := flags.Int("busy", 0, "workers that besides have the label busy")
	edge := flags.String("edge", "", "address")
	if err := flags.Parse(args); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var dials atomic.Uint32
	f := &fleet{edge: "ws://" + *edge + workerproto.PathConnect, jobs: map[string]bool{}}
	f.http = &http.Client{Transport: &http.Transport{
		ReadBufferSize: 1 << 10, WriteBufferSize: 1 << 10, DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			// Each has an address of its own, as machines have.
			i := dials.Add(1)
			from := net.TCPAddr{IP: net.IPv4(127, 9, byte(i/250), byte(i%250+1))}
			return (&net.Dialer{Timeout: fleetDial, LocalAddr: &from}).DialContext(ctx, network, addr)
		},
	}}
	workers := make([]*fleetWorker, *n)
	for i := range workers {
		w := &fleetWorker{fleet: f, id: fmt.Sprintf("worker-fleet-%d", i), slots: *slots, leases: map[string]*fleetLease{}}
		w.labels = map[string]string{"kind": fmt.Sprint(i % *kinds)}
		if i < *busy {
			w.labels["busy"] = "yes"
		}
		var err error
		if w.token, err = auth.MintWorker([]byte(workerSecret), w.id, time.Hour, time.Now()); err != nil {
			return err
		}
		workers[i] = w
	}
	var all sync.WaitGroup
	for _, w := range workers {
		all.Go(func() { w.live(ctx) })
	}
	go func() {
		for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
			for _, w := range workers {
				w.finish(ctx)
			}
		}
	}()
	tick := time.NewTicker(fleetReport)
	defer tick.Stop()
	for out := json.NewEncoder(os.Stdout); ctx.Err() == nil; {
		f.mu.Lock()
		s := f.status
		f.mu.Unlock()
		if err := out.Encode(s); err != nil {
			stop() // nobody listens any more
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
	all.Wait()
	return nil
}

func (f *fleet) note(change func(*fleetStatus)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(&f.status)
}

// fleetWorker is one of them.
type fleetWorker struct {
	fleet     *fleet
	id, token string
	labels    map[string]string
	slots     int

	mu     sync.Mutex
	ws     *websocket.Conn // of the session that is welcome
	leases map[string]*fleetLease
	beats  map[int64]time.Time // heartbeats of this session that were not answered
	beat   int64
}

// fleetLease is an attempt that a worker pretends to run.
type fleetLease struct {
	workerproto.Lease
	confirmed time.Time // when the heartbeat was sent that confirmed it last
}

func (w *fleetWorker) live(ctx context.Context) {
	backoff := lifecycle.Backoff{Min: fleetMinBackoff, Max: fleetMaxBackoff}
	for ctx.Err() == nil {
		if err := w.session(ctx, &backoff); err != nil && ctx.Err() == nil {
			w.fleet.note(func(s *fleetStatus) { s.Failed = err.Error() })
		}
		_ = lifecycle.Sleep(ctx, backoff.Next()) // the loop looks at ctx
	}
}

// session connects, and keeps the connection until it is lost.
func (w *fleetWorker) session(ctx context.Context, backoff *lifecycle.Backoff) error {
	dial, cancel := context.WithTimeout(ctx, fleetDial)
	ws, _, err := websocket.Dial(dial, w.fleet.edge, &websocket.DialOptions{
		HTTPClient: w.fleet.http, HTTPHeader: http.Header{workerproto.TokenHeader: {w.token}},
		Subprotocols: []string{workerproto.Subprotocol}, CompressionMode: websocket.CompressionDisabled,
	})
	cancel()
	if err != nil {
		return err
	}
	defer func() { _ = ws.CloseNow() }()
	ws.SetReadLimit(workerproto.MaxFrameBytes)
	if err := w.send(ctx, ws, workerproto.TypeHello, w.hello()); err != nil {
		return err
	}
	defer w.lost()
	for {
		_, frame, err := ws.Read(ctx)
		if err != nil {
			return err
		}
		if err := w.take(ctx, ws, frame, backoff); err != nil {
			return err
		}
	}
}

func (w *fleetWorker) send(ctx context.Context, ws *websocket.Conn, t workerproto.Type, body any) error {
	data, err := workerproto.Encode(t, body)
	if err != nil {
		return err
	}
	return ws.Write(ctx, websocket.MessageText, data)
}

func (w *fleetWorker) hello() workerproto.Register {
	w.mu.Lock()
	defer w.mu.Unlock()
	r := workerproto.Register{
		WorkerID: w.id, Hostname: "fleet", OS: "linux", Arch: "amd64", CPUCores: float64(w.slots), TotalMemory: int64(w.slots) << 30, Labels: w.labels,
		Executors: []string{job.ExecutorProcess}, Slots: w.slots, Version: "load", Protocol: workerproto.Version, Running: []workerproto.RunningLease{},
	}
	for _, l := range w.leases {
		r.Running = append(r.Running, workerproto.RunningLease{Lease: l.Lease})
	}
	return r
}

func (w *fleetWorker) take(ctx context.Context, ws *websocket.Conn, frame []byte, backoff *lifecycle.Backoff) error {
	t, err := workerproto.TypeOf(frame)
	if err != nil {
		return err
	}
	switch t {
	case workerproto.TypeWelcome:
		var m workerproto.Welcome
		if err := workerproto.Decode(frame, &m); err != nil {
			return err
		}
		backoff.Reset()
		w.stale(m.Stale)
		w.welcome(ctx, ws, time.Duration(m.HeartbeatSeconds)*time.Second)
	case workerproto.TypeBeat:
		var m workerproto.Beat
		if err := workerproto.Decode(frame, &m); err != nil {
			return err
		}
		w.confirm(&m)
	case workerproto.TypeStale:
		var m workerproto.Stale
		if err := workerproto.Decode(frame, &m); err != nil {
			return err
		}
		w.stale(m.Leases)
	case workerproto.TypeAssign:
		var m workerproto.Assign
		if err := workerproto.Decode(frame, &m); err != nil {
			return err
		}
		return w.assigned(ctx, ws, m.Assignments)
	case workerproto.TypeAck:
		var m workerproto.Ack
		if err := workerproto.Decode(frame, &m); err != nil {
			return err
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		for _, l := range m.Results {
			w.forget(l.LeaseID)
		}
	}
	return nil
}

// forget lets go of a lease and reports whether it was there. mu is held.
func (w *fleetWorker) forget(leaseID string) bool {
	if w.leases[leaseID] == nil {
		return false
	}
	delete(w.leases, leaseID)
	w.fleet.note(func(s *fleetStatus) { s.Running-- })
	return true
}

func (w *fleetWorker) stale(leases []workerproto.Lease) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, l := range leases {
		if w.forget(l.LeaseID) {
			w.fleet.note(func(s *fleetStatus) { s.Stale++ })
		}
	}
}

// welcome begins the heartbeats of a session.
func (w *fleetWorker) welcome(ctx context.Context, ws *websocket.Conn, every time.Duration) {
	w.mu.Lock()
	w.ws, w.beats = ws, map[int64]time.Time{}
	w.mu.Unlock()
	w.fleet.note(func(s *fleetStatus) { s.Up, s.LastUp = s.Up+1, time.Now() })
	go func() {
		tick := time.NewTicker(every)
		defer tick.Stop()
		pinged := time.Now()
		for w.heartbeat(ctx, ws) {
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
			if time.Since(pinged) < workerproto.PingInterval {
				continue
			}
			pinged = time.Now()
			pong, cancel := context.WithTimeout(ctx, workerproto.PongTimeout)
			err := ws.Ping(pong)
			cancel()
			if err != nil {
				_ = ws.CloseNow()
				return
			}
		}
	}()
}

func (w *fleetWorker) lost() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ws != nil {
		w.ws = nil
		w.fleet.note(func(s *fleetStatus) { s.Up-- })
	}
}

// heartbeat sends one; false when the session is over. Attempts that were not
// confirmed in time are given up, as a worker does.
func (w *fleetWorker) heartbeat(ctx context.Context, ws *websocket.Conn) bool {
	now := time.Now()
	w.mu.Lock()
	if w.ws != ws {
		w.mu.Unlock()
		return false
	}
	w.beat++
	w.beats[w.beat] = now
	h := workerproto.Heartbeat{ID: w.beat, Status: workerproto.StatusIdle, FreeSlots: w.slots - len(w.leases), Running: []workerproto.PhaseLease{}}
	for id, l := range w.leases {
		if now.Sub(l.confirmed) > fleetSelfStop && w.forget(id) {
			w.fleet.note(func(s *fleetStatus) { s.Lapsed++ })
			continue
		}
		h.Status = workerproto.StatusBusy
		h.Running = append(h.Running, workerproto.PhaseLease{Lease: l.Lease, Phase: workerproto.PhaseStarted})
	}
	w.mu.Unlock()
	return w.send(ctx, ws, workerproto.TypeHeartbeat, h) == nil
}

// confirm takes in the answer to a heartbeat.
func (w *fleetWorker) confirm(m *workerproto.Beat) {
	w.mu.Lock()
	sent, asked := w.beats[m.ID]
	delete(w.beats, m.ID)
	for _, id := range m.Confirmed {
		if l := w.leases[id]; l != nil && asked {
			l.confirmed = sent
		}
	}
	w.mu.Unlock()
	stale := make([]workerproto.Lease, len(m.Stale))
	for i, id := range m.Stale {
		stale[i].LeaseID = id
	}
	w.stale(stale)
}

// assigned takes attempts and says that they run.
func (w *fleetWorker) assigned(ctx context.Context, ws *websocket.Conn, as []workerproto.Assignment) error {
	for i := range as {
		l, now := as[i].Lease, time.Now()
		w.mu.Lock()
		known := w.leases[l.LeaseID] != nil
		if !known {
			w.leases[l.LeaseID] = &fleetLease{Lease: l, confirmed: now}
		}
		w.mu.Unlock()
		if known {
			continue
		}
		w.fleet.mu.Lock()
		s := &w.fleet.status
		if s.Taken++; s.Taken == 1 {
			s.First = now
		}
		s.Last = now
		s.Running++
		if w.fleet.jobs[l.JobID] {
			s.Repeated++
		}
		w.fleet.jobs[l.JobID] = true
		w.fleet.mu.Unlock()
		err := errors.Join(
			w.send(ctx, ws, workerproto.TypeAccepted, workerproto.Progress{Lease: l, At: now.UTC()}),
			w.send(ctx, ws, workerproto.TypeStarted, workerproto.Progress{Lease: l, At: now.UTC()}))
		if err != nil {
			return err
		}
	}
	return nil
}

// finish reports that all attempts have succeeded.
func (w *fleetWorker) finish(ctx context.Context) {
	w.mu.Lock()
	ws := w.ws
	var ended []workerproto.Lease
	for _, l := range w.leases {
		ended = append(ended, l.Lease)
	}
	w.mu.Unlock()
	if ws == nil {
		return
	}
	for _, l := range ended {
		now, zero := time.Now().UTC(), 0
		_ = w.send(ctx, ws, workerproto.TypeResult, workerproto.Result{ // a session that is lost has its attempts stay
			Lease: l, Outcome: job.OutcomeSucceeded, ExitCode: &zero, AcceptedAt: now, StartedAt: now, FinishedAt: now,
			Manifest: &job.Manifest{},
		})
	}
}
