// Package ratelimittest is the suite that every ratelimit.Limiter passes, whatever clock it has.
package ratelimittest

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/kit/ratelimit"
)

// rates that cannot give an event back during a case, and one that does at once.
var (
	slow  = ratelimit.Rate{Count: 5, Per: time.Hour}
	quick = ratelimit.Rate{Count: 20, Per: time.Second}
)

// Run holds the limiters that open makes to the suite. Each case opens one and uses keys of its own.
func Run(t *testing.T, open func(t *testing.T) ratelimit.Limiter) {
	for _, c := range []struct {
		name string
		test func(t *testing.T, l ratelimit.Limiter)
	}{
		{"a burst, then nothing", burst},
		{"a rate that is off keeps nothing", off},
		{"keys are charged in order up to the refusal", order},
		{"the tightest limit is the answer", tightest},
		{"RetryAfter is honest", retryAfter},
		{"no more than burst and rate in any window", windows},
		{"concurrent callers share one burst", concurrent},
		{"any key will do", oddKeys},
	} {
		t.Run(c.name, func(t *testing.T) { c.test(t, open(t)) })
	}
}

func allow(t *testing.T, l ratelimit.Limiter, key string, rate ratelimit.Rate) ratelimit.Decision {
	t.Helper()
	d, err := l.Allow(t.Context(), key, rate)
	require.NoError(t, err)
	return d
}

func all(t *testing.T, l ratelimit.Limiter, events ...ratelimit.Event) ratelimit.Decision {
	t.Helper()
	d, err := l.AllowAll(t.Context(), events...)
	require.NoError(t, err)
	return d
}

func burst(t *testing.T, l ratelimit.Limiter) {
	interval := slow.Per / time.Duration(slow.Count)
	for i := range slow.Count {
		d := allow(t, l, "burst", slow)
		require.True(t, d.Allowed)
		require.Equal(t, slow.Count, d.Limit)
		require.Equal(t, slow.Per, d.Per)
		require.Equal(t, slow.Count-1-i, d.Remaining)
		require.InDelta(t, float64(interval)*float64(i+1), float64(d.ResetAfter), float64(time.Minute))
		require.Zero(t, d.RetryAfter)
	}
	for range 3 { // a refusal costs nothing
		d := allow(t, l, "burst", slow)
		require.False(t, d.Allowed)
		require.Zero(t, d.Remaining)
		require.InDelta(t, float64(interval), float64(d.RetryAfter), float64(time.Minute))
		require.InDelta(t, float64(slow.Per), float64(d.ResetAfter), float64(time.Minute))
	}
	require.True(t, allow(t, l, "burst2", slow).Allowed, "keys do not share")
}

func off(t *testing.T, l ratelimit.Limiter) {
	for range 100 {
		require.Equal(t, ratelimit.Decision{Allowed: true}, allow(t, l, "off", ratelimit.Rate{}))
	}
	require.Equal(t, ratelimit.Decision{Allowed: true}, all(t, l))
	require.Equal(t, slow.Count-1, allow(t, l, "off", slow).Remaining)
}

func order(t *testing.T, l ratelimit.Limiter) {
	one := ratelimit.Rate{Count: 1, Per: time.Hour}
	a, b, c := ratelimit.Event{Policy: "a", Key: "order:a", Rate: slow}, ratelimit.Event{Policy: "b", Key: "order:b", Rate: one}, ratelimit.Event{Policy: "c", Key: "order:c", Rate: slow}
	d := all(t, l, a, b, c)
	require.True(t, d.Allowed)
	d = all(t, l, a, ratelimit.Event{}, b, c)
	require.False(t, d.Allowed)
	require.Equal(t, "b", d.Policy)
	require.Equal(t, 1, d.Limit)
	require.Equal(t, slow.Count-3, allow(t, l, "order:a", slow).Remaining, "what comes before the refusal is charged")
	require.Equal(t, slow.Count-2, allow(t, l, "order:c", slow).Remaining, "what comes after it is not")
}

func tightest(t *testing.T, l ratelimit.Limiter) {
	wide := ratelimit.Rate{Count: 1000, Per: time.Hour}
	d := all(t, l, ratelimit.Event{Policy: "user", Key: "tight:u", Rate: slow}, ratelimit.Event{Policy: "ip", Key: "tight:i", Rate: wide})
	require.True(t, d.Allowed)
	require.Equal(t, "user", d.Policy)
	require.Equal(t, slow.Count-1, d.Remaining)
}

// retryAfter asks as fast as it can: an event is never allowed before the last refusal said, and is allowed soon after.
func retryAfter(t *testing.T, l ratelimit.Limiter) {
	for range quick.Count {
		allow(t, l, "retry", quick)
	}
	deadline := time.Now().Add(30 * time.Second)
	var asked time.Time // before the last refusal
	var wait time.Duration
	for time.Now().Before(deadline) {
		before := time.Now()
		d := allow(t, l, "retry", quick)
		if !d.Allowed {
			asked, wait = before, d.RetryAfter
			require.LessOrEqual(t, wait, quick.Per/time.Duration(quick.Count)+time.Millisecond)
			require.LessOrEqual(t, wait, d.ResetAfter)
			continue
		}
		if wait > 0 {
			require.GreaterOrEqual(t, time.Since(asked), wait, "allowed before it was said to be")
			return
		}
	}
	t.Fatal("nothing was allowed again within 30 s")
}

// windows floods one key from several goroutines for some periods and holds what was admitted against the promise in every window. The
// moments are those before each call, and the windows are widened by what a call may take.
func windows(t *testing.T, l ratelimit.Limiter) {
	const callers = 4
	type moment struct{ before, after time.Time }
	admitted := make([][]moment, callers)
	end := time.Now().Add(2 * quick.Per)
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() {
			for {
				before := time.Now()
				if before.After(end) {
					return
				}
				d, err := l.Allow(context.Background(), "windows", quick)
				if err == nil && d.Allowed {
					admitted[i] = append(admitted[i], moment{before, time.Now()})
				}
			}
		})
	}
	wg.Wait()
	var every []moment
	for _, a := range admitted {
		every = append(every, a...)
	}
	for _, from := range every {
		for _, to := range every {
			if to.after.Before(from.before) {
				continue
			}
			n := 0
			for _, m := range every {
				if !m.before.Before(from.before) && !m.after.After(to.after) {
					n++
				}
			}
			window := to.after.Sub(from.before)
			most := quick.Count + 1 + int(window*time.Duration(quick.Count)/quick.Per)
			require.LessOrEqual(t, n, most, "in a window of %s", window)
			if window <= quick.Per {
				require.LessOrEqual(t, n, 2*quick.Count)
			}
		}
	}
	require.GreaterOrEqual(t, len(every), quick.Count, "the burst")
}

func concurrent(t *testing.T, l ratelimit.Limiter) {
	rate := ratelimit.Rate{Count: 100, Per: 24 * time.Hour}
	var admitted atomic.Int64
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 40 {
				if d, err := l.Allow(context.Background(), "concurrent", rate); err == nil && d.Allowed {
					admitted.Add(1)
				}
			}
		})
	}
	wg.Wait()
	require.EqualValues(t, rate.Count, admitted.Load())
}

func oddKeys(t *testing.T, l ratelimit.Limiter) {
	long := string(make([]byte, 100_000))
	for _, key := range []string{"", " ", "a\r\nb", "{x}", "日本", "\xff\xfe", long, long + "1"} {
		require.Equal(t, slow.Count-1, allow(t, l, "odd:"+key, slow).Remaining)
		require.Equal(t, slow.Count-2, allow(t, l, "odd:"+key, slow).Remaining)
	}
}
