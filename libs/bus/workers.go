package bus

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/cmdexec/cmdexec/libs/core/fleet"
	"github.com/cmdexec/cmdexec/libs/core/id"
)

// Workers is the bucket of registered workers.
type Workers struct {
	c *Conn
	b bucket
}

// Workers returns the registered workers.
func (c *Conn) Workers() *Workers {
	return &Workers{c: c, b: bucket{c: c, stream: streamWorkers, prefix: prefixWorkers}}
}

// Put stores a whole registration. Drain is kept from the stored one. Repeating it
// is harmless. ErrUnavailable, ErrAmbiguous, ErrFull.
func (w *Workers) Put(ctx context.Context, worker fleet.Worker) error {
	if err := id.CheckWorker(worker.ID); err != nil {
		return fmt.Errorf("store worker: %w", err)
	}
	err := w.b.swap(ctx, worker.ID, func(have []byte) ([]byte, error) {
		next := worker
		if have != nil {
			var stored fleet.Worker
			if err := json.Unmarshal(have, &stored); err == nil {
				next.Drain = stored.Drain
			}
		}
		return json.Marshal(next)
	})
	if err != nil {
		return fmt.Errorf("store worker: %w", err)
	}
	return nil
}

// Update changes a stored worker by compare-and-swap. change may be called
// several times; it returns false to leave the worker as it is. ErrNotFound.
func (w *Workers) Update(ctx context.Context, workerID string, change func(*fleet.Worker) bool) error {
	if err := id.CheckWorker(workerID); err != nil {
		return fmt.Errorf("change worker: %w", errors.Join(ErrNotFound, err))
	}
	err := w.b.swap(ctx, workerID, func(have []byte) ([]byte, error) {
		if have == nil {
			return nil, ErrNotFound
		}
		var worker fleet.Worker
		if err := json.Unmarshal(have, &worker); err != nil {
			return nil, fmt.Errorf("%w: worker: %w", ErrMalformed, err)
		}
		if !change(&worker) {
			return nil, nil
		}
		worker.ID = workerID
		return json.Marshal(worker)
	})
	if err != nil {
		return fmt.Errorf("change worker: %w", err)
	}
	return nil
}

// Get reads a worker. ErrNotFound.
func (w *Workers) Get(ctx context.Context, workerID string) (fleet.Worker, error) {
	if err := id.CheckWorker(workerID); err != nil {
		return fleet.Worker{}, fmt.Errorf("read worker: %w", errors.Join(ErrNotFound, err))
	}
	s, err := w.b.leader(ctx, workerID)
	if err != nil {
		return fleet.Worker{}, fmt.Errorf("read worker: %w", err)
	}
	var worker fleet.Worker
	if err := json.Unmarshal(s.data, &worker); err != nil {
		return fleet.Worker{}, fmt.Errorf("read worker: %w: %w", ErrMalformed, err)
	}
	return worker, nil
}

// All reads every worker, ordered by id.
func (w *Workers) All(ctx context.Context) ([]fleet.Worker, error) {
	all := map[string]fleet.Worker{}
	err := w.c.tail(ctx, streamWorkers, prefixWorkers+">", func(m tailed) error {
		if m.caughtUp {
			return errScanned
		}
		if worker, ok := w.read(m); ok {
			all[worker.ID] = worker
		}
		return nil
	})
	if err != nil && !errors.Is(err, errScanned) {
		return nil, fmt.Errorf("read workers: %w", err)
	}
	return slices.SortedFunc(maps.Values(all), func(a, b fleet.Worker) int { return cmp.Compare(a.ID, b.ID) }), nil
}

// Watch blocks until ctx ends and calls handle, from one goroutine, with every
// worker and then with every change. After a restart workers may come again.
func (w *Workers) Watch(ctx context.Context, handle func(fleet.Worker)) error {
	return w.c.tail(ctx, streamWorkers, prefixWorkers+">", func(m tailed) error {
		if m.caughtUp {
			return nil
		}
		if worker, ok := w.read(m); ok {
			handle(worker)
		}
		return nil
	})
}

func (w *Workers) read(m tailed) (fleet.Worker, bool) {
	var worker fleet.Worker
	err := json.Unmarshal(m.data, &worker)
	if err == nil && worker.ID != strings.TrimPrefix(m.subject, prefixWorkers) {
		err = errors.New("worker under another worker's key")
	}
	if err != nil {
		w.c.count.malformed.Add(1)
		w.c.log.Error("worker record is unreadable", "subject", m.subject, "err", err)
		return fleet.Worker{}, false
	}
	return worker, true
}

// swap changes a value by compare-and-swap until it succeeds or ctx ends. change
// gets the stored value, nil when there is none, and returns the new one, nil to
// leave it. It must be safe to call again after a write that was not answered.
func (b bucket) swap(ctx context.Context, key string, change func(have []byte) ([]byte, error)) error {
	for try := 1; ; try++ {
		s, err := b.leader(ctx, key)
		if err != nil && !errors.Is(err, ErrNotFound) {
			return err
		}
		data, err := change(s.data)
		if err != nil || data == nil {
			return err
		}
		_, err = b.write(ctx, key, data, s.revision, replace)
		if !errors.Is(err, errConflict) {
			return err
		}
		if !pause(ctx, retryPause(try)) {
			return fmt.Errorf("%w: %w", ErrUnavailable, ctx.Err())
		}
	}
}
