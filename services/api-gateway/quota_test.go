package gateway

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/kit/httpkit"
)

// A scheduler that counts slowly does not let an owner past the limit by what is
// created while it counts, however many come at once, and what it says is used for
// a second.
func TestQuotaCountsWhatIsCreatedMeanwhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const most = 100
		var asked, stored, failed atomic.Int64
		q := newQuota(most, func(context.Context, string) (int, error) {
			asked.Add(1)
			n := int(stored.Load())
			time.Sleep(100 * time.Millisecond)
			return n, nil
		})
		began := time.Now()
		var wg sync.WaitGroup
		for i := range 150 { // more than may wait, all before the first answer
			wg.Go(func() {
				for n := 0; time.Since(began) < 5*time.Second; n++ {
					if done, p := q.reserve(t.Context(), "ann"); p == nil {
						time.Sleep(time.Duration(i%7) * 10 * time.Millisecond) // the create
						exists := (i+n)%3 > 0
						if exists {
							stored.Add(1)
						} else {
							failed.Add(1)
						}
						done(exists)
					}
					time.Sleep(10 * time.Millisecond)
				}
			})
		}
		wg.Wait()
		require.Equal(t, int64(most), stored.Load(), "what failed gave its place back")
		require.Positive(t, failed.Load())
		require.LessOrEqual(t, asked.Load(), int64(6))
	})
}

func TestQuotaWhenNobodyCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		check := func(q *quota) *httpkit.Problem {
			done, p := q.reserve(t.Context(), "ann")
			if p == nil {
				done(true)
			}
			return p
		}
		var fail atomic.Bool
		fail.Store(true)
		q := newQuota(1, func(ctx context.Context, _ string) (int, error) {
			if fail.Load() {
				<-ctx.Done()
				return 0, errors.New("no scheduler answers")
			}
			return 1, nil
		})
		began := time.Now()
		require.Nil(t, check(q))
		require.LessOrEqual(t, time.Since(began), quotaTimeout)
		for range 100 {
			require.Nil(t, check(q))
		}
		require.LessOrEqual(t, time.Since(began), quotaTimeout, "only one caller waits, and once a second")
		fail.Store(false)
		time.Sleep(quotaFresh)
		p := check(q)
		require.NotNil(t, p)
		require.Equal(t, http.StatusTooManyRequests, p.Status)
		require.Nil(t, check(newQuota(0, nil)), "0 is no limit, and asks nobody")
	})
}

func TestQuotaForgetsOwners(t *testing.T) {
	q := newQuota(1, func(context.Context, string) (int, error) { return 0, nil })
	for i := range 3 * quotaOwners {
		done, p := q.reserve(t.Context(), fmt.Sprint("owner", i))
		require.Nil(t, p)
		done(true)
	}
	require.LessOrEqual(t, len(q.owners), quotaOwners)
}

func TestWhatCountsAsOneAddress(t *testing.T) {
	for addr, want := range map[string]string{
		"192.0.2.7":            "192.0.2.7",
		"::ffff:192.0.2.7":     "192.0.2.7",
		"2001:db8:1:2:3:4:5:6": "2001:db8:1:2::/64",
		"2001:db8:1:2:ffff::1": "2001:db8:1:2::/64",
		"2001:db8:1:3::1":      "2001:db8:1:3::/64",
		"fe80::1%eth0":         "fe80::/64",
	} {
		require.Equal(t, want, clientNetwork(netip.MustParseAddr(addr)), addr)
	}
	require.NotEmpty(t, clientNetwork(netip.Addr{}))
}
