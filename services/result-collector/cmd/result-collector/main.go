// Command result-collector is the service that records what workers report.
package main

import (
	"context"
	"os"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/kit/host"
	"github.com/cmdexec/cmdexec/libs/store/dial"
	collector "github.com/cmdexec/cmdexec/services/result-collector"
)

type settings struct {
	host.Settings
	Bus      bus.Settings
	Database dial.Settings
}

func main() { host.Main("result-collector", "127.0.0.1:9103", os.Exit, build) }

func build(ctx context.Context, cfg settings, env *host.Env) (host.Service, error) {
	env.Waiting("the database")
	db, err := dial.Open(ctx, cfg.Database, env.Logger)
	if err != nil {
		return nil, err
	}
	env.Defer(func() {
		if err := db.Close(); err != nil {
			env.Logger.Error("the database was not closed in order", "err", err)
		}
	})
	env.Waiting("NATS at NATS_URL")
	conn, err := bus.Dial(ctx, cfg.Bus, "result-collector", env.Logger)
	if err != nil {
		return nil, err
	}
	env.Defer(conn.Close)
	return collector.New(collector.Deps{Bus: conn, Store: db, Logger: env.Logger, Metrics: env.Metrics})
}
