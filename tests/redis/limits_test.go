package redis_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/kit/ratelimit"
	"github.com/cmdexec/cmdexec/libs/kit/ratelimit/ratelimittest"
	"github.com/cmdexec/cmdexec/libs/store/redisstore"
)

func TestSharedConforms(t *testing.T) {
	s := startServer(t)
	ratelimittest.Run(t, func(t *testing.T) ratelimit.Limiter { return s.shared() })
}

func TestFailoverConforms(t *testing.T) {
	s := startServer(t)
	ratelimittest.Run(t, func(t *testing.T) ratelimit.Limiter { return s.failover(ratelimit.FailoverOptions{}) })
}

func TestOneRoundTripForARequest(t *testing.T) {
	s := startServer(t)
	l := s.shared()
	rate := ratelimit.Rate{Count: 1_000_000, Per: time.Second}
	_, err := l.Allow(t.Context(), "first", rate) // Redis does not have the script yet
	require.NoError(t, err)
	before := s.evaluations()
	for range 100 {
		d, err := l.AllowAll(t.Context(), ratelimit.Event{Key: "ip", Rate: rate}, ratelimit.Event{Key: "user", Rate: rate})
		require.NoError(t, err)
		require.True(t, d.Allowed)
	}
	require.Equal(t, before+100, s.evaluations())
}

func TestEveryKeyExpires(t *testing.T) {
	s := startServer(t)
	l := s.shared()
	for _, rate := range []ratelimit.Rate{{Count: 1, Per: time.Second}, {Count: 1_000_000, Per: time.Second}, {Count: 7, Per: time.Minute}} {
		for range 5 {
			_, err := l.Allow(t.Context(), fmt.Sprint("expires", rate), rate)
			require.NoError(t, err)
		}
	}
	for _, key := range s.do("KEYS", "*").([]any) {
		require.True(t, strings.HasPrefix(key.(string), "cmdexec:limit:"), key)
		ttl := s.do("PTTL", key).(int64)
		require.NotEqual(t, int64(-1), ttl, "%s never expires", key)
		require.LessOrEqual(t, ttl, time.Minute.Milliseconds()+1)
	}
	require.NotEmpty(t, s.do("KEYS", "*"))
}

// What else may be in a key: the moment of a clock that was set back since, and garbage.
func TestStrangeValues(t *testing.T) {
	s := startServer(t)
	l := s.shared()
	rate := ratelimit.Rate{Count: 10, Per: 10 * time.Second}
	s.do("SET", "cmdexec:limit:future", fmt.Sprintf("%d:0", time.Now().Add(time.Hour).Unix()))
	d, err := l.Allow(t.Context(), "future", rate)
	require.NoError(t, err)
	require.False(t, d.Allowed)
	require.Equal(t, time.Second, d.RetryAfter, "the key waits for one event, not for an hour")
	for i, garbage := range []string{"", "x", "1", "-1:5", "1e9:0", "99999999999999999999999999:1"} {
		s.do("SET", "cmdexec:limit:garbage"+strconv.Itoa(i), garbage)
		_, err := l.Allow(t.Context(), "garbage"+strconv.Itoa(i), rate)
		require.NoError(t, err, garbage)
	}
	s.do("RPUSH", "cmdexec:limit:list", "x")
	_, err = l.Allow(t.Context(), "list", rate)
	require.ErrorContains(t, err, "WRONGTYPE")
	d, err = s.failover(ratelimit.FailoverOptions{}).Allow(t.Context(), "list", rate)
	require.NoError(t, err)
	require.True(t, d.Allowed, "the local limiter decides")
}

// envSpend makes this binary a process that spends a budget and prints how much it got.
const envSpend = "CMDEXEC_TEST_SPEND"

const (
	processKey    = "processes"
	processBudget = 500
	processTries  = 800
)

func spend(address string) (exit int) {
	remote, err := redisstore.Open(address, patience)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	defer func() { _ = remote.Close() }()
	got := 0
	for range processTries {
		d, err := ratelimit.Shared{Remote: remote}.Allow(context.Background(), processKey, ratelimit.Rate{Count: processBudget, Per: 24 * time.Hour})
		if err != nil {
			fmt.Println(err)
			return 1
		}
		if d.Allowed {
			got++
		}
	}
	fmt.Println(got)
	return 0
}

func TestProcessesShareOneBudget(t *testing.T) {
	s := startServer(t)
	const processes = 3
	var cmds []*exec.Cmd
	var outs [processes]bytes.Buffer
	for i := range processes {
		cmd := exec.CommandContext(t.Context(), os.Args[0])
		cmd.Env = append(os.Environ(), envSpend+"="+s.address())
		cmd.Stdout, cmd.Stderr = &outs[i], &outs[i]
		require.NoError(t, cmd.Start())
		cmds = append(cmds, cmd)
	}
	total := 0
	for i, cmd := range cmds {
		require.NoError(t, cmd.Wait(), outs[i].String())
		n, err := strconv.Atoi(strings.TrimSpace(outs[i].String()))
		require.NoError(t, err)
		t.Logf("process %d got %d", i, n)
		total += n
	}
	require.Equal(t, processBudget, total)
}

func TestNothingLogsThePassword(t *testing.T) {
	s := startServer(t)
	var logged bytes.Buffer
	f := s.failover(ratelimit.FailoverOptions{Logger: slog.New(slog.NewJSONHandler(&logged, nil))})
	s.do("CONFIG", "SET", "requirepass", "another")
	s.do("CLIENT", "KILL", "SKIPME", "yes", "TYPE", "normal")
	eventually(t, "the limiter has noticed", func() bool {
		_, _ = f.Allow(t.Context(), "k", ratelimit.Rate{Count: 1_000_000, Per: time.Second})
		return f.Note() != ""
	})
	f.Close()
	require.Contains(t, logged.String(), "WRONGPASS")
	require.NotContains(t, logged.String(), password)
}
