package docker_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"

	"github.com/cmdexec/cmdexec/services/worker/internal/docker"
	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
)

func TestExitCodeAndOutput(t *testing.T) { eachPath(t, testExitCodeAndOutput) }

func testExitCodeAndOutput(t *testing.T, x *docker.Executor) {
	if err := x.Probe(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Log(x.Describe(t.Context()))
	r := run(t, x, shell("echo out; echo err >&2; exit 3"))
	if r.code() != 3 || r.out != "out\n" || r.errs != "err\n" || r.Failure != "" || r.Stop != nil || r.OOMKilled {
		t.Fatal(r)
	}
	if !strings.HasPrefix(r.ImageDigest, "sha256:") {
		t.Fatalf("digest %q", r.ImageDigest)
	}
	if r.FinishedAt.Before(r.StartedAt) || time.Since(r.StartedAt) > time.Minute {
		t.Fatal(r)
	}
}

func TestArgv(t *testing.T) { eachPath(t, testArgv) }

func testArgv(t *testing.T, x *docker.Executor) {
	for _, c := range []struct {
		argv []string
		code int
		out  string
		errs string
	}{
		{[]string{"echo", "a  b", "$HOME", "", "'"}, 0, "a  b $HOME  '\n", ""},
		{[]string{"/bin/sh", "-c", "exit 7"}, 7, "", ""},
		{[]string{"no-such-program"}, 127, "", "no-such-program"},
		{[]string{"/etc/passwd"}, 126, "", "/etc/passwd"},
	} {
		spec := shell("")
		spec.Argv = c.argv
		r := run(t, x, spec)
		if r.code() != c.code || r.out != c.out || !strings.Contains(r.errs, c.errs) {
			t.Errorf("%v: %s", c.argv, r)
		}
	}
}

func TestStdin(t *testing.T) { eachPath(t, testStdin) }

func testStdin(t *testing.T, x *docker.Executor) {
	content := bytes.Repeat([]byte("0123456789abcdef"), 16<<10)
	sum := sha256.Sum256(content)
	spec := shell("sha256sum; echo end")
	spec.Stdin = content
	if r := run(t, x, spec); r.code() != 0 || !strings.HasPrefix(r.out, hex.EncodeToString(sum[:])) || !strings.HasSuffix(r.out, "end\n") {
		t.Fatal(r)
	}
	// One that does not read it is not held up.
	spec = shell("exit 4")
	spec.Stdin = bytes.Repeat(content, 4)
	if r := run(t, x, spec); r.code() != 4 {
		t.Fatal(r)
	}
	// None is the end of file at once.
	if r := run(t, x, shell("cat; echo rc=$?")); r.out != "rc=0\n" {
		t.Fatal(r)
	}
}

func TestEnvironment(t *testing.T) { eachPath(t, testEnvironment) }

func testEnvironment(t *testing.T, x *docker.Executor) {
	spec := shell(`echo "$A|$B|$HOME|$CMDEXEC_JOB_ID|$CMDEXEC_ATTEMPT"`)
	spec.Env = map[string]string{"A": "x y\n=z", "B": "", "HOME": "/tmp"}
	spec.Attempt = 2
	if r := run(t, x, spec); r.out != "x y\n=z||/tmp|"+spec.JobID+"|2\n" {
		t.Fatal(r)
	}
}

func TestFiles(t *testing.T) { eachPath(t, testFiles) }

func testFiles(t *testing.T, x *docker.Executor) {
	spec := shell("")
	spec.Argv = []string{"./sub/run.sh", "x"}
	spec.Files = []executor.File{
		{Path: "sub/run.sh", Content: []byte("#!/bin/sh\ncat data secret; stat -c '%a %u %n' data secret sub sub/run.sh; echo more >> data; touch sub/new; tail -1 data\n"), Mode: 0o755},
		{Path: "data", Content: []byte("hello\n")},
		{Path: "secret", Content: []byte("s\n"), Mode: 0o600},
	}
	want := "hello\ns\n644 65534 data\n600 65534 secret\n755 65534 sub\n755 65534 sub/run.sh\nmore\n"
	if r := run(t, x, spec); r.code() != 0 || r.out != want {
		t.Fatalf("want %q, got %s", want, r)
	}
	// The folder with files is as bounded as the one without.
	spec = shell("grep ' /work ' /proc/mounts; dd if=/dev/zero of=big bs=1M count=64 2>&1; stat -c %s big")
	spec.TmpfsMB, spec.Files = 4, []executor.File{{Path: "data", Content: []byte("x")}}
	r := run(t, x, spec)
	for _, part := range []string{"tmpfs rw,nosuid,nodev", "size=4096k", "nr_inodes=16384", "No space left"} {
		if !strings.Contains(r.out, part) {
			t.Fatalf("no %q in %s", part, r)
		}
	}
}

// Several at once, since what keeps files in place is shared state of the engine.
func TestFilesConcurrently(t *testing.T) { eachPath(t, testFilesConcurrently) }

func testFilesConcurrently(t *testing.T, x *docker.Executor) {
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			spec := shell("cat a/b/c")
			spec.Files = []executor.File{{Path: "a/b/c", Content: fmt.Append(nil, i)}}
			if r := run(t, x, spec); r.out != fmt.Sprint(i) {
				t.Error(r)
			}
		})
	}
	all.Wait()
}

