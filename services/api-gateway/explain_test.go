package gateway

import (
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/fleet"
	"github.com/cmdexec/cmdexec/libs/core/job"
)

func TestSummary(t *testing.T) {
	now := time.Date(2026, 11, 24, 8, 0, 0, 0, time.UTC)
	seven := 7
	base := func(state job.State, change func(*job.Record)) *job.Record {
		r := &job.Record{
			State: state, StateAt: now.Add(-90 * time.Second), Attempt: 1, WorkerID: "w1",
			Spec: job.Spec{Queue: "default", Timeout: 300},
		}
		if change != nil {
			change(r)
		}
		return r
	}
	blocked := func(b ...busmsg.BlockReason) *busmsg.Explanation {
		return &busmsg.Explanation{Position: 3, BlockedBy: b}
	}
	for _, c := range []struct {
		rec   *job.Record
		known *busmsg.Explanation
		want  string
	}{
		{base(job.Queued, nil), nil, "The job has waited in queue default for 90 seconds; no scheduler answers, so nothing is being started."},
		{base(job.Queued, nil), &busmsg.Explanation{}, "The job has waited in queue default for 90 seconds; the scheduler is about to place it."},
		{base(job.Queued, nil), blocked(), "The job has waited in queue default for 90 seconds, at position 3."},
		{base(job.Queued, nil), blocked(busmsg.BlockReason{Reason: fleet.BlockOS}), "The job has waited in queue default for 90 seconds; no worker is known."},
		{
			base(job.Queued, nil), blocked(busmsg.BlockReason{Reason: fleet.BlockSlots, Workers: 2}, busmsg.BlockReason{Reason: fleet.BlockExecutor, Workers: 1}),
			"The job has waited in queue default for 90 seconds at position 3: of 3 workers, 2 have no free slot, 1 cannot run process jobs.",
		},
		{base(job.Assigned, nil), nil, "Attempt 1 was sent to worker w1 90 seconds ago, which has not reported that it began."},
		{base(job.Preparing, nil), nil, "Worker w1 has been writing the job's files for attempt 1 for 90 seconds."},
		{base(job.Preparing, func(r *job.Record) { r.Spec.ContainerImage = "alpine" }), nil, "Worker w1 has been pulling the image and writing the job's files for attempt 1 for 90 seconds."},
		{base(job.Running, nil), nil, "Attempt 1 has been running on worker w1 for 90 seconds, of at most 300 seconds."},
		{base(job.Retrying, func(r *job.Record) {
			r.Reason, r.ExitCode, r.RetryAt = job.ReasonExitCode, &seven, now.Add(time.Second)
		}), nil, "Attempt 1 ended: the command ended with exit code 7. The next one may start in 1 second."},
		{base(job.Canceling, nil), nil, "A cancel was asked for 90 seconds ago; worker w1 has not confirmed yet that the command is gone."},
		{base(job.Succeeded, nil), nil, "The command succeeded on worker w1."},
		{base(job.Failed, func(r *job.Record) { r.Reason, r.Attempt = job.ReasonWorkerLost, 4 }), nil, "The job failed: worker w1 was lost, after 4 attempts."},
		{base(job.Failed, func(r *job.Record) { r.Reason, r.Message = job.ReasonImagePullFailed, "no such image" }), nil, "The job failed: the image could not be pulled (no such image)."},
		{base(job.TimedOut, func(r *job.Record) { r.Reason = job.ReasonExecutionTimeout }), nil, "The job was stopped: the command ran longer than 300 seconds."},
		{base(job.Canceled, func(r *job.Record) { r.Attempt = 0 }), nil, "The job was canceled before it started."},
		{base(job.Canceled, func(r *job.Record) { r.Cancel = &job.Cancel{SignalledAt: now} }), nil, "The job was canceled and its command on worker w1 was stopped."},
		{base(job.Canceled, func(r *job.Record) { r.Cancel = &job.Cancel{StopUnconfirmed: true} }), nil, "The job was canceled, but worker w1 did not confirm that the command is gone."},
		{base(job.Canceled, nil), nil, "The job was canceled."},
		{base(job.Expired, func(r *job.Record) { r.Reason, r.Spec.Timeouts.Queue = job.ReasonQueueTimeout, 60 }), nil, "The job never started: it waited longer than 60 seconds."},
		{base(job.Blocked, nil), nil, "The job waits for other jobs."},
		{base(job.Scheduled, nil), nil, "The job waits for its time."},
		{base(job.Held, nil), nil, "The job is held until a person releases it."},
	} {
		require.Equal(t, c.want, summary(c.rec, c.known, now))
	}
	for _, s := range job.States() {
		text := summary(base(s, nil), nil, now)
		require.True(t, strings.HasSuffix(text, ".") && !strings.Contains(text, "does not know"), "%s: %s", s, text)
	}
}

// TestEveryReasonHasWords: no reason that core knows is shown as its bare word.
func TestEveryReasonHasWords(t *testing.T) {
	for _, r := range []job.Reason{
		job.ReasonExitCode, job.ReasonSignaled, job.ReasonOOMKilled, job.ReasonStartFailed, job.ReasonExecutionTimeout,
		job.ReasonTotalTimeout, job.ReasonQueueTimeout, job.ReasonPrepareTimeout, job.ReasonCanceled, job.ReasonWorkerLost,
		job.ReasonWorkerStopped, job.ReasonWorkerError, job.ReasonLeaseLost, job.ReasonImagePullFailed, job.ReasonEngineError,
		job.ReasonDiskFull, job.ReasonNotDelivered, job.ReasonRejected, job.ReasonRegistryReset, "",
	} {
		text := reasonText(&job.Record{Reason: r})
		require.NotEqual(t, string(r), text)
		require.Contains(t, text, " ")
	}
}

func TestAUserAtTheLimitIsToldSo(t *testing.T) {
	rec := &job.Record{State: job.Queued, Spec: job.Spec{Queue: "default"}}
	e := explain(rec, &busmsg.Explanation{Position: 3, BlockedBy: []busmsg.BlockReason{{Reason: fleet.BlockOwner, Workers: 2}}}, rec.StateAt)
	require.Equal(t, "The job has waited in queue default for less than a second at position 3, since as many of its user's jobs run as may"+
		": of 2 workers, 2 could run it when one of those has ended.", e.Summary)
}

func TestEveryBlockHasWords(t *testing.T) {
	for _, b := range []fleet.Block{
		fleet.BlockExecutor, fleet.BlockOS, fleet.BlockArch, fleet.BlockLabels, fleet.BlockTooBig, fleet.BlockOffline,
		fleet.BlockDraining, fleet.BlockSetAside, fleet.BlockSlots, fleet.BlockCPU, fleet.BlockMemory, fleet.BlockOwner,
	} {
		require.NotEqual(t, "say "+string(b), blockText(b, &job.Record{}))
	}
}

func TestExplainBudgets(t *testing.T) {
	rec := &job.Record{State: job.Queued, Spec: job.Spec{Retry: job.Retry{MaxAttempts: 3}}, UserFailures: 1, InfraFailures: 1}
	e := explain(rec, nil, time.Now())
	require.Equal(t, 2, e.AttemptsLeft)
	require.Equal(t, job.InfraBudget-1, e.InfraBudgetLeft)
	rec.State = job.Failed
	e = explain(rec, nil, time.Now())
	require.Zero(t, e.AttemptsLeft, "a job that ended has no attempts left")
	require.Zero(t, e.InfraBudgetLeft)
}
