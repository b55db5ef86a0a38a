package ratelimit

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
)

// memory is a Remote of this process that can be made to fail, or to hang until its caller gives up.
type memory struct {
	mu    sync.Mutex
	tat   map[string]int64
	fail  error
	hang  bool
	asked int
	start time.Time
}

func newMemory() *memory { return &memory{tat: map[string]int64{}, start: time.Now()} }

func (m *memory) set(fail error, hang bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fail, m.hang = fail, hang
}

func (m *memory) calls() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.asked
}

func (m *memory) Spend(ctx context.Context, keys []string, interval, burst []time.Duration) (ahead []time.Duration, wait time.Duration, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.asked++
	if m.hang {
		m.mu.Unlock()
		<-ctx.Done()
		m.mu.Lock()
		return nil, 0, ctx.Err()
	}
	if m.fail != nil {
		return nil, 0, m.fail
	}
	now := int64(time.Since(m.start))
	for i, key := range keys {
		tat := max(m.tat[key], now)
		next := tat + int64(interval[i])
		if wait := time.Duration(next-now) - burst[i]; wait > 0 {
			return append(ahead, time.Duration(tat-now)), wait, nil
		}
		m.tat[key] = next
		ahead = append(ahead, time.Duration(next-now))
	}
	return ahead, 0, nil
}

var errAway = errors.New("the store is away")

// start makes a failover whose first probe is over.
func start(t *testing.T, m *memory, o FailoverOptions) *Failover {
	t.Helper()
	f, err := NewFailover(m, o)
	require.NoError(t, err)
	t.Cleanup(f.Close)
	synctest.Wait()
	return f
}

func TestFailoverSharesABudgetWhileTheRemoteAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		a, b := start(t, m, FailoverOptions{}), start(t, m, FailoverOptions{})
		rate := Rate{Count: 10, Per: time.Minute}
		admitted := 0
		for range 20 {
			for _, l := range []*Failover{a, b} {
				if allow(t, l, "k", rate).Allowed {
					admitted++
				}
			}
		}
		require.Equal(t, 10, admitted)
		require.Empty(t, a.Note())
	})
}

func TestFailoverIsWarmWhenTheRemoteGoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		f := start(t, m, FailoverOptions{})
		rate := Rate{Count: 10, Per: time.Minute}
		for range 6 {
			require.True(t, allow(t, f, "k", rate).Allowed)
		}
		m.set(errAway, false)
		admitted := 0
		for range 20 {
			if allow(t, f, "k", rate).Allowed {
				admitted++
			}
		}
		require.Equal(t, 4, admitted, "what was used before counts")
	})
}

// Whatever the remote forgets, one process lets through no more than its own limit.
func TestFailoverOfARemoteThatForgets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		f := start(t, m, FailoverOptions{})
		rate := Rate{Count: 10, Per: time.Minute}
		admitted := 0
		for range 50 {
			if allow(t, f, "k", rate).Allowed {
				admitted++
			}
			m.mu.Lock()
			clear(m.tat)
			m.mu.Unlock()
		}
		require.Equal(t, 10, admitted)
	})
}

func TestFailoverBreaksAndHeals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		var logged bytes.Buffer
		reg := prometheus.NewRegistry()
		f := start(t, m, FailoverOptions{Logger: slog.New(slog.NewTextHandler(&logged, nil)), Metrics: reg})
		rate := Rate{Count: 1000, Per: time.Second}
		allow(t, f, "k", rate)
		require.Equal(t, 1.0, value(t, reg, "cmdexec_ratelimit_remote_up", ""))

		m.set(nil, true)
		slowCalls := 0
		for range 100 {
			before := time.Now()
			require.True(t, allow(t, f, "k", rate).Allowed, "no error reaches a caller")
			if took := time.Since(before); took > 0 {
				require.Equal(t, RemoteTimeout, took)
				slowCalls++
			}
		}
		require.Equal(t, breakAfter, slowCalls, "afterwards nobody waits")
		require.Equal(t, 0.0, value(t, reg, "cmdexec_ratelimit_remote_up", ""))
		require.NotEmpty(t, f.Note())

		time.Sleep(time.Minute)
		before := m.calls()
		time.Sleep(time.Minute)
		probes := m.calls() - before
		require.InDelta(t, 60, probes, 45, "probes go on, at most some each second")
		m.set(nil, false)
		time.Sleep(probeMost + RemoteTimeout)
		synctest.Wait()
		require.Empty(t, f.Note(), "it heals by itself")
		before = m.calls()
		allow(t, f, "k", rate)
		require.Equal(t, before+1, m.calls(), "one question for one request")
		require.Equal(t, 1.0, value(t, reg, "cmdexec_ratelimit_remote_up", ""))
		require.Equal(t, 1.0, value(t, reg, "cmdexec_ratelimit_remote_changes_total", "away"))
		require.Equal(t, 2.0, value(t, reg, "cmdexec_ratelimit_remote_changes_total", "up"))
		require.Equal(t, 3, strings.Count(logged.String(), "level="), "each change is logged once:\n%s", logged.String())
	})
}

