package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
)

// cli runs the CLI as the person at the machine of a system would: it finds the
// instance by the context file.
func (s *system) cli(args ...string) *exec.Cmd {
	cmd := exec.Command(binary(s.t, "cmdexec"), args...)
	cmd.Env = append(s.env(), "PATH="+os.Getenv("PATH"), "HOME="+s.dir, "GORACE=halt_on_error=1")
	cmd.Dir = s.dir
	return cmd
}

// What `up` prints makes tokens for the instance that was started last, wherever its
// data is, and makes no secrets of its own.
func (s *system) tokenOfTheLastInstance(t *testing.T) {
	home := t.TempDir()
	data := filepath.Join(home, "elsewhere")
	token := func(args ...string) string {
		cmd := s.cli(append([]string{"token", "user"}, args...)...)
		cmd.Env = []string{"HOME=" + home, "PATH=" + os.Getenv("PATH"), "GORACE=halt_on_error=1"}
		got := finish(t, cmd)
		if got.code != 0 {
			t.Fatalf("token %v: %+v", args, got)
		}
		return got.out
	}
	token("--data-dir", data) // makes the secrets, as `up` does
	config := filepath.Join(home, ".config", "cmdexec")
	context := fmt.Sprintf(`{"server":"http://127.0.0.1:1","token":"x","dataDir":%q}`, data)
	if err := errors.Join(os.MkdirAll(config, 0o700), os.WriteFile(filepath.Join(config, "context.json"), []byte(context), 0o600)); err != nil {
		t.Fatal(err)
	}
	token()
	if entries, err := os.ReadDir(filepath.Join(home, ".local")); err == nil {
		t.Errorf("secrets of nobody were made: %v", entries)
	}
}

type result struct {
	code     int
	out, err string
}

func finish(t testing.TB, cmd *exec.Cmd) result {
	t.Helper()
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return result{cmd.ProcessState.ExitCode(), out.String(), errOut.String()}
}

