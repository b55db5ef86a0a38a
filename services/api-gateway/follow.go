package gateway

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/httpkit"
)

const (
	// defaultArchiveWait is how long after the end of an attempt its output may take
	// to be stored. It bounds how long a reader waits for what is missing.
	defaultArchiveWait = 10 * time.Second
	// lostWait is the same for an attempt without a manifest: nobody knows how
	// much there is.
	lostWait = 2 * time.Second
	// settled is the age at which an attempt's output is as complete as it will be.
	settled = time.Minute

	pollFirst = 5 * time.Millisecond
	pollLast  = 500 * time.Millisecond

	historyChunks = 256       // per question to the persister
	historyBytes  = 384 << 10 // of data: as base64 within the bus's message limit
	heldBytes     = 1 << 20   // of live output that waits for a gap to close
	liveQueue     = 16        // chunks between the live follower and the reader: at most 1 MiB
)

var errStopping = errors.New("the server stops")

// follower reads the output of one job in order, attempt after attempt, from two
// sources: the persister has what is archived, the LOGS stream what is new. Each
// chunk is handed on exactly once: what comes twice is skipped, and where a
// number is missing the persister is asked until it has it or time is up.
//
// The end of the output rides inside the worker's result and appears only in the
// archive, after the job has ended: the attempt's manifest says how many chunks
// to wait for.
type follower struct {
	s       *Service
	rec     *job.Record
	attempt int   // being read; 0: none has begun
	last    int64 // seq of the newest chunk that was handed on
	only    bool  // end with this attempt
	emit    func(attempt int, c *workerproto.Chunk) error
	flush   func() error // called before waiting: what emit was given may be sent now; may be nil
	alive   func() error // called every keepAlive; may be nil

	held      []heldChunk // live output that cannot be handed on yet, in order of arrival
	heldSize  int
	gapSince  time.Time // when held began to wait for output that is missing
	endedAt   time.Time // when the end of the attempt was seen
	endedWith bool      // and it had a manifest
	pulled    bool      // the persister has answered for this attempt since then
	fresh     bool      // the attempt's history has not been read yet
	lossy     bool      // output was skipped
	bad       bool      // what is stored of the attempt is not what its manifest declares
	complete  bool      // all output of the last attempt was handed on
}

type heldChunk struct {
	attempt int
	chunk   workerproto.Chunk
}

type liveChunk struct {
	lease workerproto.Lease
	chunk workerproto.Chunk
}

// run reads until the job has ended and its output is complete, or as complete
// as it gets. f.rec is then the newest record. The error is ctx's, errStopping,
// or what emit returned.
func (f *follower) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	l := f.s.hub.listen(f.rec.ID)
	defer l.close()
	if rec, err := f.s.record(ctx, f.rec.ID); err == nil {
		f.update(rec)
	}
	f.fresh = true

	var live chan liveChunk
	if !f.rec.State.Terminal() {
		live = make(chan liveChunk, liveQueue)
		done := make(chan struct{})
		jobID := f.rec.ID // the record is the loop's alone
		go func() {
			defer close(done)
			f.live(ctx, jobID, live)
		}()
		defer func() { cancel(); <-done }()
	}
	return f.loop(ctx, l, live)
}

