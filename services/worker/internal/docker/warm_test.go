package docker_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/fstest"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/filters"
	"github.com/docker/docker/api/types/volume"
	"github.com/docker/docker/client"

	"github.com/cmdexec/cmdexec/services/worker/internal/docker"
	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
)

func warmer(w docker.Warm) func(*docker.Options) {
	return func(o *docker.Options) {
		warmly(o)
		if w.Containers > 0 {
			o.Warm.Containers = w.Containers
		}
		if w.MemoryMB > 0 {
			o.Warm.MemoryMB = w.MemoryMB
		}
		if w.Age > 0 {
			o.Warm.Age = w.Age
		}
		if w.Init != nil {
			o.Warm.Init = w.Init
		}
	}
}

// ofWorker lists the containers and volumes of a worker.
func ofWorker(t *testing.T, api *client.Client, mark string) (containers, volumes []string) {
	t.Helper()
	mine := filters.NewArgs(filters.Arg("label", "cmdexec.mark="+mark))
	all, err := api.ContainerList(context.Background(), container.ListOptions{All: true, Filters: mine})
	must(t, err)
	for _, c := range all {
		containers = append(containers, c.ID)
	}
	found, err := api.VolumeList(context.Background(), volume.ListOptions{Filters: mine})
	must(t, err)
	for _, v := range found.Volumes {
		volumes = append(volumes, v.Name)
	}
	return containers, volumes
}

func nothingLeft(t *testing.T, api *client.Client, mark string) {
	t.Helper()
	if containers, volumes := ofWorker(t, api, mark); len(containers)+len(volumes) > 0 {
		t.Errorf("left: containers %v, volumes %v", containers, volumes)
	}
}

// Each container is used for one job, and nothing of that is seen by the next, in
// a container or in what the engine says of it.
func TestWarmContainerIsUsedOnce(t *testing.T) {
	api := engine(t)
	x := newExecutor(t, warmly)
	used := map[string]bool{}
	const look = `cat /tmp/* /work/* /dev/shm/* 2>/dev/null; env; cat /proc/*/environ | tr '\0' '\n'; cat; `
	for i, spec := range []executor.Spec{
		{Env: map[string]string{"SECRET": "first-env"}, Stdin: []byte("first-stdin\n"), Files: []executor.File{{Path: "f", Content: []byte("first-file")}}},
		{WorkingDir: "a/b", User: "1234:1234"},
		{Env: map[string]string{"OTHER": "third-env"}, WorkingDir: "/tmp"},
	} {
		whole := shell(look + "echo; echo at $(pwd) as $(id -u); echo first-left > /tmp/left; echo first-left > /work/left; sleep 60 & sleep 0.1")
		whole.Env, whole.Stdin, whole.Files, whole.WorkingDir, whole.User = spec.Env, spec.Stdin, spec.Files, spec.WorkingDir, spec.User
		r := start(t, x, whole)
		id := ofLease(t, api, whole.LeaseID)[0].ID
		res := r.finish()
		if res.code() != 0 || !res.Warm || used[id] {
			t.Fatalf("%d, used before: %t, %s", i, used[id], res)
		}
		used[id] = true
		if _, err := api.ContainerInspect(t.Context(), id); err == nil {
			t.Errorf("%d: the container is still there", i)
		}
		want := []string{"first-env\n", "first-stdin\n", "first-file"}
		if i > 0 {
			want = []string{[]string{"", "at /work/a/b as 1234\n", "at /tmp as 65534\n"}[i]}
			if strings.Contains(res.out, "first-") {
				t.Errorf("%d sees what another job has: %s", i, res)
			}
		}
		for _, w := range want {
			if !strings.Contains(res.out, w) {
				t.Errorf("%d: no %q in %s", i, w, res)
			}
		}
	}
	must(t, x.Close())
	nothingLeft(t, api, workerID(t.Name()))
}

