package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/kit/lifecycle"
)

// Times of the row.
const (
	fleetSettle = 20 * time.Second // of heartbeats, until memory is looked at again
	fleetWatch  = 15 * time.Second // of heartbeats, in which the edge's CPU is counted
	fleetBack   = 3 * time.Minute  // at most, until all workers are there
)

// fleetProcess is a fleet and the newest that it has said.
type fleetProcess struct {
	finish io.Writer // a line has all attempts end

	mu     sync.Mutex
	status fleetStatus
}

// startFleet starts this program once more as a fleet of the deployment.
func (d *deployment) startFleet(ctx context.Context, args ...string) (*fleetProcess, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, self, append([]string{fleetWord, "-edge", d.edge}, args...)...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	f := &fleetProcess{}
	if f.finish, err = cmd.StdinPipe(); err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	d.procs = append(d.procs, cmd)
	go func() {
		for lines := bufio.NewScanner(out); lines.Scan(); {
			var s fleetStatus
			if json.Unmarshal(lines.Bytes(), &s) == nil {
				f.mu.Lock()
				f.status = s
				f.mu.Unlock()
			}
		}
	}()
	return f, nil
}

func (f *fleetProcess) now() fleetStatus {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.status
}

// await waits for what the fleet says, at most fleetBack.
func (f *fleetProcess) await(ctx context.Context, what string, reached func(fleetStatus) bool) (fleetStatus, error) {
	late := time.Now().Add(fleetBack)
	for {
		s := f.now()
		switch {
		case reached(s):
			return s, nil
		case time.Now().After(late):
			return s, fmt.Errorf("%s: not within %v: %+v", what, fleetBack, s)
		}
		if err := lifecycle.Sleep(ctx, fleetReport); err != nil {
			return s, err
		}
	}
}

// raiseFiles lets this process and those that it starts have so many files.
func raiseFiles(need int) error {
	var have syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &have); err != nil {
		return err
	}
	want := syscall.Rlimit{Cur: max(uint64(need), have.Max), Max: max(uint64(need), have.Max)}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &want); err != nil {
		return fmt.Errorf("a process needs %d files, and the limit is %d: raise it (ulimit -n), or measure fewer workers (-fleet): %w", need, have.Max, err)
	}
	return nil
}

// end ends the newest process of a program by a signal and forgets it.
func (d *deployment) end(program string, by os.Signal) error {
	cmd, err := d.process(program)
	if err != nil {
		return err
	}
	if err := cmd.Process.Signal(by); err != nil {
		return err
	}
	_ = cmd.Wait() // it says how it was ended
	d.procs = slices.DeleteFunc(d.procs, func(c *exec.Cmd) bool { return c == cmd })
	return nil
}

// rss is the resident memory of a program, in bytes.
func (d *deployment) rss(program string) (int64, error) {
	cmd, err := d.process(program)
	if err != nil {
		return 0, err
	}
	u, err := usageOf(cmd.Process.Pid)
	return u.rss, err
}

// busyShare is the CPU that a program takes while nothing but heartbeats comes, as
// a part of one core.
func (d *deployment) busyShare(ctx context.Context, program string) (float64, error) {
	cmd, err := d.process(program)
	if err != nil {
		return 0, err
	}
	before, err := usageOf(cmd.Process.Pid)
	if err != nil {
		return 0, err
	}
	if err := lifecycle.Sleep(ctx, fleetWatch); err != nil {
		return 0, err
	}
	after, err := usageOf(cmd.Process.Pid)
	return (after.cpu - before.cpu).Seconds() / fleetWatch.Seconds(), err
}

