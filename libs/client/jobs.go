package client

import (
	"context"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
)

// CreateOptions are the choices of Create.
type CreateOptions struct {
	IdempotencyKey string // 1 to 255 visible ASCII characters; empty: none
}

// Created is what Create returns.
type Created struct {
	Job      api.Job
	Replayed bool // an earlier request with the same key created it
}

// Create submits a job. When it returns without an error, the job is stored
// durably. An *Error whose Problem.JobID is set means that the outcome is not
// known: ask for that job.
func (c *Client) Create(ctx context.Context, spec job.Spec, o CreateOptions) (Created, error) {
	var out Created
	status, _, err := c.call(ctx, request{
		method: http.MethodPost, path: "/api/jobs/create", body: spec,
		header: keyHeader(o.IdempotencyKey), repeat: o.IdempotencyKey != "",
	}, &out.Job)
	out.Replayed = status == http.StatusOK
	return out, err
}

// Media types of documents for CreateDocument.
const (
	MediaJSON = "application/json"
	MediaYAML = "application/yaml"
)

// CreateDocument is Create with a job that is written as text, of one of the media
// types, and sent as it is.
func (c *Client) CreateDocument(ctx context.Context, media string, doc []byte, o CreateOptions) (Created, error) {
	var out Created
	status, _, err := c.call(ctx, request{
		method: http.MethodPost, path: "/api/jobs/create", body: doc, media: media,
		header: keyHeader(o.IdempotencyKey), repeat: o.IdempotencyKey != "",
	}, &out.Job)
	out.Replayed = status == http.StatusOK
	return out, err
}

// Rerun submits a job again, as a new job of the caller that is linked by
// RerunOf. Errors and keys are as for Create.
func (c *Client) Rerun(ctx context.Context, jobID string, o CreateOptions) (Created, error) {
	var out Created
	status, _, err := c.call(ctx, request{
		method: http.MethodPost, path: "/api/jobs/rerun", body: api.RerunRequest{JobID: jobID},
		header: keyHeader(o.IdempotencyKey), repeat: o.IdempotencyKey != "",
	}, &out.Job)
	out.Replayed = status == http.StatusOK
	return out, err
}

// CreateBatch submits up to api.MaxBatch jobs. An error means that the batch as a
// whole was refused; else look at the items: each job is created or refused by
// itself. A key holds for the whole batch.
func (c *Client) CreateBatch(ctx context.Context, specs []job.Spec, o CreateOptions) (api.BatchResult, error) {
	var out api.BatchResult
	_, _, err := c.call(ctx, request{
		method: http.MethodPost, path: "/api/jobs/batch", body: api.BatchRequest{Jobs: specs},
		header: keyHeader(o.IdempotencyKey), repeat: o.IdempotencyKey != "",
	}, &out)
	return out, err
}

func keyHeader(key string) http.Header {
	h := http.Header{}
	if key != "" {
		h.Set("Idempotency-Key", key)
	}
	return h
}

// Job reads a job.
func (c *Client) Job(ctx context.Context, jobID string) (api.Job, error) {
	var out api.Job
	err := c.get(ctx, jobPath(jobID, ""), nil, &out)
	return out, err
}

// Status reads a job by the route with a query parameter. It answers the same as Job.
func (c *Client) Status(ctx context.Context, jobID string) (api.Job, error) {
	var out api.Job
	err := c.get(ctx, "/api/jobs/status", url.Values{"jobId": {jobID}}, &out)
	return out, err
}

func jobPath(jobID, below string) string { return "/api/jobs/" + url.PathEscape(jobID) + below }

func (c *Client) get(ctx context.Context, path string, query url.Values, out any) error {
	_, _, err := c.call(ctx, request{method: http.MethodGet, path: path, query: query, repeat: true}, out)
	return err
}

// Cancel asks for the end of a job and returns it as it is then. Repeating it is harmless.
func (c *Client) Cancel(ctx context.Context, jobID string) (api.Job, error) {
	var out api.Job
	_, _, err := c.call(ctx, request{
		method: http.MethodPost, path: "/api/jobs/cancel", body: api.CancelRequest{JobID: jobID}, repeat: true,
	}, &out)
	return out, err
}

// CancelBatch cancels the live jobs that match a filter; see its More for whether
// there are further ones. Repeating it is harmless.
func (c *Client) CancelBatch(ctx context.Context, filter api.CancelBatchRequest) (api.CancelBatchResult, error) {
	var out api.CancelBatchResult
	_, _, err := c.call(ctx, request{method: http.MethodPost, path: "/api/jobs/cancel-batch", body: filter, repeat: true}, &out)
	return out, err
}

// ListOptions are the filters of a list. Zero fields do not filter.
type ListOptions struct {
	Status []job.State
	Queue  string
	Labels map[string]string
	Since  time.Time // created at or after
	Until  time.Time // created before
	Limit  int       // jobs per page; the server's default if zero
	Cursor string    // NextCursor of the page before
}

