package bus

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime/debug"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	consumeHeartbeat = 3 * time.Second
	consumeExpiry    = 30 * time.Second
	inProgressEvery  = 10 * time.Second // well within ackWait
	leastRedelivery  = 100 * time.Millisecond
	mostRedelivery   = 10 * time.Second
	panicsForPoison  = 3
	rebindEvery      = time.Second

	defaultBatchMessages = 256
	defaultBatchBytes    = 4 << 20
	defaultBatchWait     = 100 * time.Millisecond
)

// Msg is a message of a stream.
type Msg struct {
	Subject   string
	Data      []byte
	Sequence  uint64
	Delivered int // times, this one included
	Time      time.Time
}

// ConsumeOptions says how many handlers run at once; zero is 1.
type ConsumeOptions struct{ Concurrency int }

// BatchOptions bounds a batch; zero fields get 256 messages, 4 MiB, 100 ms.
type BatchOptions struct {
	MaxMessages int
	MaxBytes    int
	MaxWait     time.Duration // from the first message on
}

// delivery is a message with its acknowledgement.
type delivery struct {
	Msg
	js jetstream.Msg
}

// ack and nak: where they fail, the message comes again, and handlers are idempotent.
func (d delivery) ack()                    { _ = d.js.Ack() }
func (d delivery) nak(after time.Duration) { _ = d.js.NakWithDelay(after) }
func (d delivery) nakNow()                 { _ = d.js.Nak() }
func redelivery(delivered int) time.Duration {
	return jitter(backoff(delivered, leastRedelivery, mostRedelivery))
}
func jitter(d time.Duration) time.Duration { return d/2 + time.Duration(rand.Int64N(int64(d/2)+1)) }

// alive keeps deliveries from being sent again while they are handled.
func alive(ds ...delivery) (stop func()) {
	var mu sync.Mutex
	stopped := false
	var timer *time.Timer
	mu.Lock()
	defer mu.Unlock()
	timer = time.AfterFunc(inProgressEvery, func() {
		mu.Lock()
		defer mu.Unlock()
		if stopped {
			return
		}
		for _, d := range ds {
			_ = d.js.InProgress()
		}
		timer.Reset(inProgressEvery)
	})
	return func() {
		mu.Lock()
		defer mu.Unlock()
		stopped = true
		timer.Stop()
	}
}

// panicked is what a handler panicked with.
type panicked struct{ value any }

func (p *panicked) Error() string { return fmt.Sprintf("panic: %v", p.value) }

// guarded runs f and turns a panic into an error.
func (c *Conn) guarded(what string, f func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			c.count.panics.Add(1)
			c.log.Error("handler panicked", "handler", what, "panic", v, "stack", string(debug.Stack()))
			err = &panicked{v}
		}
	}()
	return f()
}

// Consume blocks until ctx ends and handles messages: nil acknowledges, Poison
// keeps a dead letter, another error has the message delivered again after a
// backoff (0.1 s to 10 s), for ever: a dependency that is away loses nothing. A
// panic is recovered; the third of one message counts as Poison. With a
// concurrency of 1 messages that are not delivered again come in order.
//
// Consume rebinds after a reconnect and waits for a consumer that is missing
// (Ready says so). It waits for running handlers, whose context has ended then.
// The error is ctx's.
func (c *Conn) Consume(ctx context.Context, name ConsumerName, o ConsumeOptions, handle func(context.Context, Msg) error) error {
	stream := name.stream()
	if stream == "" {
		return fmt.Errorf("consume: there is no consumer %q", string(name))
	}
	ctx, cancel := c.within(ctx)
	defer cancel()
	concurrency := max(1, o.Concurrency)
	slots := make(chan struct{}, concurrency)
	var running sync.WaitGroup
	defer running.Wait()
	var panics panicCounts

	one := func(d delivery) {
		stop := alive(d)
		defer stop()
		err := c.guarded(string(name), func() error { return handle(ctx, d.Msg) })
		var poison *poisonError
		var panicErr *panicked
		switch {
		case errors.As(err, &panicErr):
			if panics.add(d.Sequence) < panicsForPoison {
				d.nak(redelivery(d.Delivered))
				return
			}
			fallthrough
		case errors.As(err, &poison):
			if deadErr := c.deadLetter(ctx, stream, name, d.Msg, err); deadErr != nil {
				c.log.Warn("dead letter could not be stored", "consumer", string(name), "err", deadErr)
				d.nak(redelivery(d.Delivered))
				return
			}
			fallthrough
		case err == nil:
			panics.forget(d.Sequence)
			d.ack()
		case ctx.Err() != nil:
			d.nakNow()
		default:
			c.log.Warn("message will be delivered again", "consumer", string(name),
				"subject", d.Subject, "sequence", d.Sequence, "delivered", d.Delivered, "err", err)
			d.nak(redelivery(d.Delivered))
		}
	}
	return c.pull(ctx, name, max(2*concurrency, 8), func(it *iterator) error {
		for {
			select {
			case slots <- struct{}{}:
			case <-ctx.Done():
				return ctx.Err()
			}
			d, err := it.next(ctx)
			if err != nil {
				<-slots
				return err
			}
			running.Go(func() {
				defer func() { <-slots }()
				one(d)
			})
		}
	})
}

