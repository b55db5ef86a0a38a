package main

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	_ "modernc.org/sqlite" // the driver by which the database is locked

	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
	"github.com/cmdexec/cmdexec/tests/chaos/check"
	"github.com/cmdexec/cmdexec/tests/chaos/history"
	"github.com/cmdexec/cmdexec/tests/chaos/rig"
)

// databaseLocked holds the write lock of the database file. Jobs go on; a job
// that begins meanwhile must end before the lock is given back.
type databaseLocked struct {
	db   *sql.DB
	conn *sql.Conn
}

func (f *databaseLocked) inject(ctx context.Context, s *scene) (err error) {
	if f.db, err = sql.Open("sqlite", s.rig.Database()+"?_pragma=busy_timeout(10000)"); err != nil {
		return err
	}
	if f.conn, err = f.db.Conn(ctx); err != nil {
		return err
	}
	if _, err = f.conn.ExecContext(ctx, "BEGIN IMMEDIATE"); err != nil {
		return fmt.Errorf("lock the database: %w", err)
	}
	hold, cancel := context.WithTimeout(ctx, 40*time.Second)
	defer cancel()
	took, err := s.load.canary(hold)
	if err != nil {
		return fmt.Errorf("no job ran within %v while the database was locked: %w", took, err)
	}
	wait(ctx, s.between(5*time.Second, 10*time.Second))
	return nil
}

func (f *databaseLocked) heal(context.Context, *scene) error {
	_, err := f.conn.ExecContext(context.Background(), "ROLLBACK")
	return errors.Join(err, f.conn.Close(), f.db.Close())
}

// registryFull submits jobs that nobody can run until the registry refuses more.
// Whatever runs must still end. Then they are canceled.
type registryFull struct{ ids []string }

func (f *registryFull) inject(ctx context.Context, s *scene) error {
	padding := strings.Repeat("x", 240<<10)
	for i := range 400 {
		p := history.Plan{Kind: "padding", MaxAttempts: 1}
		spec := s.load.spec(p, "-run", "1ms")
		spec["stdin"] = padding
		spec["constraints"] = map[string]any{"labels": map[string]string{"nowhere": "yes"}}
		key := fmt.Sprintf("padding-%d-%d", i, s.rng.Uint64())
		spec["labels"] = map[string]string{"key": key}
		begin := time.Now().UnixNano()
		a := s.load.call(ctx, "filler", http.MethodPost, "/api/jobs/create", spec, key, 10*time.Second)
		submit := &history.Submit{Key: key, Plan: p, Begin: begin, Code: a.code, Target: "create"}
		switch {
		case a.err == nil && a.code < 300:
			var j struct{ JobID string }
			if err := json.Unmarshal(a.body, &j); err != nil {
				return err
			}
			submit.JobID = j.JobID
			s.load.acknowledged(j.JobID, "filler")
			f.ids = append(f.ids, j.JobID)
		case a.code == http.StatusServiceUnavailable && a.problem().Code == "queue_full":
			s.w.Add(history.Event{Submit: submit})
			// Full is full for everybody, and what was accepted before goes on.
			wait(ctx, s.between(2*time.Second, 4*time.Second))
			return nil
		}
		s.w.Add(history.Event{Submit: submit})
	}
	return errors.New("the registry never said that it is full")
}

func (f *registryFull) heal(ctx context.Context, s *scene) error {
	for _, id := range f.ids {
		s.load.cancel(ctx, "filler", id)
	}
	return nil
}

// cancelRaces cancels jobs at every moment of their lives, twice at once, while
// others read them.
type cancelRaces struct{}

func (cancelRaces) inject(ctx context.Context, s *scene) error {
	var all sync.WaitGroup
	for i := range 30 {
		after := s.between(0, 1200*time.Millisecond)
		key := fmt.Sprintf("race-%d-%d", i, s.rng.Uint64())
		p := history.Plan{Kind: "raced", MaxAttempts: 1}
		spec := s.load.spec(p, "-run", s.between(time.Millisecond, 800*time.Millisecond).String())
		all.Go(func() {
			id, err := s.load.submit(ctx, "racer", key, p, spec)
			if err != nil || id == "" {
				return
			}
			wait(ctx, after)
			var both sync.WaitGroup
			for range 2 {
				both.Go(func() { s.load.cancel(ctx, "racer", id) })
			}
			both.Go(func() { s.load.read(ctx, "racer", id) })
			both.Wait()
		})
	}
	all.Wait()
	return nil
}

