package sim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
	"github.com/cmdexec/cmdexec/libs/kit/config"
	"github.com/cmdexec/cmdexec/libs/kit/lifecycle"
	gateway "github.com/cmdexec/cmdexec/services/api-gateway"
	persister "github.com/cmdexec/cmdexec/services/registry-persister"
	collector "github.com/cmdexec/cmdexec/services/result-collector"
	"github.com/cmdexec/cmdexec/services/scheduler"
	edge "github.com/cmdexec/cmdexec/services/worker-edge"
	"github.com/cmdexec/cmdexec/tests/sim/natsim"
)

// The leases of a run, in the ratio of the product's.
const (
	leaseSeconds = 8
	beatSeconds  = 2
	lease        = leaseSeconds * time.Second
	selfStop     = lease / 4 * 3
)

const (
	userSecret   = "fJ3k9sPq0vX7tYz2LmN8bWc5RdE1hGu6"
	workerSecret = "Zq8mW2xR5vT7nB4kL9pS1dF6gH3jC0aY"
)

// source returns the random numbers of one actor of a seed. What one actor draws
// does not depend on what the others do.
func source(seed int64, actor string) *rand.Rand {
	h := fnv.New64a()
	_, _ = h.Write([]byte(actor)) // never fails
	return rand.New(rand.NewPCG(uint64(seed), h.Sum64()))
}

// between draws a duration.
func between(r *rand.Rand, least, most time.Duration) time.Duration {
	return least + time.Duration(r.Int64N(int64(most-least)+1))
}

func chance(r *rand.Rand, p float64) bool { return r.Float64() < p }

// world is one run.
type world struct {
	seed   int64
	oracle *oracle
	nats   *natsim.Server
	log    *slog.Logger
	all    sync.WaitGroup // of everything that must end before the run does

	net   *network
	front *front
	calm  atomic.Bool   // no more faults: everything heals
	over  chan struct{} // closed when nobody needs to look any more
	// watching is how many clients have not seen the ends of all their jobs.
	watching atomic.Int64
	procs    []*process
	names    map[string]*process
}

// network decides how long messages are on their way.
type network struct {
	seed int64

	mu    sync.Mutex
	rands map[string]*rand.Rand
	slow  map[string]time.Duration // of a dialer's links, drawn once
	stall map[string]time.Time     // nothing arrives over a link before
	calm  bool
}

func (n *network) source(name string) *rand.Rand {
	r := n.rands[name]
	if r == nil {
		r = source(n.seed, "link "+name)
		n.rands[name] = r
	}
	return r
}

// delay is mostly short, sometimes not.
func (n *network) delay(dialer string, d natsim.Direction) time.Duration {
	n.mu.Lock()
	defer n.mu.Unlock()
	name := dialer + " " + string(d)
	r := n.source(name)
	if n.calm {
		return between(r, 50*time.Microsecond, 500*time.Microsecond)
	}
	most, ok := n.slow[name]
	if !ok {
		most = []time.Duration{500 * time.Microsecond, 2 * time.Millisecond, 10 * time.Millisecond, 60 * time.Millisecond}[r.IntN(4)]
		n.slow[name] = most
	}
	delay := between(r, 50*time.Microsecond, most)
	if chance(r, 0.002) {
		delay += between(r, 100*time.Millisecond, 3*time.Second)
	}
	return max(delay, time.Until(n.stall[name]))
}

func (n *network) holdUp(name string, d time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.stall[name] = time.Now().Add(d)
}

func (n *network) heal() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.calm, n.stall = true, map[string]time.Time{}
}