// fleetOf measures what many connected workers cost one edge, and their return
// after it was killed. Some of them have a running attempt all the while.
func fleetOf(ctx context.Context, p plan) error {
	const others = 500 // files besides the sockets
	if err := raiseFiles(p.fleet + others); err != nil {
		return err
	}
	d, err := startServices(ctx, p)
	if err != nil {
		return err
	}
	defer d.stop()
	const edge = "worker-edge"
	empty, err := d.rss(edge)
	if err != nil {
		return err
	}
	perThousand := func(rss int64) float64 { return mb(rss-empty) * 1000 / float64(p.fleet) }
	busy := min(p.busy, p.fleet)
	fmt.Printf("\nfleet: %d workers by WebSocket, %d with a running attempt, one edge; %s\n", p.fleet, busy, d.what)
	began := time.Now()
	f, err := d.startFleet(ctx, "-n", strconv.Itoa(p.fleet), "-busy", strconv.Itoa(busy))
	if err != nil {
		return err
	}
	all := func(s fleetStatus) bool { return s.Up == p.fleet }
	s, err := f.await(ctx, "workers", all)
	if err != nil {
		return err
	}
	row("all connected, after", "%8.1f s", s.LastUp.Sub(began).Seconds())
	crowded, err := d.rss(edge)
	if err != nil {
		return err
	}
	c := newClient(d.url, d.token)
	jobs := make([]string, busy)
	for i := range jobs {
		if jobs[i], err = c.submit(ctx, `{"command":"sleep 3600","constraints":{"labels":{"busy":"yes"}}}`); err != nil {
			return err
		}
	}
	if _, err := f.await(ctx, "attempts", func(s fleetStatus) bool { return s.Running == busy }); err != nil {
		return err
	}
	idle, err := d.settled(ctx, edge)
	if err != nil {
		return err
	}
	row("edge's memory for 1,000: at once / settled", "%8.1f / %.1f MB (%.1f MB without workers)", perThousand(crowded), perThousand(idle.rss), mb(empty))
	row("CPU of the edge, heartbeats every 5 s", "%8.1f %% of a core", 100*idle.share)

	if err := d.end(edge, syscall.SIGKILL); err != nil {
		return err
	}
	killed := time.Now()
	if err := d.add(ctx, append(slices.Clone(d.env), "LISTEN_ADDR="+d.edge), filepath.Join(p.bin, edge)); err != nil {
		return err
	}
	if s, err = f.await(ctx, "workers again", func(s fleetStatus) bool { return all(s) && s.LastUp.After(killed) }); err != nil {
		return err
	}
	row("all back after kill -9 of the edge", "%8.1f s", s.LastUp.Sub(killed).Seconds())
	stormed, err := d.rss(edge)
	if err != nil {
		return err
	}
	again, err := d.settled(ctx, edge)
	if err != nil {
		return err
	}
	row("edge's memory for 1,000: at once / settled", "%8.1f / %.1f MB", perThousand(stormed), perThousand(again.rss))
	restarted, err := f.attempts(ctx, c, jobs)
	if err != nil {
		return err
	}
	s = f.now()
	row("leases lost: stale / not confirmed in time", "%8d / %d", s.Stale, s.Lapsed)
	row("attempts started twice / jobs not in their first", "%8d / %d", s.Repeated, restarted)
	return nil
}

// settled is what a program takes when only heartbeats have come for a while.
type settled struct {
	rss   int64
	share float64
}

func (d *deployment) settled(ctx context.Context, program string) (s settled, err error) {
	if err := lifecycle.Sleep(ctx, fleetSettle); err != nil {
		return s, err
	}
	if s.share, err = d.busyShare(ctx, program); err != nil {
		return s, err
	}
	s.rss, err = d.rss(program)
	return s, err
}

// attempts ends all attempts of a fleet and counts the jobs of which that was not
// the first.
func (f *fleetProcess) attempts(ctx context.Context, c *client, jobs []string) (restarted int, err error) {
	if _, err := fmt.Fprintln(f.finish); err != nil {
		return 0, err
	}
	for _, id := range jobs {
		if _, err := c.wait(ctx, id, 10*time.Millisecond); err != nil {
			return 0, err
		}
		var j api.Job
		if err := c.do(ctx, http.MethodGet, "/api/jobs/"+id, "", &j); err != nil {
			return 0, err
		}
		if j.Status != job.Succeeded {
			return 0, errors.New("job " + id + " has not succeeded")
		}
		if len(j.Attempts) != 1 {
			restarted++
		}
	}
	return restarted, nil
}
