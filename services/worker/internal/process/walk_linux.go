package process

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// process is one line of the process table.
type process struct {
	pid, ppid, session int
	started            uint64 // clock ticks since boot
	zombie             bool
}

// parseStat parses /proc/<pid>/stat.
func parseStat(data []byte) (process, bool) {
	// The second field is the program's name in parentheses, which may hold
	// anything; the last parenthesis ends it.
	open, end := bytes.IndexByte(data, '('), bytes.LastIndexByte(data, ')')
	if open < 1 || end < open {
		return process{}, false
	}
	pid, err := strconv.Atoi(string(bytes.TrimSpace(data[:open])))
	fields := bytes.Fields(data[end+1:])
	if err != nil || len(fields) < 20 {
		return process{}, false
	}
	p := process{pid: pid, zombie: fields[0][0] == 'Z' || fields[0][0] == 'X'}
	var err1, err2, err3 error
	p.ppid, err1 = strconv.Atoi(string(fields[1]))
	p.session, err2 = strconv.Atoi(string(fields[3]))
	p.started, err3 = strconv.ParseUint(string(fields[19]), 10, 64)
	return p, err1 == nil && err2 == nil && err3 == nil
}

func readProcess(pid int) (process, bool) {
	var buf [1024]byte
	data, err := readFileAt(unix.AT_FDCWD, "/proc/"+strconv.Itoa(pid)+"/stat", buf[:])
	if err != nil {
		return process{}, false
	}
	return parseStat(data)
}

// readProcesses reads the process table.
func readProcesses() ([]process, error) {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	var table []process
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil {
			if p, ok := readProcess(pid); ok {
				table = append(table, p)
			}
		}
	}
	return table, nil
}

// readMark gives the mark in a process's environment, "" where there is none or
// it cannot be read.
func readMark(pid int) string {
	env, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/environ")
	if err != nil {
		return ""
	}
	for entry := range bytes.SplitSeq(env, []byte{0}) {
		if value, ok := bytes.CutPrefix(entry, []byte(markName+"=")); ok {
			return string(value)
		}
	}
	return ""
}

// killProcess kills p if it is still the process that was seen, not another one
// that got its id.
func killProcess(p process) error {
	if p.pid <= 1 || p.pid == os.Getpid() {
		return fmt.Errorf("process %d is not to be killed", p.pid)
	}
	fd, err := unix.PidfdOpen(p.pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	now, ok := readProcess(p.pid)
	same := ok && now.started == p.started
	if err == nil {
		defer unix.Close(fd)
		if !same {
			return nil
		}
		err = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
		if !errors.Is(err, unix.ENOSYS) {
			return ignoreGone(err)
		}
	}
	if !same {
		return nil
	}
	return ignoreGone(unix.Kill(p.pid, unix.SIGKILL)) // kernels before 5.3
}

func ignoreGone(err error) error {
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	return err
}

// quarry says what belongs to one attempt when there is no control group.
type quarry struct {
	self    int    // the worker
	main    int    // main process, leader of the attempt's session
	started uint64 // of the main process
	mark    string
	// others are the main processes of other live attempts, by start time.
	others map[int]uint64
}

// members picks the processes of an attempt from the process table, living ones
// only. markOf is asked only for those that nothing else decides.
//
// A process belongs to the attempt when it is in the attempt's session, carries
// its mark, descends from such a process, or was adopted by the worker (as
// subreaper) in a way that no other live attempt can explain: it left its
// session, its parent and its environment behind, and only this attempt was
// running when it started.
func (q quarry) members(table []process, markOf func(pid int) string) []process {
	byPID := make(map[int]process, len(table))
	for _, p := range table {
		byPID[p.pid] = p
	}
	const (
		unknown = iota
		member
		stranger
	)
	verdicts := make(map[int]int, len(table))
	var judge func(p process, depth int) int
	judge = func(p process, depth int) int {
		if v := verdicts[p.pid]; v != unknown {
			return v
		}
		verdict := stranger
		_, otherMain := q.others[p.pid]
		_, otherSession := q.others[p.session]
		switch {
		case p.pid == q.main || p.session == q.main:
			verdict = member
		case p.pid == q.self || p.pid <= 1 || p.ppid == 0 || otherMain || otherSession || depth > len(table):
		case p.ppid == q.self:
			switch m := markOf(p.pid); {
			case m == q.mark:
				verdict = member
			case m == "" && p.started >= q.started && q.adopted(p, byPID) && !q.explainedByOthers(p):
				verdict = member
			}
		default:
			if parent, ok := byPID[p.ppid]; ok && judge(parent, depth+1) == member {
				verdict = member
			} else if p.started >= q.started && markOf(p.pid) == q.mark {
				verdict = member
			}
		}
		verdicts[p.pid] = verdict
		return verdict
	}
	var found []process
	for _, p := range table {
		if !p.zombie && judge(p, 0) == member {
			found = append(found, p)
		}
	}
	return found
}

// adopted reports whether a child of the worker came to it as an orphan: what
// the worker starts itself stays in the worker's session.
func (q quarry) adopted(p process, byPID map[int]process) bool {
	worker, ok := byPID[q.self]
	return ok && p.session != worker.session
}

func (q quarry) explainedByOthers(p process) bool {
	for _, started := range q.others {
		if started <= p.started {
			return true
		}
	}
	return false
}
