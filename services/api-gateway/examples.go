package gateway

import (
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/fleet"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/httpkit"
)

// Names that the examples of the document use. A test puts real ones in their place.
const (
	exampleJob    = "job-01jd2xw8q3v5k7m9n1p3r5t7v9"
	exampleRerun  = "job-01jd2xz4b6d8f0h2j4k6m8p0r2"
	exampleWorker = "worker-01jd2w0a1c3e5g7h9j1k3m5n7p"
)

// example is how an operation is used: the parameters, the body, and what comes back.
type example struct {
	params map[string]any
	body   any
	yaml   string            // the body as YAML, where the route takes that
	answer any               // of the success as JSON
	texts  map[string]string // of the success in other media types
}

func exampleTime(seconds float64) time.Time {
	return time.Date(2026, 11, 24, 8, 0, 0, 0, time.UTC).Add(time.Duration(seconds * float64(time.Second)))
}

// normalised returns a spec with its defaults.
func normalised(spec job.Spec) job.Spec {
	spec, errs := job.Normalise(spec)
	if len(errs) > 0 {
		panic(fmt.Sprintf("gateway: an example is refused: %v", errs)) // found by every test
	}
	return spec
}

// examples has one example for each operation, by its id. It is built anew for
// each document: nothing of it is shared.
func examples() map[string]example {
	sent := job.Spec{
		Command: job.Command{Shell: "echo hello"}, ContainerImage: "alpine:3.22", Timeout: 60,
		Labels: map[string]string{"team": "blue"}, Env: map[string]string{"GREETING": "hello"},
	}
	const sentYAML = "command: echo hello\ncontainerImage: alpine:3.22\ntimeout: 60\nlabels:\n  team: blue\nenv:\n  GREETING: hello\n"
	started, finished, zero := exampleTime(1.2), exampleTime(1.25), 0
	queued := api.Job{
		JobID: exampleJob, Owner: "ann", Status: job.Queued, Version: 1, Spec: normalised(sent), CreatedAt: exampleTime(0),
	}
	ended := queued
	ended.Status, ended.Version, ended.StartedAt, ended.FinishedAt = job.Succeeded, 4, &started, &finished
	ended.DurationMs, ended.Attempt, ended.WorkerID, ended.ExitCode = 50, 1, exampleWorker, &zero
	ended.Logs = &api.LogInfo{Bytes: 6, Chunks: 1, Complete: true}
	accepted := exampleTime(0.1)
	ended.Attempts = []api.Attempt{{
		Number: 1, WorkerID: exampleWorker, AssignedAt: exampleTime(0.05), AcceptedAt: &accepted, PreparedAt: &started, StartedAt: &started,
		FinishedAt: &finished, Outcome: job.OutcomeSucceeded, ExitCode: &zero, PeakMemoryMB: 1, CPUMs: 12,
	}}
	listed := ended
	listed.Attempts = nil
	canceled := queued
	canceled.Status, canceled.Version, canceled.FinishedAt = job.Canceled, 2, &finished
	canceled.Reason, canceled.ReasonClass = job.ReasonCanceled, job.ReasonCanceled.Class()
	canceled.Cancel = &api.Cancel{RequestedAt: finished}
	again := queued
	again.JobID, again.RerunOf = exampleRerun, exampleJob
	short := job.Spec{Command: job.Command{Argv: []string{"echo", "one"}}}
	one := queued
	one.JobID, one.Spec = exampleJob, normalised(short)
	refused := api.Problem{
		Type: "about:blank", Title: http.StatusText(http.StatusUnprocessableEntity), Status: http.StatusUnprocessableEntity, Code: codeInvalidJob, Detail: "the job cannot be accepted as it is",
		Hint: "see errors for the fields", Errors: []job.FieldError{{Field: "network", Code: job.CodeNeedsContainer, Detail: "only a job with a containerImage can have this"}},
	}
	output := api.LogItem{Seq: 1, Stream: workerproto.Stdout, Time: started, Data: "hello\n"}
	drain := true
	named := map[string]any{"jobId": exampleJob}
	return map[string]example{
		"createJob": {body: sent, yaml: sentYAML, answer: queued},
		"jobStatus": {params: named, answer: ended},
		"cancelJob": {body: api.CancelRequest{JobID: exampleJob}, answer: canceled},
		"rerunJob":  {body: api.RerunRequest{JobID: exampleJob}, answer: again},
		"createJobs": {
			body: api.BatchRequest{Jobs: []job.Spec{short, {Command: job.Command{Argv: []string{"echo", "two"}}, Network: job.NetworkBridge}}},
			answer: api.BatchResult{Created: 1, Failed: 1, Items: []api.BatchItem{
				{Index: 0, Job: &one}, {Index: 1, Problem: &refused},
			}},
		},
		"cancelJobs": {
			body: api.CancelBatchRequest{Status: []job.State{job.Queued}, Labels: map[string]string{"team": "blue"}},
			answer: api.CancelBatchResult{
				Matched: 1, Canceled: 1, Items: []api.CancelItem{{JobID: exampleJob, Status: job.Canceled}}, Failed: []api.CancelFailed{},
			},
		},
		"listJobs": {
			params: map[string]any{"status": []string{"succeeded", "failed"}, "limit": 10},
			answer: api.JobList{Items: []api.Job{listed}, AsOf: exampleTime(2)},
		},
		"getJob": {params: named, answer: ended},
		"jobLogs": {
			params: named,
			answer: api.Logs{Items: []api.LogItem{output}, NextAfter: 1, Complete: true, EOF: true},
			texts: map[string]string{
				"text/plain":        "hello\n",
				"text/event-stream": "id: 1-1\nevent: output\ndata: {\"seq\":1,\"offset\":0,\"stream\":\"stdout\",\"time\":\"2026-11-24T08:00:01.2Z\",\"data\":\"hello\\n\"}\n\nevent: end\ndata: {\"jobId\":\"" + exampleJob + "\",\"status\":\"succeeded\", ...}\n\n",
			},
		},
		"jobEvents": {params: named, texts: map[string]string{
			"text/event-stream": "event: state\ndata: {\"jobId\":\"" + exampleJob + "\",\"status\":\"succeeded\",\"attempt\":1,\"version\":4,\"at\":\"2026-11-24T08:00:01.25Z\"}\n\n",
		}},
		"events": {params: map[string]any{"label": []string{"team:blue"}}, texts: map[string]string{
			"text/event-stream": "id: 5f70bf18-41\nevent: ready\ndata: {}\n\nid: 5f70bf18-42\nevent: state\ndata: {\"jobId\":\"" + exampleJob + "\",\"status\":\"running\",\"attempt\":1,\"version\":3,\"at\":\"2026-11-24T08:00:01.2Z\"}\n\n",
		}},
		"explainJob": {params: named, answer: api.Explain{
			JobID: exampleJob, Status: job.Queued, AttemptsLeft: 1, InfraBudgetLeft: 3, Position: 3,
			Summary:   "The job has waited in queue default for 12 seconds at position 3: of 2 workers, 1 have no free slot, 1 cannot run docker jobs.",
			BlockedBy: []api.BlockReason{{Reason: fleet.BlockSlots, Workers: 1}, {Reason: fleet.BlockExecutor, Workers: 1}},
		}},
		"execute": {body: sent, yaml: sentYAML, answer: api.ExecuteResult{
			JobID: exampleJob, Status: job.Succeeded, ExitCode: &zero, Stdout: "hello\n", DurationMs: 50, QueuedMs: 1200,
		}, texts: map[string]string{
			"text/event-stream": "id: 1-1\nevent: output\ndata: {\"seq\":1,\"offset\":0,\"stream\":\"stdout\",\"time\":\"2026-11-24T08:00:01.2Z\",\"data\":\"hello\\n\"}\n\nevent: end\ndata: {\"jobId\":\"" + exampleJob + "\",\"status\":\"succeeded\", ...}\n\n",
		}},
		"listWorkers": {answer: api.WorkerList{AsOf: exampleTime(2), Items: []api.Worker{{
			WorkerID: exampleWorker, Hostname: "forge", OS: "linux", Arch: "amd64", CPUCores: 8, TotalMemory: 16 << 30, Executors: []string{"docker"},
			Slots: 8, FreeSlots: 7, Running: 1, Status: fleet.StatusBusy, CPUUsage: 12.5, RAMUsage: 2048, Version: "1.0.0", Transport: "websocket",
			ConnectedAt: exampleTime(-3600), LastSeenAt: exampleTime(1),
		}}}},
		"drainWorker": {body: drainRequest{WorkerID: exampleWorker, Drain: &drain}, answer: drainState{WorkerID: exampleWorker, Drain: true}},
		"health":      {answer: api.Health{Status: "ok"}},
		"info":        {answer: api.Info{Version: "1.0.0", Commit: "0123456789ab", Durability: "committed", NATSServer: "2.15.2", UptimeSeconds: 3600}},
	}
}

