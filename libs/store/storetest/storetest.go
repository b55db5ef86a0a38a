// Package storetest is the conformance suite of store.Store: what the services
// rely on, tested on whatever implements it.
package storetest

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/store"
)

// Deviation names what the server under an implementation cannot do, and why. The
// case is run all the same, and asks for less:
//
//   - "large batch": it has Records records;
//   - "contended batches": the job that is fought over may end in any of its versions.
type Deviation struct {
	Case    string
	Records int
	Reason  string
}

// Run tests an implementation. open returns an empty store for each call and
// closes it by t.Cleanup.
func Run(t *testing.T, open func(t *testing.T) store.Store, known ...Deviation) {
	large, anyVersion := largeBatch, false
	for _, d := range known {
		switch d.Case {
		case "large batch":
			large = d.Records
		case "contended batches":
			anyVersion = true
		default:
			t.Fatalf("nothing is known to deviate in the case %q", d.Case)
		}
		t.Logf("known deviation in %q: %s", d.Case, d.Reason)
	}
	for _, c := range []struct {
		name string
		test func(*testing.T, store.Store)
	}{
		{"upsert", testUpsert},
		{"whole record", testWholeRecord},
		{"stale writes", testStale},
		{"an end stays", testEndStays},
		{"duplicates in a batch", testDuplicates},
		{"any order of writes", testPermutations},
		{"concurrent writers", testConcurrentWriters},
		{"contended batches", func(t *testing.T, s store.Store) { testContended(t, s, anyVersion) }},
		{"poison", testPoison},
		{"large batch", func(t *testing.T, s store.Store) { testLargeBatch(t, s, large) }},
		{"key used again", testKeyUsedAgain},
		{"not found", testNotFound},
		{"list filters", testFilters},
		{"operators in strings", testOperators},
		{"list leaves out inputs", testListLean},
		{"list limits", testListLimits},
		{"list page bytes", testListBytes},
		{"cursors", testCursors},
		{"cursors under concurrent inserts", testCursorsConcurrent},
		{"statistics", testStats},
		{"terminal versions", testTerminalVersions},
		{"reset", testReset},
		{"generation", testGeneration},
		{"retention", testRetention},
		{"retention of output without a job", testRetentionOrphans},
		{"output", testLogs},
		{"output is idempotent", testLogsIdempotent},
		{"output gaps", testLogsGaps},
		{"output streams", testLogsStreams},
		{"output limits", testLogsLimits},
		{"invalid output", testLogsInvalid},
		{"manifests", testManifests},
		{"manifest and a chunk at once", testManifestRace},
		{"order of manifests", testManifestsOrder},
		{"invalid manifests", testManifestsInvalid},
		{"retention of manifests", testManifestsRetention},
		{"manifest of a key used again", testManifestsKeyUsedAgain},
		{"canceled context", testCanceled},
	} {
		t.Run(strings.ReplaceAll(c.name, " ", "_"), func(t *testing.T) {
			c.test(t, open(t))
		})
	}
}

// epoch is when the jobs of the tests were created.
var epoch = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func at(seconds int) time.Time { return epoch.Add(time.Duration(seconds) * time.Second) }

// newJob returns a queued job, created n seconds after epoch.
func newJob(t *testing.T, n int, change ...func(*job.Spec)) job.Record {
	t.Helper()
	spec := job.Spec{Command: job.Command{Shell: "true"}}
	for _, f := range change {
		f(&spec)
	}
	spec, problems := job.Normalise(spec)
	require.Empty(t, problems)
	return job.New(id.New(id.Job, at(n)), "alice", spec, at(n))
}

func apply(t *testing.T, r job.Record, ev job.Event) job.Record {
	t.Helper()
	next, err := job.Apply(r, ev, r.CreatedAt.Add(time.Second))
	require.NoError(t, err)
	return next
}

func assigned(t *testing.T, r job.Record) job.Record {
	t.Helper()
	return apply(t, r, job.Assign{WorkerID: "worker-a", LeaseID: id.New(id.Lease, r.CreatedAt)})
}

func ended(t *testing.T, r job.Record, outcome job.Outcome) job.Record {
	t.Helper()
	r = assigned(t, r)
	code := 0
	if outcome == job.OutcomeFailed {
		code = 7
	}
	return apply(t, r, job.Result{
		Fence: r.Fence(), WorkerID: r.WorkerID, Outcome: outcome, ExitCode: &code,
		StartedAt: r.CreatedAt, FinishedAt: r.CreatedAt.Add(time.Second),
		Manifest: &job.Manifest{Chunks: 1, Bytes: 6, SHA256: strings.Repeat("ab", 32)},
	})
}

func upsert(t *testing.T, s store.Store, recs ...job.Record) store.Upserted {
	t.Helper()
	up, err := s.UpsertJobs(t.Context(), recs)
	require.NoError(t, err)
	require.Equal(t, len(recs), up.Written+up.Stale+len(up.Poison), "every record is accounted for")
	return up
}

func stored(t *testing.T, s store.Store, jobID string) job.Record {
	t.Helper()
	r, err := s.Job(t.Context(), jobID)
	require.NoError(t, err)
	return r
}

func requireSame(t *testing.T, want, got job.Record) {
	t.Helper()
	require.Empty(t, cmp.Diff(want, got))
}

func list(t *testing.T, s store.Store, q busmsg.ListJobs) ([]job.Record, bool) {
	t.Helper()
	items, more, err := s.ListJobs(t.Context(), q)
	require.NoError(t, err)
	return items, more
}

func ids(recs []job.Record) []string {
	out := make([]string, len(recs))
	for i, r := range recs {
		out[i] = r.ID
	}
	return out
}

func testUpsert(t *testing.T, s store.Store) {
	up, err := s.UpsertJobs(t.Context(), nil)
	require.NoError(t, err)
	require.Zero(t, up.Written)

	r := newJob(t, 0)
	require.Equal(t, 1, upsert(t, s, r).Written)
	requireSame(t, r, stored(t, s, r.ID))

	next := ended(t, r, job.OutcomeSucceeded)
	require.Equal(t, 1, upsert(t, s, next).Written)
	requireSame(t, next, stored(t, s, r.ID))
}

