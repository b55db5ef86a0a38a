package purge

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/core/job"
)

// start is the beginning of a group: 32,768 ms whose ids share seven characters.
var start = time.UnixMilli(1_700_000_000_000 >> 15 << 15).UTC()

const cheapScan = time.Millisecond

func keys(n int, created, due time.Time) []Key {
	out := make([]Key, n)
	for i := range out {
		out[i] = Key{JobID: id.New(id.Job, created), Revision: uint64(i + 1), Due: due}
	}
	return out
}

func TestKeyOf(t *testing.T) {
	graces := Graces{Plain: 5 * time.Second, Keyed: 10 * time.Minute}
	now := start
	r := job.Record{ID: "job-x", FinishedAt: now.Add(-2 * time.Second)}
	require.Equal(t, now.Add(3*time.Second), graces.KeyOf(&r, 7, now).Due)
	r.Keyed = true
	require.Equal(t, now.Add(10*time.Minute-2*time.Second), graces.KeyOf(&r, 7, now).Due)
	r.FinishedAt = now.Add(time.Hour) // another host's clock
	require.Equal(t, now.Add(graces.Keyed), graces.KeyOf(&r, 7, now).Due)
}

func TestFewGoOneByOneAfterTheirGrace(t *testing.T) {
	var tr Tracker
	due := start.Add(5 * time.Second)
	tr.Note(keys(few-1, start, due)...)
	require.Empty(t, tr.Plan(due.Add(-1), cheapScan).Singles)
	p := tr.Plan(due, cheapScan)
	require.Len(t, p.Singles, few-1, "without waiting for the end of the group's time")
	require.Nil(t, p.Groups)
	tr.Forget(p.Singles...)
	require.Zero(t, tr.Len())
}

func TestManyWaitForTheirGroup(t *testing.T) {
	var tr Tracker
	due := start.Add(5 * time.Second)
	tr.Note(keys(100, start, due)...)
	end := start.Add(32_768 * time.Millisecond)
	p := tr.Plan(end.Add(-1), cheapScan)
	require.Empty(t, p.Singles)
	require.Nil(t, p.Groups)
	p = tr.Plan(end, cheapScan)
	require.Empty(t, p.Singles)
	require.Len(t, p.Groups, 1)
	require.Len(t, p.Groups[id.Group(id.New(id.Job, start))], 100)
}

func TestScanThatCostsMoreThanItSaves(t *testing.T) {
	var tr Tracker
	due := start.Add(40 * time.Second) // the group's time is over
	tr.Note(keys(1000, start, due)...) // one by one: 200 ms
	p := tr.Plan(due, 100*time.Millisecond)
	require.Nil(t, p.Groups, "waits for more")
	require.Empty(t, p.Singles)
	p = tr.Plan(due.Add(gather), 100*time.Millisecond)
	require.Len(t, p.Groups, 1, "no longer than that")
	p = tr.Plan(due.Add(gather), time.Second)
	require.Nil(t, p.Groups, "a scan would cost more")
	require.Len(t, p.Singles, 1000)
	tr.Note(keys(most, start, due)...)
	p = tr.Plan(due.Add(gather), time.Hour)
	require.Len(t, p.Singles, most, "bounded")
}

func TestKeyedAndAloneGoOneByOne(t *testing.T) {
	var tr Tracker
	due := start.Add(time.Minute)
	all := keys(200, start, due)
	for i := range all[:50] {
		all[i].Keyed = true
	}
	tr.Note(all...)
	tr.Alone(all[50:100]...)
	p := tr.Plan(due, cheapScan)
	require.Len(t, p.Singles, 100)
	require.Len(t, p.Groups[id.Group(all[199].JobID)], 100)
}

func TestNewestRevisionCounts(t *testing.T) {
	var tr Tracker
	old := Key{JobID: id.New(id.Job, start), Revision: 5, Due: start}
	again := Key{JobID: old.JobID, Revision: 9, Due: start.Add(time.Hour)}
	tr.Note(again)
	tr.Note(old)
	require.True(t, tr.Has(old.JobID, 9))
	require.False(t, tr.Has(old.JobID, 10))
	require.Empty(t, tr.Plan(start, cheapScan).Singles)
	tr.Forget(old)
	require.Equal(t, 1, tr.Len(), "what came since stays")
	tr.Forget(again)
	require.Zero(t, tr.Len())
	tr.Note(old)
	tr.Clear()
	require.Zero(t, tr.Len())
}

func TestBound(t *testing.T) {
	for _, c := range []struct {
		stay, mayGo []uint64
		want        uint64
	}{
		{nil, nil, 0},
		{nil, []uint64{3, 9, 4}, 9},
		{[]uint64{5}, []uint64{3, 9, 4}, 4},
		{[]uint64{2}, []uint64{3, 9}, 0},
		{[]uint64{7}, nil, 0},
	} {
		require.Equal(t, c.want, Bound(c.stay, c.mayGo), fmt.Sprint(c))
	}
}

func TestBoundNeverTouchesWhatStays(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		revisions := rapid.SliceOfDistinct(rapid.Uint64Range(1, 1000), rapid.ID[uint64]).Draw(t, "revisions")
		cut := rapid.IntRange(0, len(revisions)).Draw(t, "cut")
		stay, mayGo := revisions[:cut], revisions[cut:]
		upTo := Bound(stay, mayGo)
		for _, r := range stay {
			if r <= upTo {
				t.Fatalf("%d stays and is purged up to %d", r, upTo)
			}
		}
	})
}
