package bus

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	tailMessages   = 1000     // asked for at a time
	tailBytes      = 16 << 20 // of them
	tailHeartbeat  = 3 * time.Second
	tailExpiry     = 30 * time.Second
	tailInactive   = time.Minute // after which the server forgets a follower that went away
	tailCheckEvery = 5 * time.Second
	tailCatchUp    = 250 * time.Millisecond
)

var (
	errRestarted = errors.New("the connection was made anew")
	errSilent    = errors.New("the follower fell silent behind the stream")
	errGap       = errors.New("the follower missed messages")
)

// tailed is a message that a tail delivers, or (caughtUp) the news that everything
// that was there at its start has been delivered.
type tailed struct {
	subject  string
	data     []byte
	sequence uint64
	caughtUp bool
}

// tail delivers the messages of a stream that match filter, from the first one on
// (of the registry: the newest of each job), in order, to handle, from one goroutine: those that are there, caughtUp once,
// and then those that come. It returns when ctx ends, with its error, or when
// handle returns an error, with that.
//
// A consumer can fall silent: on a reconnect, when the server restarts (it lives
// in memory), when messages are lost on the way. So its numbering is checked, a
// watchdog compares it with the server's view, and every reconnect starts a new
// one after the last message that was seen.
func (c *Conn) tail(ctx context.Context, stream, filter string, handle func(tailed) error) error {
	ctx, cancel := c.within(ctx)
	defer cancel()
	t := &tail{c: c, stream: stream, filter: filter, handle: handle}
	if stream == streamJobs {
		t.first = jetstream.DeliverLastPerSubjectPolicy // the versions before are of no use
	}
	for try := 1; ; try++ {
		again := c.nextReconnect()
		progress := t.last
		err := t.run(ctx, again)
		var failed *handlerError
		switch {
		case errors.As(err, &failed):
			return failed.err
		case ctx.Err() != nil:
			return fmt.Errorf("follow %s: %w", stream, ctx.Err())
		}
		c.count.restarts.Add(1)
		c.log.Debug("follower restarts", "stream", stream, "filter", filter, "after", t.last, "err", err)
		if t.last != progress || errors.Is(err, errRestarted) {
			try = 1
		}
		// A reconnect ends the wait: until then nothing will work.
		timer := time.NewTimer(backoff(try, 50*time.Millisecond, 2*time.Second))
		select {
		case <-ctx.Done():
		case <-again:
		case <-timer.C:
		}
		timer.Stop()
	}
}

type tail struct {
	c              *Conn
	stream, filter string
	handle         func(tailed) error

	first    jetstream.DeliverPolicy // of what was there at the start
	last     uint64                  // stream sequence of the last message handled
	created  time.Time               // of the stream that last belongs to
	caughtUp bool
}

type handlerError struct{ err error }

func (e *handlerError) Error() string { return e.err.Error() }

// run follows with one consumer until something happens to it.
func (t *tail) run(ctx context.Context, reconnected <-chan struct{}) error {
	ctx, fail := context.WithCancelCause(ctx)
	var watching sync.WaitGroup
	defer watching.Wait()
	defer fail(nil)

	s, err := t.c.js.Stream(ctx, t.stream)
	if err != nil {
		return err
	}
	info := s.CachedInfo()
	if !info.Created.Equal(t.created) || info.State.LastSeq < t.last {
		t.last, t.created = 0, info.Created // another life of the stream
	}
	config := jetstream.ConsumerConfig{
		AckPolicy: jetstream.AckNonePolicy, DeliverPolicy: t.first, FilterSubject: t.filter,
		MemoryStorage: true, Replicas: 1, InactiveThreshold: tailInactive,
	}
	if t.last > 0 {
		config.DeliverPolicy, config.OptStartSeq = jetstream.DeliverByStartSequencePolicy, t.last+1
	}
	cons, err := t.c.js.CreateConsumer(ctx, t.stream, config)
	if err != nil {
		return err
	}
	defer t.forget(cons)
	it, err := cons.Messages(
		jetstream.PullMaxMessagesWithBytesLimit(tailMessages, tailBytes),
		jetstream.PullExpiry(tailExpiry), jetstream.PullHeartbeat(tailHeartbeat),
		jetstream.WithMessagesErrOnMissingHeartbeat(true))
	if err != nil {
		return err
	}
	defer it.Stop()

	w := &watch{cons: cons}
	watching.Go(func() { w.run(ctx, reconnected, fail) })
	pending := cons.CachedInfo().NumPending
	for {
		if !t.caughtUp && (pending == 0 || t.last >= info.State.LastSeq) {
			t.caughtUp = true
			if err := t.handle(tailed{caughtUp: true}); err != nil {
				return &handlerError{err}
			}
		}
		msg, err := t.next(ctx, it)
		if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
			// Nothing comes, and more was there at the start: it may have been purged.
			if ci, err := cons.Info(ctx); err == nil && ci.Delivered.Consumer == w.seen.Load() {
				pending = ci.NumPending
			}
			continue
		}
		if err != nil {
			if cause := context.Cause(ctx); cause != nil {
				return cause
			}
			return err
		}
		meta, err := msg.Metadata()
		if err != nil {
			return err
		}
		if meta.Sequence.Consumer != w.seen.Load()+1 {
			return errGap
		}
		w.busy.Store(true)
		w.seen.Store(meta.Sequence.Consumer)
		t.last, pending = meta.Sequence.Stream, meta.NumPending
		err = t.handle(tailed{subject: msg.Subject(), data: msg.Data(), sequence: t.last})
		w.busy.Store(false)
		if err != nil {
			return &handlerError{err}
		}
	}
}

