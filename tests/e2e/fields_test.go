package e2e

import (
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/job"
)

// fieldTest shows that one field of a job is honoured.
type fieldTest func(t *testing.T, s *system, ann *user)

// elsewhere names the test that shows it.
func elsewhere(name string) fieldTest {
	return func(t *testing.T, _ *system, _ *user) { t.Log("shown by " + name) }
}

// processFields has the fields that mean the same for processes and containers.
var processFields = map[string]fieldTest{
	"command": elsewhere("TestOneInstance, argv and shell"),
	"name": func(t *testing.T, _ *system, ann *user) {
		if j := ann.submit(with(shell("true"), map[string]any{"name": "nightly build"})); j.Name != "nightly build" || ann.job(j.JobID).Name != j.Name {
			t.Errorf("the name is %q", j.Name)
		}
	},
	"labels": elsewhere("TestOneInstance, list"),
	"queue": func(t *testing.T, _ *system, ann *user) {
		j := ann.ended(ann.submit(with(shell("true"), map[string]any{"queue": "slow"})).JobID)
		eventually(t, "it is listed by its queue, alone", func() error {
			var list api.JobList
			if err := ann.get("/api/jobs?queue=slow", &list); err != nil {
				return err
			}
			if len(list.Items) != 1 || list.Items[0].JobID != j.JobID {
				return fmt.Errorf("%d jobs", len(list.Items))
			}
			return nil
		})
	},
	"priority":      elsewhere("TestPriorityAndFairness"),
	"env":           elsewhere("TestOneInstance, inputs"),
	"stdin":         elsewhere("TestOneInstance, inputs"),
	"files.path":    elsewhere("TestOneInstance, inputs"),
	"files.content": elsewhere("TestOneInstance, inputs"),
	"files.mode":    elsewhere("TestOneInstance, inputs"),
	"workingDir": func(t *testing.T, _ *system, ann *user) {
		j := ann.ended(ann.submit(with(shell("pwd"), map[string]any{"workingDir": "a/b"})).JobID)
		if got := ann.output(j.JobID, "stdout"); !strings.HasSuffix(got, "/a/b\n") {
			t.Errorf("it ran in %q (%s %s)", got, j.Reason, j.Message)
		}
	},
	"timeout": elsewhere("TestOneInstance, a timeout kills what ignores SIGTERM"),
	"timeouts.queue": func(t *testing.T, _ *system, ann *user) {
		j := ann.ended(ann.submit(with(nowhere(), map[string]any{"timeouts": map[string]any{"queue": 1}})).JobID)
		if j.Status != job.Expired || j.Reason != job.ReasonQueueTimeout {
			t.Errorf("ended %s %s", j.Status, j.Reason)
		}
	},
	"timeouts.total": func(t *testing.T, _ *system, ann *user) {
		j := ann.ended(ann.submit(with(shell("sleep 1; exit 1"), map[string]any{
			"timeouts": map[string]any{"total": 3}, "retry": map[string]any{"maxAttempts": 50, "backoffSeconds": 0},
		})).JobID)
		if took := j.FinishedAt.Sub(j.CreatedAt); j.Reason != job.ReasonTotalTimeout || j.ReasonClass != job.ClassPolicy || took < 3*time.Second {
			t.Errorf("ended %s %s after %v", j.Status, j.Reason, took)
		}
	},
	"stop.signal": func(t *testing.T, _ *system, ann *user) {
		j := ann.submit(with(shell("trap 'echo asked; exit 0' USR1; echo ready; while :; do sleep 0.1; done"), map[string]any{"stop": map[string]any{"signal": "SIGUSR1"}}))
		ann.printed(j.JobID, "ready\n")
		ann.cancel(j.JobID)
		if done := ann.ended(j.JobID); done.Status != job.Canceled || ann.output(j.JobID, "stdout") != "ready\nasked\n" {
			t.Errorf("ended %s, printed %q", done.Status, ann.output(j.JobID, "stdout"))
		}
	},
	"stop.graceSeconds": func(t *testing.T, _ *system, ann *user) {
		j := ann.submit(with(shell("trap '' TERM; echo ready; while :; do sleep 0.1; done"), map[string]any{"stop": map[string]any{"graceSeconds": 2}}))
		ann.printed(j.JobID, "ready\n")
		ann.cancel(j.JobID)
		c := ann.ended(j.JobID).Cancel
		if c == nil || c.SignalledAt == nil || c.ExitedAt == nil {
			t.Fatalf("receipt is %+v", c)
		}
		if grace := c.ExitedAt.Sub(*c.SignalledAt); grace < 1900*time.Millisecond {
			t.Errorf("killed %v after the signal", grace)
		}
	},
	"logMaxBytes": func(t *testing.T, _ *system, ann *user) {
		j := ann.ended(ann.submit(with(shell("head -c 100000 /dev/zero | tr '\\0' x"), map[string]any{"logMaxBytes": 2048})).JobID)
		if j.Logs == nil || j.Logs.Complete || j.Logs.TruncatedBytes < 100_000-2048 {
			t.Errorf("declared %+v", j.Logs)
		}
	},
	"retry.maxAttempts": func(t *testing.T, _ *system, ann *user) {
		j := ann.ended(ann.submit(with(shell("exit 1"), map[string]any{"retry": map[string]any{"maxAttempts": 3, "backoffSeconds": 0}})).JobID)
		if j.Status != job.Failed || j.Attempt != 3 {
			t.Errorf("ended %s at attempt %d", j.Status, j.Attempt)
		}
	},
	"retry.backoffSeconds": func(t *testing.T, _ *system, ann *user) {
		j := ann.ended(ann.submit(with(shell("exit 1"), map[string]any{"retry": map[string]any{"maxAttempts": 2, "backoffSeconds": 2}})).JobID)
		if pause := betweenAttempts(t, j); pause < time.Second { // of 2 s, with jitter
			t.Errorf("tried again after %v", pause)
		}
	},
	"retry.maxBackoffSeconds": func(t *testing.T, _ *system, ann *user) {
		j := ann.ended(ann.submit(with(shell("exit 1"), map[string]any{"retry": map[string]any{"maxAttempts": 2, "backoffSeconds": 3600, "maxBackoffSeconds": 1}})).JobID)
		betweenAttempts(t, j) // within the patience of ended
	},
	"retry.onExitCodes": func(t *testing.T, _ *system, ann *user) {
		retry := map[string]any{"retry": map[string]any{"maxAttempts": 2, "backoffSeconds": 0, "onExitCodes": []int{3}}}
		if j := ann.ended(ann.submit(with(shell("exit 4"), retry)).JobID); j.Attempt != 1 {
			t.Errorf("exit code 4 was tried %d times", j.Attempt)
		}
		if j := ann.ended(ann.submit(with(shell("exit 3"), retry)).JobID); j.Attempt != 2 {
			t.Errorf("exit code 3 was tried %d times", j.Attempt)
		}
	},
	"onWorkerLost": func(t *testing.T, s *system, ann *user) {
		mortal := s.addWorker("mortal", "WORKER_LABELS=fate:mortal")
		j := ann.submit(with(shell("sleep 300"), map[string]any{
			"onWorkerLost": "fail", "constraints": map[string]any{"labels": map[string]string{"fate": "mortal"}},
		}))
		ann.running(j.JobID)
		mortal.kill()
		s.addWorker("mortal", "WORKER_LABELS=fate:mortal")
		if done := ann.ended(j.JobID); done.Status != job.Failed || done.Reason != job.ReasonWorkerLost || done.Attempt != 1 {
			t.Errorf("ended %s %s at attempt %d", done.Status, done.Reason, done.Attempt)
		}
	},
	"constraints.os":     blockedBy("os_differs", map[string]any{"os": "plan9"}),
	"constraints.arch":   blockedBy("arch_differs", map[string]any{"arch": "mips"}),
	"constraints.labels": blockedBy("labels_differ", map[string]any{"labels": map[string]string{"zone": "nowhere"}}),
	"resources.cpu":      elsewhere("TestFieldsOfContainers and TestOneInstance, no fitting worker"),
	"resources.memoryMb": elsewhere("TestFieldsOfContainers"),
	"resources.pids":     elsewhere("TestFieldsOfContainers"),
}