func TestWorkingDir(t *testing.T) { eachPath(t, testWorkingDir) }

func testWorkingDir(t *testing.T, x *docker.Executor) {
	for dir, want := range map[string]string{
		"": "/work\n", "a/b": "/work/a/b\n", "/work/c": "/work/c\n", "/tmp": "/tmp\n", ".": "/work\n",
	} {
		spec := shell("pwd; touch here")
		spec.WorkingDir = dir
		if r := run(t, x, spec); r.code() != 0 || r.out != want {
			t.Errorf("%q: %s", dir, r)
		}
	}
}

func TestClosedOutputIsNotTheEnd(t *testing.T) { eachPath(t, testClosedOutputIsNotTheEnd) }

func testClosedOutputIsNotTheEnd(t *testing.T, x *docker.Executor) {
	if r := run(t, x, shell("echo x; exec >&- 2>&-; sleep 1; exit 5")); r.code() != 5 || r.out != "x\n" {
		t.Fatal(r)
	}
}

// A background process does not outlive the command or hold it up.
func TestBackgroundProcess(t *testing.T) { eachPath(t, testBackgroundProcess) }

func testBackgroundProcess(t *testing.T, x *docker.Executor) {
	began := time.Now()
	if r := run(t, x, shell("setsid sleep 60 & nohup sleep 60 & echo x")); r.code() != 0 || r.out != "x\n" {
		t.Fatal(r)
	}
	if took := time.Since(began); took > 20*time.Second {
		t.Fatalf("took %v", took)
	}
}

// bomb makes awk eat memory.
const bomb = `awk 'BEGIN{s="xxxxxxxxxxxxxxxx"; while(1) s=s s}'`

func TestMemoryBomb(t *testing.T) { eachPath(t, testMemoryBomb) }

func testMemoryBomb(t *testing.T, x *docker.Executor) {
	for i := range 5 { // the engine learns of it on another way than of the exit
		spec := shell("exec " + bomb)
		spec.MemoryMB = 24
		r := run(t, x, spec)
		if !r.OOMKilled || r.Signal != "SIGKILL" || r.Code != nil || r.Failure != "" || !strings.Contains(r.Reason, "memory limit of 24 MiB") {
			t.Fatalf("%d: %s", i, r)
		}
	}
	// Only a child: the command goes on and decides.
	for _, code := range []int{0, 9} {
		spec := shell(fmt.Sprintf("%s; echo child $?; exit %d", bomb, code))
		spec.MemoryMB = 24
		r := run(t, x, spec)
		if r.OOMKilled || r.code() != code || !strings.Contains(r.out, "child 137") || !strings.Contains(r.Reason, "killed some of its processes") {
			t.Fatal(r)
		}
	}
	// Killed by itself, not by a limit.
	r := run(t, x, shell("kill -9 $$"))
	if r.OOMKilled || r.code() != 137 {
		t.Fatal(r)
	}
	// A full tmpfs counts as memory.
	spec := shell("head -c 100000000 /dev/zero > /work/x; exec head -c 100000000 /dev/zero > /tmp/x")
	spec.MemoryMB, spec.TmpfsMB = 24, 512
	if r := run(t, x, spec); !r.OOMKilled {
		t.Fatal(r)
	}
}

