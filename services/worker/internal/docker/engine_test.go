package docker_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/filters"
	"github.com/docker/docker/client"
	"go.uber.org/goleak"

	"github.com/cmdexec/cmdexec/services/worker/internal/docker"
	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
)

// testImage is what .ci/docker.sh imports.
const testImage = "cmdexec-test/busybox:1"

// canary stands for a secret of the worker: it is in the environment of this
// process, and must be nowhere else.
const canary = "sk_canary_4be1c6a7d0"

func TestMain(m *testing.M) {
	if err := os.Setenv("WORKER_TOKEN_SECRET", canary); err != nil {
		panic(err)
	}
	if err := buildInit(); err != nil {
		panic(err)
	}
	code := m.Run()
	_ = os.RemoveAll(inits)
	if left := leftovers(); code == 0 && len(left) > 0 {
		fmt.Fprintln(os.Stderr, "containers left behind:", left)
		code = 1
	}
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// inits is a folder with the init of warm containers.
var inits = filepath.Join(os.TempDir(), fmt.Sprintf("cmdexec-dockertest-%d", os.Getpid()))

func buildInit() error {
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", filepath.Join(inits, "warm-init-"+runtime.GOARCH), "../../cmd/warm-init")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build the init of warm containers: %w: %s", err, out)
	}
	return nil
}

// warmly has containers wait for jobs.
func warmly(o *docker.Options) {
	o.Warm = docker.Warm{Containers: 1, MemoryMB: 1 << 20, Age: time.Hour, Init: os.DirFS(inits)}
}

// eachPath runs a test with containers that are made for their job, and with such as
// have waited for it.
func eachPath(t *testing.T, test func(t *testing.T, x *docker.Executor)) {
	engine(t)
	t.Run("cold", func(t *testing.T) { test(t, newExecutor(t)) })
	t.Run("warm", func(t *testing.T) { test(t, newExecutor(t, warmly)) })
}

func engineHost() string {
	if h := os.Getenv("DOCKER_HOST"); h != "" {
		return h
	}
	return docker.DefaultHost
}

// rawAPI is a client of the engine that is not the one under test.
func rawAPI(host string) (*client.Client, error) {
	return client.NewClientWithOpts(client.WithHost(host), client.WithAPIVersionNegotiation())
}

// leftovers lists the containers of these tests.
func leftovers() []string {
	api, err := rawAPI(engineHost())
	if err != nil {
		return nil
	}
	defer api.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	all, err := api.ContainerList(ctx, container.ListOptions{All: true, Filters: filters.NewArgs(filters.Arg("label", "cmdexec.worker"))})
	if err != nil {
		return nil
	}
	var left []string
	for _, c := range all {
		if strings.HasPrefix(c.Labels["cmdexec.worker"], "worker-dockertest") {
			left = append(left, c.Names...)
		}
	}
	return left
}

// engine is the real engine, or the test is skipped.
func engine(t testing.TB) *client.Client {
	t.Helper()
	api, err := rawAPI(engineHost())
	if err != nil {
		t.Skipf("requires docker: no engine answers at %s: %v", engineHost(), err)
	}
	t.Cleanup(func() { _ = api.Close() })
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if _, err := api.Ping(ctx); err != nil {
		t.Skipf("requires docker: no engine answers at %s: %v", engineHost(), err)
	}
	if _, err := api.ImageInspect(ctx, testImage); err != nil {
		t.Skipf("requires docker: the engine has no %s (.ci/docker.sh start makes it): %v", testImage, err)
	}
	return api
}

// newExecutor makes an executor for the real engine and closes it.
func newExecutor(t testing.TB, change ...func(*docker.Options)) *docker.Executor {
	t.Helper()
	opts := docker.Options{
		Host: engineHost(), WorkerID: workerID(t.Name()),
		Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	}
	for _, c := range change {
		c(&opts)
	}
	x, err := docker.New(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = x.Close() })
	return x
}

func workerID(name string) string {
	return "worker-dockertest-" + strings.NewReplacer("/", "-", "#", "-", ",", "").Replace(name)
}