func (cancelRaces) heal(context.Context, *scene) error { return nil }

// timeoutOffline cuts a worker off from a command with a timeout: the job must
// end all the same, by its timeout and the end of the lease at the latest.
type timeoutOffline struct{ w *rig.Worker }

func (f *timeoutOffline) inject(ctx context.Context, s *scene) error {
	const timeout = 4 * time.Second
	p := history.Plan{Kind: "offline", MaxAttempts: 1, TimesOut: true}
	spec := s.load.spec(p, "-run", "60s")
	spec["timeout"], spec["priority"] = int(timeout.Seconds()), 100
	id, err := s.load.submit(ctx, "canary", fmt.Sprintf("offline-%d", s.rng.Uint64()), p, spec)
	if err != nil {
		return err
	}
	began := time.Time{}
	if err := s.within(ctx, time.Minute, func() error {
		j, code := s.load.read(ctx, "canary", id)
		if j == nil {
			return fmt.Errorf("the job is answered %d", code)
		}
		if j.Status != job.Running {
			return fmt.Errorf("the job is %s", j.Status)
		}
		for _, w := range s.rig.Workers() {
			if w.ID == j.WorkerID {
				f.w = w
			}
		}
		began = time.Now()
		return nil
	}); err != nil {
		return err
	}
	if f.w == nil {
		return errors.New("the job runs on no worker of the rig")
	}
	f.w.Proxy.Set(rig.Cut)
	// The lease may have been renewed just now; a busy machine adds to that.
	most := timeout + rig.Lease + rig.GraceSeconds*time.Second + 10*time.Second
	return s.within(ctx, most-time.Since(began), func() error {
		j, code := s.load.read(ctx, "canary", id)
		if j == nil {
			return fmt.Errorf("the job is answered %d", code)
		}
		if !j.Status.Terminal() {
			return fmt.Errorf("the job is %s %v after it began, with a timeout of %v", j.Status, time.Since(began), timeout)
		}
		return nil
	})
}

func (f *timeoutOffline) heal(context.Context, *scene) error {
	if f.w != nil {
		f.w.Proxy.Set(rig.Pass)
	}
	return nil
}

func (s *scene) within(ctx context.Context, d time.Duration, check func() error) error {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	return until(ctx, check)
}

// workerMurdered is a job that kills its worker each time. It may take so many
// workers as it has attempts, and then has failed; other jobs go on.
type workerMurdered struct{ id string }

func (f *workerMurdered) inject(ctx context.Context, s *scene) (err error) {
	p := history.Plan{Kind: "murderer", MaxAttempts: 1}
	f.id, err = s.load.submit(ctx, "canary", fmt.Sprintf("murderer-%d", s.rng.Uint64()), p,
		s.load.spec(p, "-run", "10s", "-murder", s.rig.Binary("worker")))
	if err != nil {
		return err
	}
	return s.within(ctx, 3*time.Minute, func() error {
		if err := s.rig.StartAll(); err != nil {
			return err
		}
		j, code := s.load.read(ctx, "canary", f.id)
		switch {
		case j == nil:
			return fmt.Errorf("the job is answered %d", code)
		case !j.Status.Terminal():
			return fmt.Errorf("the job is %s at attempt %d", j.Status, j.Attempt)
		case j.Status != job.Failed || j.Attempt != 1+job.InfraBudget:
			s.w.Add(history.Event{Left: &history.Left{What: fmt.Sprintf("a job that kills its worker ended %s at attempt %d", j.Status, j.Attempt)}})
		}
		return nil
	})
}

func (f *workerMurdered) heal(_ context.Context, s *scene) error { return s.rig.StartAll() }

// garbagePublished puts messages into the streams that nobody can read. They must
// end as dead letters, and what comes behind them must not wait.
type garbagePublished struct{}

