package docker_test

import (
	"context"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/client"

	"github.com/cmdexec/cmdexec/services/worker/internal/docker"
	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
)

// inspect finds the container of a lease as the engine sees it.
func inspect(t *testing.T, api *client.Client, lease string) (container.InspectResponse, string) {
	t.Helper()
	found := ofLease(t, api, lease)
	if len(found) != 1 {
		t.Fatalf("%d containers of the lease", len(found))
	}
	got, raw, err := api.ContainerInspectWithRaw(context.Background(), found[0].ID, false)
	if err != nil {
		t.Fatal(err)
	}
	return got, string(raw)
}

func TestHardeningByInspect(t *testing.T) { eachPath(t, testHardeningByInspect) }

func testHardeningByInspect(t *testing.T, x *docker.Executor) {
	api := engine(t)
	info, err := api.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	spec := shell("echo started; sleep 60")
	spec.Env = map[string]string{"SECRET": "of-the-job"}
	spec.CPU, spec.MemoryMB, spec.PIDs, spec.TmpfsMB = 0.5, 64, 32, 8
	r := start(t, x, spec)
	r.says("started")
	got, raw := inspect(t, api, spec.LeaseID)
	r.Stop(executor.StopLeaseLost)
	r.finish()

	h, c := got.HostConfig, got.Config
	check := func(what string, ok bool) {
		t.Helper()
		if !ok {
			t.Errorf("%s: not as promised\n%s", what, raw)
		}
	}
	check("not privileged", !h.Privileged)
	check("CapDrop ALL, CapAdd none", slices.Equal(h.CapDrop, []string{"ALL"}) && len(h.CapAdd) == 0)
	check("no new privileges, seccomp not replaced", slices.Equal(h.SecurityOpt, []string{"no-new-privileges:true"}))
	check("read-only root", h.ReadonlyRootfs)
	check("no binds, volumes, devices", len(h.Binds) == 0 && len(h.VolumesFrom) == 0 && len(h.Devices) == 0)
	if r.warm { // the init, and nothing else
		check("one mount, read-only", len(h.Mounts) == 1 && len(got.Mounts) == 1 && h.Mounts[0].ReadOnly && !got.Mounts[0].RW &&
			got.Mounts[0].Type == "volume" && got.Mounts[0].Destination == "/.cmdexec" && strings.HasPrefix(got.Mounts[0].Name, "cmdexec-init-"))
		check("what the job is told is not in its configuration", !strings.Contains(raw, "of-the-job"))
	} else {
		check("no mounts", len(h.Mounts) == 0 && len(got.Mounts) == 0)
	}
	for _, dir := range []string{"/tmp", "/work"} {
		for _, option := range []string{"nosuid", "nodev", "size=8m", "nr_inodes="} {
			check(dir+" "+option, strings.Contains(h.Tmpfs[dir], option))
		}
	}
	check("no network", c.NetworkDisabled)
	check("own namespaces", h.IpcMode == "private" && h.CgroupnsMode == "private" && h.PidMode == "" && h.UTSMode == "" && h.UsernsMode == "")
	check("memory is memory and swap", h.Memory == 64<<20 && h.MemorySwap == h.Memory)
	if info.CgroupVersion == "1" {
		check("swappiness", h.MemorySwappiness != nil && *h.MemorySwappiness == 0)
	}
	check("CPU", h.NanoCPUs == 5e8)
	check("processes and the init", h.PidsLimit != nil && *h.PidsLimit == 33 && h.Init != nil && *h.Init)
	limits := map[string]int64{}
	for _, u := range h.Ulimits {
		check("soft is hard", u.Soft == u.Hard)
		limits[u.Name] = u.Hard
	}
	check("ulimits", limits["nofile"] == 1024 && limits["core"] == 0 && limits["fsize"] == 1<<30 && len(limits) == 3)
	check("OOM first", h.OomScoreAdj == 500)
	check("no log on the host's disk", h.LogConfig.Type == "none") // unless commands are to outlive the worker: see TestAdopt
	check("no restart", h.RestartPolicy.Name == "no" && !h.AutoRemove)
	check("user", c.User == "65534:65534")
	check("labels of the worker", c.Labels["cmdexec.worker"] == workerID(t.Name()) && c.Labels["cmdexec.mark"] == workerID(t.Name()))
	check("labels of the job", r.warm || c.Labels["cmdexec.job"] == spec.JobID &&
		c.Labels["cmdexec.attempt"] == "1" && c.Labels["cmdexec.lease"] == spec.LeaseID)
	check("name", strings.HasPrefix(got.Name, "/cmdexec-"+spec.JobID+"-1-"))
	host, _ := os.Hostname()
	check("hostname", c.Hostname == "job" && c.Hostname != host)
	check("no secret of the worker", !strings.Contains(raw, canary))
}