func testWholeRecord(t *testing.T, s store.Store) {
	r := newJob(t, 0, func(sp *job.Spec) {
		sp.Command = job.Command{Argv: []string{"sh", "-c", "cat; echo \u00fcml\u00e4ut <&> \u2028"}}
		sp.Name, sp.Queue = "a name", "night"
		sp.Labels = map[string]string{"team": "x", "empty": ""}
		sp.Env = map[string]string{"A": "b\nc"}
		sp.Stdin = strings.Repeat("in\n", 40_000)
		sp.Files = []job.File{{Path: "a/b", Content: strings.Repeat("x", 100_000), Mode: "0600"}}
		sp.Retry = job.Retry{MaxAttempts: 5, OnExitCodes: []int{7}}
	})
	r = r.WithIdempotency()
	upsert(t, s, r)
	requireSame(t, r, stored(t, s, r.ID))
	r = ended(t, r, job.OutcomeFailed) // retrying, by its exit code
	require.Equal(t, job.Retrying, r.State)
	upsert(t, s, r)
	requireSame(t, r, stored(t, s, r.ID))
	r = apply(t, r, job.CancelRequest{})
	require.True(t, r.State.Terminal())
	upsert(t, s, r)
	requireSame(t, r, stored(t, s, r.ID))
}

func testStale(t *testing.T, s store.Store) {
	first := newJob(t, 0)
	second := assigned(t, first)
	last := ended(t, first, job.OutcomeSucceeded)
	upsert(t, s, last)
	for _, r := range []job.Record{first, second, last} {
		up := upsert(t, s, r)
		require.Equal(t, store.Upserted{Stale: 1}, up)
		requireSame(t, last, stored(t, s, first.ID))
	}
	other := newJob(t, 1)
	up := upsert(t, s, first, other, second)
	require.Equal(t, 1, up.Written, "a stale record does not keep the others out")
	require.Equal(t, 2, up.Stale)
	requireSame(t, other, stored(t, s, other.ID))
}

// testEndStays: a record that a registry went on with which had forgotten the end.
func testEndStays(t *testing.T, s store.Store) {
	first := newJob(t, 0)
	last := ended(t, first, job.OutcomeSucceeded)
	ghost := first
	for ghost.Version <= last.Version {
		ghost = assigned(t, ghost)
		ghost = apply(t, ghost, job.Return{Fence: ghost.Fence(), Outcome: job.OutcomeReturned})
	}
	otherEnd := apply(t, ghost, job.CancelRequest{})
	upsert(t, s, last)
	for _, r := range []job.Record{ghost, otherEnd} {
		require.Greater(t, r.Version, last.Version)
		require.Equal(t, store.Upserted{Stale: 1}, upsert(t, s, r))
		requireSame(t, last, stored(t, s, last.ID))
	}
	second := newJob(t, 1)
	secondEnd := ended(t, second, job.OutcomeSucceeded)
	moved := second
	for moved.Version <= secondEnd.Version {
		moved = assigned(t, moved)
		moved = apply(t, moved, job.Return{Fence: moved.Fence(), Outcome: job.OutcomeReturned})
	}
	require.Equal(t, store.Upserted{Written: 1, Stale: 1}, upsert(t, s, moved, secondEnd), "also within a batch")
	requireSame(t, secondEnd, stored(t, s, second.ID))
}

func testDuplicates(t *testing.T, s store.Store) {
	first := newJob(t, 0)
	second := assigned(t, first)
	last := ended(t, first, job.OutcomeSucceeded)
	up := upsert(t, s, second, last, first, last)
	require.Equal(t, store.Upserted{Written: 1, Stale: 3}, up)
	requireSame(t, last, stored(t, s, first.ID))
}

func testPermutations(t *testing.T, s store.Store) {
	rng := rand.New(rand.NewPCG(1, 2))
	for n := range 20 {
		r := newJob(t, n)
		versions := []job.Record{r}
		r = assigned(t, r)
		versions = append(versions, r)
		r = apply(t, r, job.Prepare{Fence: r.Fence()})
		versions = append(versions, r)
		r = apply(t, r, job.Start{Fence: r.Fence()})
		versions = append(versions, r)
		r = apply(t, r, job.CancelRequest{})
		versions = append(versions, r)
		r = apply(t, r, job.GiveUp{Fence: r.Fence()})
		versions = append(versions, r)
		versions = append(versions, versions...) // each at least twice
		rng.Shuffle(len(versions), func(i, j int) { versions[i], versions[j] = versions[j], versions[i] })
		for len(versions) > 0 {
			k := 1 + rng.IntN(len(versions))
			upsert(t, s, versions[:k]...)
			versions = versions[k:]
		}
		requireSame(t, r, stored(t, s, r.ID))
	}
}

func testConcurrentWriters(t *testing.T, s store.Store) {
	const jobs = 20
	var all [][]job.Record
	for n := range jobs {
		r := newJob(t, n)
		a := assigned(t, r)
		b := apply(t, a, job.CancelRequest{})
		all = append(all, []job.Record{r, a, b, apply(t, b, job.GiveUp{Fence: b.Fence()})})
	}
	var wg sync.WaitGroup
	errs := make([]error, 3)
	for w := range errs {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 7))
			for _, i := range rng.Perm(4 * jobs) {
				if _, err := s.UpsertJobs(t.Context(), []job.Record{all[i/4][i%4], all[(i/4+1)%jobs][i%4]}); err != nil {
					errs[w] = err
					return
				}
			}
		})
	}
	wg.Wait()
	for _, err := range errs {
		require.NoError(t, err)
	}
	for _, versions := range all {
		requireSame(t, versions[3], stored(t, s, versions[0].ID))
	}
}

