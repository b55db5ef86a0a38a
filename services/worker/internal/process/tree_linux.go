package process

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// tree is the process tree of one attempt: the main process, which leads a
// session of its own, and all that comes from it.
type tree struct {
	host   *host
	mark   string
	groups []*group // the tracker first; none: the process table is walked

	pid     int
	began   uint64 // start time of the main process in ticks; only without groups
	pidfd   int    // -1 where the kernel has none
	waiter  *os.File
	giveUp  time.Time
	giveMu  sync.Mutex
	status  syscall.WaitStatus
	used    usage
	reaped  bool
	unknown bool // it ended, but not how
	rusage  syscall.Rusage
}

// start starts the main process inside the groups.
func (t *tree) start(c *command) error {
	var fd int
	attr := &syscall.ProcAttr{
		Dir: c.dir, Env: c.env, Files: c.files[:],
		Sys: &syscall.SysProcAttr{Setsid: true, Credential: c.cred, PidFD: &fd},
	}
	var v1 []*group
	for _, g := range t.groups {
		if g.h.v2 {
			attr.Sys.UseCgroupFD, attr.Sys.CgroupFD = true, g.fd
		} else {
			v1 = append(v1, g)
		}
	}
	fd = -1
	// Held until the process is known as a main process, so that nobody takes it
	// for an orphan.
	t.host.mu.Lock()
	defer t.host.mu.Unlock()
	pid, err := startInside(v1, c, attr)
	if err != nil {
		return err
	}
	t.pid, t.pidfd = pid, fd
	if len(t.groups) == 0 {
		if p, ok := readProcess(pid); ok {
			t.began = p.started
		}
	}
	t.host.live[pid] = t.began
	if fd >= 0 && syscall.SetNonblock(fd, true) == nil {
		t.waiter = os.NewFile(uintptr(fd), "pidfd")
	}
	return nil
}

// startInside starts a process from a thread that is a member of v1 groups,
// which the process inherits: so it is limited from its first instruction on.
func startInside(groups []*group, c *command, attr *syscall.ProcAttr) (pid int, err error) {
	if len(groups) == 0 {
		return syscall.ForkExec(c.path, c.argv, attr)
	}
	runtime.LockOSThread()
	entered := 0
	for _, g := range groups {
		if err = g.enter(); err != nil {
			break
		}
		entered++
	}
	if err == nil {
		pid, err = syscall.ForkExec(c.path, c.argv, attr)
	}
	var stuck error
	for _, g := range groups[:entered] {
		stuck = errors.Join(stuck, g.leave())
	}
	if stuck != nil {
		// The thread stays locked, so that it ends with this goroutine instead of
		// running anything else under the limits of this attempt.
		if err == nil {
			_ = unix.Kill(pid, unix.SIGKILL)
			var status syscall.WaitStatus
			_, _ = syscall.Wait4(pid, &status, 0, nil)
		}
		return 0, errors.Join(err, fmt.Errorf("return from control groups: %w", stuck))
	}
	runtime.UnlockOSThread()
	return pid, err
}

