package sqlitestore

import (
	"context"
	"database/sql"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/store"
	"github.com/cmdexec/cmdexec/libs/store/storetest"
)

func openAt(t testing.TB, path string) *Store {
	t.Helper()
	s, err := Open(t.Context(), path)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	return s
}

func openNew(t testing.TB) *Store { return openAt(t, filepath.Join(t.TempDir(), "jobs.db")) }

func TestConformance(t *testing.T) {
	storetest.Run(t, func(t *testing.T) store.Store { return openNew(t) })
}

func finished(t testing.TB, n int) []job.Record {
	t.Helper()
	recs := make([]job.Record, n)
	for i := range recs {
		r, err := storetest.FinishedJob(i)
		require.NoError(t, err)
		recs[i] = r
	}
	return recs
}

func TestOpenMakesFolderAndKeepsData(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a b?c%20#d", "x", "jobs.db")
	recs := finished(t, 3)
	s, err := Open(t.Context(), path)
	require.NoError(t, err)
	_, err = s.UpsertJobs(t.Context(), recs)
	require.NoError(t, err)
	require.NoError(t, s.Close())
	info, err := os.Stat(path)
	require.NoError(t, err, "the file is where it was asked for")
	require.Equal(t, os.FileMode(0o600), info.Mode().Perm())
	entries, err := os.ReadDir(filepath.Dir(path))
	require.NoError(t, err)
	require.Len(t, entries, 1, "nothing is left beside a closed database")

	s = openAt(t, path)
	got, err := s.Job(t.Context(), recs[1].ID)
	require.NoError(t, err)
	require.Equal(t, recs[1], got)
}

func TestOpenSettings(t *testing.T) {
	s := openNew(t)
	for pragma, want := range map[string]string{"journal_mode": "wal", "synchronous": "2", "busy_timeout": "5000"} {
		var got string
		require.NoError(t, s.write.QueryRow("PRAGMA "+pragma).Scan(&got))
		require.Equal(t, want, got, pragma)
	}
	var timeout string
	require.NoError(t, s.read.QueryRow("PRAGMA busy_timeout").Scan(&timeout))
	require.Equal(t, "5000", timeout)
	_, err := s.read.Exec("DELETE FROM jobs")
	require.Error(t, err, "a reader cannot write")
}

