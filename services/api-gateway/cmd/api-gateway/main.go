// Command api-gateway is the service that users talk to.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/kit/config"
	"github.com/cmdexec/cmdexec/libs/kit/host"
	"github.com/cmdexec/cmdexec/libs/kit/ratelimit"
	"github.com/cmdexec/cmdexec/libs/store/redisstore"
	gateway "github.com/cmdexec/cmdexec/services/api-gateway"
)

type settings struct {
	host.Settings
	Bus bus.Settings
	gateway.Config
	RedisURL config.Secret `envconfig:"REDIS_URL" desc:"address of Redis, which shares rate limits with other processes; without it each counts by itself"`
}

func main() { host.Main("api-gateway", "127.0.0.1:9100", os.Exit, build) }

func build(ctx context.Context, cfg settings, env *host.Env) (host.Service, error) {
	shared, err := limiter(cfg.RedisURL, env)
	if err != nil {
		return nil, err
	}
	env.Waiting("NATS at NATS_URL")
	conn, err := bus.Dial(ctx, cfg.Bus, "api-gateway", env.Logger)
	if err != nil {
		return nil, err
	}
	env.Defer(conn.Close)
	env.Waiting("the streams and buckets: run `cmdexec bus apply`")
	if err := conn.Bind(ctx); err != nil {
		return nil, err
	}
	return gateway.New(cfg.Config, gateway.Deps{
		Bus: conn, Limiter: shared, Logger: env.Logger, Metrics: env.Metrics, Durability: func() string { return string(conn.Promised()) },
	})
}

// limiter shares rate limits by the Redis at an address. Without one it is nil:
// the service counts by itself.
func limiter(address config.Secret, env *host.Env) (ratelimit.Limiter, error) {
	if address == "" {
		return nil, nil
	}
	limits, err := redisstore.Open(address.Reveal(), ratelimit.RemoteTimeout)
	if err != nil {
		return nil, fmt.Errorf("REDIS_URL %w", err)
	}
	env.Defer(func() { _ = limits.Close() }) // nothing in it is worth a word
	return env.ShareLimits(limits)
}