// exampleProblem is a problem that a status may come with.
func exampleProblem(status int) api.Problem {
	p := httpkit.Problem{Status: status, Code: codeInternal, Detail: "the server made a mistake", Hint: "report it with the request id"}
	switch status {
	case http.StatusBadRequest:
		p = *badParameter("limit", "from 1 to 500")
	case http.StatusUnauthorized:
		p = *unauthorized()
	case http.StatusForbidden:
		p = *adminOnly()
	case http.StatusNotFound:
		p = *jobNotFound()
	case http.StatusRequestEntityTooLarge:
		p = *tooLarge(maxBody)
	case http.StatusUnsupportedMediaType:
		p = *unsupportedMedia(false)
	case http.StatusUnprocessableEntity:
		p = *invalidJob([]job.FieldError{{Field: "timeout", Code: job.CodeOutOfRange, Detail: "from 1 to 86400"}})
	case http.StatusTooManyRequests:
		p = httpkit.Problem{Status: status, Code: codeRateLimited, Detail: "too many requests", Hint: "wait as long as Retry-After says"}
	case http.StatusServiceUnavailable:
		p = busAway()
	case http.StatusRequestedRangeNotSatisfiable:
		p = httpkit.Problem{Status: status, Code: codeBadRange, Detail: "the output has no such bytes", Hint: "see Content-Range for how many there are"}
	case http.StatusGatewayTimeout:
		p = httpkit.Problem{Status: status, Code: codeWaitTimeout, Detail: "the job did not end in time", Hint: "the job goes on: ask for it by its id", JobID: exampleJob}
	}
	p.Fill("3f9c2a1b5d7e8f60")
	out := partProblem(&p)
	out.RequestID, out.Instance = p.RequestID, p.Instance
	return *out
}

// exemplify adds an operation's example to the document.
func exemplify(op *huma.Operation, status string, ex example) error {
	for name := range ex.params {
		found := false
		for _, p := range op.Parameters {
			if p.Name == name {
				p.Example, found = ex.params[name], true
			}
		}
		if !found {
			return fmt.Errorf("the example of %s has a parameter %s that does not exist", op.OperationID, name)
		}
	}
	if op.RequestBody != nil {
		for media, content := range op.RequestBody.Content {
			content.Example = ex.body
			if strings.HasSuffix(media, "/yaml") {
				content.Example = ex.yaml
			}
		}
	}
	for media, content := range op.Responses[status].Content {
		if text, ok := ex.texts[media]; ok {
			content.Example = text
		} else if media == jsonType {
			content.Example = ex.answer
		}
		if content.Example == nil {
			return fmt.Errorf("%s has no example of %s", op.OperationID, media)
		}
	}
	return nil
}
