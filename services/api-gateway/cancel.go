package gateway

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/kit/httpkit"
	"github.com/cmdexec/cmdexec/services/api-gateway/internal/strictjson"
)

var cancelBatchDecoder = strictjson.For[api.CancelBatchRequest]()

// cancelJobs cancels the live jobs that match a filter. It looks for them in the
// registry, which has every live job, and not in the database, which follows it:
// a job that was created a moment ago is found.
func (s *Service) cancelJobs(_ context.Context, c *call, _ *struct{}) (*raw, error) {
	req, err := cancelBatchDecoder.Decode(c.body)
	if err != nil {
		return nil, fieldProblem(err)
	}
	f, err := cancelFilter(c, &req)
	if err != nil {
		return nil, err
	}
	return s.batch(func(ctx context.Context) (any, *httpkit.Problem) {
		out := &cancelSum{result: api.CancelBatchResult{Items: []api.CancelItem{}, Failed: []api.CancelFailed{}}}
		ids, err := s.toCancel(ctx, c, f, req.JobIDs, out)
		if err != nil {
			return nil, s.problemOf(ctx, err)
		}
		s.each(ctx, len(ids), func(ctx context.Context, i int) *httpkit.Problem {
			rec, err := s.cancel(ctx, ids[i])
			if err != nil {
				return s.problemOf(ctx, err)
			}
			out.done(rec)
			return nil
		}, func(i int, p *httpkit.Problem) { out.failed(ids[i], p) })
		return out.sorted(), nil
	}), nil
}

// liveFilter says which jobs of the registry are meant. It is pure.
type liveFilter struct {
	owner        string // empty: everybody's
	states       []job.State
	anyState     bool // states was not asked for
	queue        string
	labels       map[string]string
	since, until time.Time
}

func (f *liveFilter) match(r *job.Record) bool {
	return f.matchSpec(r) && (len(f.states) == 0 || slices.Contains(f.states, r.State))
}

// matchSpec leaves out what changes while a job lives.
func (f *liveFilter) matchSpec(r *job.Record) bool {
	switch {
	case f.owner != "" && r.Owner != f.owner,
		f.queue != "" && r.Spec.Queue != f.queue,
		!f.since.IsZero() && r.CreatedAt.Before(f.since),
		!f.until.IsZero() && !r.CreatedAt.Before(f.until):
		return false
	}
	for name, value := range f.labels {
		if have, ok := r.Spec.Labels[name]; !ok || have != value {
			return false
		}
	}
	return true
}

// cancelable are the states in which a cancel changes something.
func cancelable() []job.State {
	return slices.DeleteFunc(job.States(), func(s job.State) bool { return s.Terminal() || s == job.Canceling })
}

// cancelFilter reads the request. Only the caller's own jobs are meant unless an
// admin names somebody.
func cancelFilter(c *call, req *api.CancelBatchRequest) (*liveFilter, error) {
	f := &liveFilter{owner: c.user, states: req.Status, queue: req.Queue, labels: req.Labels}
	invalid := func(field, detail string) error {
		return &httpkit.Problem{
			Status: http.StatusUnprocessableEntity, Code: codeInvalidField, Detail: "a filter cannot be used",
			Errors: []httpkit.FieldError{{Field: field, Code: job.CodeInvalid, Detail: detail}},
		}
	}
	if req.Owner != "" && req.Owner != c.user {
		if !c.admin {
			return nil, adminOnly()
		}
		f.owner = req.Owner
	}
	if req.Since != nil {
		f.since = req.Since.UTC()
	}
	if req.Until != nil {
		f.until = req.Until.UTC()
	}
	switch {
	case len(req.JobIDs) == 0 && len(req.Status) == 0 && req.Queue == "" && len(req.Labels) == 0 && req.Since == nil && req.Until == nil && req.Owner == "":
		return nil, &httpkit.Problem{
			Status: http.StatusUnprocessableEntity, Code: codeInvalidField, Detail: "at least one filter is needed",
			Hint:   `to cancel all jobs that wait: {"status":["queued"]}`,
			Errors: []httpkit.FieldError{{Code: job.CodeRequired, Detail: "jobIds, status, queue, labels, since, until or owner"}},
		}
	case len(req.JobIDs) > api.MaxBatch:
		return nil, invalid("jobIds", "at most "+strconv.Itoa(api.MaxBatch))
	case len(req.Status) > maxStates:
		return nil, invalid("status", "at most "+strconv.Itoa(maxStates))
	case req.Queue != "" && !job.ValidQueue(req.Queue):
		return nil, invalid("queue", "lower-case letters, digits, '_' and '-'")
	case len(req.Labels) > maxFilters:
		return nil, invalid("labels", "at most "+strconv.Itoa(maxFilters))
	}
	for _, state := range req.Status {
		if !state.Valid() || state.Terminal() {
			return nil, invalid("status", "statuses of jobs that have not ended: queued, assigned, preparing, running, retrying, canceling, blocked, scheduled, held")
		}
	}
	for name, value := range req.Labels {
		if !job.ValidLabelKey(name) || len(value) > job.MaxLabelValueLen {
			return nil, invalid("labels", "names and values as a job may have them")
		}
	}
	for _, jobID := range req.JobIDs {
		if checkJobID(jobID) != nil {
			return nil, &httpkit.Problem{
				Status: http.StatusBadRequest, Code: codeBadJobID, Detail: "this is not a job id",
				Errors: []httpkit.FieldError{{Field: "jobIds", Code: job.CodeInvalid}},
			}
		}
	}
	if len(f.states) == 0 {
		f.states, f.anyState = cancelable(), true
	}
	return f, nil
}