// testContended: what loses a race for one job in a batch does not keep the others
// of the batch out.
func testContended(t *testing.T, s store.Store, anyVersion bool) {
	const writers, rounds, size = 4, 8, 12
	for round := range rounds {
		contested := newJob(t, round*1000)
		versions := []job.Record{contested, assigned(t, contested)}
		versions = append(versions, apply(t, versions[1], job.CancelRequest{}))
		versions = append(versions, apply(t, versions[2], job.GiveUp{Fence: versions[2].Fence()}))
		batches := make([][]job.Record, writers)
		for w := range batches {
			for i := range size {
				batches[w] = append(batches[w], newJob(t, round*1000+1+w*size+i))
			}
			batches[w][w] = versions[w]
		}
		var wg sync.WaitGroup
		ups, errs := make([]store.Upserted, writers), make([]error, writers)
		for w := range batches {
			wg.Go(func() { ups[w], errs[w] = s.UpsertJobs(t.Context(), batches[w]) })
		}
		wg.Wait()
		for w, batch := range batches {
			require.NoError(t, errs[w])
			require.Equal(t, size, ups[w].Written+ups[w].Stale)
			for i, r := range batch {
				got := stored(t, s, r.ID)
				switch {
				case i == w && anyVersion:
					r = versions[got.Version-1]
				case i == w:
					r = versions[writers-1]
				}
				requireSame(t, r, got)
			}
		}
	}
}

func testPoison(t *testing.T, s store.Store) {
	good := []job.Record{newJob(t, 0), newJob(t, 1), newJob(t, 2)}
	nan := newJob(t, 3)
	nan.Spec.Resources.CPU = math.NaN() // cannot be encoded
	far := newJob(t, 4)
	far.StateAt = time.Date(12026, 1, 1, 0, 0, 0, 0, time.UTC) // cannot be encoded either
	nameless := newJob(t, 5)
	nameless.ID = ""
	versionless := newJob(t, 6)
	versionless.Version = 0
	huge := newJob(t, 7)
	huge.Version = math.MaxUint64

	up := upsert(t, s, good[0], nan, good[1], far, nameless, versionless, huge, good[2])
	require.Equal(t, 3, up.Written)
	require.Zero(t, up.Stale)
	require.ElementsMatch(t, []string{nan.ID, far.ID, "", versionless.ID, huge.ID}, rejected(up))
	for _, p := range up.Poison {
		require.Error(t, p.Err)
	}
	for _, r := range good {
		requireSame(t, r, stored(t, s, r.ID))
	}
	_, err := s.Job(t.Context(), nan.ID)
	require.ErrorIs(t, err, store.ErrNotFound)

	up = upsert(t, s, nan)
	require.Equal(t, []string{nan.ID}, rejected(up), "also alone")
}

func rejected(up store.Upserted) []string {
	var out []string
	for _, p := range up.Poison {
		out = append(out, p.ID)
	}
	return out
}

// largeBatch is more records than any statement or page holds, and odd.
const largeBatch = 601

func testLargeBatch(t *testing.T, s store.Store, n int) {
	recs := make([]job.Record, n)
	for i := range recs {
		recs[i] = newJob(t, i)
	}
	recs[n/2].Spec.Resources.CPU = math.Inf(1)
	up := upsert(t, s, recs...)
	require.Equal(t, n-1, up.Written)
	require.Len(t, up.Poison, 1)
	for i := range recs {
		if i != n/2 {
			recs[i] = assigned(t, recs[i])
		}
	}
	require.Equal(t, n-1, upsert(t, s, recs...).Written)
	counts, err := s.Stats(t.Context())
	require.NoError(t, err)
	require.Equal(t, map[job.State]int64{job.Assigned: int64(n - 1)}, counts)
}

func testKeyUsedAgain(t *testing.T, s store.Store) {
	old := newJob(t, 0, func(sp *job.Spec) { sp.Labels = map[string]string{"run": "one"} }).WithIdempotency()
	old.ID = id.Keyed("alice", "k")
	oldEnd := ended(t, old, job.OutcomeSucceeded)
	upsert(t, s, oldEnd)
	appendChunks(t, s, chunk(old.ID, 1, 1, workerproto.Stdout, "old output", at(1)))

	again := newJob(t, 1000, func(sp *job.Spec) { sp.Labels = map[string]string{"run": "two"} }).WithIdempotency()
	again.ID = old.ID
	require.Less(t, again.Version, oldEnd.Version)
	appendChunks(t, s, chunk(old.ID, 1, 2, workerproto.Stdout, "new output", at(1001)))
	require.Equal(t, 1, upsert(t, s, again).Written)
	requireSame(t, again, stored(t, s, old.ID))
	require.Equal(t, 1, upsert(t, s, oldEnd).Stale, "a late write of the older job changes nothing")
	requireSame(t, again, stored(t, s, old.ID))

	items, _ := list(t, s, busmsg.ListJobs{Labels: map[string]string{"run": "one"}})
	require.Empty(t, items)
	items, _ = list(t, s, busmsg.ListJobs{Labels: map[string]string{"run": "two"}})
	require.Equal(t, []string{old.ID}, ids(items))
	logs := readLogs(t, s, busmsg.GetLogs{JobID: old.ID, Attempt: 1})
	require.Len(t, logs.Chunks, 1)
	require.Equal(t, "new output", string(logs.Chunks[0].Data))
	require.EqualValues(t, 1, logs.StoredChunks)
	require.EqualValues(t, len("new output"), logs.StoredBytes)
}

func testNotFound(t *testing.T, s store.Store) {
	upsert(t, s, newJob(t, 0))
	_, err := s.Job(t.Context(), id.New(id.Job, epoch))
	require.ErrorIs(t, err, store.ErrNotFound)
	_, err = s.Job(t.Context(), "")
	require.ErrorIs(t, err, store.ErrNotFound)
}