// inside is run in a container; every line of its output is name=value.
const inside = `
say() { echo "$1=$2"; }
for f in CapInh CapPrm CapEff CapBnd CapAmb NoNewPrivs Seccomp; do say $f $(grep "^$f:" /proc/self/status | cut -f2); done
say uid $(id -u)
say gid $(id -g)
touch /x 2>/tmp/e && say root writable || say root "$(cat /tmp/e)"
touch /bin/x /etc/passwd 2>/dev/null && say bin writable || say bin no
say net "$(ls /sys/class/net | tr '\n' ' ')"
nslookup example.com >/dev/null 2>&1 && say dns yes || say dns no
timeout 2 nc 169.254.169.254 80 </dev/null >/dev/null 2>&1 && say metadata yes || say metadata no
ls /var/run/docker.sock /run/docker.sock >/dev/null 2>&1 && say socket yes || say socket no
say hostname "$(hostname)"
say procs "$(ls -d /proc/[0-9]* | wc -l)"
c=/sys/fs/cgroup
if [ -e $c/memory/memory.limit_in_bytes ]; then
  say memory $(cat $c/memory/memory.limit_in_bytes)
  say swap $(($(cat $c/memory/memory.memsw.limit_in_bytes) - $(cat $c/memory/memory.limit_in_bytes)))
  say pids $(cat $c/pids/pids.max)
  say cpu "$(cat $c/cpu/cpu.cfs_quota_us) $(cat $c/cpu/cpu.cfs_period_us)"
  say yields $(($(cat $c/cpu/cpu.shares) < 1024))
else
  say memory $(cat $c/memory.max)
  say swap $(cat $c/memory.swap.max)
  say pids $(cat $c/pids.max)
  say cpu "$(cat $c/cpu.max)"
  say yields $(($(cat $c/cpu.weight) < 100))
fi
say cgroup "$(cut -d: -f3 /proc/self/cgroup | sort -u | tr '\n' ' ')"
say nofile $(ulimit -n)
say core $(ulimit -c)
say fsize $(ulimit -f)
say oomadj $(cat /proc/self/oom_score_adj)
unshare -U true 2>/dev/null && say userns yes || say userns no
unshare -n true 2>/dev/null && say netns yes || say netns no
mount -t tmpfs x /tmp 2>/dev/null && say mount yes || say mount no
mknod /tmp/null c 1 3 2>/dev/null && say mknod yes || say mknod no
chown 0 /tmp/e 2>/dev/null && say chown yes || say chown no
touch /sys/x /proc/sys/kernel/x 2>/dev/null && say sys writable || say sys no
echo 1 2>/dev/null >/proc/sys/kernel/domainname && say sysctl yes || say sysctl no
say kcore $(head -c 1 /proc/kcore 2>/dev/null | wc -c)
say keys $(wc -c </proc/keys)
say init "$(tr '\0' ' ' </proc/1/cmdline | head -1 | cut -d' ' -f1)"
say devices "$(find /dev -type b -o -type c | sort | tr '\n' ' ')"
say mounts "$(grep -E ' (/tmp|/work) ' /proc/mounts | tr '\n' ';')"
say shm "$(grep ' /dev/shm ' /proc/mounts)"
say env "$(env | cut -d= -f1 | sort | tr '\n' ' ')"
say canary $(cat /proc/*/environ /proc/*/cmdline 2>/dev/null | grep -c 's[k]_canary')
say pwd $(pwd)
`