// ConsumeBatch is Consume with batches, one at a time and in order: nil
// acknowledges all, a *BatchError acknowledges all and keeps dead letters of the
// poison, another error has the same batch handled again after a backoff, until it
// succeeds or ctx ends. After a panic the messages of the batch are handled one by
// one; one that panics three times alone is poison.
func (c *Conn) ConsumeBatch(ctx context.Context, name ConsumerName, o BatchOptions, handle func(context.Context, []Msg) error) error {
	stream := name.stream()
	if stream == "" {
		return fmt.Errorf("consume: there is no consumer %q", string(name))
	}
	ctx, cancel := c.within(ctx)
	defer cancel()
	if o.MaxMessages <= 0 {
		o.MaxMessages = defaultBatchMessages
	}
	if o.MaxBytes <= 0 {
		o.MaxBytes = defaultBatchBytes
	}
	if o.MaxWait <= 0 {
		o.MaxWait = defaultBatchWait
	}
	b := &batch{c: c, stream: stream, name: name, handle: handle}
	return c.pull(ctx, name, o.MaxMessages, func(it *iterator) error {
		for {
			ds, err := it.collect(ctx, o)
			if len(ds) > 0 {
				stop := alive(ds...)
				done := b.settle(ctx, ds)
				stop()
				if !done {
					for _, d := range ds {
						d.nakNow()
					}
				}
			}
			if err != nil {
				return err
			}
		}
	})
}

type batch struct {
	c      *Conn
	stream string
	name   ConsumerName
	handle func(context.Context, []Msg) error
}

// settle handles deliveries until each is acknowledged; false when ctx ended before.
func (b *batch) settle(ctx context.Context, ds []delivery) bool {
	msgs := make([]Msg, len(ds))
	for i := range ds {
		msgs[i] = ds[i].Msg
	}
	panics := 0
	for try := 1; ; try++ {
		if ctx.Err() != nil {
			return false
		}
		err := b.c.guarded(string(b.name), func() error { return b.handle(ctx, msgs) })
		var some *BatchError
		var poison *poisonError
		var panicErr *panicked
		dead := map[int]error{}
		switch {
		case err == nil:
		case errors.As(err, &some):
			dead = some.Poison
		case errors.As(err, &panicErr) && len(ds) > 1:
			for i := range ds {
				if !b.settle(ctx, ds[i:i+1]) {
					return false
				}
			}
			return true
		case errors.As(err, &panicErr):
			if panics++; panics >= panicsForPoison {
				dead[0] = err
			}
		case errors.As(err, &poison) && len(ds) == 1:
			dead[0] = err
		}
		if err == nil || len(dead) > 0 || some != nil {
			if err = b.bury(ctx, ds, dead); err == nil {
				for _, d := range ds {
					d.ack()
				}
				return true
			}
		}
		if ctx.Err() != nil { // a stop is nothing to warn of: it is delivered again
			return false
		}
		b.c.log.Warn("batch will be handled again", "consumer", string(b.name), "messages", len(ds), "try", try, "err", err)
		if !pause(ctx, redelivery(try)) {
			return false
		}
		for i := range msgs {
			msgs[i].Delivered++
		}
	}
}

func (b *batch) bury(ctx context.Context, ds []delivery, dead map[int]error) error {
	for i, reason := range dead {
		if i < 0 || i >= len(ds) {
			return fmt.Errorf("the handler says that message %d of %d is poison", i, len(ds))
		}
		if err := b.c.deadLetter(ctx, b.stream, b.name, ds[i].Msg, reason); err != nil {
			return err
		}
	}
	return nil
}

// panicCounts counts panics by message; it keeps few, since a message leaves it
// when it is settled.
type panicCounts struct {
	mu sync.Mutex
	by map[uint64]int
}

func (p *panicCounts) add(sequence uint64) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.by == nil {
		p.by = map[uint64]int{}
	}
	p.by[sequence]++
	return p.by[sequence]
}