func testFilters(t *testing.T, s store.Store) {
	label := func(kv ...string) func(*job.Spec) {
		return func(sp *job.Spec) {
			sp.Labels = map[string]string{}
			for i := 0; i < len(kv); i += 2 {
				sp.Labels[kv[i]] = kv[i+1]
			}
		}
	}
	queue := func(q string) func(*job.Spec) { return func(sp *job.Spec) { sp.Queue = q } }
	recs := []job.Record{
		0: newJob(t, 0),
		1: newJob(t, 1, label("team", "a")),
		2: newJob(t, 2, label("team", "a", "env", "prod"), queue("night")),
		3: newJob(t, 3, label("team", "b", "env", "prod")),
		4: newJob(t, 4, queue("night")),
		5: newJob(t, 5),
		6: newJob(t, 6, label("team", "a\"' OR 1=1 --")),
	}
	recs[3].Owner, recs[4].Owner = "bob", "bob"
	recs[0] = ended(t, recs[0], job.OutcomeSucceeded)
	recs[1] = ended(t, recs[1], job.OutcomeFailed)
	recs[2] = assigned(t, recs[2])
	recs[4] = ended(t, recs[4], job.OutcomeSucceeded)
	upsert(t, s, recs...)
	upsert(t, s, newJob(t, -10)) // outside of every filter below but "all"

	for _, c := range []struct {
		name string
		q    busmsg.ListJobs
		want []int
	}{
		{"since", busmsg.ListJobs{Since: at(0)}, []int{6, 5, 4, 3, 2, 1, 0}},
		{"since is inclusive", busmsg.ListJobs{Since: at(5)}, []int{6, 5}},
		{"since between milliseconds", busmsg.ListJobs{Since: at(5).Add(time.Microsecond)}, []int{6}},
		{"until is exclusive", busmsg.ListJobs{Since: at(0), Until: at(2)}, []int{1, 0}},
		{"until between milliseconds", busmsg.ListJobs{Since: at(0), Until: at(2).Add(time.Microsecond)}, []int{2, 1, 0}},
		{"empty window", busmsg.ListJobs{Since: at(3), Until: at(3)}, nil},
		{"owner", busmsg.ListJobs{Owner: "bob"}, []int{4, 3}},
		{"unknown owner", busmsg.ListJobs{Owner: "bo"}, nil},
		{"state", busmsg.ListJobs{States: []job.State{job.Succeeded}}, []int{4, 0}},
		{"states", busmsg.ListJobs{States: []job.State{job.Failed, job.Succeeded, job.Assigned}}, []int{4, 2, 1, 0}},
		{"state given twice", busmsg.ListJobs{States: []job.State{job.Failed, job.Failed}}, []int{1}},
		{"reserved state", busmsg.ListJobs{States: []job.State{job.Held}}, nil},
		{"owner and state", busmsg.ListJobs{Owner: "alice", States: []job.State{job.Succeeded, job.Failed}}, []int{1, 0}},
		{"queue", busmsg.ListJobs{Queue: "night"}, []int{4, 2}},
		{"queue and state", busmsg.ListJobs{Queue: "night", States: []job.State{job.Assigned, job.Queued}}, []int{2}},
		{"queue and owner", busmsg.ListJobs{Queue: "night", Owner: "bob"}, []int{4}},
		{"default queue", busmsg.ListJobs{Queue: "default", Since: at(0)}, []int{6, 5, 3, 1, 0}},
		{"label", busmsg.ListJobs{Labels: map[string]string{"team": "a"}}, []int{2, 1}},
		{"labels", busmsg.ListJobs{Labels: map[string]string{"team": "a", "env": "prod"}}, []int{2}},
		{"label value is not a prefix", busmsg.ListJobs{Labels: map[string]string{"team": ""}}, nil},
		{"label with quotes", busmsg.ListJobs{Labels: map[string]string{"team": "a\"' OR 1=1 --"}}, []int{6}},
		{"label, owner", busmsg.ListJobs{Labels: map[string]string{"env": "prod"}, Owner: "bob"}, []int{3}},
		{"label, state", busmsg.ListJobs{Labels: map[string]string{"team": "a"}, States: []job.State{job.Failed}}, []int{1}},
		{"label, queue", busmsg.ListJobs{Labels: map[string]string{"team": "a"}, Queue: "night"}, []int{2}},
		{"label, window", busmsg.ListJobs{Labels: map[string]string{"team": "a"}, Since: at(1), Until: at(2)}, []int{1}},
		{"cursor", busmsg.ListJobs{BeforeAt: at(2), BeforeID: recs[2].ID, Since: at(0)}, []int{1, 0}},
		{"cursor after until", busmsg.ListJobs{BeforeAt: at(5), BeforeID: recs[5].ID, Until: at(2), Since: at(0)}, []int{1, 0}},
		{"cursor before until", busmsg.ListJobs{BeforeAt: at(2), BeforeID: recs[2].ID, Until: at(5), Since: at(0)}, []int{1, 0}},
		{"label, cursor", busmsg.ListJobs{Labels: map[string]string{"team": "a"}, BeforeAt: at(2), BeforeID: recs[2].ID}, []int{1}},
		{"queue, cursor", busmsg.ListJobs{Queue: "night", BeforeAt: at(4), BeforeID: recs[4].ID}, []int{2}},
	} {
		t.Run(strings.ReplaceAll(c.name, " ", "_"), func(t *testing.T) {
			items, more := list(t, s, c.q)
			require.False(t, more)
			want := []string{}
			for _, i := range c.want {
				want = append(want, recs[i].ID)
			}
			require.Equal(t, want, ids(items))
		})
	}
	items, _ := list(t, s, busmsg.ListJobs{})
	require.Len(t, items, len(recs)+1)
}