func newWorld(seed int64, f *front, log *slog.Logger) *world {
	w := &world{
		seed: seed, oracle: newOracle(), log: log, front: f, over: make(chan struct{}), names: map[string]*process{},
		net: &network{seed: seed, rands: map[string]*rand.Rand{}, slow: map[string]time.Duration{}, stall: map[string]time.Time{}},
	}
	again, arrives := source(seed, "again"), source(seed, "arrives")
	w.nats = natsim.New(natsim.Options{
		Delay: w.net.delay,
		Again: func(string, string) (time.Duration, bool) {
			if w.calm.Load() || !chance(again, 0.1) {
				return 0, false
			}
			return between(again, 0, 4*time.Second), true
		},
		Arrives: func() bool { return chance(arrives, 0.5) },
		Stored:  w.oracle.stored, Purged: w.oracle.purged,
	})
	for _, name := range []string{"edge", "scheduler-1", "scheduler-2", "collector", "persister"} {
		p := &process{w: w, name: name, kind: name}
		if p.kind == "scheduler-1" || p.kind == "scheduler-2" {
			p.kind = "scheduler"
		}
		w.procs = append(w.procs, p)
		w.names[name] = p
	}
	g := &process{w: w, name: "gateway", kind: "gateway"}
	w.procs = append(w.procs, g)
	w.names["gateway"] = g
	return w
}

// front is the gateway. It takes long to make (its API document), so that it
// serves one seed after the other and finds another NATS at each. A kill of it, which
// has no state, is a cut of its connection and of all that it was answering.
type front struct {
	dialer  atomic.Pointer[natsim.Dialer]
	handler atomic.Pointer[http.Handler]
}

// InProcessConn connects to the NATS of the seed that runs.
func (f *front) InProcessConn() (net.Conn, error) {
	if d := f.dialer.Load(); d != nil {
		return d.InProcessConn()
	}
	return nil, errNoServer
}

// run runs a gateway until ctx ends.
func (f *front) run(ctx context.Context, log *slog.Logger) error {
	conn, err := bus.Connect(ctx, bus.Options{InProcess: f, Name: "gateway", Logger: log})
	if err != nil {
		return err
	}
	defer conn.Close()
	g, err := gateway.New(gateway.Config{JWTSecret: userSecret}, gateway.Deps{Bus: conn, Logger: log})
	if err != nil {
		return err
	}
	h := g.Handler()
	f.handler.Store(&h)
	return g.Run(ctx)
}

// process is one service of the product, which may be killed and started again.
type process struct {
	w    *world
	name string
	kind string

	mu      sync.Mutex
	life    *life
	started int
}

// life is a process from a start to its end.
type life struct {
	dialer  *natsim.Dialer
	dead    chan struct{} // closed when it is killed
	kill    func()
	stop    context.CancelFunc
	done    chan struct{}
	handler *atomic.Pointer[http.Handler] // of gateway and edge
}

// start starts the process.
func (p *process) start() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.started++
	ctx, stop := context.WithCancel(context.Background())
	l := &life{dialer: p.w.nats.Dialer(p.name), dead: make(chan struct{}), stop: stop, done: make(chan struct{}), handler: &atomic.Pointer[http.Handler]{}}
	// What was killed does nothing that others can see: its connection is cut for
	// ever first, then what is left of it is told to end.
	l.kill = sync.OnceFunc(func() {
		close(l.dead)
		l.dialer.Kill()
		stop()
	})
	p.life = l
	if p.kind == "gateway" {
		l.handler = &p.w.front.handler
		p.w.front.dialer.Store(l.dialer)
		close(l.done)
		return
	}
	waits := source(p.w.seed, fmt.Sprintf("database %s %d", p.name, p.started))
	var mu sync.Mutex
	db := &handle{db: p.w.oracle.db, dead: l.dead, wait: func() time.Duration {
		mu.Lock()
		defer mu.Unlock()
		if !p.w.calm.Load() && chance(waits, 0.02) {
			return between(waits, 100*time.Millisecond, 4*time.Second)
		}
		return between(waits, 100*time.Microsecond, 5*time.Millisecond)
	}}
	p.w.all.Go(func() {
		defer close(l.done)
		if err := p.run(ctx, l, db); err != nil && ctx.Err() == nil {
			p.w.oracle.wrong("%s ended by itself: %v", p.name, err)
		}
	})
}

type service interface{ Run(context.Context) error }