func TestHardeningFromInside(t *testing.T) { eachPath(t, testHardeningFromInside) }

func testHardeningFromInside(t *testing.T, x *docker.Executor) {
	spec := shell(inside)
	spec.CPU, spec.MemoryMB, spec.PIDs, spec.TmpfsMB = 0.5, 64, 32, 8
	spec.Env = map[string]string{"MINE": "1"}
	r := run(t, x, spec)
	if r.code() != 0 {
		t.Fatal(r)
	}
	got := map[string]string{}
	for line := range strings.Lines(r.out) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		got[name] = strings.TrimSpace(value)
	}
	host, _ := os.Hostname()
	for name, want := range map[string]string{
		"CapInh": strings.Repeat("0", 16), "CapPrm": strings.Repeat("0", 16), "CapEff": strings.Repeat("0", 16),
		"CapBnd": strings.Repeat("0", 16), "CapAmb": strings.Repeat("0", 16), "NoNewPrivs": "1", "Seccomp": "2",
		"uid": "65534", "gid": "65534", "root": "touch: /x: Read-only file system", "bin": "no",
		"net": "lo", "dns": "no", "metadata": "no", "socket": "no", "hostname": "job",
		"memory": "67108864", "swap": "0", "pids": "33", "cpu": "50000 100000", "yields": "1", "cgroup": "/",
		"nofile": "1024", "core": "0", "fsize": "2097152", "oomadj": "500",
		"userns": "no", "netns": "no", "mount": "no", "mknod": "no", "chown": "no", "sys": "no", "sysctl": "no",
		"kcore": "0", "keys": "0", "init": "/sbin/docker-init", "canary": "0", "pwd": "/work",
		"devices": "/dev/full /dev/null /dev/pts/ptmx /dev/random /dev/tty /dev/urandom /dev/zero",
		"env":     "CMDEXEC_ATTEMPT CMDEXEC_JOB_ID HOME HOSTNAME LANG MINE PATH PWD SHLVL TMPDIR",
	} {
		if got[name] != want {
			t.Errorf("%s is %q, want %q", name, got[name], want)
		}
	}
	if got["hostname"] == host {
		t.Error("the container has this machine's name")
	}
	mounts := strings.Split(strings.TrimSuffix(got["mounts"], ";"), ";")
	if len(mounts) != 2 {
		t.Fatalf("mounts: %q", got["mounts"])
	}
	for _, m := range mounts {
		for _, option := range []string{"tmpfs", "nosuid", "nodev", "size=8192k", "nr_inodes=16384"} {
			if !strings.Contains(m, option) {
				t.Errorf("%s lacks %s", m, option)
			}
		}
	}
	t.Log(got["shm"])
}

// imageWith makes an image from the test image with changes of its
// configuration, as of a Dockerfile.
func imageWith(t *testing.T, api *client.Client, name string, changes ...string) string {
	t.Helper()
	root, err := api.ContainerExport(t.Context(), neverRun(t, api))
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	ref := "cmdexec-test/" + name + ":1"
	importImage(t, api, ref, root, changes...)
	return ref
}

// neverRun makes a container of the test image for its files.
func neverRun(t *testing.T, api *client.Client) string {
	t.Helper()
	made, err := api.ContainerCreate(t.Context(), &container.Config{Image: testImage, Cmd: []string{"true"}}, nil, nil, nil, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = api.ContainerRemove(context.Background(), made.ID, container.RemoveOptions{Force: true}) })
	return made.ID
}

func TestUsers(t *testing.T) { eachPath(t, testUsers) }