func TestForkBomb(t *testing.T) { eachPath(t, testForkBomb) }

func testForkBomb(t *testing.T, x *docker.Executor) {
	spec := shell(`b() { b | b & }; b; while :; do sleep 1; done`)
	spec.PIDs, spec.Timeout, spec.Grace, spec.CPU = 32, 3*time.Second, time.Second, 0.5
	began := time.Now()
	r := run(t, x, spec)
	if !r.TimedOut && r.code() <= 0 {
		t.Fatal(r)
	}
	if r.Survivors || time.Since(began) > 30*time.Second {
		t.Fatalf("took %v: %s", time.Since(began), r)
	}
}

func TestDiskFiller(t *testing.T) { eachPath(t, testDiskFiller) }

func testDiskFiller(t *testing.T, x *docker.Executor) {
	spec := shell(`for d in / /etc /usr /var /dev /root; do dd if=/dev/zero of=$d/x bs=1M count=64 2>/dev/null && echo wrote $d; done
for d in /tmp /work; do dd if=/dev/zero of=$d/x bs=1M count=64 2>/dev/null; echo $d $(stat -c %s $d/x); rm $d/x; done
cd /tmp; seq 40000 | xargs -n 1000 touch 2>/dev/null; n=$(ls | wc -l); rm -rf /tmp/*; [ $n -gt 1000 ] && [ $n -lt 16384 ] && echo inodes bounded
dd if=/dev/zero of=/tmp/sparse bs=1 count=1 seek=2G 2>/dev/null || echo sparse refused`)
	spec.TmpfsMB = 4
	want := "/tmp 4194304\n/work 4194304\ninodes bounded\nsparse refused\n"
	if r := run(t, x, spec); r.out != want {
		t.Fatalf("want %q, got %s", want, r)
	}
}

// slowWriter counts, and takes its time.
type slowWriter struct {
	n    atomic.Int64
	wait time.Duration
}

func (w *slowWriter) Write(p []byte) (int, error) {
	if w.n.Add(int64(len(p)))%(8<<20) < int64(len(p)) {
		<-time.After(w.wait) // this is the slow reader
	}
	return len(p), nil
}

func TestOutputFlood(t *testing.T) { eachPath(t, testOutputFlood) }

func testOutputFlood(t *testing.T, x *docker.Executor) {
	const size = 200 << 20
	spec := shell(fmt.Sprintf("head -c %d /dev/zero; echo end >&2", size))
	a := prepare(t, x, spec)
	defer a.Close()
	out, errs := &slowWriter{wait: 20 * time.Millisecond}, &buffer{}
	runtime.GC()
	var before, now runtime.MemStats
	runtime.ReadMemStats(&before)
	if err := a.Start(out, errs); err != nil {
		t.Fatal(err)
	}
	exit := make(chan executor.Exit)
	go func() { exit <- a.Wait() }()
	peak := uint64(0)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case e := <-exit:
			if e.Code == nil || *e.Code != 0 || out.n.Load() != size || errs.String() != "end\n" {
				t.Fatalf("%+v, %d bytes, %q", e, out.n.Load(), errs)
			}
			if peak > before.HeapAlloc+16<<20 {
				t.Fatalf("memory grew by %d MiB", (peak-before.HeapAlloc)>>20)
			}
			return
		case <-tick.C:
			runtime.ReadMemStats(&now)
			peak = max(peak, now.HeapAlloc)
		}
	}
}

func TestTimeout(t *testing.T) { eachPath(t, testTimeout) }

