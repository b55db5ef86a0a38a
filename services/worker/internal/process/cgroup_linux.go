package process

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
	"golang.org/x/sys/unix"
)

// groupPrefix starts the name of every control group of this program:
// cmdexec.<worker>.<job>.<attempt>. None of the parts holds a dot.
const groupPrefix = "cmdexec."

// cpuPeriod is the window in which CPU time is counted, the kernel's default.
const cpuPeriod = 100 * time.Millisecond

// hierarchy is a place in a control group file system below which this worker
// makes its groups.
type hierarchy struct {
	base string // folder of the worker's own group
	v2   bool
	// What a group here can limit.
	memory, pids, cpu bool
	// home is the tasks file of base (v1 only): a thread that leaves a group
	// goes back there.
	home *os.File
	idle idleGroups
}

// mount is one line of /proc/self/mountinfo.
type mount struct {
	root, point, fstype string
	options             []string // of the super block
}

func readMounts() ([]mount, error) {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	return parseMounts(data), nil
}

func parseMounts(data []byte) []mount {
	var mounts []mount
	for line := range strings.Lines(string(data)) {
		head, tail, ok := strings.Cut(line, " - ")
		fields, more := strings.Fields(head), strings.Fields(tail)
		if !ok || len(fields) < 6 || len(more) < 1 {
			continue
		}
		m := mount{root: unescape(fields[3]), point: unescape(fields[4]), fstype: more[0]}
		if len(more) > 2 {
			m.options = strings.Split(more[2], ",")
		}
		mounts = append(mounts, m)
	}
	return mounts
}

// unescape undoes the octal escapes of mountinfo.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// ownGroups parses /proc/self/cgroup: controller, "name=x" or "" (v2) to path.
func ownGroups(data []byte) map[string]string {
	groups := map[string]string{}
	for line := range strings.Lines(strings.TrimSpace(string(data))) {
		parts := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(parts) != 3 {
			continue
		}
		for _, controller := range strings.Split(parts[1], ",") {
			groups[controller] = parts[2]
		}
	}
	return groups
}

// folderOf gives the folder of a group in a mount, "" where the mount does not
// show it.
func folderOf(m mount, group string) string {
	if strings.HasPrefix(group, "/..") {
		return "" // outside of this cgroup namespace
	}
	if m.root != "/" {
		rest, ok := strings.CutPrefix(group, m.root)
		if !ok || (rest != "" && rest[0] != '/') {
			return ""
		}
		group = rest
	}
	return filepath.Join(m.point, group)
}

// candidates lists the hierarchies of this machine that the worker is a member
// of, v2 first. Nothing is tried yet.
func candidates(mounts []mount, groups map[string]string, worker string) []*hierarchy {
	var v2, v1 []*hierarchy
	for _, m := range mounts {
		switch m.fstype {
		case "cgroup2":
			base := folderOf(m, groups[""])
			if base == "" {
				continue
			}
			if filepath.Base(base) == selfGroup(worker) {
				base = filepath.Dir(base)
			}
			v2 = append(v2, &hierarchy{base: base, v2: true})
			if os.Geteuid() == 0 && base != m.point {
				// Root may use the top of the hierarchy, where controllers are
				// commonly enabled, if its own group has none to give.
				v2 = append(v2, &hierarchy{base: m.point, v2: true})
			}
		case "cgroup":
			h := &hierarchy{}
			for _, option := range m.options {
				group, member := groups[option]
				if !member {
					continue
				}
				h.base = folderOf(m, group)
				h.memory = h.memory || option == "memory"
				h.pids = h.pids || option == "pids"
				h.cpu = h.cpu || option == "cpu"
			}
			if h.base != "" && (h.memory || h.pids || h.cpu) {
				v1 = append(v1, h)
			}
		}
	}
	return append(v2, v1...)
}

// selfGroup is where the worker moves itself where it must leave its own group
// to pass controllers on.
func selfGroup(worker string) string { return groupPrefix + worker + ".self" }

func groupName(worker, job string, attempt int) string {
	return groupPrefix + worker + "." + job + "." + strconv.Itoa(attempt)
}

