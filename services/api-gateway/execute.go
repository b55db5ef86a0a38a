package gateway

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/httpkit"
)

const (
	// executeQueueWait is how long a waiting call lets its job wait where the job
	// itself has no limit for that.
	executeQueueWait = 300 * time.Second
	// executeSlack is for starting, stopping and reporting.
	executeSlack = 15 * time.Second
	// maxExecuteOutput is what is returned of each stream.
	maxExecuteOutput = 1 << 20
)

type executeInput struct {
	IdempotencyKey string `header:"Idempotency-Key" doc:"As for createJob: a repeated request waits for the same job."`
	OnDisconnect   string `query:"onDisconnect" enum:"cancel,leave" doc:"What becomes of the job when the client goes away while it waits. Default cancel."`
	Accept         string `header:"Accept" hidden:"true"`
}

func (s *Service) execute(ctx context.Context, c *call, in *executeInput) (*raw, error) {
	leave := in.OnDisconnect == "leave"
	if !leave && in.OnDisconnect != "" && in.OnDisconnect != "cancel" {
		return nil, badParameter("onDisconnect", "cancel or leave")
	}
	done, p := s.streams.enter(c.user) // before there is a job that nobody waits for
	if p != nil {
		return nil, p
	}
	rec, _, err := s.submit(ctx, c, in.IdempotencyKey)
	if err != nil {
		done()
		return nil, err
	}
	return respond(func(w http.ResponseWriter, r *http.Request) {
		defer done()
		_ = httpkit.LongLived(w) // a writer without deadlines has none to lift
		w.Header().Set("Location", "/api/jobs/"+rec.ID)
		if accepts(in.Accept, "text/event-stream") {
			s.executeStream(w, r, rec, leave)
			return
		}
		s.executeWait(w, r, rec, leave)
	}), nil
}

// patience is how long a waiting call waits for a job.
func patience(spec *job.Spec) time.Duration {
	queue := executeQueueWait
	if spec.Timeouts.Queue > 0 {
		queue = time.Duration(spec.Timeouts.Queue) * time.Second
	}
	return queue + time.Duration(spec.Timeout+spec.GraceSeconds())*time.Second + executeSlack
}

func (s *Service) executeStream(w http.ResponseWriter, r *http.Request, rec *job.Record, leave bool) {
	ctx, cancel := context.WithTimeout(r.Context(), patience(&rec.Spec))
	defer cancel()
	f := s.begin(rec, logQuery{})
	err := s.streamOutput(ctx, w, f, "")
	if err != nil && !errors.Is(err, errStopping) && ctx.Err() != context.DeadlineExceeded {
		s.abandon(r.Context(), rec.ID, leave)
	}
	s.cut(ctx, err)
}

func (s *Service) executeWait(w http.ResponseWriter, r *http.Request, rec *job.Record, leave bool) {
	ctx, cancel := context.WithTimeout(r.Context(), patience(&rec.Spec))
	defer cancel()
	ended, err := s.await(ctx, rec)
	if err != nil {
		p := httpkit.Problem{JobID: rec.ID, Hint: "the job goes on: ask for it by its id"}
		switch {
		case errors.Is(err, errStopping):
			p.Status, p.Code, p.Detail, p.RetryAfter = http.StatusServiceUnavailable, codeStopping, "the server stops", retrySoon
		case r.Context().Err() != nil:
			s.abandon(r.Context(), rec.ID, leave)
			return // nobody listens
		default:
			p.Status, p.Code, p.Detail = http.StatusGatewayTimeout, codeWaitTimeout, "the job did not end in time"
		}
		httpkit.Write(w, r, p)
		return
	}
	result := s.result(ctx, ended)
	w.Header().Set("Content-Type", "application/json")
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(slowClient))
	_ = writeJSON(w, result) // these types always marshal
}

// abandon cancels the job of a client that went away, unless it is to be left.
func (s *Service) abandon(ctx context.Context, jobID string, leave bool) {
	if leave {
		return
	}
	ctx = context.WithoutCancel(ctx)
	if _, err := s.cancel(ctx, jobID); err != nil {
		s.logger.WarnContext(ctx, "cancel after disconnect failed", "jobId", jobID, "err", err)
	}
}

// await blocks until the job has ended. The error is ctx's or errStopping.
func (s *Service) await(ctx context.Context, rec *job.Record) (*job.Record, error) {
	l := s.hub.listen(rec.ID)
	defer l.close()
	tick := time.NewTicker(reread)
	defer tick.Stop()
	stopping := httpkit.Stopping(ctx)
	if newer, err := s.record(ctx, rec.ID); err == nil {
		rec = newer
	}
	for !rec.State.Terminal() {
		select {
		case <-ctx.Done():
			return rec, ctx.Err()
		case <-stopping:
			return rec, errStopping
		case newer := <-l.changes:
			if newer.Version > rec.Version {
				rec = newer
			}
		case <-tick.C:
			if newer, err := s.record(ctx, rec.ID); err == nil && newer.Version > rec.Version {
				rec = newer
			}
		}
	}
	return rec, nil
}

