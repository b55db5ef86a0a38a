package lifecycle

import (
	"context"
	"math/rand/v2"
	"time"
)

// Defaults of Backoff.
const (
	DefaultBackoffMin = 100 * time.Millisecond
	DefaultBackoffMax = 30 * time.Second
)

// Backoff yields growing waits with full jitter: each is uniform between zero and a ceiling that starts at Min and doubles up to Max.
// Jitter over the whole range spreads a crowd of clients that lost the same server. The zero value uses the defaults. Not safe for
// concurrent use.
type Backoff struct {
	Min time.Duration // first ceiling
	Max time.Duration // last ceiling

	ceiling time.Duration
}

// Next returns how long to wait before the next try; always above zero.
func (b *Backoff) Next() time.Duration {
	lowest := orDefault(b.Min, DefaultBackoffMin)
	highest := max(lowest, orDefault(b.Max, DefaultBackoffMax))
	switch {
	case b.ceiling == 0:
		b.ceiling = lowest
	case b.ceiling > highest/2: // doubling could overflow
		b.ceiling = highest
	default:
		b.ceiling *= 2
	}
	return 1 + time.Duration(rand.Int64N(int64(b.ceiling)))
}

// Reset starts again from Min; call it after a success.
func (b *Backoff) Reset() { b.ceiling = 0 }

// Sleep waits for d or until ctx ends, and then returns the context's error. It does not wait at all when ctx has ended before.
func Sleep(ctx context.Context, d time.Duration) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