// delegate enables the controllers of a v2 group for the groups below it, as far
// as that is allowed, and records which are.
func (h *hierarchy) delegate(worker string) {
	control := path.Join(h.base, "cgroup.subtree_control")
	have := fieldsOf(path.Join(h.base, "cgroup.controllers"))
	for _, controller := range []string{"memory", "pids", "cpu"} {
		if !have[controller] || fieldsOf(control)[controller] {
			continue
		}
		err := writeFileAt(unix.AT_FDCWD, control, "+"+controller)
		if errors.Is(err, unix.EBUSY) && h.stepAside(worker) {
			err = writeFileAt(unix.AT_FDCWD, control, "+"+controller)
		}
		if err != nil {
			continue
		}
	}
	enabled := fieldsOf(control)
	h.memory, h.pids, h.cpu = enabled["memory"], enabled["pids"], enabled["cpu"]
}

// stepAside moves the worker into a group below its own, since a v2 group that
// holds processes cannot pass controllers on. It does so only where the worker
// is alone in its group.
func (h *hierarchy) stepAside(worker string) bool {
	pids, err := readPids(unix.AT_FDCWD, path.Join(h.base, "cgroup.procs"))
	if err != nil || len(pids) != 1 || pids[0] != os.Getpid() {
		return false
	}
	leaf := path.Join(h.base, selfGroup(worker))
	if err := os.Mkdir(leaf, 0o755); err != nil && !errors.Is(err, unix.EEXIST) {
		return false
	}
	return writeFileAt(unix.AT_FDCWD, path.Join(leaf, "cgroup.procs"), strconv.Itoa(os.Getpid())) == nil
}

func fieldsOf(file string) map[string]bool {
	data, _ := os.ReadFile(file)
	set := map[string]bool{}
	for _, field := range strings.Fields(string(data)) {
		set[field] = true
	}
	return set
}

// group is one control group of one attempt.
type group struct {
	h     *hierarchy
	path  string
	fd    int // of its folder; -1 when it is closed
	files []controlFile
	gone  bool // removed, or given back to be used again
	// pidsLimit and shares are set where leave has to: the thread that starts the
	// command is a member for a moment.
	pidsLimit, shares int64
	// again is what it limits, where it may be used again; oomKills is how many it
	// had seen before this attempt.
	again    *quotas
	oomKills int64
}

// controlFile is a file of a group that stays open for as long as the group does.
type controlFile struct {
	name string
	fd   int
}

func makeGroup(h *hierarchy, name string) (*group, error) {
	g := &group{h: h, path: h.base + "/" + name, fd: -1}
	err := unix.Mkdir(g.path, 0o755)
	if errors.Is(err, unix.EEXIST) {
		// Of an attempt that could not be closed. It is emptied before it is used.
		g.destroy(time.Now().Add(time.Second))
		err = unix.Mkdir(g.path, 0o755)
	}
	if err != nil {
		return nil, fmt.Errorf("make control group: %w", err)
	}
	if g.fd, err = unix.Open(g.path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return nil, errors.Join(fmt.Errorf("open control group: %w", err), unix.Rmdir(g.path))
	}
	return g, nil
}

