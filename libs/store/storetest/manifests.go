package storetest

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/store"
)

// soon is after everything that the test has stored.
func soon() time.Time { return time.Now().Add(time.Minute) }

func manifest(jobID string, attempt int, chunks int64) store.LogManifest {
	return store.LogManifest{JobID: jobID, Attempt: attempt, Manifest: job.Manifest{Chunks: chunks, Bytes: 10 * chunks, SHA256: "abcd"}}
}

func note(t *testing.T, s store.Store, manifests ...store.LogManifest) {
	t.Helper()
	require.NoError(t, s.AppendChunks(t.Context(), nil, manifests...))
}

func unchecked(t *testing.T, s store.Store, before time.Time) []store.LogManifest {
	t.Helper()
	out, err := s.UncheckedLogs(t.Context(), before, 100)
	require.NoError(t, err)
	return out
}

// theOne returns the only manifest that has no verdict.
func theOne(t *testing.T, s store.Store) store.LogManifest {
	t.Helper()
	out := unchecked(t, s, soon())
	require.Len(t, out, 1)
	return out[0]
}

func judge(t *testing.T, s store.Store, m store.LogManifest, v busmsg.LogVerdict) bool {
	t.Helper()
	taken, err := s.JudgeLogs(t.Context(), m, v)
	require.NoError(t, err)
	return taken
}

func requireVerdict(t *testing.T, s store.Store, jobID string, attempt int, want busmsg.LogVerdict) {
	t.Helper()
	require.Equal(t, want, readLogs(t, s, busmsg.GetLogs{JobID: jobID, Attempt: attempt}).Verdict)
	bad, err := s.BadLogs(t.Context(), jobID, attempt)
	require.NoError(t, err)
	require.Equal(t, want.Bad(), bad)
}

func testManifests(t *testing.T, s store.Store) {
	jobID := id.New(id.Job, epoch)
	requireVerdict(t, s, jobID, 1, "")
	require.False(t, judge(t, s, manifest(jobID, 1, 1), busmsg.LogComplete), "nothing was noted")
	appendChunks(t, s, chunk(jobID, 1, 1, workerproto.Stdout, "0123456789", at(1)))
	require.Empty(t, unchecked(t, s, soon()), "output alone needs no check")
	require.False(t, judge(t, s, manifest(jobID, 1, 1), busmsg.LogComplete), "nothing was noted")

	begin := time.Now().Add(-time.Second)
	require.NoError(t, s.AppendChunks(t.Context(),
		[]store.LogChunk{chunk(jobID, 1, 2, workerproto.Stderr, "0123456789", at(2))}, manifest(jobID, 1, 3)))
	require.Empty(t, unchecked(t, s, begin), "it may not have settled")
	m := theOne(t, s)
	require.Equal(t, manifest(jobID, 1, 3).Manifest, m.Manifest)
	require.Equal(t, jobID, m.JobID)
	require.Equal(t, 1, m.Attempt)
	logs := readLogs(t, s, busmsg.GetLogs{JobID: jobID, Attempt: 1})
	require.EqualValues(t, 2, logs.StoredChunks, "a manifest is no chunk")
	require.EqualValues(t, 20, logs.StoredBytes)

	note(t, s, manifest(jobID, 1, 7))
	require.Equal(t, m.Manifest, theOne(t, s).Manifest, "the first one stays")

	require.True(t, judge(t, s, m, busmsg.LogIncomplete))
	requireVerdict(t, s, jobID, 1, busmsg.LogIncomplete)
	require.Empty(t, unchecked(t, s, soon()))
	require.False(t, judge(t, s, m, busmsg.LogDiffers), "somebody else was faster")
	requireVerdict(t, s, jobID, 1, busmsg.LogIncomplete)
	note(t, s, manifest(jobID, 1, 3))
	requireVerdict(t, s, jobID, 1, busmsg.LogIncomplete)
	requireVerdict(t, s, jobID, 2, "")

	// What comes late has it compared again.
	appendChunks(t, s, chunk(jobID, 1, 3, workerproto.Stdout, "0123456789", at(3)))
	requireVerdict(t, s, jobID, 1, "")
	require.Empty(t, unchecked(t, s, begin))
	require.False(t, judge(t, s, m, busmsg.LogDiffers), "the verdict is on what was there before")
	again := theOne(t, s)
	require.Equal(t, m.Manifest, again.Manifest)
	require.True(t, judge(t, s, again, busmsg.LogComplete))
	requireVerdict(t, s, jobID, 1, busmsg.LogComplete)
}

// testManifestRace: a chunk that arrives while its attempt is read for the first
// time.
func testManifestRace(t *testing.T, s store.Store) {
	jobID := id.New(id.Job, epoch)
	appendChunks(t, s, chunk(jobID, 1, 1, workerproto.Stdout, "x", at(1)))
	note(t, s, manifest(jobID, 1, 2))
	m := theOne(t, s)
	appendChunks(t, s, chunk(jobID, 1, 2, workerproto.Stdout, "x", at(2)))
	require.False(t, judge(t, s, m, busmsg.LogIncomplete))
	requireVerdict(t, s, jobID, 1, "")
	require.True(t, judge(t, s, theOne(t, s), busmsg.LogDiffers))
	requireVerdict(t, s, jobID, 1, busmsg.LogDiffers)
}

