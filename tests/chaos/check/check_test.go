package check

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/tests/chaos/history"
)

const second = int64(time.Second)

func code(n int) *int { return &n }

// good is a history without fault in which every kind of event occurs: job a
// succeeds at its second attempt, job b is canceled, job c fails as it was made to.
func good() []history.Event {
	succeeded := &api.Job{
		JobID: "a", Status: job.Succeeded, Version: 9, Attempt: 2, ExitCode: code(0),
		Logs: &api.LogInfo{Bytes: 20, Chunks: 1, Complete: true},
		Attempts: []api.Attempt{
			{Number: 1, Outcome: job.OutcomeLost, Reason: job.ReasonWorkerLost, ReasonClass: job.ClassInfra},
			{Number: 2, Outcome: job.OutcomeSucceeded, ExitCode: code(0)},
		},
	}
	canceled := &api.Job{JobID: "b", Status: job.Canceled, Version: 2, Reason: job.ReasonCanceled}
	failed := &api.Job{
		JobID: "c", Status: job.Failed, Version: 5, Attempt: 1, ExitCode: code(3), Reason: job.ReasonExitCode, ReasonClass: job.ClassUser,
		Attempts: []api.Attempt{{Number: 1, Outcome: job.OutcomeFailed, Reason: job.ReasonExitCode, ReasonClass: job.ClassUser, ExitCode: code(3)}},
	}
	plan := history.Plan{Kind: "printing", MaxAttempts: 1, Lines: 1}
	events := []history.Event{
		{At: 1 * second, Run: &history.Run{Seed: 7, Bounds: history.Bounds{Recovery: time.Minute, Drain: time.Minute, Overlap: time.Second}}},
		{At: 2 * second, Submit: &history.Submit{Key: "ka", Plan: plan, Begin: second, Code: 503}},
		{At: 3 * second, Submit: &history.Submit{Key: "ka", Plan: plan, Begin: 2 * second, Code: 201, JobID: "a"}},
		{At: 3 * second, Submit: &history.Submit{Key: "ka", Plan: plan, Begin: 2 * second, Code: 200, JobID: "a"}},
		{At: 3 * second, Submit: &history.Submit{Key: "kb", Plan: history.Plan{Kind: "slow", MaxAttempts: 1}, Code: 201, JobID: "b"}},
		{At: 3 * second, Submit: &history.Submit{Key: "kc", Plan: history.Plan{Kind: "failing", MaxAttempts: 1, Code: 3, Until: 9}, Code: 201, JobID: "c"}},
		{At: 4 * second, Cancel: &history.Call{JobID: "b", Code: 200}},
		{At: 5 * second, Observe: &history.Observe{JobID: "a", Begin: 4 * second, From: "get", Status: job.Running, Version: 3, Attempt: 1}},
		{At: 6 * second, Fault: &history.Fault{Name: "worker-frozen", Row: "20", Phase: history.Inject}},
		{At: 16 * second, Fault: &history.Fault{Name: "worker-frozen", Row: "20", Phase: history.Heal, Frozen: true}},
		{At: 17 * second, Fault: &history.Fault{Name: "worker-frozen", Row: "20", Phase: history.Recover, Took: time.Second}},
		{At: 20 * second, Observe: &history.Observe{JobID: "a", From: "events", Status: job.Succeeded, Version: 9, Attempt: 2}},
		{At: 22 * second, Observe: &history.Observe{JobID: "a", Begin: 21 * second, From: "get", Status: job.Succeeded, Version: 9, Attempt: 2, ExitCode: code(0)}},
		{At: 30 * second, Quiet: &history.Quiet{Took: 5 * time.Second}},
		{At: 31 * second, Resource: &history.Resource{Service: "scheduler", What: "fds", Before: 20, After: 25}},
	}
	for _, n := range []history.Journal{
		{Event: history.Start, Job: "a", Attempt: 1, PID: 10, At: 4 * second},
		{Event: history.Overlap, Job: "a", Attempt: 2, PID: 11, At: 12 * second}, // the first is frozen, and ends when it thaws
		{Event: history.Start, Job: "a", Attempt: 2, PID: 11, At: 12 * second},
		{Event: history.Alone, Job: "a", Attempt: 2, PID: 11, At: 16*second + second/10},
		{Event: history.Stop, Job: "a", Attempt: 2, PID: 11, At: 19 * second},
		{Event: history.Start, Job: "c", Attempt: 1, PID: 12, At: 4 * second},
		{Event: history.Stop, Job: "c", Attempt: 1, PID: 12, At: 5 * second, Code: 3},
	} {
		events = append(events, history.Event{At: 31 * second, Journal: &n})
	}
	for _, j := range []*api.Job{succeeded, canceled, failed} {
		events = append(events,
			history.Event{At: 32 * second, Final: &history.Final{JobID: j.JobID, Code: 200, Job: j}},
			history.Event{At: 33 * second, Stored: &history.Stored{Where: history.Database, JobID: j.JobID, Version: j.Version, State: j.Status}})
	}
	return append(events,
		history.Event{At: 33 * second, Stored: &history.Stored{Where: history.Registry, JobID: "a", Version: 9, State: job.Succeeded}},
		history.Event{At: 33 * second, Output: &history.Output{JobID: "a", Seqs: []int64{1}, Stdout: "line 1 of attempt 2\n", Bytes: 20, Complete: true, EOF: true}})
}

