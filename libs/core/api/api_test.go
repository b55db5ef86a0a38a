package api

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/job"
)

var update = flag.Bool("update", false, "write the golden files anew")

var t0 = time.Date(2026, 1, 2, 3, 4, 5, 678e6, time.UTC)

// rich is a record that was lost once, ran, and was canceled, with something in
// every field that the API shows.
func rich(t *testing.T) job.Record {
	t.Helper()
	spec, errs := job.Normalise(job.Spec{
		Name: "nightly", Command: job.Command{Argv: []string{"sh", "-c", "echo <&>"}}, ContainerImage: "ghcr.io/a/b:1", Timeout: 60,
		Labels: map[string]string{"team": "x"}, Env: map[string]string{"A": "1"}, WorkingDir: "/work", User: "1000", Stdin: "in\n",
		Files: []job.File{{Path: "a/b", Content: "c"}}, Constraints: job.Constraints{OS: "linux", Labels: map[string]string{"gpu": "no"}},
		Retry: job.Retry{MaxAttempts: 3, OnExitCodes: []int{75}}, Timeouts: job.Timeouts{Queue: 5, Total: 7},
	})
	if len(errs) > 0 {
		t.Fatal(errs)
	}
	r := job.New("job-01k00000000000000000000000", "ann", spec, t0).WithIdempotency()
	r.RerunOf = "job-01jzzzzzzzzzzzzzzzzzzzzzzz"
	at := t0
	step := func(e job.Event) {
		t.Helper()
		at = at.Add(10 * time.Second)
		next, err := job.Apply(r, e, at)
		if err != nil {
			t.Fatal(err)
		}
		r = next
	}
	code := 137
	step(job.Assign{WorkerID: "worker-1", LeaseID: "lease-secret-1"})
	step(job.Lost{Fence: r.Fence()})
	step(job.Requeue{})
	step(job.Assign{WorkerID: "worker-2", LeaseID: "lease-secret-2"})
	step(job.Prepare{Fence: r.Fence(), AcceptedAt: at})
	step(job.Start{Fence: r.Fence(), AcceptedAt: at, PreparedAt: at, StartedAt: at})
	step(job.CancelRequest{})
	asked := at
	step(job.Result{
		Fence: r.Fence(), WorkerID: "worker-2", Outcome: job.OutcomeCanceled, Message: "stopped", ExitCode: &code, Signal: "SIGKILL", OOMKilled: true,
		StartedAt: asked, FinishedAt: asked.Add(1500 * time.Millisecond), ImageDigest: "sha256:00", PeakMemoryMB: 63, CPUMs: 990, Warm: true,
		Stop:     &job.Cancel{DeliveredAt: asked.Add(time.Second), SignalledAt: asked.Add(time.Second), ExitedAt: asked.Add(2 * time.Second), GoneAt: asked.Add(3 * time.Second)},
		Manifest: &job.Manifest{Chunks: 8, Bytes: 4107, SHA256: "ab", TruncatedBytes: 5},
	})
	return r
}

func golden(t *testing.T, file string, v any) {
	t.Helper()
	got, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	got = append(got, '\n')
	path := filepath.Join("testdata", file)
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s: users see something else\n got %s\nwant %s", file, got, want)
	}
}

