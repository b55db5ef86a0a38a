// Package rig starts the product as separate processes on loopback, and lets a
// test kill, freeze and cut any of them: NATS servers, the services (some of them
// twice), workers behind a proxy each. It signals only what it started, by pid.
package rig

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
)

// Secrets of every rig: nothing of it is reachable from outside the machine.
const (
	JWTSecret    = "chaos-user-tokens-5d0f8c1b7e3a49622"
	WorkerSecret = "chaos-worker-tokens-0c7e5b2f9a1d438e"
	natsPassword = "chaos-nats-3f8e1d6b0a5c4792"
)

// Times of the deployment under test: short, so that runs are. A lease is long
// enough for a busy machine to confirm it.
const (
	LeaseSeconds     = 12
	HeartbeatSeconds = 2
	GraceSeconds     = 1 // stop.graceSeconds of the jobs
)

// Lease is how long a lease lasts without a confirmed heartbeat, and SelfStop when
// a worker stops its own jobs.
const (
	Lease    = LeaseSeconds * time.Second
	SelfStop = Lease * 3 / 4
)

// The services, those first that others wait for.
const (
	Persister = "registry-persister"
	Collector = "result-collector"
	Scheduler = "scheduler"
	Edge      = "worker-edge"
	Gateway   = "api-gateway"
)

// Options say what to start.
type Options struct {
	Dir         string // of this run; must exist
	BinDir      string // of the product's binaries, nats-server and chaosjob
	NATSServers int    // 1 or 3
	NATSDir     string // store of the first NATS server; default Dir/nats-0
	Workers     int
	Containers  bool      // jobs run in containers, of an engine of the rig's own (root)
	Sizes       bus.Sizes // of the streams
}

// Service is one process of the server.
type Service struct {
	*Process
	Kind          string
	Listen, Admin string
}

// Worker is a worker and the network before it.
type Worker struct {
	*Process
	ID    string
	Proxy *Proxy
	Dir   string
}

// Rig is a running product.
type Rig struct {
	Options  Options
	NATS     []*Process
	Services []*Service
	Engine   *Engine // nil where jobs are processes

	starter *starter
	name    string     // of this rig, in the ids of its workers
	rng     *rand.Rand // of ports
	urls    []string
	routes  map[route]*Proxy // between NATS servers
	turn    atomic.Uint64

	mu      sync.Mutex
	workers []*Worker
	made    int // workers ever
	crowds  []*Process
}

// New prepares a rig and starts nothing.
func New(o Options) (*Rig, error) {
	for _, dir := range []string{"logs", "journal/locks"} {
		if err := os.MkdirAll(filepath.Join(o.Dir, dir), 0o777); err != nil {
			return nil, err
		}
	}
	o.NATSServers = max(o.NATSServers, 1)
	if o.NATSDir == "" {
		o.NATSDir = filepath.Join(o.Dir, "nats-0")
	}
	r := &Rig{Options: o, starter: newStarter(), rng: rand.New(rand.NewPCG(uint64(os.Getpid()), uint64(time.Now().UnixNano())))}
	r.name = fmt.Sprintf("%08x", r.rng.Uint32())
	if err := r.configureNATS(); err != nil {
		return nil, err
	}
	if o.Containers {
		err := needsRoot()
		if err == nil {
			r.Engine, err = r.newEngine()
		}
		if err != nil {
			return nil, err
		}
	}
	for kind, copies := range map[string]int{Persister: 1, Collector: 1, Scheduler: 2, Edge: 2, Gateway: 2} {
		for i := range copies {
			if err := r.addService(kind, i); err != nil {
				return nil, err
			}
		}
	}
	order := []string{Persister, Collector, Scheduler, Edge, Gateway}
	slices.SortFunc(r.Services, func(a, b *Service) int {
		return 2*(slices.Index(order, a.Kind)-slices.Index(order, b.Kind)) + strings.Compare(a.Name, b.Name)
	})
	return r, nil
}