func testTimeout(t *testing.T, x *docker.Executor) {
	// One that goes at the signal.
	spec := shell("echo started; exec sleep 60")
	spec.Timeout = time.Second
	r := run(t, x, spec)
	if !r.TimedOut || r.Signal != "SIGTERM" || r.Stop == nil || r.Stop.Reason != executor.StopTimeout || r.Stop.GoneAt.IsZero() || r.Survivors {
		t.Fatal(r)
	}
	// One that does not.
	spec = shell("trap '' TERM; echo started; while :; do sleep 1; done")
	spec.Timeout, spec.Grace = time.Second, time.Second
	began := time.Now()
	r = run(t, x, spec)
	if !r.TimedOut || r.Signal != "SIGKILL" || r.out != "started\n" || r.OOMKilled {
		t.Fatal(r)
	}
	if took := time.Since(began); took < 2*time.Second || took > 20*time.Second {
		t.Fatalf("took %v", took)
	}
	// A timeout that nobody needed.
	spec = shell("exit 2")
	spec.Timeout = 30 * time.Second
	if r := run(t, x, spec); r.TimedOut || r.code() != 2 || r.Stop != nil {
		t.Fatal(r)
	}
}

func TestCancelWhileRunning(t *testing.T) { eachPath(t, testCancelWhileRunning) }

