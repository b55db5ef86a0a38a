package process

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
	"golang.org/x/sys/unix"
)

// tracking says which ways to follow a process tree may be used. Tests restrict
// it; everybody else takes what works.
type tracking int

const (
	anyTracking tracking = iota
	onlyV1
	noGroups
)

// host is what this machine can do.
type host struct {
	mark string // on everything that is started
	log  *slog.Logger
	null int
	// tracker follows process trees; nil: the process table is walked.
	tracker *hierarchy
	// memory, pids and cpu are where the limits are set, nil where none can be.
	memory, pids, cpu *hierarchy
	// adopts: orphans become children of the worker, which has to reap them.
	adopts bool

	mu   sync.Mutex
	live map[int]uint64 // main processes of live attempts and when they started

	basesFile string
	bases     []string // folders where groups of this or an earlier life may be
}

func newHost(mark, data string, null int, allowed tracking, log *slog.Logger) (*host, error) {
	h := &host{
		mark: mark, log: log, null: null, live: map[int]uint64{},
		basesFile: filepath.Join(data, "control-groups"),
		adopts:    os.Getpid() == 1,
	}
	closeOnExec()
	if allowed != noGroups {
		if err := h.discover(allowed); err != nil {
			return nil, err
		}
	}
	if h.tracker == nil {
		if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
			log.Warn("orphans of commands cannot be adopted", "error", err)
		}
	}
	var subreaper int32
	if err := unix.Prctl(unix.PR_GET_CHILD_SUBREAPER, uintptr(unsafe.Pointer(&subreaper)), 0, 0, 0); err == nil && subreaper != 0 {
		h.adopts = true
	}
	return h, h.rememberBases()
}

// closeOnExec keeps descriptors that this process was started with from reaching
// commands. What Go opens is marked already.
func closeOnExec() {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return
	}
	for _, entry := range entries {
		if fd, err := strconv.Atoi(entry.Name()); err == nil && fd > 2 {
			unix.CloseOnExec(fd)
		}
	}
}

// discover tries every hierarchy with a real process and keeps what works.
func (h *host) discover(allowed tracking) error {
	mounts, err := readMounts()
	if err != nil {
		return nil // no /proc: no control groups either
	}
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil
	}
	for _, c := range candidates(mounts, ownGroups(own), h.mark) {
		if c.v2 && allowed == onlyV1 {
			continue
		}
		if c.v2 {
			c.delegate(h.mark)
		}
		news := (c.memory && h.memory == nil) || (c.pids && h.pids == nil) || (c.cpu && h.cpu == nil)
		if h.tracker != nil && !news {
			continue
		}
		if h.tracker != nil && c.v2 {
			// One v2 group per attempt: the place with controllers takes over.
			if h.memory != nil || h.pids != nil || h.cpu != nil {
				continue
			}
		}
		if err := h.try(c); err != nil {
			h.log.Debug("control group hierarchy cannot be used", "folder", c.base, "error", err)
			if c.home != nil {
				_ = c.home.Close()
			}
			continue
		}
		if h.tracker == nil || c.v2 {
			h.tracker = c
		}
		if c.memory && h.memory == nil {
			h.memory = c
		}
		if c.pids && h.pids == nil {
			h.pids = c
		}
		if c.cpu && h.cpu == nil {
			h.cpu = c
		}
	}
	return nil
}

// try runs one short process in a group of a hierarchy, with all its limits.
func (h *host) try(c *hierarchy) (err error) {
	if !c.v2 {
		if c.home, err = os.OpenFile(c.base+"/tasks", os.O_WRONLY, 0); err != nil {
			return err
		}
	}
	g, err := makeGroup(c, groupName(h.mark, "try", os.Getpid()))
	if err != nil {
		return err
	}
	t := &tree{host: h, groups: []*group{g}, pidfd: -1}
	defer func() {
		if !g.destroy(time.Now().Add(5 * time.Second)) {
			err = errors.Join(err, errors.New("its group cannot be removed"))
		}
	}()
	if err := g.limit(executor.Spec{MemoryMB: 64, PIDs: 16, CPU: 1}); err != nil {
		return err
	}
	null := uintptr(h.null)
	err = t.start(&command{
		path: shellPath, argv: []string{shellPath, "-c", ":"}, dir: "/",
		files: [3]uintptr{null, null, null},
	})
	if err != nil {
		return err
	}
	t.giveUpAt(time.Now().Add(10 * time.Second))
	if !t.await(t.ended) {
		return errors.New("a process in it does not end")
	}
	t.forget()
	if t.status.ExitStatus() != 0 {
		return errors.New("a process in it fails")
	}
	return nil
}

