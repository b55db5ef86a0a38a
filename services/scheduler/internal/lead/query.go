package lead

import (
	"cmp"
	"context"
	"slices"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/fleet"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
)

// Explain says where a job stands in the queue and which workers do not take it
// now, and why. A job that is not live is CodeNotFound.
func (t *Term) Explain(ctx context.Context, q busmsg.Explain) (busmsg.Explanation, error) {
	var out busmsg.Explanation
	found := false
	err := t.ask(ctx, func(now time.Time) {
		j := t.jobs[q.JobID]
		if j == nil {
			return
		}
		found = true
		out = busmsg.Explanation{JobID: j.id, Position: t.plan.Position(j.id)}
		for reason, n := range t.plan.Blocked(j.id, now) {
			out.BlockedBy = append(out.BlockedBy, busmsg.BlockReason{Reason: reason, Workers: n})
		}
	})
	if err != nil {
		return busmsg.Explanation{}, err
	}
	if !found {
		return busmsg.Explanation{}, &busmsg.QueryError{Code: busmsg.CodeNotFound, Message: "no live job has this id"}
	}
	slices.SortFunc(out.BlockedBy, func(a, b busmsg.BlockReason) int {
		return cmp.Or(cmp.Compare(b.Workers, a.Workers), cmp.Compare(a.Reason, b.Reason))
	})
	return out, nil
}

// Workers lists every known worker, ordered by id.
func (t *Term) Workers(ctx context.Context, _ busmsg.ListWorkers) (busmsg.WorkerList, error) {
	out := busmsg.WorkerList{Items: []busmsg.WorkerState{}}
	err := t.ask(ctx, func(now time.Time) {
		out.AsOf = now.UTC()
		for _, id := range t.plan.Workers() {
			out.Items = append(out.Items, t.state(t.workers[id], now))
		}
	})
	return out, err
}

func (t *Term) state(w *workerState, now time.Time) busmsg.WorkerState {
	_, a, load, _ := t.plan.Worker(w.id)
	s := busmsg.WorkerState{
		Worker: w.facts, Running: load.Jobs, FreeSlots: max(0, w.facts.Slots-a.Foreign-load.Jobs),
		CPUUsage: w.beat.CPUUsage, RAMUsage: w.beat.RAMUsage, Reason: w.beat.Reason,
	}
	s.Online = a.Online
	if w.seen.After(s.LastSeenAt) {
		s.LastSeenAt = w.seen.UTC().Truncate(time.Millisecond)
	}
	if now.Before(a.SetAside) {
		s.SetAsideUntil, s.Reason = a.SetAside.UTC().Truncate(time.Millisecond), w.asideFor
	} else if now.Before(a.NotBefore) {
		s.SetAsideUntil, s.Reason = a.NotBefore.UTC().Truncate(time.Millisecond), "it did not take an assignment"
	}
	switch {
	case !a.Online:
		s.Status = fleet.StatusOffline
	case !now.Before(a.FreshUntil):
		s.Status = fleet.StatusUnknown
	case a.Draining:
		s.Status = fleet.StatusDraining
	case load.Jobs > 0 || w.beat.Status == workerproto.StatusBusy:
		s.Status = fleet.StatusBusy
	default:
		s.Status = fleet.StatusIdle
	}
	if a.Draining || s.Status == fleet.StatusOffline || s.Status == fleet.StatusUnknown {
		s.FreeSlots = 0
	}
	return s
}

// Owner counts the live jobs of an owner.
func (t *Term) Owner(ctx context.Context, q busmsg.OwnerCount) (busmsg.OwnerCounts, error) {
	var out busmsg.OwnerCounts
	err := t.ask(ctx, func(time.Time) {
		if c := t.owners[q.Owner]; c != nil {
			out = *c
		}
	})
	return out, err
}