// containerFields has those that only containers have, or that an engine enforces.
var containerFields = map[string]fieldTest{
	"containerImage": elsewhere("TestContainers"),
	"user": func(t *testing.T, _ *system, ann *user) {
		if got := ann.inContainer("id -u; id -g", map[string]any{"user": "1234:99"}); got != "1234\n99\n" {
			t.Errorf("it ran as %q", got)
		}
	},
	"network": func(t *testing.T, _ *system, ann *user) {
		if got := ann.inContainer("ls /sys/class/net", nil); got != "lo\n" {
			t.Errorf("none has %q", got)
		}
		wants := map[string]any{"command": "ls /sys/class/net", "containerImage": testImage, "resources": small, "network": "bridge", "retry": map[string]any{"backoffSeconds": 0}}
		j := ann.ended(ann.submit(wants).JobID)
		if strings.Contains(j.Message, "has none to give") {
			t.Skip("requires network: the engine has no bridge, and the job was not run without")
		}
		if got := ann.output(j.JobID, "stdout"); !strings.Contains(got, "eth0") {
			t.Errorf("bridge has %q (%s %s %s)", got, j.Status, j.Reason, j.Message)
		}
	},
	"pullPolicy": elsewhere("TestContainers, an image that cannot be had"),
	"timeouts.prepare": func(t *testing.T, _ *system, ann *user) {
		ln, err := net.Listen("tcp", "127.0.0.1:0") // a registry that accepts and never answers
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		j := ann.submit(map[string]any{
			"command": "true", "containerImage": ln.Addr().String() + "/image:1", "resources": small,
			"timeouts": map[string]any{"prepare": 1}, "retry": map[string]any{"backoffSeconds": 0},
		})
		got := ann.reaches(j.JobID, func(j api.Job) bool { return len(j.Attempts) > 0 && j.Attempts[0].Outcome != "" }, "has given up its first pull")
		if a := got.Attempts[0]; a.Reason != job.ReasonPrepareTimeout && a.Reason != job.ReasonImagePullFailed {
			t.Errorf("ended %s %s", a.Outcome, a.Reason)
		}
		ann.cancel(j.JobID)
	},
	"resources.cpu":      limit("1.5 cores", "cpu", 1.5, "cat cpu.max || cat cpu/cpu.cfs_quota_us", "150000"),
	"resources.memoryMb": limit("40 MiB", "memoryMb", 40, "cat memory.max || cat memory/memory.limit_in_bytes", fmt.Sprint(40<<20)),
	"resources.pids":     limit("33 processes", "pids", 33, "cat pids.max || cat pids/pids.max", "34\n"), // and the init process
	"resources.tmpfsMb":  limit("7 MiB", "tmpfsMb", 7, "df -k /tmp | tail -n 1", " 7168 "),
}

