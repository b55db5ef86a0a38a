package docker_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"

	"github.com/cmdexec/cmdexec/services/worker/internal/docker"
	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
)

func surviving(o *docker.Options) { o.Survive = true }

// left is a command whose process of the worker is gone.
type left struct {
	spec      executor.Spec
	handle    []byte
	out, errs string // what that process has kept
	past      executor.Past
}

// leave starts a command, waits until it says text, and lets go of it as a
// process does that is killed: the connections break, and nobody waits.
func leave(t *testing.T, host string, spec executor.Spec, text string) left {
	t.Helper()
	return newEarlier(t, host).leave(spec, text)
}

// earlier is an earlier process of the worker.
type earlier struct {
	t *testing.T
	p *proxy
	x *docker.Executor
}

func newEarlier(t *testing.T, host string) earlier {
	p := newProxyOf(t, host)
	return earlier{t, p, newExecutor(t, surviving, func(o *docker.Options) { o.Host, o.WorkerID = p.address, workerID(t.Name()) })}
}

func (e earlier) leave(spec executor.Spec, text string) left {
	t, p, x := e.t, e.p, e.x
	t.Helper()
	l := left{spec: spec, past: executor.Past{StartedAt: time.Now()}}
	spec.Timeout = 0 // a timer would live on in this process
	r := start(t, x, spec)
	r.says(text)
	s := r.Attempt.(executor.Survivor)
	select {
	case <-s.Fed():
	case <-time.After(30 * time.Second):
		t.Fatal("the command does not get its input")
	}
	l.handle, l.out, l.errs = s.Handle(), r.out.String(), r.errs.String()
	if l.handle == nil {
		t.Fatal("the command does not survive")
	}
	p.cut()
	return l
}

// adopted is a command that was taken up.
type adopted struct {
	*running
	adopted executor.Adopted
	mu      sync.Mutex
	missing []string
}

func claim(t *testing.T, x *docker.Executor, l left) *adopted {
	t.Helper()
	if l.past.Ran == 0 {
		l.past.Ran = time.Since(l.past.StartedAt)
	}
	a, err := x.Adopt(l.spec, l.handle, l.past)
	must(t, err)
	return &adopted{running: &running{t: t, Attempt: a}, adopted: a}
}

func (a *adopted) resume(l left) error {
	return a.adopted.Resume(executor.Continuation{
		Stdout: &a.out, Stderr: &a.errs, HasStdout: int64(len(l.out)), HasStderr: int64(len(l.errs)), Since: time.Now(),
		Missing: func(n int64, why string) {
			a.mu.Lock()
			defer a.mu.Unlock()
			a.missing = append(a.missing, fmt.Sprintf("%d: %s", n, why))
		},
	})
}

// goOn takes a command up and waits for its end.
func goOn(t *testing.T, x *docker.Executor, l left) (result, []string) {
	t.Helper()
	a := claim(t, x, l)
	must(t, a.resume(l))
	res := a.finish()
	res.out, res.errs = l.out+res.out, l.errs+res.errs
	return res, a.missing
}

func described(t *testing.T, lease string) container.InspectResponse {
	t.Helper()
	api := engine(t)
	of := ofLease(t, api, lease)
	if len(of) != 1 {
		t.Fatalf("lease %s has containers %v", lease, of)
	}
	got, err := api.ContainerInspect(context.Background(), of[0].ID)
	must(t, err)
	return got
}

