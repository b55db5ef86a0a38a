package redis_test

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/kit/ratelimit"
)

// load is callers of two limiters, as of two processes, that spend the budget of a few keys as fast as they can.
type load struct {
	stop chan struct{}
	wg   sync.WaitGroup
	mu   sync.Mutex
	got  map[string][]time.Time // by limiter and key: before each call that was allowed
	took []time.Duration
	errs []error
}

func startLoad(rate ratelimit.Rate, limiters ...ratelimit.Limiter) *load {
	const callers, keys = 4, 3
	ld := &load{stop: make(chan struct{}), got: map[string][]time.Time{}}
	for n, l := range limiters {
		for c := range callers {
			ld.wg.Go(func() {
				for i := c; ; i++ {
					select {
					case <-ld.stop:
						return
					default:
					}
					key := fmt.Sprint("load", i%keys)
					began := time.Now()
					d, err := l.AllowAll(context.Background(),
						ratelimit.Event{Key: fmt.Sprint("ip", c), Rate: ratelimit.Rate{Count: 1_000_000, Per: time.Second}},
						ratelimit.Event{Key: key, Rate: rate})
					took := time.Since(began)
					ld.mu.Lock()
					ld.took = append(ld.took, took)
					if err != nil {
						ld.errs = append(ld.errs, err)
					} else if d.Allowed {
						name := fmt.Sprint(n, " ", key)
						ld.got[name] = append(ld.got[name], began)
					}
					ld.mu.Unlock()
					time.Sleep(200 * time.Microsecond) // the machine has other things to do
				}
			})
		}
	}
	return ld
}

// since takes out how long the calls took that ended since the last time.
func (ld *load) since() []time.Duration {
	ld.mu.Lock()
	defer ld.mu.Unlock()
	out := ld.took
	ld.took = nil
	return out
}

func (ld *load) end() {
	close(ld.stop)
	ld.wg.Wait()
}

func TestFaultsUnderLoad(t *testing.T) {
	for name, c := range map[string]struct {
		fault func(s *server)
		heal  func(s *server)
		away  bool // the limiters must notice
	}{
		"killed":       {func(s *server) { s.kill() }, func(s *server) { s.start() }, true},
		"stopped":      {func(s *server) { s.signal(syscall.SIGSTOP) }, func(s *server) { s.signal(syscall.SIGCONT) }, true},
		"flushed":      {func(s *server) { s.do("FLUSHALL") }, func(s *server) { s.do("FLUSHALL") }, false},
		"script gone":  {func(s *server) { s.do("SCRIPT", "FLUSH") }, func(*server) {}, false},
		"full":         {func(s *server) { s.do("CONFIG", "SET", "maxmemory", "1") }, func(s *server) { s.do("CONFIG", "SET", "maxmemory", "0") }, true},
		"read-only":    {func(s *server) { s.do("REPLICAOF", "127.0.0.1", "1") }, func(s *server) { s.do("REPLICAOF", "NO", "ONE") }, true},
		"disconnected": {func(s *server) { s.do("CLIENT", "KILL", "SKIPME", "yes", "TYPE", "normal") }, func(*server) {}, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := startServer(t)
			rate := ratelimit.Rate{Count: 50, Per: time.Second}
			log := slog.New(slog.NewTextHandler(t.Output(), nil))
			a, b := s.failover(ratelimit.FailoverOptions{Logger: log.With("limiter", "a")}), s.failover(ratelimit.FailoverOptions{Logger: log.With("limiter", "b")})
			began := time.Now()
			ld := startLoad(rate, a, b)
			eventually(t, "a second has gone by", func() bool { return time.Since(began) > time.Second })
			c.fault(s)
			if c.away {
				eventually(t, "both limiters have noticed", func() bool { return a.Note() != "" && b.Note() != "" })
				ld.since()
				from := time.Now()
				eventually(t, "a second has gone by", func() bool { return time.Since(from) > time.Second })
				took := ld.since()
				slices.Sort(took)
				require.NotEmpty(t, took)
				require.Less(t, took[len(took)/2], time.Millisecond, "the median while redis is away")
				t.Logf("%d calls while away: median %s, 99 %% %s", len(took), took[len(took)/2], took[len(took)*99/100])
			}
			c.heal(s)
			s.shares(a)
			s.shares(b)
			after := s.evaluations()
			eventually(t, "redis is asked again", func() bool { return s.evaluations() > after+10 })
			ld.end()
			ended := time.Now()

			require.Empty(t, ld.errs, "no caller gets an error")
			most := rate.Count + 1 + int(ended.Sub(began)*time.Duration(rate.Count)/rate.Per)
			total := map[string]int{}
			for name, moments := range ld.got {
				require.LessOrEqual(t, len(moments), most, "%s: a process lets through no more than its own limit", name)
				total[name[2:]] += len(moments)
			}
			for key, n := range total {
				t.Logf("%s: %d of %d", key, n, most)
				require.LessOrEqual(t, n, 2*most)
				require.GreaterOrEqual(t, n, rate.Count)
			}
			// Once all of it is back, the two share again. On a busy machine a late reply
			// may part them once more for a while.
			eventually(t, "the two share one budget", func() bool {
				fresh, got := fresh(), 0
				for range 100 {
					for _, l := range []ratelimit.Limiter{a, b} {
						if d, err := l.Allow(t.Context(), fresh, ratelimit.Rate{Count: 100, Per: 24 * time.Hour}); err == nil && d.Allowed {
							got++
						}
					}
				}
				require.GreaterOrEqual(t, got, 100)
				return got == 100
			})
		})
	}
}

// Redis that is not there at the start holds nobody up, and is used once it comes.
func TestRedisThatComesLater(t *testing.T) {
	s := startServer(t)
	s.kill()
	f, err := ratelimit.NewFailover(s.limits(ratelimit.RemoteTimeout), ratelimit.FailoverOptions{})
	require.NoError(t, err)
	t.Cleanup(f.Close)
	d, err := f.Allow(t.Context(), "k", ratelimit.Rate{Count: 1, Per: time.Hour})
	require.NoError(t, err)
	require.True(t, d.Allowed)
	require.NotEmpty(t, f.Note())
	s.start()
	s.shares(f)
	before := s.evaluations()
	eventually(t, "redis is asked", func() bool {
		_, err := f.Allow(t.Context(), fresh(), ratelimit.Rate{Count: 1, Per: time.Hour})
		require.NoError(t, err)
		return s.evaluations() > before
	})
}