func (p *process) run(ctx context.Context, l *life, db *handle) error {
	log := p.w.log.With("process", p.name)
	conn, err := bus.Connect(ctx, bus.Options{InProcess: l.dialer, Name: p.name, Logger: log})
	if err != nil {
		return err
	}
	defer conn.Close()
	var s service
	var h http.Handler
	switch p.kind {
	case "edge":
		var e *edge.Service
		if e, err = edge.New(edge.Config{LeaseSeconds: leaseSeconds, HeartbeatSeconds: beatSeconds},
			edge.Deps{Bus: conn, WorkerTokenSecret: config.Secret(workerSecret), Logger: log}); err == nil {
			s, h = e, e.Handler()
		}
	case "scheduler":
		s, err = scheduler.New(scheduler.Config{LeaseSeconds: leaseSeconds, HeartbeatSeconds: beatSeconds}, scheduler.Deps{Bus: conn, Logger: log})
	case "collector":
		s, err = collector.New(collector.Deps{Bus: conn, Store: db, Logger: log})
	case "persister":
		s, err = persister.New(persister.Config{PurgeGraceSeconds: 1, IdempotencyGraceSeconds: 4}, persister.Deps{Bus: conn, Store: db, Logger: log})
	}
	if err != nil {
		return err
	}
	if h != nil {
		l.handler.Store(&h)
		defer l.handler.Store(nil)
	}
	return s.Run(ctx)
}

func (p *process) current() *life {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.life
}

// down ends the process, by kill or in order, and starts it again after a while.
func (p *process) down(kill bool, pause time.Duration) {
	l := p.current()
	if kill || p.kind == "gateway" {
		l.kill()
	} else {
		l.stop()
		<-l.done
	}
	pass(pause)
	p.start()
}

var (
	errNoServer = errors.New("nobody answers")
	errTimeout  = errors.New("no answer in time")
)

// answer is what a process said.
type answer struct {
	status int
	header http.Header
	body   []byte
}

// call sends a request to a process. Either way may take a while, and either may be
// lost, so that a request without an answer was served or not.
func (w *world) call(ctx context.Context, r *rand.Rand, p *process, method, target string, header http.Header, body []byte, timeout time.Duration) (answer, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var lostThere, lostBack bool
	there, back := between(r, 0, 5*time.Millisecond), between(r, 0, 5*time.Millisecond)
	if !w.calm.Load() {
		lostThere, lostBack = chance(r, 0.01), chance(r, 0.02)
		if chance(r, 0.02) {
			there = between(r, 0, 3*time.Second)
		}
		if chance(r, 0.02) {
			back = between(r, 0, 3*time.Second)
		}
	}
	if lifecycle.Sleep(ctx, there) != nil {
		return answer{}, errTimeout
	}
	l := p.current()
	if l == nil || l.handler.Load() == nil || lostThere {
		_ = lifecycle.Sleep(ctx, time.Millisecond) // a refused connection takes a moment
		return answer{}, errNoServer
	}
	req, err := http.NewRequestWithContext(ctx, method, target, bytes.NewReader(body))
	if err != nil {
		return answer{}, err
	}
	req.Header, req.RemoteAddr = header.Clone(), "192.0.2.1:1234"
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	rec := httptest.NewRecorder()
	served := make(chan struct{})
	w.all.Go(func() {
		defer close(served)
		(*l.handler.Load()).ServeHTTP(rec, req)
	})
	select {
	case <-served:
	case <-l.dead:
		cancel()
		<-served
		return answer{}, errNoServer
	case <-ctx.Done():
		<-served
		return answer{}, errTimeout
	}
	if lostBack || lifecycle.Sleep(ctx, back) != nil {
		return answer{}, errTimeout
	}
	select {
	case <-l.dead:
		return answer{}, errNoServer
	default:
	}
	return answer{status: rec.Code, header: rec.Header(), body: rec.Body.Bytes()}, nil
}