// testOperators: what users write is never a query, a path or an expression.
func testOperators(t *testing.T, s store.Store) {
	texts := []string{`{"$gt":""}`, "$where", "$$ROOT", "$owner", "a.b.c", "=", "", "^.*$", "%", "_", "' OR ''='"}
	var recs []job.Record
	for i, text := range texts {
		recs = append(recs, newJob(t, i, func(sp *job.Spec) {
			sp.Name = "$" + text
			sp.Labels = map[string]string{"a.b/c.0": text, "_id": "x"}
			sp.Env = map[string]string{"DOLLAR": "$" + text}
			sp.Stdin = "$set"
		}))
		recs[i].Owner = "$" + text
		recs[i].Spec.Labels["createdAt.$gt"] = "0" // no valid name, which is not the database's to know
	}
	upsert(t, s, recs...)
	upsert(t, s, newJob(t, 100)) // found by none of the filters
	for i, text := range texts {
		requireSame(t, recs[i], stored(t, s, recs[i].ID))
		for _, q := range []busmsg.ListJobs{
			{Owner: "$" + text},
			{Labels: map[string]string{"a.b/c.0": text}},
			{Labels: map[string]string{"a.b/c.0": text, "createdAt.$gt": "0"}, Owner: "$" + text},
		} {
			items, more := list(t, s, q)
			require.Equal(t, []string{recs[i].ID}, ids(items), "%+v", q)
			require.False(t, more)
		}
		items, _ := list(t, s, busmsg.ListJobs{Queue: "$" + text})
		require.Empty(t, items)
		_, err := s.Job(t.Context(), "$"+text)
		require.ErrorIs(t, err, store.ErrNotFound)
		require.Empty(t, readLogs(t, s, busmsg.GetLogs{JobID: "$" + text, Attempt: 1}).Chunks)
	}
	got, err := s.TerminalVersions(t.Context(), texts)
	require.NoError(t, err)
	require.Empty(t, got)
}

func testListLean(t *testing.T, s store.Store) {
	r := newJob(t, 0, func(sp *job.Spec) {
		sp.Stdin, sp.Files = "secret input", []job.File{{Path: "f", Content: "file content"}}
		sp.Labels = map[string]string{"a": "b"}
	})
	r = ended(t, r, job.OutcomeSucceeded)
	short := ended(t, newJob(t, 1), job.OutcomeSucceeded)
	idle := newJob(t, 2)
	for _, rec := range []*job.Record{&r, &short} {
		rec.Last().DurationMs = 42
	}
	upsert(t, s, r, short, idle)
	items, _ := list(t, s, busmsg.ListJobs{Limit: 10})
	require.Len(t, items, 3)
	for i, want := range []job.Record{idle, short, r} {
		if want.Last() != nil {
			want.Attempts = []job.Attempt{{Number: 1, DurationMs: 42}}
		}
		want.Spec.Files, want.Spec.Stdin = nil, ""
		requireSame(t, want, items[i])
	}
}

func testListLimits(t *testing.T, s store.Store) {
	recs := make([]job.Record, store.MaxListLimit+20)
	for i := range recs {
		recs[i] = newJob(t, i)
	}
	upsert(t, s, recs...)
	for _, c := range []struct{ limit, want int }{
		{0, store.DefaultListLimit},
		{-1, store.DefaultListLimit},
		{1, 1},
		{store.MaxListLimit, store.MaxListLimit},
		{store.MaxListLimit + 1, store.MaxListLimit},
		{math.MaxInt, store.MaxListLimit},
	} {
		items, more := list(t, s, busmsg.ListJobs{Limit: c.limit})
		require.Len(t, items, c.want, "limit %d", c.limit)
		require.True(t, more)
	}
	items, more := list(t, s, busmsg.ListJobs{Limit: 20, Until: at(20)})
	require.Len(t, items, 20)
	require.False(t, more, "an exactly full last page has nothing after it")
}

func testListBytes(t *testing.T, s store.Store) {
	const n = 30
	recs := make([]job.Record, n)
	for i := range recs {
		recs[i] = newJob(t, i, func(sp *job.Spec) {
			sp.Command.Shell = "true # " + strings.Repeat("x", 100_000)
			sp.Stdin = strings.Repeat("y", 200_000) // does not count: it is left out
		})
	}
	upsert(t, s, recs...)
	items, more := list(t, s, busmsg.ListJobs{Limit: n})
	require.True(t, more)
	require.Len(t, items, 7, "as many as fit in MaxPageBytes")
	require.Len(t, walk(t, s, busmsg.ListJobs{Limit: n}), n)
}

// walk reads all pages.
func walk(t *testing.T, s store.Store, q busmsg.ListJobs) []job.Record {
	t.Helper()
	var all []job.Record
	for {
		items, more := list(t, s, q)
		all = append(all, items...)
		if !more {
			return all
		}
		require.NotEmpty(t, items, "a page with more after it is not empty")
		last := items[len(items)-1]
		q.BeforeAt, q.BeforeID = last.CreatedAt, last.ID
	}
}

func testCursors(t *testing.T, s store.Store) {
	var recs []job.Record
	for i := range 103 {
		r := newJob(t, i/10, func(sp *job.Spec) { sp.Labels = map[string]string{"k": "v"} }) // ten in the same millisecond
		switch i % 3 {
		case 0:
			r = ended(t, r, job.OutcomeSucceeded)
		case 1:
			r = assigned(t, r)
		}
		recs = append(recs, r)
	}
	upsert(t, s, recs...)
	for _, q := range []busmsg.ListJobs{
		{Limit: 7},
		{Limit: 7, Owner: "alice"},
		{Limit: 7, Labels: map[string]string{"k": "v"}},
		{Limit: 7, States: []job.State{job.Queued, job.Succeeded, job.Assigned}},
	} {
		got := walk(t, s, q)
		require.Len(t, got, len(recs))
		seen := map[string]bool{}
		for i, r := range got {
			require.False(t, seen[r.ID], "twice")
			seen[r.ID] = true
			if i > 0 {
				before := got[i-1]
				require.True(t, before.CreatedAt.After(r.CreatedAt) || before.CreatedAt.Equal(r.CreatedAt) && before.ID > r.ID, "not in order")
			}
		}
	}
}

func testCursorsConcurrent(t *testing.T, s store.Store) {
	var before []job.Record
	for i := range 120 {
		before = append(before, newJob(t, i))
	}
	upsert(t, s, before...)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var writeErr error
	wg.Go(func() {
		// New jobs of any time, and changes to those that are there.
		for i := 0; i < 2000 && ctx.Err() == nil; i++ {
			r := before[i%len(before)]
			if _, err := s.UpsertJobs(t.Context(), []job.Record{newJob(t, (i*37)%240), assigned(t, r)}); err != nil {
				writeErr = err
				return
			}
		}
	})
	for range 2 {
		seen := map[string]int{}
		for _, r := range walk(t, s, busmsg.ListJobs{Limit: 17}) {
			seen[r.ID]++
			require.Equal(t, 1, seen[r.ID], "listed twice")
		}
		for _, r := range before {
			require.Equal(t, 1, seen[r.ID], "a job that was there before was not listed")
		}
	}
	cancel()
	wg.Wait()
	require.NoError(t, writeErr)
}