const natsConfig = `
server_name: n%d
listen: %q
jetstream { store_dir: %q, sync_interval: always, max_file_store: 10GB }
max_payload: 2MB
write_deadline: 10s
accounts {
  SYS: { exports: [ { service: "$SYS.REQ.SERVER.PING.JSZ", response: stream } ] }
  CMDEXEC: {
    jetstream: enabled
    users: [ { user: cmdexec, password: %q } ]
    imports: [ { service: { account: SYS, subject: "$SYS.REQ.SERVER.PING.JSZ" } } ]
  }
}
system_account: SYS
`

func (r *Rig) configureNATS() error {
	n := r.Options.NATSServers
	listens := make([]string, n)
	clusters := make([]string, n)
	for i := range n {
		for _, into := range []*string{&listens[i], &clusters[i]} {
			addr, err := r.freeAddr()
			if err != nil {
				return err
			}
			*into = addr
		}
		r.urls = append(r.urls, "nats://cmdexec:"+natsPassword+"@"+listens[i])
	}
	for i := range n {
		config := fmt.Sprintf(natsConfig, i, listens[i], r.storeDir(i), natsPassword)
		if n > 1 {
			routes, err := r.routesOf(i, clusters)
			if err != nil {
				return err
			}
			// Servers tell each other where others are; nobody is to go past the proxies.
			config += fmt.Sprintf("cluster { name: chaos, listen: %q, advertise: %q, routes: [ %s ] }\n", clusters[i], nowhere, strings.Join(routes, ", "))
		}
		name := fmt.Sprintf("nats-%d", i)
		file := filepath.Join(r.Options.Dir, name+".conf")
		if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
			return err
		}
		r.NATS = append(r.NATS, r.process(name, "nats-server", nil, "-c", file))
	}
	return nil
}

// SpareNATS starts a NATS server of its own on a store that no other one uses. The
// caller ends it.
func (r *Rig) SpareNATS(store string) (p *Process, url string, err error) {
	listen, err := r.freeAddr()
	if err != nil {
		return nil, "", err
	}
	name := "spare-" + filepath.Base(store)
	file := filepath.Join(r.Options.Dir, name+".conf")
	if err := os.WriteFile(file, fmt.Appendf(nil, natsConfig, 9, listen, store, natsPassword), 0o600); err != nil {
		return nil, "", err
	}
	p = r.process(name, "nats-server", nil, "-c", file)
	if err := os.RemoveAll(p.log); err != nil { // of an earlier one
		return nil, "", err
	}
	return p, "nats://cmdexec:" + natsPassword + "@" + listen, p.Start()
}

func (r *Rig) storeDir(i int) string {
	if i == 0 {
		return r.Options.NATSDir
	}
	return filepath.Join(r.Options.Dir, fmt.Sprintf("nats-%d", i))
}

// StoreDirs are the folders of the NATS servers' streams.
func (r *Rig) StoreDirs() []string {
	dirs := make([]string, r.Options.NATSServers)
	for i := range dirs {
		dirs[i] = r.storeDir(i)
	}
	return dirs
}

// NATSURL names all servers.
func (r *Rig) NATSURL() string { return strings.Join(r.urls, ",") }

// Database is the SQLite file.
func (r *Rig) Database() string { return filepath.Join(r.Options.Dir, "cmdexec.db") }

// JournalDir is where commands note their starts and stops.
func (r *Rig) JournalDir() string { return filepath.Join(r.Options.Dir, "journal") }

// Binary is the path of a program under test.
func (r *Rig) Binary(name string) string { return filepath.Join(r.Options.BinDir, name) }

func (r *Rig) process(name, binary string, env []string, args ...string) *Process {
	return &Process{
		Name: name, starter: r.starter, path: r.Binary(binary), args: args,
		env: append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + r.Options.Dir, "GORACE=halt_on_error=1"}, env...),
		log: filepath.Join(r.Options.Dir, "logs", name+".log"),
	}
}