func testUsers(t *testing.T, x *docker.Executor) {
	api := engine(t)
	for _, c := range []struct {
		image string // its USER; empty: the image without one
		user  string // of the job
		want  string // uid:gid
		files bool   // with a file, whose owner must be the user
	}{
		{"", "", "65534:65534", true},
		{"app", "", "1234:1234", true},
		{"1234", "", "1234:1234", false},
		{"4321:99", "", "4321:99", true},
		{"root", "", "65534:65534", false},
		{"0:0", "", "65534:65534", false},
		{"000", "", "65534:65534", false},
		{"alsoroot", "", "65534:65534", true}, // another name of 0
		{"nosuchuser", "", "65534:65534", false},
		{"app", "77:88", "77:88", true},
		{"", "app", "1234:1234", true},
		{"app", "0:0", "0:0", true}, // the job's own wish; it has no capabilities either
	} {
		t.Run("image="+c.image+",job="+c.user, func(t *testing.T) {
			spec := shell(`echo $(id -u):$(id -g); grep CapEff /proc/self/status; echo x > /work/own; [ ! -e f ] || { stat -c %u f; echo more >> f; }`)
			spec.User = c.user
			if c.image != "" {
				spec.Image = imageWith(t, api, "user-"+strings.ReplaceAll(c.image, ":", "-"), "USER "+c.image)
			}
			uid, _, _ := strings.Cut(c.want, ":")
			want := c.want + "\nCapEff:\t0000000000000000\n"
			if c.files {
				spec.Files = []executor.File{{Path: "f", Content: []byte("x")}}
				want += uid + "\n"
			}
			if r := run(t, x, spec); r.code() != 0 || r.out != want {
				t.Fatalf("want %q, got %s", want, r)
			}
		})
	}
	for _, files := range [][]executor.File{nil, {{Path: "f"}}} {
		spec := shell("true")
		spec.User, spec.Files = "nosuchuser", files
		a, err := x.Prepare(t.Context(), spec)
		if err == nil {
			err = a.Start(io.Discard, io.Discard)
			_ = a.Close()
		}
		if pe := executor.AsPrepareError(err); pe == nil || pe.Class != executor.ClassUser || !strings.Contains(pe.Reason, "no such user") {
			t.Fatalf("got %v", err)
		}
	}
}

// What an image says of volumes and entry points has no effect; its variables do.
func TestImageConfiguration(t *testing.T) { eachPath(t, testImageConfiguration) }

func testImageConfiguration(t *testing.T, x *docker.Executor) {
	api := engine(t)
	spec := shell("grep -E ' (/data|/work|/deep/er) ' /proc/mounts; echo $FROM_IMAGE $HOME; touch /data/x /deep/er/x")
	spec.Image = imageWith(t, api, "config", `VOLUME ["/data", "/work", "/deep/er"]`, `ENTRYPOINT ["/bin/false"]`,
		"ENV FROM_IMAGE=yes HOME=/root", "HEALTHCHECK --interval=1s CMD touch /data/health", "WORKDIR /root")
	r := start(t, x, spec)
	got, _ := inspect(t, api, spec.LeaseID)
	res := r.finish()
	if res.code() != 0 || strings.Count(res.out, "nosuid,nodev") != 3 || strings.Count(res.out, "size=16384k") != 3 || !strings.Contains(res.out, "yes /work") {
		t.Fatal(res)
	}
	if len(got.Mounts) != 0 && !r.warm || len(got.Mounts) > 1 {
		t.Fatalf("the image's volumes became real: %v", got.Mounts)
	}
	if test := got.Config.Healthcheck; test == nil || !slices.Equal(test.Test, []string{"NONE"}) {
		t.Fatal("the image's health check runs")
	}
}

func TestWhatCannotBeGivenIsRefused(t *testing.T) { eachPath(t, testWhatCannotBeGivenIsRefused) }