// TestOpenedByManyAtOnce: services that share a file start together, also on a new one.
func TestOpenedByManyAtOnce(t *testing.T) {
	for range 20 {
		path := filepath.Join(t.TempDir(), "jobs.db")
		var together sync.WaitGroup
		for range 6 {
			together.Go(func() {
				s, err := Open(t.Context(), path)
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
}

func TestOpenErrors(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	require.NoError(t, os.WriteFile(file, []byte(strings.Repeat("not a database ", 500)), 0o600))
	newer := filepath.Join(dir, "newer.db")
	s := openAt(t, newer)
	_, err := s.write.Exec("PRAGMA user_version = 99")
	require.NoError(t, err)
	cases := map[string]struct{ path, says string }{
		"folder below a file": {filepath.Join(file, "sub", "jobs.db"), "not a directory"},
		"a folder":            {dir, "is a directory"},
		"other content":       {file, "not a database"},
		"newer schema":        {newer, "newer version"},
	}
	if os.Geteuid() != 0 {
		closed := filepath.Join(dir, "closed")
		require.NoError(t, os.Mkdir(closed, 0o500))
		cases["unwritable folder"] = struct{ path, says string }{filepath.Join(closed, "jobs.db"), "permission denied"}
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			_, err := Open(t.Context(), c.path)
			require.ErrorContains(t, err, c.says)
			require.ErrorContains(t, err, c.path)
			require.NotContains(t, err.Error(), "\n", "one line")
			require.Equal(t, 1, strings.Count(err.Error(), c.path), "the path is said once: %s", err)
		})
	}
}

// plan returns how SQLite runs a query.
func plan(t *testing.T, s *Store, query string, args []any) string {
	t.Helper()
	rows, err := s.read.Query("EXPLAIN QUERY PLAN "+query, args...)
	require.NoError(t, err)
	defer rows.Close()
	var out []string
	for rows.Next() {
		var a, b, c int
		var detail string
		require.NoError(t, rows.Scan(&a, &b, &c, &detail))
		out = append(out, detail)
	}
	require.NoError(t, rows.Err())
	return strings.Join(out, "\n")
}

// TestListPlans: no list reads or sorts more than a page of any part.
func TestListPlans(t *testing.T) {
	s := openNew(t)
	for name, c := range map[string]struct {
		q     busmsg.ListJobs
		index string
		sorts int // of parts that are limited, for the merge
	}{
		"all":       {busmsg.ListJobs{}, "jobs_state (state=?", len(job.States())},
		"owner":     {busmsg.ListJobs{Owner: "a"}, "jobs_owner (owner=? AND state=?", len(job.States())},
		"states":    {busmsg.ListJobs{States: []job.State{job.Failed, job.Queued}, Owner: "a"}, "jobs_owner (owner=? AND state=?", 2},
		"state":     {busmsg.ListJobs{States: []job.State{job.Failed}}, "jobs_state (state=?", 1},
		"queue":     {busmsg.ListJobs{Queue: "night"}, "jobs_queue (queue=?", 0},
		"label":     {busmsg.ListJobs{Labels: map[string]string{"a": "b", "c": "d"}}, "PRIMARY KEY (key=? AND value=?", 0},
		"own label": {busmsg.ListJobs{Labels: map[string]string{"a": "b", "c": "d"}, Owner: "a"}, "PRIMARY KEY (owner=? AND key=? AND value=?", 0},
		"own queue": {busmsg.ListJobs{Queue: "night", Owner: "a"}, "jobs_owner_queue (owner=? AND queue=?", 0},
	} {
		for _, paged := range []bool{false, true} {
			want := c.index
			if paged {
				c.q.BeforeAt, c.q.BeforeID = time.Now(), "job-x"
				want += " AND (created_at,id)<(?,?)"
			}
			by := lead{}
			if len(c.q.Labels) > 0 {
				by.label = "a"
			}
			query, args := pageQuery(c.q, by, 50)
			p := plan(t, s, query, args)
			require.Contains(t, p, want, name)
			require.NotContains(t, p, "SCAN jobs", name)
			require.NotContains(t, p, "SCAN labels", name)
			require.LessOrEqual(t, strings.Count(p, "USE TEMP B-TREE"), c.sorts, "%s: %s", name, p)
		}
	}
	// The parts themselves come in order from their index.
	for _, part := range []string{
		"SELECT rowid, created_at, id FROM jobs INDEXED BY jobs_owner WHERE owner = ? AND state = ? ORDER BY created_at DESC, id DESC LIMIT 5",
		"SELECT rowid, created_at, id FROM jobs INDEXED BY jobs_state WHERE state = ? ORDER BY created_at DESC, id DESC LIMIT 5",
	} {
		require.NotContains(t, plan(t, s, part, []any{"a", "b"}[:strings.Count(part, "?")]), "TEMP B-TREE")
	}
	require.Contains(t, plan(t, s, getLogsSQL, []any{"j", 1, 0, "", 10}), "(job_id=? AND attempt=? AND seq>?)")
}

// TestListIsTheSameAlongEveryIndex: what a list with labels is read along decides
// how long it takes and nothing else.
func TestListIsTheSameAlongEveryIndex(t *testing.T) {
	s := openNew(t)
	recs := finished(t, 60)
	for i := range recs {
		recs[i].Spec.Labels = map[string]string{"three": fmt.Sprint(i % 3), "four": fmt.Sprint(i % 4)}
		if i%5 == 0 {
			recs[i].Owner = "other"
		}
		if i%2 == 0 {
			recs[i] = job.New(recs[i].ID, recs[i].Owner, recs[i].Spec, recs[i].CreatedAt)
		}
	}
	_, err := s.UpsertJobs(t.Context(), recs)
	require.NoError(t, err)
	for _, owner := range []string{"", "local", "other", "nobody"} {
		for _, states := range [][]job.State{nil, {job.Queued}, {job.Queued, job.Succeeded}} {
			q := busmsg.ListJobs{Owner: owner, States: states, Labels: map[string]string{"three": "1", "four": "2"}, BeforeAt: recs[50].CreatedAt}
			want := []string{}
			for i := 49; i >= 0; i-- {
				if i%12 == 10 && (owner == "" || recs[i].Owner == owner) && (states == nil || slices.Contains(states, recs[i].State)) {
					want = append(want, recs[i].ID)
				}
			}
			for _, by := range []lead{{"three"}, {"four"}, {}} {
				query, args := pageQuery(q, by, 50)
				got := []string{}
				require.NoError(t, s.each(t.Context(), "list", query, args, func(rows *sql.Rows) error {
					var rowid, at int64
					var jobID string
					err := rows.Scan(&rowid, &at, &jobID)
					got = append(got, jobID)
					return err
				}))
				require.Equal(t, want, got, "%+v along %+v", q, by)
			}
		}
	}
}

// TestShortest: a list with labels is read along what has the fewest entries.
func TestShortest(t *testing.T) {
	s := openNew(t)
	recs := finished(t, 40)
	for i := range recs {
		recs[i].Spec.Labels = map[string]string{"all": "x", "few": fmt.Sprint(i % 10)}
		if i == 0 {
			recs[i] = job.New(recs[i].ID, recs[i].Owner, recs[i].Spec, recs[i].CreatedAt)
		}
	}
	_, err := s.UpsertJobs(t.Context(), recs)
	require.NoError(t, err)
	tx, err := s.read.BeginTx(t.Context(), nil)
	require.NoError(t, err)
	defer func() { require.NoError(t, tx.Rollback()) }()
	labels := map[string]string{"all": "x", "few": "0"}
	for _, owner := range []string{"", "local"} {
		got, err := shortest(t.Context(), tx, busmsg.ListJobs{Owner: owner, Labels: labels})
		require.NoError(t, err)
		require.Equal(t, lead{"few"}, got)
		got, err = shortest(t.Context(), tx, busmsg.ListJobs{Owner: owner, Labels: labels, States: []job.State{job.Queued}})
		require.NoError(t, err)
		require.Equal(t, lead{}, got, "one job is queued")
		got, err = shortest(t.Context(), tx, busmsg.ListJobs{Owner: owner, Labels: labels, States: []job.State{job.Succeeded}})
		require.NoError(t, err)
		require.Equal(t, lead{"few"}, got)
	}
}

// TestLabelsOfAnOlderSchemaAreFoundByOwner: a database of version 2 has no labels
// by owner until it is opened.
func TestLabelsOfAnOlderSchemaAreFoundByOwner(t *testing.T) {
	path := filepath.Join(t.TempDir(), "jobs.db")
	s, err := Open(t.Context(), path)
	require.NoError(t, err)
	recs := finished(t, 3)
	recs[1].Spec.Labels = map[string]string{"team": "a"}
	_, err = s.UpsertJobs(t.Context(), recs)
	require.NoError(t, err)
	_, err = s.write.Exec("DROP TABLE owner_labels; DROP INDEX jobs_owner_queue; PRAGMA user_version = 2")
	require.NoError(t, err)
	require.NoError(t, s.Close())

	s = openAt(t, path)
	items, _, err := s.ListJobs(t.Context(), busmsg.ListJobs{Owner: recs[1].Owner, Labels: map[string]string{"team": "a"}})
	require.NoError(t, err)
	require.Len(t, items, 1)
	require.Equal(t, recs[1].ID, items[0].ID)
}

func TestDiskPerFinishedJob(t *testing.T) {
	path := filepath.Join(t.TempDir(), "jobs.db")
	s, err := Open(t.Context(), path)
	require.NoError(t, err)
	const n = 1000
	recs := finished(t, n)
	queued := make([]job.Record, n)
	for i, r := range recs { // as it happens: first queued, then ended
		queued[i] = job.New(r.ID, r.Owner, r.Spec, r.CreatedAt)
	}
	for i := 0; i < n; i += 50 {
		_, err := s.UpsertJobs(t.Context(), queued[i:i+50])
		require.NoError(t, err)
	}
	for i := 0; i < n; i += 250 {
		_, err := s.UpsertJobs(t.Context(), recs[i:i+250])
		require.NoError(t, err)
	}
	require.NoError(t, s.Close())
	info, err := os.Stat(path)
	require.NoError(t, err)
	t.Logf("%d bytes a job", info.Size()/n)
	require.Less(t, info.Size()/n, int64(1024))
}

// TestLockedByAnother: another process that holds the file makes writes fail
// after a wait, not reads, and nothing is half written.
func TestLockedByAnother(t *testing.T) {
	path := filepath.Join(t.TempDir(), "jobs.db")
	s := openAt(t, path)
	recs := finished(t, 2)
	_, err := s.UpsertJobs(t.Context(), recs[:1])
	require.NoError(t, err)

	other, err := connect(path, "exclusive")
	require.NoError(t, err)
	defer other.Close()
	tx, err := other.BeginTx(t.Context(), nil)
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err = s.UpsertJobs(ctx, recs)
	require.Error(t, err)
	require.NotErrorIs(t, err, store.ErrInvalid)
	_, err = s.Job(t.Context(), recs[0].ID)
	require.NoError(t, err, "readers are not blocked")

	done := make(chan error, 1)
	go func() {
		_, err := s.UpsertJobs(t.Context(), recs)
		done <- err
	}()
	select {
	case err := <-done:
		t.Fatalf("wrote into a locked file: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	require.NoError(t, tx.Rollback())
	require.NoError(t, <-done, "the writer waits for the lock")
	_, err = s.Job(t.Context(), recs[1].ID)
	require.NoError(t, err)
}

func TestConstraintRejectsOneRow(t *testing.T) {
	s := openNew(t)
	_, err := s.write.Exec("CREATE TRIGGER no_seven BEFORE INSERT ON jobs WHEN NEW.owner = 'seven' BEGIN SELECT RAISE(ABORT, 'no sevens'); END")
	require.NoError(t, err)
	recs := finished(t, 40)
	recs[7].Owner, recs[39].Owner = "seven", "seven"
	up, err := s.UpsertJobs(t.Context(), recs)
	require.NoError(t, err)
	require.Equal(t, 38, up.Written)
	require.Len(t, up.Poison, 2)
	require.Equal(t, recs[7].ID, up.Poison[0].ID)
}

func TestOrphanedOutputIsDeletedInTime(t *testing.T) {
	s := openNew(t)
	jobID := id.New(id.Job, time.Now())
	require.NoError(t, s.AppendChunks(t.Context(), []store.LogChunk{{JobID: jobID, Attempt: 1, Chunk: workerproto.Chunk{
		Seq: 1, Stream: workerproto.Stdout, Time: time.Now(), Data: []byte("x"),
	}}}))
	stored := func() int64 {
		l, err := s.Logs(t.Context(), busmsg.GetLogs{JobID: jobID, Attempt: 1})
		require.NoError(t, err)
		return l.StoredChunks
	}
	_, err := s.DeleteFinished(t.Context(), time.Now().Add(-time.Hour), 10)
	require.NoError(t, err)
	require.EqualValues(t, 1, stored())
	_, err = s.DeleteFinished(t.Context(), time.Now().Add(time.Hour), 10)
	require.NoError(t, err)
	require.Zero(t, stored())
}

func BenchmarkUpsert500(b *testing.B) {
	for _, what := range []string{"finished", "queued then finished"} {
		b.Run(what, func(b *testing.B) {
			s := openNew(b)
			rows := 0
			i := 0
			for b.Loop() {
				b.StopTimer()
				recs := make([]job.Record, 500)
				queued := make([]job.Record, 500)
				for j := range recs {
					recs[j], _ = storetest.FinishedJob(i)
					queued[j] = job.New(recs[j].ID, recs[j].Owner, recs[j].Spec, recs[j].CreatedAt)
					i++
				}
				b.StartTimer()
				if what != "finished" {
					if _, err := s.UpsertJobs(b.Context(), queued); err != nil {
						b.Fatal(err)
					}
					rows += len(recs)
				}
				up, err := s.UpsertJobs(b.Context(), recs)
				if err != nil || up.Written != len(recs) {
					b.Fatal(up, err)
				}
				rows += len(recs)
			}
			b.ReportMetric(float64(rows)/b.Elapsed().Seconds(), "rows/s")
		})
	}
}

func BenchmarkAppendChunks(b *testing.B) {
	for _, size := range []int{64, 8 << 10} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			s := openNew(b)
			now := time.Now()
			data := make([]byte, size)
			n := 0
			for b.Loop() {
				chunks := make([]store.LogChunk, 256)
				for i := range chunks {
					chunks[i] = store.LogChunk{JobID: id.New(id.Job, now), Attempt: 1, Chunk: workerproto.Chunk{Seq: 1, Stream: workerproto.Stdout, Time: now, Data: data}}
				}
				if err := s.AppendChunks(b.Context(), chunks); err != nil {
					b.Fatal(err)
				}
				n += len(chunks)
			}
			b.ReportMetric(float64(n)/b.Elapsed().Seconds(), "chunks/s")
		})
	}
}

func BenchmarkList(b *testing.B) {
	s := openNew(b)
	recs := finished(b, 20_000)
	for i := 0; i < len(recs); i += 1000 {
		if _, err := s.UpsertJobs(b.Context(), recs[i:i+1000]); err != nil {
			b.Fatal(err)
		}
	}
	for b.Loop() {
		items, _, err := s.ListJobs(b.Context(), busmsg.ListJobs{Owner: "local", Limit: 50})
		if err != nil || len(items) != 50 {
			b.Fatal(err)
		}
	}
}