func (r *Rig) durability() string {
	if r.Options.NATSServers > 1 {
		return string(bus.DurabilityReplicated)
	}
	return string(bus.DurabilityCommitted)
}

func (r *Rig) addService(kind string, i int) error {
	listen, err := r.freeAddr()
	if err != nil {
		return err
	}
	admin, err := r.freeAddr()
	if err != nil {
		return err
	}
	env := []string{
		"NATS_URL=" + r.NATSURL(), "DURABILITY=" + r.durability(), "SQLITE_PATH=" + r.Database(),
		"LISTEN_ADDR=" + listen, "ADMIN_ADDR=" + admin, "JWT_SECRET=" + JWTSecret, "WORKER_TOKEN_SECRET=" + WorkerSecret,
		"RATE_LIMIT_USER=off", "RATE_LIMIT_IP=off", fmt.Sprintf("LEASE_SECONDS=%d", LeaseSeconds),
		fmt.Sprintf("HEARTBEAT_SECONDS=%d", HeartbeatSeconds), "PURGE_GRACE_SECONDS=2", "IDEMPOTENCY_GRACE_SECONDS=20",
	}
	name := fmt.Sprintf("%s-%d", kind, i)
	r.Services = append(r.Services, &Service{Process: r.process(name, kind, env), Kind: kind, Listen: listen, Admin: admin})
	return nil
}

// given are the ports that the rigs of this process have: most are free until their
// program starts.
var given sync.Map

// freeAddr names a loopback address below the ports that the kernel gives to
// outgoing connections, so that it stays free while a process restarts.
func (r *Rig) freeAddr() (string, error) {
	for range 200 {
		port := 10_000 + r.rng.IntN(22_000)
		if _, taken := given.LoadOrStore(port, true); taken {
			continue
		}
		addr := fmt.Sprintf("127.0.0.1:%d", port)
		if ln, err := net.Listen("tcp", addr); err == nil {
			_ = ln.Close()
			return addr, nil
		}
	}
	return "", errors.New("no free port among 200")
}

// Start starts everything and returns when all of it is ready.
func (r *Rig) Start(ctx context.Context) error {
	for _, n := range r.NATS {
		if err := n.Start(); err != nil {
			return err
		}
	}
	if err := r.Apply(ctx); err != nil {
		return err
	}
	if r.Engine != nil {
		if err := r.Engine.start(ctx, r.Binary("chaosjob")); err != nil {
			return err
		}
	}
	for _, s := range r.Services {
		if err := s.Start(); err != nil {
			return err
		}
	}
	if err := r.Ready(ctx); err != nil {
		return err
	}
	for _, s := range r.Services {
		if !s.Running() { // it refuses something, and has said what
			return fmt.Errorf("%s has ended; see %s", s.Name, s.log)
		}
	}
	for range r.Options.Workers {
		if _, err := r.AddWorker(); err != nil {
			return err
		}
	}
	return nil
}

// Apply makes the streams. On one server that is done here, since only the
// library takes sizes; on three by the command, as an operator does it.
func (r *Rig) Apply(ctx context.Context) error {
	if r.Options.NATSServers > 1 {
		cmd := exec.CommandContext(ctx, r.Binary("cmdexec"), "bus", "apply")
		cmd.Env = []string{"NATS_URL=" + r.NATSURL(), "DURABILITY=" + r.durability(), "HOME=" + r.Options.Dir}
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("bus apply: %w: %s", err, out)
		}
		return nil
	}
	conn, err := r.Bus(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	return bus.Apply(ctx, conn, r.Options.Sizes)
}

// Bus connects to NATS as a service does.
func (r *Rig) Bus(ctx context.Context) (*bus.Conn, error) {
	return bus.Connect(ctx, bus.Options{URL: r.NATSURL(), Name: "chaos"})
}

