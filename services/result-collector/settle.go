package collector

import (
	"context"
	"errors"
	"fmt"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/busmsg"
)

// Edges ask for results to be settled, which saves the write to RESULTS and its two
// consumers; what is not answered comes by RESULTS. So nothing here has to be tried
// again, and all of it may happen twice.

// serveResults answers edges until ctx ends.
func (s *Service) serveResults(ctx context.Context) error {
	sub, err := bus.Serve(s.bus, bus.SettleResult, s.settleNow)
	if err != nil {
		return err
	}
	<-ctx.Done()
	return sub.Unsubscribe()
}

// settleNow makes a result a state and stores its output.
func (s *Service) settleNow(ctx context.Context, r busmsg.Result) (busmsg.Settled, error) {
	if err := checkResult(&r); err != nil {
		return busmsg.Settled{}, &busmsg.QueryError{Code: busmsg.CodeBadRequest, Message: "not a result"} // RESULTS keeps it as a dead letter
	}
	if err := s.propose(ctx, &r); err != nil {
		return busmsg.Settled{}, err
	}
	var t tails
	if t.add(&r); t.empty() {
		return busmsg.Settled{}, nil
	}
	done := make(chan error, 1)
	select {
	case s.tails <- tailRequest{tails: t, done: done}:
	case <-ctx.Done():
		return busmsg.Settled{}, ctx.Err()
	}
	select {
	case err := <-done:
		return busmsg.Settled{}, err
	case <-ctx.Done():
		return busmsg.Settled{}, ctx.Err()
	}
}

// tailRequest is the output of one result, to be stored.
type tailRequest struct {
	tails tails
	done  chan<- error // takes one without a reader
}

// maxTails is how many requests share a transaction.
const maxTails = 256

// storeRequested stores the output of results, that of all who wait at once, until
// ctx ends.
func (s *Service) storeRequested(ctx context.Context) error {
	for {
		var all tails
		var waiting []chan<- error
		add := func(r tailRequest) {
			all.chunks, all.manifests = append(all.chunks, r.tails.chunks...), append(all.manifests, r.tails.manifests...)
			waiting = append(waiting, r.done)
		}
		select {
		case r := <-s.tails:
			add(r)
		case <-ctx.Done():
			return nil
		}
		for more := true; more && len(waiting) < maxTails; {
			select {
			case r := <-s.tails:
				add(r)
			default:
				more = false
			}
		}
		err := s.storeChunks(ctx, "results", all.chunks, all.manifests...)
		if err != nil && !errors.Is(err, context.Canceled) {
			s.logger.Warn("output of results was not stored, it comes again by RESULTS", "results", len(waiting), "err", err)
			err = fmt.Errorf("store the output: %w", err)
		}
		for _, done := range waiting {
			done <- err
		}
	}
}
