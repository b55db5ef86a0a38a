package bus

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
)

// chunkWindow is how many chunks are sent ahead of their acknowledgements.
const chunkWindow = 32

// PublishResult returns when the bus has the result on disk. ErrFull,
// ErrUnavailable, ErrAmbiguous: publish again, consumers are idempotent.
func (c *Conn) PublishResult(ctx context.Context, r busmsg.Result) error {
	subject, err := resultSubject(r.JobID)
	if err != nil {
		return fmt.Errorf("publish result: %w", err)
	}
	data, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("publish result: encode: %w", err)
	}
	if _, err := acked(c.mux.request(ctx, subject, nats.Header{headerStream: {streamResults}}, data)); err != nil {
		return fmt.Errorf("publish result: %w", err)
	}
	return nil
}

// PublishChunks stores binary chunk frames (workerproto.EncodeChunk) of one job
// in order. stored is how many of them, from the first on, are acknowledged; err
// says why the next one is not: ErrFull, ErrUnavailable, ErrAmbiguous, ErrTooLarge.
// Some of the others may be stored all the same; publishing them again is
// harmless, since readers go by seq.
func (c *Conn) PublishChunks(ctx context.Context, jobID string, frames [][]byte) (stored int, err error) {
	subject, err := logSubject(jobID)
	if err != nil {
		return 0, fmt.Errorf("publish output: %w", err)
	}
	header := nats.Header{headerStream: {streamLogs}}
	calls := make([]call, 0, len(frames))
	var sendErr error
	for {
		for sendErr == nil && len(calls) < len(frames) && len(calls)-stored < chunkWindow {
			if sendErr = ctx.Err(); sendErr != nil {
				sendErr = fmt.Errorf("%w: %w", ErrUnavailable, sendErr)
				break
			}
			var sent call
			if sent, sendErr = c.mux.start(subject, header, frames[len(calls)]); sendErr == nil {
				calls = append(calls, sent)
			}
		}
		if stored == len(calls) {
			break
		}
		if _, err = acked(c.mux.wait(ctx, calls[stored])); err != nil {
			for _, rest := range calls[stored+1:] {
				c.mux.take(rest.token) // nobody waits for these any more
			}
			return stored, fmt.Errorf("publish output: %w", err)
		}
		stored++
	}
	if sendErr != nil {
		return stored, fmt.Errorf("publish output: %w", sendErr)
	}
	return stored, nil
}

// FollowLogs blocks until ctx ends and calls handle, from one goroutine, with
// the output of a job that the stream still has, then with what comes. Chunks may
// come again, and out of order after a publisher met a full stream: go by seq.
func (c *Conn) FollowLogs(ctx context.Context, jobID string, handle func(workerproto.Lease, workerproto.Chunk)) error {
	subject, err := logSubject(jobID)
	if err != nil {
		return fmt.Errorf("follow output: %w", err)
	}
	return c.tail(ctx, streamLogs, subject, func(m tailed) error {
		if m.caughtUp {
			return nil
		}
		lease, chunk, err := workerproto.DecodeChunk(m.data)
		if err != nil {
			c.count.malformed.Add(1)
			return nil
		}
		handle(lease, chunk)
		return nil
	})
}

// TrimResults removes the results that both consumers have acknowledged.
func (c *Conn) TrimResults(ctx context.Context) error {
	return c.trim(ctx, ResultsState, ResultsArchive)
}

// TrimLogs removes the output that the archive has acknowledged.
func (c *Conn) TrimLogs(ctx context.Context) error {
	return c.trim(ctx, LogsArchive)
}

// trim purges a stream up to what all of its consumers have acknowledged.
func (c *Conn) trim(ctx context.Context, names ...ConsumerName) error {
	stream := names[0].stream()
	var floor uint64
	for i, name := range names {
		info, err := c.consumerInfo(ctx, name)
		if err != nil {
			return fmt.Errorf("trim %s: %w", stream, err)
		}
		if i == 0 || info.AckFloor.Stream < floor {
			floor = info.AckFloor.Stream
		}
	}
	if floor == 0 || !c.trimmed.moves(stream, floor) {
		return nil
	}
	if err := c.purge(ctx, stream, "", floor); err != nil {
		return err
	}
	c.trimmed.done(stream, floor)
	return nil
}

// trimmed remembers how far streams are trimmed already.
type trimmed struct {
	mu   sync.Mutex
	upTo map[string]uint64
}

func (t *trimmed) moves(stream string, floor uint64) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return floor != t.upTo[stream]
}

func (t *trimmed) done(stream string, floor uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.upTo == nil {
		t.upTo = map[string]uint64{}
	}
	t.upTo[stream] = floor
}

// Pending is how many messages a durable consumer has not acknowledged.
func (c *Conn) Pending(ctx context.Context, name ConsumerName) (uint64, error) {
	info, err := c.consumerInfo(ctx, name)
	if err != nil {
		return 0, fmt.Errorf("pending: %w", err)
	}
	return info.NumPending + uint64(info.NumAckPending), nil
}

func (c *Conn) consumerInfo(ctx context.Context, name ConsumerName) (*jetstream.ConsumerInfo, error) {
	stream := name.stream()
	if stream == "" {
		return nil, fmt.Errorf("there is no consumer %q", string(name))
	}
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	cons, err := c.js.Consumer(ctx, stream, string(name))
	if err != nil {
		return nil, fmt.Errorf("%w: consumer %s of %s: %w", ErrUnavailable, name, stream, err)
	}
	return cons.CachedInfo(), nil
}

// deadLetter keeps what a consumer could not handle.
func (c *Conn) deadLetter(ctx context.Context, stream string, name ConsumerName, m Msg, reason error) error {
	const (
		mostData   = 1 << 20 // so that the letter fits into a message
		mostReason = 1 << 10
	)
	data, text := m.Data, reason.Error()
	data = data[:min(len(data), mostData)]
	text = text[:min(len(text), mostReason)]
	body, err := json.Marshal(busmsg.DeadLetter{
		Stream: stream, Consumer: string(name), Subject: m.Subject, Sequence: m.Sequence,
		Reason: text, At: time.Now().UTC().Truncate(time.Millisecond), Data: data,
	})
	if err != nil {
		return fmt.Errorf("encode dead letter: %w", err)
	}
	if _, err := acked(c.mux.request(ctx, deadSubject(stream, name), nil, body)); err != nil {
		return fmt.Errorf("store dead letter: %w", err)
	}
	c.count.deadLetters.Add(1)
	c.log.Error("message was kept as a dead letter", "stream", stream, "consumer", string(name),
		"subject", m.Subject, "sequence", m.Sequence, "reason", text)
	return nil
}

// DeadLetters calls handle with every dead letter that is kept, oldest first; an
// error of handle ends it and is returned.
func (c *Conn) DeadLetters(ctx context.Context, handle func(busmsg.DeadLetter) error) error {
	err := c.tail(ctx, streamDead, prefixDead+">", func(m tailed) error {
		if m.caughtUp {
			return errScanned
		}
		var d busmsg.DeadLetter
		if err := json.Unmarshal(m.data, &d); err != nil {
			c.count.malformed.Add(1)
			return nil
		}
		return handle(d)
	})
	if errors.Is(err, errScanned) {
		return nil
	}
	return err
}