func TestAGoodHistoryIsAccepted(t *testing.T) {
	v := Check(good())
	for _, broken := range v.Violations {
		t.Error(broken)
	}
	f := v.Figures
	if f.Acked != 3 || f.Starts != 3 || f.ExtraStarts != 1 || f.Unanswered != 1 || f.Lost+f.DoubleEnd+f.Left+f.Differences != 0 {
		t.Errorf("the figures are %+v", f)
	}
	if f.Overlap != 100*time.Millisecond || f.FrozenOverlap != 4*time.Second {
		t.Errorf("%v of overlap, %v frozen", f.Overlap, f.FrozenOverlap)
	}
	if len(f.Faults) != 1 || f.Faults[0].Times != 1 ||
		Percentile(f.Faults[0].Recovery, 99) != time.Second || Percentile(f.Faults[0].Restarts, 50) != 6*time.Second {
		t.Errorf("the faults are %+v", f.Faults)
	}
}

// final returns the end of a job in a history, to be changed.
func final(t *testing.T, events []history.Event, id string) *api.Job {
	t.Helper()
	for _, e := range events {
		if e.Final != nil && e.Final.JobID == id {
			return e.Final.Job
		}
	}
	t.Fatalf("job %s has no end", id)
	return nil
}

// without drops the events that match.
func without(events []history.Event, match func(history.Event) bool) []history.Event {
	var kept []history.Event
	for _, e := range events {
		if !match(e) {
			kept = append(kept, e)
		}
	}
	return kept
}

