package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
	"github.com/cmdexec/cmdexec/libs/store"
	"github.com/cmdexec/cmdexec/libs/store/sqlitestore"
)

// historyLoad is how many ended jobs the row history has in its database.
type historyLoad struct{ jobs, reads int }

func (h *historyLoad) flags() {
	flag.IntVar(&h.jobs, "history", 200_000, "of the row history: ended jobs in the database; filling it with 1,000,000 takes some minutes")
	flag.IntVar(&h.reads, "reads", 400, "of the row history: reads of each kind")
}

// The jobs of the history, by their number. The owner of the token has as many as
// each of the other users; somebody has few.
const (
	historyUsers  = 20
	historySpan   = 20 * 24 * time.Hour // within the time that jobs are kept
	historyBatch  = 1000
	historyRare   = 50_000 // one in so many is somebody's who has few
	historyRarely = "rare"
	historyUser   = "load"
	historyQueue  = "nightly"
)

// finished is a database full of ended jobs.
type finished struct {
	jobs  int
	begin time.Time
	ids   []string // some of the user's own, by chance
	bytes int64    // of the file when it was closed
	took  time.Duration
}

// history measures reads beside many ended jobs, and the room that these take.
func history(ctx context.Context, p plan) error {
	h := &finished{jobs: p.history.jobs, begin: time.Now().Add(-historySpan)}
	p.fill = h.fill
	d, c, err := startWarmed(ctx, p)
	if err != nil {
		return err
	}
	defer d.stop()
	now := time.Now()
	adminToken, adminErr := auth.MintUser([]byte(userSecret), "admin", auth.RoleAdmin, time.Hour, now)
	rareToken, rareErr := auth.MintUser([]byte(userSecret), historyRarely, auth.RoleUser, time.Hour, now)
	if err := errors.Join(adminErr, rareErr); err != nil {
		return err
	}
	admin, rare := newClient(d.url, adminToken), newClient(d.url, rareToken)

	fmt.Printf("\nhistory: %d ended jobs, one in four with two labels and a line of output; %s\n", h.jobs, d.what)
	row("database for 1,000 jobs", "%8.2f MB   filled at %.0f jobs/s", mb(h.bytes)*1000/float64(h.jobs), float64(h.jobs)/h.took.Seconds())
	kinds := []reading{
		{"status of a job", c, func() string { return "/api/jobs/status?jobId=" + h.ids[rand.IntN(len(h.ids))] }},
		{"list, first page", c, query()},
		{"list, first page, all users", admin, query()},
		{"list, a page anywhere", c, h.anywhere()},
		{"list, a page anywhere, all users", admin, h.anywhere()},
		{"list, 1 job in 100 by status", c, query("status", "canceled")},
		{"list, the same, all users, anywhere", admin, h.anywhere("status", "canceled")},
		{"list, 1 in 50 by queue", c, query("queue", historyQueue)},
		{"list, the same, all users, anywhere", admin, h.anywhere("queue", historyQueue)},
		{"list, queue and status, 1 in 5,000", c, query("queue", historyQueue, "status", "canceled")},
		{"list, 1 in 16 by label", c, query("label", "team:a")},
		{"list, the same, all users, anywhere", admin, h.anywhere("label", "team:a")},
		{"list, 2 labels and status, 1 in 3,200", c, query("label", "team:a", "label", "env:test", "status", "canceled")},
		{"list, a label, by who has few jobs", rare, query("label", "team:a")},
		{"list, a queue, by who has few jobs", rare, query("queue", historyQueue)},
	}
	for _, k := range kinds {
		took, items, err := k.read(ctx, p.history.reads)
		if err != nil {
			return fmt.Errorf("%s: %w", k.what, err)
		}
		row(k.what+", p50 / p99", "%8.2f / %.2f ms   %d jobs at once", ms(took.at(50)), ms(took.at(99)), items)
	}
	pages, err := admin.cursors(ctx, p.history.reads, h.anywhere()())
	if err != nil {
		return err
	}
	row("list, page after page by cursor, p50 / p99", "%8.2f / %.2f ms", ms(pages.at(50)), ms(pages.at(99)))
	mixed, err := mix(ctx, kinds, p.clients, p.history.reads)
	if err != nil {
		return err
	}
	row(fmt.Sprintf("all of these from %d clients, p50 / p99", p.clients), "%8.2f / %.2f ms", ms(mixed.at(50)), ms(mixed.at(99)))
	return nil
}

// query is the path of a list with filters.
func query(filters ...string) func() string {
	v := url.Values{}
	for i := 0; i < len(filters); i += 2 {
		v.Add(filters[i], filters[i+1])
	}
	path := "/api/jobs?" + v.Encode()
	return func() string { return path }
}

// anywhere is the same, of jobs before some time within the history.
func (h *finished) anywhere(filters ...string) func() string {
	path := query(filters...)()
	return func() string {
		at := h.begin.Add(historySpan/10 + rand.N(historySpan*8/10))
		return path + "&until=" + url.QueryEscape(at.UTC().Format(time.RFC3339))
	}
}

// reading is one kind of read.
type reading struct {
	what string
	as   *client
	path func() string
}

// read does it that often, and says how many jobs the last answer has.
func (r *reading) read(ctx context.Context, times int) (took samples, items int, err error) {
	for range times {
		at := time.Now()
		var page api.JobList
		if err := r.as.do(ctx, http.MethodGet, r.path(), "", &page); err != nil {
			return nil, 0, err
		}
		took = append(took, time.Since(at))
		items = len(page.Items)
	}
	return took, items, nil
}

