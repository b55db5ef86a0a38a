package gateway

import (
	"bufio"
	"context"
	"errors"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/client"
	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
)

// watching is a client that watches, and what it has seen.
type watching struct {
	testing.TB
	mu     sync.Mutex
	events []client.Event
	ready  []api.StreamPoint
	stop   func()
}

func (e *env) watch(user string, role auth.Role, o client.WatchOptions) *watching {
	e.Helper()
	c, err := client.New(e.base, token(e, user, role), client.Options{HTTP: e.http})
	require.NoError(e, err)
	w := &watching{TB: e}
	o.Ready = func(p api.StreamPoint) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.ready = append(w.ready, p)
	}
	ctx, cancel := context.WithCancel(e.Context())
	done := make(chan error, 1)
	go func() {
		done <- c.Watch(ctx, o, func(ev client.Event) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.events = append(w.events, ev)
		})
	}()
	w.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			e.Errorf("watch ended with %v", err)
		}
	})
	e.Cleanup(w.stop)
	eventually(e, "ready", func() bool { return len(w.points()) > 0 })
	return w
}

func (w *watching) points() []api.StreamPoint {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]api.StreamPoint(nil), w.ready...)
}

func (w *watching) seen() []client.Event {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]client.Event(nil), w.events...)
}

// states waits for n events of a job and returns their states.
func (w *watching) states(jobID string, n int) (out []job.State) {
	w.Helper()
	eventually(w, "the events of a job", func() bool {
		out = nil
		for _, ev := range w.seen() {
			if ev.JobID == jobID {
				out = append(out, ev.Status)
			}
		}
		return len(out) >= n
	})
	return out
}

func TestEventsOfAllJobs(t *testing.T) {
	e := start(t, nil)
	before := e.create("ann")
	ann := e.watch("ann", auth.RoleUser, client.WatchOptions{})
	bob := e.watch("bob", auth.RoleUser, client.WatchOptions{})
	root := e.watch("root", auth.RoleAdmin, client.WatchOptions{})
	slow := e.watch("ann", auth.RoleUser, client.WatchOptions{Queue: "slow", Labels: map[string]string{"a": "b"}})

	one := e.create("ann")
	e.runs(one, 1)
	e.move(one, ended(1, job.OutcomeSucceeded, 0, nil))
	bobs := e.create("bob")
	labeled := e.do("POST", "/api/jobs/create", token(t, "ann", auth.RoleUser), `{"command":"true","queue":"slow","labels":{"a":"b","c":"d"}}`).job(t).JobID
	e.move(before, job.CancelRequest{})

	require.Equal(t, []job.State{job.Queued, job.Assigned, job.Running, job.Succeeded}, ann.states(one, 4))
	require.Equal(t, []job.State{job.Canceled}, ann.states(before, 1), "what was there before is not told, its changes are")
	require.Equal(t, []job.State{job.Queued}, bob.states(bobs, 1))
	require.Len(t, bob.seen(), 1, "somebody else's jobs are not told")
	for _, jobID := range []string{one, bobs, labeled} {
		root.states(jobID, 1)
	}
	slow.states(labeled, 1)
	require.Len(t, slow.seen(), 1)
	require.Equal(t, []api.StreamPoint{{}}, ann.points())

	// Going on after the second event: the newest state of what changed since, once.
	at := ann.seen()[1].ID
	again := e.watch("ann", auth.RoleUser, client.WatchOptions{From: at})
	require.Equal(t, []api.StreamPoint{{Resumed: true}}, again.points())
	var got []string
	for _, ev := range again.seen() {
		got = append(got, ev.JobID+string(ev.Status))
	}
	require.Equal(t, []string{one + "succeeded", labeled + "queued", before + "canceled"}, got, "in order, before ready")
	last := e.create("ann")
	again.states(last, 1)
	require.Len(t, again.seen(), 4)

	gap := e.watch("ann", auth.RoleUser, client.WatchOptions{From: "00000000-5"})
	require.Equal(t, []api.StreamPoint{{Resumed: true, Gap: true}}, gap.points(), "the id is of another registry")
	require.Empty(t, gap.seen())
	future := e.watch("ann", auth.RoleUser, client.WatchOptions{From: at[:9] + "999999999"})
	require.Equal(t, []api.StreamPoint{{Resumed: true, Gap: true}}, future.points())

	tok := token(t, "ann", auth.RoleUser)
	for _, bad := range []string{"x", "1-1", "00000000-", "00000000--1", "00000000-+1", "00000000-01", "00000000-99999999999999999999", strings.Repeat("0", 8000)} {
		require.Equal(t, "bad_parameter", e.do("GET", "/api/jobs/events", tok, "", "Last-Event-ID", bad).problem(t).Code, bad)
	}
	for _, bad := range []string{"queue=A", "label=x", "status=queued", "owner=bob"} {
		require.Equal(t, 400, e.do("GET", "/api/jobs/events?"+bad, tok, "").status, bad)
	}
	for _, w := range []*watching{ann, bob, root, slow, again, gap, future} {
		w.stop()
	}
	eventually(t, "nobody is there", e.svc.hub.idle)
}