func testCancelWhileRunning(t *testing.T, x *docker.Executor) {
	api := engine(t)
	spec := shell("trap 'echo bye; exit 6' TERM; echo started; while :; do sleep 0.1; done")
	r := start(t, x, spec)
	r.says("started")
	r.Stop(executor.StopCancel)
	r.Stop(executor.StopCancel)
	exit := r.Wait()
	s := exit.Stop
	if exit.Code == nil || *exit.Code != 6 || s == nil || s.Reason != executor.StopCancel || exit.TimedOut || r.out.String() != "started\nbye\n" {
		t.Fatalf("%+v", exit)
	}
	if s.SignalledAt.Before(s.DeliveredAt) || s.GoneAt.Before(s.SignalledAt) || s.ExitedAt.IsZero() {
		t.Fatalf("receipt %+v", s)
	}
	// The receipt says that it is gone, before Close.
	if left := ofLease(t, api, spec.LeaseID); len(left) != 0 {
		t.Fatalf("still there: %v", left)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	// Another signal than the usual one.
	spec = shell("trap 'exit 8' USR1; echo started; while :; do sleep 0.1; done")
	spec.StopSignal = "SIGUSR1"
	r = start(t, x, spec)
	r.says("started")
	r.Stop(executor.StopShutdown)
	if res := r.finish(); res.code() != 8 {
		t.Fatal(res)
	}
}

func TestLeaseLostKillsAtOnce(t *testing.T) { eachPath(t, testLeaseLostKillsAtOnce) }

func testLeaseLostKillsAtOnce(t *testing.T, x *docker.Executor) {
	spec := shell("trap 'echo signal; exit 0' TERM; echo started; while :; do sleep 0.1; done")
	spec.Grace = 50 * time.Second
	r := start(t, x, spec)
	r.says("started")
	r.Stop(executor.StopLeaseLost)
	if res := r.finish(); res.Signal != "SIGKILL" || res.out != "started\n" || res.Stop.Reason != executor.StopLeaseLost {
		t.Fatal(res)
	}
	// It shortens a grace that is running.
	spec = shell("trap 'echo signal' TERM; echo started; while :; do sleep 0.1; done")
	spec.Grace = 50 * time.Second
	r = start(t, x, spec)
	r.says("started")
	r.Stop(executor.StopCancel)
	r.says("signal")
	began := time.Now()
	r.Stop(executor.StopLeaseLost)
	if res := r.finish(); res.Signal != "SIGKILL" || res.Stop.Reason != executor.StopCancel || time.Since(began) > 20*time.Second {
		t.Fatal(res)
	}
}

func TestStopBeforeStart(t *testing.T) { eachPath(t, testStopBeforeStart) }

func testStopBeforeStart(t *testing.T, x *docker.Executor) {
	api := engine(t)
	spec := shell("echo ran")
	spec.Files = []executor.File{{Path: "f"}}
	a := prepare(t, x, spec)
	a.Stop(executor.StopCancel)
	if err := a.Start(io.Discard, io.Discard); !errors.Is(err, executor.ErrStopped) {
		t.Fatalf("got %v", err)
	}
	if err := errors.Join(a.Close(), a.Close()); err != nil {
		t.Fatal(err)
	}
	if left := ofLease(t, api, spec.LeaseID); len(left) != 0 {
		t.Fatalf("still there: %v", left)
	}
	// A stop after the end changes nothing.
	r := start(t, x, shell("exit 3"))
	exit := r.Wait()
	r.Stop(executor.StopCancel)
	if *exit.Code != 3 || exit.Stop != nil {
		t.Fatalf("%+v", exit)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
}

// Stops at every moment of short commands: each ends by itself or by the stop,
// and none is left.
func TestStopRaces(t *testing.T) { eachPath(t, testStopRaces) }

func testStopRaces(t *testing.T, x *docker.Executor) {
	api := engine(t)
	var all sync.WaitGroup
	for worker := range 4 {
		all.Go(func() {
			for i := range 4 {
				spec := shell("echo x; sleep 0.1")
				a := prepare(t, x, spec)
				timer := time.AfterFunc(time.Duration(worker*4+i)*40*time.Millisecond, func() { a.Stop(executor.StopCancel) })
				var out buffer
				if err := a.Start(&out, io.Discard); err == nil {
					exit := a.Wait()
					ended := exit.Code != nil && *exit.Code == 0
					signalled := exit.Stop != nil && !exit.Stop.SignalledAt.IsZero()
					if exit.Failure != "" || exit.Survivors || (!ended && !signalled) {
						t.Errorf("%+v", exit)
					}
				} else if !errors.Is(err, executor.ErrStopped) {
					t.Error(err)
				}
				timer.Stop()
				if err := a.Close(); err != nil {
					t.Error(err)
				}
				if left := ofLease(t, api, spec.LeaseID); len(left) != 0 {
					t.Errorf("still there: %v", left)
				}
			}
		})
	}
	all.Wait()
}

// A writer that blocks does not delay a stop, and what was written before it
// arrives all the same.
func TestBlockedWriter(t *testing.T) { eachPath(t, testBlockedWriter) }

func testBlockedWriter(t *testing.T, x *docker.Executor) {
	spec := shell("while :; do head -c 100000 /dev/zero; done")
	spec.Timeout, spec.Grace = time.Second, time.Second
	a := prepare(t, x, spec)
	defer a.Close()
	release := make(chan struct{})
	w := writerFunc(func(p []byte) (int, error) { <-release; return len(p), nil })
	if err := a.Start(w, io.Discard); err != nil {
		t.Fatal(err)
	}
	done := make(chan executor.Exit, 1)
	go func() { done <- a.Wait() }()
	api := engine(t)
	eventually(t, func() bool {
		all := ofLease(t, api, spec.LeaseID)
		return len(all) == 0 || all[0].State == "exited"
	}, "the command outlived its timeout because of its reader")
	close(release)
	if exit := <-done; !exit.TimedOut || exit.Failure != "" {
		t.Fatalf("%+v", exit)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func TestFailingWriterLosesOnlyItsStream(t *testing.T) {
	eachPath(t, testFailingWriterLosesOnlyItsStream)
}

func testFailingWriterLosesOnlyItsStream(t *testing.T, x *docker.Executor) {
	a := prepare(t, x, shell("head -c 1000000 /dev/zero; echo end >&2; exit 2"))
	defer a.Close()
	var errs buffer
	if err := a.Start(writerFunc(func([]byte) (int, error) { return 0, os.ErrClosed }), &errs); err != nil {
		t.Fatal(err)
	}
	if exit := a.Wait(); exit.Code == nil || *exit.Code != 2 || errs.String() != "end\n" {
		t.Fatalf("%+v %q", exit, errs.String())
	}
}

// A container that somebody else pauses or removes.
func TestSomebodyElseInterferes(t *testing.T) { eachPath(t, testSomebodyElseInterferes) }

func testSomebodyElseInterferes(t *testing.T, x *docker.Executor) {
	api := engine(t)
	spec := shell("echo started; sleep 60")
	spec.Grace = 0
	r := start(t, x, spec)
	r.says("started")
	if err := api.ContainerPause(t.Context(), ofLease(t, api, spec.LeaseID)[0].ID); err != nil {
		t.Fatal(err)
	}
	r.Stop(executor.StopCancel)
	if res := r.finish(); res.Survivors || res.Failure != "" || res.Stop.GoneAt.IsZero() {
		t.Fatal(res)
	}
	spec = shell("echo started; sleep 60")
	r = start(t, x, spec)
	r.says("started")
	if err := api.ContainerRemove(t.Context(), ofLease(t, api, spec.LeaseID)[0].ID, container.RemoveOptions{Force: true}); err != nil {
		t.Fatal(err)
	}
	if res := r.finish(); res.Survivors || res.Code != nil && *res.Code == 0 {
		t.Fatal(res)
	}
}

func TestRecoverAndReap(t *testing.T) {
	api := engine(t)
	mine := workerID(t.Name())
	leave := func(mark, lease string) string {
		t.Helper()
		made, err := api.ContainerCreate(t.Context(), &container.Config{
			Image: testImage, Cmd: []string{"sleep", "600"}, NetworkDisabled: true,
			Labels: map[string]string{"cmdexec.worker": mine, "cmdexec.mark": mark, "cmdexec.lease": lease},
		}, &container.HostConfig{LogConfig: container.LogConfig{Type: "none"}}, nil, nil, "")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = api.ContainerRemove(context.Background(), made.ID, container.RemoveOptions{Force: true, RemoveVolumes: true})
		})
		if err := api.ContainerStart(t.Context(), made.ID, container.StartOptions{}); err != nil {
			t.Fatal(err)
		}
		return made.ID
	}
	exists := func(id string) bool {
		_, err := api.ContainerInspect(t.Context(), id)
		return err == nil
	}
	foreign := leave(mine+"-2", "lease-foreign")
	old := leave(mine, "lease-old")
	x := newExecutor(t)
	// Taking work without Recover, as where the engine was away, makes up for it.
	spec := shell("echo started; sleep 60")
	r := start(t, x, spec)
	r.says("started")
	if exists(old) || !exists(foreign) {
		t.Fatal("an earlier life's container is still there, or another worker's is gone")
	}
	held, dropped := leave(mine, "lease-held"), leave(mine, "lease-dropped")
	if err := x.Reap(t.Context(), func(l string) bool { return l == "lease-held" }); err != nil {
		t.Fatal(err)
	}
	if exists(dropped) || !exists(held) || !exists(foreign) || len(ofLease(t, api, spec.LeaseID)) != 1 {
		t.Fatal("the wrong ones were reaped")
	}
	r.Stop(executor.StopLeaseLost)
	r.finish()
	if err := x.Recover(t.Context()); err != nil {
		t.Fatal(err)
	}
	if exists(held) || !exists(foreign) {
		t.Fatal("recover removed the wrong ones")
	}
}

// ofLease lists the containers of a lease: by its label, or where they had to be
// made before it was known, by the name they have been given.
func ofLease(t *testing.T, api containerLister, lease string) []container.Summary {
	t.Helper()
	all, err := api.ContainerList(context.Background(), container.ListOptions{All: true})
	if err != nil {
		t.Error(err)
	}
	named := "/cmdexec-job-t" + lease[strings.LastIndex(lease, "-")+1:] + "-"
	return slices.DeleteFunc(all, func(c container.Summary) bool {
		byName := c.Labels["cmdexec.warm"] != "" && slices.ContainsFunc(c.Names, func(n string) bool { return strings.HasPrefix(n, named) })
		return c.Labels["cmdexec.lease"] != lease && !byName
	})
}

type containerLister interface {
	ContainerList(context.Context, container.ListOptions) ([]container.Summary, error)
}

func TestEngineThatIsNotThere(t *testing.T) {
	x, err := docker.New(docker.Options{Host: "unix://" + t.TempDir() + "/none.sock", WorkerID: "worker-x"})
	if err != nil {
		t.Fatal(err)
	}
	defer x.Close()
	if err := x.Probe(t.Context()); err == nil || !strings.Contains(err.Error(), "no container engine at") || strings.Contains(err.Error(), "\n") {
		t.Fatalf("got %v", err)
	}
	if pe := refused(t, x, shell("true")); pe.Class != executor.ClassInfra || pe.Code != executor.CodeEngine {
		t.Fatalf("got %+v", pe)
	}
	if err := x.Recover(t.Context()); err == nil {
		t.Fatal("recovered without an engine")
	}
}
