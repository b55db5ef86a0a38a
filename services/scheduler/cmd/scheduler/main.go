// Command scheduler is the service that decides where jobs run.
package main

import (
	"context"
	"os"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/kit/host"
	"github.com/cmdexec/cmdexec/services/scheduler"
)

type settings struct {
	host.Settings
	Bus bus.Settings
	scheduler.Config
}

func main() { host.Main("scheduler", "127.0.0.1:9102", os.Exit, build) }

func build(ctx context.Context, cfg settings, env *host.Env) (host.Service, error) {
	env.Waiting("NATS at NATS_URL")
	conn, err := bus.Dial(ctx, cfg.Bus, "scheduler", env.Logger)
	if err != nil {
		return nil, err
	}
	env.Defer(conn.Close)
	return scheduler.New(cfg.Config, scheduler.Deps{Bus: conn, Logger: env.Logger, Metrics: env.Metrics})
}