// limit sets those limits of a spec that this group's hierarchy enforces.
func (g *group) limit(spec executor.Spec) error {
	if g.h.memory && spec.MemoryMB > 0 {
		bytes := strconv.FormatInt(spec.MemoryMB<<20, 10)
		if g.h.v2 {
			if err := writeFileAt(g.fd, "memory.max", bytes); err != nil {
				return fmt.Errorf("set memory limit: %w", err)
			}
			if err := optional(writeFileAt(g.fd, "memory.swap.max", "0")); err != nil {
				return fmt.Errorf("forbid swap: %w", err)
			}
		} else {
			if err := g.write("memory.limit_in_bytes", bytes); err != nil {
				return fmt.Errorf("set memory limit: %w", err)
			}
			// Memory and swap together: none of it may be swap.
			if err := optional(g.write("memory.memsw.limit_in_bytes", bytes)); err != nil {
				return fmt.Errorf("forbid swap: %w", err)
			}
		}
	}
	if g.h.pids && spec.PIDs > 0 {
		limit := spec.PIDs
		if !g.h.v2 {
			g.pidsLimit = limit
			limit++ // the starting thread is a member for a moment
		}
		if err := g.write("pids.max", strconv.FormatInt(limit, 10)); err != nil {
			return fmt.Errorf("set process limit: %w", err)
		}
	}
	if !g.h.cpu {
		return nil
	}
	shares := spec.CPUShares()
	if !g.h.v2 {
		g.shares, shares = shares, executor.WholeShares // the starting thread does not yield: the worker waits for it
	}
	if err := g.weigh(shares); err != nil {
		return fmt.Errorf("set CPU weight: %w", err)
	}
	if err := g.limitCPU(spec.CPU); err != nil {
		return fmt.Errorf("set CPU limit: %w", err)
	}
	return nil
}

// limitCPU sets how many cores the members may use; 0: all.
func (g *group) limitCPU(cores float64) error {
	quota := max(int64(cores*float64(cpuPeriod.Microseconds())), 1000)
	switch {
	case g.h.v2 && cores > 0:
		return g.write("cpu.max", fmt.Sprintf("%d %d", quota, cpuPeriod.Microseconds()))
	case g.h.v2:
		return nil // it is new, without one
	case cores > 0:
		return g.write("cpu.cfs_quota_us", strconv.FormatInt(quota, 10)) // of the kernel's default period
	default:
		return g.write("cpu.cfs_quota_us", "-1")
	}
}

// weigh has the members yield to what is no job.
func (g *group) weigh(shares int64) error {
	if !g.h.v2 {
		return g.write("cpu.shares", strconv.FormatInt(shares, 10))
	}
	const whole, most = 100, 10_000 // of a v2 weight
	return g.write("cpu.weight", strconv.FormatInt(min(max((shares*whole+executor.WholeShares/2)/executor.WholeShares, 1), most), 10))
}

// enter makes the calling thread a member (v1 only). Moving the calling thread
// alone is cheap; moving a whole process waits for a grace period of the kernel.
func (g *group) enter() error {
	if err := g.write("tasks", "0"); err != nil {
		return fmt.Errorf("enter control group: %w", err)
	}
	return nil
}

// leave moves the calling thread back to the worker's own group, and sets what could
// not be set while it was a member.
func (g *group) leave() error {
	if _, err := unix.Write(int(g.h.home.Fd()), []byte("0")); err != nil {
		return fmt.Errorf("leave control group: %w", err)
	}
	if g.pidsLimit > 0 {
		if err := g.write("pids.max", strconv.FormatInt(g.pidsLimit, 10)); err != nil {
			return fmt.Errorf("set process limit: %w", err)
		}
	}
	if g.shares > 0 {
		if err := g.weigh(g.shares); err != nil {
			return fmt.Errorf("set CPU weight: %w", err)
		}
	}
	return nil
}

// measure reads what the members have used so far into u.
func (g *group) measure(u *usage) {
	if g.fd < 0 {
		return
	}
	if g.h.v2 {
		if n, ok := keyed(g.fd, "cpu.stat", "usage_usec"); ok {
			u.cpu = time.Duration(n) * time.Microsecond
		}
	}
	if !g.h.memory {
		return
	}
	peak, kills := "memory.max_usage_in_bytes", "memory.oom_control"
	if g.h.v2 {
		peak, kills = "memory.peak", "memory.events"
	}
	if n, ok := number(g.fd, peak); ok {
		u.peakMemory = n
	}
	if n, ok := keyed(g.fd, kills, "oom_kill"); ok {
		u.oomKills = n - g.oomKills
	}
}

