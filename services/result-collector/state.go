package collector

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/kit/failpoint"
)

// settlers is how many results are on their way to the registry at once: enough
// to share its fsyncs.
const settlers = 32

// settleResults proposes results to the registry.
func (s *Service) settleResults(ctx context.Context) error {
	return s.bus.Consume(ctx, bus.ResultsState, bus.ConsumeOptions{Concurrency: settlers}, s.settle)
}

// settle handles one result. It is safe to repeat.
func (s *Service) settle(ctx context.Context, m bus.Msg) error {
	r, err := decodeResult(m.Data)
	if err != nil {
		s.metrics.results.WithLabelValues("poison").Inc()
		return bus.Poison(err)
	}
	return s.propose(ctx, &r)
}

// propose offers a result to the registry. Nil: it has decided.
func (s *Service) propose(ctx context.Context, r *busmsg.Result) error {
	_, err := s.bus.Registry().Transition(ctx, r.JobID, r.Event())
	word := verdict(err)
	s.metrics.results.WithLabelValues(word).Inc()
	switch word {
	case "failed":
		return fmt.Errorf("settle a result: %w", err)
	case "poison":
		return bus.Poison(err)
	case "refused":
		// The table has no such cell: a bug in a worker or here, never a repeat.
		s.logger.Error("result was refused", "job", r.JobID, "attempt", r.Attempt, "worker", r.WorkerID, "err", err)
	case "applied":
		failpoint.At(failpoint.CollectorSettled)
		if !r.ReceivedAt.IsZero() {
			s.metrics.seconds.Observe(max(0, s.now().Sub(r.ReceivedAt).Seconds()))
		}
	}
	return nil
}

// verdict names what became of a proposal. All but "failed" are final. A record
// that cannot be read or would not fit is poison: a message that is never
// acknowledged would keep its stream from being trimmed until it is full.
func verdict(err error) string {
	switch {
	case err == nil:
		return "applied"
	case errors.Is(err, job.ErrTerminal):
		return "terminal"
	case errors.Is(err, job.ErrStale):
		return "stale"
	case errors.Is(err, job.ErrUnchanged):
		return "unchanged"
	case errors.Is(err, bus.ErrNotFound):
		return "missing" // it ended, and left the registry
	case errors.Is(err, job.ErrRefused):
		return "refused"
	case errors.Is(err, bus.ErrTooLarge), errors.Is(err, bus.ErrMalformed):
		return "poison"
	default:
		return "failed"
	}
}

// decodeResult reads and checks a message of RESULTS.
func decodeResult(data []byte) (busmsg.Result, error) {
	var r busmsg.Result
	if err := json.Unmarshal(data, &r); err != nil {
		return r, errors.New("not a result") // the reason of a dead letter never quotes a body
	}
	return r, checkResult(&r)
}

func checkResult(r *busmsg.Result) error {
	if err := id.Check(id.Job, r.JobID); err != nil {
		return fmt.Errorf("jobId: %w", err)
	}
	if r.Attempt < 1 {
		return errors.New("attempt must be at least 1")
	}
	return r.Validate()
}
