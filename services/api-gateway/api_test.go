package gateway

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/client"
	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/fleet"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
	"github.com/cmdexec/cmdexec/libs/kit/config"
)

func TestCreateAndRead(t *testing.T) {
	e := start(t, nil)
	ann := token(t, "ann", auth.RoleUser)
	a := e.do("POST", "/api/jobs/create", ann, `{"command":["echo","hi"],"labels":{"team":"x"}}`, "X-Request-Id", "r-1")
	require.Equal(t, 201, a.status, "%s", a.body)
	require.Equal(t, "application/json", a.header.Get("Content-Type"))
	require.Equal(t, "r-1", a.header.Get("X-Request-Id"))
	require.Equal(t, "nosniff", a.header.Get("X-Content-Type-Options"))
	j := a.job(t)
	require.Equal(t, "/api/jobs/"+j.JobID, a.header.Get("Location"))
	require.Equal(t, job.Queued, j.Status)
	require.Equal(t, "ann", j.Owner)
	require.Equal(t, []string{"echo", "hi"}, j.Command.Argv)
	require.Equal(t, 300, j.Timeout, "the job comes back normalised")
	require.NotContains(t, string(a.body), "$schema")
	require.NotContains(t, string(a.body), "leaseId")

	for _, path := range []string{"/api/jobs/status?jobId=" + j.JobID, "/api/jobs/" + j.JobID} {
		got := e.do("GET", path, ann, "")
		require.Equal(t, 200, got.status)
		require.JSONEq(t, string(a.body), string(got.body), path)
	}
	e.runs(j.JobID, 1)
	got := e.do("GET", "/api/jobs/"+j.JobID, ann, "")
	require.Equal(t, job.Running, got.job(t).Status)
	require.NotContains(t, string(got.body), "lease-1", "lease ids are not for users")

	// A job that left the registry is read from the database; without it nobody knows.
	e.move(j.JobID, ended(1, job.OutcomeSucceeded, 0, nil))
	e.leave(j.JobID)
	require.Equal(t, job.Succeeded, e.do("GET", "/api/jobs/"+j.JobID, ann, "").job(t).Status)
	e.store.setAway(true)
	away := e.do("GET", "/api/jobs/"+j.JobID, ann, "")
	require.Equal(t, 503, away.status)
	require.Equal(t, "database_unavailable", away.problem(t).Code)
	require.NotEmpty(t, away.header.Get("Retry-After"))
	require.Equal(t, 503, e.do("GET", "/api/jobs/"+newID(), ann, "").status, "a job that may exist is not 404")
	e.store.setAway(false)
	require.Equal(t, "job_not_found", e.do("GET", "/api/jobs/"+newID(), ann, "").problem(t).Code)
}

func TestCancel(t *testing.T) {
	e := start(t, nil)
	ann := token(t, "ann", auth.RoleUser)
	cancel := func(jobID string) answer {
		return e.do("POST", "/api/jobs/cancel", ann, fmt.Sprintf(`{"jobId":%q}`, jobID))
	}
	waiting := e.create("ann")
	require.Equal(t, job.Canceled, cancel(waiting).job(t).Status)
	again := cancel(waiting)
	require.Equal(t, 200, again.status)
	require.Equal(t, job.Canceled, again.job(t).Status)

	running := e.create("ann")
	e.runs(running, 1)
	first := cancel(running).job(t)
	require.Equal(t, job.Canceling, first.Status)
	second := cancel(running)
	require.Equal(t, 200, second.status)
	require.Equal(t, first.Version, second.job(t).Version, "repeating changes nothing")
	e.move(running, ended(1, job.OutcomeSucceeded, 0, nil))
	require.Equal(t, job.Succeeded, cancel(running).job(t).Status, "a job that ended stays as it is")
	e.leave(running)
	require.Equal(t, job.Succeeded, cancel(running).job(t).Status)
	require.Equal(t, 404, cancel(newID()).status)
	require.Equal(t, "bad_job_id", cancel("job-*").problem(t).Code)
	require.Equal(t, "unknown_field", e.do("POST", "/api/jobs/cancel", ann, `{"jobID":"x"}`).problem(t).Code)
}

