package session

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/fleet"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/lifecycle"
)

// How beats are gathered. A request goes out at once when nothing was sent
// lately; otherwise what is urgent waits for urgentWindow after the last one and
// plain heartbeats for plainWindow, and everything waits while a request is under way.
const (
	urgentWindow   = 2 * time.Millisecond
	plainWindow    = 100 * time.Millisecond
	beatTimeout    = 3 * time.Second
	maxBeatBytes   = 384 << 10 // estimated, of one request; one worker's part always fits beside it
	maxProgress    = 4096      // reports of one worker that wait for an answer
	progressBytes  = 256 << 10 // estimated, of one worker's reports in one request
	closingTimeout = 2 * time.Second
)

// beater sends what the edge's workers say to the leading scheduler, all of them
// together and one request at a time. What was not answered is sent again, with
// the newest heartbeat.
type beater struct {
	edgeID  string
	request func(context.Context, busmsg.BeatRequest) (busmsg.BeatReply, error)
	log     *slog.Logger
	metrics *Metrics
	wake    chan struct{}

	mu        sync.Mutex
	dirty     []*report // in the order in which they got something to say
	urgent    bool
	lastSent  time.Time
	notBefore time.Time // set while the leader does not answer

	// Of flush, which runs once at a time: used again, since it has every heartbeat.
	batch   []outgoing
	workers []busmsg.WorkerBeat
	answers map[string]*busmsg.WorkerReply
}

// report is what one session has to say. Guarded by beater.mu.
type report struct {
	to     *Session
	queued bool

	hello    *fleet.Worker // until answered
	holding  []workerproto.Lease
	greeted  bool // the hello was answered
	sent     bool // a hello went out, answered or not
	beaten   bool // a heartbeat went out: the first one is urgent
	closed   bool
	progress []busmsg.Progress
	beat     *workerproto.Heartbeat
}

func newBeater(edgeID string, b Bus, log *slog.Logger, m *Metrics) *beater {
	return &beater{
		edgeID: edgeID, request: b.RequestBeat, log: log, metrics: m, wake: make(chan struct{}, 1), answers: map[string]*busmsg.WorkerReply{},
	}
}

func (b *beater) update(r *report, urgent bool, change func(*report)) {
	b.mu.Lock()
	change(r)
	b.enqueue(r, urgent)
	b.mu.Unlock()
	b.tell()
}

func (b *beater) tell() {
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

func (b *beater) enqueue(r *report, urgent bool) {
	if !r.queued && r.ready() {
		r.queued = true
		b.dirty = append(b.dirty, r)
	}
	b.urgent = b.urgent || urgent && r.queued
}

// ready: there is something that may be sent now. Nothing goes out before the
// hello, and nothing beside it.
func (r *report) ready() bool {
	switch {
	case r.closed:
		return r.sent || len(r.progress) > 0
	case !r.greeted:
		return r.hello != nil
	default:
		return len(r.progress) > 0 || r.beat != nil
	}
}

func (b *beater) hello(r *report, w *fleet.Worker, holding []workerproto.Lease) {
	b.update(r, true, func(r *report) { r.hello, r.holding = w, holding })
}

func (b *beater) heartbeat(r *report, h workerproto.Heartbeat) {
	b.mu.Lock()
	r.beat = &h
	b.enqueue(r, !r.beaten)
	b.mu.Unlock()
	b.tell()
}

// progress keeps each step of a lease once; when a worker reports more than is
// reasonable while nobody answers, the oldest reports go.
func (b *beater) progress(r *report, p busmsg.Progress) {
	b.update(r, true, func(r *report) { r.addProgress(p) })
}

func (r *report) addProgress(p busmsg.Progress) {
	for i := range r.progress {
		if r.progress[i].LeaseID == p.LeaseID && r.progress[i].Step == p.Step {
			return
		}
	}
	if len(r.progress) >= maxProgress {
		r.progress = append(r.progress[:0], r.progress[1:]...)
	}
	r.progress = append(r.progress, p)
}

// older puts reports before those that came later, which repeat none of them.
func older(sent, newer []busmsg.Progress) []busmsg.Progress {
	all := sent
	for i := range newer {
		repeats := func(p busmsg.Progress) bool { return p.LeaseID == newer[i].LeaseID && p.Step == newer[i].Step }
		if !slices.ContainsFunc(sent, repeats) {
			all = append(all, newer[i])
		}
	}
	return all[max(len(all)-maxProgress, 0):]
}

// close reports the end of a session, if the scheduler ever heard of it. What
// the worker reported before still goes out.
func (b *beater) close(r *report) {
	b.update(r, true, func(r *report) { r.closed, r.hello, r.holding, r.beat = true, nil, nil, nil })
}

// run sends until ctx ends, and then once more what is left.
func (b *beater) run(ctx context.Context) {
	backoff := lifecycle.Backoff{Min: 50 * time.Millisecond, Max: time.Second}
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for ctx.Err() == nil {
		wait, some := b.due(time.Now())
		if some && wait <= 0 {
			b.flush(ctx, &backoff)
			continue
		}
		if !some {
			wait = time.Hour
		}
		timer.Reset(wait)
		select {
		case <-b.wake:
		case <-timer.C:
		case <-ctx.Done():
		}
	}
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), closingTimeout)
	defer cancel()
	for last.Err() == nil {
		if _, some := b.due(time.Now()); !some || !b.flush(last, &backoff) {
			return
		}
	}
}

// due says how long to wait for the next request, if there is something to send.
func (b *beater) due(now time.Time) (time.Duration, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.dirty) == 0 {
		return 0, false
	}
	window := plainWindow
	if b.urgent {
		window = urgentWindow
	}
	at := b.lastSent.Add(window)
	if at.Before(b.notBefore) {
		at = b.notBefore
	}
	return at.Sub(now), true
}

