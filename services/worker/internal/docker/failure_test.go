package docker_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"

	"github.com/cmdexec/cmdexec/services/worker/internal/docker"
	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
)

// proxy stands before the engine and can hang: then it accepts, takes what it
// is sent, and never answers, on old connections and new ones.
type proxy struct {
	address string
	l       net.Listener
	mu      sync.Mutex
	hung    chan struct{} // closed while it works
	after   string        // hangs when it has passed on a request with this; may be empty
	conns   map[net.Conn]bool
	all     sync.WaitGroup
}

func newProxy(t *testing.T) *proxy {
	t.Helper()
	return newProxyOf(t, engineHost())
}

func newProxyOf(t *testing.T, host string) *proxy {
	t.Helper()
	target, ok := strings.CutPrefix(host, "unix://")
	if !ok {
		t.Skip("requires docker: the engine is not behind a unix socket")
	}
	dir, err := os.MkdirTemp("", "px") // t.TempDir is too long for a socket
	must(t, err)
	p := &proxy{address: "unix://" + dir + "/s", hung: make(chan struct{}), conns: map[net.Conn]bool{}}
	close(p.hung)
	p.l, err = net.Listen("unix", dir+"/s")
	must(t, err)
	p.all.Go(func() {
		for {
			c, err := p.l.Accept()
			if err != nil {
				return
			}
			p.serve(c, target)
		}
	})
	t.Cleanup(func() {
		_ = p.l.Close()
		p.resume()
		p.cut()
		p.all.Wait()
		_ = os.RemoveAll(dir)
	})
	return p
}

func (p *proxy) serve(c net.Conn, target string) {
	engine, err := net.Dial("unix", target)
	if err != nil {
		_ = c.Close()
		return
	}
	p.mu.Lock()
	p.conns[c], p.conns[engine] = true, true
	p.mu.Unlock()
	pipe := func(to, from net.Conn) {
		buf := make([]byte, 32<<10)
		taken := false // the request that it hangs after may come in parts
		for {
			n, err := from.Read(buf)
			if !taken {
				<-p.working()
			}
			if n > 0 {
				if _, err := to.Write(buf[:n]); err != nil {
					break
				}
				p.mu.Lock()
				if p.after != "" && bytes.Contains(buf[:n], []byte(p.after)) {
					p.after, p.hung, taken = "", make(chan struct{}), true
				}
				p.mu.Unlock()
			}
			if err != nil {
				break
			}
		}
		if u, ok := to.(*net.UnixConn); ok {
			_ = u.CloseWrite()
		}
	}
	var both sync.WaitGroup
	both.Go(func() { pipe(engine, c) })
	both.Go(func() { pipe(c, engine) })
	p.all.Go(func() {
		both.Wait()
		_ = errors.Join(c.Close(), engine.Close())
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.conns, c)
		delete(p.conns, engine)
	})
}

func (p *proxy) working() chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.hung
}

func (p *proxy) hang() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hung = make(chan struct{})
}

func (p *proxy) resume() {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.hung:
	default:
		close(p.hung)
	}
}

// cut breaks every connection there is.
func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		_ = c.Close()
	}
}

// impatient makes timeouts short enough for a test, but not for a slow machine.
func impatient(host string, call time.Duration) func(*docker.Options) {
	return func(o *docker.Options) {
		o.Host, o.CallTimeout, o.Patience, o.KillBound = host, call, 3*time.Second, 3*time.Second
	}
}

func TestEngineThatNeverAnswers(t *testing.T) {
	engine(t)
	p := newProxy(t)
	x := newExecutor(t, impatient(p.address, time.Second))
	must(t, x.Probe(t.Context()))
	p.hang()
	goroutines := 0
	for i := range 12 {
		began := time.Now()
		err := x.Probe(t.Context())
		if err == nil || !strings.Contains(err.Error(), "does not answer") || strings.Contains(err.Error(), "\n") {
			t.Fatalf("got %v", err)
		}
		if took := time.Since(began); took > 3*time.Second {
			t.Fatalf("took %v", took)
		}
		if i == 2 {
			goroutines = ownGoroutines()
		}
		if i == 5 { // whatever is asked of it
			if pe := refused(t, x, shell("true")); pe.Code != executor.CodeEngine || pe.Class != executor.ClassInfra {
				t.Fatalf("got %+v", pe)
			}
			if err := x.Reap(t.Context(), nil); err == nil {
				t.Fatal("reaped")
			}
		}
	}
	eventually(t, func() bool { return ownGoroutines() <= goroutines }, "goroutines grow")
	p.resume()
	must(t, x.Probe(t.Context()))
	if r := run(t, x, shell("exit 3")); r.code() != 3 {
		t.Fatal(r)
	}
}

