// Package busmsg has the bodies of what crosses the bus between services. The
// subjects and streams that carry them are named in libs/bus; what a worker
// and the edge say to each other is in workerproto.
//
// Bodies are JSON. A reader ignores fields that it does not know.
package busmsg

import (
	"time"

	"github.com/cmdexec/cmdexec/libs/core/fleet"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
)

// Result is a message of the RESULTS stream: a worker's result, with the
// worker id that the edge took from its token.
type Result struct {
	workerproto.Result
	EdgeID     string    `json:"edgeId"`
	ReceivedAt time.Time `json:"receivedAt"`
}

// BeatRequest goes from an edge to the leading scheduler. It carries whatever
// the edge's workers said since the last one.
type BeatRequest struct {
	EdgeID  string       `json:"edgeId"`
	Workers []WorkerBeat `json:"workers"`
}

// WorkerBeat is one worker's part of a beat. Within it, progress comes before
// the heartbeat in time. Each part may be absent.
type WorkerBeat struct {
	WorkerID  string `json:"workerId"`
	SessionID string `json:"sessionId"`
	// Hello is set on the first beat of a session: who the worker is, and every
	// lease that it still works on. A lease of an older session that is not
	// listed has ended.
	Hello   *fleet.Worker       `json:"hello,omitempty"`
	Holding []workerproto.Lease `json:"holding,omitempty"`
	// Closed: the session ended. Says nothing about its leases.
	Closed    bool                   `json:"closed,omitempty"`
	Progress  []Progress             `json:"progress,omitempty"`
	Heartbeat *workerproto.Heartbeat `json:"heartbeat,omitempty"`
}

// Progress is a worker's report about one lease.
type Progress struct {
	workerproto.Lease
	Step   workerproto.Type `json:"step"` // accepted, preparing, started, rejected
	At     time.Time        `json:"at"`
	Reason string           `json:"reason,omitempty"` // of a rejection
}

// Settled answers the request to settle a result.
type Settled struct{}

// BeatReply answers a BeatRequest with one WorkerReply for each of its workers
// that said hello or sent a heartbeat. A scheduler that does not lead does not
// answer at all.
type BeatReply struct {
	SchedulerID string        `json:"schedulerId"`
	Workers     []WorkerReply `json:"workers"`
}

// WorkerReply is what one worker is told. A lease in none of the lists was not
// decided.
type WorkerReply struct {
	WorkerID  string              `json:"workerId"`
	SessionID string              `json:"sessionId"`
	Confirmed []string            `json:"confirmed,omitempty"` // lease ids
	Stale     []workerproto.Lease `json:"stale,omitempty"`
	Cancel    []workerproto.Lease `json:"cancel,omitempty"`
	Drain     bool                `json:"drain,omitempty"`
}

// WorkerCommand goes from the leading scheduler to the edge that holds a
// worker's session. Nobody listening is a definitive answer: not delivered.
type WorkerCommand struct {
	Assign []workerproto.Assignment `json:"assign,omitempty"`
	Cancel []workerproto.Lease      `json:"cancel,omitempty"`
	Drain  *bool                    `json:"drain,omitempty"`
}

// WorkerCommandReply says what became of each assignment, in the order of the
// command. Delivered means handed to the session's socket, not more.
type WorkerCommandReply struct {
	SessionID string     `json:"sessionId"`
	Assign    []Delivery `json:"assign,omitempty"`
}

// Delivery is what became of one assignment. Not delivered is definitive: the
// worker will never see it.
type Delivery struct {
	LeaseID   string `json:"leaseId"`
	Delivered bool   `json:"delivered"`
	Reason    string `json:"reason,omitempty"`
}

// QueryError is how a query fails. Code is one of the constants.
type QueryError struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

// Error makes a QueryError an error.
func (e *QueryError) Error() string { return e.Code + ": " + e.Message }

// Codes of QueryError.
const (
	CodeNotFound    = "not_found"
	CodeBadRequest  = "bad_request"
	CodeUnavailable = "unavailable" // the answerer's own dependency is away
)

// GetJob asks the persister for one job of the database.
type GetJob struct {
	JobID string `json:"jobId"`
}

