package gateway

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/kit/httpkit"
	"github.com/cmdexec/cmdexec/services/api-gateway/internal/strictjson"
)

const (
	// maxBatches is how many batches one gateway works on at once; further ones
	// wait for batchWait. A batch holds its whole body and its whole answer.
	maxBatches = 8
	batchWait  = 5 * time.Second
	// batchWriters is how many jobs of a batch are on their way to the registry at
	// once. The bus commits what comes together in one go.
	batchWriters = 64
	// batchTimeout bounds the work on one batch: what was not done then is reported
	// as not done.
	batchTimeout = 20 * time.Second
)

// createJobs creates the jobs of a batch, each by itself.
func (s *Service) createJobs(_ context.Context, c *call, in *createInput) (*raw, error) {
	if err := checkSubmitter(c, in.IdempotencyKey); err != nil {
		return nil, err
	}
	jobs, err := splitBatch(c.body)
	if err != nil {
		return nil, err
	}
	return s.batch(func(ctx context.Context) (any, *httpkit.Problem) {
		result := s.createEach(ctx, c, jobs, in.IdempotencyKey)
		return result, refusedWhole(&result)
	}), nil
}

// batch answers with what work returns. It runs few at once, and lifts the
// limits of time that hold for ordinary requests.
func (s *Service) batch(work func(context.Context) (any, *httpkit.Problem)) *raw {
	return respond(func(w http.ResponseWriter, r *http.Request) {
		_ = httpkit.LongLived(w) // a writer without deadlines has none to lift
		answer, problem := s.inTurn(r.Context(), work)
		_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(slowClient))
		if problem != nil {
			httpkit.Write(w, r, *problem)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_ = writeJSON(w, answer) // these types always marshal
	})
}

// inTurn does work when there is a slot for it, within batchTimeout.
func (s *Service) inTurn(ctx context.Context, work func(context.Context) (any, *httpkit.Problem)) (any, *httpkit.Problem) {
	wait := time.NewTimer(batchWait)
	defer wait.Stop()
	select {
	case s.batches <- struct{}{}:
		defer func() { <-s.batches }()
	case <-ctx.Done():
		return nil, s.problemOf(ctx, ctx.Err())
	case <-wait.C:
		return nil, &httpkit.Problem{
			Status: http.StatusServiceUnavailable, Code: codeBusy, Detail: "too many batches are being worked on",
			Hint: "try again; nothing was changed", RetryAfter: batchWait,
		}
	}
	ctx, cancel := context.WithTimeout(ctx, batchTimeout)
	defer cancel()
	return work(ctx)
}

// splitBatch takes a body apart without looking into the jobs. Whatever makes
// the parts uncertain is refused.
func splitBatch(body []byte) ([]json.RawMessage, error) {
	invalid := func(code, detail string) error {
		return &httpkit.Problem{
			Status: http.StatusBadRequest, Code: codeBadJSON, Detail: detail,
			Hint:   `send one JSON object, UTF-8, no key twice: {"jobs":[...]}`,
			Errors: []httpkit.FieldError{{Code: code, Detail: detail}},
		}
	}
	notJSON := invalid(httpkit.JSONInvalid, "the body is not valid JSON")
	dec := json.NewDecoder(bytes.NewReader(body))
	delim := func(want rune) bool {
		t, err := dec.Token()
		d, ok := t.(json.Delim)
		return err == nil && ok && rune(d) == want
	}
	switch first := bytes.TrimLeft(body, " \t\r\n"); {
	case len(first) == 0:
		return nil, invalid(httpkit.JSONEmpty, "the body is empty")
	case first[0] != '{':
		return nil, invalid(httpkit.JSONNotObject, "the body must be a JSON object")
	}
	if !delim('{') {
		return nil, notJSON
	}
	var jobs []json.RawMessage
	for seen := false; dec.More(); seen = true {
		name, err := dec.Token()
		switch {
		case err != nil:
			return nil, notJSON
		case name != "jobs":
			return nil, fieldProblem(strictjson.Unknown(fmt.Sprint(name)))
		case seen:
			return nil, invalid(httpkit.JSONDuplicateKey, "the body has the same key twice")
		case !delim('['):
			return nil, fieldProblem(&strictjson.FieldError{Field: "jobs", Detail: "must be an array"})
		}
		for dec.More() {
			if len(jobs) == api.MaxBatch {
				return nil, jobCount(job.CodeTooMany)
			}
			var raw json.RawMessage
			if err := dec.Decode(&raw); err != nil {
				return nil, notJSON
			}
			jobs = append(jobs, raw)
		}
		if !delim(']') {
			return nil, notJSON
		}
	}
	if !delim('}') {
		return nil, notJSON
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, invalid(httpkit.JSONTrailing, "there is something after the JSON document")
	}
	if len(jobs) == 0 {
		return nil, jobCount(job.CodeRequired)
	}
	return jobs, nil
}

