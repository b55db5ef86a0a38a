// Command registry-persister is the service that keeps jobs in the database.
package main

import (
	"context"
	"os"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/kit/host"
	"github.com/cmdexec/cmdexec/libs/store/dial"
	persister "github.com/cmdexec/cmdexec/services/registry-persister"
)

type settings struct {
	host.Settings
	Bus bus.Settings
	persister.Config
	Database dial.Settings
}

func main() { host.Main("registry-persister", "127.0.0.1:9104", os.Exit, build) }

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
	conn, err := bus.Dial(ctx, cfg.Bus, "registry-persister", env.Logger)
	if err != nil {
		return nil, err
	}
	env.Defer(conn.Close)
	return persister.New(cfg.Config, persister.Deps{Bus: conn, Store: db, Logger: env.Logger, Metrics: env.Metrics})
}