// List reads one page of jobs, newest first.
func (c *Client) List(ctx context.Context, o ListOptions) (api.JobList, error) {
	q := url.Values{}
	for _, s := range o.Status {
		q.Add("status", string(s))
	}
	for k, v := range o.Labels {
		q.Add("label", k+":"+v)
	}
	set(q, "queue", o.Queue)
	set(q, "cursor", o.Cursor)
	if !o.Since.IsZero() {
		q.Set("since", o.Since.UTC().Format(time.RFC3339Nano))
	}
	if !o.Until.IsZero() {
		q.Set("until", o.Until.UTC().Format(time.RFC3339Nano))
	}
	if o.Limit > 0 {
		q.Set("limit", strconv.Itoa(o.Limit))
	}
	var out api.JobList
	err := c.get(ctx, "/api/jobs", q, &out)
	return out, err
}

func set(q url.Values, name, value string) {
	if value != "" {
		q.Set(name, value)
	}
}

// Jobs reads a list page by page. It ends after the first error.
func (c *Client) Jobs(ctx context.Context, o ListOptions) iter.Seq2[api.Job, error] {
	return func(yield func(api.Job, error) bool) {
		for {
			page, err := c.List(ctx, o)
			if err != nil {
				yield(api.Job{}, err)
				return
			}
			for _, j := range page.Items {
				if !yield(j, nil) {
					return
				}
			}
			if page.NextCursor == "" {
				return
			}
			o.Cursor = page.NextCursor
		}
	}
}

// LogOptions says which output to read.
type LogOptions struct {
	Attempt int                // 0: the newest
	Stream  workerproto.Stream // empty: all
	After   int64              // only what comes after this seq
	Limit   int                // items per page; the server's default if zero
}

func (o LogOptions) query() url.Values {
	q := url.Values{}
	set(q, "stream", string(o.Stream))
	if o.Attempt > 0 {
		q.Set("attempt", strconv.Itoa(o.Attempt))
	}
	if o.After > 0 {
		q.Set("after", strconv.FormatInt(o.After, 10))
	}
	if o.Limit > 0 {
		q.Set("limit", strconv.Itoa(o.Limit))
	}
	return q
}

// Logs reads one page of stored output.
func (c *Client) Logs(ctx context.Context, jobID string, o LogOptions) (api.Logs, error) {
	var out api.Logs
	err := c.get(ctx, jobPath(jobID, "/logs"), o.query(), &out)
	return out, err
}

// LogText copies the stored output of one attempt to w as plain bytes. It is
// tried once: what was written cannot be taken back.
func (c *Client) LogText(ctx context.Context, jobID string, o LogOptions, w io.Writer) error {
	q := o.query()
	q.Set("format", "text")
	q.Del("limit")
	resp, err := c.send(ctx, request{method: http.MethodGet, path: jobPath(jobID, "/logs"), query: q}, nil)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if _, err := io.Copy(w, resp.Body); err != nil {
		return fmt.Errorf("copy output: %w", err)
	}
	return nil
}

// Explain says where a job is and why.
func (c *Client) Explain(ctx context.Context, jobID string) (api.Explain, error) {
	var out api.Explain
	err := c.get(ctx, jobPath(jobID, "/explain"), nil, &out)
	return out, err
}

// ExecuteOptions are the choices of Execute.
type ExecuteOptions struct {
	IdempotencyKey string
	Leave          bool // the job goes on when this client goes away; else it is canceled
}

// Execute submits a job, waits for its end and returns what it printed, of each
// stream the first MiB. It blocks as long as the job takes.
func (c *Client) Execute(ctx context.Context, spec job.Spec, o ExecuteOptions) (api.ExecuteResult, error) {
	q := url.Values{}
	if o.Leave {
		q.Set("onDisconnect", "leave")
	}
	var out api.ExecuteResult
	_, _, err := c.call(ctx, request{
		method: http.MethodPost, path: "/api/execute", query: q, body: spec,
		header: keyHeader(o.IdempotencyKey), repeat: o.IdempotencyKey != "", waits: true,
	}, &out)
	return out, err
}

// Workers lists the workers with their load.
func (c *Client) Workers(ctx context.Context) (api.WorkerList, error) {
	var out api.WorkerList
	err := c.get(ctx, "/api/workers/list", nil, &out)
	return out, err
}

// Drain takes a worker out of service (drain is true), or back in. Admins only.
func (c *Client) Drain(ctx context.Context, workerID string, drain bool) error {
	var out struct{}
	_, _, err := c.call(ctx, request{method: http.MethodPost, path: "/api/workers/drain", repeat: true, body: struct {
		WorkerID string `json:"workerId"`
		Drain    bool   `json:"drain"`
	}{workerID, drain}}, &out)
	return err
}

// Info says what the server is.
func (c *Client) Info(ctx context.Context) (api.Info, error) {
	var out api.Info
	err := c.get(ctx, "/api/info", nil, &out)
	return out, err
}

// Health returns nil when the server answers. It is tried once.
func (c *Client) Health(ctx context.Context) error {
	var out api.Health
	_, _, err := c.call(ctx, request{method: http.MethodGet, path: "/api/health"}, &out)
	return err
}
