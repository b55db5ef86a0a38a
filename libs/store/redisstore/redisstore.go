// Package redisstore keeps in Redis what several processes count together: rate limits. Nothing in it is worth keeping; every key expires
// by itself, and a Redis that loses all of it forgets no more than who was over a limit.
//
// One Redis is meant, or one behind a proxy or a failover of its own, not a cluster: the keys of one request are charged in one step and
// live on different slots. Give it `maxmemory-policy noeviction`: evicting counters would lift limits in silence, while a full Redis
// counts as one that is away.
package redisstore

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"
)

const (
	dialTimeout = 200 * time.Millisecond
	bufferSize  = 4 << 10 // bytes, of each of the two buffers of a connection; a reply has some dozens
)

// ErrAddress is the error of an address that cannot be used. It never contains the address, which may hold a password.
var ErrAddress = errors.New("must be an address such as redis://user:password@host:6379/0, rediss:// for TLS, or unix:///path/to/socket")

//go:embed spend.lua
var spendScript string

// Limits counts events of keys by GCRA. Make one with Open. It is safe for concurrent use.
type Limits struct {
	client *redis.Client
	spend  *redis.Script
}

// Open checks the address and connects to nothing: connections are made when they are needed. The only error is ErrAddress. timeout bounds
// each read, each write and each wait for a connection; timeouts and retries in the address are ignored.
func Open(address string, timeout time.Duration) (*Limits, error) {
	o, err := redis.ParseURL(address)
	if err != nil {
		return nil, ErrAddress // the library's error quotes it
	}
	o.DialTimeout, o.ReadTimeout, o.WriteTimeout, o.PoolTimeout = dialTimeout, timeout, timeout, timeout
	o.ContextTimeoutEnabled = true
	o.MaxRetries, o.DialerRetries = -1, 1 // the caller has something better to do than to wait for a second try
	o.ReadBufferSize, o.WriteBufferSize = bufferSize, bufferSize
	o.PipelinePoolSize = -1 // none is used
	o.MaintNotificationsConfig = &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}
	o.DisableIdentity = true // one round trip less for each connection
	// The library's logger is one for the process and writes to standard error by itself. What it would say is in the errors that it returns.
	redis.SetLogger(silence{})
	return &Limits{client: redis.NewClient(o), spend: redis.NewScript(spendScript)}, nil
}

// Close closes all connections.
func (l *Limits) Close() error { return l.client.Close() }

// Spend counts one event of each key, in order and in one step of Redis, up to the first that has to wait. interval is the time between
// two events of a key at its steady rate, burst how far ahead of Redis's clock a key may be; both in whole nanoseconds, one of each per
// key. It returns how far ahead each key is that was looked at, and how long the last of them has to wait: zero if every event was
// counted. It is one round trip, two after Redis has lost the script. It does not block past ctx's deadline, nor for longer than the
// timeout of each step. After an error nobody knows what was counted.
func (l *Limits) Spend(ctx context.Context, keys []string, interval, burst []time.Duration) (ahead []time.Duration, wait time.Duration, err error) {
	if len(interval) != len(keys) || len(burst) != len(keys) {
		return nil, 0, fmt.Errorf("spend: %d keys, %d intervals, %d bursts", len(keys), len(interval), len(burst))
	}
	if len(keys) == 0 {
		return nil, 0, nil
	}
	names := make([]string, len(keys))
	args := make([]any, 0, 2*len(keys))
	for i, key := range keys {
		names[i] = limitKey(key)
		args = append(args, int64(interval[i]), int64(burst[i]))
	}
	reply, err := l.spend.Run(ctx, l.client, names, args...).Int64Slice()
	if err != nil {
		return nil, 0, fmt.Errorf("spend in redis: %w", err)
	}
	if len(reply) == 0 || len(reply)%2 != 0 || len(reply) > 2*len(keys) {
		return nil, 0, fmt.Errorf("spend in redis: a reply of %d numbers for %d keys", len(reply), len(keys))
	}
	ahead = make([]time.Duration, len(reply)/2)
	for i := range ahead {
		ahead[i] = time.Duration(reply[2*i])
	}
	return ahead, time.Duration(reply[len(reply)-1]), nil
}

// silence is a logger of the library that says nothing.
type silence struct{}

// Printf discards.
func (silence) Printf(context.Context, string, ...any) {}
