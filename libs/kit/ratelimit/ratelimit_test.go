package ratelimit

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

func allow(t require.TestingT, l Limiter, key string, rate Rate) Decision {
	d, err := l.Allow(context.Background(), key, rate)
	require.NoError(t, err)
	return d
}

func TestABurstThenTheRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLocal(0)
		rate := Rate{Count: 5, Per: time.Second}
		for i := range 5 {
			d := allow(t, l, "ann", rate)
			require.Equal(t, Decision{
				Allowed: true, Limit: 5, Per: time.Second, Remaining: 4 - i, ResetAfter: time.Duration(i+1) * 200 * time.Millisecond,
			}, d)
		}
		require.Equal(t, Decision{Limit: 5, Per: time.Second, ResetAfter: time.Second, RetryAfter: 200 * time.Millisecond}, allow(t, l, "ann", rate))
		require.True(t, allow(t, l, "bob", rate).Allowed, "keys do not share")

		time.Sleep(200*time.Millisecond - 1)
		require.False(t, allow(t, l, "ann", rate).Allowed)
		time.Sleep(time.Nanosecond)
		require.True(t, allow(t, l, "ann", rate).Allowed, "RetryAfter was exact")
		require.False(t, allow(t, l, "ann", rate).Allowed)

		time.Sleep(time.Hour)
		require.Equal(t, 4, allow(t, l, "ann", rate).Remaining, "no more than one burst is saved up")
	})
}

func TestOffAllowsEverythingAndKeepsNothing(t *testing.T) {
	l := NewLocal(0)
	for range 1000 {
		require.Equal(t, Decision{Allowed: true}, allow(t, l, "ann", Rate{}))
	}
	require.Zero(t, l.Len())
}

// checkWindows holds admitted moments against the promise: in every window of length w at most count + w/interval events.
func checkWindows(t require.TestingT, admitted []int64, rate Rate) {
	count, per := int64(rate.Count), int64(rate.Per)
	for i := range admitted {
		for j := i; j < len(admitted); j++ {
			window := admitted[j] - admitted[i]
			n := int64(j - i + 1)
			// n-count events at the steady rate take at least (n-count) * per/count.
			if n > count {
				require.GreaterOrEqual(t, window*count, (n-count)*per, "%d events in %d ns at %s", n, window, rate)
			}
			if window <= per {
				require.LessOrEqual(t, n, 2*count, "more than limit and burst in one period")
			}
		}
	}
}

func TestNeverMoreThanLimitAndBurstInAnyWindow(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rate := Rate{
			Count: rapid.IntRange(1, 20).Draw(t, "count"),
			Per:   rapid.SampledFrom([]time.Duration{time.Second, time.Minute}).Draw(t, "per"),
		}
		var clock int64
		l := newLocal(rapid.IntRange(1, 500).Draw(t, "keys"), func() int64 { return clock })
		// Other keys come and go in the same limiter, so that idle ones are forgotten in between.
		admitted := map[string][]int64{}
		for range rapid.IntRange(1, 150).Draw(t, "events") {
			clock += rapid.Int64Range(0, int64(rate.Per)/int64(rate.Count)*3/2).Draw(t, "step")
			key := rapid.SampledFrom([]string{"a", "b", "c"}).Draw(t, "key")
			d := allow(t, l, key, rate)
			if d.Allowed {
				admitted[key] = append(admitted[key], clock)
				require.Zero(t, d.RetryAfter)
			} else {
				require.Positive(t, d.RetryAfter)
				require.LessOrEqual(t, d.RetryAfter, d.ResetAfter)
			}
			require.GreaterOrEqual(t, d.Remaining, 0)
			require.Less(t, d.Remaining, rate.Count)
		}
		for _, moments := range admitted {
			checkWindows(t, moments, rate)
		}
	})
}

