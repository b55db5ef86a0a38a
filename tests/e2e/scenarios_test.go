package e2e

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
)

// small is what scenario jobs reserve, so that many fit the machine.
var small = map[string]any{"cpu": 0.05, "memoryMb": 32}

func shell(command string) map[string]any {
	return map[string]any{"command": command, "resources": small}
}

func with(fields map[string]any, more map[string]any) map[string]any {
	out := map[string]any{}
	for _, m := range []map[string]any{fields, more} {
		for k, v := range m {
			out[k] = v
		}
	}
	return out
}

// TestOneInstance has the scenarios that can share a running system.
func TestOneInstance(t *testing.T) {
	s := startSystem(t, upOptions{executor: "process", slots: 8})
	ann := s.user("ann")

	t.Run("stdout and stderr apart", func(t *testing.T) {
		j := ann.ended(ann.submit(shell("echo out; echo err >&2; echo more")).JobID)
		if j.Status != job.Succeeded || j.ExitCode == nil || *j.ExitCode != 0 {
			t.Fatalf("ended %s %s", j.Status, j.Reason)
		}
		if out, err := ann.output(j.JobID, "stdout"), ann.output(j.JobID, "stderr"); out != "out\nmore\n" || err != "err\n" {
			t.Errorf("stdout %q, stderr %q", out, err)
		}
		if j.Logs == nil || !j.Logs.Complete || j.Logs.Bytes != 13 {
			t.Errorf("declared %+v", j.Logs)
		}
		if j.StartedAt == nil || j.FinishedAt == nil || j.WorkerID == "" || len(j.Attempts) != 1 {
			t.Errorf("record lacks what happened: %+v", j)
		}
	})

	t.Run("argv goes through no shell, shell text does", func(t *testing.T) {
		argv := ann.ended(ann.submit(map[string]any{"command": []string{"echo", "$HOME", "a b", "*"}, "resources": small}).JobID)
		if got := ann.output(argv.JobID, "stdout"); got != "$HOME a b *\n" {
			t.Errorf("argv printed %q", got)
		}
		text := ann.ended(ann.submit(shell("echo $((6*7)) | tr 4 5")).JobID)
		if got := ann.output(text.JobID, "stdout"); got != "52\n" {
			t.Errorf("shell printed %q", got)
		}
	})

	t.Run("inputs", func(t *testing.T) {
		j := ann.ended(ann.submit(with(shell(`cat; cat dir/a.txt; echo "$GREETING"; ls -l run.sh | cut -c1-10; ./run.sh`), map[string]any{
			"stdin": "from stdin\n", "env": map[string]string{"GREETING": "hi there"},
			"files": []map[string]any{
				{"path": "dir/a.txt", "content": "from file\n"},
				{"path": "run.sh", "content": "#!/bin/sh\necho ran\n", "mode": "0755"},
			},
		})).JobID)
		if got := ann.output(j.JobID, "stdout"); got != "from stdin\nfrom file\nhi there\n-rwxr-xr-x\nran\n" {
			t.Errorf("printed %q (%s)", got, j.Reason)
		}
	})

	t.Run("exit code 7", func(t *testing.T) {
		j := ann.ended(ann.submit(shell("exit 7")).JobID)
		if j.Status != job.Failed || j.ExitCode == nil || *j.ExitCode != 7 || j.Reason != job.ReasonExitCode || j.ReasonClass != job.ClassUser {
			t.Errorf("ended %s, code %v, %s", j.Status, j.ExitCode, j.Reason)
		}
	})

	t.Run("retry until it works", func(t *testing.T) {
		mark := t.TempDir() + "/tried"
		j := ann.ended(ann.submit(with(shell("test -e "+mark+" && echo second && exit 0; touch "+mark+"; echo first; exit 1"), map[string]any{
			"retry": map[string]any{"maxAttempts": 3, "backoffSeconds": 0},
		})).JobID)
		if j.Status != job.Succeeded || j.Attempt != 2 || len(j.Attempts) != 2 || j.Attempts[0].Outcome != job.OutcomeFailed {
			t.Errorf("ended %s at attempt %d: %+v", j.Status, j.Attempt, j.Attempts)
		}
		if got := ann.output(j.JobID, "stdout"); got != "second\n" {
			t.Errorf("the newest attempt printed %q", got)
		}
	})

	t.Run("a timeout kills what ignores SIGTERM", func(t *testing.T) {
		j := ann.ended(ann.submit(with(shell("trap '' TERM; echo ready; while :; do sleep 0.1; done"), map[string]any{
			"timeout": 1, "stop": map[string]any{"graceSeconds": 1},
		})).JobID)
		if j.Status != job.TimedOut || j.Reason != job.ReasonExecutionTimeout {
			t.Errorf("ended %s %s", j.Status, j.Reason)
		}
		if left := alive(t, j.JobID); len(left) > 0 {
			t.Errorf("processes %v are left", left)
		}
	})

	t.Run("cancel while running leaves nothing alive", func(t *testing.T) {
		j := ann.submit(with(shell(`trap '' TERM; setsid sh -c 'trap "" TERM; while :; do sleep 0.2; done' & echo up; while :; do sleep 0.1; done`),
			map[string]any{"stop": map[string]any{"graceSeconds": 1}}))
		ann.running(j.JobID)
		if len(alive(t, j.JobID)) < 2 {
			t.Fatal("the job's processes cannot be seen, so nothing could be shown")
		}
		ann.cancel(j.JobID)
		ann.cancel(j.JobID) // idempotent
		done := ann.ended(j.JobID)
		if done.Status != job.Canceled {
			t.Fatalf("ended %s %s", done.Status, done.Reason)
		}
		c := done.Cancel
		if c == nil || c.DeliveredAt == nil || c.SignalledAt == nil || c.ExitedAt == nil || c.GoneAt == nil || c.StopUnconfirmed {
			t.Errorf("receipt is %+v", c)
		}
		if left := alive(t, j.JobID); len(left) > 0 {
			t.Errorf("processes %v are left", left)
		}
	})

	t.Run("cancel while queued", func(t *testing.T) {
		j := ann.submit(with(shell("true"), map[string]any{"constraints": map[string]any{"labels": map[string]string{"zone": "nowhere"}}}))
		if got := ann.cancel(j.JobID); got.Status != job.Canceled {
			t.Errorf("is %s at once", got.Status)
		}
		if got := ann.ended(j.JobID); got.StartedAt != nil || got.Attempt != 0 {
			t.Errorf("a job that was canceled while queued has attempt %d", got.Attempt)
		}
	})

	t.Run("no fitting worker: stays queued and says why", func(t *testing.T) {
		for _, c := range []struct {
			fields map[string]any
			reason string
		}{
			{map[string]any{"constraints": map[string]any{"labels": map[string]string{"zone": "nowhere"}}}, "labels_differ"},
			{map[string]any{"containerImage": "busybox"}, "no_executor"},
			{map[string]any{"resources": map[string]any{"cpu": 900.0}}, "too_big"},
		} {
			j := ann.submit(with(shell("true"), c.fields))
			var ex api.Explain
			eventually(t, "explain names "+c.reason, func() error {
				if err := ann.get("/api/jobs/"+j.JobID+"/explain", &ex); err != nil {
					return err
				}
				if !slices.ContainsFunc(ex.BlockedBy, func(b api.BlockReason) bool { return string(b.Reason) == c.reason && b.Workers >= 1 }) {
					return fmt.Errorf("blocked by %+v", ex.BlockedBy)
				}
				return nil
			})
			if ex.Status != job.Queued || ex.Summary == "" {
				t.Errorf("%s: %+v", c.reason, ex)
			}
			ann.cancel(j.JobID)
		}
	})

	t.Run("expires when nobody takes it in time", func(t *testing.T) {
		j := ann.ended(ann.submit(with(shell("true"), map[string]any{
			"constraints": map[string]any{"labels": map[string]string{"zone": "nowhere"}}, "timeouts": map[string]any{"queue": 1},
		})).JobID)
		if j.Status != job.Expired || j.Reason != job.ReasonQueueTimeout {
			t.Errorf("ended %s %s", j.Status, j.Reason)
		}
	})

	t.Run("others do not see a job, admins do", func(t *testing.T) {
		j := ann.ended(ann.submit(shell("echo secret of ann")).JobID)
		bob, admin := s.user("bob"), s.as("root", auth.RoleAdmin)
		for _, path := range []string{"/api/jobs/" + j.JobID, "/api/jobs/status?jobId=" + j.JobID, "/api/jobs/" + j.JobID + "/logs", "/api/jobs/" + j.JobID + "/explain"} {
			if code, _ := bob.call(http.MethodGet, path, nil, &struct{}{}, nil); code != http.StatusNotFound {
				t.Errorf("%s: bob gets %d", path, code)
			}
			if code, err := admin.call(http.MethodGet, path, nil, &map[string]any{}, nil); code != http.StatusOK {
				t.Errorf("%s: an admin gets %d %v", path, code, err)
			}
		}
		if code, _ := bob.call(http.MethodPost, "/api/jobs/cancel", api.CancelRequest{JobID: j.JobID}, &struct{}{}, nil); code != http.StatusNotFound {
			t.Errorf("cancel: bob gets %d", code)
		}
		var list api.JobList
		if err := bob.get("/api/jobs", &list); err != nil || len(list.Items) > 0 {
			t.Errorf("bob lists %d jobs, %v", len(list.Items), err)
		}
		nobody := &user{t: t, url: bob.url, token: "x"}
		if code, _ := nobody.call(http.MethodGet, "/api/jobs", nil, &struct{}{}, nil); code != http.StatusUnauthorized {
			t.Errorf("nobody gets %d", code)
		}
	})

	t.Run("list", func(t *testing.T) {
		cat := s.user("cat")
		var want []string
		for i := range 5 {
			j := cat.submit(with(shell("sleep 0.02"), map[string]any{"labels": map[string]string{"batch": "b1", "n": fmt.Sprint(i)}}))
			want = append(want, j.JobID)
		}
		ran := map[string]int64{}
		for _, id := range want {
			ran[id] = cat.ended(id).DurationMs
		}
		eventually(t, "all are listed as succeeded, in pages, newest first", func() error {
			var got []string
			query := url.Values{"status": {"succeeded"}, "label": {"batch:b1"}, "limit": {"2"}}
			for {
				var page api.JobList
				if err := cat.get("/api/jobs?"+query.Encode(), &page); err != nil {
					return err
				}
				for _, j := range page.Items {
					got = append(got, j.JobID)
					if j.DurationMs < 20 || j.DurationMs != ran[j.JobID] {
						return fmt.Errorf("%s is listed with %d ms and ran %d ms", j.JobID, j.DurationMs, ran[j.JobID])
					}
				}
				if page.NextCursor == "" {
					break
				}
				query.Set("cursor", page.NextCursor)
			}
			slices.Reverse(got)
			if !slices.Equal(got, want) {
				return fmt.Errorf("listed %v, want %v", got, want)
			}
			return nil
		})
	})

	t.Run("execute answers with the output", func(t *testing.T) {
		var r api.ExecuteResult
		if _, err := ann.call(http.MethodPost, "/api/execute", shell("echo o; echo e >&2; exit 4"), &r, nil); err != nil {
			t.Fatal(err)
		}
		if r.Status != job.Failed || r.ExitCode == nil || *r.ExitCode != 4 || r.Stdout != "o\n" || r.Stderr != "e\n" {
			t.Errorf("got %+v", r)
		}
	})

	t.Run("a user error is told apart", func(t *testing.T) {
		for field, body := range map[string]any{
			"command": map[string]any{"command": ""},
			"timeout": with(shell("true"), map[string]any{"timeout": -1}),
			"webhook": with(shell("true"), map[string]any{"webhook": map[string]any{"url": "http://x"}}),
			"nosuch":  with(shell("true"), map[string]any{"nosuch": 1}),
			"network": with(shell("true"), map[string]any{"network": "bridge"}),
		} {
			code, err := ann.call(http.MethodPost, "/api/jobs/create", body, &struct{}{}, nil)
			if code != http.StatusUnprocessableEntity || !strings.Contains(fmt.Sprintf("%+v", problemOf(err)), field) {
				t.Errorf("%s: %d %+v", field, code, problemOf(err))
			}
		}
		if code, _ := ann.call(http.MethodPost, "/api/jobs/create", `{"command":"true","command":"false"}`, &struct{}{}, nil); code != http.StatusBadRequest {
			t.Errorf("a duplicate key: %d", code)
		}
	})
}

