package gateway

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/client"
	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
)

func (a answer) batch(t testing.TB) api.BatchResult {
	t.Helper()
	require.Equal(t, 200, a.status, "%s", a.body)
	var r api.BatchResult
	require.NoError(t, json.Unmarshal(a.body, &r))
	require.Equal(t, len(r.Items), r.Created+r.Replayed+r.Failed)
	for i, item := range r.Items {
		require.Equal(t, i, item.Index)
		require.NotEqual(t, item.Job == nil, item.Problem == nil)
	}
	return r
}

func batchOf(n int, spec string) string {
	return `{"jobs":[` + strings.TrimSuffix(strings.Repeat(spec+",", n), ",") + `]}`
}

func TestBatch(t *testing.T) {
	e := start(t, nil)
	ann := token(t, "ann", auth.RoleUser)
	r := e.do("POST", "/api/jobs/batch", ann, `{"jobs":[
		{"command":"one","stdin":"in"},
		{"command":"two","timout":5},
		{"command":"three","command":"again"},
		{"command":"four","timeout":-1},
		{"command":"five","webhook":{"url":"http://x"}},
		"six", null, {},
		{"command":"nine","labels":{"a":"b"}}]}`).batch(t)
	require.Equal(t, 2, r.Created)
	require.Equal(t, 7, r.Failed)
	var codes []string
	for _, item := range r.Items {
		code := ""
		if item.Problem != nil {
			code = item.Problem.Code
			require.NotZero(t, item.Problem.Status)
			require.NotEmpty(t, item.Problem.Title)
		}
		codes = append(codes, code)
	}
	require.Equal(t, []string{"", "unknown_field", "bad_json", "invalid_job", "unsupported_field", "bad_json", "bad_json", "invalid_job", ""}, codes)
	require.Equal(t, "timout", r.Items[1].Problem.Errors[0].Field)
	require.Empty(t, r.Items[0].Job.Stdin, "inputs are not sent back")
	for _, i := range []int{0, 8} {
		j := e.do("GET", "/api/jobs/"+r.Items[i].Job.JobID, ann, "").job(t)
		require.Equal(t, "ann", j.Owner)
	}
	require.Equal(t, "in", e.do("GET", "/api/jobs/"+r.Items[0].Job.JobID, ann, "").job(t).Stdin, "and are stored")
}

// TestBatchIsRefused: where the parts of a batch are not certain nothing is done.
func TestBatchIsRefused(t *testing.T) {
	e := start(t, nil)
	ann := token(t, "ann", auth.RoleUser)
	for name, c := range map[string]struct {
		body   string
		status int
		code   string
	}{
		"empty":           {" ", 400, "bad_json"},
		"array":           {`[{"command":"true"}]`, 400, "bad_json"},
		"byte order mark": {"\xef\xbb\xbf" + batchOf(1, `{"command":"true"}`), 400, "bad_json"},
		"cut off":         {`{"jobs":[{"command":"true"}`, 400, "bad_json"},
		"no comma":        {`{"jobs":[{"command":"true"} {"command":"true"}]}`, 400, "bad_json"},
		"trailing":        {batchOf(1, `{"command":"true"}`) + "x", 400, "bad_json"},
		"two documents":   {batchOf(1, `{"command":"true"}`) + batchOf(1, `{"command":"true"}`), 400, "bad_json"},
		"twice":           {`{"jobs":[{"command":"true"}],"jobs":[]}`, 400, "bad_json"},
		"deep":            {`{"jobs":[` + strings.Repeat("[", 100_000), 400, "bad_json"},
		"unknown":         {`{"jobs":[{"command":"true"}],"dryRun":true}`, 422, "unknown_field"},
		"wrong case":      {`{"Jobs":[{"command":"true"}]}`, 422, "unknown_field"},
		"object":          {`{"jobs":{"command":"true"}}`, 422, "invalid_field"},
		"null":            {`{"jobs":null}`, 422, "invalid_field"},
		"no jobs":         {`{"jobs":[]}`, 422, "invalid_field"},
		"nothing":         {`{}`, 422, "invalid_field"},
		"1001":            {batchOf(api.MaxBatch+1, `{"command":"true"}`), 422, "invalid_field"},
		"too large":       {batchOf(9, `{"command":"true","stdin":"`+strings.Repeat("x", 1<<20)+`"}`), 413, "body_too_large"},
	} {
		a := e.do("POST", "/api/jobs/batch", ann, c.body)
		require.Equal(t, c.code, a.problem(t).Code, "%s: %s", name, a.body)
		require.Equal(t, c.status, a.status, name)
	}
	require.Equal(t, "bad_idempotency_key", e.do("POST", "/api/jobs/batch", ann, batchOf(1, `{}`), "Idempotency-Key", "a b").problem(t).Code)
	require.Zero(t, e.live(), "nothing was created")
}