func (p *panicCounts) forget(sequence uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.by, sequence)
}

// iterator pulls the messages of a durable consumer.
type iterator struct {
	c  *Conn
	it jetstream.MessagesContext
}

// next blocks until there is a message.
func (i *iterator) next(ctx context.Context) (delivery, error) {
	msg, err := i.it.Next(jetstream.NextContext(ctx))
	if err != nil {
		return delivery{}, err
	}
	meta, err := msg.Metadata()
	if err != nil {
		return delivery{}, err
	}
	if meta.NumDelivered > 1 {
		i.c.count.redelivered.Add(1)
	}
	return delivery{js: msg, Msg: Msg{
		Subject: msg.Subject(), Data: msg.Data(), Sequence: meta.Sequence.Stream,
		Delivered: int(meta.NumDelivered), Time: meta.Timestamp,
	}}, nil
}

// collect blocks until there is a message and gathers what follows it closely.
// What it has gathered before an error is returned with it.
func (i *iterator) collect(ctx context.Context, o BatchOptions) ([]delivery, error) {
	first, err := i.next(ctx)
	if err != nil {
		return nil, err
	}
	ds, size := []delivery{first}, len(first.Data)
	more, cancel := context.WithTimeout(ctx, o.MaxWait)
	defer cancel()
	for len(ds) < o.MaxMessages && size < o.MaxBytes {
		d, err := i.next(more)
		if err != nil {
			if more.Err() != nil && ctx.Err() == nil {
				return ds, nil
			}
			return ds, err
		}
		ds, size = append(ds, d), size+len(d.Data)
	}
	return ds, nil
}

// pull runs use with an iterator over a durable consumer, again and again until ctx
// ends, whatever happens to the consumer.
func (c *Conn) pull(ctx context.Context, name ConsumerName, prefetch int, use func(*iterator) error) error {
	where := "consumer " + string(name)
	for {
		it, err := c.open(ctx, name, prefetch)
		if err == nil {
			c.setProblem(where, "")
			err = use(&iterator{c: c, it: it})
			c.giveBack(it)
		}
		if ctx.Err() != nil {
			return fmt.Errorf("consume %s: %w", name, ctx.Err())
		}
		if errors.Is(err, jetstream.ErrConsumerNotFound) || errors.Is(err, jetstream.ErrConsumerDeleted) ||
			errors.Is(err, jetstream.ErrStreamNotFound) {
			c.setProblem(where, "it is missing")
		}
		c.log.Debug("consumer is bound again", "consumer", string(name), "err", err)
		again := c.nextReconnect()
		timer := time.NewTimer(rebindEvery)
		select {
		case <-ctx.Done():
		case <-again:
		case <-timer.C:
		}
		timer.Stop()
	}
}

func (c *Conn) open(ctx context.Context, name ConsumerName, prefetch int) (jetstream.MessagesContext, error) {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	cons, err := c.js.Consumer(ctx, name.stream(), string(name))
	if err != nil {
		return nil, err
	}
	if err := c.reclaim(ctx, name, cons.CachedInfo()); err != nil {
		return nil, err
	}
	return cons.Messages(jetstream.PullMaxMessages(prefetch), jetstream.PullExpiry(consumeExpiry),
		jetstream.PullHeartbeat(consumeHeartbeat), jetstream.WithMessagesErrOnMissingHeartbeat(true))
}

// reclaim has messages delivered at once that were on their way when the embedded
// server died. Whoever had them died with it, in the same process, so nobody will
// acknowledge them, and they would wait for ackWait. Some that were acknowledged out
// of order come again with them. Over the network the others live on: there the
// wait is right.
func (c *Conn) reclaim(ctx context.Context, name ConsumerName, info *jetstream.ConsumerInfo) error {
	deliveredInThisLife := info.Delivered.Last != nil // the server keeps this time in memory only
	if !c.inProcess || info.NumAckPending == 0 || deliveredInThisLife {
		return nil
	}
	s, err := c.js.Stream(ctx, name.stream())
	if err != nil {
		return err
	}
	_, err = s.ResetConsumer(ctx, string(name))
	return err
}

// giveBack ends an iterator and returns what it has fetched to the consumer, so that
// it does not wait for its ackWait.
func (c *Conn) giveBack(it jetstream.MessagesContext) {
	it.Drain()
	for {
		msg, err := it.Next(jetstream.NextMaxWait(time.Second))
		if err != nil {
			it.Stop()
			return
		}
		if c.nc.Status() == nats.CONNECTED {
			_ = msg.Nak()
		}
	}
}
