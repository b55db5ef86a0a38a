package job

// Reason says in one stable word why a job or an attempt is where it is.
type Reason string

// Class says whose matter a reason is, and so which budget it spends.
type Class string

// The classes of reasons.
const (
	ClassUser     Class = "user"     // the command itself; spends retry.maxAttempts
	ClassInfra    Class = "infra"    // workers, images, engines; spends the infra budget
	ClassPolicy   Class = "policy"   // a deadline or a rule that the job or an owner set
	ClassOperator Class = "operator" // a person who runs the system
)

// The reasons.
const (
	ReasonExitCode         Reason = "exit_code"         // exit code other than 0
	ReasonSignaled         Reason = "signaled"          // died of a signal that nobody here sent
	ReasonOOMKilled        Reason = "oom_killed"        // over its memory limit
	ReasonStartFailed      Reason = "start_failed"      // the command could not be started as it was asked for
	ReasonExecutionTimeout Reason = "execution_timeout" // the command ran past timeout
	ReasonTotalTimeout     Reason = "total_timeout"     // the job took longer than timeouts.total
	ReasonQueueTimeout     Reason = "queue_timeout"     // the job waited longer than timeouts.queue
	ReasonPrepareTimeout   Reason = "prepare_timeout"   // preparing took longer than timeouts.prepare
	ReasonCanceled         Reason = "canceled"          // a user asked for it
	ReasonWorkerLost       Reason = "worker_lost"       // the lease ran out, or its worker came back without it
	ReasonWorkerStopped    Reason = "worker_stopped"    // the worker shut down and stopped the command
	ReasonWorkerError      Reason = "worker_error"      // the worker failed on its own side
	ReasonLeaseLost        Reason = "lease_lost"        // the worker stopped the command because its lease was not confirmed
	ReasonImagePullFailed  Reason = "image_pull_failed"
	ReasonEngineError      Reason = "engine_error" // the container engine failed
	ReasonDiskFull         Reason = "disk_full"    // the worker's disk
	ReasonNotDelivered     Reason = "not_delivered"
	ReasonRejected         Reason = "rejected" // the worker said no: busy, draining, cannot
	ReasonRegistryReset    Reason = "registry_reset"
)

// Class returns the class of r. A word that is not known here (from a newer
// worker) counts as the user's: it must not draw on the infra budget.
func (r Reason) Class() Class {
	switch r {
	case ReasonWorkerLost, ReasonWorkerStopped, ReasonWorkerError, ReasonLeaseLost, ReasonImagePullFailed,
		ReasonEngineError, ReasonDiskFull, ReasonPrepareTimeout, ReasonNotDelivered:
		return ClassInfra
	case ReasonTotalTimeout, ReasonQueueTimeout, ReasonRejected:
		return ClassPolicy
	case ReasonRegistryReset:
		return ClassOperator
	default:
		return ClassUser
	}
}

// Outcome is how one attempt ended.
type Outcome string

// The outcomes. The first five come from a worker; the others are decided here.
const (
	OutcomeSucceeded Outcome = "succeeded"
	OutcomeFailed    Outcome = "failed"
	OutcomeTimedOut  Outcome = "timed_out"
	OutcomeCanceled  Outcome = "canceled"
	OutcomeRejected  Outcome = "rejected" // the worker did not take it
	OutcomeReturned  Outcome = "returned" // it never reached the worker
	OutcomeLost      Outcome = "lost"     // the lease ran out
)

// FromWorker reports whether a worker may report this outcome.
func (o Outcome) FromWorker() bool {
	switch o {
	case OutcomeSucceeded, OutcomeFailed, OutcomeTimedOut, OutcomeCanceled, OutcomeRejected:
		return true
	default:
		return false
	}
}
