package gateway

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/fleet"
	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/kit/httpkit"
	"github.com/cmdexec/cmdexec/services/api-gateway/internal/strictjson"
)

type workersOutput struct{ Body api.WorkerList }

func (s *Service) listWorkers(ctx context.Context, _ *call, _ *struct{}) (*workersOutput, error) {
	ctx, cancel := context.WithTimeout(ctx, queryTimeout)
	defer cancel()
	list, err := bus.Query(ctx, s.bus, bus.QueryWorkers, busmsg.ListWorkers{})
	if err != nil {
		s.logger.DebugContext(ctx, "scheduler not asked", "err", err)
		return nil, schedulerAway()
	}
	out := &workersOutput{Body: api.WorkerList{Items: make([]api.Worker, 0, len(list.Items)), AsOf: list.AsOf}}
	for i := range list.Items {
		out.Body.Items = append(out.Body.Items, workerOf(&list.Items[i]))
	}
	slices.SortFunc(out.Body.Items, func(a, b api.Worker) int { return strings.Compare(a.WorkerID, b.WorkerID) })
	return out, nil
}

func workerOf(w *busmsg.WorkerState) api.Worker {
	out := api.Worker{
		WorkerID: w.ID, Hostname: w.Hostname, OS: w.OS, Arch: w.Arch, CPUCores: w.CPUCores, TotalMemory: w.TotalMemory,
		Labels: w.Labels, Executors: w.Executors, Slots: w.Slots, FreeSlots: w.FreeSlots, Running: w.Running, Status: w.Status,
		CPUUsage: w.CPUUsage, RAMUsage: w.RAMUsage, Version: w.Version, Transport: w.Transport,
		ConnectedAt: w.ConnectedAt, LastSeenAt: w.LastSeenAt, Reason: w.Reason,
	}
	if out.Executors == nil {
		out.Executors = []string{}
	}
	if !w.SetAsideUntil.IsZero() {
		out.SetAsideUntil = &w.SetAsideUntil
	}
	return out
}

// drainRequest is the body of POST /api/workers/drain.
type drainRequest struct {
	WorkerID        string `json:"workerId" doc:"The worker."`
	Drain           *bool  `json:"drain" nullable:"false" doc:"true: takes no new work; false: takes it again."`
	DeadlineSeconds *int   `json:"deadlineSeconds,omitempty" doc:"Reserved; refused until it exists."`
}

// drainState answers POST /api/workers/drain.
type drainState struct {
	WorkerID string `json:"workerId"`
	Drain    bool   `json:"drain"`
}

type drainOutput struct{ Body drainState }

var drainDecoder = strictjson.For[drainRequest]()

func (s *Service) drainWorker(ctx context.Context, c *call, _ *struct{}) (*drainOutput, error) {
	req, err := drainDecoder.Decode(c.body)
	if err != nil {
		return nil, fieldProblem(err)
	}
	switch {
	case req.DeadlineSeconds != nil:
		return nil, &httpkit.Problem{
			Status: http.StatusUnprocessableEntity, Code: codeUnsupportedField, Detail: "deadlineSeconds does not exist yet",
			Errors: []httpkit.FieldError{{Field: "deadlineSeconds", Code: codeUnsupportedField}},
		}
	case id.CheckWorker(req.WorkerID) != nil:
		return nil, &httpkit.Problem{
			Status: http.StatusBadRequest, Code: codeBadWorkerID, Detail: "this is not a worker id",
			Errors: []httpkit.FieldError{{Field: "workerId", Code: job.CodeInvalid}},
		}
	case req.Drain == nil:
		return nil, &httpkit.Problem{
			Status: http.StatusUnprocessableEntity, Code: codeInvalidField, Detail: "drain must be true or false",
			Errors: []httpkit.FieldError{{Field: "drain", Code: job.CodeRequired}},
		}
	}
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	err = s.bus.Workers().Update(ctx, req.WorkerID, func(w *fleet.Worker) bool {
		changed := w.Drain != *req.Drain
		w.Drain = *req.Drain
		return changed
	})
	if errors.Is(err, bus.ErrNotFound) {
		return nil, &httpkit.Problem{Status: http.StatusNotFound, Code: codeWorkerNotFound, Detail: "there is no such worker"}
	}
	if err != nil {
		return nil, err
	}
	s.logger.InfoContext(ctx, "worker drain set", "workerId", req.WorkerID, "drain", *req.Drain, "by", c.user)
	return &drainOutput{Body: drainState{WorkerID: req.WorkerID, Drain: *req.Drain}}, nil
}

// explain

type explainOutput struct{ Body api.Explain }

func (s *Service) explainJob(ctx context.Context, c *call, in *jobPath) (*explainOutput, error) {
	rec, err := s.visible(ctx, c, in.JobID)
	if err != nil {
		return nil, err
	}
	var known *busmsg.Explanation
	if !rec.State.Terminal() {
		qctx, cancel := context.WithTimeout(ctx, queryTimeout)
		e, err := bus.Query(qctx, s.bus, bus.QueryExplain, busmsg.Explain{JobID: rec.ID})
		cancel()
		if err == nil {
			known = &e
		}
	}
	return &explainOutput{Body: explain(rec, known, time.Now())}, nil
}