// state says all that a process inherits and that may be seen of it.
const state = `
for f in Umask TracerPid Groups ShdPnd SigBlk SigIgn SigCgt CapInh CapPrm CapEff CapBnd CapAmb NoNewPrivs Seccomp Seccomp_filters Threads Speculation_Store_Bypass THP_enabled; do grep "^$f:" /proc/self/status; done
cat /proc/$$/limits; tr '\0' '\n' < /proc/$$/cmdline; echo; cat /proc/$$/oom_score_adj; cat /proc/$$/personality /proc/$$/timerslack_ns /proc/$$/coredump_filter 2>/dev/null
for f in cwd exe root; do readlink /proc/$$/$f; done
set -- $(cut -d' ' -f4-7 /proc/$$/stat); [ $2 = $$ ] && echo leads its group; echo parent $1 session $3 tty $4; cut -d' ' -f18-19 /proc/$$/stat
for f in /proc/$$/fd/*; do echo ${f##*/}; done; readlink /proc/$$/fd/0 | sed 's/[0-9]//g'; grep flags /proc/$$/fdinfo/0
env | sort | grep -v CMDEXEC_JOB_ID
ls -la / /work /tmp | grep -v '\.cmdexec' | sed 's/ [A-Z][a-z][a-z] .* / /' | grep -v -e ' \.' -e dockerenv -e total -e ' proc$'
hostname; id; ulimit -a; tty
grep -v cmdexec /proc/mounts | grep -v '^overlay' | sort; grep '^overlay' /proc/mounts | sed 's/lowerdir.*//'; true`

// What runs in a warm container is what would run in another, as far as a process
// can tell.
func TestWarmIsAsCold(t *testing.T) {
	api := engine(t)
	cold, hot := newExecutor(t), newExecutor(t, warmly)
	withEnv := imageWith(t, api, "warm-env", "ENV A=image B=image PATH=/bin:/usr/bin EMPTY=", "WORKDIR /tmp")
	for name, change := range map[string]func(*executor.Spec){
		"plain": func(*executor.Spec) {},
		"image": func(s *executor.Spec) {
			s.Image, s.Env = withEnv, map[string]string{"A": "job", "C": "x\ny=z", "LANG": ""}
		},
		"input":    func(s *executor.Spec) { s.Stdin = []byte("x") },
		"a folder": func(s *executor.Spec) { s.WorkingDir = "a/b" },
		"root":     func(s *executor.Spec) { s.User = "0:0" },
		"a user":   func(s *executor.Spec) { s.User = "77" },
		"argv": func(s *executor.Spec) {
			s.Argv, s.Shell = []string{"sh", "-c", s.Shell, "zero", "", "a b"}, ""
		},
	} {
		t.Run(name, func(t *testing.T) {
			var out [2]string
			for i, x := range []*docker.Executor{cold, hot} {
				spec := shell(state)
				change(&spec)
				r := run(t, x, spec)
				if r.code() != 0 || r.errs != "" {
					t.Fatal(r)
				}
				out[i] = strings.ReplaceAll(r.out, spec.JobID, "JOB")
			}
			if out[0] != out[1] {
				a, b := slices.Collect(strings.Lines(out[0])), slices.Collect(strings.Lines(out[1]))
				for i := range min(len(a), len(b)) {
					if a[i] != b[i] {
						t.Fatalf("line %d: cold %q, warm %q", i, a[i], b[i])
					}
				}
				t.Fatalf("%d and %d lines", len(a), len(b))
			}
		})
	}
}