// testManifestsOrder: the oldest is returned first, also of attempts without a chunk.
func testManifestsOrder(t *testing.T, s store.Store) {
	var want []string
	for i := range 5 {
		jobID := id.New(id.Job, at(100-i))
		want = append(want, jobID)
		note(t, s, manifest(jobID, 1, 1), manifest(jobID, 2, 1))
		for stored := time.Now().UnixMilli(); time.Now().UnixMilli() == stored; {
			<-time.After(100 * time.Microsecond) // the order is by milliseconds
		}
	}
	none, err := s.UncheckedLogs(t.Context(), soon(), 0)
	require.NoError(t, err)
	require.Empty(t, none)
	var got []string
	for range 5 {
		two, err := s.UncheckedLogs(t.Context(), soon(), 2)
		require.NoError(t, err)
		require.Len(t, two, 2)
		require.Equal(t, two[0].JobID, two[1].JobID)
		require.NotEqual(t, two[0].Attempt, two[1].Attempt)
		got = append(got, two[0].JobID)
		for _, m := range two {
			require.True(t, judge(t, s, m, busmsg.LogIncomplete))
			requireVerdict(t, s, m.JobID, m.Attempt, busmsg.LogIncomplete)
		}
	}
	require.Equal(t, want, got)
	require.Empty(t, unchecked(t, s, soon()))
}

func testManifestsInvalid(t *testing.T, s store.Store) {
	jobID := id.New(id.Job, epoch)
	for name, bad := range map[string]store.LogManifest{
		"job": manifest("", 1, 1), "attempt": manifest(jobID, 0, 1), "chunks": manifest(jobID, 1, -1),
	} {
		err := s.AppendChunks(t.Context(), []store.LogChunk{chunk(jobID, 1, 1, workerproto.Stdout, "x", epoch)}, manifest(jobID, 1, 1), bad)
		require.ErrorIs(t, err, store.ErrInvalid, name)
	}
	require.Empty(t, readLogs(t, s, busmsg.GetLogs{JobID: jobID, Attempt: 1}), "nothing was written")
	require.Empty(t, unchecked(t, s, soon()))
}

// testManifestsRetention: manifests go with their jobs, and without a job once they
// are as old.
func testManifestsRetention(t *testing.T, s store.Store) {
	old := ended(t, newJob(t, 0), job.OutcomeSucceeded)
	live := newJob(t, 1)
	upsert(t, s, old, live)
	orphan := id.New(id.Job, at(2))
	for _, jobID := range []string{old.ID, live.ID, orphan} {
		note(t, s, manifest(jobID, 1, 2)) // a chunk never came
	}
	n, err := s.DeleteFinished(t.Context(), old.FinishedAt.Add(time.Second), 10)
	require.NoError(t, err)
	require.Equal(t, 1, n)
	require.Len(t, unchecked(t, s, soon()), 2)
	n, err = s.DeleteFinished(t.Context(), soon(), 10)
	require.NoError(t, err)
	require.Zero(t, n)
	require.Equal(t, live.ID, theOne(t, s).JobID)
}

// testManifestsKeyUsedAgain: a job under a key that was used before has nothing to
// do with the manifest of the other one.
func testManifestsKeyUsedAgain(t *testing.T, s store.Store) {
	old := newJob(t, 0).WithIdempotency()
	old.ID = id.Keyed("alice", "k")
	upsert(t, s, ended(t, old, job.OutcomeSucceeded))
	appendChunks(t, s, chunk(old.ID, 1, 1, workerproto.Stdout, "old output", at(1)))
	note(t, s, manifest(old.ID, 1, 5))
	require.True(t, judge(t, s, theOne(t, s), busmsg.LogIncomplete))

	// The manifest was noted after this job began: it is its own, and so is the chunk.
	again := newJob(t, 1000).WithIdempotency()
	again.ID = old.ID
	appendChunks(t, s, chunk(old.ID, 1, 2, workerproto.Stdout, "new output", at(1001)))
	require.Equal(t, 1, upsert(t, s, again).Written)
	m := theOne(t, s)
	require.EqualValues(t, 5, m.Chunks)
	require.EqualValues(t, 1, readLogs(t, s, busmsg.GetLogs{JobID: old.ID, Attempt: 1}).StoredChunks)
	require.True(t, judge(t, s, m, busmsg.LogDiffers))

	// It is older than this one.
	third := newJob(t, int(time.Since(epoch)/time.Second)+1000).WithIdempotency()
	third.ID = old.ID
	require.Equal(t, 1, upsert(t, s, third).Written)
	require.Empty(t, unchecked(t, s, soon()))
	requireVerdict(t, s, old.ID, 1, "")
	note(t, s, manifest(old.ID, 1, 9))
	require.EqualValues(t, 9, theOne(t, s).Chunks)
}