func testStats(t *testing.T, s store.Store) {
	counts, err := s.Stats(t.Context())
	require.NoError(t, err)
	require.Empty(t, counts)
	first := newJob(t, 0)
	upsert(t, s, first, newJob(t, 1), ended(t, newJob(t, 2), job.OutcomeFailed))
	counts, err = s.Stats(t.Context())
	require.NoError(t, err)
	require.Equal(t, map[job.State]int64{job.Queued: 2, job.Failed: 1}, counts)
	upsert(t, s, ended(t, first, job.OutcomeSucceeded))
	counts, err = s.Stats(t.Context())
	require.NoError(t, err)
	require.Equal(t, map[job.State]int64{job.Queued: 1, job.Failed: 1, job.Succeeded: 1}, counts)
}

func testTerminalVersions(t *testing.T, s store.Store) {
	got, err := s.TerminalVersions(t.Context(), nil)
	require.NoError(t, err)
	require.Empty(t, got)

	want := map[string]uint64{}
	var asked []string
	var recs []job.Record
	for i := range 620 {
		r := newJob(t, i)
		asked = append(asked, r.ID)
		switch i % 3 {
		case 0:
			r = ended(t, r, job.OutcomeSucceeded)
			want[r.ID] = r.Version
		case 1:
			continue // not stored
		}
		recs = append(recs, r)
	}
	upsert(t, s, recs...)
	got, err = s.TerminalVersions(t.Context(), asked)
	require.NoError(t, err)
	require.Equal(t, want, got)
}

func testReset(t *testing.T, s store.Store) {
	var live, done []job.Record
	for i := range 250 {
		r := newJob(t, i)
		if i%2 == 0 {
			r = assigned(t, r)
		}
		live = append(live, r)
	}
	for i := range 10 {
		done = append(done, ended(t, newJob(t, i), job.OutcomeFailed))
	}
	upsert(t, s, append(live, done...)...)
	now := at(9999)
	n, err := s.ResetNonTerminal(t.Context(), now)
	require.NoError(t, err)
	require.Equal(t, len(live), n)
	for _, r := range live {
		want, changed := job.Reset(r, now)
		require.True(t, changed)
		requireSame(t, want, stored(t, s, r.ID))
	}
	for _, r := range done {
		requireSame(t, r, stored(t, s, r.ID))
	}
	n, err = s.ResetNonTerminal(t.Context(), now)
	require.NoError(t, err)
	require.Zero(t, n)
}

func testGeneration(t *testing.T, s store.Store) {
	g, err := s.Generation(t.Context())
	require.NoError(t, err)
	require.Empty(t, g)
	for _, want := range []string{"generation-1", "generation-2"} {
		require.NoError(t, s.SetGeneration(t.Context(), want))
		g, err = s.Generation(t.Context())
		require.NoError(t, err)
		require.Equal(t, want, g)
	}
}

func testRetention(t *testing.T, s store.Store) {
	var recs []job.Record
	for i := range 20 {
		r := ended(t, newJob(t, i, func(sp *job.Spec) { sp.Labels = map[string]string{"k": "v"} }), job.OutcomeSucceeded)
		recs = append(recs, r)
		appendChunks(t, s, chunk(r.ID, 1, 1, workerproto.Stdout, "output", at(i)))
	}
	live := newJob(t, -1000)
	upsert(t, s, append(recs, live)...)
	cut := recs[10].FinishedAt // exclusive: 0 to 9 go
	n, err := s.DeleteFinished(t.Context(), cut, 3)
	require.NoError(t, err)
	require.Equal(t, 3, n)
	_, err = s.Job(t.Context(), recs[0].ID)
	require.ErrorIs(t, err, store.ErrNotFound, "the oldest go first")
	for n > 0 {
		n, err = s.DeleteFinished(t.Context(), cut, 3)
		require.NoError(t, err)
		require.LessOrEqual(t, n, 3)
	}
	for i, r := range recs {
		logs := readLogs(t, s, busmsg.GetLogs{JobID: r.ID, Attempt: 1})
		_, err := s.Job(t.Context(), r.ID)
		if i < 10 {
			require.ErrorIs(t, err, store.ErrNotFound)
			require.Empty(t, logs.Chunks)
			require.Zero(t, logs.StoredChunks)
		} else {
			require.NoError(t, err)
			require.Len(t, logs.Chunks, 1)
		}
	}
	requireSame(t, live, stored(t, s, live.ID))
	require.Len(t, walk(t, s, busmsg.ListJobs{Labels: map[string]string{"k": "v"}}), 10)
	counts, err := s.Stats(t.Context())
	require.NoError(t, err)
	require.Equal(t, map[job.State]int64{job.Queued: 1, job.Succeeded: 10}, counts)
}

// testRetentionOrphans: output of jobs that nobody knows goes once it is as old as
// jobs get, also behind that of many jobs that are there.
func testRetentionOrphans(t *testing.T, s store.Store) {
	var live []job.Record
	for i := range 8 {
		r := newJob(t, i)
		live = append(live, r)
		appendChunks(t, s, chunk(r.ID, 1, 1, workerproto.Stdout, "kept", at(i)))
	}
	upsert(t, s, live...)
	var orphans []string
	for i := range 3 {
		orphan := id.New(id.Job, at(100+i))
		orphans = append(orphans, orphan)
		appendChunks(t, s, chunk(orphan, 1, 1, workerproto.Stdout, "nobody's", at(i)), chunk(orphan, 2, 1, workerproto.Stdout, "nobody's", at(i)))
	}
	n, err := s.DeleteFinished(t.Context(), time.Now().Add(-time.Hour), 2) // it was stored just now
	require.NoError(t, err)
	require.Zero(t, n)
	require.Len(t, readLogs(t, s, busmsg.GetLogs{JobID: orphans[0], Attempt: 1}).Chunks, 1)
	for range 2 { // two jobs' output each time
		n, err = s.DeleteFinished(t.Context(), time.Now().Add(time.Hour), 2)
		require.NoError(t, err)
		require.Zero(t, n, "they are not jobs")
	}
	for _, orphan := range orphans {
		for _, attempt := range []int{1, 2} {
			logs := readLogs(t, s, busmsg.GetLogs{JobID: orphan, Attempt: attempt})
			require.Empty(t, logs.Chunks)
			require.Zero(t, logs.StoredChunks)
		}
	}
	for _, r := range live {
		require.Len(t, readLogs(t, s, busmsg.GetLogs{JobID: r.ID, Attempt: 1}).Chunks, 1)
	}
}

