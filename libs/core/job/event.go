package job

import "time"

// Event is something that happened to a job, offered to Apply. The kinds are
// the types of this file; nothing else implements it.
type Event interface{ kind() Kind }

// Kind names a kind of event.
type Kind string

// The kinds of events, one for each type below.
const (
	KindAssign   Kind = "assign"
	KindReturn   Kind = "return"
	KindPrepare  Kind = "prepare"
	KindStart    Kind = "start"
	KindResult   Kind = "result"
	KindLost     Kind = "lost"
	KindCancel   Kind = "cancel"
	KindGiveUp   Kind = "give_up"
	KindDeadline Kind = "deadline"
	KindRequeue  Kind = "requeue"
	KindRelease  Kind = "release"
)

// Kinds lists every kind of event.
func Kinds() []Kind {
	return []Kind{
		KindAssign, KindReturn, KindPrepare, KindStart, KindResult, KindLost,
		KindCancel, KindGiveUp, KindDeadline, KindRequeue, KindRelease,
	}
}

// Fence names one dispatch of a job. An event that carries a fence is stale,
// and changes nothing, unless it is the record's current one.
type Fence struct {
	Attempt int
	LeaseID string
}

// Assign: the scheduler chose a worker. Raises the attempt.
type Assign struct {
	WorkerID string
	LeaseID  string
}

// Return: the assignment did not take effect, definitively: nobody received
// it, or the worker rejected it. Spends no budget.
type Return struct {
	Fence
	Outcome Outcome // OutcomeReturned or OutcomeRejected
	Message string
}

// Prepare: the worker accepted and prepares.
type Prepare struct {
	Fence
	AcceptedAt time.Time
}

// Start: the worker started the command.
type Start struct {
	Fence
	AcceptedAt time.Time
	PreparedAt time.Time
	StartedAt  time.Time
}

// Result: the worker reports how the attempt ended.
type Result struct {
	Fence
	WorkerID     string
	Outcome      Outcome
	Reason       Reason
	Message      string
	ExitCode     *int
	Signal       string
	OOMKilled    bool
	AcceptedAt   time.Time
	PreparedAt   time.Time
	StartedAt    time.Time // zero: the command never started
	FinishedAt   time.Time
	ImageDigest  string
	PeakMemoryMB int64
	CPUMs        int64
	Warm         bool
	Stop         *Cancel // the worker's part of the receipt; RequestedAt is ignored
	Manifest     *Manifest
}

// Lost: the lease ran out, or (Confirmed) the worker came back and does not
// hold it any more.
type Lost struct {
	Fence
	Confirmed bool
}

// CancelRequest: a user asked for the end of the job.
type CancelRequest struct{}

// GiveUp: the deadline of a cancel passed without a receipt.
type GiveUp struct{ Fence }

// Deadline: a deadline passed that the scheduler watches.
type Deadline struct{ Which Reason } // ReasonQueueTimeout, ReasonExecutionTimeout or ReasonTotalTimeout

// Requeue: the backoff is over.
type Requeue struct{}

// Release: what a reserved state waited for has come.
type Release struct{}

func (Assign) kind() Kind        { return KindAssign }
func (Return) kind() Kind        { return KindReturn }
func (Prepare) kind() Kind       { return KindPrepare }
func (Start) kind() Kind         { return KindStart }
func (Result) kind() Kind        { return KindResult }
func (Lost) kind() Kind          { return KindLost }
func (CancelRequest) kind() Kind { return KindCancel }
func (GiveUp) kind() Kind        { return KindGiveUp }
func (Deadline) kind() Kind      { return KindDeadline }
func (Requeue) kind() Kind       { return KindRequeue }
func (Release) kind() Kind       { return KindRelease }

// KindOf names the kind of an event, for logs and metrics.
func KindOf(e Event) Kind { return e.kind() }