func TestIdempotency(t *testing.T) {
	e := start(t, nil)
	ann, bob := token(t, "ann", auth.RoleUser), token(t, "bob", auth.RoleUser)
	post := func(tok, key, body string) answer {
		return e.do("POST", "/api/jobs/create", tok, body, "Idempotency-Key", key)
	}
	first := post(ann, "k1", `{"command":"true"}`)
	require.Equal(t, 201, first.status, "%s", first.body)
	jobID := first.job(t).JobID
	replay := post(ann, "k1", `{"command":"true","timeout":300}`)
	require.Equal(t, 200, replay.status, "the same job, written differently")
	require.Equal(t, jobID, replay.job(t).JobID)
	require.Equal(t, "true", replay.header.Get("Idempotency-Replayed"))

	other := post(ann, "k1", `{"command":"false"}`)
	require.Equal(t, 422, other.status)
	require.Equal(t, "idempotency_key_reused", other.problem(t).Code)
	require.Equal(t, 201, post(bob, "k1", `{"command":"false"}`).status, "keys belong to their user")
	require.Equal(t, "bad_idempotency_key", post(ann, "a b", `{"command":"true"}`).problem(t).Code)
	require.Equal(t, "bad_idempotency_key", post(ann, strings.Repeat("k", 256), `{"command":"true"}`).problem(t).Code)
	require.Equal(t, 201, post(ann, strings.Repeat("k", 255), `{"command":"true"}`).status)

	// Also when the job has ended and left the registry.
	e.runs(jobID, 1)
	e.move(jobID, ended(1, job.OutcomeSucceeded, 0, nil))
	e.leave(jobID)
	late := post(ann, "k1", `{"command":"true"}`)
	require.Equal(t, 200, late.status)
	require.Equal(t, job.Succeeded, late.job(t).Status)
	require.Equal(t, 422, post(ann, "k1", `{"command":"false"}`).status)

	// The database being away does not stop submits.
	e.store.setAway(true)
	require.Equal(t, 201, post(ann, "k2", `{"command":"true"}`).status)
	require.Equal(t, 200, post(ann, "k2", `{"command":"true"}`).status)
}

func TestIdempotencyConcurrently(t *testing.T) {
	e := start(t, nil)
	ann := token(t, "ann", auth.RoleUser)
	const n = 50
	var wg sync.WaitGroup
	answers := make([]answer, n)
	for i := range n {
		wg.Go(func() {
			answers[i] = e.do("POST", "/api/jobs/create", ann, `{"command":"true"}`, "Idempotency-Key", "same")
		})
	}
	wg.Wait()
	created := 0
	for _, a := range answers {
		require.Contains(t, []int{200, 201}, a.status, "%s", a.body)
		require.Equal(t, answers[0].job(t).JobID, a.job(t).JobID)
		if a.status == 201 {
			created++
		}
	}
	require.Equal(t, 1, created)
}

