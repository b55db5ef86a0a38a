//go:build unix

package worker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/config"
	"github.com/cmdexec/cmdexec/libs/kit/lifecycle"
	"github.com/cmdexec/cmdexec/services/worker/internal/edgetest"
)

// childVar makes the test binary a worker.
const childVar = "CMDEXEC_TEST_WORKER"

func TestMain(m *testing.M) {
	if os.Getenv(childVar) != "" {
		if err := child(os.Exit); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

func child(exit func(int)) error {
	ctx, stop := lifecycle.SignalContext(context.Background(), exit)
	defer stop()
	cfg, err := config.Load[Config]()
	if err != nil {
		return err
	}
	s, err := New(ctx, cfg, Deps{Logger: slog.New(slog.NewTextHandler(os.Stderr, nil))})
	if err != nil {
		return err
	}
	return s.Run(ctx)
}

// life is a worker in a process of its own.
type life struct {
	t   *testing.T
	cmd *exec.Cmd
	out *bytes.Buffer
}

func start(t *testing.T, e *edgetest.Edge, dir string, env ...string) *life {
	t.Helper()
	l := &life{t: t, cmd: exec.Command(os.Args[0]), out: &bytes.Buffer{}}
	l.cmd.Env = []string{
		childVar + "=1", "PATH=" + os.Getenv("PATH"), "HOME=" + dir, "SERVER_URL=" + e.Server.URL, "DATA_DIR=" + dir,
		"WORKER_TOKEN_SECRET=" + testSecret, "WORKER_ID=worker-1", "EXECUTORS=process", "SLOTS=4",
	}
	l.cmd.Env = append(l.cmd.Env, env...)
	l.cmd.Stderr = l.out
	if err := l.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if l.cmd.ProcessState == nil {
			_ = l.cmd.Process.Kill()
			_ = l.cmd.Wait()
		}
		if t.Failed() {
			t.Logf("a worker's log:\n%s", l.out)
		}
	})
	return l
}

// kill is kill -9.
func (l *life) kill() {
	l.t.Helper()
	if err := l.cmd.Process.Kill(); err != nil {
		l.t.Fatal(err)
	}
	_ = l.cmd.Wait()
}

// stop asks the worker to stop and returns how long it took.
func (l *life) stop() time.Duration {
	l.t.Helper()
	began := time.Now()
	if err := l.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		l.t.Fatal(err)
	}
	if err := l.cmd.Wait(); err != nil {
		l.t.Errorf("the worker ended with %v", err)
	}
	return time.Since(began)
}

func held(reg workerproto.Register) string {
	var out []string
	for _, r := range reg.Running {
		out = append(out, fmt.Sprintf("%s/%d", r.JobID, r.LastSeq))
	}
	return strings.Join(out, " ")
}

// resultOf is the next result, on a machine so busy that output may not ride in it.
func resultOf(l *edgetest.Link) (r workerproto.Result) {
	for {
		f := l.NextOf(workerproto.TypeOutput, workerproto.TypeResult)
		if f.Kind == workerproto.TypeResult {
			l.Decode(f, workerproto.TypeResult, &r)
			return r
		}
		l.Send(workerproto.TypeAck, workerproto.Ack{JobID: f.Lease.JobID, Attempt: f.Lease.Attempt, AckedSeq: f.Chunk.Seq})
	}
}

func TestUnsentResultOutlivesKill(t *testing.T) {
	e, dir := edgetest.New(t), t.TempDir()
	w := start(t, e, dir)
	l := e.Connected()
	l.Run(edgetest.Lease(1), "echo done; echo bad >&2")
	l.Run(edgetest.Lease(2), "exit 7")
	first := map[string]workerproto.Result{}
	for range 2 {
		r := resultOf(l)
		first[r.JobID] = r
	}
	l.AckResults(edgetest.Lease(2))
	// The acknowledgement is taken before a heartbeat that does not list it.
	for {
		var h workerproto.Heartbeat
		l.Decode(l.NextOf(workerproto.TypeHeartbeat), workerproto.TypeHeartbeat, &h)
		if len(h.Running) == 1 {
			break
		}
	}
	w.kill()

	w = start(t, e, dir)
	l, reg := e.Hello()
	for _, r := range reg.Running { // acknowledgements may be forgotten by a kill, results not
		if r.Lease != edgetest.Lease(1) && r.Lease != edgetest.Lease(2) {
			t.Errorf("the hello lists %+v", r)
		}
	}
	if !strings.Contains(held(reg), "job-1/2") {
		t.Fatalf("the hello lists %q", held(reg))
	}
	l.Welcome()
	for range reg.Running {
		r := resultOf(l)
		was := first[r.JobID]
		if r.Outcome != was.Outcome || *r.Manifest != *was.Manifest || len(r.Tail) != len(was.Tail) || !r.FinishedAt.Equal(was.FinishedAt) {
			t.Errorf("after the kill the result is %+v, was %+v", r, was)
		}
		l.AckResults(r.Lease)
	}
	if first["job-1"].Outcome != job.OutcomeSucceeded || first["job-1"].Manifest.Bytes != 9 {
		t.Errorf("result is %+v", first["job-1"])
	}
	w.stop()
	w = start(t, e, dir)
	l, reg = e.Hello()
	if len(reg.Running) != 0 {
		t.Errorf("after a clean stop the hello lists %q", held(reg))
	}
	l.Welcome()
	w.stop()
}