// outgoing is one session's part of a request under way.
type outgoing struct {
	r    *report
	beat busmsg.WorkerBeat
}

// flush sends one request and hands out the answers. It reports whether the
// leader answered.
func (b *beater) flush(ctx context.Context, backoff *lifecycle.Backoff) bool {
	batch := b.collect(time.Now())
	if len(batch) == 0 {
		return true
	}
	req := busmsg.BeatRequest{EdgeID: b.edgeID, Workers: b.workers[:0]}
	for i := range batch {
		req.Workers = append(req.Workers, batch[i].beat)
	}
	answers := b.answers
	defer func() { // what is kept is room, not what was in it
		clear(batch)
		clear(req.Workers)
		clear(answers)
		b.batch, b.workers = batch[:0], req.Workers[:0]
	}()
	bounded, cancel := context.WithTimeout(ctx, beatTimeout)
	reply, err := b.request(bounded, req)
	cancel()
	if err != nil {
		b.metrics.Beats.WithLabelValues("unanswered").Inc()
		wait := backoff.Next()
		b.log.Debug("beat was not answered", "err", err, "workers", len(batch), "retryIn", wait)
		b.giveBack(batch, time.Now().Add(wait))
		return false
	}
	backoff.Reset()
	b.metrics.Beats.WithLabelValues("answered").Inc()

	for i := range reply.Workers {
		answers[reply.Workers[i].WorkerID] = &reply.Workers[i]
	}
	var unheard []outgoing // hellos that the leader passed over
	for i := range batch {
		out := &batch[i]
		answer := answers[out.beat.WorkerID]
		switch {
		case out.beat.Hello == nil && out.beat.Heartbeat == nil: // nothing to hear
		case answer != nil && (answer.SessionID == out.beat.SessionID || answer.SessionID == ""):
			if out.beat.Hello != nil {
				b.greet(out.r)
			}
			out.r.to.answered(&out.beat, answer)
		case answer != nil:
			out.r.to.contested()
			if out.beat.Hello != nil {
				unheard = append(unheard, *out)
			}
		case out.beat.Hello != nil:
			unheard = append(unheard, *out)
		}
	}
	if len(unheard) > 0 {
		b.giveBack(unheard, time.Now().Add(backoff.Next()))
	}
	return true
}

func (b *beater) greet(r *report) {
	b.update(r, true, func(r *report) { r.greeted, r.hello, r.holding = true, nil, nil })
}

// collect takes what may be sent, up to the size of one request. It uses the room
// of the batch before.
func (b *beater) collect(now time.Time) []outgoing {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.lastSent, b.urgent = now, false
	batch := b.batch[:0]
	var again []*report // have said a part
	size := 0
	for i, r := range b.dirty {
		if size >= maxBeatBytes {
			b.dirty = append(append(b.dirty[:0], b.dirty[i:]...), again...)
			b.urgent = true
			return batch
		}
		r.queued = false
		if !r.ready() {
			continue
		}
		out := outgoing{r: r, beat: busmsg.WorkerBeat{WorkerID: r.to.workerID, SessionID: r.to.id}}
		switch {
		case r.closed:
			out.beat.Progress = r.takeProgress()
			if len(r.progress) == 0 { // the end comes last
				out.beat.Closed, r.sent = r.sent, false
			}
		case !r.greeted:
			out.beat.Hello, out.beat.Holding = r.hello, r.holding
			r.sent = true
		default:
			out.beat.Progress, out.beat.Heartbeat = r.takeProgress(), r.beat
			r.beaten = r.beaten || r.beat != nil
			r.beat = nil
		}
		if r.greeted && len(r.progress) > 0 || r.closed && r.ready() {
			r.queued = true
			again = append(again, r)
		}
		size += estimate(&out.beat)
		batch = append(batch, out)
	}
	clear(b.dirty)
	b.dirty = append(b.dirty[:0], again...)
	b.urgent = len(again) > 0
	return batch
}

// takeProgress takes as many reports, oldest first, as may go into one request.
func (r *report) takeProgress() []busmsg.Progress {
	n := 0
	for size := 0; n < len(r.progress) && size < progressBytes; n++ {
		size += estimateProgress(&r.progress[n])
	}
	head := r.progress[:n:n]
	r.progress = r.progress[n:]
	if len(r.progress) == 0 {
		r.progress = nil
	}
	return head
}

// giveBack puts back what was not answered, behind what has come since.
func (b *beater) giveBack(batch []outgoing, notBefore time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.notBefore = notBefore
	for i := range batch {
		r, sent := batch[i].r, &batch[i].beat
		if sent.Closed {
			r.sent = true
		}
		if r.beat == nil && !r.closed {
			r.beat = sent.Heartbeat
		}
		r.progress = older(sent.Progress, r.progress)
		b.enqueue(r, sent.Heartbeat == nil || len(r.progress) > 0)
	}
}

// estimate is the size of a worker's part as JSON, roughly and not too low.
func estimate(w *busmsg.WorkerBeat) int {
	n := 160 + 110*len(w.Holding)
	for i := range w.Progress {
		n += estimateProgress(&w.Progress[i])
	}
	if w.Hello != nil {
		n += 1024
		for k, v := range w.Hello.Labels {
			n += len(k) + escaped*len(v) + 8
		}
	}
	if w.Heartbeat != nil {
		n += 256 + escaped*len(w.Heartbeat.Reason) + 145*len(w.Heartbeat.Running)
	}
	return n
}

// escaped is how much longer JSON can make a text.
const escaped = 6

func estimateProgress(p *busmsg.Progress) int { return 220 + escaped*len(p.Reason) }