// TestRefusals: whatever is refused is refused with a stable code, and nothing
// that was sent comes back.
func TestRefusals(t *testing.T) {
	e := start(t, nil)
	ann := token(t, "ann", auth.RoleUser)
	const canary = "canary4242"
	long := strings.Repeat("x", 1<<20)
	for name, c := range map[string]struct {
		body    string
		headers []string
		status  int
		code    string
		field   string
	}{
		"empty":            {" ", nil, 400, "bad_json", ""},
		"null":             {"null", nil, 400, "bad_json", ""},
		"array":            {"[]", nil, 400, "bad_json", ""},
		"cut off":          {`{"command":"` + canary, nil, 400, "bad_json", ""},
		"trailing":         {`{"command":"true"} x`, nil, 400, "bad_json", ""},
		"two documents":    {`{"command":"true"}{"command":"true"}`, nil, 400, "bad_json", ""},
		"byte order mark":  {"\xef\xbb\xbf" + `{"command":"true"}`, nil, 400, "bad_json", ""},
		"duplicate key":    {`{"command":"` + canary + `","command":"b"}`, nil, 400, "bad_json", ""},
		"nested duplicate": {`{"command":"x","env":{"A":"1","A":"2"}}`, nil, 400, "bad_json", ""},
		"escaped dup":      {`{"command":"x","c\u006fmmand":"y"}`, nil, 400, "bad_json", ""},
		"deep":             {strings.Repeat(`{"a":`, 10_000), nil, 400, "bad_json", ""},
		"utf-8":            {`{"command":"` + "\xff" + `"}`, nil, 400, "bad_json", ""},
		"surrogate":        {`{"command":"\ud800"}`, nil, 400, "bad_json", ""},
		"nul":              {`{"command":"\u0000"}`, nil, 400, "bad_json", ""},
		"nan":              {`{"command":"x","timeout":NaN}`, nil, 400, "bad_json", ""},
		"unknown":          {`{"command":"x","timout":5}`, nil, 422, "unknown_field", "timout"},
		"wrong case":       {`{"Command":"x"}`, nil, 422, "unknown_field", "Command"},
		"unknown below":    {`{"command":"x","retry":{"max":5}}`, nil, 422, "unknown_field", "retry.max"},
		"owner":            {`{"command":"x","owner":"` + canary + `"}`, nil, 422, "unknown_field", "owner"},
		"status":           {`{"command":"x","status":"succeeded"}`, nil, 422, "unknown_field", "status"},
		"webhook":          {`{"command":"x","webhook":{"url":"http://` + canary + `"}}`, nil, 422, "unsupported_field", "webhook"},
		"secretEnv":        {`{"command":"x","secretEnv":{"A":"` + canary + `"}}`, nil, 422, "unsupported_field", "secretEnv"},
		"no command":       {`{}`, nil, 422, "invalid_job", "command"},
		"null command":     {`{"command":null}`, nil, 422, "invalid_field", "command"},
		"object command":   {`{"command":{"$gt":"` + canary + `"}}`, nil, 422, "invalid_field", "command"},
		"string timeout":   {`{"command":"x","timeout":"` + canary + `"}`, nil, 422, "invalid_field", "timeout"},
		"float timeout":    {`{"command":"x","timeout":1.5}`, nil, 422, "invalid_field", "timeout"},
		"huge timeout":     {`{"command":"x","timeout":99999999999999999999}`, nil, 422, "invalid_field", "timeout"},
		"negative timeout": {`{"command":"x","timeout":-1}`, nil, 422, "invalid_job", "timeout"},
		"bad image":        {`{"command":"x","containerImage":"http://` + canary + `"}`, nil, 422, "invalid_job", "containerImage"},
		"env name":         {`{"command":"x","env":{"` + canary + `=":"1"}}`, nil, 422, "invalid_job", "env"},
		"env type":         {`{"command":"x","env":{"A":4242}}`, nil, 422, "invalid_field", ""},
		"too large":        {`{"command":"x","stdin":"` + long + `"}`, nil, 413, "body_too_large", ""},
		"text":             {`{"command":"x"}`, []string{"Content-Type", "text/plain"}, 415, "unsupported_media_type", ""},
		"form":             {`command=x`, []string{"Content-Type", "application/x-www-form-urlencoded"}, 415, "unsupported_media_type", ""},
		"latin1":           {`{"command":"x"}`, []string{"Content-Type", "application/json; charset=latin1"}, 415, "unsupported_media_type", ""},
		"compressed":       {`{"command":"x"}`, []string{"Content-Encoding", "gzip"}, 415, "unsupported_content_encoding", ""},
	} {
		for _, path := range []string{"/api/jobs/create", "/api/execute"} {
			a := e.do("POST", path, ann, c.body, c.headers...)
			p := a.problem(t)
			require.Equal(t, c.status, a.status, "%s: %s", name, a.body)
			require.Equal(t, c.code, p.Code, name)
			require.NotContains(t, string(a.body), canary, name)
			require.NotContains(t, string(a.body), "4242", name)
			if c.field != "" {
				require.Equal(t, c.field, p.Errors[0].Field, name)
			}
		}
	}
	ok := e.do("POST", "/api/jobs/create", ann, `{"command":"x"}`, "Content-Type", "application/json; charset=UTF-8")
	require.Equal(t, 201, ok.status)
}