// faults of a seed.
func (w *world) breakThings(workers []*worker) {
	r := source(w.seed, "faults")
	var healing sync.WaitGroup
	defer healing.Wait()
	for range 2 + r.IntN(5) {
		pass(between(r, 200*time.Millisecond, 3*time.Second))
		p := w.procs[r.IntN(len(w.procs))]
		pause := between(r, 100*time.Millisecond, 4*time.Second)
		kind := r.IntN(13)
		w.log.Info("fault", "kind", kind, "process", p.name, "pause", pause)
		switch kind {
		case 0, 1, 2, 3:
			p.down(true, pause)
		case 4:
			p.down(false, pause/4)
		case 5:
			p.current().dialer.Cut()
		case 6:
			w.net.holdUp(p.name+" up", 2*pause)
		case 7:
			w.net.holdUp(p.name+" down", 2*pause)
		case 8, 9:
			w.nats.Stop()
			ghosts := chance(r, 0.7)
			if chance(r, 0.3) { // and the sweep has to wait
				w.oracle.db.away(between(r, 0, 20*time.Second))
			}
			pass(pause / 3)
			w.nats.Start(func(stream string, m natsim.Message) bool {
				return ghosts && chance(r, 0.7) && w.oracle.back(stream, m)
			})
		case 10:
			w.oracle.db.away(2 * pause)
		case 11:
			x := workers[r.IntN(len(workers))]
			healing.Go(func() { x.crash(pause) })
		case 12:
			workers[r.IntN(len(workers))].cutOff(4 * pause)
		}
	}
}

// topology makes the streams, as an operator does once.
func (w *world) topology() error {
	conn, err := bus.Connect(context.Background(), bus.Options{InProcess: w.nats.Dialer("operator"), Name: "operator"})
	if err != nil {
		return err
	}
	defer conn.Close()
	return bus.Apply(context.Background(), conn, bus.Sizes{Jobs: 64 << 20, Results: 64 << 20, Logs: 64 << 20})
}

// simulate runs a seed and returns what is wrong.
func simulate(seed int64, f *front, log *slog.Logger) []string {
	w := newWorld(seed, f, log)
	served, stopNATS := context.WithCancel(context.Background())
	var nats sync.WaitGroup
	nats.Go(func() { w.nats.Run(served) })
	defer func() {
		w.all.Wait()
		stopNATS()
		nats.Wait()
	}()
	if err := w.topology(); err != nil {
		return []string{"the streams could not be made: " + err.Error()}
	}
	for _, p := range w.procs {
		p.start()
	}
	ctx, cancel := context.WithCancel(context.Background())
	var workers []*worker
	var active, clients sync.WaitGroup
	for i := range 3 {
		x := newWorker(w, fmt.Sprintf("worker-%d", i+1))
		workers = append(workers, x)
		active.Go(func() { x.run(ctx) })
	}
	for i := range 2 {
		c := &client{w: w, name: fmt.Sprintf("client-%d", i+1), r: source(seed, fmt.Sprintf("client-%d", i+1))}
		w.watching.Add(1)
		clients.Go(func() {
			defer w.watching.Add(-1)
			c.run()
		})
	}
	w.breakThings(workers)
	w.net.heal()
	w.calm.Store(true)

	what := "nothing was looked at"
	for end := time.Now().Add(3 * time.Minute); time.Now().Before(end) && what != ""; {
		pass(250 * time.Millisecond)
		if what = "a client is not content"; w.watching.Load() == 0 {
			what = w.oracle.quiet(w.nats)
		}
	}
	if what != "" {
		w.oracle.wrong("three minutes after the last fault %s, %s; the gateway says: %s", what, w.oracle.quiet(w.nats), w.explain())
	}
	close(w.over)
	clients.Wait()
	cancel()
	active.Wait()
	f.dialer.Store(nil)
	w.names["gateway"].current().dialer.Kill()
	for _, p := range w.procs {
		p.current().stop()
	}
	w.all.Wait()
	if what == "" {
		w.oracle.final()
	}
	return w.oracle.problems
}

// explain asks why the oldest job that is left is where it is.
func (w *world) explain() string {
	token, err := auth.MintUser([]byte(userSecret), "operator", auth.RoleAdmin, time.Hour, time.Now())
	left := w.nats.Messages(registryStream)
	if err != nil || len(left) == 0 {
		return "nothing"
	}
	target := "/api/jobs/" + left[0].Subject[strings.LastIndexByte(left[0].Subject, '.')+1:] + "/explain"
	a, err := w.call(context.Background(), source(w.seed, "operator"), w.names["gateway"], http.MethodGet, target,
		http.Header{"Authorization": {"Bearer " + token}}, nil, 10*time.Second)
	if err != nil {
		return err.Error()
	}
	return string(a.body)
}

// logger writes to a test where it is asked to.
func logger(t *testing.T, verbose bool) *slog.Logger {
	if !verbose {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelInfo}))
}
