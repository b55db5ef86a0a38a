package main

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/api"
)

// The load that the product's promises are measured under: separate processes, a
// hundred workers, of which every fifth speaks plain HTTP, and then a thousand that
// only stay connected.
const (
	loadWorkers = 100
	loadJobs    = 1000
	httpEvery   = 5
	idleWorkers = 1000
	eachWay     = 40 // jobs sent to workers of one transport, one after the other
)

// promises prints what the product promises beside what was measured.
func promises(ctx context.Context, p plan) error {
	d, err := startServices(ctx, p)
	if err != nil {
		return err
	}
	defer d.stop()
	for i := range loadWorkers {
		transport := "websocket"
		if i%httpEvery == 0 {
			transport = "http"
		}
		if err := d.addWorker(ctx, p, fmt.Sprintf("worker-%d", i), "SLOTS=2", "TRANSPORT="+transport, "WORKER_LABELS=way:"+transport); err != nil {
			return err
		}
	}
	if err := d.await(ctx, "the workers", func() error { return d.hasWorkers(ctx, loadWorkers) }); err != nil {
		return err
	}
	c := newClient(d.url, d.token)
	t, err := c.throughput(ctx, loadJobs, p.clients)
	if err != nil {
		return err
	}
	var assigned [2]samples
	var reported samples
	for i, way := range []string{"websocket", "http"} {
		if assigned[i], err = c.assignments(ctx, way, &reported); err != nil {
			return fmt.Errorf("jobs for workers by %s: %w", way, err)
		}
	}
	reads, err := c.reads(ctx)
	if err != nil {
		return err
	}
	perJob, err := d.growth(ctx, p, c)
	if err != nil {
		return err
	}
	perWorker, err := d.crowd(ctx, p)
	if err != nil {
		return err
	}

	fmt.Printf("\n%s; %d workers, every %dth by HTTP\n", d.what, loadWorkers, httpEvery)
	fmt.Printf("%-50s %-14s %s\n", "", "promised", "measured")
	line := func(what, promised, format string, args ...any) {
		fmt.Printf("%-50s %-14s "+format+"\n", append([]any{what, promised}, args...)...)
	}
	line("jobs a minute", "1,000", "%.0f (%d from %d clients)", t.completed*60, loadJobs, p.clients)
	line("submit, p99, while they run", "100 ms", "%.1f ms", ms(t.submit.at(99)))
	line("submit to accepted by a worker, WebSocket, p99", "1 s", "%.1f ms", ms(assigned[0].at(99)))
	line("submit to accepted by a worker, HTTP, p99", "5 s", "%.1f ms", ms(assigned[1].at(99)))
	line("command's end to result shown, p99", "100 ms", "%.1f ms", ms(reported.at(99)))
	line("read of a job and of a list, p99", "50 ms", "%.1f ms", ms(reads.at(99)))
	line("memory of an edge for 1,000 idle workers", "10 MB", "%.1f MB", mb(perWorker)*1000/idleWorkers)
	line("database for 1,000 jobs", "1 MB", "%.2f MB", mb(perJob))
	return nil
}

// assignments sends jobs to workers of one transport, one after the other, and
// measures how long each waits for its worker, and how long after its command's end
// a client sees that.
func (c *client) assignments(ctx context.Context, way string, reported *samples) (accepted samples, err error) {
	spec := `{"command":"true","constraints":{"labels":{"way":"` + way + `"}}}`
	for range eachWay {
		id, err := c.submit(ctx, spec)
		if err != nil {
			return nil, err
		}
		j, err := c.wait(ctx, id, time.Millisecond)
		if err != nil {
			return nil, err
		}
		seen := time.Now()
		last, err := c.lastAttempt(ctx, id)
		if err != nil {
			return nil, err
		}
		accepted = append(accepted, last.AcceptedAt.Sub(j.CreatedAt))
		*reported = append(*reported, seen.Sub(*last.FinishedAt))
	}
	return accepted, nil
}

// reads measures reading one job and a list.
func (c *client) reads(ctx context.Context) (took samples, err error) {
	var page struct{ Items []api.Job }
	for range 100 {
		at := time.Now()
		if err := c.do(ctx, http.MethodGet, "/api/jobs?limit=50", "", &page); err != nil {
			return nil, err
		}
		took = append(took, time.Since(at))
		if len(page.Items) == 0 {
			continue
		}
		at = time.Now()
		var j api.Job
		if err := c.do(ctx, http.MethodGet, "/api/jobs/"+page.Items[0].JobID, "", &j); err != nil {
			return nil, err
		}
		took = append(took, time.Since(at))
	}
	return took, nil
}

// growth is by how many bytes 1,000 further jobs make the database larger.
func (d *deployment) growth(ctx context.Context, p plan, c *client) (int64, error) {
	size := func() (all int64, err error) {
		for _, suffix := range []string{"", "-wal"} {
			info, err := os.Stat(filepath.Join(d.dir, "jobs.db"+suffix))
			if os.IsNotExist(err) {
				continue
			}
			if err != nil {
				return 0, err
			}
			all += info.Size()
		}
		return all, nil
	}
	before, err := size()
	if err != nil {
		return 0, err
	}
	const thousands = 3 // the write-ahead log is a part of the first
	if _, err := c.throughput(ctx, thousands*1000, p.clients); err != nil {
		return 0, err
	}
	after, err := size()
	return (after - before) / thousands, err
}

// crowd is by how many bytes idle workers make the edge larger.
func (d *deployment) crowd(ctx context.Context, p plan) (int64, error) {
	edge := 0
	for _, cmd := range d.procs {
		if filepath.Base(cmd.Path) == "worker-edge" {
			edge = cmd.Process.Pid
		}
	}
	secret := filepath.Join(d.dir, "worker-secret")
	if err := os.WriteFile(secret, []byte(workerSecret), 0o600); err != nil {
		return 0, err
	}
	before, err := usageOf(edge)
	if err != nil {
		return 0, err
	}
	if err := d.add(ctx, nil, filepath.Join(p.bin, "chaosworkers"), "-n", strconv.Itoa(idleWorkers), "-secret", secret, d.edge); err != nil {
		return 0, err
	}
	if err := d.await(ctx, "the crowd", func() error { return d.hasWorkers(ctx, loadWorkers+idleWorkers) }); err != nil {
		return 0, err
	}
	const beats = 3 // of all of them, so that what they need is there
	settled := time.NewTimer(beats * 5 * time.Second)
	defer settled.Stop()
	select {
	case <-settled.C:
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	after, err := usageOf(edge)
	return after.rss - before.rss, err
}
