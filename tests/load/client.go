package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/job"
)

// trueJob gets what every job gets that asks for nothing else: one core among it.
const trueJob = `{"command":"true"}`

// client speaks plain HTTP, as any user's program would.
type client struct {
	url, token string
	http       *http.Client
}

func newClient(url, token string) *client {
	return &client{url: url, token: token, http: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64}}}
}

func (c *client) do(ctx context.Context, method, path, body string, into any) error {
	req, err := http.NewRequestWithContext(ctx, method, c.url+path, bytes.NewBufferString(body))
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+c.token)
	req.Header.Set("Content-Type", "application/json")
	resp, err := c.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode >= 300 {
		return fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, data)
	}
	return json.Unmarshal(data, into)
}

func (c *client) create(ctx context.Context) (string, error) { return c.submit(ctx, trueJob) }

func (c *client) submit(ctx context.Context, spec string) (string, error) {
	var j api.Job
	err := c.do(ctx, http.MethodPost, "/api/jobs/create", spec, &j)
	return j.JobID, err
}

// wait polls until the job has ended.
func (c *client) wait(ctx context.Context, jobID string, every time.Duration) (api.Job, error) {
	for {
		var j api.Job
		if err := c.do(ctx, http.MethodGet, "/api/jobs/status?jobId="+jobID, "", &j); err != nil {
			return j, err
		}
		if j.Status.Terminal() {
			if j.Status != job.Succeeded || j.ExitCode == nil || *j.ExitCode != 0 {
				return j, fmt.Errorf("job %s ended %s (%s %s)", jobID, j.Status, j.Reason, j.Message)
			}
			return j, nil
		}
		select {
		case <-time.After(every):
		case <-ctx.Done():
			return j, ctx.Err()
		}
	}
}

// samples are durations of single operations.
type samples []time.Duration

// at is the p-th percentile.
func (s samples) at(p int) time.Duration {
	if len(s) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(s))
	return sorted[min(len(sorted)-1, len(sorted)*p/100)]
}

type throughput struct {
	submitted, completed float64 // per second
	submit               samples
}

// throughput submits jobs from several clients at once as fast as they are
// taken, and waits until each has succeeded.
func (c *client) throughput(ctx context.Context, jobs, clients int) (throughput, error) {
	ids := make([]string, jobs)
	took := make(samples, jobs)
	errs := make([]error, clients)
	var wg sync.WaitGroup
	began := time.Now()
	for n := range clients {
		wg.Go(func() {
			for i := n; i < jobs; i += clients {
				at := time.Now()
				id, err := c.create(ctx)
				if err != nil {
					errs[n] = err
					return
				}
				ids[i], took[i] = id, time.Since(at)
			}
		})
	}
	wg.Wait()
	submitted := time.Since(began)
	if err := errors.Join(errs...); err != nil {
		return throughput{}, err
	}
	// The newest job ends about last: waiting for it first leaves the server alone while it works.
	last := time.Time{}
	for i := range slices.Backward(ids) {
		j, err := c.wait(ctx, ids[i], 10*time.Millisecond)
		if err != nil {
			return throughput{}, err
		}
		if j.FinishedAt.After(last) {
			last = *j.FinishedAt
		}
	}
	return throughput{
		submitted: float64(jobs) / submitted.Seconds(),
		completed: float64(jobs) / last.Sub(began).Seconds(),
		submit:    took,
	}, nil
}

// oneByOne measures the submit, and from there to the moment at which a poll sees
// the end.
func (c *client) oneByOne(ctx context.Context, jobs int) (submit, done samples, err error) {
	for range jobs {
		at := time.Now()
		id, err := c.create(ctx)
		if err != nil {
			return nil, nil, err
		}
		submit = append(submit, time.Since(at))
		if _, err := c.wait(ctx, id, 500*time.Microsecond); err != nil {
			return nil, nil, err
		}
		done = append(done, time.Since(at))
	}
	return submit, done, nil
}

// executes measures the call that submits and waits on the server.
func (c *client) executes(ctx context.Context, jobs int) (samples, error) {
	var out samples
	for range jobs {
		at := time.Now()
		if _, err := c.execute(ctx, trueJob); err != nil {
			return nil, err
		}
		out = append(out, time.Since(at))
	}
	return out, nil
}

// execute submits a job and waits on the server until it has succeeded.
func (c *client) execute(ctx context.Context, spec string) (jobID string, err error) {
	var r api.ExecuteResult
	if err := c.do(ctx, http.MethodPost, "/api/execute", spec, &r); err != nil {
		return "", err
	}
	if r.Status != job.Succeeded {
		return r.JobID, fmt.Errorf("job %s ended %s (%s %s)", r.JobID, r.Status, r.Reason, r.Message)
	}
	return r.JobID, nil
}