// write writes to a control file in one call, as the kernel wants it. A file of a
// group that is used again stays open.
func (g *group) write(name, value string) error {
	if g.again == nil {
		return writeFileAt(g.fd, name, value)
	}
	for _, f := range g.files {
		if f.name == name {
			return writeValue(f.fd, value)
		}
	}
	fd, err := unix.Openat(g.fd, name, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	g.files = append(g.files, controlFile{name, fd})
	return writeValue(fd, value)
}

// shut closes the folder of the group and its files.
func (g *group) shut() {
	for _, f := range g.files {
		_ = unix.Close(f.fd)
	}
	g.files = nil
	if g.fd >= 0 {
		_ = unix.Close(g.fd)
		g.fd = -1
	}
}

// kill sends SIGKILL to every member, here and in groups that the command made
// below.
func (g *group) kill() {
	if g.gone {
		return
	}
	if g.h.v2 && writeFileAt(unix.AT_FDCWD, g.path+"/cgroup.kill", "1") == nil {
		return
	}
	if g.h.pids {
		// No member may fork faster than it is killed.
		_ = writeFileAt(unix.AT_FDCWD, g.path+"/pids.max", "0")
	}
	killMembers(g.path)
}

func killMembers(folder string) {
	for _, child := range subgroups(folder) {
		killMembers(child)
	}
	pids, err := readPids(unix.AT_FDCWD, folder+"/cgroup.procs")
	if err != nil {
		return
	}
	for _, pid := range pids {
		// A thread of the worker itself may be passing through (v1); 0 is a
		// process that this namespace cannot see.
		if pid > 1 && pid != os.Getpid() {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	}
}

func subgroups(folder string) []string {
	entries, err := os.ReadDir(folder)
	if err != nil {
		return nil
	}
	var found []string
	for _, entry := range entries {
		if entry.IsDir() {
			found = append(found, folder+"/"+entry.Name())
		}
	}
	return found
}

// destroy removes the group, killing what is in it as long as that is needed. It
// reports whether the group is gone, which the kernel grants only when it has no
// member left.
func (g *group) destroy(deadline time.Time) bool {
	if g.gone {
		return true
	}
	g.shut()
	pause := 100 * time.Microsecond
	for {
		err := unix.Rmdir(g.path)
		if err == nil || errors.Is(err, unix.ENOENT) {
			g.gone = true
			return true
		}
		g.kill()
		removeSubgroups(g.path)
		if time.Now().After(deadline) {
			return false
		}
		time.Sleep(pause)
		pause = min(2*pause, 5*time.Millisecond)
	}
}

func removeSubgroups(folder string) {
	for _, child := range subgroups(folder) {
		removeSubgroups(child)
		_ = unix.Rmdir(child)
	}
}

func optional(err error) error {
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

// writeFileAt writes one value to a control file in one call, as the kernel
// wants it.
func writeFileAt(dir int, name, value string) error {
	fd, err := unix.Openat(dir, name, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	return errors.Join(writeValue(fd, value), unix.Close(fd))
}

func writeValue(fd int, value string) error {
	for {
		if _, err := unix.Pwrite(fd, []byte(value), 0); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// readFileAt reads a small control file into buf.
func readFileAt(dir int, name string, buf []byte) ([]byte, error) {
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	for {
		n, err := unix.Read(fd, buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return buf[:max(n, 0)], err
	}
}

func number(dir int, name string) (int64, bool) {
	var buf [32]byte
	data, err := readFileAt(dir, name, buf[:])
	if err != nil {
		return 0, false
	}
	n, err := strconv.ParseInt(string(bytes.TrimSpace(data)), 10, 64)
	return n, err == nil
}

func keyed(dir int, name, key string) (int64, bool) {
	var buf [1024]byte
	data, err := readFileAt(dir, name, buf[:])
	if err != nil {
		return 0, false
	}
	for line := range bytes.Lines(data) {
		k, v, ok := bytes.Cut(line, []byte(" "))
		if ok && string(k) == key {
			n, err := strconv.ParseInt(string(bytes.TrimSpace(v)), 10, 64)
			return n, err == nil
		}
	}
	return 0, false
}

func readPids(dir int, name string) ([]int, error) {
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	var data bytes.Buffer
	if _, err := data.ReadFrom(f); err != nil {
		return nil, err
	}
	var pids []int
	for _, field := range strings.Fields(data.String()) {
		if pid, err := strconv.Atoi(field); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}