// refusedFields are reserved.
var refusedFields = map[string]any{
	"secretEnv":      map[string]any{"TOKEN": "x"},
	"webhook.url":    map[string]any{"url": "https://example.com"},
	"webhook.events": map[string]any{"url": "https://example.com", "events": []string{"ended"}},
}

// TestEveryFieldIsShown: a field that a job has and no test below has fails here.
func TestEveryFieldIsShown(t *testing.T) {
	have := leaves(reflect.TypeFor[job.Spec](), "")
	shown := map[string]bool{}
	for name := range processFields {
		shown[name] = true
	}
	for name := range containerFields {
		shown[name] = true
	}
	for name := range refusedFields {
		shown[name] = true
	}
	if got, want := slices.Sorted(maps.Keys(shown)), slices.Sorted(slices.Values(have)); !slices.Equal(got, want) {
		t.Errorf("tested are %v\na job has %v", got, want)
	}
}

// leaves lists the JSON paths of a struct's fields.
func leaves(typ reflect.Type, prefix string) []string {
	var out []string
	for _, f := range reflect.VisibleFields(typ) {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		sub := f.Type
		for sub.Kind() == reflect.Pointer || sub.Kind() == reflect.Slice {
			sub = sub.Elem()
		}
		if sub.Kind() == reflect.Struct && sub != reflect.TypeFor[job.Command]() {
			out = append(out, leaves(sub, prefix+name+".")...)
		} else {
			out = append(out, prefix+name)
		}
	}
	return out
}