func TestKillLeavesNothingRunning(t *testing.T) {
	e, dir := edgetest.New(t), t.TempDir()
	pids := filepath.Join(t.TempDir(), "pids")
	w := start(t, e, dir)
	l := e.Connected()
	l.Run(edgetest.Lease(1), fmt.Sprintf("setsid sleep 600 & echo $! >>%[1]s; sleep 600 & echo $! >>%[1]s; echo $$ >>%[1]s; echo ready; wait", pids))
	l.NextOf(workerproto.TypeOutput)
	data, err := os.ReadFile(pids)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Fields(string(data))
	if len(lines) != 3 {
		t.Fatalf("pids are %q", lines)
	}
	w.kill()
	w = start(t, e, dir)
	l, reg := e.Hello()
	if len(reg.Running) != 0 {
		t.Errorf("the hello lists %q, which died with the worker", held(reg))
	}
	for _, line := range lines { // before the worker says hello
		if pid, err := strconv.Atoi(line); err != nil || alive(pid) {
			t.Errorf("%s still runs: %v", line, err)
		}
	}
	left, err := os.ReadDir(filepath.Join(dir, "attempts"))
	if err != nil || len(left) != 0 {
		t.Errorf("working folders are left: %v, %v", left, err)
	}
	l.Welcome()
	l.Run(edgetest.Lease(2), "true")
	if r := l.Result(); r.Lease != edgetest.Lease(2) || r.Outcome != job.OutcomeSucceeded {
		t.Errorf("result is %+v", r)
	}
	l.AckResults(edgetest.Lease(2))
	w.stop()
}

// alive reports whether a process exists and is more than a zombie.
func alive(pid int) bool {
	if errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) {
		return false
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return !errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) // no proc, or gone meanwhile
	}
	i := bytes.LastIndexByte(stat, ')')
	return i < 0 || i+2 >= len(stat) || stat[i+2] != 'Z'
}

func TestStopDeliversWhatItStopped(t *testing.T) {
	e := edgetest.New(t)
	w := start(t, e, t.TempDir())
	l := e.Connected()
	l.Run(edgetest.Lease(1), "echo before; exec sleep 600")
	l.NextOf(workerproto.TypeOutput)
	l.Send(workerproto.TypeAck, workerproto.Ack{JobID: "job-1", Attempt: 1, AckedSeq: 1})
	var wait sync.WaitGroup
	defer wait.Wait()
	wait.Go(func() { w.stop() })
	if r := l.Result(); r.Outcome != job.OutcomeFailed || r.Reason != job.ReasonWorkerStopped || r.Manifest.Bytes != 7 {
		t.Errorf("result is %+v", r)
	}
	l.AckResults(edgetest.Lease(1))
	_ = l.End()
}

func TestStopWithoutAnEdge(t *testing.T) {
	e, dir := edgetest.New(t), t.TempDir()
	w := start(t, e, dir)
	l := e.Connected()
	l.Run(edgetest.Lease(1), "echo before; exec sleep 600")
	l.NextOf(workerproto.TypeStarted)
	e.Set(http.StatusServiceUnavailable, "")
	l.Cut()
	if d := w.stop(); d > lastWords+5*time.Second {
		t.Errorf("stopping took %v", d)
	}
	e.Set(0, workerproto.Subprotocol)
	w = start(t, e, dir)
	l, reg := e.Hello()
	if len(reg.Running) != 1 {
		t.Errorf("the hello lists %q", held(reg))
	}
	l.Welcome()
	for {
		f := l.NextOf(workerproto.TypeOutput, workerproto.TypeResult)
		if f.Kind == workerproto.TypeResult {
			break
		}
		l.Send(workerproto.TypeAck, workerproto.Ack{JobID: "job-1", Attempt: 1, AckedSeq: f.Chunk.Seq})
	}
	l.AckResults(edgetest.Lease(1))
	w.stop()
}

