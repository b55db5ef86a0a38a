package redisstore

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

const timeout = 50 * time.Millisecond

func TestAnAddressThatCannotBeUsedIsNotRepeated(t *testing.T) {
	for _, address := range []string{
		"", "localhost:6379", "http://:hunter2@h", "redis://:hunter2@h:port", "redis://:hunter2@h/zero", "redis://u:hunter2@h?nonsense=1",
		"redis://:hunter2@h:1\x7f",
	} {
		_, err := Open(address, timeout)
		require.ErrorIs(t, err, ErrAddress, address)
		require.NotContains(t, err.Error(), "hunter2")
	}
	for _, address := range []string{"redis://h", "rediss://u:p@h:6380/3", "unix:///run/redis.sock", "redis://h?read_timeout=1h"} {
		l, err := Open(address, timeout)
		require.NoError(t, err, address)
		require.Equal(t, timeout, l.client.Options().ReadTimeout)
		require.NoError(t, l.Close())
	}
}

func TestNobodyThere(t *testing.T) {
	l, err := Open("redis://u:hunter2@127.0.0.1:1", timeout)
	require.NoError(t, err)
	defer func() { require.NoError(t, l.Close()) }()
	for range 50 {
		_, _, err = l.Spend(context.Background(), []string{"k"}, []time.Duration{1}, []time.Duration{1})
		require.Error(t, err)
		require.NotContains(t, err.Error(), "hunter2")
	}
}

func TestKeys(t *testing.T) {
	require.Equal(t, "cmdexec:limit:user:ann", limitKey("user:ann"))
	long := limitKey(strings.Repeat("x", 10_000))
	require.Len(t, long, len(limitPrefix)+len("sha256:")+64)
	require.NotEqual(t, long, limitKey(strings.Repeat("y", 10_000)))
}

func TestSpendChecksItsArguments(t *testing.T) {
	l, err := Open("redis://127.0.0.1:1", timeout)
	require.NoError(t, err)
	defer func() { require.NoError(t, l.Close()) }()
	_, _, err = l.Spend(t.Context(), []string{"a", "b"}, []time.Duration{1}, []time.Duration{1, 2})
	require.ErrorContains(t, err, "2 keys")
	ahead, wait, err := l.Spend(t.Context(), nil, nil, nil)
	require.NoError(t, err)
	require.Empty(t, ahead)
	require.Zero(t, wait)
}
