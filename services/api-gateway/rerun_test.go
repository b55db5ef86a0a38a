package gateway

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/client"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
)

func TestRerun(t *testing.T) {
	e := start(t, nil)
	ann, bob, root := token(t, "ann", auth.RoleUser), token(t, "bob", auth.RoleUser), token(t, "root", auth.RoleAdmin)
	old := e.do("POST", "/api/jobs/create", ann, `{"command":["a","b"],"env":{"A":"1"},"files":[{"path":"x","content":"y"}],"stdin":"in"}`).job(t)
	rerun := func(tok, jobID string, headers ...string) answer {
		return e.do("POST", "/api/jobs/rerun", tok, fmt.Sprintf(`{"jobId":%q}`, jobID), headers...)
	}
	a := rerun(ann, old.JobID)
	require.Equal(t, 201, a.status, "%s", a.body)
	again := a.job(t)
	require.Equal(t, "/api/jobs/"+again.JobID, a.header.Get("Location"))
	require.NotEqual(t, old.JobID, again.JobID)
	require.Equal(t, old.JobID, again.RerunOf)
	require.Equal(t, old.Spec, again.Spec)
	require.Equal(t, job.Queued, again.Status)
	require.Zero(t, again.Attempt)
	require.Equal(t, old.JobID, e.do("GET", "/api/jobs/"+again.JobID, ann, "").job(t).RerunOf, "the link is stored")

	foreign := rerun(bob, old.JobID)
	require.Equal(t, 404, foreign.status)
	require.Equal(t, "job_not_found", foreign.problem(t).Code)
	require.Equal(t, "root", rerun(root, old.JobID).job(t).Owner, "whoever reruns a job owns the new one")
	require.Equal(t, 404, rerun(ann, newID()).status)
	require.Equal(t, "bad_job_id", rerun(ann, "job-*").problem(t).Code)
	require.Equal(t, "unknown_field", e.do("POST", "/api/jobs/rerun", ann, `{"jobId":"x","command":"y"}`).problem(t).Code)

	// Also when the job is in the database only, and not when nobody can say.
	e.runs(old.JobID, 1)
	e.move(old.JobID, ended(1, job.OutcomeFailed, 3, nil))
	e.leave(old.JobID)
	late := rerun(ann, old.JobID)
	require.Equal(t, 201, late.status, "%s", late.body)
	require.Equal(t, "in", late.job(t).Stdin)
	e.store.setAway(true)
	require.Equal(t, 503, rerun(ann, old.JobID).status)
	e.store.setAway(false)

	// Under a key it is one job, which is neither another rerun nor a create.
	first := rerun(ann, old.JobID, "Idempotency-Key", "k")
	require.Equal(t, 201, first.status)
	replay := rerun(ann, old.JobID, "Idempotency-Key", "k")
	require.Equal(t, 200, replay.status)
	require.Equal(t, "true", replay.header.Get("Idempotency-Replayed"))
	require.Equal(t, first.job(t).JobID, replay.job(t).JobID)
	require.Equal(t, "idempotency_key_reused", rerun(ann, again.JobID, "Idempotency-Key", "k").problem(t).Code, "the same spec, another job")
	require.Equal(t, "bad_idempotency_key", rerun(ann, again.JobID, "Idempotency-Key", "a b").problem(t).Code)

	byClient, err := e.sdk("ann").Rerun(t.Context(), old.JobID, client.CreateOptions{IdempotencyKey: "k"})
	require.NoError(t, err)
	require.True(t, byClient.Replayed)
}