// Every byte comes once, wherever the earlier process has stopped.
func TestAdopt(t *testing.T) {
	engine(t)
	const first = `seq 1 3000; printf 'bytes \377\376\000 and no end of line'; seq 1 500 >&2; echo ready; `
	const second = `head -c 70000 /dev/zero | tr '\0' x; echo; echo; printf 'to the end\nwithout one'; echo more >&2; exit 5`
	whole := run(t, newExecutor(t), shell(first+second))
	if whole.code() != 5 || len(whole.out) < 80000 {
		t.Fatal(whole)
	}
	for _, kept := range []string{"nothing", "a part", "all"} {
		t.Run(kept, func(t *testing.T) {
			l := leave(t, engineHost(), shell(first+"sleep 1; "+second), "ready\n")
			before := described(t, l.spec.LeaseID)
			if c := before.HostConfig.LogConfig; c.Type != "local" || c.Config["max-size"] != "8m" || c.Config["max-file"] != "5" {
				t.Errorf("the log is %+v", c)
			}
			switch kept {
			case "nothing":
				l.out, l.errs = "", ""
			case "a part":
				l.out, l.errs = l.out[:len(l.out)-7001], l.errs[:len(l.errs)/3]
			}
			x := newExecutor(t, surviving, func(o *docker.Options) { o.WorkerID = workerID(t.Name()) })
			a := claim(t, x, l)
			must(t, x.Recover(t.Context()))
			must(t, a.resume(l))
			after := described(t, l.spec.LeaseID)
			if after.ID != before.ID || after.State.StartedAt != before.State.StartedAt {
				t.Errorf("the container is %s of %s, was %s of %s", after.ID, after.State.StartedAt, before.ID, before.State.StartedAt)
			}
			res := a.finish()
			if res.code() != 5 || res.Failure != "" || res.ImageDigest != whole.ImageDigest || res.StartedAt.Format(time.RFC3339Nano) != before.State.StartedAt {
				t.Error(res)
			}
			if l.out+res.out != whole.out || l.errs+res.errs != whole.errs {
				t.Errorf("%d and %d bytes, want %d and %d", len(l.out+res.out), len(l.errs+res.errs), len(whole.out), len(whole.errs))
			}
			if len(a.missing) > 0 {
				t.Errorf("missing: %q", a.missing)
			}
			if left := ofLease(t, engine(t), l.spec.LeaseID); len(left) != 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
}

// An engine that lets containers run while it is restarted is asked about the
// time before, and not about a time to come, for which it would have the worker wait.
func TestAdoptYoungContainerWithLiveRestore(t *testing.T) {
	engine(t)
	host, _, _ := ownEngine(t, "--live-restore")
	l := leave(t, host, shell("echo ready; sleep 2; echo done; exit 3"), "ready\n")
	x := newExecutor(t, surviving, func(o *docker.Options) { o.Host, o.WorkerID = host, workerID(t.Name()) })
	began := time.Now()
	res, missing := goOn(t, x, l)
	if took := time.Since(began); took > 40*time.Second { // the minute after the start, and what is left of it
		t.Errorf("its end was known after %v", took)
	}
	if res.code() != 3 || res.Failure != "" || res.out != "ready\ndone\n" || len(missing) > 0 {
		t.Errorf("%v, missing %q", res, missing)
	}
}

// What is not claimed is removed, and only that.
func TestRecoverSparesWhatIsClaimed(t *testing.T) {
	api := engine(t)
	e := newEarlier(t, engineHost())
	keep, lose := e.leave(shell("echo ready; sleep 600"), "ready"), e.leave(shell("echo ready; sleep 600"), "ready")
	x := newExecutor(t, surviving)
	a := claim(t, x, keep)
	must(t, x.Recover(t.Context()))
	must(t, x.Reap(t.Context(), nil))
	if left := ofLease(t, api, lose.spec.LeaseID); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
	if left := ofLease(t, api, keep.spec.LeaseID); len(left) != 1 {
		t.Errorf("the claimed one is %v", left)
	}
	if _, err := x.Adopt(keep.spec, keep.handle, keep.past); err == nil {
		t.Error("was claimed twice")
	}
	if err := a.Start(io.Discard, io.Discard); err == nil {
		t.Error("was started again")
	}
	must(t, a.resume(keep))
	a.Stop(executor.StopLeaseLost)
	if res := a.finish(); res.Stop == nil || res.Stop.GoneAt.IsZero() || res.Signal != "SIGKILL" {
		t.Error(res)
	}
}

func TestEndedWhileNobodyWasThere(t *testing.T) {
	api := engine(t)
	for _, c := range []struct {
		name, command string
		end           func(t *testing.T, id string)
		past          executor.Past
		check         func(executor.Exit) bool
	}{
		{
			name: "by itself", command: "echo ready; sleep 0.5; echo end; exit 3",
			check: func(e executor.Exit) bool { return e.Code != nil && *e.Code == 3 && e.Stop == nil && !e.TimedOut },
		},
		{
			name: "by its memory limit", command: `echo ready; sleep 0.5; echo end; head -c 300m /dev/zero | tail`,
			check: func(e executor.Exit) bool { return e.OOMKilled && e.Failure == "" },
		},
		{
			name: "by somebody else", command: "trap 'echo end; exit 0' TERM; echo ready; while :; do sleep 0.1; done",
			end:   func(t *testing.T, id string) { must(t, api.ContainerKill(t.Context(), id, "SIGTERM")) },
			check: func(e executor.Exit) bool { return e.Failure == executor.CodeEngine && e.Code == nil },
		},
		{
			name: "by the earlier process", command: "trap 'echo end; exit 0' TERM; echo ready; while :; do sleep 0.1; done",
			end:  func(t *testing.T, id string) { must(t, api.ContainerKill(t.Context(), id, "SIGTERM")) },
			past: executor.Past{Stop: executor.StopCancel, StopAt: time.Now()},
			check: func(e executor.Exit) bool {
				return e.Failure == "" && e.Stop != nil && e.Stop.Reason == executor.StopCancel && !e.Stop.SignalledAt.IsZero() && !e.Stop.GoneAt.IsZero()
			},
		},
		{
			name: "by itself, when a stop was asked for", command: "echo ready; sleep 0.5; echo end; exit 3",
			past: executor.Past{Stop: executor.StopCancel, StopAt: time.Now()},
			check: func(e executor.Exit) bool {
				return *e.Code == 3 && e.Stop != nil && e.Stop.SignalledAt.IsZero() && !e.Stop.GoneAt.IsZero()
			},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := leave(t, engineHost(), shell(c.command), "ready")
			l.past.Stop, l.past.StopAt = c.past.Stop, c.past.StopAt
			id := described(t, l.spec.LeaseID).ID
			if c.end != nil {
				c.end(t, id)
			}
			eventually(t, func() bool { return !described(t, l.spec.LeaseID).State.Running }, "does not end")
			res, missing := goOn(t, newExecutor(t, surviving, func(o *docker.Options) { o.WorkerID = workerID(t.Name()) }), l)
			if !c.check(res.Exit) || res.out != "ready\nend\n" || len(missing) > 0 {
				t.Error(res, missing)
			}
		})
	}
}

// The timeout counts while nobody is there.
func TestTimeoutWhileNobodyWasThere(t *testing.T) {
	engine(t)
	short := func(command string) executor.Spec {
		s := shell(command)
		s.Timeout = 2 * time.Second
		return s
	}
	t.Run("runs on", func(t *testing.T) {
		l := leave(t, engineHost(), short("echo ready; sleep 600"), "ready")
		l.past.Ran = time.Hour
		res, _ := goOn(t, newExecutor(t, surviving, func(o *docker.Options) { o.WorkerID = workerID(t.Name()) }), l)
		if !res.TimedOut || res.Stop == nil || res.Stop.Reason != executor.StopTimeout || res.Stop.GoneAt.IsZero() {
			t.Error(res)
		}
	})
	t.Run("time is left", func(t *testing.T) {
		l := leave(t, engineHost(), short("echo ready; sleep 600"), "ready")
		l.past.Ran = 500 * time.Millisecond
		began := time.Now()
		res, _ := goOn(t, newExecutor(t, surviving, func(o *docker.Options) { o.WorkerID = workerID(t.Name()) }), l)
		if took := time.Since(began); !res.TimedOut || took < 1400*time.Millisecond {
			t.Error(res, took)
		}
	})
	t.Run("ended too late", func(t *testing.T) {
		l := leave(t, engineHost(), short("echo ready; sleep 3; exit 0"), "ready")
		eventually(t, func() bool { return !described(t, l.spec.LeaseID).State.Running }, "does not end")
		res, _ := goOn(t, newExecutor(t, surviving, func(o *docker.Options) { o.WorkerID = workerID(t.Name()) }), l)
		if !res.TimedOut || res.Failure != "" {
			t.Error(res)
		}
	})
}

func TestNothingToAdopt(t *testing.T) {
	api := engine(t)
	x := newExecutor(t, surviving)
	failed := func(l left, why string) {
		t.Helper()
		a := claim(t, x, l)
		pe := executor.AsPrepareError(a.resume(l))
		if pe == nil || pe.Class != executor.ClassInfra || pe.Code != executor.CodeEngine || !strings.Contains(pe.Reason, why) {
			t.Errorf("got %+v, want one that says %q", pe, why)
		}
		must(t, a.Close())
	}
	l := leave(t, engineHost(), shell("echo ready; sleep 600"), "ready")
	must(t, api.ContainerRemove(t.Context(), described(t, l.spec.LeaseID).ID, container.RemoveOptions{Force: true}))
	failed(l, "was removed")

	// Of a stop the removal is the last step.
	l.past.Stop, l.past.StopAt = executor.StopCancel, time.Now()
	if res, _ := goOn(t, x, l); res.Stop == nil || res.Stop.Reason != executor.StopCancel || res.Stop.GoneAt.IsZero() || res.Code != nil {
		t.Error(res)
	}
	l.past.Stop = 0

	made, err := api.ContainerCreate(t.Context(), &container.Config{Image: testImage, Cmd: []string{"true"}, Labels: map[string]string{
		"cmdexec.worker": workerID(t.Name()), "cmdexec.mark": workerID(t.Name()), "cmdexec.lease": l.spec.LeaseID,
	}}, nil, nil, nil, "")
	must(t, err)
	l.handle = fmt.Appendf(nil, `{"container":%q}`, made.ID)
	failed(l, "before the command was started")
	if _, err := api.ContainerInspect(t.Context(), made.ID); err == nil {
		t.Error("is still there")
	}

	// The handle names somebody else's.
	made, err = api.ContainerCreate(t.Context(), &container.Config{Image: testImage, Cmd: []string{"true"}}, nil, nil, nil, "")
	must(t, err)
	defer func() { _ = api.ContainerRemove(context.Background(), made.ID, container.RemoveOptions{Force: true}) }()
	l.handle = fmt.Appendf(nil, `{"container":%q}`, made.ID)
	failed(l, "another one")
	if _, err := api.ContainerInspect(t.Context(), made.ID); err != nil {
		t.Errorf("somebody else's container: %v", err)
	}
	for _, bad := range []string{"", "{}", `{"container":"../../images/x"}`, `{"container":"x"}`} {
		if _, err := x.Adopt(l.spec, []byte(bad), executor.Past{}); err == nil {
			t.Errorf("the handle %q was taken", bad)
		}
	}
}

// Where the log does not reach back it is said, before anything else comes.
func TestOutputThatTheEngineDidNotKeep(t *testing.T) {
	engine(t)
	const line = 1000
	l := leave(t, engineHost(), shell(fmt.Sprintf("echo ready; sleep 0.3; yes $(printf %%0%dd 0) | head -c 60000000; echo end", line-1)), "ready")
	eventually(t, func() bool { return !described(t, l.spec.LeaseID).State.Running }, "does not end")
	l.out = "" // nothing was kept
	a := claim(t, newExecutor(t, surviving), l)
	must(t, a.resume(l))
	res := a.finish()
	if len(a.missing) != 1 || !strings.HasPrefix(a.missing[0], "0: ") || res.code() != 0 {
		t.Errorf("missing: %q; %s", a.missing, res.Exit.Reason)
	}
}

// While the command runs on it may write more than the log keeps. Either all of
// it comes, or it is said.
func TestMuchOutputAfterwards(t *testing.T) {
	engine(t)
	for _, size := range []int{12_000_000, 50_000_000} {
		l := leave(t, engineHost(), shell(fmt.Sprintf("echo ready; sleep 0.5; yes $(printf %%0999d 0) | head -c %d", size)), "ready")
		a := claim(t, newExecutor(t, surviving), l)
		must(t, a.resume(l))
		res := a.finish()
		want := len("ready\n") + size
		if got := len(l.out) + len(res.out); got != want && len(a.missing) == 0 || got > want {
			t.Errorf("%d bytes came, want %d; missing: %q", got, want, a.missing)
		} else {
			t.Logf("%d of %d bytes came; missing: %q", got, want, a.missing)
		}
		if res.code() != 0 || size < 30_000_000 && len(a.missing) > 0 && len(l.out)+len(res.out) == want {
			t.Errorf("%s, missing: %q", res.Exit.Reason, a.missing)
		}
	}
}

// The place in the log is found by what a record takes in it.
func TestRecordsAreNotLargerThanAssumed(t *testing.T) {
	api := engine(t)
	info, err := api.Info(t.Context())
	must(t, err)
	other := newExecutor(t, func(o *docker.Options) { o.WorkerID = workerID(t.Name()) + "-other" }) // which removes nothing of ours
	for _, command := range []string{
		"seq 1 20000", "yes '' | head -c 20000", "head -c 500000 /dev/zero", "yes $(printf %020000d 0) | head -c 500000; seq 1 100 >&2; printf x; printf y >&2",
	} {
		l := leave(t, engineHost(), shell("echo ready; sleep 0.3; "+command), "ready")
		id := described(t, l.spec.LeaseID).ID
		file := filepath.Join(info.DockerRootDir, "containers", id, "local-logs", "container.log")
		if _, err := os.Stat(file); err != nil {
			t.Skipf("requires docker: the engine's files are not readable here: %v", err)
		}
		eventually(t, func() bool { return !described(t, l.spec.LeaseID).State.Running }, "does not end")
		now, err := os.Stat(file)
		must(t, err)
		size := now.Size()
		assumed := docker.MeasureLog(t, other, id)
		if assumed < size || assumed > size+size/3+1000 {
			t.Errorf("%s: the log has %d bytes, assumed are %d", command, size, assumed)
		}
	}
	x := newExecutor(t, surviving)
	must(t, x.Recover(t.Context()))
}

// A command with input is taken up once it has all of it.
func TestAdoptWithInput(t *testing.T) {
	engine(t)
	spec := shell("echo ready; sleep 0.5; cat")
	spec.Stdin = bytes.Repeat([]byte("0123456\n"), 20_000)
	l := leave(t, engineHost(), spec, "ready")
	res, missing := goOn(t, newExecutor(t, surviving), l)
	if res.code() != 0 || res.out != "ready\n"+string(spec.Stdin) || len(missing) > 0 {
		t.Errorf("%d bytes came; missing: %q; %s", len(res.out), missing, res.Exit.Reason)
	}
}

// How a command ended is not told by an engine that was not there.
func TestEngineRestartsMeanwhile(t *testing.T) {
	engine(t)
	for _, c := range []struct {
		name string
		how  os.Signal
	}{{"killed", syscall.SIGKILL}, {"stopped", syscall.SIGTERM}} {
		t.Run(c.name, func(t *testing.T) {
			host, kill, again := ownEngine(t)
			e := newEarlier(t, host)
			var jobs []left
			for _, command := range []string{"echo ready; sleep 600", "trap 'exit 0' TERM; echo ready; while :; do sleep 0.1; done"} {
				jobs = append(jobs, e.leave(shell(command), "ready"))
			}
			kill(c.how)
			x := newExecutor(t, surviving, func(o *docker.Options) { o.Host, o.WorkerID = host, workerID(t.Name()) })
			var taken []*adopted
			for _, l := range jobs {
				taken = append(taken, claim(t, x, l))
			}
			var all sync.WaitGroup
			for i, a := range taken {
				all.Go(func() {
					if err := a.resume(jobs[i]); err != nil {
						t.Errorf("resume: %v", err)
						return
					}
					exit := a.Wait()
					if exit.Failure != executor.CodeEngine || exit.Code != nil || exit.Survivors {
						t.Errorf("%+v", exit)
					}
					if err := a.Close(); err != nil {
						t.Errorf("close: %v", err)
					}
				})
			}
			again()
			all.Wait()
			api, err := rawAPI(host)
			must(t, err)
			defer api.Close()
			if found, err := api.ContainerList(context.Background(), container.ListOptions{All: true}); err != nil || len(found) != 0 {
				t.Errorf("left: %v %v", found, err)
			}
		})
	}
}