func TestRoutesThatDoNotExist(t *testing.T) {
	e := start(t, nil)
	ann := token(t, "ann", auth.RoleUser)
	for _, c := range []struct {
		method, path string
		status       int
		code         string
	}{
		{"GET", "/", 404, "not_found"},
		{"GET", "/api/nothing", 404, "not_found"},
		{"POST", "/docs", 405, "method_not_allowed"},
		{"POST", "/api/jobs/status", 405, "method_not_allowed"},
		{"DELETE", "/api/jobs", 405, "method_not_allowed"},
		{"GET", "/api/jobs/create", 405, "method_not_allowed"},
		{"GET", "/api/jobs/cancel", 405, "method_not_allowed"},
		{"GET", "/api/jobs/get-job", 404, "not_found"},
		{"GET", "/api/jobs/job-x", 400, "bad_job_id"},
		{"GET", "/api/jobs/job-*", 400, "bad_job_id"},
		{"GET", "/api/jobs/%3E", 400, "bad_job_id"},
		{"GET", "/api/jobs/job-01jd2xw8q3v5k7m9n1p3r5t7v9%00", 400, "bad_job_id"},
		{"GET", "/api/jobs/job-01jd2xw8q3v5k7m9n1p3r5t7v9%2Fx", 400, "bad_job_id"},
		{"GET", "/api/jobs/JOB-01JD2XW8Q3V5K7M9N1P3R5T7V9", 400, "bad_job_id"},
		{"GET", "/api/jobs/" + strings.Repeat("a", 10_000), 400, "bad_job_id"},
		{"GET", "/api/jobs/status", 400, "bad_job_id"},
		{"GET", "/api/jobs/status?jobId=$KV.jobs.>", 400, "bad_job_id"},
		{"GET", "/api/jobs/status?jobId=a&jobId=b", 400, "bad_parameter"},
		{"GET", "/api/jobs/status?jobid=a", 400, "unknown_parameter"},
		{"GET", "/api/jobs?limit=0", 400, "bad_parameter"},
		{"GET", "/api/jobs?limit=501", 400, "bad_parameter"},
		{"GET", "/api/jobs?limit=abc", 400, "bad_parameter"},
		{"GET", "/api/jobs?limit=1e9", 400, "bad_parameter"},
		{"GET", "/api/jobs?status=done", 400, "bad_parameter"},
		{"GET", "/api/jobs?label=x", 400, "bad_parameter"},
		{"GET", "/api/jobs?queue=A", 400, "bad_parameter"},
		{"GET", "/api/jobs?since=yesterday", 400, "bad_parameter"},
		{"GET", "/api/jobs?cursor=xyz", 400, "bad_cursor"},
		{"GET", "/api/jobs?owner=bob", 400, "unknown_parameter"},
		{"GET", "/api/jobs?%zz", 400, "bad_parameter"},
	} {
		a := e.do(c.method, c.path, ann, "")
		require.Equal(t, c.code, a.problem(t).Code, "%s %s", c.method, c.path)
		require.Equal(t, c.status, a.status, "%s %s", c.method, c.path)
	}
	require.Equal(t, "POST", e.do("GET", "/api/execute", ann, "").header.Get("Allow"))
}