// live hands on the LOGS stream until ctx ends.
func (f *follower) live(ctx context.Context, jobID string, out chan<- liveChunk) {
	for ctx.Err() == nil {
		err := f.s.bus.FollowLogs(ctx, jobID, func(l workerproto.Lease, c workerproto.Chunk) {
			select {
			case out <- liveChunk{l, c}:
			case <-ctx.Done():
			}
		})
		if ctx.Err() != nil {
			return
		}
		// The persister is asked every few seconds as well: nothing is lost by waiting.
		f.s.logger.DebugContext(ctx, "live output ended", "err", err)
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
}

func (f *follower) loop(ctx context.Context, l *listener, live <-chan liveChunk) error {
	stopping := httpkit.Stopping(ctx)
	rereads := time.NewTicker(reread)
	defer rereads.Stop()
	beats := time.NewTicker(keepAlive)
	defer beats.Stop()
	delay := pollFirst
	poll := time.NewTimer(0)
	defer poll.Stop()
	armed := true
	for {
		done, err := f.settle(time.Now())
		if done || err != nil {
			return err
		}
		if !armed && f.wantsHistory() {
			poll.Reset(delay)
			armed = true
		}
		if f.flush != nil {
			if err := f.flush(); err != nil {
				return err
			}
		}
		in := live
		if f.heldSize >= heldBytes {
			in = nil // the persister first
		}
		progress := false
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-stopping:
			return errStopping
		case rec := <-l.changes:
			progress = f.update(rec)
		case c := <-in:
			if progress, err = f.offer(c.lease.Attempt, c.chunk); err != nil {
				return err
			}
			if c.lease.Attempt > f.rec.Attempt { // the record is behind
				f.refresh(ctx)
			}
		case <-rereads.C:
			f.refresh(ctx)
			if f.attempt > 0 {
				if progress, err = f.pull(ctx); err != nil {
					return err
				}
			}
		case <-beats.C:
			if f.alive != nil {
				if err := f.alive(); err != nil {
					return err
				}
			}
		case <-poll.C:
			armed = false
			if f.attempt > 0 {
				if progress, err = f.pull(ctx); err != nil {
					return err
				}
			}
			delay = min(2*delay, pollLast)
		}
		if progress {
			delay = pollFirst
		}
	}
}

// wantsHistory reports whether the persister should be asked soon.
func (f *follower) wantsHistory() bool {
	return f.attempt > 0 && (f.fresh || len(f.held) > 0 || !f.endedAt.IsZero())
}

func (f *follower) refresh(ctx context.Context) {
	if rec, err := f.s.record(ctx, f.rec.ID); err == nil {
		f.update(rec)
	}
}

func (f *follower) update(rec *job.Record) bool {
	if rec.Version <= f.rec.Version {
		return false
	}
	f.rec = rec
	return true
}

// settle moves on as far as the record and what was read allow. done means that
// there is nothing more to read.
func (f *follower) settle(now time.Time) (done bool, err error) {
	for {
		if f.attempt == 0 {
			if f.rec.Attempt == 0 {
				f.complete = f.rec.State.Terminal() // nothing ran: nothing was printed
				return f.complete, nil
			}
			f.enter(1)
		}
		if err := f.closeGap(now); err != nil {
			return false, err
		}
		end := endOf(f.rec, f.attempt)
		if !end.ended {
			return false, nil
		}
		if f.endedAt.IsZero() || end.manifest != nil && !f.endedWith {
			f.endedAt, f.endedWith, f.pulled = now, end.manifest != nil, false
		}
		if !f.readAll(end, now) {
			return false, nil
		}
		f.complete = end.complete(f.last) && !f.lossy && !f.bad
		switch {
		case f.only:
			return true, nil
		case f.attempt < f.rec.Attempt:
			f.enter(f.attempt + 1)
		case f.rec.State.Terminal():
			return true, nil
		default:
			return false, nil
		}
	}
}

// enter begins an attempt, with what was held for it.
func (f *follower) enter(attempt int) {
	f.attempt, f.last = attempt, 0
	f.fresh, f.lossy, f.bad, f.complete, f.pulled = true, false, false, false, false
	f.endedAt, f.endedWith, f.gapSince = time.Time{}, false, time.Time{}
}

// readAll reports whether nothing more is to be expected of an attempt that ended.
func (f *follower) readAll(end attemptEnd, now time.Time) bool {
	old := !end.at.IsZero() && now.Sub(end.at) > settled
	switch {
	case end.silent:
		return true
	case end.manifest != nil && f.last >= end.manifest.Chunks:
		return true
	case old && f.pulled && !f.holds():
		return true
	case end.manifest != nil:
		return now.Sub(f.endedAt) > f.s.archiveWait
	default:
		return now.Sub(f.endedAt) > min(lostWait, f.s.archiveWait) && f.pulled || now.Sub(f.endedAt) > f.s.archiveWait
	}
}

func (f *follower) holds() bool {
	return slices.ContainsFunc(f.held, func(h heldChunk) bool { return h.attempt == f.attempt })
}

// attemptEnd is what a record says about the end of one attempt.
type attemptEnd struct {
	ended    bool
	silent   bool // it never ran: no output is to be expected
	at       time.Time
	manifest *job.Manifest
}

// complete reports whether everything that was printed is there, when the last
// chunk is the given one.
func (e attemptEnd) complete(last int64) bool {
	return e.silent || e.manifest != nil && last >= e.manifest.Chunks && e.manifest.TruncatedBytes == 0
}

