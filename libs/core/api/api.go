// Package api has the types of the public REST API. The gateway serves them
// and generates the OpenAPI document from their tags, libs/client and the CLI
// read them.
package api

import (
	"time"

	"github.com/cmdexec/cmdexec/libs/core/fleet"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
)

// Job is a job as the API returns it: the normalised spec, and where it is.
type Job struct {
	JobID   string    `json:"jobId" doc:"The job's id."`
	Owner   string    `json:"owner" doc:"Who submitted it."`
	Status  job.State `json:"status" doc:"Where the job is."`
	Version uint64    `json:"version" doc:"Raised by every change."`
	job.Spec
	CreatedAt   time.Time  `json:"createdAt"`
	StartedAt   *time.Time `json:"startedAt,omitempty" doc:"When the command first ran."`
	FinishedAt  *time.Time `json:"finishedAt,omitempty"`
	DurationMs  int64      `json:"durationMs,omitempty" doc:"Milliseconds that the last attempt's command ran."`
	Attempt     int        `json:"attempt" doc:"Number of the newest attempt; 0 before the first."`
	WorkerID    string     `json:"workerId,omitempty"`
	ExitCode    *int       `json:"exitCode" doc:"Null until known."`
	Signal      string     `json:"signal,omitempty"`
	OOMKilled   bool       `json:"oomKilled,omitempty"`
	Reason      job.Reason `json:"reason,omitempty" doc:"Why the job is where it is, as one stable word."`
	ReasonClass job.Class  `json:"reasonClass,omitempty" doc:"user, infra, policy or operator."`
	Message     string     `json:"message,omitempty"`
	RerunOf     string     `json:"rerunOf,omitempty"`
	Logs        *LogInfo   `json:"logs,omitempty" doc:"What the newest attempt printed, as its worker declared it."`
	Cancel      *Cancel    `json:"cancel,omitempty"`
	NextRetryAt *time.Time `json:"nextRetryAt,omitempty"`
	Attempts    []Attempt  `json:"attempts,omitempty" doc:"The newest 16 attempts, oldest first. Absent in lists."`
}

// LogInfo declares the output of an attempt.
type LogInfo struct {
	Bytes          int64 `json:"bytes" doc:"Bytes kept."`
	Chunks         int64 `json:"chunks"`
	Complete       bool  `json:"complete" doc:"False while the job runs, and where output was lost or cut."`
	TruncatedBytes int64 `json:"truncatedBytes" doc:"Bytes printed and not kept."`
}

// Cancel is the receipt trail of a cancel.
type Cancel struct {
	RequestedAt     time.Time  `json:"requestedAt"`
	DeliveredAt     *time.Time `json:"deliveredAt,omitempty"`
	SignalledAt     *time.Time `json:"signalledAt,omitempty"`
	ExitedAt        *time.Time `json:"exitedAt,omitempty"`
	GoneAt          *time.Time `json:"goneAt,omitempty"`
	StopUnconfirmed bool       `json:"stopUnconfirmed,omitempty" doc:"Nobody confirmed that the command is gone."`
}

// Attempt is one try on one worker.
type Attempt struct {
	Number       int         `json:"number"`
	WorkerID     string      `json:"workerId"`
	AssignedAt   time.Time   `json:"assignedAt"`
	AcceptedAt   *time.Time  `json:"acceptedAt,omitempty"`
	PreparedAt   *time.Time  `json:"preparedAt,omitempty"`
	StartedAt    *time.Time  `json:"startedAt,omitempty"`
	FinishedAt   *time.Time  `json:"finishedAt,omitempty"`
	Outcome      job.Outcome `json:"outcome,omitempty"`
	Reason       job.Reason  `json:"reason,omitempty"`
	ReasonClass  job.Class   `json:"reasonClass,omitempty"`
	ExitCode     *int        `json:"exitCode"`
	Signal       string      `json:"signal,omitempty"`
	OOMKilled    bool        `json:"oomKilled,omitempty"`
	ImageDigest  string      `json:"imageDigest,omitempty"`
	PeakMemoryMB int64       `json:"peakMemoryMb,omitempty"`
	CPUMs        int64       `json:"cpuMs,omitempty"`
	Warm         bool        `json:"warm,omitempty"`
}