var errCut = errors.New("more jobs match than one call cancels")

// toCancel finds the jobs that match, at most api.MaxBatch, and notes in out
// whether there are more, and which of those that were named do not exist.
func (s *Service) toCancel(ctx context.Context, c *call, f *liveFilter, named []string, out *cancelSum) ([]string, error) {
	if len(named) > 0 {
		return s.namedToCancel(ctx, c, f, named, out)
	}
	var ids []string
	err := s.scan(ctx, func(e bus.Entry) error {
		if !f.match(&e.Record) {
			return nil
		}
		if len(ids) == api.MaxBatch {
			return errCut
		}
		ids = append(ids, e.Record.ID)
		return nil
	})
	if errors.Is(err, errCut) {
		out.result.More, err = true, nil
	}
	return ids, err
}

// scan is registry.Scan that gives up when it hears nothing for queryTimeout.
func (s *Service) scan(ctx context.Context, handle func(bus.Entry) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	silent := time.AfterFunc(queryTimeout, func() { cancel(context.DeadlineExceeded) })
	defer silent.Stop()
	err := s.registry.Scan(ctx, func(e bus.Entry) error {
		silent.Reset(queryTimeout)
		return handle(e)
	})
	if errors.Is(context.Cause(ctx), context.DeadlineExceeded) {
		return context.DeadlineExceeded
	}
	return err
}

func (s *Service) namedToCancel(ctx context.Context, c *call, f *liveFilter, named []string, out *cancelSum) ([]string, error) {
	unique := map[string]bool{}
	for _, jobID := range named {
		unique[jobID] = true
	}
	named = slices.Sorted(maps.Keys(unique))
	matched := make([]bool, len(named))
	s.each(ctx, len(named), func(ctx context.Context, i int) *httpkit.Problem {
		rec, err := s.visible(ctx, c, named[i])
		if err == nil && rec.Owner != f.owner {
			err = jobNotFound() // an admin's call is about one owner, too
		}
		if err != nil {
			return s.problemOf(ctx, err)
		}
		if rec.State.Terminal() {
			if f.anyState && f.matchSpec(rec) {
				out.ended(rec)
			}
			return nil
		}
		matched[i] = f.match(rec)
		return nil
	}, func(i int, p *httpkit.Problem) { out.failed(named[i], p) })
	var ids []string
	for i, ok := range matched {
		if ok {
			ids = append(ids, named[i])
		}
	}
	return ids, nil
}

// cancelSum collects what became of the jobs of one call. Safe for concurrent use.
type cancelSum struct {
	mu     sync.Mutex
	result api.CancelBatchResult
}

func (c *cancelSum) done(rec *job.Record) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch rec.State {
	case job.Canceled:
		c.result.Canceled++
	case job.Canceling:
		c.result.Canceling++
	default:
		c.result.Ended++
	}
	c.result.Items = append(c.result.Items, api.CancelItem{JobID: rec.ID, Status: rec.State})
}

// ended notes a job that had ended before anything was tried.
func (c *cancelSum) ended(rec *job.Record) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.result.Ended++
	c.result.Items = append(c.result.Items, api.CancelItem{JobID: rec.ID, Status: rec.State})
}

func (c *cancelSum) failed(jobID string, p *httpkit.Problem) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.result.Failed = append(c.result.Failed, api.CancelFailed{JobID: jobID, Problem: *partProblem(p)})
}

// sorted returns the result once everything has been collected.
func (c *cancelSum) sorted() *api.CancelBatchResult {
	r := &c.result
	r.Matched = len(r.Items) + len(r.Failed)
	slices.SortFunc(r.Items, func(a, b api.CancelItem) int { return cmp.Compare(a.JobID, b.JobID) })
	slices.SortFunc(r.Failed, func(a, b api.CancelFailed) int { return cmp.Compare(a.JobID, b.JobID) })
	return r
}
