// Package dial opens the database that a service's settings name.
package dial

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/cmdexec/cmdexec/libs/store"
	"github.com/cmdexec/cmdexec/libs/store/mongostore"
	"github.com/cmdexec/cmdexec/libs/store/sqlitestore"
)

// Settings name one database. The services that use it must name the same one.
type Settings struct {
	MongoURI   string `envconfig:"MONGODB_URI" secret:"true" desc:"address of MongoDB, for example mongodb://user:password@host:27017/cmdexec"`
	SQLitePath string `envconfig:"SQLITE_PATH" desc:"database file, in place of MONGODB_URI, for services that share one machine"`
}

const retryEvery = 2 * time.Second

// Open opens the one database that is named. It waits for a server that does not
// answer until ctx ends; any other error is one line for the operator, without the
// address.
func Open(ctx context.Context, s Settings, log *slog.Logger) (store.Store, error) {
	switch {
	case s.MongoURI != "" && s.SQLitePath != "":
		return nil, errors.New("MONGODB_URI and SQLITE_PATH are both set: name one database")
	case s.MongoURI != "":
		return openMongo(ctx, s.MongoURI, log)
	case s.SQLitePath != "":
		return sqlitestore.Open(ctx, s.SQLitePath)
	default:
		return nil, errors.New("no database: set MONGODB_URI, or SQLITE_PATH where the services share one machine")
	}
}

func openMongo(ctx context.Context, uri string, log *slog.Logger) (store.Store, error) {
	for {
		s, err := mongostore.Open(ctx, uri)
		if err == nil {
			return s, nil
		}
		if !errors.Is(err, mongostore.ErrUnavailable) {
			return nil, err
		}
		log.Warn("waiting for the database", "err", err)
		timer := time.NewTimer(retryEvery)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil, err
		}
	}
}
