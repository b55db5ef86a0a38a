package worker

import (
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
)

// ownLimits reads the limits of this process's control groups and of those
// around them. What cannot be read limits nothing.
func ownLimits() limits {
	groups, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return limits{}
	}
	return limitsOf(string(groups), "/sys/fs/cgroup")
}

// limitsOf reads the limits of the groups that a /proc/PID/cgroup names.
func limitsOf(groups, root string) limits {
	var l limits
	for line := range strings.Lines(groups) { // hierarchy:controllers:path
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) != 3 {
			continue
		}
		base := root
		if parts[1] != "" { // version 1: a folder for each set of controllers
			base = filepath.Join(root, parts[1])
		}
		for dir := path.Join("/", parts[2]); ; dir = path.Dir(dir) {
			// In a container the path may be the host's: then only the last step, the
			// root of what is mounted, exists.
			l.narrow(filepath.Join(base, dir))
			if dir == "/" {
				break
			}
		}
	}
	return l
}

func (l *limits) narrow(dir string) {
	read := func(name string) []string {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return nil
		}
		return strings.Fields(string(data))
	}
	quota := append(read("cpu.max"), append(read("cpu.cfs_quota_us"), read("cpu.cfs_period_us")...)...)
	if len(quota) >= 2 {
		most, err := strconv.ParseFloat(quota[0], 64) // "max", or -1 in version 1: none
		period, perr := strconv.ParseFloat(quota[1], 64)
		if err == nil && perr == nil && most > 0 && period > 0 && (l.cpu == 0 || most/period < l.cpu) {
			l.cpu = most / period
		}
	}
	for _, word := range append(read("memory.max"), read("memory.limit_in_bytes")...) {
		if n, err := strconv.ParseInt(word, 10, 64); err == nil && n > 0 && (l.memory == 0 || n < l.memory) {
			l.memory = n // version 1 says none with a number above any machine's memory
		}
	}
}