// ended asks whether the main process has ended, without waiting. With groups it
// also reaps it; without, the dead process keeps its id reserved until the tree
// is gone, since that id names the session.
func (t *tree) ended() bool {
	if t.reaped {
		return true
	}
	if len(t.groups) > 0 {
		return t.reap(syscall.WNOHANG)
	}
	var info unix.Siginfo
	for {
		err := unix.Waitid(unix.P_PID, t.pid, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return err != nil || info.Signo != 0
	}
}

func (t *tree) reap(flags int) bool {
	for {
		pid, err := syscall.Wait4(t.pid, &t.status, flags, &t.rusage)
		switch {
		case err == syscall.EINTR:
			continue
		case err != nil:
			// Somebody else took it.
			t.reaped, t.unknown = true, true
		case pid == t.pid:
			t.reaped = true
		}
		return t.reaped
	}
}

// await blocks until done reports true, which is asked whenever the main process
// may have ended. It returns false when the time set by giveUpAt is over.
func (t *tree) await(done func() bool) bool {
	if t.waiter != nil {
		conn, err := t.waiter.SyscallConn()
		if err == nil {
			ended := false
			err = conn.Read(func(uintptr) bool {
				ended = done()
				return ended
			})
			if ended {
				return true
			}
			if errors.Is(err, os.ErrDeadlineExceeded) {
				return done()
			}
		}
	}
	for pause := 100 * time.Microsecond; ; pause = min(2*pause, 5*time.Millisecond) {
		if done() {
			return true
		}
		t.giveMu.Lock()
		giveUp := t.giveUp
		t.giveMu.Unlock()
		if !giveUp.IsZero() && time.Now().After(giveUp) {
			return false
		}
		time.Sleep(pause)
	}
}

// giveUpAt bounds await.
func (t *tree) giveUpAt(deadline time.Time) {
	t.giveMu.Lock()
	t.giveUp = deadline
	t.giveMu.Unlock()
	if t.waiter != nil {
		_ = t.waiter.SetReadDeadline(deadline)
	}
}

// signal sends a signal to the main process and its process group. The main
// process is not reaped.
func (t *tree) signal(sig syscall.Signal) {
	if t.pid > 1 {
		_ = syscall.Kill(-t.pid, sig)
	}
}

// kill kills the whole tree. The main process is not reaped.
func (t *tree) kill() {
	for _, g := range t.groups {
		g.kill()
	}
	if len(t.groups) == 0 {
		_, _ = t.killMembers()
	}
	t.signal(syscall.SIGKILL)
}

// killMembers kills what the process table shows of the tree and says how much
// that was.
func (t *tree) killMembers() (int, error) {
	table, err := readProcesses()
	if err != nil {
		return 0, err
	}
	t.host.mu.Lock()
	q := quarry{self: os.Getpid(), main: t.pid, started: t.began, mark: t.mark, others: make(map[int]uint64, len(t.host.live))}
	for pid, began := range t.host.live {
		if pid != t.pid {
			q.others[pid] = began
		}
	}
	t.host.mu.Unlock()
	members := q.members(table, readMark)
	for _, p := range members {
		err = errors.Join(err, killProcess(p))
	}
	return len(members), err
}

// sweep kills whatever is left when the main process has ended (or is given up),
// and reports whether nothing is left.
func (t *tree) sweep(deadline time.Time) bool {
	gone := true
	if len(t.groups) > 0 {
		for _, g := range t.groups {
			g.measure(&t.used)
		}
		// The tracker first: it kills fastest.
		for _, g := range t.groups {
			gone = g.release(deadline) && gone
		}
	} else {
		gone = t.sweepTable(deadline)
		if t.ended() {
			t.reap(0)
		}
	}
	if !t.reaped {
		gone = false
		// Whenever the kernel lets go of it, it must not stay a zombie.
		go func() {
			var status syscall.WaitStatus
			for {
				if _, err := syscall.Wait4(t.pid, &status, 0, nil); err != syscall.EINTR {
					break
				}
			}
			t.host.mu.Lock()
			delete(t.host.live, t.pid)
			t.host.mu.Unlock()
		}()
	}
	if t.used.cpu == 0 {
		t.used.cpu = time.Duration(t.rusage.Utime.Nano() + t.rusage.Stime.Nano())
	}
	if t.used.peakMemory == 0 {
		t.used.peakMemory = t.rusage.Maxrss << 10
	}
	t.forget()
	t.host.reapOrphans()
	return gone
}

func (t *tree) sweepTable(deadline time.Time) bool {
	// Twice empty, since a process may have started behind the reader and its
	// parent ended before it was read.
	empty := 0
	for pause := 100 * time.Microsecond; ; pause = min(2*pause, 5*time.Millisecond) {
		n, err := t.killMembers()
		if n == 0 && err == nil {
			if empty++; empty == 2 {
				return true
			}
			continue
		}
		empty = 0
		if time.Now().After(deadline) {
			return false
		}
		time.Sleep(pause)
	}
}

// forget ends the watch over the main process.
func (t *tree) forget() {
	if t.waiter != nil {
		_ = t.waiter.Close()
		t.waiter, t.pidfd = nil, -1
	} else if t.pidfd >= 0 {
		_ = unix.Close(t.pidfd)
		t.pidfd = -1
	}
	if t.reaped {
		t.host.mu.Lock()
		delete(t.host.live, t.pid)
		t.host.mu.Unlock()
	}
}

// remove removes the groups of a tree that is gone or never started.
func (t *tree) remove() error {
	var left []string
	for _, g := range t.groups {
		if !g.destroy(time.Time{}) {
			left = append(left, g.path)
		}
	}
	if len(left) > 0 {
		return fmt.Errorf("control groups still in use: %s", strings.Join(left, ", "))
	}
	return nil
}