func TestGoldenJobs(t *testing.T) {
	r := rich(t)
	golden(t, "job.json", FromRecord(&r))
	golden(t, "job-summary.json", Summary(&r))

	spec, _ := job.Normalise(job.Spec{Command: job.Command{Shell: "true"}})
	fresh := job.New("job-01k00000000000000000000000", "ann", spec, t0)
	golden(t, "job-fresh.json", FromRecord(&fresh))

	waiting, err := job.Apply(fresh, job.Assign{WorkerID: "worker-1", LeaseID: "lease-secret-1"}, t0)
	if err != nil {
		t.Fatal(err)
	}
	if waiting, err = job.Apply(waiting, job.Lost{Fence: waiting.Fence()}, t0.Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	golden(t, "job-retrying.json", FromRecord(&waiting))
}

func TestLeasesStayBehind(t *testing.T) {
	r := rich(t)
	if len(r.Attempts) != 2 || r.LeaseID == "" || r.Attempts[0].LeaseID == "" {
		t.Fatal("the record has no leases to hide")
	}
	for _, v := range []any{FromRecord(&r), Summary(&r)} {
		data, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		if s := strings.ToLower(string(data)); strings.Contains(s, "lease") || strings.Contains(s, "secret") || strings.Contains(s, r.SpecHash) {
			t.Errorf("what users must not see is in %s", data)
		}
	}
}

func TestSummaryLeavesOut(t *testing.T) {
	r := rich(t)
	s := Summary(&r)
	if s.Attempts != nil || s.Files != nil || s.Stdin != "" {
		t.Errorf("a list entry has %d attempts, %d files, stdin %q", len(s.Attempts), len(s.Files), s.Stdin)
	}
	if len(r.Attempts) != 2 || len(r.Spec.Files) != 1 || r.Spec.Stdin == "" {
		t.Error("the record itself lost them")
	}
	full := FromRecord(&r)
	full.Attempts, full.Files, full.Stdin = nil, nil, ""
	if !reflect.DeepEqual(full, s) {
		t.Errorf("a list entry differs in more:\n%+v\n%+v", s, full)
	}
}

func TestLogsComplete(t *testing.T) {
	for _, c := range []struct{ truncated, bad, want bool }{{want: true}, {truncated: true}, {bad: true}} {
		r := rich(t)
		a := r.Last()
		a.Manifest, a.LogsIncomplete = &job.Manifest{Chunks: 1, Bytes: 2}, c.bad
		if c.truncated {
			a.Manifest.TruncatedBytes = 3
		}
		if got := FromRecord(&r).Logs.Complete; got != c.want {
			t.Errorf("%+v: complete is %v", c, got)
		}
	}
}

// TestEveryFieldIsShown: whatever the registry keeps is in the API's job, or is
// named here as staying behind. A field added to Record must be decided on.
func TestEveryFieldIsShown(t *testing.T) {
	for _, c := range []struct {
		from, to reflect.Type
		renamed  map[string]string // "": stays behind
	}{
		{reflect.TypeFor[job.Record](), reflect.TypeFor[Job](), map[string]string{
			"ID": "JobID", "State": "Status", "RetryAt": "NextRetryAt", "Schema": "", "StateAt": "", "LeaseID": "",
			"UserFailures": "", "InfraFailures": "", "Keyed": "", "SpecHash": "",
		}},
		{reflect.TypeFor[job.Attempt](), reflect.TypeFor[Attempt](), map[string]string{"LeaseID": "", "DurationMs": "", "Manifest": "", "LogsIncomplete": ""}},
		{reflect.TypeFor[job.Cancel](), reflect.TypeFor[Cancel](), nil},
	} {
		for i := range c.from.NumField() {
			name := c.from.Field(i).Name
			to, renamed := c.renamed[name]
			if renamed && to == "" {
				continue
			}
			if !renamed {
				to = name
			}
			if _, ok := c.to.FieldByName(to); !ok {
				t.Errorf("%s.%s is not in the API's %s", c.from, name, c.to)
			}
		}
	}
	// And each of them is filled.
	r := rich(t)
	r.RetryAt = t0
	r.Cancel.StopUnconfirmed = true
	r.Last().Reason = job.ReasonCanceled
	j := FromRecord(&r)
	for _, v := range []reflect.Value{reflect.ValueOf(j), reflect.ValueOf(*j.Cancel), reflect.ValueOf(j.Attempts[1]), reflect.ValueOf(*j.Logs)} {
		for i := range v.NumField() {
			// Complete is false for a log that was cut, as this one.
			if name := v.Type().Field(i).Name; v.Field(i).IsZero() && name != "Complete" {
				t.Errorf("%s.%s is empty", v.Type(), name)
			}
		}
	}
}

func TestLogInfo(t *testing.T) {
	r := rich(t)
	if l := FromRecord(&r).Logs; l == nil || l.Complete || l.TruncatedBytes != 5 {
		t.Errorf("a log that was cut: %+v", l)
	}
	r.Last().Manifest = &job.Manifest{Chunks: 1, Bytes: 3}
	if l := FromRecord(&r).Logs; l == nil || !l.Complete || l.Bytes != 3 || l.Chunks != 1 {
		t.Errorf("a whole log: %+v", l)
	}
	r.Last().Manifest = nil
	if l := FromRecord(&r).Logs; l != nil {
		t.Errorf("nothing was declared: %+v", l)
	}
}