// TestBadHistoriesAreRejected breaks the good history in one way at a time. Each
// must be found, and as what it is.
func TestBadHistoriesAreRejected(t *testing.T) {
	type events = []history.Event
	add := func(more ...history.Event) func(*testing.T, events) events {
		return func(_ *testing.T, h events) events { return append(h, more...) }
	}
	journal := func(n history.Journal) func(*testing.T, events) events {
		return add(history.Event{At: 34 * second, Journal: &n})
	}
	observe := func(at int64, o history.Observe) func(*testing.T, events) events {
		return add(history.Event{At: at, Observe: &o})
	}
	change := func(id string, f func(*api.Job)) func(*testing.T, events) events {
		return func(t *testing.T, h events) events {
			f(final(t, h, id))
			return h
		}
	}
	output := func(f func(*history.Output)) func(*testing.T, events) events {
		return func(_ *testing.T, h events) events {
			for _, e := range h {
				if e.Output != nil {
					f(e.Output)
				}
			}
			return h
		}
	}
	stored := func(where string, f func(*history.Stored)) func(*testing.T, events) events {
		return func(_ *testing.T, h events) events {
			for _, e := range h {
				if e.Stored != nil && e.Stored.Where == where && e.Stored.JobID == "a" {
					f(e.Stored)
				}
			}
			return h
		}
	}
	drop := func(match func(history.Event) bool) func(*testing.T, events) events {
		return func(_ *testing.T, h events) events { return without(h, match) }
	}
	for name, bad := range map[string]struct {
		invariant, says string
		do              func(*testing.T, events) events
	}{
		"an acknowledged job is gone": {I1Lost, "answers 404", drop(func(e history.Event) bool { return e.Final != nil && e.Final.JobID == "b" })},
		"an acknowledged job never ends": {I1Lost, "running at the end", func(t *testing.T, h events) events {
			final(t, h, "a").Status = job.Running
			return without(h, func(e history.Event) bool { return e.Observe != nil })
		}},
		"a job is denied":                  {I1Lost, "does not exist", observe(8*second, history.Observe{JobID: "a", Begin: 7 * second, From: "get", Missing: true})},
		"nobody asked for a job":           {I1Lost, "nobody asked", drop(func(e history.Event) bool { return e.Final != nil && e.Final.JobID == "c" })},
		"one key made two jobs":            {I1Lost, "this job and a", add(history.Event{At: 5 * second, Submit: &history.Submit{Key: "ka", Code: 201, JobID: "z"}})},
		"two keys made one job":            {I1Lost, "several keys", add(history.Event{At: 5 * second, Submit: &history.Submit{Key: "kz", Code: 201, JobID: "a", Plan: history.Plan{MaxAttempts: 1, Lines: 1}}})},
		"acknowledged without an id":       {I1Lost, "without an id", add(history.Event{At: 5 * second, Submit: &history.Submit{Key: "kz", Code: 201}})},
		"two ends":                         {I2Result, "ended twice", observe(23*second, history.Observe{JobID: "a", From: "events", Status: job.Failed, Version: 9, Attempt: 2})},
		"two exit codes":                   {I2Result, "ended twice", observe(23*second, history.Observe{JobID: "a", From: "execute", Status: job.Succeeded, ExitCode: code(1)})},
		"ended at two attempts":            {I2Result, "ended twice", observe(23*second, history.Observe{JobID: "a", From: "events", Status: job.Succeeded, Version: 9, Attempt: 1})},
		"alive after its end":              {I2Result, "later", observe(24*second, history.Observe{JobID: "a", Begin: 23 * second, From: "get", Status: job.Running, Version: 10, Attempt: 2})},
		"an older version read later":      {I2Result, "later", observe(8*second, history.Observe{JobID: "a", Begin: 7 * second, From: "get", Status: job.Queued, Version: 1})},
		"no state":                         {I2Result, "showed the state", observe(8*second, history.Observe{JobID: "a", From: "events", Status: "done", Version: 4})},
		"a made-up report is believed":     {I3Fenced, "nobody with a lease", change("c", func(j *api.Job) { j.Message = "x " + ForgedMessage })},
		"the result of an earlier attempt": {I3Fenced, "is that of", change("a", func(j *api.Job) { j.Attempt = 3 })},
		"a missing attempt":                {I3Fenced, "follows attempt", change("a", func(j *api.Job) { j.Attempts[0].Number = 0 })},
		"an attempt after a success":       {I3Fenced, "succeeded and the job is", change("a", func(j *api.Job) { j.Attempts[0].Outcome = job.OutcomeSucceeded })},
		"a success that never was": {I3Fenced, "never wrote that", drop(func(e history.Event) bool {
			return e.Journal != nil && e.Journal.Event == history.Stop && e.Journal.Job == "a"
		})},
		"an exit code that never was":        {I3Fenced, "recorded exit code", change("c", func(j *api.Job) { j.ExitCode = code(4) })},
		"a cancel that nobody asked for":     {I3Fenced, "nobody canceled", drop(func(e history.Event) bool { return e.Cancel != nil })},
		"a failure that the plan has not":    {I3Fenced, "does not fail", drop(func(e history.Event) bool { return e.Submit != nil && e.Submit.JobID == "c" })},
		"given up too early":                 {I3Fenced, "are forgiven", change("c", func(j *api.Job) { j.Reason, j.ReasonClass = job.ReasonWorkerLost, job.ClassInfra })},
		"a timeout of a quick command":       {I3Fenced, "run that long", change("c", func(j *api.Job) { j.Status = job.TimedOut })},
		"expired":                            {I3Fenced, "nothing asks", change("c", func(j *api.Job) { j.Status = job.Expired })},
		"reset without a lost registry":      {I3Fenced, "never lost", change("c", func(j *api.Job) { j.Reason, j.ReasonClass = job.ReasonRegistryReset, job.ClassOperator })},
		"a strange reason":                   {I3Fenced, "end that way", change("c", func(j *api.Job) { j.Reason = job.ReasonSignaled })},
		"one attempt started twice":          {I4Starts, "attempt 2 started 2 times", journal(history.Journal{Event: history.Start, Job: "a", Attempt: 2, PID: 20, At: 13 * second})},
		"more starts than the budget":        {I4Starts, "its command started", func(t *testing.T, h events) events { return moreStarts(h, 6) }},
		"a second start where that is asked": {I4Starts, "1 are allowed", func(_ *testing.T, h events) events { return lostFails(h) }},
		"two attempts at once": {I4Starts, "lived at once", add(
			history.Event{At: 34 * second, Journal: &history.Journal{Event: history.Overlap, Job: "a", Attempt: 2, PID: 11, At: 17 * second}},
		)},
		"a process is left":             {I5Left, "sleep", add(history.Event{At: 34 * second, Left: &history.Left{What: "process 12: sleep"}})},
		"goroutines grow":               {I5Left, "goroutines", add(history.Event{At: 34 * second, Resource: &history.Resource{Service: "edge", What: "goroutines", Before: 40, After: 900}})},
		"a gap that nobody declared":    {I6Output, "chunk 3", output(func(o *history.Output) { o.Seqs = []int64{1, 3} })},
		"chunks are missing at the end": {I6Output, "declared", output(func(o *history.Output) { o.Seqs = nil })},
		"other output than was printed": {I6Output, "instead of", output(func(o *history.Output) { o.Stdout = "line 1 of attempt 1\n" })},
		"jobs stay open":                {I7Alive, "open", add(history.Event{At: 34 * second, Quiet: &history.Quiet{Took: time.Second, Open: 1}})},
		"quiet comes late":              {I7Alive, "bound", add(history.Event{At: 34 * second, Quiet: &history.Quiet{Took: time.Hour}})},
		"never quiet":                   {I7Alive, "does not say", drop(func(e history.Event) bool { return e.Quiet != nil })},
		"a slow recovery":               {I7Alive, "until a new job", add(history.Event{At: 34 * second, Fault: &history.Fault{Name: "nats-killed", Phase: history.Recover, Took: time.Hour}})},
		"not in the database": {I8Projection, "does not have it", drop(func(e history.Event) bool {
			return e.Stored != nil && e.Stored.JobID == "a" && e.Stored.Where == history.Database
		})},
		"an older version in the database": {I8Projection, "(version 8)", stored(history.Database, func(s *history.Stored) { s.Version = 8 })},
		"purged before it was stored": {I8Projection, "left the registry", func(t *testing.T, h events) events {
			h = stored(history.Database, func(s *history.Stored) { s.State = job.Running })(t, h)
			return without(h, func(e history.Event) bool { return e.Stored != nil && e.Stored.Where == history.Registry })
		}},
		"in neither":                  {I8Projection, "neither", drop(func(e history.Event) bool { return e.Stored != nil && e.Stored.JobID == "b" })},
		"the API shows another state": {I8Projection, "the API shows", change("b", func(j *api.Job) { j.Version = 3 })},
	} {
		t.Run(name, func(t *testing.T) {
			h := bad.do(t, good())
			if name == "an acknowledged job is gone" {
				h = append(h, history.Event{At: 34 * second, Final: &history.Final{JobID: "b", Code: 404}})
			}
			v := Check(h)
			for _, broken := range v.Violations {
				if broken.Invariant == bad.invariant && strings.Contains(broken.What, bad.says) {
					return
				}
			}
			t.Errorf("it was not found; found was %v", v.Violations)
		})
	}
}

