package gateway

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
)

func (e *env) cancelBatch(tok, body string) api.CancelBatchResult {
	e.Helper()
	a := e.do("POST", "/api/jobs/cancel-batch", tok, body)
	require.Equal(e, 200, a.status, "%s", a.body)
	var r api.CancelBatchResult
	require.NoError(e, json.Unmarshal(a.body, &r))
	require.Equal(e, r.Matched, r.Canceled+r.Canceling+r.Ended+len(r.Failed))
	require.Len(e, r.Items, r.Matched-len(r.Failed))
	return r
}

func (e *env) state(jobID string) job.State {
	e.Helper()
	entry, err := e.conn.Registry().GetLatest(e.Context(), jobID)
	require.NoError(e, err)
	return entry.Record.State
}

func TestCancelBatch(t *testing.T) {
	e := start(t, nil)
	e.store.setAway(true) // the database is not needed
	ann, bob, root := token(t, "ann", auth.RoleUser), token(t, "bob", auth.RoleUser), token(t, "root", auth.RoleAdmin)
	create := func(tok, extra string) string {
		return e.do("POST", "/api/jobs/create", tok, `{"command":"true"`+extra+`}`).job(t).JobID
	}
	plain := create(ann, "")
	labeled := create(ann, `,"labels":{"team":"x","tier":"1"}`)
	queued := create(ann, `,"queue":"slow"`)
	running := create(ann, `,"queue":"slow"`)
	e.runs(running, 1)
	bobs := create(bob, `,"queue":"slow","labels":{"team":"x"}`)

	r := e.cancelBatch(ann, `{"labels":{"team":"x"}}`)
	require.Equal(t, 1, r.Canceled, "somebody else's jobs are not meant")
	require.Equal(t, []api.CancelItem{{JobID: labeled, Status: job.Canceled}}, r.Items)
	require.False(t, r.More)
	require.Zero(t, e.cancelBatch(ann, `{"labels":{"team":"x","tier":"2"}}`).Matched)

	r = e.cancelBatch(ann, `{"queue":"slow"}`)
	require.Equal(t, 1, r.Canceled)
	require.Equal(t, 1, r.Canceling)
	require.Equal(t, job.Canceled, e.state(queued))
	require.Equal(t, job.Canceling, e.state(running))
	require.Zero(t, e.cancelBatch(ann, `{"queue":"slow"}`).Matched, "what is being canceled is not canceled again")
	require.Equal(t, 1, e.cancelBatch(ann, `{"status":["canceling"]}`).Canceling, "unless it is asked for")

	future := time.Now().Add(time.Hour).UTC().Format(time.RFC3339)
	require.Zero(t, e.cancelBatch(ann, `{"since":"`+future+`"}`).Matched)
	require.Zero(t, e.cancelBatch(ann, `{"until":"2020-01-01T00:00:00Z"}`).Matched)
	require.Equal(t, 1, e.cancelBatch(ann, `{"until":"`+future+`"}`).Canceled)
	require.Equal(t, job.Canceled, e.state(plain))

	// Admins: their own jobs, or those of the one they name.
	require.Equal(t, "admin_only", e.do("POST", "/api/jobs/cancel-batch", ann, `{"owner":"bob"}`).problem(t).Code)
	require.Zero(t, e.cancelBatch(root, `{"queue":"slow"}`).Matched)
	require.Equal(t, job.Queued, e.state(bobs))
	require.Equal(t, 1, e.cancelBatch(root, `{"owner":"bob"}`).Canceled)
	require.Equal(t, job.Canceled, e.state(bobs))

	// Named jobs.
	e.store.setAway(false)
	one, two := create(ann, ""), create(ann, `,"queue":"slow"`)
	r = e.cancelBatch(ann, fmt.Sprintf(`{"jobIds":[%q,%q,%q,%q,%q,%q],"queue":"slow"}`, one, two, plain, queued, bobs, two))
	require.Equal(t, 1, r.Canceled, "both filters hold")
	require.Equal(t, 1, r.Ended, "a named job that had ended is said to have")
	require.Len(t, r.Failed, 1)
	require.Equal(t, bobs, r.Failed[0].JobID)
	require.Equal(t, "job_not_found", r.Failed[0].Problem.Code)
	require.Equal(t, job.Queued, e.state(one))
	require.Equal(t, job.Canceled, e.state(two))

	byClient, err := e.sdk("ann").CancelBatch(t.Context(), api.CancelBatchRequest{Status: []job.State{job.Queued}})
	require.NoError(t, err)
	require.Equal(t, 1, byClient.Canceled)

	for body, code := range map[string]string{
		`{}`:                           "invalid_field",
		`{"jobIds":[]}`:                "invalid_field",
		`{"status":["succeeded"]}`:     "invalid_field",
		`{"status":["done"]}`:          "invalid_field",
		`{"status":"queued"}`:          "invalid_field",
		`{"queue":"A"}`:                "invalid_field",
		`{"labels":{"a b":"c"}}`:       "invalid_field",
		`{"since":"yesterday"}`:        "invalid_field",
		`{"jobIds":["job-*"]}`:         "bad_job_id",
		`{"state":["queued"]}`:         "unknown_field",
		`{"queue":"a","queue":"b"}`:    "bad_json",
		`{"jobIds":["` + one + `",1]}`: "invalid_field",
	} {
		require.Equal(t, code, e.do("POST", "/api/jobs/cancel-batch", ann, body).problem(t).Code, body)
	}
}

