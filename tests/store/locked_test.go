package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	_ "modernc.org/sqlite" // the driver, for a program that holds the file

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/natsd/natsdtest"
	"github.com/cmdexec/cmdexec/libs/store"
	"github.com/cmdexec/cmdexec/libs/store/sqlitestore"
	persister "github.com/cmdexec/cmdexec/services/registry-persister"
	collector "github.com/cmdexec/cmdexec/services/result-collector"
)

// TestLockedDatabase: while another program holds the database file, jobs end
// and nothing leaves the registry; afterwards persister and collector, each with
// its own connections to the file, catch up completely.
func TestLockedDatabase(t *testing.T) {
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	server := natsdtest.Start(t)
	connect := func() *bus.Conn {
		c, err := bus.Connect(t.Context(), bus.Options{InProcess: server, Name: "test", Logger: log})
		require.NoError(t, err)
		t.Cleanup(c.Close)
		return c
	}
	conn := connect()
	require.NoError(t, bus.Apply(t.Context(), conn, bus.Sizes{Jobs: 64 << 20, Results: 64 << 20, Logs: 64 << 20}))
	require.NoError(t, conn.Bind(t.Context()))

	path := filepath.Join(t.TempDir(), "jobs.db")
	open := func() *sqlitestore.Store {
		s, err := sqlitestore.Open(t.Context(), path)
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, s.Close()) })
		return s
	}
	db := open()
	later := func() time.Time { return time.Now().Add(time.Minute) } // every grace is over
	p, err := persister.New(persister.Config{}, persister.Deps{Bus: connect(), Store: db, Logger: log, Clock: later})
	require.NoError(t, err)
	c, err := collector.New(collector.Deps{Bus: connect(), Store: open(), Logger: log})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	var services sync.WaitGroup
	t.Cleanup(services.Wait)
	t.Cleanup(cancel)
	for _, run := range []func(context.Context) error{p.Run, c.Run} {
		services.Go(func() {
			if err := run(ctx); err != nil {
				t.Error(err)
			}
		})
	}
	eventually(t, "ready", func() bool { return p.Ready() == nil && c.Ready() == nil })

	release := lock(t, path)
	registry := conn.Registry()
	var ended []bus.Entry
	for i := range 40 {
		spec, problems := job.Normalise(job.Spec{Command: job.Command{Shell: "true"}})
		require.Empty(t, problems)
		e, err := registry.Create(t.Context(), job.New(id.New(id.Job, time.Now()), "alice", spec, time.Now()))
		require.NoError(t, err)
		e, err = registry.TransitionFrom(t.Context(), e, job.Assign{WorkerID: "worker-a", LeaseID: id.New(id.Lease, time.Now())})
		require.NoError(t, err)
		l := workerproto.Lease{JobID: e.Record.ID, Attempt: 1, LeaseID: e.Record.LeaseID}
		chunk := workerproto.Chunk{Seq: 1, Stream: workerproto.Stdout, Time: time.Now(), Data: fmt.Appendf(nil, "output %d, ", i)}
		frame, err := workerproto.EncodeChunk(l, chunk)
		require.NoError(t, err)
		_, err = conn.PublishChunks(t.Context(), e.Record.ID, [][]byte{frame})
		require.NoError(t, err)
		chunk.Seq, chunk.Data = 2, []byte("tail")
		code := 0
		require.NoError(t, conn.PublishResult(t.Context(), busmsg.Result{Result: workerproto.Result{
			WorkerID: "worker-a", Lease: l, Outcome: job.OutcomeSucceeded, ExitCode: &code, FinishedAt: time.Now(), Tail: []workerproto.Chunk{chunk},
		}}))
		ended = append(ended, e)
	}
	for i, e := range ended {
		eventually(t, "the job ends without the database", func() bool {
			have, err := registry.GetLatest(t.Context(), e.Record.ID)
			require.NoError(t, err, "it is still in the registry")
			ended[i] = have
			return have.Record.State == job.Succeeded
		})
	}
	_, err = db.Job(t.Context(), ended[0].Record.ID)
	require.ErrorIs(t, err, store.ErrNotFound, "the file was locked")

	release()
	for i, e := range ended {
		eventually(t, "stored, and out of the registry", func() bool {
			_, err := registry.GetLatest(t.Context(), e.Record.ID)
			if err != nil {
				require.ErrorIs(t, err, bus.ErrNotFound)
			}
			logs, logsErr := db.Logs(t.Context(), busmsg.GetLogs{JobID: e.Record.ID, Attempt: 1})
			require.NoError(t, logsErr)
			return errors.Is(err, bus.ErrNotFound) && logs.StoredChunks == 2
		})
		have, err := db.Job(t.Context(), e.Record.ID)
		require.NoError(t, err)
		require.Equal(t, e.Record, have)
		logs, err := db.Logs(t.Context(), busmsg.GetLogs{JobID: e.Record.ID, Attempt: 1})
		require.NoError(t, err)
		require.Equal(t, fmt.Sprintf("output %d, tail", i), string(logs.Chunks[0].Data)+string(logs.Chunks[1].Data))
	}
}

// lock holds the file as a backup or another program might.
func lock(t *testing.T, path string) (release func()) {
	other, err := sql.Open("sqlite", "file:"+path+"?_txlock=exclusive&_busy_timeout=5000")
	require.NoError(t, err)
	tx, err := other.BeginTx(context.Background(), nil)
	require.NoError(t, err)
	release = sync.OnceFunc(func() {
		require.NoError(t, tx.Rollback())
		require.NoError(t, other.Close())
	})
	t.Cleanup(release)
	return release
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(40 * time.Second); !f(); {
		if time.Now().After(end) {
			t.Fatalf("not in time: %s", what)
		}
		<-tick.C
	}
}