// FromRecord is the API's view of a registry record. Lease ids stay behind.
func FromRecord(r *job.Record) Job {
	j := Job{
		JobID: r.ID, Owner: r.Owner, Status: r.State, Version: r.Version, Spec: r.Spec,
		CreatedAt: r.CreatedAt, StartedAt: timePtr(r.StartedAt), FinishedAt: timePtr(r.FinishedAt),
		Attempt: r.Attempt, WorkerID: r.WorkerID, ExitCode: r.ExitCode, Signal: r.Signal, OOMKilled: r.OOMKilled,
		Reason: r.Reason, Message: r.Message, RerunOf: r.RerunOf, NextRetryAt: timePtr(r.RetryAt),
		ReasonClass: classOf(r.Reason),
	}
	if c := r.Cancel; c != nil {
		j.Cancel = &Cancel{
			RequestedAt: c.RequestedAt, DeliveredAt: timePtr(c.DeliveredAt), SignalledAt: timePtr(c.SignalledAt),
			ExitedAt: timePtr(c.ExitedAt), GoneAt: timePtr(c.GoneAt), StopUnconfirmed: c.StopUnconfirmed,
		}
	}
	for i := range r.Attempts {
		j.Attempts = append(j.Attempts, fromAttempt(&r.Attempts[i]))
	}
	if a := r.Last(); a != nil {
		j.DurationMs = a.DurationMs
		if m := a.Manifest; m != nil {
			j.Logs = &LogInfo{Bytes: m.Bytes, Chunks: m.Chunks, TruncatedBytes: m.TruncatedBytes, Complete: m.TruncatedBytes == 0 && !a.LogsIncomplete}
		}
	}
	return j
}

// Summary is the view of a record in a list: without attempts, files and stdin.
func Summary(r *job.Record) Job {
	j := FromRecord(r)
	j.Attempts, j.Files, j.Stdin = nil, nil, ""
	return j
}

func fromAttempt(a *job.Attempt) Attempt {
	return Attempt{
		Number: a.Number, WorkerID: a.WorkerID, AssignedAt: a.AssignedAt,
		AcceptedAt: timePtr(a.AcceptedAt), PreparedAt: timePtr(a.PreparedAt),
		StartedAt: timePtr(a.StartedAt), FinishedAt: timePtr(a.FinishedAt),
		Outcome: a.Outcome, Reason: a.Reason, ReasonClass: classOf(a.Reason),
		ExitCode: a.ExitCode, Signal: a.Signal, OOMKilled: a.OOMKilled, ImageDigest: a.ImageDigest,
		PeakMemoryMB: a.PeakMemoryMB, CPUMs: a.CPUMs, Warm: a.Warm,
	}
}

func classOf(r job.Reason) job.Class {
	if r == "" {
		return ""
	}
	return r.Class()
}

