package redis_test

import (
	"bytes"
	"context"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/cmdexec/cmdexec/libs/kit/ratelimit"
	"github.com/cmdexec/cmdexec/libs/store/redisstore"
)

func TestMain(m *testing.M) {
	if address := os.Getenv(envSpend); address != "" {
		os.Exit(spend(address))
	}
	goleak.VerifyTestMain(m)
}

// password is part of every address; no error and no log may have it.
const password = "canary-of-redis"

// server is a redis-server in a process of its own, on a port that stays the
// same when it is started again.
type server struct {
	t    *testing.T
	port string
	cmd  *exec.Cmd
	out  bytes.Buffer
	ask  *redis.Client // the test's own connection, patient
}

func startServer(t *testing.T) *server {
	t.Helper()
	if _, err := exec.LookPath("redis-server"); err != nil {
		t.Skip("requires redis: redis-server is not installed")
	}
	s := &server{t: t, port: freePort(t)}
	t.Cleanup(func() {
		s.kill()
		if t.Failed() {
			t.Logf("redis-server said:\n%s", s.out.String())
		}
	})
	s.start()
	s.ask = redis.NewClient(&redis.Options{Addr: "127.0.0.1:" + s.port, Password: password})
	t.Cleanup(func() { _ = s.ask.Close() })
	return s
}

// freePort names a loopback port that nobody listens on, below those that outgoing connections take.
func freePort(t *testing.T) string {
	t.Helper()
	for range 100 {
		port := strconv.Itoa(10_000 + rand.IntN(22_000))
		if ln, err := net.Listen("tcp", "127.0.0.1:"+port); err == nil {
			_ = ln.Close()
			return port
		}
	}
	t.Fatal("no free port among 100")
	return ""
}

func (s *server) address() string { return "redis://:" + password + "@127.0.0.1:" + s.port + "/0" }

func (s *server) start() {
	s.t.Helper()
	s.cmd = exec.Command("redis-server", "--port", s.port, "--bind", "127.0.0.1", "--requirepass", password,
		"--save", "", "--appendonly", "no", "--dir", s.t.TempDir())
	s.cmd.Stdout, s.cmd.Stderr = &s.out, &s.out
	require.NoError(s.t, s.cmd.Start())
	eventually(s.t, "redis-server listens", func() bool {
		c, err := net.Dial("tcp", "127.0.0.1:"+s.port)
		if err != nil {
			return false
		}
		_ = c.Close()
		return true
	})
}

func (s *server) kill() {
	if s.cmd == nil {
		return
	}
	_ = s.cmd.Process.Signal(syscall.SIGCONT)
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait() // killed
	s.cmd = nil
}

func (s *server) signal(sig syscall.Signal) { require.NoError(s.t, s.cmd.Process.Signal(sig)) }

func (s *server) do(args ...any) any {
	s.t.Helper()
	v, err := s.ask.Do(context.Background(), args...).Result()
	require.NoError(s.t, err)
	return v
}

// evaluations is how many times a script was run.
func (s *server) evaluations() int {
	n := 0
	for line := range strings.Lines(s.do("INFO", "commandstats").(string)) {
		for _, name := range []string{"cmdstat_evalsha:calls=", "cmdstat_eval:calls="} {
			if rest, ok := strings.CutPrefix(line, name); ok {
				calls, err := strconv.Atoi(rest[:strings.IndexByte(rest, ',')])
				require.NoError(s.t, err)
				n += calls
			}
		}
	}
	return n
}

// patience is for tests of what Redis counts, which a busy machine must not fail.
const patience = 30 * time.Second

// shared is a limiter of Redis alone, which takes its time.
func (s *server) shared() ratelimit.Shared {
	s.t.Helper()
	return ratelimit.Shared{Remote: s.limits(patience)}
}

func (s *server) limits(timeout time.Duration) *redisstore.Limits {
	s.t.Helper()
	l, err := redisstore.Open(s.address(), timeout)
	require.NoError(s.t, err)
	s.t.Cleanup(func() { _ = l.Close() })
	return l
}

// failover makes a limiter as a process has it, once it shares.
func (s *server) failover(o ratelimit.FailoverOptions) *ratelimit.Failover {
	s.t.Helper()
	f, err := ratelimit.NewFailover(s.limits(ratelimit.RemoteTimeout), o)
	require.NoError(s.t, err)
	s.t.Cleanup(f.Close)
	s.shares(f)
	return f
}

func (s *server) shares(f *ratelimit.Failover) {
	s.t.Helper()
	eventually(s.t, "the limits are shared", func() bool { return f.Note() == "" })
}

var serial atomic.Int64

// fresh is a key that no other test has.
func fresh() string { return "test:" + strconv.FormatInt(serial.Add(1), 10) }

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not within 30 s: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}
