//go:build linux

package process

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
	"go.uber.org/goleak"
)

const testWorker = "worker-test"

func TestMain(m *testing.M) {
	if mode := os.Getenv("PROCESS_TEST_HELPER"); mode != "" {
		helper(mode)
		return
	}
	goleak.VerifyTestMain(m)
}

// eachTracking runs a test under every way to follow processes that this machine
// has.
func eachTracking(t *testing.T, test func(t *testing.T, e *Executor)) {
	t.Helper()
	for name, allowed := range map[string]tracking{"groups": anyTracking, "v1": onlyV1, "table": noGroups} {
		t.Run(name, func(t *testing.T) {
			e := newTestExecutor(t, allowed, testWorker)
			if allowed != noGroups && e.host.tracker == nil {
				t.Skipf("skip: no control group can be made here: %s", e.Describe())
			}
			test(t, e)
		})
	}
}

func newTestExecutor(t testing.TB, allowed tracking, worker string) *Executor {
	t.Helper()
	e, err := newExecutor(Options{DataDir: t.TempDir(), WorkerID: worker, KillBound: 5 * time.Second}, allowed)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
		if left := e.leftovers(); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	})
	return e
}

// leftovers lists control groups, working folders and processes of the worker.
func (e *Executor) leftovers() []string {
	var left []string
	for _, base := range e.host.bases {
		entries, _ := os.ReadDir(base)
		for _, entry := range entries {
			if strings.HasPrefix(entry.Name(), groupPrefix+e.mark+".") {
				left = append(left, filepath.Join(base, entry.Name()))
			}
		}
	}
	entries, _ := os.ReadDir(e.roots[0])
	for _, entry := range entries {
		if slices.Contains(e.spares.names, filepath.Join(e.roots[0], entry.Name())) {
			continue
		}
		left = append(left, filepath.Join(e.roots[0], entry.Name()))
	}
	table, _ := readProcesses()
	for _, p := range table {
		if !p.zombie && strings.HasPrefix(readMark(p.pid), e.mark+"/") {
			left = append(left, "process "+strconv.Itoa(p.pid))
		}
	}
	return left
}

func shell(script string) executor.Spec {
	return executor.Spec{
		JobID: "job-1", Attempt: 1, LeaseID: "lease-1", WorkerID: testWorker, Shell: script,
		CPU: 1, MemoryMB: 512, PIDs: 128, Timeout: 30 * time.Second, Grace: time.Second,
	}
}

func argv(args ...string) executor.Spec {
	spec := shell("")
	spec.Argv = args
	return spec
}

// syncBuffer is a bytes.Buffer for two goroutines.
type syncBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

type run struct {
	attempt        executor.Attempt
	stdout, stderr *syncBuffer
}

func start(t testing.TB, e *Executor, spec executor.Spec) run {
	t.Helper()
	a, err := e.Prepare(context.Background(), spec)
	if err != nil {
		t.Fatalf("prepare: %v", err)
	}
	r := run{attempt: a, stdout: new(syncBuffer), stderr: new(syncBuffer)}
	if err := a.Start(r.stdout, r.stderr); err != nil {
		_ = a.Close()
		t.Fatalf("start: %v", err)
	}
	return r
}

func (r run) wait(t testing.TB) executor.Exit {
	t.Helper()
	exit := r.attempt.Wait()
	if exit.Survivors {
		t.Error("something survived")
	}
	if err := r.attempt.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
	return exit
}

func (r run) waitFor(t testing.TB, text string) {
	t.Helper()
	until(t, "output "+text, func() bool { return strings.Contains(r.stdout.String(), text) })
}