func TestOpenAPI(t *testing.T) {
	e := start(t, nil)
	a := e.do("GET", "/openapi.json", "", "")
	require.Equal(t, 200, a.status)
	var doc struct {
		OpenAPI    string
		Paths      map[string]map[string]map[string]any
		Components struct {
			Schemas map[string]struct {
				Type       any
				Properties map[string]map[string]any
				Required   []string
			}
		}
	}
	require.NoError(t, json.Unmarshal(a.body, &doc))
	require.Equal(t, "3.1.0", doc.OpenAPI)

	documented, edges := map[string]bool{openAPIPath: true}, map[string]bool{}
	for path, methods := range doc.Paths {
		for method, op := range methods {
			if slices.Equal(op["tags"].([]any), []any{tagProtocol}) {
				edges[path] = true
				continue
			}
			documented[strings.ToUpper(method)+" "+path] = true
			require.NotEmpty(t, op["operationId"], path)
			require.NotEmpty(t, op["summary"], path)
			responses := op["responses"].(map[string]any)
			require.NotContains(t, responses, "default")
			for code, r := range responses {
				content, _ := r.(map[string]any)["content"].(map[string]any)
				require.NotEmpty(t, content, "%s %s: %s", method, path, code)
				if code >= "400" {
					require.Contains(t, content, "application/problem+json")
				}
			}
		}
	}
	delete(documented, openAPIPath)
	served := map[string]bool{}
	require.NoError(t, chi.Walk(e.svc.handler.(chi.Routes), func(method, route string, _ http.Handler, _ ...func(http.Handler) http.Handler) error {
		if route != openAPIPath && route != docsPath { // the two say what the others are
			served[method+" "+route] = true
		}
		return nil
	}))
	require.Equal(t, served, documented, "the document and the router list the same operations")
	require.ElementsMatch(t, workerproto.Paths(), slices.Collect(maps.Keys(edges)), "and those of the edge; tests/e2e asks an instance for every path")

	schemas := doc.Components.Schemas
	require.NotContains(t, schemas, "ErrorModel")
	require.Contains(t, schemas, "Problem")
	require.Equal(t, []string{"command"}, schemas["Spec"].Required)
	require.Len(t, schemas["Spec"].Properties["command"]["oneOf"], 2)
	require.Contains(t, schemas["Job"].Properties, "containerImage", "the spec is part of the job")
	require.Equal(t, "array", schemas["JobList"].Properties["items"]["type"], "lists are never null")
	require.Len(t, schemas["Job"].Properties["status"]["enum"], len(job.States()))
	refs := strings.Count(string(a.body), `"$ref":"#/components/schemas/`)
	require.Positive(t, refs)
	for _, part := range strings.Split(string(a.body), `"$ref":"#/components/schemas/`)[1:] {
		name, _, _ := strings.Cut(part, `"`)
		require.Contains(t, schemas, name, "every reference leads somewhere")
	}
}

func TestList(t *testing.T) {
	e := start(t, nil)
	ann := token(t, "ann", auth.RoleUser)
	base := time.Now().UTC().Truncate(time.Millisecond)
	for i := range 7 {
		spec, errs := job.Normalise(job.Spec{Command: job.Command{Shell: "true"}, Stdin: "x"})
		require.Empty(t, errs)
		owner := "ann"
		if i == 6 {
			owner = "bob"
		}
		e.store.put(job.New(newID(), owner, spec, base.Add(time.Duration(i/2)*time.Second)))
	}
	c := e.sdk("ann")
	var ids []string
	for j, err := range c.Jobs(t.Context(), client.ListOptions{Limit: 2}) {
		require.NoError(t, err)
		require.Equal(t, "ann", j.Owner)
		require.Empty(t, j.Stdin, "lists leave inputs out")
		ids = append(ids, j.JobID)
	}
	require.Len(t, ids, 6)

	var page api.JobList
	require.NoError(t, json.Unmarshal(e.do("GET", "/api/jobs?limit=2", ann, "").body, &page))
	require.NotEmpty(t, page.NextCursor)
	require.False(t, page.AsOf.IsZero())
	bob, root := token(t, "bob", auth.RoleUser), token(t, "root", auth.RoleAdmin)
	for name, a := range map[string]answer{
		"another user":  e.do("GET", "/api/jobs?limit=2&cursor="+page.NextCursor, bob, ""),
		"an admin":      e.do("GET", "/api/jobs?limit=2&cursor="+page.NextCursor, root, ""),
		"other filters": e.do("GET", "/api/jobs?queue=x&cursor="+page.NextCursor, ann, ""),
	} {
		require.Equal(t, "bad_cursor", a.problem(t).Code, name)
	}
	var all api.JobList
	require.NoError(t, json.Unmarshal(e.do("GET", "/api/jobs", root, "").body, &all))
	require.Len(t, all.Items, 7, "admins see everybody's")
	var none api.JobList
	empty := e.do("GET", "/api/jobs?status=failed,timed_out&status=expired", ann, "")
	require.NoError(t, json.Unmarshal(empty.body, &none))
	require.Empty(t, none.Items)
	require.Contains(t, string(empty.body), `"items":[]`)
	e.store.setAway(true)
	require.Equal(t, 503, e.do("GET", "/api/jobs", ann, "").status)
}

