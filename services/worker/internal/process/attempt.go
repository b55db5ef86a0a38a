//go:build unix

package process

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
)

// command is what a tree starts.
type command struct {
	path  string
	argv  []string
	env   []string
	dir   string
	files [3]uintptr
	cred  *syscall.Credential
}

// usage is what a tree has used.
type usage struct {
	peakMemory int64 // bytes
	cpu        time.Duration
	oomKills   int64
}

type phase int

const (
	prepared phase = iota
	running
	ended // the main process has ended; its id may belong to somebody else
)

// attempt is one prepared command. Its mutex also guards the life of the main
// process: it is reaped and signalled only under it, so that a signal can never
// reach a stranger that got the same process id.
type attempt struct {
	executor   *Executor
	spec       executor.Spec
	folder     string
	stopSignal syscall.Signal
	command    command
	tree       *tree
	outputs    *outputs
	stdin      *os.File

	// refusal is the exit code and line of a program that cannot be started.
	refusal     int
	refusalText string
	stderr      io.Writer
	closed      bool
	survived    bool

	mu         sync.Mutex
	phase      phase
	startedAt  time.Time
	finishedAt time.Time
	receipt    *executor.StopReceipt
	killed     bool
	timeout    *time.Timer
	grace      *time.Timer
}

func (a *attempt) prepare() error {
	m := markOf(a.executor.mark, a.spec)
	a.command.env = environment(a.spec, a.folder, m)
	switch dir := a.spec.WorkingDir; {
	case dir == "":
		a.command.dir = a.folder
	case filepath.IsAbs(dir):
		info, err := os.Stat(dir)
		if err != nil {
			return executor.UserError(fmt.Sprintf("the working directory %q cannot be used", dir), err)
		}
		if !info.IsDir() {
			return executor.UserError(fmt.Sprintf("the working directory %q is not a directory", dir), nil)
		}
		a.command.dir = dir
	default:
		a.command.dir = filepath.Join(a.folder, dir)
	}
	var err error
	a.tree, err = a.executor.host.newTree(a.spec, m)
	return err
}

// resolve finds the program. It runs at the start, not in Prepare, since what it
// finds is the command's own affair: an exit code, not a failure to prepare.
func (a *attempt) resolve() {
	if len(a.spec.Argv) == 0 {
		a.command.path, a.command.argv = shellPath, []string{shellPath, "-c", a.spec.Shell}
		return
	}
	a.command.argv = a.spec.Argv
	path := defaultPath
	if p, given := a.spec.Env["PATH"]; given {
		path = p
	}
	a.command.path, a.refusal, a.refusalText = findProgram(a.spec.Argv[0], path, a.command.dir)
}

// Start starts the command.
func (a *attempt) Start(stdout, stderr io.Writer) error {
	a.resolve()
	a.stderr = stderr
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.phase != prepared {
		return executor.InfraError("the attempt was started before", nil)
	}
	if a.receipt != nil {
		return executor.InfraError("the attempt was stopped", executor.ErrStopped)
	}
	if a.refusal == 0 {
		if err := a.start(stdout, stderr); err != nil {
			return err
		}
	}
	if a.refusal != 0 {
		a.startedAt = time.Now()
		a.finishedAt = a.startedAt
		a.phase = ended
		return nil
	}
	a.phase = running
	if a.spec.Timeout > 0 {
		a.timeout = time.AfterFunc(a.spec.Timeout, func() { a.Stop(executor.StopTimeout) })
	}
	return nil
}

// start makes the pipes and the process. A program that the kernel refuses to
// run becomes a refusal.
func (a *attempt) start(stdout, stderr io.Writer) error {
	var child []int // descriptors that only the child needs
	var own []*os.File
	defer func() {
		for _, fd := range child {
			_ = syscall.Close(fd)
		}
		for _, f := range own {
			_ = f.Close()
		}
	}()
	fail := func(err error) error { return executor.InfraError("the command's pipes cannot be made", err) }

	a.command.files[0] = a.executor.null.Fd()
	var stdin *os.File
	if len(a.spec.Stdin) > 0 {
		r, w, err := inputPipe()
		if err != nil {
			return fail(err)
		}
		child, own, stdin = append(child, r), append(own, w), w
		a.command.files[0] = uintptr(r)
	}
	var readers [2]*os.File
	for i := range readers {
		r, w, err := outputPipe()
		if err != nil {
			return fail(err)
		}
		child, own, readers[i] = append(child, w), append(own, r), r
		a.command.files[1+i] = uintptr(w)
	}

	a.startedAt = time.Now()
	if err := a.tree.start(&a.command); err != nil {
		return a.startError(err)
	}
	own = nil
	if stdin != nil {
		a.stdin = stdin
		go func() {
			// A command that does not read all of it is no error.
			_, _ = stdin.Write(a.spec.Stdin)
			_ = stdin.Close()
		}()
	}
	a.outputs = copyOutputs(&a.executor.buffers, readers, [2]io.Writer{stdout, stderr})
	return nil
}

func (a *attempt) startError(err error) error {
	name := a.command.argv[0]
	switch {
	case errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ENOTDIR) || errors.Is(err, syscall.ELOOP):
		// The program was there a moment ago, so its interpreter is missing, or
		// the working directory has gone.
		if info, statErr := os.Stat(a.command.dir); statErr != nil || !info.IsDir() {
			return executor.UserError(fmt.Sprintf("the working directory %q cannot be used", a.command.dir), err)
		}
		if len(a.spec.Argv) == 0 {
			return executor.InfraError("this worker has no "+shellPath, err)
		}
		return executor.UserError(fmt.Sprintf("the interpreter of %q does not exist on this worker", name), err)
	case errors.Is(err, syscall.EACCES):
		a.refusal, a.refusalText = exitNotExecutable, name+": permission denied"
		return nil
	case errors.Is(err, syscall.ENOEXEC):
		a.refusal, a.refusalText = exitNotExecutable, name+": exec format error"
		return nil
	case errors.Is(err, syscall.E2BIG):
		return executor.UserError("arguments and environment are too long for this worker", err)
	}
	return executor.InfraError("the command cannot be started", err)
}