func TestFailoverStartsWithoutARemote(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		m.set(errAway, false)
		var logged bytes.Buffer
		f := start(t, m, FailoverOptions{Logger: slog.New(slog.NewTextHandler(&logged, nil))})
		time.Sleep(time.Hour)
		require.Equal(t, 1, strings.Count(logged.String(), "level=WARN"))
		rate := Rate{Count: 3, Per: time.Hour}
		for i := range 5 {
			require.Equal(t, i < 3, allow(t, f, "k", rate).Allowed)
		}
	})
}

// A single failure now and then does not end the sharing.
func TestFailoverForgivesSingleFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		f := start(t, m, FailoverOptions{})
		rate := Rate{Count: 1000, Per: time.Second}
		for i := range 30 {
			m.set(map[bool]error{true: errAway}[i%3 != 0], false)
			require.True(t, allow(t, f, "k", rate).Allowed)
		}
		require.Empty(t, f.Note())
	})
}

func TestACallerWhoGoesAwayIsNoFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		f := start(t, m, FailoverOptions{})
		m.set(nil, true)
		gone, cancel := context.WithCancel(t.Context())
		cancel()
		for range 10 {
			_, err := f.Allow(gone, "k", Rate{Count: 1000, Per: time.Second})
			require.NoError(t, err)
		}
		require.Empty(t, f.Note())
	})
}

// A flood of one key reaches the remote no more often than its limit.
func TestAFloodStaysLocal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		f := start(t, m, FailoverOptions{})
		before := m.calls()
		for range 10_000 {
			allow(t, f, "k", Rate{Count: 10, Per: time.Minute})
		}
		require.Equal(t, before+10, m.calls())
	})
}

func TestSharedRefusesAnAnswerThatMakesNoSense(t *testing.T) {
	one := Rate{Count: 1, Per: time.Second}
	for _, r := range []answer{{}, {ahead: make([]time.Duration, 3)}, {ahead: make([]time.Duration, 1)}} {
		_, err := Shared{r}.AllowAll(t.Context(), Event{Key: "a", Rate: one}, Event{Key: "b", Rate: one})
		require.Error(t, err)
	}
}

type answer struct {
	ahead []time.Duration
	wait  time.Duration
}

func (a answer) Spend(context.Context, []string, []time.Duration, []time.Duration) ([]time.Duration, time.Duration, error) {
	return a.ahead, a.wait, nil
}

// value is that of a metric, of the label where one is given.
func value(t *testing.T, g prometheus.Gatherer, name, label string) float64 {
	t.Helper()
	families, err := g.Gather()
	require.NoError(t, err)
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == name && (label == "" || m.GetLabel()[0].GetValue() == label) {
				return m.GetGauge().GetValue() + m.GetCounter().GetValue()
			}
		}
	}
	return 0
}

func BenchmarkFailoverWhileAway(b *testing.B) {
	m := newMemory()
	m.set(errAway, false)
	f, err := NewFailover(m, FailoverOptions{})
	require.NoError(b, err)
	defer f.Close()
	most := Rate{Count: 1_000_000, Per: time.Second}
	ip, user := Event{Policy: "ip", Key: "ip", Rate: most}, Event{Policy: "user", Key: "user", Rate: most}
	b.ReportAllocs()
	for b.Loop() {
		_, _ = f.AllowAll(b.Context(), ip, user)
	}
}