// FuzzGCRA drives one key with any clock, also one that jumps back.
func FuzzGCRA(f *testing.F) {
	f.Add(uint32(5), []byte{0, 0, 0, 0, 0, 0, 0, 1, 0, 200})
	f.Add(uint32(1), []byte{255, 255, 255, 255, 0, 0, 127, 255})
	f.Add(uint32(1_000_000), []byte{0, 1, 0, 1, 0, 1})
	f.Fuzz(func(t *testing.T, count uint32, steps []byte) {
		rate := Rate{Count: 1 + int(count%1_000_000), Per: time.Second}
		var now, latest, tat int64
		var admitted []int64
		for len(steps) >= 2 && len(admitted) < 300 {
			step := int64(int16(binary.BigEndian.Uint16(steps))) * int64(time.Millisecond)
			steps = steps[2:]
			now = max(0, now+step)
			latest = max(latest, now)
			next, d := gcra(tat, now, rate)
			if next < tat && next < now {
				t.Fatalf("the arrival time went back from %d to %d", tat, next)
			}
			if !d.Allowed && (next != max(tat, now) || d.RetryAfter <= 0) {
				t.Fatalf("a refusal changed the state or had no RetryAfter: %+v", d)
			}
			if d.Remaining < 0 || d.Remaining >= rate.Count {
				t.Fatalf("remaining %d of %d", d.Remaining, rate.Count)
			}
			tat = next
			if d.Allowed {
				// On the monotonic reading of a clock that jumps, time has only ever reached latest.
				admitted = append(admitted, latest)
			}
		}
		checkWindows(t, admitted, rate)
	})
}

func TestMemoryIsBounded(t *testing.T) {
	var clock int64
	const most = 1000
	l := newLocal(most, func() int64 { return clock })
	rate := Rate{Count: 1, Per: time.Minute}
	refused := 0
	for i := range 10 * most {
		d := allow(t, l, fmt.Sprint("key", i), rate)
		if !d.Allowed {
			refused++
			require.Equal(t, time.Minute, d.RetryAfter, "when the first place becomes free")
		}
	}
	require.LessOrEqual(t, l.Len(), most)
	require.Positive(t, refused, "busy keys are not forgotten for new ones")
	require.False(t, allow(t, l, "key0", rate).Allowed, "a busy key cannot be flushed out")

	clock += int64(time.Minute)
	for i := range 10 * most {
		allow(t, l, fmt.Sprint("new", i), Rate{Count: 1000, Per: time.Second})
		clock += int64(time.Millisecond)
	}
	require.Less(t, l.Len(), most/2, "idle keys are forgotten while others are used")
	for i := range l.shards {
		s := &l.shards[i]
		require.Equal(t, len(s.byName), len(s.byTime))
		for j, e := range s.byTime {
			require.Equal(t, j, e.index)
			require.Same(t, e, s.byName[e.key])
		}
	}
}

func TestConcurrentUseAdmitsExactlyTheBurst(t *testing.T) {
	l := newLocal(0, func() int64 { return 0 })
	rate := Rate{Count: 100, Per: time.Minute}
	var admitted atomic.Int64
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for i := range 400 {
				if d, _ := l.Allow(t.Context(), fmt.Sprint(i%4), rate); d.Allowed {
					admitted.Add(1)
				}
			}
		})
	}
	wg.Wait()
	require.EqualValues(t, 400, admitted.Load())
}

func TestSetHeaders(t *testing.T) {
	h := http.Header{}
	SetHeaders(h, Decision{Allowed: true, Policy: "user", Limit: 20, Per: time.Minute, Remaining: 3, ResetAfter: 1500 * time.Millisecond})
	require.Equal(t, http.Header{
		"Ratelimit-Limit": {"20"}, "Ratelimit-Remaining": {"3"}, "Ratelimit-Reset": {"2"},
		"Ratelimit-Policy": {`"user";q=20;w=60`}, "Ratelimit": {`"user";r=3;t=2`},
	}, h)

	h = http.Header{}
	SetHeaders(h, Decision{Limit: 20, ResetAfter: 3 * time.Second, RetryAfter: time.Millisecond})
	require.Equal(t, "1", h.Get("Retry-After"), "never zero")
	require.Equal(t, "0", h.Get("RateLimit-Remaining"))

	h = http.Header{}
	SetHeaders(h, Decision{Allowed: true})
	require.Empty(t, h)
}

func BenchmarkLocal(b *testing.B) {
	l := NewLocal(0)
	keys := make([]string, 1000)
	for i := range keys {
		keys[i] = fmt.Sprint("user-", i)
	}
	rate := Rate{Count: 100, Per: time.Second}
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for i := 0; pb.Next(); i++ {
			_, _ = l.Allow(b.Context(), keys[i%len(keys)], rate)
		}
	})
}
