package gateway

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/kit/httpkit"
)

const (
	// watchQueue is how many changes a watcher may be behind. One that is further
	// behind is cut off: it must not hold more, and must not miss one unknowingly.
	watchQueue = 1024
	// watchStart bounds how long a stream waits for the follower to have read the
	// registry.
	watchStart = 10 * time.Second
)

// watcher receives the changes of all jobs that match, from when begun is closed.
// Call close.
type watcher struct {
	hub     *hub
	match   func(*job.Record) bool
	begun   chan struct{}
	from    uint64            // once begun: every change after this revision comes
	life    string            // once begun: the generation of that revision
	changes chan watchedState // closed where the watcher was too slow, or the registry was lost
}

type watchedState struct {
	revision uint64
	event    api.StateEvent
}

// watch subscribes to the jobs that match. The function is called with the hub
// locked, for every change of every job.
func (h *hub) watch(match func(*job.Record) bool) *watcher {
	w := &watcher{hub: h, match: match, begun: make(chan struct{}), changes: make(chan watchedState, watchQueue)}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.watchers[w] = struct{}{}
	h.add()
	if h.caughtUp {
		w.begin()
	}
	return w
}

func (w *watcher) close() {
	w.hub.mu.Lock()
	defer w.hub.mu.Unlock()
	w.cutOff()
}

// begin, offer and cutOff are called with the hub locked.
func (w *watcher) begin() {
	select {
	case <-w.begun:
	default:
		w.from, w.life = w.hub.last, w.hub.life
		close(w.begun)
	}
}

func (w *watcher) offer(e *bus.Entry) {
	select {
	case <-w.begun:
	default:
		return // it is in what the watcher begins after
	}
	if !w.match(&e.Record) {
		return
	}
	select {
	case w.changes <- watchedState{e.Revision, stateEvent(&e.Record)}:
	default:
		w.cutOff()
	}
}

func (w *watcher) cutOff() {
	if _, ok := w.hub.watchers[w]; !ok {
		return
	}
	delete(w.hub.watchers, w)
	w.hub.count--
	close(w.changes)
}

// checkLife cuts off the watchers of a registry that is not there any more: the
// revisions of another one begin anew.
func (h *hub) checkLife() {
	now := h.generation()
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.caughtUp || now == "" || now == h.life {
		return
	}
	h.last, h.life = 0, now
	for w := range h.watchers {
		w.cutOff()
	}
}

type allEventsInput struct {
	Queue       string   `query:"queue" doc:"Only jobs of this queue."`
	Label       []string `query:"label,explode" doc:"Only jobs with this label, as name:value; may be repeated, all must match."`
	LastEventID string   `header:"Last-Event-ID" doc:"id of the last event that was seen: go on after it."`
}

// allEvents streams the state changes of all jobs that the caller may see.
func (s *Service) allEvents(_ context.Context, c *call, in *allEventsInput) (*raw, error) {
	q, err := listQuery(c, &listInput{Queue: in.Queue, Label: in.Label})
	if err != nil {
		return nil, err
	}
	after, err := parseStreamID(in.LastEventID)
	if err != nil {
		return nil, err
	}
	f := &liveFilter{owner: q.Owner, queue: q.Queue, labels: q.Labels}
	return respond(func(w http.ResponseWriter, r *http.Request) {
		_ = httpkit.LongLived(w) // a writer without deadlines has none to lift
		ctx, done, ok := s.enterStream(w, r, c)
		if !ok {
			return
		}
		defer done()
		watch := s.hub.watch(f.matchSpec)
		defer watch.close()
		if err := s.begun(ctx, watch); err != nil {
			httpkit.Write(w, r, *s.problemOf(ctx, err))
			return
		}
		s.cut(ctx, s.streamAll(ctx, openStream(w, "text/event-stream"), watch, f, after))
	}), nil
}

// begun waits until the watcher is told of every change.
func (s *Service) begun(ctx context.Context, watch *watcher) error {
	late := time.NewTimer(watchStart)
	defer late.Stop()
	select {
	case <-watch.begun:
		return nil
	case <-late.C:
		return bus.ErrUnavailable
	case <-httpkit.Stopping(ctx):
		return context.Canceled
	case <-ctx.Done():
		return ctx.Err()
	}
}

// streamAll sends what was missed, if the stream goes on after an earlier one,
// then ready, and then what happens. It returns nil where it ends the stream by an
// event of its own.
func (s *Service) streamAll(ctx context.Context, out *stream, watch *watcher, f *liveFilter, after streamID) error {
	life := lifeTag(watch.life)
	id := func(revision uint64) string { return life + "-" + strconv.FormatUint(revision, 10) }
	point := api.StreamPoint{Resumed: after.set, Gap: after.set && (after.life != life || after.revision > watch.from)}
	if after.set && !point.Gap {
		// What changed after the watcher began comes by the watcher.
		err := s.scan(ctx, func(e bus.Entry) error {
			if e.Revision <= after.revision || e.Revision > watch.from || !f.matchSpec(&e.Record) {
				return nil
			}
			return out.event(id(e.Revision), "state", stateEvent(&e.Record))
		})
		if err != nil {
			return err
		}
	}
	if err := cmp.Or(out.event(id(watch.from), "ready", point), out.flush()); err != nil {
		return err
	}
	beats := time.NewTicker(keepAlive)
	defer beats.Stop()
	stopping := httpkit.Stopping(ctx)
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-stopping:
			return errStopping
		case <-beats.C:
			if err := out.comment(); err != nil {
				return err
			}
		case change, ok := <-watch.changes:
			if !ok {
				return cmp.Or(out.event("", "overflow", api.StreamPoint{Gap: true}), out.flush())
			}
			if err := out.event(id(change.revision), "state", change.event); err != nil {
				return err
			}
			if len(watch.changes) > 0 {
				continue // more can go in one piece
			}
			if err := out.flush(); err != nil {
				return err
			}
		}
	}
}

// streamID is the id of an event: where in which life of the registry.
type streamID struct {
	set      bool
	life     string
	revision uint64
}

func parseStreamID(text string) (streamID, error) {
	if text == "" {
		return streamID{}, nil
	}
	life, number, ok := strings.Cut(text, "-")
	revision, err := strconv.ParseUint(number, 10, 64)
	if !ok || err != nil || len(life) != lifeTagLen || number != strconv.FormatUint(revision, 10) {
		return streamID{}, badParameter("Last-Event-ID", "the id of the last event that was seen, as it was")
	}
	return streamID{set: true, life: life, revision: revision}, nil
}

const lifeTagLen = 8

// lifeTag is a short name of a generation.
func lifeTag(generation string) string {
	sum := sha256.Sum256([]byte(generation))
	return hex.EncodeToString(sum[:lifeTagLen/2])
}