func TestCLI(t *testing.T) {
	s := startSystem(t, upOptions{executor: "process", slots: 4})
	eventually(t, "the context file is written", func() error {
		_, err := os.Stat(filepath.Join(s.dir, "config", "cmdexec", "context.json"))
		return err
	})
	check := func(name string, want result, args ...string) {
		t.Helper()
		got := finish(t, s.cli(args...))
		if got.code != want.code || got.out != want.out || !strings.Contains(got.err, want.err) {
			t.Errorf("%s: %v\n got %d, stdout %q, stderr %q\nwant %d, stdout %q, stderr with %q",
				name, args, got.code, got.out, got.err, want.code, want.out, want.err)
		}
	}
	check("success", result{0, "hello\n", ""}, "run", "--", "echo", "hello")
	check("streams apart", result{0, "o\n", "e\n"}, "run", "-c", "echo o; echo e >&2")
	check("the job's own exit code", result{7, "", ""}, "run", "-c", "exit 7")
	check("timed out", result{124, "", "timed out"}, "run", "--timeout", "1", "--grace", "0", "--", "sleep", "60")
	check("no such program is the shell's 127", result{127, "", "no-such-program"}, "run", "--", "no-such-program")
	check("no time to wait", result{125, "", "queue_timeout"}, "run", "--require", "zone=nowhere", "--queue-timeout", "1", "--", "true")
	check("nothing to run", result{2, "", "what should run"}, "run")
	check("no such flag", result{2, "", "unknown flag"}, "run", "--nosuch")
	check("no such command", result{2, "", "unknown command"}, "nosuch")
	check("a bad value", result{2, "", "timeout"}, "run", "--timeout", "-5", "--", "true")
	check("no such job", result{1, "", "cmdexec:"}, "status", "job-01k00000000000000000000000")
	check("no server", result{125, "", "is the server running"}, "--server", "http://"+freeAddr(t), "run", "--", "true")
	check("no right token", result{125, "", ""}, "--token", "x", "list")

	id := strings.TrimSpace(finish(t, s.cli("submit", "-c", "cat; echo done", "--stdin", "--name", "greeting")).out)
	admin := s.as("root", auth.RoleAdmin)
	if j := admin.ended(id); j.Status != job.Succeeded || j.Name != "greeting" {
		t.Fatalf("ended %s, name %q", j.Status, j.Name)
	}
	check("follow an ended job", result{0, "done\n", ""}, "logs", "-f", id)
	check("logs", result{0, "done\n", ""}, "logs", id)
	var j api.Job
	if err := json.Unmarshal([]byte(finish(t, s.cli("status", id, "-o", "json")).out), &j); err != nil || j.JobID != id || j.Status != job.Succeeded {
		t.Errorf("status -o json: %v, %s %s", err, j.JobID, j.Status)
	}
	if got := finish(t, s.cli("status", id, "-o", "yaml")).out; !strings.Contains(got, "jobId: "+id) {
		t.Errorf("status -o yaml: %q", got)
	}
	eventually(t, "the job is listed", func() error {
		if got := finish(t, s.cli("list")).out; !strings.Contains(got, id) || !strings.Contains(got, "greeting") || !strings.Contains(got, " RAN ") {
			return errors.New(got)
		}
		return nil
	})
	if got := finish(t, s.cli("workers")).out; !strings.Contains(got, "process") {
		t.Errorf("workers: %q", got)
	}
	for _, who := range []string{"user", "worker"} {
		if got := finish(t, s.cli("token", who, "--ttl", "1h")); got.code != 0 || strings.Count(got.out, ".") != 2 {
			t.Errorf("token %s: %+v", who, got)
		}
	}
	if got := finish(t, s.cli("version")); got.code != 0 || !strings.HasPrefix(got.out, "cmdexec ") {
		t.Errorf("version: %+v", got)
	}

	t.Run("the token of an instance with its data elsewhere", s.tokenOfTheLastInstance)
	t.Run("documents", func(t *testing.T) { s.documents(t, admin.in(t)) })
	t.Run("further flags", func(t *testing.T) { s.furtherFlags(t, admin.in(t)) })
	t.Run("rerun", func(t *testing.T) { s.rerun(t, admin.in(t), id) })
	t.Run("events", func(t *testing.T) { s.events(t, id) })
	t.Run("cancel by filters", func(t *testing.T) { s.cancelByFilters(t, admin.in(t)) })

	t.Run("interrupted once: canceled, 130", func(t *testing.T) {
		cmd := s.cli("run", "-c", "echo up; sleep 300")
		var out lockedBuffer
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "its output is there", func() error {
			if !strings.Contains(out.String(), "up\n") {
				return errors.New(out.String())
			}
			return nil
		})
		if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait() // the exit code says it
		if code := cmd.ProcessState.ExitCode(); code != 130 || !strings.Contains(out.String(), "canceled") {
			t.Errorf("exit code %d, output %q", code, out.String())
		}
	})

	t.Run("interrupted twice: detached, the job goes on", func(t *testing.T) {
		cmd := s.cli("run", "--grace", "300", "-c", "trap '' TERM; echo up; while :; do sleep 0.2; done")
		var out lockedBuffer
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		for _, sign := range []string{"up\n", "canceling"} {
			eventually(t, "it prints "+sign, func() error {
				if !strings.Contains(out.String(), sign) {
					return errors.New(out.String())
				}
				return nil
			})
			if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
				t.Fatal(err)
			}
		}
		_ = cmd.Wait() // the exit code says it
		if code := cmd.ProcessState.ExitCode(); code != 130 || !strings.Contains(out.String(), "detached") {
			t.Errorf("exit code %d, output %q", code, out.String())
		}
	})
}

// in is the user in a subtest.
func (u *user) in(t *testing.T) *user { return &user{t: t, url: u.url, token: u.token} }

