package gateway

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/fleet"
	"github.com/cmdexec/cmdexec/libs/core/job"
)

// explain says where a job is and why. known is the scheduler's word, nil where
// none answered. It is pure.
func explain(rec *job.Record, known *busmsg.Explanation, now time.Time) api.Explain {
	j := api.FromRecord(rec)
	out := api.Explain{
		JobID: rec.ID, Status: rec.State, Summary: summary(rec, known, now), Attempts: j.Attempts,
		NextRetryAt: j.NextRetryAt, Cancel: j.Cancel,
	}
	if !rec.State.Terminal() {
		out.AttemptsLeft, out.InfraBudgetLeft = rec.AttemptsLeft(), rec.InfraBudgetLeft()
	}
	if known != nil {
		out.Position = known.Position
		for _, b := range known.BlockedBy {
			out.BlockedBy = append(out.BlockedBy, api.BlockReason(b))
		}
	}
	return out
}

// summary is one sentence for a person.
func summary(rec *job.Record, known *busmsg.Explanation, now time.Time) string {
	switch rec.State {
	case job.Queued:
		return queuedSummary(rec, known, now)
	case job.Assigned:
		return fmt.Sprintf("Attempt %d was sent to worker %s %s ago, which has not reported that it began.", rec.Attempt, rec.WorkerID, ago(rec.StateAt, now))
	case job.Preparing:
		what := "writing the job's files"
		if rec.Spec.ContainerImage != "" {
			what = "pulling the image and writing the job's files"
		}
		return fmt.Sprintf("Worker %s has been %s for attempt %d for %s.", rec.WorkerID, what, rec.Attempt, ago(rec.StateAt, now))
	case job.Running:
		return fmt.Sprintf("Attempt %d has been running on worker %s for %s, of at most %d seconds.", rec.Attempt, rec.WorkerID, ago(rec.StateAt, now), rec.Spec.Timeout)
	case job.Retrying:
		return fmt.Sprintf("Attempt %d ended: %s. The next one may start in %s.", rec.Attempt, reasonText(rec), until(rec.RetryAt, now))
	case job.Canceling:
		return fmt.Sprintf("A cancel was asked for %s ago; worker %s has not confirmed yet that the command is gone.", ago(rec.StateAt, now), rec.WorkerID)
	case job.Succeeded:
		return fmt.Sprintf("The command succeeded on worker %s%s.", rec.WorkerID, attemptsText(rec))
	case job.Failed:
		return fmt.Sprintf("The job failed: %s%s.", reasonText(rec), attemptsText(rec))
	case job.TimedOut:
		return fmt.Sprintf("The job was stopped: %s%s.", reasonText(rec), attemptsText(rec))
	case job.Canceled:
		return canceledSummary(rec)
	case job.Expired:
		return fmt.Sprintf("The job never started: %s.", reasonText(rec))
	case job.Blocked:
		return "The job waits for other jobs."
	case job.Scheduled:
		return "The job waits for its time."
	case job.Held:
		return "The job is held until a person releases it."
	default:
		return "The job is in a state that this server does not know."
	}
}

func queuedSummary(rec *job.Record, known *busmsg.Explanation, now time.Time) string {
	waits := fmt.Sprintf("The job has waited in queue %s for %s", rec.Spec.Queue, ago(rec.StateAt, now))
	switch {
	case known == nil:
		return waits + "; no scheduler answers, so nothing is being started."
	case len(known.BlockedBy) == 0 && known.Position == 0:
		return waits + "; the scheduler is about to place it."
	case len(known.BlockedBy) == 0:
		return fmt.Sprintf("%s, at position %d.", waits, known.Position)
	}
	total := 0
	for _, b := range known.BlockedBy {
		total += b.Workers
	}
	if total == 0 {
		return waits + "; no worker is known."
	}
	var parts []string
	for _, b := range known.BlockedBy {
		if b.Workers > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", b.Workers, blockText(b.Reason, rec)))
		}
	}
	where := ""
	if known.Position > 0 {
		where = fmt.Sprintf(" at position %d", known.Position)
	}
	if slices.ContainsFunc(known.BlockedBy, func(b busmsg.BlockReason) bool { return b.Reason == fleet.BlockOwner }) {
		where += ", since as many of its user's jobs run as may"
	}
	return fmt.Sprintf("%s%s: of %s, %s.", waits, where, count(total, "worker"), strings.Join(parts, ", "))
}