// TestFieldsOfProcesses shows every field that process jobs have.
func TestFieldsOfProcesses(t *testing.T) {
	s := startSystem(t, upOptions{executor: "process", slots: 8})
	ann := s.user("ann")
	for _, name := range slices.Sorted(maps.Keys(processFields)) {
		t.Run(name, func(t *testing.T) { processFields[name](t, s, ann) })
	}
	for name, value := range refusedFields {
		t.Run(name, func(t *testing.T) {
			field, _, _ := strings.Cut(name, ".")
			code, err := ann.call(http.MethodPost, "/api/jobs/create", with(shell("true"), map[string]any{field: value}), &struct{}{}, nil)
			p := problemOf(err)
			if code != http.StatusUnprocessableEntity || !slices.ContainsFunc(p.Errors, func(e job.FieldError) bool { return e.Field == field && e.Code == "unsupported_field" }) {
				t.Errorf("%d %+v", code, p)
			}
		})
	}
}

// TestFieldsOfContainers shows what only containers have.
func TestFieldsOfContainers(t *testing.T) {
	host := needDocker(t)
	s := startSystem(t, upOptions{executor: "docker", slots: 4, env: []string{"DOCKER_HOST=" + host, "ALLOW_NETWORK=true"}})
	ann := s.user("ann")
	for _, name := range slices.Sorted(maps.Keys(containerFields)) {
		t.Run(name, func(t *testing.T) { containerFields[name](t, s, ann) })
	}
}

// nowhere is a job that no worker fits.
func nowhere() map[string]any {
	return with(shell("true"), map[string]any{"constraints": map[string]any{"labels": map[string]string{"zone": "nowhere"}}})
}

// blockedBy shows that a constraint keeps every worker from the job.
func blockedBy(reason string, constraints map[string]any) fieldTest {
	return func(t *testing.T, _ *system, ann *user) {
		j := ann.submit(with(shell("true"), map[string]any{"constraints": constraints}))
		defer ann.cancel(j.JobID)
		eventually(t, "explain says "+reason, func() error {
			var ex api.Explain
			if err := ann.get("/api/jobs/"+url.PathEscape(j.JobID)+"/explain", &ex); err != nil {
				return err
			}
			if !slices.ContainsFunc(ex.BlockedBy, func(b api.BlockReason) bool { return string(b.Reason) == reason }) {
				return fmt.Errorf("blocked by %+v", ex.BlockedBy)
			}
			return nil
		})
	}
}

// limit shows that the kernel holds a container to a limit.
func limit(what, field string, value any, look, want string) fieldTest {
	return func(t *testing.T, _ *system, ann *user) {
		got := ann.inContainer("cd /sys/fs/cgroup; { "+look+"; } 2>/dev/null", map[string]any{"resources": with(small, map[string]any{field: value})})
		if !strings.Contains(got, want) {
			t.Errorf("%s: the container has %q", what, got)
		}
	}
}

// betweenAttempts is how long a job waited before its second attempt.
func betweenAttempts(t *testing.T, j api.Job) time.Duration {
	t.Helper()
	if len(j.Attempts) != 2 {
		t.Fatalf("%d attempts", len(j.Attempts))
	}
	return j.Attempts[1].AssignedAt.Sub(*j.Attempts[0].FinishedAt)
}

// inContainer runs a command in a container and returns what it printed.
func (u *user) inContainer(command string, more map[string]any) string {
	u.t.Helper()
	j := u.ended(u.submit(with(map[string]any{"command": command, "containerImage": testImage, "resources": small}, more)).JobID)
	if j.Status != job.Succeeded {
		u.t.Errorf("%q ended %s %s %s: %s", command, j.Status, j.Reason, j.Message, u.output(j.JobID, "stderr"))
	}
	return u.output(j.JobID, "stdout")
}

// printed waits until a job that runs has printed this much.
func (u *user) printed(id, text string) {
	u.t.Helper()
	eventually(u.t, "job "+id+" printed "+text, func() error {
		var page api.Logs
		if err := u.get("/api/jobs/"+id+"/logs", &page); err != nil {
			return err
		}
		var got strings.Builder
		for _, item := range page.Items {
			got.WriteString(item.Data)
		}
		if !strings.Contains(got.String(), text) {
			return fmt.Errorf("it printed %q", got.String())
		}
		return nil
	})
}