// Programs are found, and not found, in the same way.
func TestWarmFindsPrograms(t *testing.T) {
	engine(t)
	cold, hot := newExecutor(t), newExecutor(t, warmly)
	script := []executor.File{
		{Path: "plain", Content: []byte("echo plain $0 $1\n"), Mode: 0o755},
		{Path: "not", Content: []byte("x"), Mode: 0o644},
		{Path: "bad", Content: []byte("#!/no/such\n"), Mode: 0o755},
		{Path: "d/x", Content: []byte("#!/bin/sh\necho in d\n"), Mode: 0o755},
	}
	for _, c := range []struct {
		path string // PATH; empty: the usual
		argv []string
	}{
		{"", []string{"./plain", "1"}},
		{"", []string{"./not"}},
		{"", []string{"./bad"}},
		{"", []string{"./nothing"}},
		{"", []string{"./not/x"}},
		{"", []string{"/work"}},
		{"", []string{"nothing"}},
		{"", []string{"plain"}},
		{"/work", []string{"plain", "2"}},
		{":/bin", []string{"plain", "3"}},
		{"/nowhere:/work:/work/d:/bin", []string{"x"}},
		{"/work:/bin", []string{"not"}},
		{"/work:/bin", []string{"bad"}},
		{"/work/not:/bin", []string{"echo", "4"}},
		{"/nowhere", []string{"echo"}},
	} {
		var got [2]string
		for i, x := range []*docker.Executor{cold, hot} {
			spec := shell("")
			spec.Argv, spec.Files = c.argv, script
			if c.path != "" {
				spec.Env = map[string]string{"PATH": c.path}
			}
			r := run(t, x, spec)
			got[i] = fmt.Sprintf("%d %q, says something of it: %t", r.code(), r.out, strings.Contains(r.errs, c.argv[0]))
		}
		if got[0] != got[1] {
			t.Errorf("PATH=%s %q: cold %s, warm %s", c.path, c.argv, got[0], got[1])
		}
	}
}

// What could not be the same runs in a container of its own, and says so.
func TestNotWarm(t *testing.T) {
	api := engine(t)
	x := newExecutor(t, warmly)
	for name, change := range map[string]func(*executor.Spec){
		"a folder of the image": func(s *executor.Spec) { s.WorkingDir = "/etc" },
		"a folder to be made":   func(s *executor.Spec) { s.WorkingDir = "/opt/new" },
		"few processes":         func(s *executor.Spec) { s.PIDs = 4 },
		"little memory":         func(s *executor.Spec) { s.MemoryMB = 8 },
		"no memory limit":       func(s *executor.Spec) { s.MemoryMB = 0 },
		"a long command":        func(s *executor.Spec) { s.Shell = ":" + strings.Repeat(" ", 120<<10) },
		"a group of the engine's choice": func(s *executor.Spec) {
			s.User, s.Files = "1234", []executor.File{{Path: "f"}}
		},
		"a variable that the init heeds": func(s *executor.Spec) {
			s.Image = imageWith(t, api, "warm-godebug", "ENV GODEBUG=inittrace=1")
		},
		"files that are most of the memory": func(s *executor.Spec) {
			s.MemoryMB, s.Files = 16, []executor.File{{Path: "f", Content: make([]byte, 5<<20)}}
		},
	} {
		spec := shell("true")
		change(&spec)
		if docker.Prime(t, x, spec) {
			t.Errorf("%s: is kept warm", name)
		}
		for range 2 {
			spec := spec
			spec.JobID, spec.LeaseID = shell("").JobID, shell("").LeaseID
			if r := run(t, x, spec); r.code() != 0 || r.Warm || r.errs != "" {
				t.Errorf("%s: %s", name, r)
			}
		}
	}
	if ids := docker.Waiting(x); len(ids) != 0 {
		t.Errorf("containers wait: %v", ids)
	}
}