// ownGoroutines counts those that are not of the proxy.
func ownGoroutines() int {
	buf := make([]byte, 1<<20)
	n := 0
	for _, stack := range strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
		if !strings.Contains(stack, "docker_test.(*proxy)") {
			n++
		}
	}
	return n
}

// hangAfter has the proxy hang when it has passed on the next request with this text.
func (p *proxy) hangAfter(text string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.after = text
}

// A request that was called off is taken by the engine all the same. What it makes is
// looked for soon, and not when leftovers usually are. Found by tests/chaos.
func TestWhatWasCalledOffIsLookedForSoon(t *testing.T) {
	api := engine(t)
	p := newProxy(t)
	x := newExecutor(t, impatient(p.address, time.Second))
	if r := run(t, x, shell("true")); r.code() != 0 || x.Untidy() {
		t.Fatalf("%v, untidy %v", r, x.Untidy())
	}
	p.hangAfter("/containers/create")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	spec := shell("true")
	prepared := make(chan error, 1)
	go func() {
		_, err := x.Prepare(ctx, spec)
		prepared <- err
	}()
	eventually(t, func() bool { return len(ofLease(t, api, spec.LeaseID)) == 1 }, "the engine makes no container")
	cancel()
	if err := <-prepared; err == nil {
		t.Fatal("prepared by an engine that does not answer")
	}
	if !x.Untidy() {
		t.Error("nobody would look for what the engine has made of it")
	}
	p.resume()
	must(t, x.Reap(t.Context(), nil))
	if left := ofLease(t, api, spec.LeaseID); len(left) != 0 {
		t.Fatalf("still there: %v", left)
	}
}

func TestEngineHangsWhileACommandRuns(t *testing.T) {
	api := engine(t)
	p := newProxy(t)
	x := newExecutor(t, impatient(p.address, 2*time.Second))

	// For a while: the job does not notice.
	spec := shell("echo started; sleep 2; exit 3")
	r := start(t, x, spec)
	r.says("started")
	p.hang()
	time.AfterFunc(2500*time.Millisecond, p.resume)
	if res := r.finish(); res.code() != 3 || res.Failure != "" {
		t.Fatal(res)
	}

	// For ever: an engine error, and what may still run is said.
	spec = shell("echo started; sleep 600")
	r = start(t, x, spec)
	r.says("started")
	p.hang()
	r.Stop(executor.StopCancel)
	began := time.Now()
	exit := r.Wait()
	if exit.Failure != executor.CodeEngine || exit.Code != nil || !exit.Survivors || exit.Stop == nil || !exit.Stop.GoneAt.IsZero() {
		t.Fatalf("%+v", exit)
	}
	if took := time.Since(began); took > 30*time.Second {
		t.Fatalf("took %v", took)
	}
	if r.Close() == nil {
		t.Fatal("closed what could not be removed")
	}
	// What is left goes when the engine is back.
	p.resume()
	must(t, x.Probe(t.Context()))
	must(t, x.Reap(t.Context(), nil))
	if left := ofLease(t, api, spec.LeaseID); len(left) != 0 {
		t.Fatalf("still there: %v", left)
	}
}

// The connections break, the engine lives: part of the output may be lost.
func TestConnectionsBreak(t *testing.T) {
	api := engine(t)
	p := newProxy(t)
	x := newExecutor(t, impatient(p.address, 5*time.Second))
	spec := shell("echo started; sleep 2; echo more; exit 0")
	r := start(t, x, spec)
	r.says("started")
	p.cut()
	res := r.finish()
	if res.Failure != executor.CodeEngine || res.Code != nil || res.Survivors || !strings.Contains(res.Reason, "engine") {
		t.Fatal(res)
	}
	if left := ofLease(t, api, spec.LeaseID); len(left) != 0 {
		t.Fatalf("still there: %v", left)
	}
}

// The start is never answered: nobody knows whether the command runs.
func TestStartIsNotAnswered(t *testing.T) {
	api := engine(t)
	p := newProxy(t)
	x := newExecutor(t, impatient(p.address, 2*time.Second))
	spec := shell("sleep 600")
	a, err := x.Prepare(t.Context(), spec)
	must(t, err)
	p.hang()
	time.AfterFunc(7*time.Second, p.resume)
	err = a.Start(io.Discard, io.Discard)
	if err == nil {
		exit := a.Wait()
		if exit.Failure != executor.CodeEngine || exit.Code != nil {
			t.Fatalf("%+v", exit)
		}
	} else if pe := executor.AsPrepareError(err); pe.Code != executor.CodeEngine {
		t.Fatalf("got %v", err)
	}
	eventually(t, func() bool { return a.Close() == nil }, "could not be closed")
	if left := ofLease(t, api, spec.LeaseID); len(left) != 0 {
		t.Fatalf("still there: %v", left)
	}
}