func (h *host) limits() Limits {
	return Limits{CPU: h.cpu != nil, Memory: h.memory != nil, PIDs: h.pids != nil}
}

func (h *host) describe() string {
	if h.tracker == nil {
		return "process trees by session, parents and environment; no control group can be made here, so no limits hold"
	}
	version := func(c *hierarchy) string {
		if c.v2 {
			return "v2"
		}
		return "v1"
	}
	var limits []string
	for _, l := range []struct {
		name string
		h    *hierarchy
	}{{"cpu", h.cpu}, {"memory", h.memory}, {"processes", h.pids}} {
		if l.h != nil {
			limits = append(limits, l.name+" ("+version(l.h)+")")
		}
	}
	text := "process trees by control group " + version(h.tracker)
	if len(limits) == 0 {
		return text + "; no limits hold"
	}
	return text + "; limits: " + strings.Join(limits, ", ")
}

// newTree makes the control groups of an attempt.
func (h *host) newTree(spec executor.Spec, mark string) (*tree, error) {
	t := &tree{host: h, mark: mark, pidfd: -1}
	var wanted [4]*hierarchy
	wanted[0] = h.tracker
	if spec.MemoryMB > 0 {
		wanted[1] = h.memory
	}
	if spec.PIDs > 0 {
		wanted[2] = h.pids
	}
	wanted[3] = h.cpu // also where it has no limit: it yields
	name := groupName(h.mark, spec.JobID, spec.Attempt)
	for i, c := range wanted {
		if c == nil || slices.Contains(wanted[:i], c) {
			continue
		}
		g, err := h.newGroup(c, name, spec)
		if g != nil {
			t.groups = append(t.groups, g)
		}
		if err != nil {
			return nil, executor.InfraError("the limits of the command cannot be set", errors.Join(err, t.remove()))
		}
	}
	return t, nil
}

// newGroup gives a group with its limits set. With an error it may give one that has
// to be destroyed.
func (h *host) newGroup(c *hierarchy, name string, spec executor.Spec) (*group, error) {
	// The tracker is new for every attempt: that the kernel lets it be removed proves
	// that nothing of the attempt is left. Version 2 cannot forget its peak.
	reusable := !c.v2 && c != h.tracker
	want := quotasOf(c, spec)
	if reusable {
		if g := c.idle.take(want); g != nil {
			if err := g.renew(spec); err == nil {
				return g, nil
			}
			g.destroy(time.Now().Add(time.Second))
		}
		name = idleGroupName(h.mark, c.idle.number())
	}
	g, err := makeGroup(c, name)
	if err != nil {
		return nil, err
	}
	if reusable {
		g.again = &want
	}
	return g, g.limit(spec)
}

func (h *host) close() error {
	var errs []error
	closed := map[*hierarchy]bool{}
	for _, c := range []*hierarchy{h.tracker, h.memory, h.pids, h.cpu} {
		if c != nil && c.home != nil && !closed[c] {
			closed[c] = true
			errs = append(errs, c.idle.remove(), c.home.Close())
		}
	}
	return errors.Join(errs...)
}

// rememberBases notes where groups are made, so that a later life finds them
// also when it is started in another group.
func (h *host) rememberBases() error {
	old, err := os.ReadFile(h.basesFile)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("read where control groups were made: %w", err)
	}
	bases := map[string]bool{}
	for line := range strings.Lines(string(old)) {
		if line = strings.TrimSuffix(line, "\n"); line != "" {
			bases[line] = true
		}
	}
	known := len(bases)
	for _, c := range []*hierarchy{h.tracker, h.memory, h.pids, h.cpu} {
		if c != nil {
			bases[c.base] = true
		}
	}
	h.bases = slices.Sorted(maps.Keys(bases))
	if len(bases) == known {
		return nil
	}
	text := strings.Join(h.bases, "\n") + "\n"
	if err := os.WriteFile(h.basesFile, []byte(text), 0o600); err != nil {
		return fmt.Errorf("note where control groups are made: %w", err)
	}
	return nil
}