func (garbagePublished) inject(ctx context.Context, s *scene) error {
	nc, err := nats.Connect(s.rig.NATSURL())
	if err != nil {
		return err
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	before, err := letters(ctx, js)
	if err != nil {
		return err
	}
	const ghost = "job-01jd000000000000000000gh0s"
	n := uint64(0)
	for _, subject := range []string{"cmdexec.results." + ghost, "cmdexec.logs." + ghost, "cmdexec.results.nonsense"} {
		for _, data := range []string{"", "{", "null", "[]", strings.Repeat("\xff\x00", 500), `{"schema":99}`} {
			if _, err := js.Publish(ctx, subject, []byte(data)); err != nil {
				return fmt.Errorf("publish to %s: %w", subject, err)
			}
			n++
		}
	}
	return s.within(ctx, time.Minute, func() error {
		now, err := letters(ctx, js)
		if err != nil {
			return err
		}
		if now < before+n {
			return fmt.Errorf("%d dead letters of %d messages that cannot be read", now-before, n)
		}
		return nil
	})
}

func (garbagePublished) heal(context.Context, *scene) error { return nil }

func letters(ctx context.Context, js jetstream.JetStream) (uint64, error) {
	stream, err := js.Stream(ctx, "DEADLETTERS")
	if err != nil {
		return 0, err
	}
	info, err := stream.Info(ctx)
	if err != nil {
		return 0, err
	}
	return info.State.LastSeq, nil
}

// reportsRepeated is a worker of the test's own that reports everything too early,
// too late, again, and differently; and somebody with the token of a real worker
// that reports on leases which it does not have.
type reportsRepeated struct{}

func (reportsRepeated) inject(ctx context.Context, s *scene) error {
	id := fmt.Sprintf("stranger-%d", s.rng.Uint32())
	stranger, err := newStranger(s.rig, id)
	if err != nil {
		return err
	}
	label := map[string]string{"only": id}
	if err := s.within(ctx, time.Minute, func() error { return stranger.register(ctx, label) }); err != nil {
		return err
	}
	stop, cancel := context.WithCancel(ctx)
	var beats sync.WaitGroup
	beats.Go(func() {
		for stop.Err() == nil {
			_ = stranger.heartbeat(stop) // the next one comes soon
			wait(stop, time.Second)
		}
	})
	defer beats.Wait()
	defer cancel()
	const jobs = 8
	for i := range jobs {
		p := history.Plan{Kind: "strange", MaxAttempts: 1, Stranger: true, Code: 1}
		spec := s.load.spec(p, "-run", "1ms")
		spec["constraints"], spec["containerImage"] = map[string]any{"labels": label}, "strange:1"
		job, err := s.load.submit(ctx, "canary", fmt.Sprintf("strange-%d-%d", i, s.rng.Uint64()), p, spec)
		if err != nil {
			return err
		}
		// An assignment may come again, or go back and come as another attempt.
		if err := s.within(ctx, time.Minute, func() error {
			var a workerproto.Assignment
			if stranger.poll(ctx, &a) == nil {
				s.contradict(ctx, stranger, a)
			}
			if j, code := s.load.read(ctx, "canary", job); j == nil || !j.Status.Terminal() {
				return fmt.Errorf("a job of the stranger has not ended (the answer is %d)", code)
			}
			return nil
		}); err != nil {
			return err
		}
	}
	return s.forge(ctx)
}

func (reportsRepeated) heal(context.Context, *scene) error { return nil }

// contradict sends different results of one lease at once, and output and phases
// after them.
func (s *scene) contradict(ctx context.Context, w *stranger, a workerproto.Assignment) {
	now := time.Now()
	var all sync.WaitGroup
	for i := range 12 {
		r := workerproto.Result{Lease: a.Lease, Outcome: job.OutcomeSucceeded, ExitCode: new(int), StartedAt: now, FinishedAt: now}
		switch i % 3 {
		case 1:
			r.Outcome, r.Reason = job.OutcomeFailed, job.ReasonExitCode
			code := 1
			r.ExitCode = &code
		case 2:
			r.LeaseID, r.Message = "lease-01jd000000000000000000gh0s", check.ForgedMessage
		}
		all.Go(func() { _ = w.post(ctx, workerproto.PathResult, r, nil) })
	}
	all.Wait()
	_ = w.post(ctx, workerproto.PathOutput, workerproto.Output{
		Lease: a.Lease, Chunks: []workerproto.Chunk{{Seq: 1, Stream: workerproto.Stdout, Time: now, Data: []byte("late")}},
	}, nil)
	_ = w.post(ctx, workerproto.PathResult, workerproto.Result{
		Lease: a.Lease, Outcome: job.OutcomeCanceled, FinishedAt: now, Message: check.ForgedMessage,
	}, nil)
}

// forge reports the end of jobs that real workers run, with those workers' own
// tokens: with a made-up lease of the current attempt, and with the true lease of
// an attempt before.
func (s *scene) forge(ctx context.Context) error {
	conn, err := s.rig.Bus(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	workers := map[string]*stranger{}
	for _, id := range s.load.openJobs() {
		e, err := conn.Registry().Get(ctx, id)
		if err != nil || e.Record.WorkerID == "" || strings.HasPrefix(e.Record.WorkerID, "stranger") {
			continue // it has ended, or waits
		}
		w := workers[e.Record.WorkerID]
		if w == nil {
			if w, err = newStranger(s.rig, e.Record.WorkerID); err != nil {
				return err
			}
			workers[w.id] = w
		}
		forged := workerproto.Result{
			Lease:   workerproto.Lease{JobID: id, Attempt: e.Record.Attempt, LeaseID: "lease-01jd000000000000000000gh0s"},
			Outcome: job.OutcomeFailed, Reason: job.ReasonStartFailed, Message: check.ForgedMessage, FinishedAt: time.Now(),
		}
		_ = w.post(ctx, workerproto.PathResult, forged, nil) // refused or not: it must change nothing
		for _, a := range e.Record.Attempts {
			if a.Number < e.Record.Attempt {
				forged.Lease = workerproto.Lease{JobID: id, Attempt: a.Number, LeaseID: a.LeaseID}
				_ = w.post(ctx, workerproto.PathResult, forged, nil)
			}
		}
	}
	return nil
}

// stranger speaks the workers' protocol over plain HTTP.
type stranger struct {
	id, token string
	http      *http.Client

	mu      sync.Mutex
	session string
	leases  []workerproto.PhaseLease
}

func newStranger(r *rig.Rig, id string) (*stranger, error) {
	token, err := auth.MintWorker([]byte(rig.WorkerSecret), id, time.Hour, time.Now())
	if err != nil {
		return nil, err
	}
	first := r.Kind(rig.Edge)[0].Listen // one edge: the session is there
	return &stranger{id: id, token: token, http: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", first)
		},
	}}}, nil
}