func timePtr(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

// CancelRequest is the body of POST /api/jobs/cancel.
type CancelRequest struct {
	JobID string `json:"jobId" doc:"The job to end."`
}

// RerunRequest is the body of POST /api/jobs/rerun.
type RerunRequest struct {
	JobID string `json:"jobId" doc:"The job to run again, whatever became of it."`
}

// MaxBatch is how many jobs one call may create, and how many one call cancels.
const MaxBatch = 1000

// BatchRequest is the body of POST /api/jobs/batch.
type BatchRequest struct {
	Jobs []job.Spec `json:"jobs" doc:"1 to 1000 jobs. Each stands for itself: one that is refused does not keep the others." minItems:"1" maxItems:"1000"`
}

// BatchResult answers POST /api/jobs/batch. Created, Replayed and Failed add up
// to the number of jobs that were sent.
type BatchResult struct {
	Created  int         `json:"created" doc:"Jobs that this call created."`
	Replayed int         `json:"replayed" doc:"Jobs that an earlier call with this Idempotency-Key created."`
	Failed   int         `json:"failed" doc:"Jobs that were not created, or of which it is not known."`
	Items    []BatchItem `json:"items" doc:"One for each job, in the order of the request."`
}

// BatchItem is what became of one job of a batch: either Job or Problem is set.
type BatchItem struct {
	Index    int      `json:"index" doc:"Place in the request, from 0."`
	Replayed bool     `json:"replayed,omitempty"`
	Job      *Job     `json:"job,omitempty" doc:"The job, without files and stdin."`
	Problem  *Problem `json:"problem,omitempty" doc:"Why there is no job, as that job alone would have been answered."`
}

// CancelBatchRequest is the body of POST /api/jobs/cancel-batch. Fields that are
// given must all match; at least one must be given.
type CancelBatchRequest struct {
	JobIDs []string          `json:"jobIds,omitempty" doc:"Only these jobs, at most 1000." maxItems:"1000"`
	Status []job.State       `json:"status,omitempty" doc:"Only jobs with one of these statuses. Absent: all that have not ended and are not being canceled."`
	Queue  string            `json:"queue,omitempty" doc:"Only jobs of this queue."`
	Labels map[string]string `json:"labels,omitempty" doc:"Only jobs that have all these labels."`
	Since  *time.Time        `json:"since,omitempty" nullable:"false" doc:"Only jobs created at or after this time."`
	Until  *time.Time        `json:"until,omitempty" nullable:"false" doc:"Only jobs created before this time."`
	Owner  string            `json:"owner,omitempty" doc:"Whose jobs; your own if absent. Another name needs the role admin."`
}

// CancelBatchResult answers POST /api/jobs/cancel-batch. Matched is the sum of
// Canceled, Canceling, Ended and the length of Failed.
type CancelBatchResult struct {
	Matched   int            `json:"matched" doc:"Jobs that this call tried to cancel."`
	Canceled  int            `json:"canceled" doc:"Jobs that have ended by it: no worker had them."`
	Canceling int            `json:"canceling" doc:"Jobs whose worker is being told."`
	Ended     int            `json:"ended" doc:"Jobs that had ended otherwise before the cancel came."`
	More      bool           `json:"more" doc:"The call was cut at 1000 jobs: send it again for the rest."`
	Items     []CancelItem   `json:"items" doc:"The jobs that were canceled, are being canceled or had ended."`
	Failed    []CancelFailed `json:"failed" doc:"The jobs that could not be canceled."`
}

// CancelItem is a job of a CancelBatchResult as it is after the cancel.
type CancelItem struct {
	JobID  string    `json:"jobId"`
	Status job.State `json:"status"`
}

// CancelFailed is a job of a CancelBatchResult that could not be canceled.
type CancelFailed struct {
	JobID   string  `json:"jobId"`
	Problem Problem `json:"problem"`
}

// JobList answers GET /api/jobs.
type JobList struct {
	Items      []Job     `json:"items"`
	NextCursor string    `json:"nextCursor,omitempty" doc:"Pass as cursor for the next page; absent on the last."`
	AsOf       time.Time `json:"asOf" doc:"The list has seen every change up to about this time."`
}

// LogItem is one piece of output. Data is set where it is valid UTF-8, else
// DataBase64.
type LogItem struct {
	Seq        int64              `json:"seq"`
	Offset     int64              `json:"offset" doc:"Position in its own stream, in bytes."`
	Stream     workerproto.Stream `json:"stream" enum:"stdout,stderr,system"`
	Time       time.Time          `json:"time"`
	Data       string             `json:"data,omitempty"`
	DataBase64 []byte             `json:"dataBase64,omitempty"`
}

// Logs answers GET /api/jobs/{jobId}/logs.
type Logs struct {
	Items          []LogItem `json:"items"`
	NextAfter      int64     `json:"nextAfter" doc:"Pass as after for what comes next."`
	Complete       bool      `json:"complete" doc:"Everything the command printed is stored."`
	TruncatedBytes int64     `json:"truncatedBytes"`
	EOF            bool      `json:"eof" doc:"Nothing will come after this page."`
}

// ExecuteResult answers POST /api/execute.
type ExecuteResult struct {
	JobID           string     `json:"jobId"`
	Status          job.State  `json:"status"`
	ExitCode        *int       `json:"exitCode"`
	Signal          string     `json:"signal,omitempty"`
	Reason          job.Reason `json:"reason,omitempty"`
	Message         string     `json:"message,omitempty"`
	Stdout          string     `json:"stdout"`
	Stderr          string     `json:"stderr"`
	StdoutTruncated bool       `json:"stdoutTruncated"`
	StderrTruncated bool       `json:"stderrTruncated"`
	DurationMs      int64      `json:"durationMs"`
	QueuedMs        int64      `json:"queuedMs"`
}

// StateEvent is the data of a state event of GET /api/jobs/{jobId}/events.
type StateEvent struct {
	JobID   string     `json:"jobId"`
	Status  job.State  `json:"status"`
	Attempt int        `json:"attempt"`
	Version uint64     `json:"version"`
	At      time.Time  `json:"at"`
	Reason  job.Reason `json:"reason,omitempty"`
}

// StreamPoint is the data of the events ready and overflow of GET /api/jobs/events.
type StreamPoint struct {
	Resumed bool `json:"resumed,omitempty" doc:"The stream goes on after the Last-Event-ID that was sent: the newest state of every job that changed since, and is still live or ended moments ago, was sent before this."`
	Gap     bool `json:"gap,omitempty" doc:"Changes before this may be missing: list the jobs to see where they are."`
}

// Explain answers GET /api/jobs/{jobId}/explain.
type Explain struct {
	JobID           string        `json:"jobId"`
	Status          job.State     `json:"status"`
	Summary         string        `json:"summary" doc:"One sentence for a person."`
	Position        int           `json:"position,omitempty" doc:"Place in the queue, from 1."`
	BlockedBy       []BlockReason `json:"blockedBy,omitempty"`
	Attempts        []Attempt     `json:"attempts,omitempty"`
	AttemptsLeft    int           `json:"attemptsLeft"`
	InfraBudgetLeft int           `json:"infraBudgetLeft"`
	NextRetryAt     *time.Time    `json:"nextRetryAt,omitempty"`
	Cancel          *Cancel       `json:"cancel,omitempty" doc:"How far a cancel has come: what was confirmed, and when."`
}

// BlockReason counts the workers that a reason keeps from a job.
type BlockReason struct {
	Reason  fleet.Block `json:"reason"`
	Workers int         `json:"workers"`
}

// Worker is an entry of GET /api/workers/list.
type Worker struct {
	WorkerID      string            `json:"workerId"`
	Hostname      string            `json:"hostname,omitempty"`
	OS            string            `json:"os"`
	Arch          string            `json:"arch"`
	CPUCores      float64           `json:"cpuCores" doc:"Cores offered to jobs."`
	TotalMemory   int64             `json:"totalMemory" doc:"Bytes offered to jobs."`
	Labels        map[string]string `json:"labels,omitempty"`
	Executors     []string          `json:"executors"`
	Slots         int               `json:"slots"`
	FreeSlots     int               `json:"freeSlots"`
	Running       int               `json:"running"`
	Status        fleet.Status      `json:"status" enum:"idle,busy,draining,unknown,offline"`
	CPUUsage      float64           `json:"cpuUsage" doc:"Percent of the whole machine."`
	RAMUsage      float64           `json:"ramUsage" doc:"MiB."`
	Version       string            `json:"version,omitempty"`
	Transport     string            `json:"transport"`
	ConnectedAt   time.Time         `json:"connectedAt"`
	LastSeenAt    time.Time         `json:"lastSeenAt"`
	SetAsideUntil *time.Time        `json:"setAsideUntil,omitempty"`
	Reason        string            `json:"reason,omitempty"`
}

// WorkerList answers GET /api/workers/list.
type WorkerList struct {
	Items []Worker  `json:"items"`
	AsOf  time.Time `json:"asOf"`
}

// Info answers GET /api/info.
type Info struct {
	Version       string `json:"version"`
	Commit        string `json:"commit"`
	Durability    string `json:"durability" doc:"committed: an acknowledged job survives a power cut. replicated: on three servers."`
	NATSServer    string `json:"natsServer"`
	UptimeSeconds int64  `json:"uptimeSeconds"`
}

// Health answers GET /api/health.
type Health struct {
	Status string `json:"status"`
}

// Problem is the body of every error answer (RFC 9457).
type Problem struct {
	Type      string           `json:"type"`
	Title     string           `json:"title"`
	Status    int              `json:"status"`
	Code      string           `json:"code" doc:"A stable word to decide by."`
	Detail    string           `json:"detail,omitempty"`
	Hint      string           `json:"hint,omitempty" doc:"What to do next."`
	Instance  string           `json:"instance,omitempty"`
	RequestID string           `json:"requestId,omitempty"`
	Errors    []job.FieldError `json:"errors,omitempty"`
	JobID     string           `json:"jobId,omitempty" doc:"Set where the outcome of a submit is not known: ask for this job."`
}
