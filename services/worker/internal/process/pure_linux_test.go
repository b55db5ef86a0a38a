package process

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
	"golang.org/x/sys/unix"
)

func TestParseMounts(t *testing.T) {
	got := parseMounts([]byte(`30 22 0:27 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
34 30 0:31 /docker/abc /sys/fs/cgroup/memory rw shared:9 master:1 - cgroup cgroup rw,memory
40 30 0:37 / /mnt/with\040space rw - cgroup2 cgroup2 rw
broken line
`))
	if len(got) != 3 || got[2].point != "/mnt/with space" || got[1].root != "/docker/abc" ||
		got[1].fstype != "cgroup" || !slices.Contains(got[1].options, "memory") {
		t.Fatalf("got %+v", got)
	}
}

func TestFolderOfGroup(t *testing.T) {
	for _, c := range []struct{ root, group, want string }{
		{"/", "/", "/cg"},
		{"/", "/a/b", "/cg/a/b"},
		{"/docker/abc", "/docker/abc", "/cg"},
		{"/docker/abc", "/docker/abc/x", "/cg/x"},
		{"/docker/abc", "/docker/abcd", ""},
		{"/docker/abc", "/other", ""},
		{"/", "/../outside", ""},
	} {
		if got := folderOf(mount{root: c.root, point: "/cg"}, c.group); got != c.want {
			t.Errorf("%+v: got %q", c, got)
		}
	}
}

func TestCandidatesOfAHybridMachine(t *testing.T) {
	mounts := parseMounts([]byte(`31 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
34 30 0:31 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
39 30 0:36 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd
40 30 0:37 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
`))
	groups := ownGroups([]byte("9:name=systemd:/s\n4:memory:/m/x\n1:cpu,cpuacct:/\n0::/u/cmdexec.w.self\n"))
	var got []string
	for _, c := range candidates(mounts, groups, "w") {
		text := c.base
		for name, has := range map[string]bool{" v2": c.v2, " memory": c.memory, " cpu": c.cpu} {
			if has {
				text += name
			}
		}
		got = append(got, text)
	}
	want := []string{
		// Out of the group that the worker made for itself.
		"/sys/fs/cgroup/unified/u v2",
		"/sys/fs/cgroup/cpu,cpuacct cpu",
		"/sys/fs/cgroup/memory/m/x memory",
	}
	if os.Geteuid() == 0 {
		want = slices.Insert(want, 1, "/sys/fs/cgroup/unified v2")
	}
	if !slices.Equal(got, want) {
		t.Fatalf("got %q, want %q", got, want)
	}
}

// The values written to a group where v2 has the controllers, which not every
// machine that runs the tests has.
func TestLimitsOfV2(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"memory.max", "memory.swap.max", "pids.max", "cpu.max", "cpu.weight"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	g := &group{h: &hierarchy{v2: true, memory: true, pids: true, cpu: true}, path: dir, fd: fd}
	if err := g.limit(executor.Spec{CPU: 1.5, MemoryMB: 512, PIDs: 128}); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"memory.max": "536870912", "memory.swap.max": "0", "pids.max": "128", "cpu.max": "150000 100000", "cpu.weight": "30",
	} {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != want {
			t.Errorf("%s is %q, %v", name, got, err)
		}
	}
}

func TestParseStat(t *testing.T) {
	p, ok := parseStat([]byte("42 (a) b) (c) Z 7 42 41 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 987654 0 0"))
	if !ok || p != (process{pid: 42, ppid: 7, session: 41, started: 987654, zombie: true}) {
		t.Fatalf("got %+v, %v", p, ok)
	}
	for _, text := range []string{"", "42", "42 (x", "42 (x) S 1", "x (y) S 1 2 3"} {
		if _, ok := parseStat([]byte(text)); ok {
			t.Errorf("%q was parsed", text)
		}
	}
}

func TestMembersOfATreeWithoutGroups(t *testing.T) {
	const self, main, other = 100, 200, 300
	marks := map[int]string{230: "mine", 240: "theirs", 252: "mine"}
	table := []process{
		{pid: 1, session: 1},
		{pid: 50, ppid: 1, session: 50, started: 1},
		{pid: self, ppid: 50, session: 50, started: 5},
		{pid: 110, ppid: self, session: 50, started: 25}, // started by the worker itself
		{pid: main, ppid: self, session: main, started: 20, zombie: true},
		{pid: 210, ppid: self, session: main, started: 21}, // in the session
		{pid: 211, ppid: 210, session: 211, started: 22},   // left it, parent is known
		{pid: 212, ppid: 211, session: 212, started: 22},
		{pid: 220, ppid: self, session: 220, started: 15}, // adopted, older than the attempt
		{pid: 230, ppid: self, session: 230, started: 40}, // adopted, with the mark
		{pid: other, ppid: self, session: other, started: 30},
		{pid: 240, ppid: self, session: 240, started: 40}, // adopted, mark of the other
		{pid: 241, ppid: 240, session: 240, started: 41},
		{pid: 250, ppid: self, session: 250, started: 25},               // adopted, no mark, before the other began
		{pid: 251, ppid: self, session: 251, started: 35},               // adopted, no mark, may be of either
		{pid: 252, ppid: 1, session: 252, started: 35},                  // went to init, with the mark
		{pid: 253, ppid: self, session: 253, started: 25, zombie: true}, // dead
		{pid: 310, ppid: other, session: other, started: 31},
		{pid: 999, ppid: 50, session: 50, started: 90}, // a stranger
	}
	pids := func(q quarry) (found []int) {
		for _, p := range q.members(table, func(pid int) string { return marks[pid] }) {
			found = append(found, p.pid)
		}
		return found
	}
	q := quarry{self: self, main: main, started: 20, mark: "mine", others: map[int]uint64{other: 30}}
	if got, want := pids(q), []int{210, 211, 212, 230, 250, 252}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	// The last attempt takes what could not be told apart before.
	q.others = nil
	table = slices.DeleteFunc(table, func(p process) bool { return p.session == other })
	if got, want := pids(q), []int{210, 211, 212, 230, 250, 251, 252}; !slices.Equal(got, want) {
		t.Errorf("alone: got %v, want %v", got, want)
	}
}
