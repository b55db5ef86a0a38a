package ratelimit

import (
	"context"
	"fmt"
	"time"
)

// Remote is a store that several processes count in, by one clock: its own. It speaks of times only, so that an adapter of a store needs
// nothing of this package.
type Remote interface {
	// Spend counts one event of each key by GCRA, in order and in one step, up to the first that has to wait. interval is the time between
	// two events of a key at its steady rate, burst how far ahead of the clock a key may be. It returns how far ahead each key is that was
	// looked at, and how long the last of them has to wait: zero if every event was counted. It is safe for concurrent use and returns
	// soon after ctx ends; after an error nobody knows what was counted.
	Spend(ctx context.Context, keys []string, interval, burst []time.Duration) (ahead []time.Duration, wait time.Duration, err error)
}

// Shared is a Limiter that decides by a Remote alone and fails where that does.
type Shared struct{ Remote Remote }

// Allow asks the remote.
func (s Shared) Allow(ctx context.Context, key string, rate Rate) (Decision, error) {
	return s.AllowAll(ctx, Event{Key: key, Rate: rate})
}

// AllowAll asks the remote once, and not at all where every rate is off.
func (s Shared) AllowAll(ctx context.Context, events ...Event) (Decision, error) {
	const usual = 4
	var keys []string
	var intervals, bursts []time.Duration
	limited := make([]Event, 0, usual)
	for _, e := range events {
		if e.Rate.Off() {
			continue
		}
		interval, burst := pace(e.Rate)
		keys, intervals, bursts = append(keys, e.Key), append(intervals, interval), append(bursts, burst)
		limited = append(limited, e)
	}
	all := Decision{Allowed: true}
	if len(keys) == 0 {
		return all, nil
	}
	ahead, wait, err := s.Remote.Spend(ctx, keys, intervals, bursts)
	if err != nil {
		return Decision{}, err
	}
	if len(ahead) == 0 || len(ahead) > len(keys) || wait <= 0 && len(ahead) != len(keys) {
		return Decision{}, fmt.Errorf("the store of rate limits answered for %d of %d keys", len(ahead), len(keys))
	}
	for i, a := range ahead {
		var w time.Duration
		if i == len(ahead)-1 {
			w = wait
		}
		d := decided(limited[i].Rate, a, w)
		d.Policy = limited[i].Policy
		if !d.Allowed {
			return d, nil
		}
		all = tighter(all, d)
	}
	return all, nil
}
