// Command worker-edge is the service that workers connect to.
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
	edge "github.com/cmdexec/cmdexec/services/worker-edge"
)

type settings struct {
	host.Settings
	Bus bus.Settings
	edge.Config
	WorkerTokenSecret config.Secret `envconfig:"WORKER_TOKEN_SECRET" required:"true" desc:"signs worker tokens, at least 32 bytes"`
	RedisURL          config.Secret `envconfig:"REDIS_URL" desc:"address of Redis, which shares rate limits with other processes; without it each counts by itself"`
}

// Check finds what can be known to be wrong before NATS answers.
func (s settings) Check() error {
	if err := config.ValidateSecret("WORKER_TOKEN_SECRET", s.WorkerTokenSecret); err != nil {
		return err
	}
	return s.Config.Check()
}

// gcPercent: an edge is as large as its sessions, of which nearly all are idle. With
// the default as much again would be garbage before it is collected.
const gcPercent = 25

func main() {
	config.CollectAt(gcPercent)
	host.Main("worker-edge", "127.0.0.1:9101", os.Exit, build)
}

func build(ctx context.Context, cfg settings, env *host.Env) (host.Service, error) {
	shared, err := limiter(cfg.RedisURL, env)
	if err != nil {
		return nil, err
	}
	env.Waiting("NATS at NATS_URL")
	conn, err := bus.Dial(ctx, cfg.Bus, "worker-edge", env.Logger)
	if err != nil {
		return nil, err
	}
	env.Defer(conn.Close)
	return edge.New(cfg.Config, edge.Deps{
		Bus: conn, Limiter: shared, WorkerTokenSecret: cfg.WorkerTokenSecret, Logger: env.Logger, Metrics: env.Metrics,
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