func (w *stranger) register(ctx context.Context, labels map[string]string) error {
	return w.post(ctx, workerproto.PathRegister, map[string]any{
		"workerId": w.id, "os": "linux", "arch": "amd64", "cpuCores": 1, "totalMemory": 1 << 30, "labels": labels,
		// Of all jobs of a run, its own alone are for containers.
		"executors": []string{job.ExecutorDocker}, "slots": 1, "protocol": workerproto.Version, "running": []any{},
		"fromTheFuture": true, // unknown fields are ignored
	}, nil)
}

func (w *stranger) heartbeat(ctx context.Context) error {
	w.mu.Lock()
	h := workerproto.Heartbeat{Status: workerproto.StatusIdle, FreeSlots: 1, Running: w.leases}
	w.mu.Unlock()
	if h.Running == nil {
		h.Running = []workerproto.PhaseLease{}
	}
	return w.post(ctx, workerproto.PathHeartbeat, h, nil)
}

func (w *stranger) poll(ctx context.Context, a *workerproto.Assignment) error {
	if err := w.do(ctx, http.MethodGet, workerproto.PathGetJob+"?waitSeconds=2", nil, a); err != nil {
		return err
	}
	if a.JobID == "" {
		return errors.New("nothing yet")
	}
	return nil
}

func (w *stranger) post(ctx context.Context, path string, body, into any) error {
	data, err := json.Marshal(body)
	if err != nil {
		return err
	}
	return w.do(ctx, http.MethodPost, path, data, into)
}

func (w *stranger) do(ctx context.Context, method, path string, body []byte, into any) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "http://edge"+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set(workerproto.TokenHeader, w.token)
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	w.mu.Lock()
	if w.session != "" {
		req.Header.Set(workerproto.SessionHeader, w.session)
	}
	w.mu.Unlock()
	resp, err := w.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if name := resp.Header.Get(workerproto.SessionHeader); name != "" && path == workerproto.PathRegister {
		w.mu.Lock()
		w.session = name
		w.mu.Unlock()
	}
	if resp.StatusCode >= 300 {
		return fmt.Errorf("%s %s: %s", method, path, resp.Status)
	}
	if into == nil || resp.StatusCode == http.StatusNoContent {
		return nil
	}
	return json.NewDecoder(resp.Body).Decode(into)
}