// A shape is kept from its second use on, and after a while not any more; then
// nothing is left in the engine.
func TestWarmPoolShrinksToNothing(t *testing.T) {
	api := engine(t)
	x := newExecutor(t, warmer(docker.Warm{Age: 15 * time.Second}))
	once := func() executor.Exit {
		a, err := x.Prepare(t.Context(), shell("true"))
		must(t, err)
		defer a.Close()
		must(t, a.Start(io.Discard, io.Discard))
		return a.Wait()
	}
	if e := once(); e.Warm {
		t.Fatalf("%+v", e)
	}
	if ids := docker.Waiting(x); len(ids) > 0 {
		t.Fatalf("after one use: %v", ids)
	}
	eventually(t, func() bool { return once().Warm }, "no container waits")
	mark := workerID(t.Name())
	eventually(t, func() bool {
		containers, volumes := ofWorker(t, api, mark)
		return len(containers)+len(volumes) == 0
	}, "the pool does not shrink to nothing")
}

func TestWarmPoolIsBounded(t *testing.T) {
	api := engine(t)
	x := newExecutor(t, warmer(docker.Warm{Containers: 3, MemoryMB: 200}))
	a, b := shell("true"), shell("true")
	a.MemoryMB, b.MemoryMB = 64, 100
	docker.Prime(t, x, a)
	eventually(t, func() bool { return len(docker.Waiting(x)) == 3 }, "there is room for three")
	docker.Prime(t, x, b) // one of them makes place, and 64 are too many beside the rest
	eventually(t, func() bool { return len(docker.Waiting(x)) == 2 }, "the memory holds one of each")
	c := shell("true")
	c.MemoryMB = 300
	if r := run(t, x, shell("true")); r.code() != 0 { // of a shape that finds room by driving others out
		t.Fatal(r)
	}
	if docker.Prime(t, x, c) {
		t.Fatal("a container waits that is more than all may have")
	}
	total := int64(0)
	for _, id := range docker.Waiting(x) {
		got, err := api.ContainerInspect(t.Context(), id)
		must(t, err)
		total += got.HostConfig.Memory >> 20
	}
	if total > 200 {
		t.Fatalf("%d MiB wait", total)
	}
	x.KeepWarm(false)
	eventually(t, func() bool { return len(docker.Waiting(x)) == 0 }, "the pool keeps what it is not to")
}

// The container is of the image that the name has now.
func TestWarmAfterTheNameHasMoved(t *testing.T) {
	api := engine(t)
	x := newExecutor(t, warmly)
	spec := shell("echo $WHICH")
	spec.Image = imageWith(t, api, "warm-moved", "ENV WHICH=old")
	if r := run(t, x, spec); r.out != "old\n" || !r.Warm {
		t.Fatal(r)
	}
	docker.Prime(t, x, spec)
	imageWith(t, api, "warm-moved", "ENV WHICH=new")
	a, err := x.Prepare(t.Context(), func() executor.Spec { s := shell("echo $WHICH"); s.Image = spec.Image; return s }())
	must(t, err)
	defer a.Close()
	var out buffer
	must(t, a.Start(&out, io.Discard))
	if e := a.Wait(); e.Warm || out.String() != "new\n" {
		t.Fatalf("%+v %q", e, out.String())
	}
}

// What waits when its worker is killed ends by itself, and the next life removes it,
// with its volume.
func TestWarmAfterTheWorkerWasKilled(t *testing.T) {
	api := engine(t)
	p := newProxy(t)
	mark := workerID(t.Name())
	x := newExecutor(t, warmly, func(o *docker.Options) { o.Host = p.address })
	docker.Prime(t, x, shell("true"))
	id := docker.Waiting(x)[0]
	p.hang() // nothing that it still does has an effect
	p.cut()
	eventually(t, func() bool {
		got, err := api.ContainerInspect(t.Context(), id)
		return err == nil && !got.State.Running
	}, "it waits for a worker that is gone")
	next := newExecutor(t, warmly)
	must(t, next.Recover(t.Context()))
	nothingLeft(t, api, mark)
}

