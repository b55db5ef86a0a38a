package bus_test

import (
	"bufio"
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/natsd"
	"github.com/cmdexec/cmdexec/libs/natsd/natsdtest"
)

// The test binary started with these is a NATS server process, to be killed.
const (
	envServerDir    = "CMDEXEC_TEST_NATSD_DIR"
	envServerListen = "CMDEXEC_TEST_NATSD_LISTEN"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(envServerDir); dir != "" {
		serve(dir, os.Getenv(envServerListen))
		return
	}
	goleak.VerifyTestMain(m)
}

func serve(dir, listen string) {
	s, err := natsd.Start(natsd.Options{
		StoreDir: dir, Listen: listen,
		Logger: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
	})
	if err != nil {
		fmt.Println("error", err)
		return
	}
	fmt.Println("ready", s.ClientURL())
	_, _ = bufio.NewReader(os.Stdin).ReadString('\n') // until the parent is gone
	s.Shutdown()
}

// process is a NATS server in a process of its own.
type process struct {
	t           *testing.T
	dir, listen string
	cmd         *exec.Cmd
}

// newProcess starts one on a fresh folder. It keeps its address over restarts.
func newProcess(t *testing.T) *process {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	p := &process{t: t, dir: t.TempDir(), listen: l.Addr().String()}
	require.NoError(t, l.Close())
	t.Cleanup(func() { p.kill() })
	p.start()
	return p
}

func (p *process) url() string { return "nats://" + p.listen }

func (p *process) start() {
	p.t.Helper()
	exe, err := os.Executable()
	require.NoError(p.t, err)
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), envServerDir+"="+p.dir, envServerListen+"="+p.listen)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	require.NoError(p.t, err)
	_, err = cmd.StdinPipe() // held open: its end tells the child that we are gone
	require.NoError(p.t, err)
	require.NoError(p.t, cmd.Start())
	p.cmd = cmd
	line, err := bufio.NewReader(out).ReadString('\n')
	require.NoError(p.t, err)
	require.True(p.t, strings.HasPrefix(line, "ready "), line)
}

// kill is kill -9.
func (p *process) kill() {
	if p.cmd == nil {
		return
	}
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
	p.cmd = nil
}

func (p *process) restart() {
	p.t.Helper()
	p.kill()
	p.start()
}

// testContext ends a minute from now at the latest.
func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func logger(t testing.TB) *slog.Logger {
	if testing.Verbose() {
		return slog.New(slog.NewTextHandler(os.Stderr, nil)).With("test", t.Name())
	}
	return nil
}

// connect connects to an embedded server for the length of the test.
func connect(t testing.TB, s *natsd.Server) *bus.Conn {
	t.Helper()
	c, err := bus.Connect(testContext(t), bus.Options{InProcess: s, Name: t.Name(), Logger: logger(t)})
	require.NoError(t, err)
	t.Cleanup(c.Close)
	return c
}

func connectTo(t testing.TB, url string) *bus.Conn {
	t.Helper()
	c, err := bus.Connect(testContext(t), bus.Options{URL: url, Name: t.Name(), Logger: logger(t)})
	require.NoError(t, err)
	t.Cleanup(c.Close)
	return c
}

func smallSizes() bus.Sizes {
	return bus.Sizes{Jobs: 256 << 20, Results: 64 << 20, Logs: 64 << 20}
}

// start gives a bound connection to a fresh embedded server.
func start(t testing.TB) *bus.Conn {
	t.Helper()
	return startSized(t, smallSizes())
}

func startSized(t testing.TB, sizes bus.Sizes) *bus.Conn {
	t.Helper()
	c := connect(t, natsdtest.Start(t))
	bind(t, c, sizes)
	return c
}

func bind(t testing.TB, c *bus.Conn, sizes bus.Sizes) {
	t.Helper()
	require.NoError(t, bus.Apply(testContext(t), c, sizes))
	require.NoError(t, c.Bind(testContext(t)))
	require.NoError(t, c.Ready())
}

// newRecord makes a job that was submitted just now.
func newRecord(t testing.TB) job.Record {
	t.Helper()
	spec, wrong := job.Normalise(job.Spec{Command: job.Command{Shell: "true"}})
	require.Empty(t, wrong)
	return job.New(id.New(id.Job, time.Now()), "owner", spec, time.Now())
}

func create(t testing.TB, c *bus.Conn) bus.Entry {
	t.Helper()
	e, err := c.Registry().Create(testContext(t), newRecord(t))
	require.NoError(t, err)
	return e
}

// eventually polls until f is true.
func eventually(t testing.TB, f func() bool, what string) {
	t.Helper()
	require.Eventually(t, f, 30*time.Second, 10*time.Millisecond, what)
}