// cursors reads one page after the other from somewhere on.
func (c *client) cursors(ctx context.Context, pages int, path string) (took samples, err error) {
	next := ""
	for range pages {
		at := time.Now()
		var page api.JobList
		if err := c.do(ctx, http.MethodGet, path+next, "", &page); err != nil {
			return nil, err
		}
		took = append(took, time.Since(at))
		if page.NextCursor == "" {
			break
		}
		next = "&cursor=" + url.QueryEscape(page.NextCursor)
	}
	return took, nil
}

// mix does reads of all kinds from several clients at once.
func mix(ctx context.Context, kinds []reading, clients, times int) (samples, error) {
	took := make([]samples, clients)
	errs := make([]error, clients)
	var all sync.WaitGroup
	for i := range clients {
		all.Go(func() {
			for range times / 4 {
				one, _, err := kinds[rand.IntN(len(kinds))].read(ctx, 1)
				if err != nil {
					errs[i] = err
					return
				}
				took[i] = append(took[i], one...)
			}
		})
	}
	all.Wait()
	var sum samples
	for _, t := range took {
		sum = append(sum, t...)
	}
	return sum, errors.Join(errs...)
}

// fill makes the database, as the persister and the collector would.
func (h *finished) fill(ctx context.Context, database string) error {
	began := time.Now()
	s, err := sqlitestore.Open(ctx, database)
	if err != nil {
		return err
	}
	err = h.fillStore(ctx, s)
	if err = errors.Join(err, s.Close()); err != nil {
		return err
	}
	h.took = time.Since(began)
	info, err := os.Stat(database)
	if err != nil {
		return err
	}
	h.bytes = info.Size()
	return nil
}

func (h *finished) fillStore(ctx context.Context, s *sqlitestore.Store) error {
	for from := 0; from < h.jobs; from += historyBatch {
		var recs []job.Record
		var lines []store.LogChunk
		for i := from; i < min(from+historyBatch, h.jobs); i++ {
			r, err := h.job(i)
			if err != nil {
				return err
			}
			if r.Owner == historyUser && (len(h.ids) < historyBatch || rand.IntN(10) == 0) {
				h.ids = append(h.ids, r.ID)
			}
			if len(r.Spec.Labels) > 0 {
				lines = append(lines, store.LogChunk{JobID: r.ID, Attempt: 1, Chunk: workerproto.Chunk{
					Seq: 1, Stream: workerproto.Stdout, Time: r.CreatedAt, Data: fmt.Appendf(nil, "built target %d of many in 0.42 s without a warning\n", i),
				}})
			}
			recs = append(recs, r)
		}
		up, err := s.UpsertJobs(ctx, recs)
		if err != nil || up.Written != len(recs) {
			return errors.Join(err, fmt.Errorf("%d of %d jobs were stored: %v", up.Written, len(recs), up.Poison))
		}
		if err := s.AppendChunks(ctx, lines); err != nil {
			return err
		}
	}
	return nil
}

// job is the i-th of the history, as it was in the end.
func (h *finished) job(i int) (job.Record, error) {
	spec, problems := job.Normalise(historySpec(i))
	if len(problems) > 0 {
		return job.Record{}, problems[0]
	}
	owner := historyUser
	if n := i / 7 % historyUsers; n > 0 { // 7: independent of the rest
		owner = "user-" + strconv.Itoa(n)
	}
	if i%historyRare == 0 {
		owner = historyRarely
	}
	now := job.Timestamp(h.begin.Add(historySpan / time.Duration(h.jobs) * time.Duration(i)))
	r := job.New(id.New(id.Job, now), owner, spec, now)
	if i/11%100 == 0 {
		return job.Apply(r, job.CancelRequest{}, now.Add(time.Second))
	}
	r, err := job.Apply(r, job.Assign{WorkerID: "worker-01kp8s6q9v7h3m5d2c4x6z8b0n", LeaseID: id.New(id.Lease, now)}, now.Add(3*time.Millisecond))
	if err != nil {
		return r, err
	}
	outcome, code := job.OutcomeSucceeded, 0
	if i/11%100 < 8 {
		outcome, code = job.OutcomeFailed, 1
	}
	return job.Apply(r, job.Result{
		Fence: r.Fence(), WorkerID: r.WorkerID, Outcome: outcome, ExitCode: &code,
		AcceptedAt: now.Add(5 * time.Millisecond), PreparedAt: now.Add(6 * time.Millisecond), StartedAt: now.Add(7 * time.Millisecond),
		FinishedAt: now.Add(420 * time.Millisecond), CPUMs: 400, PeakMemoryMB: 12,
		Manifest: &job.Manifest{SHA256: "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
	}, now.Add(430*time.Millisecond))
}

func historySpec(i int) job.Spec {
	s := job.Spec{Command: job.Command{Shell: "make target-" + strconv.Itoa(i%1000)}, Queue: job.DefaultQueue}
	if i/13%50 == 0 {
		s.Queue = historyQueue
	}
	if i%4 == 0 {
		s.Labels = map[string]string{"team": string(rune('a' + i/4%4)), "env": "prod"}
		if i/16%2 == 0 {
			s.Labels["env"] = "test"
		}
	}
	return s
}