// recover removes the groups and kills the processes that carry the worker's id.
func (h *host) recover(ctx context.Context, bound time.Duration) error {
	var errs []error
	prefix := groupPrefix + h.mark + "."
	for _, base := range h.bases {
		entries, err := os.ReadDir(base)
		if err != nil {
			if !errors.Is(err, os.ErrNotExist) {
				errs = append(errs, err)
			}
			continue
		}
		for _, entry := range entries {
			if err := ctx.Err(); err != nil {
				return errors.Join(append(errs, err)...)
			}
			name := entry.Name()
			if !entry.IsDir() || !strings.HasPrefix(name, prefix) || name == selfGroup(h.mark) {
				continue
			}
			g := &group{h: &hierarchy{base: base, v2: isV2(base), pids: hasPids(base, name)}, path: base + "/" + name, fd: -1}
			if !g.destroy(time.Now().Add(bound)) {
				errs = append(errs, fmt.Errorf("control group %s still has processes", name))
				continue
			}
			h.log.Info("removed a control group of an earlier life", "group", name)
		}
	}
	return errors.Join(append(errs, h.killMarked(ctx, bound))...)
}

func isV2(base string) bool {
	_, err := os.Stat(base + "/cgroup.controllers")
	return err == nil
}

func hasPids(base, name string) bool {
	_, err := os.Stat(base + "/" + name + "/pids.max")
	return err == nil
}

// killMarked kills every process whose environment carries the worker's mark,
// except the worker and those it descends from.
func (h *host) killMarked(ctx context.Context, bound time.Duration) error {
	deadline := time.Now().Add(bound)
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		table, err := readProcesses()
		if err != nil {
			return err
		}
		spared := ancestors(table, os.Getpid())
		left := 0
		var killErr error
		for _, p := range table {
			if p.zombie || spared[p.pid] || !strings.HasPrefix(readMark(p.pid), h.mark+"/") {
				continue
			}
			left++
			if err := killProcess(p); err != nil {
				killErr = err
			} else {
				h.log.Info("killed a process of an earlier life", "pid", p.pid)
			}
		}
		if left == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return errors.Join(fmt.Errorf("%d processes of an earlier life are still there", left), killErr)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause):
		}
	}
}

// ancestors gives pid and everything that it descends from.
func ancestors(table []process, pid int) map[int]bool {
	parents := make(map[int]int, len(table))
	for _, p := range table {
		parents[p.pid] = p.ppid
	}
	line := map[int]bool{}
	for pid > 0 && !line[pid] {
		line[pid] = true
		pid = parents[pid]
	}
	return line
}

// reapOrphans collects dead orphans that came to the worker. The worker's own
// children are left alone: main processes of attempts, and whatever is in the
// worker's own session.
func (h *host) reapOrphans() {
	if !h.adopts {
		return
	}
	self := os.Getpid()
	own, ok := readProcess(self)
	if !ok {
		return
	}
	var children []process
	// Orphans are given to the first thread.
	pids, err := readPids(unix.AT_FDCWD, fmt.Sprintf("/proc/self/task/%d/children", self))
	if err == nil {
		for _, pid := range pids {
			if p, ok := readProcess(pid); ok {
				children = append(children, p)
			}
		}
	} else if children, err = readProcesses(); err != nil {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, p := range children {
		if _, main := h.live[p.pid]; p.zombie && p.ppid == self && p.session != own.session && !main {
			var status syscall.WaitStatus
			_, _ = syscall.Wait4(p.pid, &status, syscall.WNOHANG, nil)
		}
	}
}

func signalName(s syscall.Signal) string {
	if name := unix.SignalName(s); name != "" {
		return name
	}
	return fmt.Sprintf("SIG%d", int(s))
}