func chunk(jobID string, attempt int, seq int64, stream workerproto.Stream, data string, when time.Time) store.LogChunk {
	return store.LogChunk{JobID: jobID, Attempt: attempt, Chunk: workerproto.Chunk{
		Seq: seq, Offset: (seq - 1) * 10, Stream: stream, Time: when, Data: []byte(data),
	}}
}

func appendChunks(t *testing.T, s store.Store, chunks ...store.LogChunk) {
	t.Helper()
	require.NoError(t, s.AppendChunks(t.Context(), chunks))
}

func readLogs(t *testing.T, s store.Store, q busmsg.GetLogs) busmsg.Logs {
	t.Helper()
	logs, err := s.Logs(t.Context(), q)
	require.NoError(t, err)
	return logs
}

func seqs(l busmsg.Logs) []int64 {
	out := []int64{}
	for _, c := range l.Chunks {
		out = append(out, c.Seq)
	}
	return out
}

func testLogs(t *testing.T, s store.Store) {
	jobID := id.New(id.Job, epoch) // not stored itself
	require.Empty(t, readLogs(t, s, busmsg.GetLogs{JobID: jobID, Attempt: 1}))
	appendChunks(t, s)
	data := "bytes \x00\xff\xfe and text \u00e4"
	first := chunk(jobID, 1, 1, workerproto.Stdout, data, at(1))
	appendChunks(t, s,
		chunk(jobID, 1, 3, workerproto.System, "three", at(3)), first,
		chunk(jobID, 2, 1, workerproto.Stdout, "second attempt", at(9)),
		chunk(jobID, 1, 2, workerproto.Stderr, "two", at(2)),
		chunk(id.New(id.Job, epoch), 1, 1, workerproto.Stdout, "another job", at(9)))
	logs := readLogs(t, s, busmsg.GetLogs{JobID: jobID, Attempt: 1})
	require.Equal(t, []int64{1, 2, 3}, seqs(logs))
	require.Empty(t, cmp.Diff(first.Chunk, logs.Chunks[0]))
	require.False(t, logs.More)
	require.EqualValues(t, 3, logs.StoredChunks)
	require.EqualValues(t, len(data)+len("two")+len("three"), logs.StoredBytes)
	logs = readLogs(t, s, busmsg.GetLogs{JobID: jobID, Attempt: 2})
	require.Equal(t, []int64{1}, seqs(logs))
	require.EqualValues(t, 1, logs.StoredChunks)
}

func testLogsIdempotent(t *testing.T, s store.Store) {
	jobID := id.New(id.Job, epoch)
	var all []store.LogChunk
	for i := range int64(20) {
		all = append(all, chunk(jobID, 1, i+1, workerproto.Stdout, "0123456789", at(int(i))))
	}
	appendChunks(t, s, all[:12]...)
	var wg sync.WaitGroup
	errs := make([]error, 4)
	for w := range errs {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 1))
			for _, i := range rng.Perm(len(all)) {
				other := all[i]
				other.Data = []byte("other data of the same seq")
				if i >= 12 {
					other = all[i]
				}
				if err := s.AppendChunks(t.Context(), []store.LogChunk{other, all[i], all[19-i]}); err != nil {
					errs[w] = err
				}
			}
		})
	}
	wg.Wait()
	for _, err := range errs {
		require.NoError(t, err)
	}
	logs := readLogs(t, s, busmsg.GetLogs{JobID: jobID, Attempt: 1})
	require.Len(t, logs.Chunks, 20)
	require.EqualValues(t, 20, logs.StoredChunks, "each is counted once")
	require.EqualValues(t, 200, logs.StoredBytes)
	for i, c := range logs.Chunks {
		require.Empty(t, cmp.Diff(all[i].Chunk, c), "the first one stays")
	}
}

func testLogsGaps(t *testing.T, s store.Store) {
	jobID := id.New(id.Job, epoch)
	appendChunks(t, s, chunk(jobID, 1, 2, workerproto.Stdout, "b", epoch), chunk(jobID, 1, 900, workerproto.Stdout, "z", epoch))
	logs := readLogs(t, s, busmsg.GetLogs{JobID: jobID, Attempt: 1})
	require.Equal(t, []int64{2, 900}, seqs(logs))
	require.EqualValues(t, 2, logs.StoredChunks)
	appendChunks(t, s, chunk(jobID, 1, 1, workerproto.Stdout, "a", epoch))
	logs = readLogs(t, s, busmsg.GetLogs{JobID: jobID, Attempt: 1, Limit: 2})
	require.Equal(t, []int64{1, 2}, seqs(logs))
	require.True(t, logs.More)
	logs = readLogs(t, s, busmsg.GetLogs{JobID: jobID, Attempt: 1, After: 2})
	require.Equal(t, []int64{900}, seqs(logs))
	require.False(t, logs.More)
	require.EqualValues(t, 3, logs.StoredChunks, "of the attempt, not of the page")
}