// blockText continues "of 3 workers, 2 ...".
func blockText(b fleet.Block, rec *job.Record) string {
	switch b {
	case fleet.BlockExecutor:
		return "cannot run " + rec.Spec.Executor() + " jobs"
	case fleet.BlockOS:
		return "have another operating system"
	case fleet.BlockArch:
		return "have another architecture"
	case fleet.BlockLabels:
		return "lack the labels asked for"
	case fleet.BlockTooBig:
		return "offer less CPU or memory than asked for"
	case fleet.BlockOffline:
		return "are offline"
	case fleet.BlockDraining:
		return "are draining"
	case fleet.BlockSetAside:
		return "are set aside after failures"
	case fleet.BlockSlots:
		return "have no free slot"
	case fleet.BlockCPU:
		return "have no free CPU"
	case fleet.BlockMemory:
		return "have no free memory"
	case fleet.BlockOwner:
		return "could run it when one of those has ended"
	default:
		return "say " + string(b)
	}
}

func canceledSummary(rec *job.Record) string {
	c := rec.Cancel
	switch {
	case rec.Attempt == 0:
		return "The job was canceled before it started."
	case c != nil && c.StopUnconfirmed:
		return fmt.Sprintf("The job was canceled, but worker %s did not confirm that the command is gone.", rec.WorkerID)
	case c != nil && !c.SignalledAt.IsZero():
		return fmt.Sprintf("The job was canceled and its command on worker %s was stopped.", rec.WorkerID)
	default:
		return "The job was canceled."
	}
}

// reasonText says a record's reason in words.
func reasonText(rec *job.Record) string {
	text := ""
	switch rec.Reason {
	case job.ReasonExitCode:
		text = "the command ended with an exit code other than 0"
		if rec.ExitCode != nil {
			text = fmt.Sprintf("the command ended with exit code %d", *rec.ExitCode)
		}
	case job.ReasonSignaled:
		text = "the command died of a signal"
		if rec.Signal != "" {
			text = "the command died of " + rec.Signal
		}
	case job.ReasonOOMKilled:
		text = fmt.Sprintf("the command used more memory than its %d MiB", rec.Spec.Resources.MemoryMB)
	case job.ReasonStartFailed:
		text = "the command could not be started"
	case job.ReasonExecutionTimeout:
		text = fmt.Sprintf("the command ran longer than %d seconds", rec.Spec.Timeout)
	case job.ReasonTotalTimeout:
		text = fmt.Sprintf("it took longer than %d seconds in all", rec.Spec.Timeouts.Total)
	case job.ReasonQueueTimeout:
		text = fmt.Sprintf("it waited longer than %d seconds", rec.Spec.Timeouts.Queue)
	case job.ReasonPrepareTimeout:
		text = fmt.Sprintf("preparing took longer than %d seconds", rec.Spec.Timeouts.Prepare)
	case job.ReasonCanceled:
		text = "it was canceled"
	case job.ReasonWorkerLost:
		text = "worker " + rec.WorkerID + " was lost"
	case job.ReasonWorkerStopped:
		text = "worker " + rec.WorkerID + " shut down"
	case job.ReasonWorkerError:
		text = "worker " + rec.WorkerID + " failed"
	case job.ReasonLeaseLost:
		text = "worker " + rec.WorkerID + " lost its connection and stopped the command"
	case job.ReasonImagePullFailed:
		text = "the image could not be pulled"
	case job.ReasonEngineError:
		text = "the container engine failed"
	case job.ReasonDiskFull:
		text = "the worker's disk is full"
	case job.ReasonNotDelivered:
		text = "the worker could not be reached"
	case job.ReasonRejected:
		text = "the worker did not take it"
	case job.ReasonRegistryReset:
		text = "the registry of live jobs was lost"
	case "":
		text = "no reason is known"
	default:
		text = string(rec.Reason)
	}
	if rec.Message != "" && rec.Reason != job.ReasonRegistryReset {
		text += " (" + rec.Message + ")"
	}
	return text
}

func attemptsText(rec *job.Record) string {
	if rec.Attempt < 2 {
		return ""
	}
	return fmt.Sprintf(", after %d attempts", rec.Attempt)
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// ago writes a duration as people say it.
func ago(t, now time.Time) string { return span(now.Sub(t)) }

func until(t, now time.Time) string { return span(t.Sub(now)) }

func span(d time.Duration) string {
	switch {
	case d < time.Second:
		return "less than a second"
	case d < 2*time.Minute:
		return count(int(d/time.Second), "second")
	case d < 2*time.Hour:
		return count(int(d/time.Minute), "minute")
	default:
		return count(int(d/time.Hour), "hour")
	}
}
