package job

import (
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// Schema is the version of Record's JSON form. A reader refuses a newer one.
const Schema = 1

// Record is what the registry keeps of one job: what was asked, where it is,
// and how it came there. It is a value: Apply returns a new one and never
// changes what its argument points to.
type Record struct {
	Schema    int       `json:"schema"`
	ID        string    `json:"id"`
	Owner     string    `json:"owner"`
	Version   uint64    `json:"version"` // 1 at creation, raised by every transition
	State     State     `json:"state"`
	Spec      Spec      `json:"spec"`
	CreatedAt time.Time `json:"createdAt"`
	StateAt   time.Time `json:"stateAt"`

	StartedAt  time.Time `json:"startedAt,omitzero"`  // when any attempt first ran the command
	FinishedAt time.Time `json:"finishedAt,omitzero"` // when the state became terminal

	Attempt       int       `json:"attempt,omitempty"`  // number of the last dispatch; the fence
	LeaseID       string    `json:"leaseId,omitempty"`  // of that dispatch; empty when it never took effect
	WorkerID      string    `json:"workerId,omitempty"` // of that dispatch
	UserFailures  int       `json:"userFailures,omitempty"`
	InfraFailures int       `json:"infraFailures,omitempty"`
	RetryAt       time.Time `json:"retryAt,omitzero"` // set while retrying

	Reason    Reason    `json:"reason,omitempty"`
	Message   string    `json:"message,omitempty"`
	ExitCode  *int      `json:"exitCode,omitempty"`
	Signal    string    `json:"signal,omitempty"`
	OOMKilled bool      `json:"oomKilled,omitempty"`
	Cancel    *Cancel   `json:"cancel,omitempty"`
	Attempts  []Attempt `json:"attempts,omitempty"` // the last MaxAttemptsKept, oldest first
	RerunOf   string    `json:"rerunOf,omitempty"`

	Keyed    bool   `json:"keyed,omitempty"`    // created with an Idempotency-Key
	SpecHash string `json:"specHash,omitempty"` // of the normalised spec, when Keyed
}

// Attempt is one try on one worker.
type Attempt struct {
	Number     int       `json:"number"`
	LeaseID    string    `json:"leaseId"`
	WorkerID   string    `json:"workerId"`
	AssignedAt time.Time `json:"assignedAt"`
	AcceptedAt time.Time `json:"acceptedAt,omitzero"`
	PreparedAt time.Time `json:"preparedAt,omitzero"`
	StartedAt  time.Time `json:"startedAt,omitzero"`
	FinishedAt time.Time `json:"finishedAt,omitzero"`
	DurationMs int64     `json:"durationMs,omitempty"` // of the command, by the worker's clock

	Outcome      Outcome `json:"outcome,omitempty"`
	Reason       Reason  `json:"reason,omitempty"`
	ExitCode     *int    `json:"exitCode,omitempty"`
	Signal       string  `json:"signal,omitempty"`
	OOMKilled    bool    `json:"oomKilled,omitempty"`
	ImageDigest  string  `json:"imageDigest,omitempty"`
	PeakMemoryMB int64   `json:"peakMemoryMb,omitempty"`
	CPUMs        int64   `json:"cpuMs,omitempty"`
	Warm         bool    `json:"warm,omitempty"`

	Manifest *Manifest `json:"manifest,omitempty"`
	// LogsIncomplete says that the stored output was compared with the manifest and
	// is not what that declares. Only answers of the database have it: the registry
	// never does.
	LogsIncomplete bool `json:"logsIncomplete,omitempty"`
}

// Manifest declares all the output of one attempt, so that a stored log is
// known to be complete or known not to be.
type Manifest struct {
	Chunks         int64  `json:"chunks"`
	Bytes          int64  `json:"bytes"`                    // kept, both streams together
	SHA256         string `json:"sha256,omitempty"`         // over the kept chunks' data in order of seq, hex
	TruncatedBytes int64  `json:"truncatedBytes,omitempty"` // produced and not kept
}

// Cancel is the receipt trail of a cancel. Times are the server's for
// RequestedAt and the worker's, kept between that and now, for the rest.
type Cancel struct {
	RequestedAt     time.Time `json:"requestedAt"`
	DeliveredAt     time.Time `json:"deliveredAt,omitzero"`
	SignalledAt     time.Time `json:"signalledAt,omitzero"`
	ExitedAt        time.Time `json:"exitedAt,omitzero"`
	GoneAt          time.Time `json:"goneAt,omitzero"`
	StopUnconfirmed bool      `json:"stopUnconfirmed,omitempty"`
}

// New returns the record of a job that was just submitted, in state queued.
// The spec must be normalised.
func New(jobID, owner string, spec Spec, now time.Time) Record {
	now = Timestamp(now)
	return Record{
		Schema: Schema, ID: jobID, Owner: owner, Version: 1, State: Queued, Spec: spec,
		CreatedAt: now, StateAt: now,
	}
}

// WithIdempotency marks a new record as created under an idempotency key.
func (r Record) WithIdempotency() Record {
	r.Keyed, r.SpecHash = true, r.Spec.Hash()
	return r
}

// WithRerunOf marks a new record as a repetition of another job.
func (r Record) WithRerunOf(jobID string) Record {
	r.RerunOf = jobID
	return r
}

// Last returns the newest attempt, or nil. It points into r.Attempts.
func (r *Record) Last() *Attempt {
	if len(r.Attempts) == 0 {
		return nil
	}
	return &r.Attempts[len(r.Attempts)-1]
}

// Fence identifies the current dispatch of the record.
func (r *Record) Fence() Fence { return Fence{Attempt: r.Attempt, LeaseID: r.LeaseID} }

// AttemptsLeft is how many further attempts the command's own failures may take.
func (r *Record) AttemptsLeft() int { return max(0, r.Spec.Retry.MaxAttempts-r.UserFailures) }

// InfraBudgetLeft is how many further infra failures are forgiven.
func (r *Record) InfraBudgetLeft() int { return max(0, InfraBudget-r.InfraFailures) }

// Timestamp is the form in which times are kept: UTC, whole milliseconds.
func Timestamp(t time.Time) time.Time { return t.UTC().Truncate(time.Millisecond) }

// clone returns a copy of r whose attempts and cancel trail may be changed.
func (r Record) clone() Record {
	r.Attempts = slices.Clone(r.Attempts)
	if r.Cancel != nil {
		c := *r.Cancel
		r.Cancel = &c
	}
	return r
}

// clip cuts text that came from a worker to what a record keeps.
func clip(s string, most int) string {
	s = strings.ToValidUTF8(s, "\uFFFD")
	if len(s) <= most {
		return s
	}
	for most > 0 && !utf8.RuneStart(s[most]) {
		most--
	}
	return s[:most]
}