func problemOf(err error) api.Problem {
	if s, ok := err.(*status); ok {
		return s.problem
	}
	return api.Problem{Detail: fmt.Sprint(err)}
}

// TestPriorityAndFairness fills one slot and looks at the order in which the
// waiting jobs start.
func TestPriorityAndFairness(t *testing.T) {
	s := startSystem(t, upOptions{executor: "process", slots: 1})
	ann, bob := s.user("ann"), s.user("bob")
	gate := t.TempDir() + "/go"
	blocker := ann.submit(shell("while ! test -e " + gate + "; do sleep 0.05; done"))
	ann.running(blocker.JobID)

	order := t.TempDir() + "/order"
	note := func(u *user, name string, priority int) string {
		return u.submit(with(shell("echo "+name+" >> "+order), map[string]any{"priority": priority})).JobID
	}
	var ids []string
	for i := range 4 {
		ids = append(ids, note(ann, fmt.Sprintf("ann-%d", i), 50))
	}
	ids = append(ids, note(bob, "bob-0", 50), note(bob, "bob-1", 50), note(ann, "urgent", 90), note(ann, "whenever", 10))
	if err := touch(gate); err != nil {
		t.Fatal(err)
	}
	for _, id := range ids {
		s.as("root", auth.RoleAdmin).ended(id)
	}
	got := strings.Fields(read(t, order))
	if got[0] != "urgent" || got[len(got)-1] != "whenever" {
		t.Errorf("priorities are not kept: %v", got)
	}
	if i := slices.Index(got, "bob-1"); i > 5 {
		t.Errorf("bob, who came later with two jobs, waited for all of ann's: %v", got)
	}
	if a, b := slices.Index(got, "ann-0"), slices.Index(got, "ann-3"); a > b {
		t.Errorf("one owner's jobs are not in order: %v", got)
	}
}