// ListJobs asks the persister for a page of jobs, newest first by
// (createdAt, id). Zero fields do not filter.
type ListJobs struct {
	Owner    string            `json:"owner,omitempty"`
	States   []job.State       `json:"states,omitempty"`
	Queue    string            `json:"queue,omitempty"`
	Labels   map[string]string `json:"labels,omitempty"`
	Since    time.Time         `json:"since,omitzero"`    // created at or after
	Until    time.Time         `json:"until,omitzero"`    // created before
	BeforeAt time.Time         `json:"beforeAt,omitzero"` // the page starts after this position
	BeforeID string            `json:"beforeId,omitempty"`
	Limit    int               `json:"limit"`
}

// JobPage answers ListJobs. AsOf is the time up to which the database has seen
// the registry.
type JobPage struct {
	Items []job.Record `json:"items"`
	More  bool         `json:"more"`
	AsOf  time.Time    `json:"asOf"`
}

// Stats answers a statistics query: jobs by state.
type Stats struct {
	ByState map[job.State]int64 `json:"byState"`
	AsOf    time.Time           `json:"asOf"`
}

// GetLogs asks the persister for stored output of one attempt in order of seq.
type GetLogs struct {
	JobID    string             `json:"jobId"`
	Attempt  int                `json:"attempt"`
	Stream   workerproto.Stream `json:"stream,omitempty"` // empty: all
	After    int64              `json:"after"`            // seq; only later chunks
	Limit    int                `json:"limit"`            // chunks
	MaxBytes int                `json:"maxBytes"`         // of data; at least one chunk is returned
}

// Logs answers GetLogs. StoredChunks, StoredBytes and Verdict are of the whole
// attempt, not of the page.
type Logs struct {
	Chunks       []workerproto.Chunk `json:"chunks"`
	More         bool                `json:"more"`
	StoredChunks int64               `json:"storedChunks"`
	StoredBytes  int64               `json:"storedBytes"`
	Verdict      LogVerdict          `json:"verdict,omitempty"`
}

// LogVerdict is what came of comparing an attempt's stored output with its
// manifest. Empty: not compared, or not yet, or chunks have arrived since.
type LogVerdict string

// The verdicts.
const (
	LogComplete   LogVerdict = "complete"   // count, bytes and hash are the manifest's
	LogIncomplete LogVerdict = "incomplete" // chunks are missing
	LogDiffers    LogVerdict = "differs"    // no chunk is missing, and bytes, hash or count are not the manifest's
)

// Bad reports whether the output is known not to be what the manifest declares.
func (v LogVerdict) Bad() bool { return v == LogIncomplete || v == LogDiffers }

// Explain asks the leading scheduler why a job is where it is.
type Explain struct {
	JobID string `json:"jobId"`
}

// Explanation answers Explain. Position counts from 1 and is 0 where the job
// does not wait for a worker.
type Explanation struct {
	JobID     string        `json:"jobId"`
	Position  int           `json:"position,omitempty"`
	BlockedBy []BlockReason `json:"blockedBy,omitempty"`
}

// BlockReason counts the workers that a reason keeps from a job.
type BlockReason struct {
	Reason  fleet.Block `json:"reason"`
	Workers int         `json:"workers"`
}

// ListWorkers asks the leading scheduler for every worker it knows.
type ListWorkers struct{}

// WorkerList answers ListWorkers.
type WorkerList struct {
	Items []WorkerState `json:"items"`
	AsOf  time.Time     `json:"asOf"`
}

// WorkerState is a worker with its load.
type WorkerState struct {
	fleet.Worker
	FreeSlots     int          `json:"freeSlots"`
	Running       int          `json:"running"`
	Status        fleet.Status `json:"status"`
	CPUUsage      float64      `json:"cpuUsage"`
	RAMUsage      float64      `json:"ramUsage"`
	SetAsideUntil time.Time    `json:"setAsideUntil,omitzero"`
	Reason        string       `json:"reason,omitempty"`
}

// OwnerCount asks the leading scheduler how many jobs of an owner have not
// ended.
type OwnerCount struct {
	Owner string `json:"owner"`
}

// OwnerCounts answers OwnerCount.
type OwnerCounts struct {
	Queued  int `json:"queued"` // waiting, retrying included
	Running int `json:"running"`
}

// DeadLetter wraps what a consumer could not handle.
type DeadLetter struct {
	Stream   string    `json:"stream"`
	Consumer string    `json:"consumer"`
	Subject  string    `json:"subject"`
	Sequence uint64    `json:"sequence"`
	Reason   string    `json:"reason"`
	At       time.Time `json:"at"`
	Data     []byte    `json:"data"`
}