// Stop signals the command and kills it after the grace.
func (a *attempt) Stop(reason executor.StopReason) {
	a.mu.Lock()
	defer a.mu.Unlock()
	first := a.receipt == nil
	if first && (a.phase != ended || reason != executor.StopTimeout) {
		a.receipt = &executor.StopReceipt{Reason: reason, DeliveredAt: time.Now()}
	}
	if a.phase != running || a.killed {
		return
	}
	switch {
	case reason == executor.StopLeaseLost:
		a.kill()
	case !first:
		// The grace is running.
	default:
		a.receipt.SignalledAt = time.Now()
		a.tree.signal(a.stopSignal)
		if a.spec.Grace <= 0 {
			a.kill()
			return
		}
		a.grace = time.AfterFunc(a.spec.Grace, func() {
			a.mu.Lock()
			defer a.mu.Unlock()
			if a.phase == running && !a.killed {
				a.kill()
			}
		})
	}
}

// kill kills the whole tree. The mutex is held and the main process not reaped.
func (a *attempt) kill() {
	a.killed = true
	if a.receipt.SignalledAt.IsZero() {
		a.receipt.SignalledAt = time.Now()
	}
	a.tree.giveUpAt(time.Now().Add(a.executor.killBound))
	a.tree.kill()
}

// mainEnded asks once whether the main process has ended.
func (a *attempt) mainEnded() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.phase == ended {
		return true
	}
	if !a.tree.ended() {
		return false
	}
	a.phase, a.finishedAt = ended, time.Now()
	return true
}

// Wait blocks until nothing of the tree is left.
func (a *attempt) Wait() executor.Exit {
	if a.outputs == nil {
		return a.waitRefusal()
	}
	mainGone := a.tree.await(a.mainEnded)
	gone := a.tree.sweep(time.Now().Add(a.executor.killBound)) && mainGone
	a.survived = !gone
	goneAt := time.Now()
	if a.stdin != nil {
		// Frees the writer where nobody reads; closing twice is harmless.
		_ = a.stdin.Close()
	}
	a.outputs.finish()

	a.mu.Lock()
	defer a.mu.Unlock()
	if a.timeout != nil {
		a.timeout.Stop()
	}
	if a.grace != nil {
		a.grace.Stop()
	}
	exit := executor.Exit{StartedAt: a.startedAt, FinishedAt: a.finishedAt, Survivors: !gone}
	switch {
	case !mainGone:
		exit.FinishedAt = goneAt
	case a.tree.unknown:
		exit.Reason = "how the command ended is not known"
	default:
		status := a.tree.status
		if status.Signaled() {
			exit.Signal = signalName(status.Signal())
		} else {
			code := status.ExitStatus()
			exit.Code = &code
		}
	}
	exit.PeakMemoryMB = (a.tree.used.peakMemory + 1<<20 - 1) >> 20
	exit.CPUms = a.tree.used.cpu.Milliseconds()
	a.judge(&exit, goneAt)
	return exit
}

// judge adds the verdicts to an exit whose facts are known.
func (a *attempt) judge(exit *executor.Exit, goneAt time.Time) {
	var reasons []string
	if exit.Reason != "" {
		reasons = append(reasons, exit.Reason)
	}
	success := exit.Code != nil && *exit.Code == 0
	if r := a.receipt; r != nil {
		receipt := *r
		if !exit.Survivors {
			receipt.GoneAt = goneAt
		}
		if !exit.FinishedAt.Equal(goneAt) {
			receipt.ExitedAt = exit.FinishedAt
		}
		exit.Stop = &receipt
		exit.TimedOut = r.Reason == executor.StopTimeout
	}
	switch kills := a.tree.used.oomKills; {
	case exit.TimedOut:
		reasons = append(reasons, fmt.Sprintf("ran longer than its timeout of %v", a.spec.Timeout))
	case kills > 0 && success:
		reasons = append(reasons, fmt.Sprintf("its memory limit of %d MiB killed %d of its processes", a.spec.MemoryMB, kills))
	case kills > 0:
		exit.OOMKilled = true
		reasons = append(reasons, fmt.Sprintf("killed by its memory limit of %d MiB", a.spec.MemoryMB))
	}
	if exit.Survivors {
		reasons = append(reasons, "some of its processes could not be killed")
	}
	exit.Reason = strings.Join(reasons, "; ")
}

// waitRefusal ends an attempt whose program could not be started.
func (a *attempt) waitRefusal() executor.Exit {
	if a.stderr != nil {
		_, _ = io.WriteString(a.stderr, a.refusalText+"\n")
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	code := a.refusal
	exit := executor.Exit{
		Code: &code, Reason: a.refusalText,
		StartedAt: a.startedAt, FinishedAt: a.finishedAt,
	}
	if a.receipt != nil {
		receipt := *a.receipt
		receipt.ExitedAt, receipt.GoneAt = a.finishedAt, a.finishedAt
		exit.Stop = &receipt
	}
	return exit
}

// Close removes the control groups and the working folder.
func (a *attempt) Close() error {
	if a.closed {
		return nil
	}
	err := a.tree.remove()
	if err == nil && !a.survived {
		err = a.executor.releaseFolder(a.folder)
	} else {
		// Whoever survived may still use it; it is not for others.
		err = errors.Join(err, a.executor.removeFolder(a.folder))
	}
	a.closed = err == nil
	return err
}
