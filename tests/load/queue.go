package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
	"github.com/cmdexec/cmdexec/libs/kit/lifecycle"
)

// The row queue has this many workers, of so many kinds by their labels, and so
// many jobs go to all of them together before they are full.
const (
	queueWorkers = 1000
	queueKinds   = 20
	queueSlots   = 10
	queueOwners  = 4   // users, each with a part of the queue
	queueBatch   = 500 // jobs of one call
)

// queueOf measures a scheduler with a long queue: its memory, its start, and how
// quickly workers that come are given work.
func queueOf(ctx context.Context, p plan) error {
	const others = 500 // files besides the sockets
	if err := raiseFiles(queueWorkers + others); err != nil {
		return err
	}
	d, err := startServices(ctx, p)
	if err != nil {
		return err
	}
	defer d.stop()
	const scheduler = "scheduler"
	empty, err := d.rss(scheduler)
	if err != nil {
		return err
	}
	fmt.Printf("\nqueue: %d jobs, %d workers of %d kinds; %s\n", p.backlog, queueWorkers, queueKinds, d.what)
	began := time.Now()
	if err := d.fill(ctx, p.backlog); err != nil {
		return fmt.Errorf("make the queue: %w", err)
	}
	row("jobs created by POST /api/jobs/batch", "%8.0f /s", float64(p.backlog)/time.Since(began).Seconds())
	waiting, err := d.rss(scheduler)
	if err != nil {
		return err
	}

	row("scheduler's memory: no job / all waiting", "%8.1f / %.1f MB", mb(empty), mb(waiting))

	// Workers that come while nobody leads are known to the registry and wait.
	if err := d.end(scheduler, syscall.SIGTERM); err != nil {
		return err
	}
	f, err := d.startFleet(ctx, "-n", strconv.Itoa(queueWorkers), "-kinds", strconv.Itoa(queueKinds), "-slots", strconv.Itoa(queueSlots))
	if err != nil {
		return err
	}
	if err := lifecycle.Sleep(ctx, fleetSettle); err != nil {
		return err
	}
	started := time.Now()
	if err := d.add(ctx, d.env, filepath.Join(p.bin, scheduler)); err != nil {
		return err
	}
	const most = queueWorkers * queueSlots
	s, err := f.await(ctx, "attempts", func(s fleetStatus) bool { return s.Taken >= min(most, p.backlog) })
	if err != nil {
		return err
	}
	row("its start with them to the first assignment", "%8.2f s", s.First.Sub(started).Seconds())
	row(fmt.Sprintf("assignments, each a synced write, %d", s.Taken), "%8.0f /s", float64(s.Taken-1)/s.Last.Sub(s.First).Seconds())
	full, err := d.rss(scheduler)
	if err != nil {
		return err
	}
	rest, err := d.settled(ctx, scheduler)
	if err != nil {
		return err
	}
	row("its memory: all workers full / settled", "%8.1f / %.1f MB", mb(full), mb(rest.rss))
	row("CPU of it, heartbeats of all workers", "%8.1f %% of a core", 100*rest.share)
	row("attempts started twice", "%8d", s.Repeated)
	return nil
}

// fill creates jobs of all kinds, priorities and sizes that the workers of the row
// can take, each owner its part.
func (d *deployment) fill(ctx context.Context, jobs int) error {
	errs := make([]error, queueOwners)
	var wg sync.WaitGroup
	for n := range queueOwners {
		token, err := auth.MintUser([]byte(userSecret), fmt.Sprintf("load-%d", n), auth.RoleUser, time.Hour, time.Now())
		if err != nil {
			return err
		}
		c := newClient(d.url, token)
		wg.Go(func() {
			for from := n * queueBatch; from < jobs && errs[n] == nil; from += queueOwners * queueBatch {
				errs[n] = c.batch(ctx, from, min(from+queueBatch, jobs))
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// batch creates the jobs of those numbers.
func (c *client) batch(ctx context.Context, from, to int) error {
	var body bytes.Buffer
	body.WriteString(`{"jobs":[`)
	for i := from; i < to; i++ {
		if i > from {
			body.WriteByte(',')
		}
		spec := map[string]any{
			"command": "sleep 3600", "priority": i % 3 * 50,
			"resources":   map[string]any{"cpu": 0.25 + float64(i%4)/4, "memoryMb": 64 << (i % 5)},
			"constraints": map[string]any{"labels": map[string]string{"kind": strconv.Itoa(i % queueKinds)}},
		}
		data, err := json.Marshal(spec)
		if err != nil {
			return err
		}
		body.Write(data)
	}
	body.WriteString(`]}`)
	var made api.BatchResult
	if err := c.do(ctx, http.MethodPost, "/api/jobs/batch", body.String(), &made); err != nil {
		return err
	}
	if made.Failed > 0 {
		for _, item := range made.Items {
			if item.Problem != nil {
				return fmt.Errorf("%d of %d jobs were not created: %s", made.Failed, to-from, item.Problem.Detail)
			}
		}
	}
	return nil
}