func endOf(rec *job.Record, attempt int) attemptEnd {
	end := attemptEnd{ended: attempt < rec.Attempt || rec.State.Terminal(), at: rec.FinishedAt}
	for i := range rec.Attempts {
		a := &rec.Attempts[i]
		if a.Number != attempt {
			continue
		}
		end.ended = end.ended || a.Outcome != ""
		end.silent = a.Outcome == job.OutcomeReturned || a.Outcome == job.OutcomeRejected
		end.manifest = a.Manifest
		if !a.FinishedAt.IsZero() {
			end.at = a.FinishedAt
		}
	}
	return end
}

// offer takes one chunk of either source. It reports whether anything was handed on.
func (f *follower) offer(attempt int, c workerproto.Chunk) (bool, error) {
	switch {
	case attempt < f.attempt, attempt == f.attempt && c.Seq <= f.last:
		return false, nil
	case attempt == f.attempt && c.Seq == f.last+1:
		if err := f.hand(&c); err != nil {
			return false, err
		}
		return true, f.release()
	}
	if f.heldSize < heldBytes { // beyond it the persister will have it
		f.held = append(f.held, heldChunk{attempt, c})
		f.heldSize += len(c.Data)
	}
	return false, nil
}

func (f *follower) hand(c *workerproto.Chunk) error {
	f.last = c.Seq
	f.gapSince = time.Time{}
	return f.emit(f.attempt, c)
}

// release hands on what was held and fits now, and drops what was handed on.
func (f *follower) release() error {
	for again := true; again; {
		again = false
		kept := f.held[:0]
		f.heldSize = 0
		for i := range f.held {
			h := f.held[i]
			switch {
			case h.attempt < f.attempt, h.attempt == f.attempt && h.chunk.Seq <= f.last:
			case h.attempt == f.attempt && h.chunk.Seq == f.last+1:
				if err := f.hand(&h.chunk); err != nil {
					return err
				}
				again = true
			default:
				kept = append(kept, h)
				f.heldSize += len(h.chunk.Data)
			}
		}
		clear(f.held[len(kept):])
		f.held = kept
	}
	return nil
}

// closeGap goes on without output that did not come in time.
func (f *follower) closeGap(now time.Time) error {
	if err := f.release(); err != nil {
		return err
	}
	if !f.holds() {
		f.gapSince = time.Time{}
		return nil
	}
	if f.gapSince.IsZero() {
		f.gapSince = now
		return nil
	}
	if now.Sub(f.gapSince) < f.s.archiveWait {
		return nil
	}
	next := int64(0)
	for _, h := range f.held {
		if h.attempt == f.attempt && (next == 0 || h.chunk.Seq < next) {
			next = h.chunk.Seq
		}
	}
	f.lossy = true
	f.last = next - 1
	return f.release()
}

// pull reads what the persister has beyond what was handed on. A persister that
// does not answer is no error: it is asked again.
func (f *follower) pull(ctx context.Context) (progress bool, err error) {
	for {
		page, err := f.s.storedLogs(ctx, busmsg.GetLogs{
			JobID: f.rec.ID, Attempt: f.attempt, After: f.last, Limit: historyChunks, MaxBytes: historyBytes,
		})
		if err != nil {
			return progress, ctx.Err()
		}
		f.bad = page.Verdict.Bad()
		before := f.last
		for i := range page.Chunks {
			if _, err := f.offer(f.attempt, page.Chunks[i]); err != nil {
				return progress, err
			}
		}
		f.fresh, f.pulled = false, true
		if f.last == before || !page.More {
			return progress || f.last > before, nil
		}
		progress = true
	}
}

// storedLogs asks the persister for output.
func (s *Service) storedLogs(ctx context.Context, q busmsg.GetLogs) (busmsg.Logs, error) {
	ctx, cancel := context.WithTimeout(ctx, queryTimeout)
	defer cancel()
	return bus.Query(ctx, s.bus, bus.QueryLogs, q)
}

// ended is the job as the end of a stream shows it: its logs are complete only
// if the stream was.
func (f *follower) ended() api.Job {
	j := api.FromRecord(f.rec)
	if j.Logs != nil && !f.complete {
		j.Logs.Complete = false
	}
	return j
}