func testConfig(e *edgetest.Edge, dir string) Config {
	return Config{
		ServerURL: e.Server.URL, WorkerTokenSecret: testSecret, WorkerID: "worker-1", DataDir: dir, Executors: "process", Slots: 2,
		Labels: map[string]string{"zone": "home"},
	}
}

func newService(t *testing.T, cfg Config) *Service {
	t.Helper()
	s, err := New(t.Context(), cfg, Deps{Logger: slog.New(slog.DiscardHandler), Metrics: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// Two servers may have a worker of the same id on one machine, two instances of
// `cmdexec up` for example: neither may take the other's processes for leftovers.
func TestMarkIsOfTheDataFolder(t *testing.T) {
	e, dir := edgetest.New(t), t.TempDir()
	mark := func(dir string) string {
		s := newService(t, testConfig(e, dir))
		if err := s.close(); err != nil {
			t.Fatal(err)
		}
		return s.mark
	}
	first := mark(dir)
	if first == "" || mark(dir) != first {
		t.Error("the mark does not stay")
	}
	if mark(t.TempDir()) == first {
		t.Error("a worker of the same id has the same mark")
	}
}

func TestService(t *testing.T) {
	e, dir := edgetest.New(t), t.TempDir()
	cfg := testConfig(e, dir)
	s := newService(t, cfg)
	if d := s.Describe(); d.WorkerID != "worker-1" || d.Slots != 2 || fmt.Sprint(d.Executors) != "[process]" || d.DataDir != dir {
		t.Errorf("described as %+v", d)
	}
	if err := s.Ready(); err == nil {
		t.Error("ready before Run")
	}
	other, err := New(t.Context(), cfg, Deps{Logger: slog.New(slog.DiscardHandler)})
	if err == nil {
		t.Fatalf("two workers %p share a data folder", other)
	}
	if text := err.Error(); strings.Contains(text, "\n") || !strings.Contains(text, dir) || !strings.Contains(text, "in use by another worker") {
		t.Errorf("the second worker says %q", text)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	l, reg := e.Hello()
	if reg.Slots != 2 || reg.CPUCores <= 0 || reg.TotalMemory <= 0 || reg.Labels["zone"] != "home" || fmt.Sprint(reg.Executors) != "[process]" {
		t.Errorf("hello is %+v", reg)
	}
	l.Welcome()
	l.NextOf(workerproto.TypeHeartbeat)
	if err := s.Ready(); err != nil {
		t.Error(err)
	}
	l.Run(edgetest.Lease(1), "exit 3")
	if r := l.Result(); *r.ExitCode != 3 || r.WorkerID != "worker-1" {
		t.Errorf("result is %+v", r)
	}
	l.AckResults(edgetest.Lease(1))
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("Run returned %v", err)
	}
	// The folder is free again, and so is everything else: see goleak.
	s = newService(t, cfg)
	stopped, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Run(stopped); err != nil {
		t.Error(err)
	}
}

func TestNewRefusesAndGivesBack(t *testing.T) {
	e, dir := edgetest.New(t), t.TempDir()
	for want, change := range map[string]func(*Config){
		"SERVER_URL":   func(c *Config) { c.ServerURL = "http://jobs.example.com" },
		"EXECUTORS":    func(c *Config) { c.Executors = "podman" },
		"no executor":  func(c *Config) { c.Executors = "" },
		"SLOTS":        func(c *Config) { c.Slots = -3 },
		"WORKER_TOKEN": func(c *Config) { c.WorkerTokenSecret = "" },
		"WORKER_ID":    func(c *Config) { c.WorkerID = "No Id" },
		"DATA_DIR":     func(c *Config) { c.DataDir = os.DevNull },
	} {
		cfg := testConfig(e, dir)
		change(&cfg)
		_, err := New(t.Context(), cfg, Deps{Logger: slog.New(slog.DiscardHandler)})
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("want an error about %s, got %v", want, err)
		}
	}
	s := newService(t, testConfig(e, dir)) // nothing of them holds the folder
	if err := s.close(); err != nil {
		t.Error(err)
	}
}