func testLogsStreams(t *testing.T, s store.Store) {
	jobID := id.New(id.Job, epoch)
	streams := []workerproto.Stream{workerproto.Stdout, workerproto.Stderr, workerproto.System}
	for i := range int64(30) {
		appendChunks(t, s, chunk(jobID, 1, i+1, streams[i%3], "x", epoch))
	}
	logs := readLogs(t, s, busmsg.GetLogs{JobID: jobID, Attempt: 1, Stream: workerproto.Stderr, Limit: 4})
	require.Equal(t, []int64{2, 5, 8, 11}, seqs(logs))
	require.True(t, logs.More)
	require.EqualValues(t, 30, logs.StoredChunks, "of all streams")
	logs = readLogs(t, s, busmsg.GetLogs{JobID: jobID, Attempt: 1, Stream: workerproto.Stderr, After: 11, Limit: 6})
	require.Equal(t, []int64{14, 17, 20, 23, 26, 29}, seqs(logs))
	require.False(t, logs.More)
}

func testLogsLimits(t *testing.T, s store.Store) {
	jobID := id.New(id.Job, epoch)
	big := string(bytes.Repeat([]byte{0xfe}, workerproto.MaxChunkBytes))
	for i := range int64(30) {
		appendChunks(t, s, chunk(jobID, 1, i+1, workerproto.Stdout, big, epoch))
	}
	for _, c := range []struct{ maxBytes, want int }{
		{1, 1}, // at least one
		{workerproto.MaxChunkBytes, 1},
		{2*workerproto.MaxChunkBytes - 1, 1},
		{2 * workerproto.MaxChunkBytes, 2},
		{0, 8},             // as base64 in MaxPageBytes
		{math.MaxInt32, 8}, // never more than that
	} {
		logs := readLogs(t, s, busmsg.GetLogs{JobID: jobID, Attempt: 1, MaxBytes: c.maxBytes})
		require.Len(t, logs.Chunks, c.want, "maxBytes %d", c.maxBytes)
		require.True(t, logs.More)
	}
	var after int64
	total := 0
	for {
		logs := readLogs(t, s, busmsg.GetLogs{JobID: jobID, Attempt: 1, After: after, MaxBytes: 200_000})
		for _, c := range logs.Chunks {
			require.Equal(t, after+1, c.Seq)
			after = c.Seq
			total += len(c.Data)
		}
		if !logs.More {
			break
		}
	}
	require.Equal(t, 30*workerproto.MaxChunkBytes, total)

	small := id.New(id.Job, epoch)
	var many []store.LogChunk
	for i := range int64(store.MaxLogLimit + 100) {
		many = append(many, chunk(small, 1, i+1, workerproto.Stdout, "x", epoch))
	}
	appendChunks(t, s, many...)
	require.Len(t, readLogs(t, s, busmsg.GetLogs{JobID: small, Attempt: 1}).Chunks, store.DefaultLogLimit)
	require.Len(t, readLogs(t, s, busmsg.GetLogs{JobID: small, Attempt: 1, Limit: math.MaxInt}).Chunks, store.MaxLogLimit)
}

func testLogsInvalid(t *testing.T, s store.Store) {
	jobID := id.New(id.Job, epoch)
	good := chunk(jobID, 1, 1, workerproto.Stdout, "x", epoch)
	for name, bad := range map[string]store.LogChunk{
		"job":     chunk("", 1, 1, workerproto.Stdout, "x", epoch),
		"attempt": chunk(jobID, 0, 1, workerproto.Stdout, "x", epoch),
		"seq":     chunk(jobID, 1, 0, workerproto.Stdout, "x", epoch),
		"stream":  chunk(jobID, 1, 1, "stdfoo", "x", epoch),
		"empty":   chunk(jobID, 1, 1, workerproto.Stdout, "", epoch),
	} {
		err := s.AppendChunks(t.Context(), []store.LogChunk{good, bad})
		require.ErrorIs(t, err, store.ErrInvalid, name)
	}
	require.Empty(t, readLogs(t, s, busmsg.GetLogs{JobID: jobID, Attempt: 1}), "nothing was written")
}

func testCanceled(t *testing.T, s store.Store) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	r := newJob(t, 0)
	_, err := s.UpsertJobs(ctx, []job.Record{r})
	require.Error(t, err)
	require.NotErrorIs(t, err, store.ErrInvalid)
	_, err = s.Job(ctx, r.ID)
	require.Error(t, err)
	require.NotErrorIs(t, err, store.ErrNotFound, "a database that cannot be asked is not an answer")
	_, _, err = s.ListJobs(ctx, busmsg.ListJobs{})
	require.Error(t, err)
	require.Error(t, s.AppendChunks(ctx, []store.LogChunk{chunk(r.ID, 1, 1, workerproto.Stdout, "x", epoch)}))

	require.NoError(t, s.Ping(t.Context()), "the store works on")
	require.Equal(t, 1, upsert(t, s, r).Written)
	requireSame(t, r, stored(t, s, r.ID))
}

// Example values for benchmarks of implementations.

// FinishedJob returns a job that ran `true`, created i milliseconds after a fixed time.
func FinishedJob(i int) (job.Record, error) {
	now := epoch.Add(time.Duration(i) * time.Millisecond)
	spec, problems := job.Normalise(job.Spec{Command: job.Command{Shell: "true"}})
	if len(problems) > 0 {
		return job.Record{}, fmt.Errorf("normalise: %w", problems[0])
	}
	r := job.New(id.New(id.Job, now), "local", spec, now)
	r, err := job.Apply(r, job.Assign{WorkerID: "worker-01kp8s6q9v7h3m5d2c4x6z8b0n", LeaseID: id.New(id.Lease, now)}, now.Add(3*time.Millisecond))
	if err != nil {
		return r, err
	}
	zero := 0
	return job.Apply(r, job.Result{
		Fence: r.Fence(), WorkerID: r.WorkerID, Outcome: job.OutcomeSucceeded, ExitCode: &zero,
		AcceptedAt: now.Add(5 * time.Millisecond), PreparedAt: now.Add(6 * time.Millisecond), StartedAt: now.Add(7 * time.Millisecond),
		FinishedAt: now.Add(12 * time.Millisecond), CPUMs: 1, PeakMemoryMB: 1,
		Manifest: &job.Manifest{SHA256: "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
	}, now.Add(13*time.Millisecond))
}