// TestTwoWorkersShare has a second worker as a process of its own.
func TestTwoWorkersShare(t *testing.T) {
	s := startSystem(t, upOptions{executor: "process", slots: 4})
	s.addWorker("second", "SLOTS=4")
	ann := s.user("ann")
	log := newJournal(t)
	var ids []string
	for range 200 {
		ids = append(ids, ann.submit(shell(log.command("sleep 0.05"))).JobID)
	}
	by := map[string]int{}
	for _, id := range ids {
		j := ann.ended(id)
		if j.Status != job.Succeeded {
			t.Fatalf("%s ended %s %s", id, j.Status, j.Reason)
		}
		by[j.WorkerID]++
		if n := log.starts(t, id); n != 1 {
			t.Errorf("%s started %d times", id, n)
		}
	}
	if len(by) != 2 || by["second"] < 40 || by["second"] > 160 {
		t.Errorf("shared as %v", by)
	}
}

// TestWorkerDies kills a worker in the middle of a job; another takes it over
// when the first comes back without it.
func TestWorkerDies(t *testing.T) {
	s := startSystem(t, upOptions{executor: "none"})
	first := s.addWorker("first")
	ann := s.user("ann")
	log := newJournal(t)
	j := ann.submit(shell(log.command("sleep 300 & test -e " + log.dir + "/again && exit 0; wait")))
	ann.running(j.JobID)
	eventually(t, "the start is noted", func() error {
		if log.starts(t, j.JobID) == 0 {
			return errors.New("not yet")
		}
		return nil
	})
	first.kill()
	if err := touch(log.dir + "/again"); err != nil {
		t.Fatal(err)
	}
	s.addWorker("first")
	done := ann.ended(j.JobID)
	if done.Status != job.Succeeded || done.Attempt != 2 || done.Attempts[0].Outcome != job.OutcomeLost {
		t.Errorf("ended %s at attempt %d", done.Status, done.Attempt)
	}
	if n := log.starts(t, j.JobID); n != 2 {
		t.Errorf("started %d times", n)
	}
	eventually(t, "nothing of the first attempt is left", func() error {
		if left := alive(t, j.JobID); len(left) > 0 {
			return fmt.Errorf("processes %v", left)
		}
		return nil
	})
}
