package mongo

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/FerretDB/FerretDB/ferretdb"
	"github.com/stretchr/testify/require"
	"go.mongodb.org/mongo-driver/v2/mongo"
	"go.mongodb.org/mongo-driver/v2/mongo/options"

	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/store"
	"github.com/cmdexec/cmdexec/libs/store/mongostore"
	"github.com/cmdexec/cmdexec/libs/store/storetest"
)

// deviations are what FerretDB 1.24 cannot do. Whatever runs on it for a test has to
// do with fewer than 100 changed jobs in a batch, and with one writer of a job at a time.
var deviations = []storetest.Deviation{
	{Case: "large batch", Records: 91, Reason: "FerretDB keeps the rows of each update that matches open until the command ends, " +
		"and has 100 connections to SQLite: a bulk of 100 updates that match waits for ever"},
	{Case: "contended batches", Reason: "an update of FerretDB reads, compares and then writes by _id alone: " +
		"of two at the same time the older one may be written last"},
}

// TestFerretDB runs the suite over the wire protocol, in one process.
func TestFerretDB(t *testing.T) {
	storetest.Run(t, fresh(ferret(t)), deviations...)
}

// TestMongoDB runs the suite against a real server, in databases of its own.
func TestMongoDB(t *testing.T) {
	storetest.Run(t, fresh(realServer(t)))
}

// TestTooLarge: a record that no document holds does not keep the others out.
func TestTooLarge(t *testing.T) {
	for name, server := range map[string]func(*testing.T) string{"FerretDB": ferret, "MongoDB": realServer} {
		t.Run(name, func(t *testing.T) {
			s := fresh(server(t))(t)
			good, err := storetest.FinishedJob(1)
			require.NoError(t, err)
			noise := make([]byte, 19<<20) // compresses by a fifth
			rng := rand.NewChaCha8([32]byte{1})
			_, _ = rng.Read(noise) // never fails
			for i := range noise {
				noise[i] = ' ' + noise[i]%94
			}
			huge := good
			huge.ID = id.New(id.Job, good.CreatedAt)
			huge.Spec.Stdin = string(noise)
			up, err := s.UpsertJobs(t.Context(), []job.Record{huge, good})
			require.NoError(t, err)
			require.Equal(t, 1, up.Written)
			require.Len(t, up.Poison, 1)
			require.Equal(t, huge.ID, up.Poison[0].ID)
			require.ErrorIs(t, up.Poison[0].Err, store.ErrInvalid)
			_, err = s.Job(t.Context(), good.ID)
			require.NoError(t, err)
			_, err = s.Job(t.Context(), huge.ID)
			require.ErrorIs(t, err, store.ErrNotFound)
		})
	}
}

// TestOpenRefuses: one clear line, and never the password.
func TestOpenRefuses(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for _, uri := range []string{
		"postgres://u:canary@127.0.0.1/x",
		"mongodb://u:canary@127.0.0.1:1/x?serverSelectionTimeoutMS=200",
		"mongodb://u:canary@127.0.0.1:notaport/x",
		"mongodb://u:canary@127.0.0.1/x?authMechanism=canary",
		"canary",
	} {
		_, err := mongostore.Open(ctx, uri)
		require.Error(t, err, uri)
		require.NotContains(t, err.Error(), "canary")
		require.Zero(t, strings.Count(err.Error(), "\n"), err.Error())
	}
}

// ferret starts FerretDB and returns its address.
func ferret(t *testing.T) string {
	db, err := ferretdb.New(&ferretdb.Config{
		Listener: ferretdb.ListenerConfig{TCP: "127.0.0.1:0"}, Handler: "sqlite", SQLiteURL: "file:" + t.TempDir() + "/",
		Logger: slog.New(slog.DiscardHandler),
	})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- db.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return db.MongoDBURI() + "?timeoutMS=60000"
}

// realServer returns the address of the server that MONGODB_URI names.
func realServer(t *testing.T) string {
	uri := os.Getenv("MONGODB_URI")
	if uri == "" {
		t.Skip("requires mongodb: MONGODB_URI names no server")
	}
	return uri
}

var databases atomic.Int64

// fresh opens a database that nobody has used, for each case, and drops it after.
func fresh(uri string) func(t *testing.T) store.Store {
	return func(t *testing.T) store.Store {
		s, err := mongostore.Open(t.Context(), ownDatabase(t, uri))
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, s.Close()) })
		return s
	}
}

// ownDatabase changes the address to a database that nobody has used, and drops
// that one when the test ends.
func ownDatabase(t *testing.T, uri string) string {
	u, err := url.Parse(uri)
	require.NoError(t, err)
	if q := u.Query(); u.User != nil && !q.Has("authSource") && len(u.Path) > 1 {
		q.Set("authSource", u.Path[1:]) // users are known where the address says, not in the test's database
		u.RawQuery = q.Encode()
	}
	name := fmt.Sprintf("cmdexec_test_%d_%d", time.Now().UnixNano(), databases.Add(1))
	u.Path = "/" + name
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		client, err := mongo.Connect(options.Client().ApplyURI(u.String()))
		require.NoError(t, err)
		require.NoError(t, client.Database(name).Drop(ctx))
		require.NoError(t, client.Disconnect(ctx))
	})
	return u.String()
}

// TestOpenAgain: services open the same database together, and once more after
// each restart.
func TestOpenAgain(t *testing.T) {
	for name, server := range map[string]func(*testing.T) string{"FerretDB": ferret, "MongoDB": realServer} {
		t.Run(name, func(t *testing.T) {
			uri := ownDatabase(t, server(t))
			for range 3 {
				var together sync.WaitGroup
				for range 3 {
					together.Go(func() {
						s, err := mongostore.Open(t.Context(), uri)
						if err != nil {
							t.Error(err)
							return
						}
						if err := s.Close(); err != nil {
							t.Error(err)
						}
					})
				}
				together.Wait()
			}
		})
	}
}