func TestExplainAndWorkers(t *testing.T) {
	e := start(t, nil)
	c := e.sdk("ann")
	jobID := e.create("ann")
	e.sched.set(func(s *scheduler) {
		s.explain = busmsg.Explanation{Position: 2, BlockedBy: []busmsg.BlockReason{{Reason: fleet.BlockOffline, Workers: 1}}}
		s.workers = []busmsg.WorkerState{{Worker: fleet.Worker{ID: "w-b", Slots: 2}, Status: fleet.StatusIdle, FreeSlots: 2}, {Worker: fleet.Worker{ID: "w-a"}}}
	})
	x, err := c.Explain(t.Context(), jobID)
	require.NoError(t, err)
	require.Equal(t, 2, x.Position)
	require.Equal(t, []api.BlockReason{{Reason: fleet.BlockOffline, Workers: 1}}, x.BlockedBy)
	require.Contains(t, x.Summary, "1 are offline")

	list, err := c.Workers(t.Context())
	require.NoError(t, err)
	require.Equal(t, "w-a", list.Items[0].WorkerID)
	require.Equal(t, 2, list.Items[1].FreeSlots)

	info, err := c.Info(t.Context())
	require.NoError(t, err)
	require.Equal(t, e.nats.Durability(), info.Durability)
	require.Equal(t, e.nats.Version(), info.NATSServer)
	require.NoError(t, c.Health(t.Context()))
}

func TestDrain(t *testing.T) {
	e := start(t, nil)
	root := token(t, "root", auth.RoleAdmin)
	require.NoError(t, e.conn.Workers().Put(t.Context(), fleet.Worker{ID: "worker-1"}))
	drain := func(body string) answer { return e.do("POST", "/api/workers/drain", root, body) }
	for _, want := range []bool{true, true, false} {
		require.Equal(t, 200, drain(fmt.Sprintf(`{"workerId":"worker-1","drain":%t}`, want)).status)
		w, err := e.conn.Workers().Get(t.Context(), "worker-1")
		require.NoError(t, err)
		require.Equal(t, want, w.Drain)
	}
	require.Equal(t, "worker_not_found", drain(`{"workerId":"nobody","drain":true}`).problem(t).Code)
	require.Equal(t, "bad_worker_id", drain(`{"workerId":"*","drain":true}`).problem(t).Code)
	require.Equal(t, "invalid_field", drain(`{"workerId":"worker-1"}`).problem(t).Code)
	require.Equal(t, "unsupported_field", drain(`{"workerId":"worker-1","drain":true,"deadlineSeconds":5}`).problem(t).Code)
}