// result collects what a job that ended has printed.
func (s *Service) result(ctx context.Context, rec *job.Record) api.ExecuteResult {
	out := api.ExecuteResult{
		JobID: rec.ID, Status: rec.State, ExitCode: rec.ExitCode, Signal: rec.Signal, Reason: rec.Reason, Message: rec.Message,
	}
	if a := rec.Last(); a != nil {
		out.DurationMs = a.DurationMs
	}
	switch {
	case !rec.StartedAt.IsZero():
		out.QueuedMs = max(0, rec.StartedAt.Sub(rec.CreatedAt).Milliseconds())
	case !rec.FinishedAt.IsZero():
		out.QueuedMs = max(0, rec.FinishedAt.Sub(rec.CreatedAt).Milliseconds())
	}
	if rec.Attempt == 0 {
		return out
	}
	var stdout, stderr capped
	f := s.begin(rec, logQuery{})
	f.only = true
	f.emit = func(_ int, c *workerproto.Chunk) error {
		switch c.Stream {
		case workerproto.Stdout:
			stdout.add(c.Data)
		case workerproto.Stderr:
			stderr.add(c.Data)
		}
		if stdout.cut && stderr.cut {
			return errEnough
		}
		return nil
	}
	err := f.collect(ctx)
	incomplete := err != nil || !f.complete
	out.Stdout, out.StdoutTruncated = string(stdout.data), stdout.cut || incomplete
	out.Stderr, out.StderrTruncated = string(stderr.data), stderr.cut || incomplete
	return out
}

var errEnough = errors.New("all that is wanted has been read")

// collect is run for a job that ended, without live output and changes: it asks
// the persister until everything is there or time is up.
func (f *follower) collect(ctx context.Context) error {
	f.fresh = true
	delay := pollFirst
	for {
		done, err := f.settle(time.Now())
		if done || err != nil {
			return err
		}
		progress, err := f.pull(ctx)
		if err != nil {
			return err
		}
		if progress {
			delay = pollFirst
			continue
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(delay):
		}
		delay = min(2*delay, pollLast)
	}
}

// capped keeps the first bytes of a stream.
type capped struct {
	data []byte
	cut  bool
}

func (c *capped) add(p []byte) {
	if room := maxExecuteOutput - len(c.data); len(p) > room {
		p, c.cut = p[:room], true
	}
	c.data = append(c.data, p...)
}

type eventsInput struct {
	JobID string `path:"jobId" doc:"The job's id."`
}

func (s *Service) jobEvents(ctx context.Context, c *call, in *eventsInput) (*raw, error) {
	rec, err := s.visible(ctx, c, in.JobID)
	if err != nil {
		return nil, err
	}
	return respond(func(w http.ResponseWriter, r *http.Request) {
		ctx, done, ok := s.enterStream(w, r, c)
		if !ok {
			return
		}
		defer done()
		s.cut(ctx, s.streamEvents(ctx, w, rec))
	}), nil
}

// streamEvents sends the states of a job, the present one first, until it ended.
func (s *Service) streamEvents(ctx context.Context, w http.ResponseWriter, rec *job.Record) error {
	l := s.hub.listen(rec.ID)
	defer l.close()
	if newer, err := s.record(ctx, rec.ID); err == nil {
		rec = newer
	}
	out := openStream(w, "text/event-stream")
	if err := cmp.Or(out.event("", "state", stateEvent(rec)), out.flush()); err != nil {
		return err
	}
	rereads := time.NewTicker(reread)
	defer rereads.Stop()
	beats := time.NewTicker(keepAlive)
	defer beats.Stop()
	stopping := httpkit.Stopping(ctx)
	for !rec.State.Terminal() {
		newer := rec
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-stopping:
			return errStopping
		case newer = <-l.changes:
		case <-rereads.C:
			if r, err := s.record(ctx, rec.ID); err == nil {
				newer = r
			}
		case <-beats.C:
			if err := out.comment(); err != nil {
				return err
			}
		}
		if newer.Version <= rec.Version {
			continue
		}
		changed := newer.State != rec.State || newer.Attempt != rec.Attempt
		rec = newer
		if !changed {
			continue
		}
		if err := cmp.Or(out.event("", "state", stateEvent(rec)), out.flush()); err != nil {
			return err
		}
	}
	return nil
}

func stateEvent(rec *job.Record) api.StateEvent {
	return api.StateEvent{
		JobID: rec.ID, Status: rec.State, Attempt: rec.Attempt, Version: rec.Version, At: rec.StateAt, Reason: rec.Reason,
	}
}