// A command in a warm container is taken up by the next process as any other, with
// the time that it has had.
func TestWarmIsAdopted(t *testing.T) {
	api := engine(t)
	spec := shell("echo ready; cat; sleep 1; echo later; exit 5")
	spec.Stdin = []byte("input\n")
	p := newProxy(t)
	id := func(o *docker.Options) { o.WorkerID = workerID(t.Name()) }
	e := earlier{t, p, newExecutor(t, surviving, warmly, id, func(o *docker.Options) { o.Host = p.address })}
	l := e.leave(spec, "input\n")
	x := newExecutor(t, surviving, warmly)
	a := claim(t, x, l)
	must(t, x.Recover(t.Context())) // spares it
	must(t, a.resume(l))
	a.warm = true
	res := a.finish()
	if out := l.out + res.out; res.code() != 5 || out != "ready\ninput\nlater\n" || len(a.missing) > 0 || res.Failure != "" {
		t.Fatalf("%q %s %q", out, res, a.missing)
	}
	if left := ofLease(t, api, spec.LeaseID); len(left) != 0 {
		t.Errorf("left: %v", left)
	}

	// Its time counts from when it began, not from when the container did; another
	// lease's container is not taken for it.
	e = earlier{t, newProxy(t), nil}
	e.x = newExecutor(t, surviving, warmly, id, func(o *docker.Options) { o.Host = e.p.address })
	spec = shell("echo ready; sleep 600")
	l = e.leave(spec, "ready")
	other := l
	other.spec.LeaseID += "-other"
	y := newExecutor(t, surviving, warmly)
	b := claim(t, y, other)
	if err := b.resume(other); err == nil || !strings.Contains(err.Error(), "another one") {
		t.Errorf("resumed: %v", err)
	}
	must(t, b.Close())
	l.spec.Timeout = time.Second
	b = claim(t, y, l)
	must(t, b.resume(l))
	b.warm = true
	if res := b.finish(); !res.TimedOut || res.Failure != "" || res.Stop.GoneAt.IsZero() {
		t.Error(res)
	}
	if left := ofLease(t, api, spec.LeaseID); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

// One that died between taking a container and starting the command left nothing
// that a later process could take for a result.
func TestWarmThatWasNotBegunIsNotAdopted(t *testing.T) {
	api := engine(t)
	p := newProxy(t)
	x := newExecutor(t, surviving, warmly, func(o *docker.Options) { o.Host = p.address })
	spec := shell("exit 0")
	a := prepare(t, x, spec)
	s := a.(executor.Survivor)
	select {
	case <-s.Fed():
		t.Fatal("the command has what it was never given") // the runner takes up none that is not fed
	default:
	}
	l := left{spec: spec, handle: s.Handle(), past: executor.Past{StartedAt: time.Now()}}
	p.hang()
	p.cut()
	eventually(t, func() bool {
		of := ofLease(t, api, spec.LeaseID)
		return len(of) == 1 && of[0].State == "exited"
	}, "it waits for ever")
	res := claim(t, newExecutor(t, surviving), l)
	must(t, res.resume(l))
	res.warm = true
	if r := res.finish(); r.Failure != executor.CodeEngine || r.Code != nil {
		t.Error(r)
	}
	p.resume()
	_ = a.Close()
}

// Reap runs while containers are taken, and never takes one from a job.
func TestReapSparesWarm(t *testing.T) {
	engine(t)
	x := newExecutor(t, warmer(docker.Warm{Containers: 2}))
	ctx, cancel := context.WithCancel(t.Context())
	var reaper sync.WaitGroup
	reaper.Go(func() {
		for ctx.Err() == nil {
			if err := x.Reap(ctx, nil); err != nil && ctx.Err() == nil {
				t.Error(err)
			}
		}
	})
	for range 8 {
		if r := run(t, x, shell("echo x; sleep 0.05")); r.code() != 0 || r.out != "x\n" {
			t.Error(r)
		}
	}
	cancel()
	reaper.Wait()
}

// Whoever removes or ends a container that waits harms no job.
func TestSomebodyElseEndsWhatWaits(t *testing.T) {
	api := engine(t)
	for name, end := range map[string]func(id string) error{
		"removed": func(id string) error {
			return api.ContainerRemove(t.Context(), id, container.RemoveOptions{Force: true})
		},
		"killed": func(id string) error { return api.ContainerKill(t.Context(), id, "KILL") },
	} {
		t.Run(name, func(t *testing.T) {
			x := newExecutor(t, warmly)
			docker.Prime(t, x, shell("true"))
			must(t, end(docker.Waiting(x)[0]))
			a, err := x.Prepare(t.Context(), shell("exit 3"))
			must(t, err)
			must(t, a.Start(io.Discard, io.Discard))
			if e := a.Wait(); e.Code == nil || *e.Code != 3 {
				t.Errorf("%+v", e)
			}
			must(t, a.Close())
			must(t, x.Close())
			nothingLeft(t, api, workerID(t.Name()))
		})
	}
}

// A worker without the init says so once and goes on; as does one with an init that
// does not work.
// A container that waited when the engine went away, and could not be removed then,
// is looked for as soon as the engine is back.
func TestWhatWaitedWhenTheEngineWentIsLookedForSoon(t *testing.T) {
	api := engine(t)
	p := newProxy(t)
	x := newExecutor(t, func(o *docker.Options) {
		warmly(o)
		impatient(p.address, time.Second)(o)
	})
	if !docker.Prime(t, x, shell("true")) {
		t.Fatal("no container waits")
	}
	p.hang()
	p.cut()
	eventually(t, x.Untidy, "nobody will look for what waited")
	p.resume()
	x.KeepWarm(false)
	must(t, x.Reap(t.Context(), nil))
	nothingLeft(t, api, workerID(t.Name()))
}

func TestWithoutInit(t *testing.T) {
	api := engine(t)
	for name, files := range map[string]fstest.MapFS{
		"none":   {},
		"broken": {"warm-init-amd64": {Data: []byte("not a program")}, "warm-init-arm64": {Data: []byte("not a program")}},
	} {
		t.Run(name, func(t *testing.T) {
			var log buffer
			x := newExecutor(t, warmer(docker.Warm{Init: files}), func(o *docker.Options) {
				o.Log = slog.New(slog.NewTextHandler(&log, nil))
			})
			told := func() int { return strings.Count(log.String(), "no containers are kept warm") }
			for range 4 {
				a, err := x.Prepare(t.Context(), shell("echo x"))
				must(t, err)
				var out buffer
				must(t, a.Start(&out, io.Discard))
				if e := a.Wait(); e.Warm || e.Code == nil || *e.Code != 0 || out.String() != "x\n" {
					t.Errorf("%+v %q", e, out.String())
				}
				must(t, a.Close())
			}
			eventually(t, func() bool { return told() == 1 }, "it is not told")
			must(t, x.Close())
			if told() != 1 {
				t.Error(log.String())
			}
			nothingLeft(t, api, workerID(t.Name()))
		})
	}
}

// A stop at any moment between taking a container and its first output.
func TestStopOfWhatIsBegun(t *testing.T) {
	api := engine(t)
	x := newExecutor(t, warmer(docker.Warm{Containers: 2}))
	for i := range 6 {
		spec := shell("echo x; sleep 0.2")
		a := prepare(t, x, spec)
		timer := time.AfterFunc(time.Duration(i)*time.Millisecond, func() { a.Stop(executor.StopCancel) })
		if err := a.Start(io.Discard, io.Discard); err == nil {
			if e := a.Wait(); e.Failure != "" || e.Survivors || e.Stop == nil && (e.Code == nil || *e.Code != 0) {
				t.Errorf("%d: %+v", i, e)
			}
		} else if !errors.Is(err, executor.ErrStopped) {
			t.Error(err)
		}
		timer.Stop()
		must(t, a.Close())
		if left := ofLease(t, api, spec.LeaseID); len(left) != 0 {
			t.Errorf("left: %v", left)
		}
	}
}