func (t *tail) next(ctx context.Context, it jetstream.MessagesContext) (jetstream.Msg, error) {
	if !t.caughtUp {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, tailCatchUp)
		defer cancel()
	}
	return it.Next(jetstream.NextContext(ctx))
}

// forget removes the consumer from the server, which would do so itself in time.
func (t *tail) forget(cons jetstream.Consumer) {
	if t.c.nc.Status() != nats.CONNECTED {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = t.c.js.DeleteConsumer(ctx, t.stream, cons.CachedInfo().Name)
}

// watch compares a follower with the server's view of it.
type watch struct {
	cons jetstream.Consumer
	seen atomic.Uint64 // consumer sequence of the last message that arrived
	busy atomic.Bool   // it is being handled
}

func (w *watch) run(ctx context.Context, reconnected <-chan struct{}, fail context.CancelCauseFunc) {
	ticker := time.NewTicker(tailCheckEvery)
	defer ticker.Stop()
	var behindAt uint64 // what had been seen when the server was last found ahead
	behind := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-reconnected:
			fail(errRestarted)
			return
		case <-ticker.C:
		}
		seen := w.seen.Load()
		info, err := w.cons.Info(ctx)
		if errors.Is(err, jetstream.ErrConsumerNotFound) {
			fail(errSilent)
			return
		}
		if err != nil || w.busy.Load() {
			continue // away: a reconnect follows; or the handler takes its time
		}
		ahead := info.Delivered.Consumer > seen || info.NumPending > 0
		if ahead && behind && behindAt == seen && w.seen.Load() == seen {
			fail(errSilent)
			return
		}
		behind, behindAt = ahead, seen
	}
}

// Change is what Follow reports. Purges are not reported: the terminal change was.
type Change struct {
	Entry    Entry
	CaughtUp bool // set once, without an entry, after the current records
}

// Follow blocks until ctx ends: it calls handle with every current record, then
// with CaughtUp once, then with every change, in order of revision, from one
// goroutine. It restarts itself when the bus was away or silent; then records
// may come again: ignore revisions already seen. The error is ctx's.
func (r *Registry) Follow(ctx context.Context, handle func(Change)) error {
	return r.c.tail(ctx, streamJobs, prefixJobs+">", func(m tailed) error {
		if m.caughtUp {
			handle(Change{CaughtUp: true})
			return nil
		}
		if e, ok := r.read(m); ok {
			handle(Change{Entry: e})
		}
		return nil
	})
}

// read decodes a message of the registry. One that cannot be read is counted and
// logged; no part of the system can do anything about it.
func (r *Registry) read(m tailed) (Entry, bool) {
	e, err := decode(stored{key: strings.TrimPrefix(m.subject, prefixJobs), data: m.data, revision: m.sequence})
	if err != nil {
		r.c.count.malformed.Add(1)
		r.c.log.Error("registry record is unreadable", "subject", m.subject, "revision", m.sequence, "err", err)
		return Entry{}, false
	}
	return e, true
}

var errScanned = errors.New("everything was seen")

// Scan calls handle with every live record once; an error of handle ends it and is
// returned. A job that changes meanwhile is seen in one of its versions.
func (r *Registry) Scan(ctx context.Context, handle func(Entry) error) error {
	seen := map[string]bool{}
	err := r.c.tail(ctx, streamJobs, prefixJobs+">", func(m tailed) error {
		if m.caughtUp {
			return errScanned
		}
		e, ok := r.read(m)
		if !ok || seen[e.Record.ID] {
			return nil
		}
		seen[e.Record.ID] = true
		return handle(e)
	})
	if errors.Is(err, errScanned) {
		return nil
	}
	return err
}
