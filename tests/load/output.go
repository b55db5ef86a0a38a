package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"strings"
	"sync"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/job"
)

// outputLoad is what the rows output and followers print and read.
type outputLoad struct {
	megabytes int
	followers int
}

func (o *outputLoad) flags() {
	flag.IntVar(&o.megabytes, "output", 1024, "of the row output: MiB that one job prints")
	flag.IntVar(&o.followers, "followers", 200, "of the row followers: readers of one job's live output")
}

const (
	// withinCap is what a job prints of which everything is kept: the largest cap
	// less the tail, which is kept apart.
	withinCap = 240
	capBytes  = job.MaxLogBytes
)

// printing is a command that prints that many MiB as fast as it is read.
func printing(megabytes int) string {
	return fmt.Sprintf("yes 0123456789abcdefghijklmnopqrstuvwxyz0123456789abcdefghijklmnopq | head -c %dM", megabytes)
}

func printingJob(megabytes int) string {
	return fmt.Sprintf(`{"command":%q,"logMaxBytes":%d}`, printing(megabytes), capBytes)
}

// output measures one job that prints much: how fast the worker takes it, what
// worker and edge hold of it, and what other jobs notice.
func output(ctx context.Context, p plan) error {
	d, c, err := startWarmed(ctx, p)
	if err != nil {
		return err
	}
	defer d.stop()
	bare, err := printRate(ctx, p.output.megabytes)
	if err != nil {
		return err
	}
	var idle staged
	for range p.idle {
		if err := c.stage(ctx, &idle); err != nil {
			return err
		}
	}
	beside, err := c.besides(ctx, func(ctx context.Context) error {
		for range 4 { // it is several times as fast as the worker reads
			if _, err := printRate(ctx, p.output.megabytes); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}

	way := []string{"worker", "worker-edge", "nats-server", "result-collector"}
	cpuBefore, err := d.cpu(way)
	if err != nil {
		return err
	}
	kept, stored, err := c.prints(ctx, withinCap)
	if err != nil {
		return err
	}
	cpuAfter, err := d.cpu(way)
	if err != nil {
		return err
	}
	memory := d.watch("worker", "worker-edge")
	var all api.Job
	meanwhile, err := c.besides(ctx, func(ctx context.Context) error {
		all, _, err = c.prints(ctx, p.output.megabytes)
		return err
	})
	if err = errors.Join(err, memory.stop()); err != nil {
		return err
	}

	fmt.Printf("\noutput: %s\n", d.what)
	row("the command alone, its output read and thrown away", "%8.0f MB/s", bare)
	row(fmt.Sprintf("taken from the command, %d MiB, all kept", withinCap), "%8.0f MB/s   %.0f %% of that; %.0f MB/s until the result is shown",
		rate(withinCap, ran(&kept)), 100*rate(withinCap, ran(&kept))/bare, rate(withinCap, stored))
	for i, name := range way {
		row("  CPU of the "+name, "%8.2f s for each 1,000 MB", (cpuAfter[i]-cpuBefore[i]).Seconds()*1000/(withinCap*(1<<20)/1e6))
	}
	row(fmt.Sprintf("taken from the command, %d MiB, cap %d MiB", p.output.megabytes, capBytes>>20), "%8.0f MB/s   %d MiB kept, %d MiB cut out",
		rate(p.output.megabytes, ran(&all)), all.Logs.Bytes>>20, all.Logs.TruncatedBytes>>20)
	for _, name := range memory.names {
		row("resident memory of the "+name, "%8.1f MB before, %.1f MB at most", mb(memory.before[name]), mb(memory.peak[name]))
	}
	row("other jobs, POST /api/execute, p50: idle", "%s", idle)
	row("  while the command alone prints", "%s", beside)
	row("  while a job prints", "%s", meanwhile)
	return nil
}

func rate(megabytes int, took time.Duration) float64 {
	return float64(megabytes) * (1 << 20) / 1e6 / took.Seconds()
}

// ran is how long a job's command ran.
func ran(j *api.Job) time.Duration { return j.FinishedAt.Sub(*j.StartedAt) }

// printRate is how many MB a second the command prints when nobody but this
// program reads it.
func printRate(ctx context.Context, megabytes int) (float64, error) {
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", printing(megabytes))
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	began := time.Now()
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	n, err := io.Copy(struct{ io.Writer }{io.Discard}, out)
	if err = errors.Join(err, cmd.Wait()); err != nil {
		return 0, err
	}
	return float64(n) / 1e6 / time.Since(began).Seconds(), nil
}

// prints runs a job that prints, and how long it took from its submit to its end.
func (c *client) prints(ctx context.Context, megabytes int) (api.Job, time.Duration, error) {
	began := time.Now()
	id, err := c.submit(ctx, printingJob(megabytes))
	if err != nil {
		return api.Job{}, 0, err
	}
	j, err := c.wait(ctx, id, 5*time.Millisecond)
	if err == nil && (j.Logs == nil || j.Logs.Bytes+j.Logs.TruncatedBytes < int64(megabytes)<<20) {
		err = fmt.Errorf("job %s does not account for all of its output: %+v", id, j.Logs)
	}
	return j, time.Since(began), err
}

// besides executes small jobs one after the other while something else is done.
func (c *client) besides(ctx context.Context, do func(context.Context) error) (small staged, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- do(ctx) }()
	for {
		select {
		case err := <-ended:
			return small, err
		default:
		}
		if err := c.stage(ctx, &small); err != nil {
			cancel()
			return small, errors.Join(err, <-ended)
		}
	}
}

// watched is the resident memory of some processes over a time.
type watched struct {
	names        []string
	before, peak map[string]int64

	cancel context.CancelFunc
	done   chan error
}

const watchEvery = 20 * time.Millisecond

// watch begins to look at processes of the deployment. Call stop.
func (d *deployment) watch(programs ...string) *watched {
	ctx, cancel := context.WithCancel(context.Background())
	w := &watched{names: programs, before: map[string]int64{}, peak: map[string]int64{}, cancel: cancel, done: make(chan error, 1)}
	go func() { w.done <- w.run(ctx, d) }()
	return w
}

func (w *watched) run(ctx context.Context, d *deployment) error {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for {
		for _, name := range w.names {
			cmd, err := d.process(name)
			if err != nil {
				return err
			}
			u, err := usageOf(cmd.Process.Pid)
			if err != nil {
				return err
			}
			if w.before[name] == 0 {
				w.before[name] = u.rss
			}
			w.peak[name] = max(w.peak[name], u.rss)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func (w *watched) stop() error {
	w.cancel()
	return <-w.done
}

// The live output that is followed: pieces of 4 KiB, as a build prints them.
const (
	livePieces = 200
	livePause  = "0.05"
	liveJob    = `{"command":"sleep 1; i=0; while [ $i -lt %d ]; do printf '%%4095s\\n' $i; sleep %s; i=$((i+1)); done","resources":{"cpu":0.1}}`
	liveBytes  = livePieces * 4096
)

// followers measures many readers of one job's live output.
func followers(ctx context.Context, p plan) error {
	p.env = append(p.env, "MAX_STREAMS_PER_USER=0")
	d, c, err := startWarmed(ctx, p)
	if err != nil {
		return err
	}
	defer d.stop()
	programs := []string{"api-gateway", "nats-server", "registry-persister"}
	before, err := d.cpu(programs)
	if err != nil {
		return err
	}
	memory := d.watch(programs...)
	id, err := c.submit(ctx, fmt.Sprintf(liveJob, livePieces, livePause))
	if err != nil {
		return err
	}
	var all sync.WaitGroup
	delays := make([]samples, p.output.followers)
	errs := make([]error, p.output.followers)
	for i := range p.output.followers {
		all.Go(func() { delays[i], errs[i] = c.follow(ctx, id) })
	}
	all.Wait()
	seen := time.Now()
	j, err := c.wait(ctx, id, 10*time.Millisecond)
	if err = errors.Join(append(errs, err, memory.stop())...); err != nil {
		return err
	}
	after, err := d.cpu(programs)
	if err != nil {
		return err
	}
	var delay samples
	for _, d := range delays {
		delay = append(delay, d...)
	}
	fmt.Printf("\nfollowers: %s\n", d.what)
	row(fmt.Sprintf("%d followers of %d KiB in %.0f s", p.output.followers, liveBytes>>10, ran(&j).Seconds()),
		"%8.1f MB/s in all, every piece once and in order", float64(p.output.followers)*liveBytes/1e6/ran(&j).Seconds())
	row("printed to seen by a follower, p50 / p99", "%8.1f / %.1f ms", ms(delay.at(50)), ms(delay.at(99)))
	row("the command's end to the last follower's end", "%8.0f ms", ms(seen.Sub(*j.FinishedAt)))
	for i, name := range programs {
		row(name, "%8.2f CPU s   resident before / peak %.1f / %.1f MB", (after[i] - before[i]).Seconds(), mb(memory.before[name]), mb(memory.peak[name]))
	}
	return nil
}

// cpu is the time that programs of the deployment have used.
func (d *deployment) cpu(programs []string) (used []time.Duration, err error) {
	for _, name := range programs {
		cmd, err := d.process(name)
		if err != nil {
			return nil, err
		}
		u, err := usageOf(cmd.Process.Pid)
		if err != nil {
			return nil, err
		}
		used = append(used, u.cpu)
	}
	return used, nil
}

// follow reads a job's live output to its end, and how long after it was printed
// each piece came. A gap or a repeat is an error.
func (c *client) follow(ctx context.Context, jobID string) (delay samples, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.url+"/api/jobs/"+jobID+"/logs?follow=true", http.NoBody)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+c.token)
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("follow %s: %s", jobID, resp.Status)
	}
	var last, bytes int64
	event := ""
	for lines := bufio.NewReaderSize(resp.Body, 64<<10); ; {
		line, err := lines.ReadString('\n')
		if err != nil {
			return nil, fmt.Errorf("follow %s: after %d pieces: %w", jobID, last, err)
		}
		if name, ok := strings.CutPrefix(line, "event: "); ok {
			event = strings.TrimSpace(name)
		}
		data, ok := strings.CutPrefix(line, "data: ")
		switch {
		case !ok:
		case event == "output":
			var item api.LogItem
			if err := json.Unmarshal([]byte(data), &item); err != nil {
				return nil, err
			}
			if item.Seq != last+1 || item.Offset != bytes {
				return nil, fmt.Errorf("follow %s: piece %d at byte %d follows %d, which ended at %d", jobID, item.Seq, item.Offset, last, bytes)
			}
			last, bytes = item.Seq, bytes+int64(len(item.Data))
			delay = append(delay, time.Since(item.Time))
		case event == "end":
			if bytes != liveBytes {
				return nil, fmt.Errorf("follow %s: it ended after %d bytes of %d", jobID, bytes, liveBytes)
			}
			return delay, nil
		}
	}
}