func jobCount(code string) *httpkit.Problem {
	return &httpkit.Problem{
		Status: http.StatusUnprocessableEntity, Code: codeInvalidField, Detail: "a batch has 1 to " + strconv.Itoa(api.MaxBatch) + " jobs",
		Errors: []httpkit.FieldError{{Field: "jobs", Code: code, Detail: "from 1 to " + strconv.Itoa(api.MaxBatch)}},
	}
}

// createEach creates jobs, many at once. When the bus turns out to be away, the
// jobs that have not been tried are not tried.
func (s *Service) createEach(ctx context.Context, c *call, jobs []json.RawMessage, key string) api.BatchResult {
	items := make([]api.BatchItem, len(jobs))
	s.each(ctx, len(jobs), func(ctx context.Context, i int) *httpkit.Problem {
		items[i].Index = i
		rec, created, err := s.createOne(ctx, c, jobs[i], partKey(key, i))
		if err != nil {
			return s.problemOf(ctx, err)
		}
		j := api.Summary(rec)
		items[i].Job, items[i].Replayed = &j, !created
		return nil
	}, func(i int, p *httpkit.Problem) {
		items[i] = api.BatchItem{Index: i, Problem: partProblem(p)}
	})
	out := api.BatchResult{Items: items}
	for i := range items {
		switch {
		case items[i].Problem != nil:
			out.Failed++
		case items[i].Replayed:
			out.Replayed++
		default:
			out.Created++
		}
	}
	return out
}

func (s *Service) createOne(ctx context.Context, c *call, body []byte, key string) (*job.Record, bool, error) {
	spec, problem := acceptSpec(body)
	if problem != nil {
		return nil, false, problem
	}
	return s.store(ctx, c, spec, "", key)
}

// acceptSpec reads a spec of which nothing has been checked.
func acceptSpec(body []byte) (job.Spec, *httpkit.Problem) {
	if err := httpkit.CheckJSONObject(body); err != nil {
		return job.Spec{}, badJSON(err)
	}
	return decodeSpec(body)
}

// partKey is the idempotency key of one job of a batch. The space, which no key
// of a user has, keeps the two apart.
func partKey(key string, index int) string {
	if key == "" {
		return ""
	}
	return key + " batch " + strconv.Itoa(index)
}

// each runs do for 0 to n-1, batchWriters at once, and fail for those that ended
// with a problem. Once the bus turned out to be away, or ctx has ended, the rest
// is not tried and fails with the same problem. Both are called concurrently.
func (s *Service) each(ctx context.Context, n int, do func(ctx context.Context, i int) *httpkit.Problem, fail func(i int, p *httpkit.Problem)) {
	var next atomic.Int64
	var away atomic.Pointer[httpkit.Problem]
	var wg sync.WaitGroup
	for range min(n, batchWriters) {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				if p := away.Load(); p != nil {
					fail(i, p)
					continue
				}
				if ctx.Err() != nil {
					fail(i, &httpkit.Problem{
						Status: http.StatusServiceUnavailable, Code: codeStopping, Detail: "there was no time left for this one", Hint: "send it again", RetryAfter: retrySoon,
					})
					continue
				}
				p := do(ctx, i)
				if p == nil {
					continue
				}
				if p.Code == codeBusAway || p.Code == codeSubmitUnknown {
					untried := busAway()
					away.CompareAndSwap(nil, &untried)
				}
				fail(i, p)
			}
		})
	}
	wg.Wait()
}

// partProblem is a problem inside of an answer: the request id is the answer's.
func partProblem(p *httpkit.Problem) *api.Problem {
	part := *p
	part.RequestID, part.Instance = "", ""
	part.Fill("")
	out := &api.Problem{Type: part.Type, Title: part.Title, Status: part.Status, Code: part.Code, Detail: part.Detail, Hint: part.Hint, JobID: part.JobID}
	for _, e := range part.Errors {
		out.Errors = append(out.Errors, job.FieldError(e))
	}
	return out
}

// refusedWhole returns the problem of a batch of which nothing was done, for one
// reason that passes: whoever looks only at the status must not take that for a
// success.
func refusedWhole(r *api.BatchResult) *httpkit.Problem {
	if r.Failed < len(r.Items) {
		return nil
	}
	first := r.Items[0].Problem
	if first.Status != http.StatusServiceUnavailable && first.Status != http.StatusTooManyRequests {
		return nil
	}
	for i := range r.Items {
		if p := r.Items[i].Problem; p.Code != first.Code || p.JobID != "" { // of one with an id nobody knows whether it was done
			return nil
		}
	}
	return &httpkit.Problem{Status: first.Status, Code: first.Code, Detail: first.Detail, Hint: first.Hint, RetryAfter: retrySoon}
}