// TestSlowWatchersAreCutOff: the hub holds a bounded number of changes for each
// watcher, and tells one that has missed some.
func TestSlowWatchersAreCutOff(t *testing.T) {
	h := newHub(slog.New(slog.DiscardHandler), func() string { return "g" })
	w := h.watch(func(*job.Record) bool { return true })
	entry := func(revision uint64) bus.Change {
		return bus.Change{Entry: bus.Entry{Revision: revision, Record: job.Record{ID: newID()}}}
	}
	h.publish(entry(1))
	h.publish(bus.Change{CaughtUp: true})
	<-w.begun
	require.EqualValues(t, 1, w.from)
	for i := range uint64(watchQueue + 5) {
		h.publish(entry(2 + i))
	}
	h.publish(entry(2)) // a follower that begins anew
	var got []uint64
	for c := range w.changes {
		got = append(got, c.revision)
	}
	require.Len(t, got, watchQueue)
	require.EqualValues(t, 2, got[0])
	require.True(t, h.idle())
	w.close()

	// Another life of the registry ends all streams.
	w = h.watch(func(*job.Record) bool { return true })
	<-w.begun
	h.generation = func() string { return "another" }
	h.checkLife()
	_, ok := <-w.changes
	require.False(t, ok)
}

func TestOverflowIsTold(t *testing.T) {
	e := start(t, nil)
	req, err := http.NewRequestWithContext(t.Context(), "GET", e.base+"/api/jobs/events", nil)
	require.NoError(t, err)
	req.Header.Set("Authorization", "Bearer "+token(t, "ann", auth.RoleUser))
	resp, err := e.http.Do(req)
	require.NoError(t, err)
	defer func() { _ = resp.Body.Close() }()
	require.Equal(t, "text/event-stream", resp.Header.Get("Content-Type"))
	lines := bufio.NewScanner(resp.Body)
	next := func(want string) {
		for lines.Scan() {
			if strings.HasPrefix(lines.Text(), want) {
				return
			}
		}
		t.Fatalf("the stream ended without %q: %v", want, lines.Err())
	}
	next("event: ready")
	h := e.svc.hub
	h.mu.Lock()
	for w := range h.watchers {
		w.cutOff()
	}
	h.mu.Unlock()
	next("event: overflow")
	for lines.Scan() {
	}
	require.NoError(t, lines.Err(), "the stream ends in order")
}

// TestEventsWithoutABus: a stream is not begun that nothing would come by.
func TestEventsWithoutABus(t *testing.T) {
	e := start(t, nil)
	e.nats.Shutdown()
	began := time.Now()
	a := e.do("GET", "/api/jobs/events", token(t, "ann", auth.RoleUser), "")
	require.Equal(t, 503, a.status)
	require.Equal(t, "bus_unavailable", a.problem(t).Code)
	require.GreaterOrEqual(t, time.Since(began), watchStart)
}