func moreStarts(h []history.Event, n int) []history.Event {
	for i := range n {
		h = append(h, history.Event{Journal: &history.Journal{Event: history.Start, Job: "a", Attempt: 3 + i, PID: 30 + i, At: 18 * second}})
	}
	return h
}

// lostFails makes job a one that may start once only.
func lostFails(h []history.Event) []history.Event {
	for _, e := range h {
		if e.Submit != nil && e.Submit.JobID == "a" {
			e.Submit.Plan.LostFails = true
		}
	}
	return h
}

// TestFrozenTimeIsNoOverlap, but the time after it is.
func TestFrozenTimeIsNoOverlap(t *testing.T) {
	h := good()
	for _, e := range h {
		if e.Journal != nil && e.Journal.Event == history.Alone {
			e.Journal.At = 18 * second // two seconds after the thaw
		}
	}
	if v := Check(h); len(v.Violations) != 1 || v.Violations[0].Invariant != I4Starts {
		t.Errorf("found was %v", v.Violations)
	}
}

// TestWrittenAndRead: a history is the same after it was on disk.
func TestWrittenAndRead(t *testing.T) {
	path := t.TempDir() + "/history.jsonl"
	w, err := history.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	var text bytes.Buffer
	for _, e := range good() {
		w.Add(e)
		data, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		text.Write(data)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	read, err := history.Read(&text)
	if err != nil || len(read) != len(good()) {
		t.Fatalf("%d events, %v", len(read), err)
	}
	if v := Check(read); len(v.Violations) != 0 {
		t.Errorf("found was %v", v.Violations)
	}
}