var counter struct {
	sync.Mutex
	n int
}

// shell is the spec of a shell command with the defaults of a job.
func shell(command string) executor.Spec {
	counter.Lock()
	defer counter.Unlock()
	counter.n++
	return executor.Spec{
		JobID: fmt.Sprintf("job-t%d", counter.n), Attempt: 1, LeaseID: fmt.Sprintf("lease-t%d-%d", os.Getpid(), counter.n),
		Shell: command, Image: testImage, PullPolicy: "missing",
		CPU: 1, MemoryMB: 128, PIDs: 64, TmpfsMB: 16,
		Timeout: time.Minute, PrepareTimeout: time.Minute, Grace: 5 * time.Second,
	}
}

// buffer is a Writer for any number of goroutines.
type buffer struct {
	sync.Mutex
	b bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.Lock()
	defer b.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.Lock()
	defer b.Unlock()
	return b.b.String()
}

type result struct {
	executor.Exit
	out, errs string
}

// code is the exit code, -1 where there is none.
func (r result) code() int {
	if r.Code == nil {
		return -1
	}
	return *r.Code
}

func (r result) String() string {
	e, _ := json.Marshal(r.Exit)
	return fmt.Sprintf("%s\nstdout: %.2000s\nstderr: %.2000s", e, r.out, r.errs)
}

// running is an attempt that was started.
type running struct {
	t testing.TB
	executor.Attempt
	warm      bool // it must be
	out, errs buffer
}

// priming is held from when a container waits for an attempt until that has it.
var priming sync.Mutex

// prepare prepares an attempt, in a container that has waited for it if the executor
// has such for the job.
func prepare(t testing.TB, x executor.Executor, spec executor.Spec) executor.Attempt {
	t.Helper()
	a, _ := prepareEither(t, x, spec)
	return a
}

func prepareEither(t testing.TB, x executor.Executor, spec executor.Spec) (a executor.Attempt, warm bool) {
	t.Helper()
	priming.Lock()
	defer priming.Unlock()
	if x, ok := x.(*docker.Executor); ok {
		warm = docker.Prime(t, x, spec)
	}
	a, err := x.Prepare(context.Background(), spec)
	if err != nil {
		t.Fatalf("prepare: %v", err)
	}
	return a, warm
}

func start(t testing.TB, x executor.Executor, spec executor.Spec) *running {
	t.Helper()
	a, warm := prepareEither(t, x, spec)
	r := &running{t: t, Attempt: a, warm: warm}
	if err := a.Start(&r.out, &r.errs); err != nil {
		_ = a.Close()
		t.Fatalf("start: %v", err)
	}
	return r
}

// finish waits and closes.
func (r *running) finish() result {
	r.t.Helper()
	exit := r.Wait()
	if err := r.Close(); err != nil {
		r.t.Errorf("close: %v", err)
	}
	if exit.Warm != r.warm {
		r.t.Errorf("warm is %t, want %t", exit.Warm, r.warm)
	}
	return result{exit, r.out.String(), r.errs.String()}
}

// says waits until the command has written text to its standard output.
func (r *running) says(text string) {
	r.t.Helper()
	eventually(r.t, func() bool { return strings.Contains(r.out.String(), text) }, "the command did not write "+text)
}

// run runs a spec to its end.
func run(t testing.TB, x executor.Executor, spec executor.Spec) result {
	t.Helper()
	return start(t, x, spec).finish()
}

func eventually(t testing.TB, ok func() bool, what string) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatal(what)
		}
		time.Sleep(10 * time.Millisecond) // polling, with a deadline
	}
}

// refused prepares a spec that must be refused.
func refused(t *testing.T, x executor.Executor, spec executor.Spec) *executor.PrepareError {
	t.Helper()
	a, err := x.Prepare(context.Background(), spec)
	if err == nil {
		_ = a.Close()
		t.Fatal("was not refused")
	}
	return executor.AsPrepareError(err)
}

var _ io.Writer = (*buffer)(nil)