// documents: a whole job from a file or from stdin, YAML or JSON.
func (s *system) documents(t *testing.T, admin *user) {
	write := func(name, text string) string {
		t.Helper()
		path := filepath.Join(s.dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	yaml := "# what runs at night\nname: nightly\ncommand: [sh, -c, 'cat; echo $GREETING']\nstdin: |\n  one\nenv:\n  GREETING: \"yes\"\nlabels: {team: blue}\n"
	file := write("job.yaml", yaml)
	ids := map[string]bool{}
	submitted := func(name, stdin string, args ...string) api.Job {
		t.Helper()
		cmd := s.cli(append([]string{"submit"}, args...)...)
		cmd.Stdin = strings.NewReader(stdin)
		got := finish(t, cmd)
		id := strings.TrimSuffix(got.out, "\n")
		if got.code != 0 || !strings.HasPrefix(id, "job-") || strings.ContainsAny(id, " \n") || got.err != "" {
			t.Fatalf("%s: %+v; want the job's id alone", name, got)
		}
		ids[id] = true
		return admin.ended(id)
	}
	for _, j := range []api.Job{
		submitted("YAML file", "", "-f", file), submitted("YAML on stdin", yaml, "-f", "-"),
		submitted("JSON on stdin", `{"name":"nightly","command":["sh","-c","cat; echo $GREETING"],"stdin":"one\n","env":{"GREETING":"yes"},"labels":{"team":"blue"}}`, "-f", "-"),
	} {
		if j.Status != job.Succeeded || j.Name != "nightly" || j.Labels["team"] != "blue" || admin.output(j.JobID, "stdout") != "one\nyes\n" {
			t.Errorf("ended %s (%s), name %q, labels %v", j.Status, j.Message, j.Name, j.Labels)
		}
	}
	if len(ids) != 3 {
		t.Errorf("three submits made %d jobs", len(ids))
	}
	if a, b := submitted("with a key", "", "-f", file, "--idempotency-key", "night-1"), submitted("again", "", "-f", file, "--idempotency-key", "night-1"); a.JobID != b.JobID {
		t.Errorf("one key, two jobs: %s and %s", a.JobID, b.JobID)
	}
	for _, c := range []struct {
		name, stdin, want string
		args              []string
	}{
		{"no such file", "", "no such file", []string{"-f", filepath.Join(s.dir, "none.yaml")}},
		{"a flag beside the file", "", "--name cannot be given beside -f", []string{"-f", file, "--name", "x"}},
		{"a program beside the file", "", "not both", []string{"-f", file, "--", "true"}},
		{"no such field", "command: \"true\"\nowner: root\n", "owner", []string{"-f", "-"}},
		{"two documents", "command: \"true\"\n---\ncommand: \"true\"\n", "document", []string{"-f", "-"}},
		{"an alias", "command: &a [\"true\"]\nname: *a\n", "", []string{"-f", "-"}},
		{"nothing", "", "", []string{"-f", "-"}},
		{"broken JSON", `{"command":`, "", []string{"-f", "-"}},
		{"too much", strings.Repeat("# filler\n", 200_000), "more than", []string{"-f", "-"}},
	} {
		cmd := s.cli(append([]string{"submit"}, c.args...)...)
		cmd.Stdin = strings.NewReader(c.stdin)
		if got := finish(t, cmd); got.code != 2 || got.out != "" || !strings.Contains(got.err, c.want) {
			t.Errorf("%s: %+v; want exit code 2 and %q on stderr", c.name, got, c.want)
		}
	}
}

// furtherFlags is a run with the flags of a job that one needs seldom.
func (s *system) furtherFlags(t *testing.T, admin *user) {
	only := t.TempDir()
	mark := filepath.Join(only, "tries")
	got := finish(t, s.cli("run", "--pids", "64", "--attempts", "3", "--backoff", "0", "--max-backoff", "1", "--on-exit-codes", "75,76",
		"--on-worker-lost", "fail", "--queue-timeout", "60", "--prepare-timeout", "60", "--total-timeout", "120", "--log-max-bytes", "4096",
		"--stop-signal", "SIGINT", "--grace", "1", "--require-os", "linux", "--label", "kind=further", "-c",
		`echo x >> `+mark+`; n=$(wc -l < `+mark+`); echo "try $n"; case $n in 1) exit 75;; 2) exit 76;; *) exit 9;; esac`))
	if got.code != 9 || got.out != "try 1\ntry 2\ntry 3\n" || !strings.Contains(got.err, "attempt 3") {
		t.Errorf("tried again on 75 and 76, and no more: %+v", got)
	}
	var list api.JobList
	eventually(t, "the job is listed by its label", func() error {
		r := finish(t, s.cli("list", "--label", "kind=further", "-o", "json"))
		list = api.JobList{}
		if err := json.Unmarshal([]byte(r.out), &list); err != nil {
			return err
		}
		if len(list.Items) != 1 {
			return errors.New(r.out)
		}
		return nil
	})
	j := admin.job(list.Items[0].JobID)
	if j.Resources.PIDs != 64 || j.Retry.MaxAttempts != 3 || j.OnWorkerLost != "fail" || j.Timeouts.Queue != 60 || j.Timeouts.Total != 120 ||
		j.Timeouts.Prepare != 60 || j.LogMaxBytes != 4096 || j.Stop.Signal != "SIGINT" || j.Constraints.OS != "linux" || len(j.Attempts) != 3 {
		t.Errorf("the flags are not the job's fields: %+v, %d attempts", j.Spec, len(j.Attempts))
	}
	if got := finish(t, s.cli("run", "--attempts", "3", "--backoff", "0", "--on-exit-codes", "75", "-c", "echo once; exit 8")); got.code != 8 || got.out != "once\n" {
		t.Errorf("an exit code that is not listed: %+v", got)
	}
	if got := finish(t, s.cli("run", "--total-timeout", "1", "--grace", "0", "-c", "sleep 60")); got.code != 124 && got.code != 125 || !strings.Contains(got.err, "total_timeout") {
		t.Errorf("the total timeout: %+v", got)
	}
	for name, args := range map[string][]string{
		"pids":   {"--pids", "-1"},
		"tmpfs":  {"--tmpfs", "32"}, // of containers only
		"logMax": {"--log-max-bytes", "1"},
		"onExit": {"--on-exit-codes", "300"},
		"retry":  {"--attempts", "-1"},
		"stop":   {"--stop-signal", "SIGNOPE"},
		"onWork": {"--on-worker-lost", "shrug"},
	} {
		got := finish(t, s.cli(append(append([]string{"run"}, args...), "--", "true")...))
		if got.code != 2 || got.out != "" || !strings.Contains(got.err, name) {
			t.Errorf("%v: %+v", args, got)
		}
	}
}

func (s *system) rerun(t *testing.T, admin *user, id string) {
	got := finish(t, s.cli("rerun", id))
	again := strings.TrimSpace(got.out)
	if got.code != 0 || again == id || !strings.HasPrefix(again, "job-") {
		t.Fatalf("rerun: %+v", got)
	}
	if j := admin.ended(again); j.Status != job.Succeeded || j.RerunOf != id || j.Name != "greeting" {
		t.Errorf("the new job ended %s, rerun of %q, name %q", j.Status, j.RerunOf, j.Name)
	}
	if got := finish(t, s.cli("status", again)); !strings.Contains(got.out, "rerun of") || !strings.Contains(got.out, id) {
		t.Errorf("status does not say what it repeats: %+v", got)
	}
	first, second := finish(t, s.cli("rerun", id, "--idempotency-key", "again-1")), finish(t, s.cli("rerun", id, "--idempotency-key", "again-1"))
	if first.code != 0 || first.out != second.out {
		t.Errorf("one key, two jobs: %+v and %+v", first, second)
	}
	if got := finish(t, s.cli("rerun", "job-01k00000000000000000000000")); got.code != 1 || got.out != "" {
		t.Errorf("no such job: %+v", got)
	}
	if got := finish(t, s.cli("rerun")); got.code != 2 {
		t.Errorf("no job: %+v", got)
	}
}

func (s *system) events(t *testing.T, ended string) {
	got := finish(t, s.cli("events", ended))
	if got.code != 0 || strings.Count(got.out, "\n") != 1 || !strings.Contains(got.out, ended) || !strings.Contains(got.out, "succeeded") {
		t.Errorf("of an ended job: %+v", got)
	}
	if got := finish(t, s.cli("events", "job-01k00000000000000000000000")); got.code != 1 {
		t.Errorf("of no job: %+v", got)
	}

	// All jobs with a label, as they change, until Ctrl-C.
	cmd := s.cli("events", "--label", "watched=yes", "-o", "json")
	var out lockedBuffer
	cmd.Stdout = &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var id string
	eventually(t, "the stream has the end of a job", func() error { // of which it may have missed the first
		got := finish(t, s.cli("run", "--label", "watched=yes", "--", "true"))
		if got.code != 0 {
			t.Fatalf("run: %+v", got)
		}
		for line := range strings.Lines(out.String()) {
			var e api.StateEvent
			if err := json.Unmarshal([]byte(line), &e); err == nil && e.Status == job.Succeeded {
				id = e.JobID
				return nil
			}
		}
		return errors.New(out.String())
	})
	if got := finish(t, s.cli("run", "--", "true")); got.code != 0 {
		t.Errorf("run: %+v", got)
	}
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // the exit code says it
	if code := cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("Ctrl-C ends it with %d", code)
	}
	for line := range strings.Lines(out.String()) {
		var e api.StateEvent
		if err := json.Unmarshal([]byte(line), &e); err != nil || e.JobID == "" || e.Status == "" {
			t.Errorf("line %q: %v", line, err)
			continue
		}
		if got := finish(t, s.cli("status", e.JobID, "-o", "json")).out; !strings.Contains(got, "watched") {
			t.Errorf("an event of a job without the label: %s", line)
		}
	}
	if got := finish(t, s.cli("events", id, "-o", "json")); got.code != 0 || !strings.Contains(got.out, `"status":"succeeded"`) {
		t.Errorf("as JSON: %+v", got)
	}
}

func (s *system) cancelByFilters(t *testing.T, admin *user) {
	submit := func(args ...string) string {
		t.Helper()
		got := finish(t, s.cli(append(append([]string{"submit", "--grace", "0"}, args...), "--", "sleep", "300")...))
		if got.code != 0 {
			t.Fatalf("submit: %+v", got)
		}
		return strings.TrimSpace(got.out)
	}
	blue, alsoBlue, red := submit("--label", "color=blue"), submit("--label", "color=blue", "--queue", "night"), submit("--label", "color=red")
	waiting := submit("--label", "color=red", "--require", "zone=nowhere")
	admin.running(blue)
	canceled := func(name string, want []string, args ...string) {
		t.Helper()
		eventually(t, name, func() error { // a filter finds what the index has
			finish(t, s.cli(append([]string{"cancel"}, args...)...))
			for _, id := range want {
				if j := admin.job(id); j.Status != job.Canceled && j.Cancel == nil {
					return errors.New(string(j.Status))
				}
			}
			return nil
		})
		for _, id := range want {
			if j := admin.ended(id); j.Status != job.Canceled {
				t.Errorf("%s: %s ended %s", name, id, j.Status)
			}
		}
	}
	lives := func(id string) {
		t.Helper()
		if j := admin.job(id); j.Status.Terminal() || j.Cancel != nil {
			t.Errorf("%s matched no filter and is %s", id, j.Status)
		}
	}
	canceled("by two filters", []string{alsoBlue}, "--label", "color=blue", "--queue", "night")
	lives(blue)
	canceled("by a label", []string{blue}, "--label", "color=blue")
	canceled("by a status", []string{waiting}, "--label", "color=red", "--status", "queued")
	lives(red)
	if got := finish(t, s.cli("cancel", "--label", "color=red", "--until", "1h")); got.code != 0 || got.out != "" || !strings.Contains(got.err, "No job") {
		t.Errorf("nothing is so old: %+v", got)
	}
	lives(red)
	eventually(t, "the job is printed with its status", func() error {
		got := finish(t, s.cli("cancel", "--label", "color=red", "--since", "1h"))
		if got.code != 0 {
			t.Fatalf("cancel: %+v", got)
		}
		if !strings.HasPrefix(got.out, red+" ") {
			return errors.New(got.out + got.err)
		}
		return nil
	})
	admin.ended(red)
	eventually(t, "nothing is left to cancel", func() error {
		if got := finish(t, s.cli("cancel", "--label", "color=red")); got.code != 0 || got.out != "" || !strings.Contains(got.err, "No job") {
			return errors.New(got.out + got.err)
		}
		return nil
	})
	for name, args := range map[string][]string{
		"neither ids nor filters": {"cancel"},
		"both":                    {"cancel", red, "--label", "color=red"},
		"no pair":                 {"cancel", "--label", "color"},
		"no time":                 {"cancel", "--since", "yesterday"},
		"no status":               {"cancel", "--status", "sleeping"},
	} {
		if got := finish(t, s.cli(args...)); got.code != 2 || got.out != "" {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

// TestCLIDrain takes the only worker out of service and puts it back.
func TestCLIDrain(t *testing.T) {
	s := startSystem(t, upOptions{executor: "process", slots: 1})
	var local string
	eventually(t, "the worker is listed", func() error {
		var list api.WorkerList
		got := finish(t, s.cli("workers", "-o", "json"))
		if err := json.Unmarshal([]byte(got.out), &list); err != nil {
			return err
		}
		list.Items = slices.DeleteFunc(list.Items, func(w api.Worker) bool { return w.Status == "offline" }) // of tests before
		if len(list.Items) != 1 || list.Items[0].Status != "idle" {
			return errors.New(got.out)
		}
		local = list.Items[0].WorkerID
		return nil
	})
	line := func(want string) {
		t.Helper()
		eventually(t, "workers shows "+want, func() error {
			got := finish(t, s.cli("workers"))
			for l := range strings.Lines(got.out) {
				if strings.HasPrefix(l, local+" ") && strings.Contains(l, want) {
					return nil
				}
			}
			return errors.New(got.out + got.err)
		})
	}
	if got := finish(t, s.cli("workers", "drain", local)); got.code != 0 || got.out != "" || got.err != "" {
		t.Fatalf("drain: %+v", got)
	}
	line("draining")
	if got := finish(t, s.cli("run", "--queue-timeout", "2", "--", "true")); got.code != 125 || !strings.Contains(got.err, "queue_timeout") {
		t.Errorf("a drained worker takes nothing: %+v", got)
	}
	if got := finish(t, s.cli("workers", "drain", local, "--undo")); got.code != 0 || got.out != "" {
		t.Fatalf("undo: %+v", got)
	}
	if got := finish(t, s.cli("run", "--", "echo", "back")); got.code != 0 || got.out != "back\n" {
		t.Errorf("it is back in service: %+v", got)
	}
	line("idle")
	if got := finish(t, s.cli("workers", "drain", "nobody")); got.code != 1 {
		t.Errorf("no such worker: %+v", got)
	}
	ann, err := auth.MintUser([]byte(jwtSecret), "ann", auth.RoleUser, time.Hour, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	planted.add(signature(ann))
	if got := finish(t, s.cli("--token", ann, "workers", "drain", local)); got.code == 0 {
		t.Errorf("a user that is no admin: %+v", got)
	}
	line("idle")
	s.stop()
}

// TestUpRefusesClearly: one clear line and an exit code for each thing that a
// newcomer may run into.
func TestUpRefusesClearly(t *testing.T) {
	onlyUp(t)
	s := startSystem(t, upOptions{executor: "none"})
	fresh := t.TempDir()
	blocked := filepath.Join(fresh, "a-file")
	if err := touch(blocked); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, want string
		args       []string
	}{
		{"a busy port", "in use", []string{"up", "--listen", s.addr, "--data-dir", fresh}},
		{"a data folder in use", "in use by another instance", []string{"up", "--listen", freeAddr(t), "--data-dir", filepath.Join(s.dir, "data")}},
		{"an unwritable folder", "cannot be written", []string{"up", "--listen", freeAddr(t), "--data-dir", filepath.Join(blocked, "below")}},
		{"an unknown executor", "--executor", []string{"up", "--listen", freeAddr(t), "--data-dir", fresh, "--executor", "magic"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := finish(t, s.cli(c.args...))
			if got.code == 0 || !strings.Contains(got.err, c.want) || strings.Count(strings.TrimSpace(got.err), "\n") > 0 {
				t.Errorf("exit code %d, stderr %q", got.code, got.err)
			}
		})
	}
}

// TestSampleAndRestart is what `make run` shows a newcomer, twice.
func TestSampleAndRestart(t *testing.T) {
	onlyUp(t)
	s := startSystem(t, upOptions{executor: "auto", env: []string{"SAMPLE=true"}})
	shows := func(text string) {
		t.Helper()
		eventually(t, "up prints "+text, func() error {
			if out := s.form.(*allInOne).up.out.String(); !strings.Contains(out, text) {
				return errors.New(out)
			}
			return nil
		})
	}
	shows("listens on http://" + s.addr)
	shows("runs process jobs")
	shows("cmdexec run -- echo hello")
	shows("| Hello from job job-")
	shows("succeeded after")
	s.stop()
	if !strings.Contains(s.form.(*allInOne).up.out.String(), "Stopped") {
		t.Errorf("no word at the end:\n%s", s.form.(*allInOne).up.out)
	}
	s.start()
	eventually(t, "the earlier job is found", func() error {
		if got := finish(t, s.cli("list")).out; !strings.Contains(got, "sample") {
			return errors.New(got)
		}
		return nil
	})
	s.stop()
}
