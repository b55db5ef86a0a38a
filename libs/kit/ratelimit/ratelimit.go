// Package ratelimit decides whether a caller may go on, by the generic cell rate algorithm (GCRA): a key is a single moment in time, the
// theoretical arrival time of its next event, so that a full burst is allowed at once and then a steady rate.
//
// Local counts in this process, Shared by a store that several processes count in, and Failover by both: the store while it answers, this
// process always.
package ratelimit

import (
	"context"
	"net/http"
	"strconv"
	"time"

	"github.com/cmdexec/cmdexec/libs/kit/config"
)

// Rate is the limit of a key: Count events per period, which is also the burst. In any window of the period at most twice Count events
// are admitted: a saved-up burst and what the rate allows.
type Rate = config.Rate

// Event is one use of a key that counts against a rate.
type Event struct {
	Policy string // what the limit is called in an answer, such as user; a word
	Key    string
	Rate   Rate
}

// Decision is the answer for one event.
type Decision struct {
	Allowed    bool
	Policy     string        // of the event
	Limit      int           // the burst; 0 when the rate is off
	Per        time.Duration // the period of the limit
	Remaining  int           // events that would be allowed right now
	ResetAfter time.Duration // until the whole burst is there again
	RetryAfter time.Duration // until the next event would be allowed; 0 if this one was
}

// Limiter counts events by key. Implementations are safe for concurrent use. A rate that is off allows everything and keeps no state.
// An error means that the limiter could not decide, and says nothing about the caller: what to do then is for the edge to decide.
type Limiter interface {
	// Allow counts one event of one key.
	Allow(ctx context.Context, key string, rate Rate) (Decision, error)
	// AllowAll counts one event of each key, in order and in one step, up to the first that refuses: that one and those after it are not
	// charged. The decision is the refusal, else the one that leaves the least.
	AllowAll(ctx context.Context, events ...Event) (Decision, error)
}

// defaultPolicy is the name of a limit that was given none.
const defaultPolicy = "default"

// SetHeaders writes the decision as the structured fields RateLimit-Policy and RateLimit (draft-ietf-httpapi-ratelimit-headers, 08 and
// later), as the older RateLimit-Limit, RateLimit-Remaining and RateLimit-Reset, and as Retry-After for a refusal. Seconds are rounded
// up, so that a client that obeys is not early. It writes nothing for a rate that is off.
func SetHeaders(h http.Header, d Decision) {
	if d.Limit > 0 {
		limit, remaining, reset := strconv.Itoa(d.Limit), strconv.Itoa(d.Remaining), ceilSeconds(d.ResetAfter)
		h.Set("RateLimit-Limit", limit)
		h.Set("RateLimit-Remaining", remaining)
		h.Set("RateLimit-Reset", reset)
		name := d.Policy
		if name == "" {
			name = defaultPolicy
		}
		name = strconv.Quote(name)
		h.Set("RateLimit-Policy", name+";q="+limit+";w="+ceilSeconds(d.Per))
		h.Set("RateLimit", name+";r="+remaining+";t="+reset)
	}
	if !d.Allowed {
		h.Set("Retry-After", ceilSeconds(max(d.RetryAfter, time.Second)))
	}
}

func ceilSeconds(d time.Duration) string {
	return strconv.FormatInt(int64((max(d, 0)+time.Second-1)/time.Second), 10)
}

// pace returns what GCRA needs of a rate that is not off: the time between two events, rounded up so that it is never more than the rate,
// and how far ahead of the clock a key may be.
func pace(rate Rate) (interval, burst time.Duration) {
	count := time.Duration(rate.Count)
	interval = (rate.Per + count - 1) / count
	return interval, interval * count
}

// decided makes the decision of an event after which its key is ahead of the clock by ahead, or which had to wait (above zero).
func decided(rate Rate, ahead, wait time.Duration) Decision {
	d := Decision{Allowed: wait <= 0, Limit: rate.Count, Per: rate.Per, ResetAfter: ahead}
	if !d.Allowed {
		d.RetryAfter = wait
		return d
	}
	interval, burst := pace(rate)
	d.Remaining = int((burst - ahead) / interval)
	return d
}

// gcra decides one event of a key whose theoretical arrival time is tat (nanoseconds on the clock of now; zero or past for a new key). It
// returns the key's new arrival time, which is tat itself for a refusal. The rate must not be off. Pure.
func gcra(tat, now int64, rate Rate) (int64, Decision) {
	interval, burst := pace(rate)
	tat = max(tat, now)
	next := tat + int64(interval)
	if wait := time.Duration(next-now) - burst; wait > 0 {
		return tat, decided(rate, time.Duration(tat-now), wait)
	}
	return next, decided(rate, time.Duration(next-now), 0)
}

// tighter returns the decision that binds: a refusal, else the one that leaves less. A rate that is off binds nobody.
func tighter(a, b Decision) Decision {
	switch {
	case b.Limit == 0 && b.Allowed:
		return a
	case a.Limit == 0 && a.Allowed:
		return b
	case a.Allowed != b.Allowed:
		if a.Allowed {
			return b
		}
		return a
	case !a.Allowed:
		if b.RetryAfter > a.RetryAfter {
			return b
		}
		return a
	case b.Remaining < a.Remaining:
		return b
	}
	return a
}