func testWhatCannotBeGivenIsRefused(t *testing.T, x *docker.Executor) {
	for name, c := range map[string]struct {
		change func(*executor.Spec)
		class  executor.Class
		reason string
	}{
		"network":     {func(s *executor.Spec) { s.NetworkBridge = true }, executor.ClassInfra, "network"},
		"cores":       {func(s *executor.Spec) { s.CPU = 4096 }, executor.ClassInfra, "asks for 4096 cores"},
		"CPU":         {func(s *executor.Spec) { s.CPU = 0.001 }, executor.ClassUser, "at least 0.01"},
		"memory":      {func(s *executor.Spec) { s.MemoryMB = 1 }, executor.ClassUser, "at least 6 MiB"},
		"no image":    {func(s *executor.Spec) { s.Image = "" }, executor.ClassInfra, "no image"},
		"image name":  {func(s *executor.Spec) { s.Image = "Not Valid" }, executor.ClassUser, "not valid"},
		"never":       {func(s *executor.Spec) { s.Image, s.PullPolicy = "cmdexec-test/nothing:1", "never" }, executor.ClassUser, "never"},
		"policy":      {func(s *executor.Spec) { s.PullPolicy = "sometimes" }, executor.ClassUser, "pull policy"},
		"signal":      {func(s *executor.Spec) { s.StopSignal = "SIGSEGV" }, executor.ClassUser, "SIGSEGV"},
		"user":        {func(s *executor.Spec) { s.User = "a b" }, executor.ClassUser, "user"},
		"file":        {func(s *executor.Spec) { s.Files = []executor.File{{Path: "../x"}} }, executor.ClassUser, "plain relative path"},
		"file twice":  {func(s *executor.Spec) { s.Files = []executor.File{{Path: "x"}, {Path: "x"}} }, executor.ClassUser, "twice"},
		"file folder": {func(s *executor.Spec) { s.Files = []executor.File{{Path: "x"}, {Path: "x/y"}} }, executor.ClassUser, "a file and a folder"},
		"too much": {func(s *executor.Spec) {
			s.TmpfsMB, s.Files = 1, []executor.File{{Path: "x", Content: make([]byte, 2<<20)}}
		}, executor.ClassUser, "do not fit"},
		"working folder": {func(s *executor.Spec) { s.WorkingDir = "../../etc" }, executor.ClassUser, "leads out"},
		"no command":     {func(s *executor.Spec) { s.Shell = "" }, executor.ClassUser, "no command"},
		"environment":    {func(s *executor.Spec) { s.Env = map[string]string{"A=B": "x"} }, executor.ClassUser, "impossible name"},
		"reserved":       {func(s *executor.Spec) { s.Env = map[string]string{"CMDEXEC_JOB_ID": "x"} }, executor.ClassUser, "set by the worker"},
		"other worker":   {func(s *executor.Spec) { s.WorkerID = "worker-other" }, executor.ClassInfra, "another worker"},
	} {
		spec := shell("true")
		c.change(&spec)
		if pe := refused(t, x, spec); pe.Class != c.class || !strings.Contains(pe.Reason, c.reason) {
			t.Errorf("%s: class %s, reason %q", name, pe.Class, pe.Reason)
		}
	}
	// An engine without the runtime that the owner set is not used at all.
	y := newExecutor(t, func(o *docker.Options) { o.Runtime = "runsc-not-here" })
	if err := y.Probe(t.Context()); err == nil || !strings.Contains(err.Error(), "does not know the runtime") {
		t.Errorf("probe: %v", err)
	}
	if pe := refused(t, y, shell("true")); pe.Code != executor.CodeEngine {
		t.Errorf("got %+v", pe)
	}
}

// A network needs the job, the owner and the engine to agree; where the engine
// has none the job is not run without.
func TestNetwork(t *testing.T) {
	api := engine(t)
	x := newExecutor(t, func(o *docker.Options) { o.AllowBridge = true })
	spec := shell("ls /sys/class/net | tr '\\n' ' '")
	spec.NetworkBridge = true
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	_, err := api.NetworkInspect(ctx, "bridge", networkInspectOptions)
	if err == nil {
		if r := run(t, x, spec); r.code() != 0 || !strings.Contains(r.out, "eth0") {
			t.Fatal(r)
		}
		return
	}
	a, err := x.Prepare(t.Context(), spec)
	if err == nil {
		err = a.Start(io.Discard, io.Discard)
		_ = a.Close()
	}
	if pe := executor.AsPrepareError(err); pe == nil || pe.Class != executor.ClassInfra || pe.Code != executor.CodeEngine {
		t.Fatalf("got %v", err)
	}
}
