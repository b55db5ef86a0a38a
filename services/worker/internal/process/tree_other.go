//go:build unix && !linux

package process

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"syscall"
	"time"

	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
	"golang.org/x/sys/unix"
)

// tracking is of use on Linux only.
type tracking int

const anyTracking tracking = 0

// host has process groups and nothing more.
type host struct{}

func newHost(string, string, int, tracking, *slog.Logger) (*host, error) { return &host{}, nil }

func (*host) describe() string {
	return "process trees by process group; this system has no limits for them"
}

func (*host) limits() Limits { return Limits{} }

func (*host) newTree(executor.Spec, string) (*tree, error) { return &tree{}, nil }

// recover finds nothing: a process group carries no mark.
func (*host) recover(context.Context, time.Duration) error { return nil }

func (*host) close() error { return nil }

// tree is a session and process group led by the main process.
type tree struct {
	pid     int
	status  syscall.WaitStatus
	used    usage
	reaped  bool
	unknown bool
	rusage  syscall.Rusage

	mu     sync.Mutex
	giveUp time.Time
}

func (t *tree) start(c *command) (err error) {
	t.pid, err = syscall.ForkExec(c.path, c.argv, &syscall.ProcAttr{
		Dir: c.dir, Env: c.env, Files: c.files[:],
		Sys: &syscall.SysProcAttr{Setsid: true, Credential: c.cred},
	})
	return err
}

func (t *tree) ended() bool {
	for !t.reaped {
		pid, err := syscall.Wait4(t.pid, &t.status, syscall.WNOHANG, &t.rusage)
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if err == nil && pid != t.pid {
			return false
		}
		t.reaped, t.unknown = true, err != nil
	}
	return true
}

func (t *tree) await(done func() bool) bool {
	for pause := 100 * time.Microsecond; ; pause = min(2*pause, 5*time.Millisecond) {
		if done() {
			return true
		}
		t.mu.Lock()
		giveUp := t.giveUp
		t.mu.Unlock()
		if !giveUp.IsZero() && time.Now().After(giveUp) {
			return false
		}
		time.Sleep(pause)
	}
}

func (t *tree) giveUpAt(deadline time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.giveUp = deadline
}

func (t *tree) signal(sig syscall.Signal) {
	if t.pid > 1 {
		_ = syscall.Kill(-t.pid, sig)
	}
}

func (t *tree) kill() { t.signal(syscall.SIGKILL) }

func (t *tree) sweep(deadline time.Time) bool {
	t.used.cpu = time.Duration(t.rusage.Utime.Nano() + t.rusage.Stime.Nano())
	t.used.peakMemory = int64(t.rusage.Maxrss)
	for pause := 100 * time.Microsecond; t.pid > 1; pause = min(2*pause, 5*time.Millisecond) {
		// The group's id stays reserved as long as it has a member.
		if err := syscall.Kill(-t.pid, syscall.SIGKILL); errors.Is(err, syscall.ESRCH) || errors.Is(err, syscall.EPERM) {
			break
		}
		if time.Now().After(deadline) {
			return false
		}
		time.Sleep(pause)
	}
	return t.reaped
}

func (t *tree) remove() error { return nil }

func signalName(s syscall.Signal) string { return unix.SignalName(s) }