// TestExplainShowsTheReceipt: how far a cancel has come, from the request on.
func TestExplainShowsTheReceipt(t *testing.T) {
	e := start(t, nil)
	jobID := e.create("ann")
	e.runs(jobID, 1)
	e.move(jobID, job.CancelRequest{})
	c := e.sdk("ann")
	x, err := c.Explain(t.Context(), jobID)
	require.NoError(t, err)
	require.NotNil(t, x.Cancel)
	require.False(t, x.Cancel.RequestedAt.IsZero())
	require.Nil(t, x.Cancel.SignalledAt)
	require.NotNil(t, x.Attempts[0].StartedAt)
	now := time.Now()
	result := ended(1, job.OutcomeCanceled, 143, nil)
	result.Stop = &job.Cancel{DeliveredAt: now, SignalledAt: now, ExitedAt: now, GoneAt: now}
	e.move(jobID, result)
	x, err = c.Explain(t.Context(), jobID)
	require.NoError(t, err)
	require.Equal(t, job.Canceled, x.Status)
	for _, at := range []*time.Time{x.Cancel.DeliveredAt, x.Cancel.SignalledAt, x.Cancel.ExitedAt, x.Cancel.GoneAt, x.Attempts[0].FinishedAt} {
		require.NotNil(t, at)
	}
}

func TestCancelBatchIsCut(t *testing.T) {
	e := start(t, nil)
	ann := token(t, "ann", auth.RoleUser)
	e.do("POST", "/api/jobs/batch", ann, batchOf(api.MaxBatch, `{"command":"true"}`)).batch(t)
	e.do("POST", "/api/jobs/batch", ann, batchOf(5, `{"command":"true"}`)).batch(t)
	first := e.cancelBatch(ann, `{"queue":"default"}`)
	require.True(t, first.More)
	require.Equal(t, api.MaxBatch, first.Canceled)
	rest := e.cancelBatch(ann, `{"queue":"default"}`)
	require.False(t, rest.More)
	require.Equal(t, 5, rest.Canceled)
	many := strings.TrimSuffix(strings.Repeat(fmt.Sprintf("%q,", newID()), api.MaxBatch+1), ",")
	require.Equal(t, "invalid_field", e.do("POST", "/api/jobs/cancel-batch", ann, `{"jobIds":[`+many+`]}`).problem(t).Code)

	e.nats.Shutdown()
	eventually(t, "not ready without a bus", func() bool { return e.svc.Ready() != nil })
	a := e.do("POST", "/api/jobs/cancel-batch", ann, `{"queue":"default"}`)
	require.Equal(t, 503, a.status, "%s", a.body)
}
