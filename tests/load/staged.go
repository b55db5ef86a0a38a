package main

import (
	"context"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/api"
)

// staged are small jobs that were executed one after the other: the whole, and its
// parts by what the job's record says.
type staged struct{ all, assigned, accepted, ended, shown samples }

func (s staged) String() string {
	return fmt.Sprintf("%8.1f ms   p99 %.1f ms, %d jobs; to assigned %.1f, accepted %.1f, command's end %.1f, shown %.1f ms",
		ms(s.all.at(50)), ms(s.all.at(99)), len(s.all), ms(s.assigned.at(50)), ms(s.accepted.at(50)), ms(s.ended.at(50)), ms(s.shown.at(50)))
}

// stage executes one small job.
func (c *client) stage(ctx context.Context, s *staged) error {
	began := time.Now()
	id, err := c.execute(ctx, trueJob)
	if err != nil {
		return err
	}
	ended := time.Now()
	a, err := c.lastAttempt(ctx, id)
	if err != nil {
		return err
	}
	s.all = append(s.all, ended.Sub(began))
	s.assigned = append(s.assigned, a.AssignedAt.Sub(began))
	s.accepted = append(s.accepted, a.AcceptedAt.Sub(a.AssignedAt))
	s.ended = append(s.ended, a.FinishedAt.Sub(*a.AcceptedAt))
	s.shown = append(s.shown, ended.Sub(*a.FinishedAt))
	return nil
}

// lastAttempt reads the attempt in which a job has ended.
func (c *client) lastAttempt(ctx context.Context, jobID string) (api.Attempt, error) {
	var j api.Job
	if err := c.do(ctx, http.MethodGet, "/api/jobs/"+jobID, "", &j); err != nil {
		return api.Attempt{}, err
	}
	if n := len(j.Attempts); n > 0 && j.Attempts[n-1].AcceptedAt != nil && j.Attempts[n-1].FinishedAt != nil {
		return j.Attempts[n-1], nil
	}
	return api.Attempt{}, fmt.Errorf("job %s has no attempt that was accepted and has ended", jobID)
}

// Of the row busy: jobs that want all CPU time they can get.
const (
	busyJobs  = 12
	busyCores = 0.5 // of each
)

var busyJob = fmt.Sprintf(`{"command":"while :; do :; done","timeout":600,"resources":{"cpu":%g}}`, busyCores)

// busy measures what small jobs notice of a machine that is full of others.
func busy(ctx context.Context, p plan) error {
	p.slots = 2 * busyJobs
	p.env = append(p.env, "CPU_LIMIT="+strconv.Itoa(p.slots)) // more than there is
	for _, form := range p.forms {
		begin, err := starter(form)
		if err != nil {
			return err
		}
		if err := crowded(ctx, p, begin); err != nil {
			return fmt.Errorf("%s: %w", form, err)
		}
	}
	return nil
}

func crowded(ctx context.Context, p plan, begin func(context.Context, plan) (*deployment, error)) error {
	d, err := begin(ctx, p)
	if err != nil {
		return err
	}
	defer d.stop()
	c := newClient(d.url, d.token)
	if _, err := c.throughput(ctx, warm, p.clients); err != nil {
		return fmt.Errorf("warm up: %w", err)
	}
	var alone, beside staged
	for range p.idle {
		if err := c.stage(ctx, &alone); err != nil {
			return err
		}
	}
	var ids []string
	for range busyJobs {
		id, err := c.submit(ctx, busyJob)
		if err != nil {
			return err
		}
		ids = append(ids, id)
	}
	for range p.idle {
		if err := c.stage(ctx, &beside); err != nil {
			return err
		}
	}
	for _, id := range ids {
		var j api.Job
		if err := c.do(ctx, http.MethodPost, "/api/jobs/cancel", `{"jobId":"`+id+`"}`, &j); err != nil {
			return err
		}
	}
	fmt.Printf("\nbusy: %s\n", d.what)
	row("small jobs, POST /api/execute, p50: alone", "%s", alone)
	row(fmt.Sprintf("  beside %d that take %g cores each", busyJobs, busyCores), "%s", beside)
	return nil
}
