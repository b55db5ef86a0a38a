// Package store runs the conformance suite over databases that a library's own
// tests do not have: files shared by processes, and servers.
package store

import (
	"context"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/store"
	"github.com/cmdexec/cmdexec/libs/store/sqlitestore"
	"github.com/cmdexec/cmdexec/libs/store/storetest"
)

// shared is one file opened twice, as persister and collector do that run apart
// on one host: jobs are written by one and output by the other, and each reads
// what the other wrote.
type shared struct {
	*sqlitestore.Store                    // the persister's
	other              *sqlitestore.Store // the collector's
}

func (s shared) AppendChunks(ctx context.Context, chunks []store.LogChunk, manifests ...store.LogManifest) error {
	return s.other.AppendChunks(ctx, chunks, manifests...)
}

func (s shared) UncheckedLogs(ctx context.Context, before time.Time, limit int) ([]store.LogManifest, error) {
	return s.other.UncheckedLogs(ctx, before, limit)
}

func (s shared) JudgeLogs(ctx context.Context, m store.LogManifest, v busmsg.LogVerdict) (bool, error) {
	return s.other.JudgeLogs(ctx, m, v)
}

func (s shared) Job(ctx context.Context, id string) (job.Record, error) { return s.other.Job(ctx, id) }

func (s shared) ListJobs(ctx context.Context, q busmsg.ListJobs) ([]job.Record, bool, error) {
	return s.other.ListJobs(ctx, q)
}

func (s shared) Generation(ctx context.Context) (string, error) { return s.other.Generation(ctx) }

func TestSQLiteSharedByTwoServices(t *testing.T) {
	storetest.Run(t, func(t *testing.T) store.Store {
		path := filepath.Join(t.TempDir(), "jobs.db")
		open := func() *sqlitestore.Store {
			s, err := sqlitestore.Open(t.Context(), path)
			require.NoError(t, err)
			t.Cleanup(func() { require.NoError(t, s.Close()) })
			return s
		}
		return shared{open(), open()}
	})
}
