package sim

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/store"
)

// database is the part of a store that collector and persister write to.
type database struct {
	mu         sync.Mutex
	jobs       map[string]job.Record
	generation string
	awayUntil  time.Time
}

// handle is a process's connection to the database. What is not simulated panics.
type handle struct {
	store.Store
	db   *database
	dead <-chan struct{} // of its process
	wait func() time.Duration
}

var errAway = errors.New("the database is away")

// enter waits for the database. A process that was killed never reaches it again.
func (h *handle) enter(ctx context.Context) error {
	timer := time.NewTimer(h.wait())
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-h.dead:
		return errAway
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case <-h.dead:
		return errAway
	default:
	}
	h.db.mu.Lock()
	if time.Now().Before(h.db.awayUntil) {
		h.db.mu.Unlock()
		return errAway
	}
	return nil
}

func (h *handle) UpsertJobs(ctx context.Context, recs []job.Record) (store.Upserted, error) {
	if err := h.enter(ctx); err != nil {
		return store.Upserted{}, err
	}
	defer h.db.mu.Unlock()
	var up store.Upserted
	for _, r := range recs {
		have, ok := h.db.jobs[r.ID]
		another := ok && r.CreatedAt.After(have.CreatedAt)
		if ok && !another && (have.State.Terminal() || have.Version >= r.Version || r.CreatedAt.Before(have.CreatedAt)) {
			up.Stale++
			continue
		}
		h.db.jobs[r.ID] = r
		up.Written++
	}
	return up, nil
}

func (h *handle) Job(ctx context.Context, jobID string) (job.Record, error) {
	if err := h.enter(ctx); err != nil {
		return job.Record{}, err
	}
	defer h.db.mu.Unlock()
	r, ok := h.db.jobs[jobID]
	if !ok {
		return r, store.ErrNotFound
	}
	return r, nil
}

func (h *handle) TerminalVersions(ctx context.Context, ids []string) (map[string]uint64, error) {
	if err := h.enter(ctx); err != nil {
		return nil, err
	}
	defer h.db.mu.Unlock()
	out := map[string]uint64{}
	for _, jobID := range ids {
		if r, ok := h.db.jobs[jobID]; ok && r.State.Terminal() {
			out[jobID] = r.Version
		}
	}
	return out, nil
}

func (h *handle) Generation(ctx context.Context) (string, error) {
	if err := h.enter(ctx); err != nil {
		return "", err
	}
	defer h.db.mu.Unlock()
	return h.db.generation, nil
}

func (h *handle) SetGeneration(ctx context.Context, generation string) error {
	if err := h.enter(ctx); err != nil {
		return err
	}
	defer h.db.mu.Unlock()
	h.db.generation = generation
	return nil
}

// DeleteFinished finds nothing: a run is shorter than a day.
func (h *handle) DeleteFinished(ctx context.Context, _ time.Time, _ int) (int, error) {
	if err := h.enter(ctx); err != nil {
		return 0, err
	}
	h.db.mu.Unlock()
	return 0, nil
}

// AppendChunks drops the output: this run is about states.
func (h *handle) AppendChunks(ctx context.Context, _ []store.LogChunk, _ ...store.LogManifest) error {
	if err := h.enter(ctx); err != nil {
		return err
	}
	h.db.mu.Unlock()
	return nil
}

// UncheckedLogs has none: no output is kept that could be compared.
func (h *handle) UncheckedLogs(ctx context.Context, _ time.Time, _ int) ([]store.LogManifest, error) {
	if err := h.enter(ctx); err != nil {
		return nil, err
	}
	h.db.mu.Unlock()
	return nil, nil
}

func (h *handle) Logs(ctx context.Context, _ busmsg.GetLogs) (busmsg.Logs, error) {
	if err := h.enter(ctx); err != nil {
		return busmsg.Logs{}, err
	}
	h.db.mu.Unlock()
	return busmsg.Logs{}, nil
}

func (h *handle) Ping(ctx context.Context) error {
	if err := h.enter(ctx); err != nil {
		return err
	}
	h.db.mu.Unlock()
	return nil
}

func (d *database) get(jobID string) (job.Record, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	r, ok := d.jobs[jobID]
	return r, ok
}

func (d *database) away(t time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.awayUntil = time.Now().Add(t)
}