func TestQuota(t *testing.T) {
	e := start(t, func(c *Config) { c.MaxQueuedPerUser = 3 })
	ann := token(t, "ann", auth.RoleUser)
	e.sched.set(func(s *scheduler) { s.queued = 2 })
	require.Equal(t, 201, e.do("POST", "/api/jobs/create", ann, `{"command":"true"}`).status)
	a := e.do("POST", "/api/jobs/create", ann, `{"command":"true"}`)
	require.Equal(t, 429, a.status)
	require.Equal(t, "too_many_queued", a.problem(t).Code)
	require.NotEmpty(t, a.header.Get("Retry-After"))
	require.Equal(t, 201, e.do("POST", "/api/jobs/create", token(t, "bob", auth.RoleUser), `{"command":"true"}`).status, "everybody has a quota of their own")
	e.sched.set(func(s *scheduler) {
		s.queued = 0
		require.Equal(t, 2, s.asked, "the scheduler is asked once a second for each")
	})
	eventually(t, "the count is asked for again", func() bool {
		return e.do("POST", "/api/jobs/create", ann, `{"command":"true"}`).status == 201
	})
}

func TestRateLimits(t *testing.T) {
	e := start(t, func(c *Config) {
		c.RateLimitUser = config.Rate{Count: 2, Per: time.Minute}
		c.RateLimitIP = config.Rate{Count: 6, Per: time.Minute}
	})
	ann, bob := token(t, "ann", auth.RoleUser), token(t, "bob", auth.RoleUser)
	for range 2 {
		a := e.do("GET", "/api/jobs", ann, "")
		require.Equal(t, 200, a.status)
		require.Equal(t, "2", a.header.Get("RateLimit-Limit"))
	}
	a := e.do("GET", "/api/jobs", ann, "")
	require.Equal(t, 429, a.status)
	require.Equal(t, "rate_limited", a.problem(t).Code)
	require.NotEmpty(t, a.header.Get("Retry-After"))
	require.Equal(t, 200, e.do("GET", "/api/jobs", bob, "").status)
	require.Equal(t, 401, e.do("GET", "/api/jobs", "", "").status)
	require.Equal(t, 200, e.do("GET", "/api/health", "", "").status)
	require.Equal(t, 429, e.do("GET", "/api/jobs", "", "").status, "the address is limited whoever asks")
	for _, path := range []string{"/docs", "/openapi.json", "/nowhere", "/api/health"} {
		require.Equal(t, 429, e.do("GET", path, "", "").status, path)
	}
	require.Equal(t, 429, e.do("DELETE", "/api/jobs", "", "").status, "a method that is not there")
}

func TestBusAway(t *testing.T) {
	e := start(t, nil)
	ann := token(t, "ann", auth.RoleUser)
	jobID := e.create("ann")
	e.nats.Shutdown()
	for _, c := range [][3]string{
		{"POST", "/api/jobs/create", `{"command":"true"}`},
		{"GET", "/api/jobs/" + jobID, ""},
		{"POST", "/api/jobs/cancel", `{"jobId":"` + jobID + `"}`},
		{"GET", "/api/jobs", ""},
		{"GET", "/api/workers/list", ""},
	} {
		began := time.Now()
		a := e.do(c[0], c[1], ann, c[2])
		require.Equal(t, 503, a.status, "%s %s: %s", c[0], c[1], a.body)
		require.NotEmpty(t, a.header.Get("Retry-After"))
		require.Less(t, time.Since(began), 4*time.Second)
		a.problem(t)
	}
	require.Equal(t, 200, e.do("GET", "/api/health", "", "").status)
	eventually(t, "not ready without a bus", func() bool { return e.svc.Ready() != nil })
}

func TestReady(t *testing.T) {
	e := start(t, nil)
	eventually(t, "ready", func() bool { return e.svc.Ready() == nil })
	e.stop()
	require.Error(t, e.svc.Ready())
}

func TestNewRefusesWeakSecrets(t *testing.T) {
	for _, s := range []config.Secret{"", "short", "changeme-changeme-changeme-changeme", config.Secret(strings.Repeat("a", 40))} {
		_, err := New(Config{JWTSecret: s}, Deps{})
		require.ErrorContains(t, err, "JWT_SECRET")
	}
}