// Ready waits until every service that runs says that it is ready.
func (r *Rig) Ready(ctx context.Context) error {
	for _, s := range r.Services {
		if !s.Running() {
			continue
		}
		if err := poll(ctx, func() error { return s.ready(ctx) }); err != nil {
			return fmt.Errorf("%s is not ready: %w", s.Name, err)
		}
	}
	return nil
}

func (s *Service) ready(ctx context.Context) error {
	_, err := s.page(ctx, "/readyz")
	return err
}

func (s *Service) page(ctx context.Context, path string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+s.Admin+path, nil)
	if err != nil {
		return "", err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	var text strings.Builder
	if _, err := copyLimited(&text, resp.Body); err != nil {
		return "", err
	}
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("%s: %s", resp.Status, strings.TrimSpace(text.String()))
	}
	return text.String(), nil
}

// poll asks again until there is no error or ctx ends.
func poll(ctx context.Context, check func() error) error {
	for {
		err := check()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Kind lists the copies of a service.
func (r *Rig) Kind(kind string) []*Service {
	return slices.DeleteFunc(slices.Clone(r.Services), func(s *Service) bool { return s.Kind != kind })
}

// Dial connects to a copy of a service that accepts, as an ingress does.
func (r *Rig) Dial(ctx context.Context, kind string) (net.Conn, error) {
	copies := r.Kind(kind)
	var dialer net.Dialer
	var lastErr error
	for range copies {
		s := copies[r.turn.Add(1)%uint64(len(copies))]
		conn, err := dialer.DialContext(ctx, "tcp", s.Listen)
		if err == nil {
			return conn, nil
		}
		lastErr = err
	}
	return nil, lastErr
}

// WorkerOptions are what is special about a worker. The zero value is nothing.
type WorkerOptions struct {
	Only     string        // value of its label "only"
	TokenAge time.Duration // how long ago its token was minted
	TokenFor time.Duration // that it was minted for; 0 for longer than any run
}

// AddWorker starts a new worker with an id and a folder of its own.
func (r *Rig) AddWorker() (*Worker, error) { return r.AddWorkerOf(WorkerOptions{}) }

// AddWorkerOf is AddWorker for a special one.
func (r *Rig) AddWorkerOf(o WorkerOptions) (*Worker, error) {
	r.mu.Lock()
	r.made++
	// A worker ends what runs under its id on its machine, so that rigs share none.
	id := fmt.Sprintf("worker-%s-%d", r.name, r.made)
	plain := r.made%3 == 0
	r.mu.Unlock()
	token, err := auth.MintWorker([]byte(WorkerSecret), id, cmp.Or(o.TokenFor, 20*time.Hour), time.Now().Add(-o.TokenAge))
	if err != nil {
		return nil, err
	}
	proxy, err := NewProxy(func(ctx context.Context) (net.Conn, error) { return r.Dial(ctx, Edge) })
	if err != nil {
		return nil, err
	}
	w := &Worker{ID: id, Proxy: proxy, Dir: filepath.Join(r.Options.Dir, id)}
	env := []string{
		"SERVER_URL=http://" + proxy.Addr(), tokenSetting + token, "WORKER_ID=" + id,
		"DATA_DIR=" + w.Dir, "ADMIN_ADDR=off", "SLOTS=6",
	}
	if r.Engine != nil {
		env = append(env, "EXECUTORS=docker", "DOCKER_HOST="+r.Engine.Host())
	} else {
		env = append(env, "EXECUTORS=process")
	}
	if o.Only != "" {
		env = append(env, "WORKER_LABELS=only:"+o.Only)
	} else if plain { // every third speaks plain HTTP
		env = append(env, "TRANSPORT=http")
	}
	w.Process = r.process(id, "worker", env)
	r.mu.Lock()
	r.workers = append(r.workers, w)
	r.mu.Unlock()
	return w, w.Start()
}

const tokenSetting = "WORKER_TOKEN="

// GiveToken gives a worker that does not run a new token, for its next start, and
// takes the one that it has kept, as its owner does.
func (w *Worker) GiveToken() error {
	token, err := auth.MintWorker([]byte(WorkerSecret), w.ID, 20*time.Hour, time.Now())
	if err != nil {
		return err
	}
	w.mu.Lock()
	for i, e := range w.env {
		if strings.HasPrefix(e, tokenSetting) {
			w.env[i] = tokenSetting + token
		}
	}
	w.mu.Unlock()
	return w.ForgetToken()
}

// ForgetToken takes the token from a worker that the server has sent it.
func (w *Worker) ForgetToken() error {
	err := os.Remove(filepath.Join(w.Dir, "worker-token"))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// Crowd starts so many idle workers, in one process, that connect to the edges
// themselves. They are no part of the rig but for Close.
func (r *Rig) Crowd(n int) (*Process, error) {
	secret := filepath.Join(r.Options.Dir, "worker-secret")
	if err := os.WriteFile(secret, []byte(WorkerSecret), 0o600); err != nil {
		return nil, err
	}
	r.mu.Lock()
	r.crowds = append(r.crowds, nil)
	number := len(r.crowds)
	r.mu.Unlock()
	name := fmt.Sprintf("crowd-%d", number)
	args := []string{"-n", strconv.Itoa(n), "-prefix", fmt.Sprintf("worker-%s-%s", r.name, name), "-secret", secret}
	for _, edge := range r.Kind(Edge) {
		args = append(args, edge.Listen)
	}
	p := r.process(name, "chaosworkers", nil, args...)
	r.mu.Lock()
	r.crowds[number-1] = p
	r.mu.Unlock()
	return p, p.Start()
}

// Workers lists the workers that are part of the rig.
func (r *Rig) Workers() []*Worker {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.workers)
}

// Forget takes a worker that will never return out of the rig.
func (r *Rig) Forget(w *Worker) {
	r.mu.Lock()
	r.workers = slices.DeleteFunc(r.workers, func(x *Worker) bool { return x == w })
	r.mu.Unlock()
	w.Proxy.Close()
}

// StartAll starts whatever does not run.
func (r *Rig) StartAll() error {
	var errs []error
	for _, p := range r.Processes() {
		errs = append(errs, p.Start())
	}
	return errors.Join(errs...)
}

// Processes lists everything, NATS first, then the engine, services, and workers.
func (r *Rig) Processes() []*Process {
	out := slices.Clone(r.NATS)
	if r.Engine != nil {
		out = append(out, r.Engine.Process)
	}
	for _, s := range r.Services {
		out = append(out, s.Process)
	}
	for _, w := range r.Workers() {
		out = append(out, w.Process)
	}
	return out
}

// PIDs of everything that runs.
func (r *Rig) PIDs() []int {
	var pids []int
	for _, p := range r.Processes() {
		if pid := p.PID(); pid > 0 {
			pids = append(pids, pid)
		}
	}
	return pids
}

// Stop stops everything in order and says what did not stop cleanly.
func (r *Rig) Stop() error {
	var errs []error
	for _, p := range slices.Backward(r.Processes()) {
		errs = append(errs, p.Stop(70*time.Second))
	}
	return errors.Join(errs...)
}

// Close ends whatever is left. It is harmless after Stop.
func (r *Rig) Close() {
	for _, w := range r.Workers() {
		if w.PID() > 0 {
			w.SignalTree(syscall.SIGCONT)
			_ = w.KillTree()
		}
		w.Proxy.Close()
	}
	for _, p := range r.crowds {
		_ = p.Kill()
	}
	if r.Engine != nil {
		r.Engine.close()
	}
	for _, p := range slices.Backward(r.Processes()) {
		_ = p.Kill()
	}
	for _, p := range r.routes {
		p.Close()
	}
	r.starter.close()
}
