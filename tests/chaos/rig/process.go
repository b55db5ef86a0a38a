package rig

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// starter starts processes from one thread that lives as long as the rig, so that
// they can be told to die with it: the kernel ties that to the thread.
type starter struct {
	ask  chan func()
	done chan struct{}
}

func newStarter() *starter {
	s := &starter{ask: make(chan func()), done: make(chan struct{})}
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		defer close(s.done)
		for f := range s.ask {
			f()
		}
	}()
	return s
}

func (s *starter) start(cmd *exec.Cmd) error {
	result := make(chan error, 1)
	s.ask <- func() { result <- cmd.Start() }
	return <-result
}

func (s *starter) close() {
	close(s.ask)
	<-s.done
}

// Process is one process of the product. It is started and ended any number of
// times, and keeps its place: ports, folders, log file. Its methods are safe for
// concurrent use.
type Process struct {
	Name string // unique in the rig

	starter *starter
	path    string
	args    []string
	env     []string
	log     string
	before  func() error // each start; may be nil

	mu    sync.Mutex
	cmd   *exec.Cmd
	ended chan struct{}
	err   error
}

// Log is the file with everything that it has written, of all its starts.
func (p *Process) Log() string { return p.log }

// Start starts it, where it does not run.
func (p *Process) Start() error { return p.start(p.path) }

// start runs a program in its place, with more settings.
func (p *Process) start(path string, env ...string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.running() {
		return nil
	}
	if p.before != nil {
		if err := p.before(); err != nil {
			return fmt.Errorf("start %s: %w", p.Name, err)
		}
	}
	out, err := os.OpenFile(p.log, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	cmd := exec.Command(path, p.args...)
	cmd.Env, cmd.Stdout, cmd.Stderr = append(slices.Clone(p.env), env...), out, out
	cmd.SysProcAttr = dieWithParent()
	if err := p.starter.start(cmd); err != nil {
		return fmt.Errorf("start %s: %w", p.Name, err)
	}
	ended := make(chan struct{})
	p.cmd, p.ended = cmd, ended
	go func() {
		err := cmd.Wait()
		p.mu.Lock()
		if p.cmd == cmd {
			p.err = err
		}
		p.mu.Unlock()
		close(ended)
	}()
	return nil
}

// running is called with mu held.
func (p *Process) running() bool {
	if p.cmd == nil {
		return false
	}
	select {
	case <-p.ended:
		return false
	default:
		return true
	}
}

// Running reports whether it runs.
func (p *Process) Running() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.running()
}

// PID is its process id, 0 while it does not run.
func (p *Process) PID() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.running() {
		return 0
	}
	return p.cmd.Process.Pid
}

// Signal sends a signal to the process, where it runs.
func (p *Process) Signal(sig syscall.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.running() {
		return nil
	}
	if err := p.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("signal %s: %w", p.Name, err)
	}
	return nil
}

// Kill ends it as kill -9 does, and waits until it is gone.
func (p *Process) Kill() error {
	err := p.Signal(syscall.SIGKILL)
	p.wait(time.Minute)
	return err
}

// Stop asks it to end and returns an error when it does not do so cleanly.
func (p *Process) Stop(within time.Duration) error {
	if p.PID() == 0 {
		return nil
	}
	if err := p.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	if !p.wait(within) {
		_ = p.Kill()
		return fmt.Errorf("%s did not stop within %v and was killed", p.Name, within)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err != nil {
		return fmt.Errorf("%s did not stop cleanly: %w", p.Name, p.err)
	}
	return nil
}

// wait returns whether it has ended within that time.
func (p *Process) wait(within time.Duration) bool {
	p.mu.Lock()
	ended := p.ended
	p.mu.Unlock()
	if ended == nil {
		return true
	}
	select {
	case <-ended:
		return true
	case <-time.After(within):
		return false
	}
}

// Tree lists the process and everything below it, parents first. Only what the
// rig started can be in it.
func (p *Process) Tree() []int {
	root := p.PID()
	if root == 0 {
		return nil
	}
	children := map[int][]int{}
	for _, pid := range processes() {
		if parent := parentOf(pid); parent > 0 {
			children[parent] = append(children[parent], pid)
		}
	}
	tree := []int{root}
	for i := 0; i < len(tree); i++ {
		tree = append(tree, children[tree[i]]...)
	}
	return tree
}

// SignalTree sends a signal to the process and to everything below it, again
// until nothing new has appeared there meanwhile.
func (p *Process) SignalTree(sig syscall.Signal) {
	var told []int
	for range 20 {
		fresh := slices.DeleteFunc(p.Tree(), func(pid int) bool { return slices.Contains(told, pid) })
		if len(fresh) == 0 {
			return
		}
		for _, pid := range fresh {
			_ = syscall.Kill(pid, sig) // it may have ended
		}
		told = append(told, fresh...)
	}
}

// KillTree ends the process and everything below it at one moment, as far as the
// commands can tell: they are stopped first, so that none outlives its parent.
func (p *Process) KillTree() error {
	p.SignalTree(syscall.SIGSTOP)
	tree := p.Tree()
	for _, pid := range tree {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	if !p.wait(time.Minute) {
		return fmt.Errorf("%s is still there after kill -9", p.Name)
	}
	return nil
}

func processes() []int {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		panic(err) // the pattern is constant
	}
	pids := make([]int, 0, len(dirs))
	for _, dir := range dirs {
		if pid, err := strconv.Atoi(filepath.Base(dir)); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

func parentOf(pid int) int {
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0
	}
	// pid (name) state ppid: the name may hold anything.
	fields := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
	if len(fields) < 2 {
		return 0
	}
	parent, _ := strconv.Atoi(fields[1])
	return parent
}

// Marked lists the processes whose command line or environment has the text,
// without the caller itself and those that are given.
func Marked(text string, except ...int) []string {
	var found []string
	for _, pid := range processes() {
		if pid == os.Getpid() || slices.Contains(except, pid) {
			continue
		}
		dir := "/proc/" + strconv.Itoa(pid)
		for _, file := range []string{"cmdline", "environ"} {
			data, err := os.ReadFile(filepath.Join(dir, file))
			if err == nil && strings.Contains(string(data), text) {
				cmdline, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
				found = append(found, fmt.Sprintf("process %d: %s", pid, strings.ReplaceAll(string(cmdline), "\x00", " ")))
				break
			}
		}
	}
	return found
}