// live counts the jobs in the registry.
func (e *env) live() (n int) {
	e.Helper()
	require.NoError(e, e.conn.Registry().Scan(e.Context(), func(bus.Entry) error { n++; return nil }))
	return n
}

func TestBatchOfAThousand(t *testing.T) {
	e := start(t, nil)
	ann := token(t, "ann", auth.RoleUser)
	body := batchOf(api.MaxBatch, `{"command":"true","labels":{"a":"b"},"env":{`+manyVariables(60)+`}}`)
	began := time.Now()
	first := e.do("POST", "/api/jobs/batch", ann, body, "Idempotency-Key", "k").batch(t)
	t.Logf("%d jobs in %s", api.MaxBatch, time.Since(began))
	require.Equal(t, api.MaxBatch, first.Created)
	require.Equal(t, api.MaxBatch, e.live())

	again := e.do("POST", "/api/jobs/batch", ann, body, "Idempotency-Key", "k").batch(t)
	require.Equal(t, api.MaxBatch, again.Replayed)
	for i := range again.Items {
		require.Equal(t, first.Items[i].Job.JobID, again.Items[i].Job.JobID)
	}
	// Another order is another batch: each job is held against the one at its place.
	other := e.do("POST", "/api/jobs/batch", ann, `{"jobs":[{"command":"false"}]}`, "Idempotency-Key", "k").batch(t)
	require.Equal(t, "idempotency_key_reused", other.Items[0].Problem.Code)
	require.Equal(t, 201, e.do("POST", "/api/jobs/create", ann, `{"command":"true"}`, "Idempotency-Key", "k").status, "the key of a batch is none of its jobs' own")
}

func manyVariables(n int) string {
	var vars []string
	for i := range n {
		vars = append(vars, fmt.Sprintf(`"V%d":""`, i))
	}
	return strings.Join(vars, ",")
}

func TestBatchQuotaAndBusAway(t *testing.T) {
	e := start(t, func(c *Config) { c.MaxQueuedPerUser = 200 })
	e.sched.set(func(s *scheduler) { s.queued = 100 })
	r := e.do("POST", "/api/jobs/batch", token(t, "ann", auth.RoleUser), batchOf(400, `{"command":"true"}`)).batch(t)
	require.GreaterOrEqual(t, r.Created, 100)
	require.Less(t, r.Created, 100+batchWriters, "no more get past the limit than are on their way at once")
	for _, item := range r.Items {
		if item.Problem != nil {
			require.Equal(t, "too_many_queued", item.Problem.Code)
		}
	}
	e.sched.set(func(s *scheduler) { s.queued = 500 })
	full := e.do("POST", "/api/jobs/batch", token(t, "bob", auth.RoleUser), batchOf(3, `{"command":"true"}`))
	require.Equal(t, 429, full.status, "where nothing at all was taken, the status says so")
	require.NotEmpty(t, full.header.Get("Retry-After"))

	e.sched.set(func(s *scheduler) { s.queued = 0 })
	e.nats.Shutdown()
	eventually(t, "not ready without a bus", func() bool { return e.svc.Ready() != nil })
	began := time.Now()
	a := e.do("POST", "/api/jobs/batch", token(t, "eve", auth.RoleUser), batchOf(1000, `{"command":"true"}`))
	require.Equal(t, 503, a.status, "%s", a.body)
	require.Equal(t, "bus_unavailable", a.problem(t).Code)
	require.Less(t, time.Since(began), 10*time.Second)
}

func TestBatchesAreFew(t *testing.T) {
	e := start(t, nil)
	for range maxBatches {
		e.svc.batches <- struct{}{}
	}
	began := time.Now()
	a := e.do("POST", "/api/jobs/batch", token(t, "ann", auth.RoleUser), batchOf(1, `{"command":"true"}`))
	require.Equal(t, 503, a.status)
	require.Equal(t, "busy", a.problem(t).Code)
	require.GreaterOrEqual(t, time.Since(began), batchWait)
	<-e.svc.batches
	e.do("POST", "/api/jobs/batch", token(t, "ann", auth.RoleUser), batchOf(1, `{"command":"true"}`)).batch(t)
}

func TestClientBatch(t *testing.T) {
	e := start(t, nil)
	bad := trueSpec
	bad.Timeout = -1
	r, err := e.sdk("ann").CreateBatch(t.Context(), []job.Spec{trueSpec, bad}, client.CreateOptions{IdempotencyKey: "k"})
	require.NoError(t, err)
	require.Equal(t, 1, r.Created)
	require.Equal(t, "invalid_job", r.Items[1].Problem.Code)
}