// ownEngine starts a dockerd that the test may kill. It returns its address,
// how to kill it, and how to start it again.
func ownEngine(t *testing.T, flags ...string) (host string, kill func(os.Signal), again func()) {
	t.Helper()
	if _, err := exec.LookPath("dockerd"); err != nil || os.Geteuid() != 0 {
		t.Skip("requires docker: no dockerd that could be started here (it needs root)")
	}
	script, err := filepath.Abs("../../../../.ci/docker.sh")
	must(t, err)
	dir, err := os.MkdirTemp("", "ce")
	must(t, err)
	t.Cleanup(func() {
		if out, err := exec.Command(script, "stop", dir).CombinedOutput(); err != nil {
			t.Errorf("stop the engine: %v\n%s", err, out)
		}
	})
	again = func() {
		t.Helper()
		for try := 1; ; try++ { // on a busy machine its containerd may be too slow for it
			out, err := exec.Command(script, append([]string{"start", dir}, flags...)...).CombinedOutput()
			if err == nil {
				return
			}
			if try == 3 {
				t.Fatalf("start an engine: %v\n%s", err, out)
			}
		}
	}
	again()
	kill = func(sig os.Signal) {
		t.Helper()
		data, err := os.ReadFile(filepath.Join(dir, "pid"))
		must(t, err)
		pid, err := strconv.Atoi(strings.TrimSpace(string(data)))
		must(t, err)
		dockerd, err := os.FindProcess(pid)
		must(t, err)
		must(t, dockerd.Signal(sig))
		eventually(t, func() bool {
			stat, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
			return err != nil || strings.Contains(string(stat), ") Z ")
		}, "the engine does not end")
	}
	return "unix://" + filepath.Join(dir, "docker.sock"), kill, again
}

func TestEngineRestarts(t *testing.T) {
	engine(t)
	for _, c := range []struct {
		name  string
		how   os.Signal
		flags []string
		warm  bool
	}{
		{"killed", syscall.SIGKILL, nil, false},
		{"killed, with live restore", syscall.SIGKILL, []string{"--live-restore"}, false},
		{"stopped", syscall.SIGTERM, nil, false},
		{"killed, warm", syscall.SIGKILL, nil, true},
		{"killed, with live restore, warm", syscall.SIGKILL, []string{"--live-restore"}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			host, kill, again := ownEngine(t, c.flags...)
			x := newExecutor(t, impatient(host, 5*time.Second), func(o *docker.Options) {
				if c.warm {
					warmly(o)
				}
			})
			must(t, x.Probe(t.Context()))
			// The second one would be a success if the engine's stopping it counted.
			var jobs []*running
			for _, command := range []string{"echo started; sleep 600", "trap 'exit 0' TERM; echo started; while :; do sleep 0.1; done"} {
				r := start(t, x, shell(command))
				r.says("started")
				jobs = append(jobs, r)
			}
			docker.Prime(t, x, shell("true")) // one more waits
			kill(c.how)
			for _, r := range jobs {
				exit := r.Wait()
				if exit.Failure != executor.CodeEngine || exit.Code != nil {
					t.Errorf("%+v", exit)
				}
				if err := r.Close(); err == nil && exit.Survivors {
					t.Error("closed what was not removed")
				}
			}
			eventually(t, func() bool { return x.Probe(t.Context()) != nil }, "the probe does not notice")
			again()
			eventually(t, func() bool { return x.Probe(t.Context()) == nil }, "the probe does not recover")
			must(t, x.Reap(t.Context(), nil))
			if r := run(t, x, shell("exit 3")); r.code() != 3 {
				t.Error(r)
			}
			must(t, x.Close())
			api, err := rawAPI(host)
			must(t, err)
			defer api.Close()
			left, err := api.ContainerList(context.Background(), container.ListOptions{All: true})
			if err != nil || len(left) != 0 {
				t.Errorf("left: %v %v", left, err)
			}
			volumes, err := api.VolumeList(context.Background(), volumeListOptions)
			if err != nil || len(volumes.Volumes) != 0 {
				t.Errorf("left: %v %v", volumes.Volumes, err)
			}
		})
	}
}