func until(t testing.TB, what string, condition func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !condition() {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

func wantCode(t testing.TB, exit executor.Exit, code int) {
	t.Helper()
	if exit.Code == nil || *exit.Code != code || exit.Signal != "" {
		t.Fatalf("want exit code %d, got %s", code, show(exit))
	}
}

func show(exit executor.Exit) string {
	code := "none"
	if exit.Code != nil {
		code = strconv.Itoa(*exit.Code)
	}
	return fmt.Sprintf("code %s signal %q timedOut %v oom %v reason %q", code, exit.Signal, exit.TimedOut, exit.OOMKilled, exit.Reason)
}

func alive(pid int) bool {
	p, ok := readProcess(pid)
	return ok && !p.zombie
}

func TestSuccessWithStreamsApart(t *testing.T) {
	eachTracking(t, func(t *testing.T, e *Executor) {
		before := time.Now()
		r := start(t, e, shell("echo out; echo err >&2"))
		exit := r.wait(t)
		wantCode(t, exit, 0)
		if r.stdout.String() != "out\n" || r.stderr.String() != "err\n" {
			t.Fatalf("stdout %q, stderr %q", r.stdout.String(), r.stderr.String())
		}
		if exit.StartedAt.Before(before) || exit.FinishedAt.Before(exit.StartedAt) || exit.FinishedAt.After(time.Now()) {
			t.Fatalf("times %v %v", exit.StartedAt, exit.FinishedAt)
		}
		if exit.Stop != nil || exit.Reason != "" || exit.TimedOut {
			t.Fatalf("got %s", show(exit))
		}
	})
}

func TestExitCodes(t *testing.T) {
	eachTracking(t, func(t *testing.T, e *Executor) {
		notExecutable := filepath.Join(t.TempDir(), "plain")
		if err := os.WriteFile(notExecutable, []byte("x"), 0o644); err != nil {
			t.Fatal(err)
		}
		garbage := filepath.Join(t.TempDir(), "garbage")
		if err := os.WriteFile(garbage, []byte("\x00\x01\x02"), 0o755); err != nil {
			t.Fatal(err)
		}
		for name, c := range map[string]struct {
			spec   executor.Spec
			code   int
			stderr string
		}{
			"shell's own":            {shell("exit 7"), 7, ""},
			"highest":                {shell("exit 255"), 255, ""},
			"shell: not found":       {shell("no-such-program-here"), 127, "not found"},
			"shell: not executable":  {shell(notExecutable), 126, "ermission denied"},
			"argv":                   {argv("sh", "-c", "exit 3"), 3, ""},
			"argv: not found":        {argv("no-such-program-here", "x"), 127, "no-such-program-here: not found"},
			"argv: path not found":   {argv("/no/such/program"), 127, "/no/such/program: not found"},
			"argv: not executable":   {argv(notExecutable), 126, "permission denied"},
			"argv: folder":           {argv("/tmp"), 126, "is a directory"},
			"argv: no format":        {argv(garbage), 126, "exec format error"},
			"argv without the shell": {argv("echo", "$HOME;exit 4"), 0, ""},
		} {
			t.Run(name, func(t *testing.T) {
				r := start(t, e, c.spec)
				wantCode(t, r.wait(t), c.code)
				if !strings.Contains(r.stderr.String(), c.stderr) {
					t.Errorf("stderr %q lacks %q", r.stderr.String(), c.stderr)
				}
			})
		}
	})
}

func TestRelativeProgramAndPathOfTheJob(t *testing.T) {
	e := newTestExecutor(t, anyTracking, testWorker)
	script := executor.File{Path: "tools/hello", Content: []byte("#!/bin/sh\necho hello $1\n"), Mode: 0o755}
	for _, spec := range []executor.Spec{argv("./tools/hello", "you"), argv("hello", "you")} {
		spec.Files = []executor.File{script}
		spec.Env = map[string]string{"PATH": "tools:/usr/bin:/bin"}
		r := start(t, e, spec)
		wantCode(t, r.wait(t), 0)
		if got := r.stdout.String(); got != "hello you\n" {
			t.Errorf("%v: stdout %q, stderr %q", spec.Argv, got, r.stderr.String())
		}
	}
}

func TestSignalDeath(t *testing.T) {
	eachTracking(t, func(t *testing.T, e *Executor) {
		exit := start(t, e, shell("kill -SEGV $$")).wait(t)
		if exit.Code != nil || exit.Signal != "SIGSEGV" {
			t.Fatalf("got %s", show(exit))
		}
	})
}

func TestBigOutputIsComplete(t *testing.T) {
	eachTracking(t, func(t *testing.T, e *Executor) {
		size := 20 << 20
		if e.host.tracker == nil || !e.host.tracker.v2 {
			size = 2 << 20 // the pipes are the same for all; once is enough
		}
		r := start(t, e, shell("yes 0123456789abcdef | head -c "+strconv.Itoa(size)+" | tee /dev/stderr"))
		wantCode(t, r.wait(t), 0)
		want := sha256.Sum256(bytes.Repeat([]byte("0123456789abcdef\n"), size/17+1)[:size])
		for name, stream := range map[string]*syncBuffer{"stdout": r.stdout, "stderr": r.stderr} {
			if sha256.Sum256(stream.buf.Bytes()) != want {
				t.Errorf("%s differs, %d bytes", name, stream.buf.Len())
			}
		}
	})
}

func TestStdin(t *testing.T) {
	e := newTestExecutor(t, anyTracking, testWorker)
	spec := shell("wc -c; echo done")
	spec.Stdin = bytes.Repeat([]byte("x"), 256<<10)
	r := start(t, e, spec)
	wantCode(t, r.wait(t), 0)
	if got := strings.Fields(r.stdout.String()); !slices.Equal(got, []string{"262144", "done"}) {
		t.Fatalf("got %q", got)
	}
	spec.Shell = "exit 0" // does not read it
	wantCode(t, start(t, e, spec).wait(t), 0)
	r = start(t, e, shell("wc -c"))
	wantCode(t, r.wait(t), 0)
	if got := strings.TrimSpace(r.stdout.String()); got != "0" {
		t.Fatalf("without stdin it read %s bytes", got)
	}
}

func TestFilesAndWorkingFolder(t *testing.T) {
	e := newTestExecutor(t, anyTracking, testWorker)
	spec := shell(`pwd; echo "$HOME"; cat ../a/b.txt; stat -c %a ../a/run ../a/b.txt "$HOME"; ../a/run`)
	spec.WorkingDir = "sub/dir/.."
	spec.Files = []executor.File{
		{Path: "a/b.txt", Content: []byte("content\n")},
		{Path: "a/run", Content: []byte("#!/bin/sh\necho ran\n"), Mode: 0o750},
	}
	r := start(t, e, spec)
	wantCode(t, r.wait(t), 0)
	folder := filepath.Join(e.roots[0], "job-1-1")
	want := []string{folder + "/sub", folder, "content", "750", "644", "700", "ran"}
	if got := strings.Fields(r.stdout.String()); !slices.Equal(got, want) {
		t.Fatalf("got %q, want %q, stderr %q", got, want, r.stderr.String())
	}
	spec = shell("pwd")
	spec.WorkingDir = "/"
	r = start(t, e, spec)
	wantCode(t, r.wait(t), 0)
	if r.stdout.String() != "/\n" {
		t.Fatalf("absolute working directory: %q", r.stdout.String())
	}
}

func TestRefusals(t *testing.T) {
	e := newTestExecutor(t, anyTracking, testWorker)
	with := func(change func(*executor.Spec)) executor.Spec {
		spec := shell("true")
		change(&spec)
		return spec
	}
	file := func(paths ...string) executor.Spec {
		return with(func(s *executor.Spec) {
			for _, p := range paths {
				s.Files = append(s.Files, executor.File{Path: p, Content: []byte("x")})
			}
		})
	}
	for name, c := range map[string]struct {
		spec   executor.Spec
		class  executor.Class
		reason string
	}{
		"absolute file":      {file("/etc/x"), executor.ClassUser, "is absolute"},
		"escaping file":      {file("../x"), executor.ClassUser, "leaves the working folder"},
		"hidden escape":      {file("a/../../x"), executor.ClassUser, "leaves the working folder"},
		"empty file path":    {file(""), executor.ClassUser, "no usable path"},
		"same file twice":    {file("a", "./a"), executor.ClassUser, "cannot be written"},
		"file below a file":  {file("a", "a/b"), executor.ClassUser, "cannot be written"},
		"escaping directory": {with(func(s *executor.Spec) { s.WorkingDir = "../.." }), executor.ClassUser, "leaves the working folder"},
		"missing directory":  {with(func(s *executor.Spec) { s.WorkingDir = "/no/such/dir" }), executor.ClassUser, `"/no/such/dir" cannot be used`},
		"directory is file":  {with(func(s *executor.Spec) { s.WorkingDir = "/etc/passwd" }), executor.ClassUser, "is not a directory"},
		"unknown user":       {with(func(s *executor.Spec) { s.User = "nobody-of-this-name" }), executor.ClassUser, "does not exist"},
		"unknown group":      {with(func(s *executor.Spec) { s.User = "root:no-such-group" }), executor.ClassUser, "does not exist"},
		"unknown signal":     {with(func(s *executor.Spec) { s.StopSignal = "SIGWHAT" }), executor.ClassUser, "SIGWHAT"},
		"no command":         {with(func(s *executor.Spec) { s.Shell = "" }), executor.ClassUser, "no command"},
		"NUL in argument":    {argv("echo", "a\x00b"), executor.ClassUser, "NUL"},
		"NUL in env":         {with(func(s *executor.Spec) { s.Env = map[string]string{"A": "\x00"} }), executor.ClassUser, "NUL"},
		"bad env name":       {with(func(s *executor.Spec) { s.Env = map[string]string{"A=B": "c"} }), executor.ClassUser, "impossible name"},
		"reserved env":       {with(func(s *executor.Spec) { s.Env = map[string]string{"CMDEXEC_JOB_ID": "c"} }), executor.ClassUser, "CMDEXEC_JOB_ID"},
		"image":              {with(func(s *executor.Spec) { s.Image = "alpine" }), executor.ClassInfra, "no container images"},
		"job id with a path": {with(func(s *executor.Spec) { s.JobID = "../x" }), executor.ClassInfra, "no usable job id"},
		"another worker":     {with(func(s *executor.Spec) { s.WorkerID = "worker-other" }), executor.ClassInfra, "another worker"},
	} {
		t.Run(name, func(t *testing.T) {
			a, err := e.Prepare(context.Background(), c.spec)
			if err == nil {
				_ = a.Close()
				t.Fatal("it was accepted")
			}
			pe := executor.AsPrepareError(err)
			if pe.Class != c.class || !strings.Contains(pe.Reason, c.reason) {
				t.Fatalf("class %q, reason %q", pe.Class, pe.Reason)
			}
			if left := e.leftovers(); len(left) > 0 {
				t.Fatalf("left behind: %v", left)
			}
		})
	}
}

func TestMissingInterpreterIsTheJobsError(t *testing.T) {
	eachTracking(t, func(t *testing.T, e *Executor) {
		spec := argv("./script")
		spec.Files = []executor.File{{Path: "script", Content: []byte("#!/no/such/interpreter\n"), Mode: 0o755}}
		a, err := e.Prepare(context.Background(), spec)
		if err != nil {
			t.Fatal(err)
		}
		pe := executor.AsPrepareError(a.Start(nil, nil))
		if pe == nil || pe.Class != executor.ClassUser || !strings.Contains(pe.Reason, "interpreter") {
			t.Fatalf("got %v", pe)
		}
		if err := a.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

func TestEnvironmentIsClean(t *testing.T) {
	t.Setenv("WORKER_TOKEN_SECRET", "canary-of-the-worker")
	e := newTestExecutor(t, anyTracking, testWorker)
	spec := argv("env")
	spec.Env = map[string]string{"GREETING": "hello", "LANG": "C"}
	r := start(t, e, spec)
	wantCode(t, r.wait(t), 0)
	folder := filepath.Join(e.roots[0], "job-1-1")
	want := []string{
		"PATH=" + defaultPath, "HOME=" + folder, "TMPDIR=" + folder, "LANG=C",
		"CMDEXEC_JOB_ID=job-1", "CMDEXEC_ATTEMPT=1", "CMDEXEC_MARK=" + markOf(testWorker, spec), "GREETING=hello",
	}
	got := strings.Split(strings.TrimSpace(r.stdout.String()), "\n")
	slices.Sort(want)
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Fatalf("got %q\nwant %q", got, want)
	}
	if strings.Contains(r.stdout.String(), "lease-1") {
		t.Fatal("the command can read its lease")
	}
}

func TestDescriptorsAreNotInherited(t *testing.T) {
	e := newTestExecutor(t, anyTracking, testWorker)
	r := start(t, e, argv("ls", "/proc/self/fd"))
	wantCode(t, r.wait(t), 0)
	// ls itself opens one.
	if got := strings.Fields(r.stdout.String()); !slices.Equal(got, []string{"0", "1", "2", "3"}) {
		t.Fatalf("descriptors %q", got)
	}
}

func TestStopEndsACommandThatObeys(t *testing.T) {
	eachTracking(t, func(t *testing.T, e *Executor) {
		spec := shell(`trap 'echo bye; exit 5' INT; echo ready; while :; do sleep 0.01; done`)
		spec.StopSignal, spec.Grace = "SIGINT", 20*time.Second
		r := start(t, e, spec)
		r.waitFor(t, "ready")
		r.attempt.Stop(executor.StopCancel)
		exit := r.wait(t)
		wantCode(t, exit, 5)
		if !strings.Contains(r.stdout.String(), "bye") || exit.TimedOut {
			t.Fatalf("stdout %q, %s", r.stdout.String(), show(exit))
		}
		s := exit.Stop
		if s == nil || s.Reason != executor.StopCancel || s.DeliveredAt.IsZero() || s.SignalledAt.Before(s.DeliveredAt) ||
			s.ExitedAt.Before(s.SignalledAt) || s.GoneAt.Before(s.ExitedAt) {
			t.Fatalf("receipt %+v", s)
		}
	})
}

func TestStopKillsAfterTheGrace(t *testing.T) {
	eachTracking(t, func(t *testing.T, e *Executor) {
		spec := shell(`trap '' TERM; echo ready; while :; do sleep 0.01; done`)
		spec.Grace = 100 * time.Millisecond
		r := start(t, e, spec)
		r.waitFor(t, "ready")
		r.attempt.Stop(executor.StopCancel)
		r.attempt.Stop(executor.StopCancel)
		exit := r.wait(t)
		r.attempt.Stop(executor.StopCancel)
		if exit.Signal != "SIGKILL" || exit.Stop == nil {
			t.Fatalf("got %s", show(exit))
		}
		if took := exit.Stop.ExitedAt.Sub(exit.Stop.SignalledAt); took < spec.Grace || took > spec.Grace+5*time.Second {
			t.Fatalf("killed %v after the signal", took)
		}
	})
}

func TestLostLeaseKillsAtOnce(t *testing.T) {
	eachTracking(t, func(t *testing.T, e *Executor) {
		spec := shell(`trap '' TERM; echo ready; while :; do sleep 0.01; done`)
		spec.Grace = time.Hour
		r := start(t, e, spec)
		r.waitFor(t, "ready")
		r.attempt.Stop(executor.StopCancel) // its grace would take an hour
		r.attempt.Stop(executor.StopLeaseLost)
		if exit := r.wait(t); exit.Signal != "SIGKILL" {
			t.Fatalf("got %s", show(exit))
		}
	})
}

func TestTimeout(t *testing.T) {
	eachTracking(t, func(t *testing.T, e *Executor) {
		spec := shell(`trap '' TERM; while :; do sleep 0.01; done`)
		spec.Timeout, spec.Grace = 200*time.Millisecond, 100*time.Millisecond
		exit := start(t, e, spec).wait(t)
		if !exit.TimedOut || exit.Signal != "SIGKILL" || exit.Stop == nil || exit.Stop.Reason != executor.StopTimeout {
			t.Fatalf("got %s", show(exit))
		}
		if took := exit.FinishedAt.Sub(exit.StartedAt); took < 300*time.Millisecond || took > 5*time.Second {
			t.Fatalf("took %v", took)
		}
	})
}

func TestStopBeforeStart(t *testing.T) {
	eachTracking(t, func(t *testing.T, e *Executor) {
		a, err := e.Prepare(context.Background(), shell("echo never"))
		if err != nil {
			t.Fatal(err)
		}
		a.Stop(executor.StopCancel)
		var out syncBuffer
		if err := a.Start(&out, &out); !errors.Is(err, executor.ErrStopped) {
			t.Fatalf("start: %v", err)
		}
		if err := a.Close(); err != nil {
			t.Fatal(err)
		}
		if err := a.Close(); err != nil {
			t.Fatalf("second close: %v", err)
		}
	})
}

// Everything that leaves its session, its parent or its environment must go.
func TestNothingOfTheTreeIsLeft(t *testing.T) {
	const child = `sh -c 'trap "" TERM HUP; echo pid=$$; while :; do sleep 0.01; done'`
	scripts := map[string]string{
		"background":        child + " &",
		"setsid":            "setsid " + child + " &",
		"nohup":             "nohup " + child + " &",
		"double fork":       "(setsid sh -c '" + strings.ReplaceAll(child, "'", `'"'"'`) + " &' &)",
		"no environment":    "env -i /usr/bin/setsid " + child + " &",
		"nothing in common": "(env -i /usr/bin/setsid sh -c '" + strings.ReplaceAll(child, "'", `'"'"'`) + " & exit' &)",
	}
	eachTracking(t, func(t *testing.T, e *Executor) {
		for name, script := range scripts {
			for how, stop := range map[string]bool{"main exits": false, "main is stopped": true} {
				t.Run(name+", "+how, func(t *testing.T) {
					// The main process goes on until it is told that its child runs.
					spec := shell(script + "\nwhile [ ! -e go ]; do sleep 0.01; done; exit 3")
					if stop {
						spec.Shell = "trap '' TERM\n" + spec.Shell
						spec.Grace = 50 * time.Millisecond
					}
					r := start(t, e, spec)
					r.waitFor(t, "pid=")
					line, _, _ := strings.Cut(strings.SplitN(r.stdout.String(), "pid=", 2)[1], "\n")
					pid, err := strconv.Atoi(line)
					if err != nil || !alive(pid) {
						t.Fatalf("child %q is not alive", line)
					}
					if stop {
						r.attempt.Stop(executor.StopCancel)
					} else if err := os.WriteFile(filepath.Join(r.attempt.(*attempt).folder, "go"), nil, 0o600); err != nil {
						t.Fatal(err)
					}
					begin := time.Now()
					exit := r.attempt.Wait()
					if alive(pid) {
						t.Errorf("child %d is alive after Wait", pid)
					}
					if took := time.Since(begin); took > 5*time.Second {
						t.Errorf("Wait took %v", took)
					}
					if exit.Survivors {
						t.Error("survivors reported")
					}
					if stop && exit.Signal != "SIGKILL" || !stop && (exit.Code == nil || *exit.Code != 3) {
						t.Errorf("got %s", show(exit))
					}
					if err := r.attempt.Close(); err != nil {
						t.Error(err)
					}
					if _, there := readProcess(pid); e.host.adopts && there {
						t.Errorf("child %d is still a zombie", pid)
					}
				})
			}
		}
	})
}

func TestOtherAttemptsAreLeftAlone(t *testing.T) {
	eachTracking(t, func(t *testing.T, e *Executor) {
		spec := shell("(setsid sleep 60 &); echo ready; read line; echo got $line")
		spec.JobID = "job-2"
		spec.Shell = "(setsid sh -c 'echo pid=$$; exec sleep 60' &); while [ ! -e go ]; do sleep 0.01; done; exit 9"
		long := start(t, e, spec)
		long.waitFor(t, "pid=")
		pid, _ := strconv.Atoi(strings.TrimSpace(strings.TrimPrefix(long.stdout.String(), "pid=")))
		for range 3 {
			wantCode(t, start(t, e, shell("(setsid sleep 60 &); exit 0")).wait(t), 0)
		}
		if !alive(pid) {
			t.Error("a child of the other attempt was killed")
		}
		if err := os.WriteFile(filepath.Join(long.attempt.(*attempt).folder, "go"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		wantCode(t, long.wait(t), 9)
		if alive(pid) {
			t.Error("the child outlived its attempt")
		}
	})
}

type blockedWriter struct{ release chan struct{} }

func (w blockedWriter) Write(p []byte) (int, error) {
	<-w.release
	return len(p), nil
}

func TestBlockedWriterDoesNotDelayTheKill(t *testing.T) {
	eachTracking(t, func(t *testing.T, e *Executor) {
		spec := shell("trap '' TERM; echo $$; yes")
		spec.Timeout, spec.Grace = 100*time.Millisecond, 50*time.Millisecond
		a, err := e.Prepare(context.Background(), spec)
		if err != nil {
			t.Fatal(err)
		}
		w := blockedWriter{release: make(chan struct{})}
		if err := a.Start(w, w); err != nil {
			t.Fatal(err)
		}
		pid := a.(*attempt).tree.pid
		done := make(chan executor.Exit, 1)
		go func() { done <- a.Wait() }()
		until(t, "the end of the command", func() bool { return !alive(pid) })
		select {
		case <-done:
			t.Error("Wait returned while output was not delivered")
		default:
		}
		close(w.release)
		if exit := <-done; !exit.TimedOut {
			t.Errorf("got %s", show(exit))
		}
		if err := a.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

// A process outside of the tree that was handed the pipe does not hold Wait.
func TestForeignHolderOfThePipe(t *testing.T) {
	e := newTestExecutor(t, anyTracking, testWorker)
	r := start(t, e, shell("echo first; while [ ! -e go ]; do sleep 0.01; done; echo last"))
	r.waitFor(t, "first")
	held, err := os.OpenFile(fmt.Sprintf("/proc/%d/fd/1", r.attempt.(*attempt).tree.pid), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if err := os.WriteFile(filepath.Join(r.attempt.(*attempt).folder, "go"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	wantCode(t, r.wait(t), 0)
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("Wait took %v", took)
	}
	if r.stdout.String() != "first\nlast\n" {
		t.Errorf("stdout %q", r.stdout.String())
	}
}

type brokenWriter struct{}

func (brokenWriter) Write([]byte) (int, error) { return 0, errors.New("broken") }

func TestBrokenWriterDoesNotBlockTheCommand(t *testing.T) {
	e := newTestExecutor(t, anyTracking, testWorker)
	a, err := e.Prepare(context.Background(), shell("head -c 1000000 /dev/zero; exit 4"))
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Start(brokenWriter{}, nil); err != nil {
		t.Fatal(err)
	}
	wantCode(t, run{attempt: a}.wait(t), 4)
}

func TestWhateverTheFolderHoldsIsRemoved(t *testing.T) {
	e := newTestExecutor(t, anyTracking, testWorker)
	outside := filepath.Join(t.TempDir(), "outside")
	if err := os.WriteFile(outside, []byte("keep"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := start(t, e, shell(`mkdir -p a/b/c; touch a/b/c/file; ln -s `+outside+` a/link; ln -s / a/root
mkfifo a/fifo; chmod 000 a/b/c/file a/b/c; chmod 555 a/b a; chmod 500 .; chattr +i a/b/c/file a/b 2>/dev/null; true`))
	folder := r.attempt.(*attempt).folder
	wantCode(t, r.wait(t), 0)
	if _, err := os.Lstat(folder); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("the folder is still there: %v", err)
	}
	if data, err := os.ReadFile(outside); err != nil || string(data) != "keep" {
		t.Fatalf("a file outside was touched: %q, %v", data, err)
	}
}

// A working folder may be used again only when nothing tells it from a new one.
func TestFoldersAreUsedAgainOnlyAsNew(t *testing.T) {
	e := newTestExecutor(t, anyTracking, testWorker)
	inode := func(script string) string {
		r := start(t, e, shell(script+"; stat -c %i ."))
		wantCode(t, r.wait(t), 0)
		return strings.TrimSpace(r.stdout.String())
	}
	first := inode("true")
	if again := inode("true"); again != first {
		t.Errorf("an untouched folder was not used again: %s, %s", first, again)
	}
	for _, script := range []string{"touch file", "touch .hidden", "mkdir folder", "chmod 755 .", "chmod +t .", "ln -s x y"} {
		inode(script)
		if n := len(e.spares.names); n != 0 {
			t.Errorf("%s: the folder was kept", script)
		}
	}
	for range 2 { // closing twice must not keep it twice
		r := start(t, e, shell("true"))
		wantCode(t, r.wait(t), 0)
		if err := r.attempt.Close(); err != nil {
			t.Fatal(err)
		}
		if n := len(e.spares.names); n != 1 {
			t.Fatalf("%d folders kept", n)
		}
	}
}

// A control group may be used again only when nothing of an attempt is left in it,
// and as it was when it was new.
func TestGroupsAreUsedAgainOnlyAsNew(t *testing.T) {
	e := newTestExecutor(t, anyTracking, testWorker)
	c := e.host.memory
	if c == nil || c.v2 || c == e.host.tracker || c == e.host.pids || os.Geteuid() != 0 {
		t.Skip("skip: only control groups of version 1, of root, are used again")
	}
	small := func(script string) executor.Spec {
		spec := shell(script)
		spec.MemoryMB = 64
		return spec
	}
	// The folder of the command's own group.
	own := `cd "` + c.base + `/$(sed -n 's/.*:memory:.*\/\(cmdexec\.\)/\1/p' /proc/self/cgroup)"; `
	group := func() string {
		r := start(t, e, small(own+"pwd"))
		wantCode(t, r.wait(t), 0)
		return strings.TrimSpace(r.stdout.String())
	}
	first := group()
	if again := group(); again != first {
		t.Errorf("a group was not used again: %s, %s", first, again)
	}

	t.Run("what it has counted is not the next one's", func(t *testing.T) {
		exit := start(t, e, small(`x=aaaaaaaaaaaaaaaa; while :; do x=$x$x; done`)).wait(t)
		if !exit.OOMKilled {
			t.Fatalf("got %s", show(exit))
		}
		r := start(t, e, small(own+"pwd"))
		exit = r.wait(t)
		wantCode(t, exit, 0)
		if strings.TrimSpace(r.stdout.String()) != first || exit.OOMKilled || exit.PeakMemoryMB > 16 || exit.Reason != "" {
			t.Errorf("%s after %s: %s, peak %d MiB", r.stdout, first, show(exit), exit.PeakMemoryMB)
		}
	})
	t.Run("a limit that a command has changed is set again", func(t *testing.T) {
		wantCode(t, start(t, e, small(own+"echo -1 > memory.memsw.limit_in_bytes; echo 1G > memory.limit_in_bytes")).wait(t), 0)
		r := start(t, e, small(own+"cat memory.limit_in_bytes"))
		wantCode(t, r.wait(t), 0)
		if got := strings.TrimSpace(r.stdout.String()); got != strconv.Itoa(64<<20) {
			t.Errorf("the next command's memory limit is %s", got)
		}
	})
	t.Run("memory that is still charged", func(t *testing.T) {
		file := "/dev/shm/cmdexec-test-" + strconv.Itoa(os.Getpid())
		t.Cleanup(func() { _ = os.Remove(file) })
		before := group()
		wantCode(t, start(t, e, small("head -c 8388608 /dev/zero > "+file)).wait(t), 0)
		if after := group(); after == before {
			t.Error("a group was kept that has 8 MiB of the command before")
		}
	})
	t.Run("a group that the command made below", func(t *testing.T) {
		before := group()
		wantCode(t, start(t, e, small(own+"mkdir below")).wait(t), 0)
		if after := group(); after == before {
			t.Error("a group was kept that has another below it")
		}
	})
	t.Run("groups of a killed worker", func(t *testing.T) {
		group()
		for _, h := range []*hierarchy{e.host.memory, e.host.pids, e.host.cpu} {
			for _, g := range h.idle.groups { // forgotten, as by a worker that was killed
				g.shut()
			}
			h.idle.groups = nil
		}
		if err := e.Recover(context.Background()); err != nil {
			t.Fatal(err)
		}
		if left := e.leftovers(); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	})
}

func TestMountsAreDetachedBeforeRemoval(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("skip: mounting needs root")
	}
	e := newTestExecutor(t, anyTracking, testWorker)
	outside := t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "precious"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r := start(t, e, shell("mkdir 'a b' && mount --bind "+outside+" 'a b' && ls 'a b'"))
	exit := r.wait(t)
	if *exit.Code != 0 {
		t.Skipf("skip: mount is not allowed here: %s", r.stderr.String())
	}
	if r.stdout.String() != "precious\n" {
		t.Fatalf("stdout %q", r.stdout.String())
	}
	if _, err := os.Stat(filepath.Join(outside, "precious")); err != nil {
		t.Fatalf("a file of the host was removed: %v", err)
	}
}

func TestUser(t *testing.T) {
	e := newTestExecutor(t, anyTracking, testWorker)
	spec := shell("id -u; id -g; pwd; echo x > file && cat file in")
	spec.User = "65534:65533"
	spec.Files = []executor.File{{Path: "in", Content: []byte("y\n")}}
	if os.Geteuid() != 0 {
		_, err := e.Prepare(context.Background(), spec)
		if pe := executor.AsPrepareError(err); pe == nil || !strings.Contains(pe.Reason, "does not run as root") {
			t.Fatalf("got %v", err)
		}
		return
	}
	r := start(t, e, spec)
	folder := r.attempt.(*attempt).folder
	wantCode(t, r.wait(t), 0)
	if got, want := strings.Fields(r.stdout.String()), []string{"65534", "65533", folder, "x", "y"}; !slices.Equal(got, want) {
		t.Fatalf("got %q, want %q", got, want)
	}
	if err := e.Recover(context.Background()); err != nil { // removes the other root
		t.Fatal(err)
	}
	if _, err := os.Stat(e.roots[1]); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is left", e.roots[1])
	}
}

func TestMemoryLimit(t *testing.T) {
	eachTracking(t, func(t *testing.T, e *Executor) {
		if !e.Limits().Memory {
			if e.host.tracker == nil {
				return // nothing can hold here, and Limits says so
			}
			t.Skipf("skip: no memory limit here: %s", e.Describe())
		}
		// A shell variable is memory of the shell itself.
		spec := shell(`x=aaaaaaaaaaaaaaaa; while :; do x=$x$x; done`)
		spec.MemoryMB = 32
		exit := start(t, e, spec).wait(t)
		if !exit.OOMKilled || exit.Signal != "SIGKILL" || !strings.Contains(exit.Reason, "memory limit of 32 MiB") {
			t.Fatalf("got %s", show(exit))
		}
		if exit.PeakMemoryMB < 16 || exit.PeakMemoryMB > 33 {
			t.Errorf("peak memory %d MiB", exit.PeakMemoryMB)
		}
		wantCode(t, start(t, e, shell("exit 0")).wait(t), 0)
	})
}

// A machine that is full of jobs goes on with everything else.
func TestAttemptsYield(t *testing.T) {
	eachTracking(t, func(t *testing.T, e *Executor) {
		c := e.host.cpu
		if c == nil {
			if e.host.tracker == nil {
				return // nothing can hold here, and Limits says so
			}
			t.Skipf("skip: no share of CPU time here: %s", e.Describe())
		}
		line, file, want := "[:,]cpu[:,]", "cpu.shares", "410"
		if c.v2 {
			line, file, want = "^0::", "cpu.weight", "40"
		}
		// Version 1 has it a moment after the start.
		spec := shell(`f="` + c.base + `/$(grep '` + line + `' /proc/self/cgroup | sed 's/.*\/cmdexec\./cmdexec./')/` + file + `"; ` +
			`while [ "$(cat "$f")" = 1024 ]; do sleep 0.01; done; cat "$f"`)
		spec.CPU = 2
		r := start(t, e, spec)
		wantCode(t, r.wait(t), 0)
		if got := strings.TrimSpace(r.stdout.String()); got != want {
			t.Errorf("%s is %s, want %s; %s", file, got, want, r.stderr)
		}
	})
}

func TestPidsLimit(t *testing.T) {
	eachTracking(t, func(t *testing.T, e *Executor) {
		if !e.Limits().PIDs {
			if e.host.tracker == nil {
				return // nothing can hold here, and Limits says so
			}
			t.Skipf("skip: no process limit here: %s", e.Describe())
		}
		// The shell and its sleeps: the tenth process is one too many.
		spec := shell(`i=0; while [ $i -lt 20 ]; do sleep 60 & i=$((i+1)); done; echo all`)
		spec.PIDs = 10
		r := start(t, e, spec)
		exit := r.wait(t)
		if *exit.Code == 0 || strings.Contains(r.stdout.String(), "all") {
			t.Fatalf("twenty processes were started under a limit of ten: %s", show(exit))
		}
		spec.Shell = `sleep 0 & sleep 0; exit 0`
		spec.PIDs = 3
		wantCode(t, start(t, e, spec).wait(t), 0)
	})
}

func TestForkBombIsContained(t *testing.T) {
	eachTracking(t, func(t *testing.T, e *Executor) {
		if !e.Limits().PIDs {
			if e.host.tracker == nil {
				return // nothing can hold here, and Limits says so
			}
			t.Skipf("skip: a fork bomb needs a process limit: %s", e.Describe())
		}
		spec := shell(`b() { b | b & }; b; while :; do b; sleep 0.01; done`)
		spec.PIDs, spec.Timeout, spec.Grace = 32, 300*time.Millisecond, 50*time.Millisecond
		a, err := e.Prepare(context.Background(), spec)
		if err != nil {
			t.Fatal(err)
		}
		g := a.(*attempt).tree.groups[slices.IndexFunc(a.(*attempt).tree.groups, func(g *group) bool { return g.h.pids })]
		if n, ok := number(g.fd, "pids.max"); !ok || n > 33 {
			t.Fatalf("the limit is not set: %d", n)
		}
		if err := a.Start(nil, nil); err != nil {
			t.Fatal(err)
		}
		run{attempt: a}.wait(t)
	})
}

func TestCPULimitAndTime(t *testing.T) {
	eachTracking(t, func(t *testing.T, e *Executor) {
		spec := shell("while :; do :; done")
		spec.CPU, spec.Timeout, spec.Grace = 0.2, time.Second, 0
		exit := start(t, e, spec).wait(t)
		if exit.CPUms < 20 {
			t.Errorf("CPU time %d ms", exit.CPUms)
		}
		if !e.Limits().CPU {
			if e.host.tracker == nil {
				return // nothing can hold here, and Limits says so
			}
			t.Skipf("skip: no CPU limit here: %s", e.Describe())
		}
		if exit.CPUms > 500 {
			t.Errorf("CPU time %d ms in one second at a fifth of a core", exit.CPUms)
		}
	})
}

// A frozen process (v1 freezer) does not die of SIGKILL, like one in
// uninterruptible sleep.
func TestSurvivorsAreReported(t *testing.T) {
	const freezer = "/sys/fs/cgroup/freezer"
	eachTracking(t, func(t *testing.T, e *Executor) {
		folder := filepath.Join(freezer, fmt.Sprintf("cmdexec-test-%d", os.Getpid()))
		if err := os.Mkdir(folder, 0o755); err != nil {
			t.Skipf("skip: no v1 freezer here: %v", err)
		}
		control := func(file, value string) {
			t.Helper()
			if err := os.WriteFile(filepath.Join(folder, file), []byte(value), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		defer func() {
			control("freezer.state", "THAWED")
			until(t, "the freezer to be empty", func() bool { return os.Remove(folder) == nil })
		}()
		e.killBound = 200 * time.Millisecond
		r := start(t, e, shell("echo ready; exec sleep 60"))
		r.waitFor(t, "ready")
		pid := r.attempt.(*attempt).tree.pid
		control("cgroup.procs", strconv.Itoa(pid))
		control("freezer.state", "FROZEN")
		r.attempt.Stop(executor.StopLeaseLost)
		begin := time.Now()
		exit := r.attempt.Wait()
		if !exit.Survivors || exit.Code != nil || exit.Signal != "" || exit.Stop == nil || !exit.Stop.GoneAt.IsZero() || !exit.Stop.ExitedAt.IsZero() {
			t.Errorf("got %s, receipt %+v", show(exit), exit.Stop)
		}
		if took := time.Since(begin); took > 10*time.Second {
			t.Errorf("Wait took %v", took)
		}
		closeErr := r.attempt.Close()
		if e.host.tracker != nil && closeErr == nil {
			t.Error("Close says that nothing is left")
		}
		control("freezer.state", "THAWED")
		until(t, "the survivor to be reaped", func() bool {
			_, there := readProcess(pid)
			return !there
		})
		until(t, "a clean close", func() bool { return r.attempt.Close() == nil })
	})
}

func TestManyAtOnce(t *testing.T) {
	eachTracking(t, func(t *testing.T, e *Executor) {
		var wg sync.WaitGroup
		for i := range 40 {
			wg.Go(func() {
				spec := shell("(setsid sleep 30 &) ; echo " + strconv.Itoa(i) + "; exit " + strconv.Itoa(i))
				spec.JobID = "job-" + strconv.Itoa(i)
				a, err := e.Prepare(context.Background(), spec)
				if err != nil {
					t.Error(err)
					return
				}
				var out syncBuffer
				if err := a.Start(&out, nil); err != nil {
					t.Error(err)
					return
				}
				exit := a.Wait()
				if exit.Code == nil || *exit.Code != i || out.String() != strconv.Itoa(i)+"\n" || exit.Survivors {
					t.Errorf("attempt %d: %s, stdout %q", i, show(exit), out.String())
				}
				if err := a.Close(); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	})
}

// helper is an earlier life of a worker, which is killed while a command runs.
func helper(mode string) {
	allowed, err := strconv.Atoi(mode)
	if err != nil {
		panic(err)
	}
	e, err := newExecutor(Options{DataDir: os.Getenv("HELPER_DATA"), WorkerID: testWorker, Mark: os.Getenv("HELPER_MARK")}, tracking(allowed))
	if err != nil {
		panic(err)
	}
	a, err := e.Prepare(context.Background(), executor.Spec{
		JobID: "job-old", Attempt: 2, LeaseID: "lease-old", PIDs: 20, MemoryMB: 64,
		Shell: `echo pid=$$; (setsid sh -c 'echo pid=$$; exec sleep 600' &); touch file; sleep 600`,
	})
	if err != nil {
		panic(err)
	}
	if err := a.Start(os.Stdout, os.Stderr); err != nil {
		panic(err)
	}
	a.Wait()
}

func startEarlierLife(t *testing.T, allowed tracking, data, mark string) (pids []int) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	var out syncBuffer
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), "PROCESS_TEST_HELPER="+strconv.Itoa(int(allowed)), "HELPER_DATA="+data, "HELPER_MARK="+mark)
	cmd.Stdout, cmd.Stderr = &out, os.Stderr
	// A file, since the command must not die of a broken pipe before Recover.
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	until(t, "the earlier life's command", func() bool { return strings.Count(out.String(), "pid=") == 2 && strings.HasSuffix(out.String(), "\n") })
	if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	for _, field := range strings.Fields(out.String()) {
		pid, err := strconv.Atoi(strings.TrimPrefix(field, "pid="))
		if err != nil {
			t.Fatal(err)
		}
		pids = append(pids, pid)
	}
	return pids
}

func TestRecoverRemovesOwnLeftoversOnly(t *testing.T) {
	eachTracking(t, func(t *testing.T, e *Executor) {
		allowed := map[string]tracking{"groups": anyTracking, "v1": onlyV1, "table": noGroups}[filepath.Base(t.Name())]
		data := filepath.Dir(e.roots[0])
		own := startEarlierLife(t, allowed, data, testWorker)
		otherData := t.TempDir()
		other := startEarlierLife(t, allowed, otherData, testWorker+"-2")
		for _, pid := range slices.Concat(own, other) {
			if !alive(pid) {
				t.Fatalf("process %d did not outlive its worker", pid)
			}
		}
		if err := e.Recover(context.Background()); err != nil {
			t.Fatal(err)
		}
		if left := e.leftovers(); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
		for _, pid := range own {
			if alive(pid) {
				t.Errorf("process %d of the earlier life is alive", pid)
			}
		}
		for _, pid := range other {
			if !alive(pid) {
				t.Errorf("process %d of another worker of the same id was killed", pid)
			}
		}
		second := newOther(t, otherData, allowed)
		if len(second.leftovers()) == 0 {
			t.Error("the other worker's leftovers are gone")
		}
		if err := second.Recover(context.Background()); err != nil {
			t.Fatal(err)
		}
		if left := second.leftovers(); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
		wantCode(t, start(t, e, shell("exit 0")).wait(t), 0)
	})
}

func newOther(t *testing.T, data string, allowed tracking) *Executor {
	t.Helper()
	e, err := newExecutor(Options{DataDir: data, WorkerID: testWorker, Mark: testWorker + "-2"}, allowed)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func TestProbe(t *testing.T) {
	e := newTestExecutor(t, anyTracking, testWorker)
	if err := e.Probe(context.Background()); err != nil {
		t.Fatal(err)
	}
	t.Log(e.Describe())
	if err := os.RemoveAll(e.roots[0]); err != nil {
		t.Fatal(err)
	}
	if err := e.Probe(context.Background()); err == nil {
		t.Fatal("a missing folder is not noticed")
	}
}
