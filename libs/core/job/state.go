package job

// State is where a job is. The API's status is this word.
type State string

// The states of a job. Each comment says who moves a job into it.
const (
	Queued    State = "queued"    // gateway at submit; scheduler after a backoff or an undelivered assignment
	Assigned  State = "assigned"  // scheduler: a worker holds the lease, nothing is known to run yet
	Preparing State = "preparing" // scheduler, on the worker's report: the image is pulled, inputs are written
	Running   State = "running"   // scheduler, on the worker's report: the command runs
	Retrying  State = "retrying"  // collector or scheduler: waits for its backoff
	Canceling State = "canceling" // gateway: a stop was asked for and is not proven yet
	Succeeded State = "succeeded" // collector: the command ended with exit code 0
	Failed    State = "failed"    // collector or scheduler: no attempt left
	TimedOut  State = "timed_out" // collector or scheduler: the execution or total timeout passed
	Canceled  State = "canceled"  // gateway (nothing ran) or collector (with the receipt)
	Expired   State = "expired"   // scheduler: never started in time

	Blocked   State = "blocked"   // reserved: waits for other jobs
	Scheduled State = "scheduled" // reserved: waits for a time
	Held      State = "held"      // reserved: waits for a person
)

// States lists every state, those that are reserved included.
func States() []State {
	return []State{
		Queued, Assigned, Preparing, Running, Retrying, Canceling,
		Succeeded, Failed, TimedOut, Canceled, Expired, Blocked, Scheduled, Held,
	}
}

// Terminal reports whether a job in this state has ended. A terminal state is
// absorbing: no event changes it.
func (s State) Terminal() bool {
	switch s {
	case Succeeded, Failed, TimedOut, Canceled, Expired:
		return true
	default:
		return false
	}
}

// Leased reports whether a worker may be holding the job's lease.
func (s State) Leased() bool {
	switch s {
	case Assigned, Preparing, Running, Canceling:
		return true
	default:
		return false
	}
}

// Valid reports whether s is one of States.
func (s State) Valid() bool {
	switch s {
	case Queued, Assigned, Preparing, Running, Retrying, Canceling, Blocked, Scheduled, Held:
		return true
	default:
		return s.Terminal()
	}
}
