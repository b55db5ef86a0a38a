package collector_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/store"
)

// declare is the manifest of chunks in order.
func declare(chunks ...workerproto.Chunk) *job.Manifest {
	m, sum := job.Manifest{Chunks: int64(len(chunks))}, sha256.New()
	for _, c := range chunks {
		m.Bytes += int64(len(c.Data))
		sum.Write(c.Data)
	}
	m.SHA256 = hex.EncodeToString(sum.Sum(nil))
	return &m
}

// later is a clock by which all that is stored has been quiet for long enough.
func later() time.Time { return time.Now().Add(time.Hour) }

func text(n int) []workerproto.Chunk {
	var out []workerproto.Chunk
	for i := range n {
		out = append(out, chunk(int64(i)+1, fmt.Sprintf("line %d\n", i)))
	}
	return out
}

// declared is the result of a job that declares chunks, with some of them in it.
func declared(e bus.Entry, all []workerproto.Chunk, tail ...workerproto.Chunk) busmsg.Result {
	r := result(e, tail...)
	r.Manifest = declare(all...)
	return r
}

func (r *rig) verdict(e bus.Entry) busmsg.LogVerdict {
	r.t.Helper()
	_, logs := r.output(e)
	return logs.Verdict
}

func (r *rig) judged(e bus.Entry, want busmsg.LogVerdict) {
	r.t.Helper()
	r.eventually("the verdict is "+string(want), func() bool { return r.verdict(e) == want })
}

func (r *rig) noted() []store.LogManifest {
	r.t.Helper()
	out, err := r.db.UncheckedLogs(r.t.Context(), later(), 100)
	require.NoError(r.t, err)
	return out
}

// writes counts what a collector writes into the database.
type writes struct {
	store.Store
	manifests, verdicts atomic.Int64
}

func (w *writes) AppendChunks(ctx context.Context, chunks []store.LogChunk, manifests ...store.LogManifest) error {
	w.manifests.Add(int64(len(manifests)))
	return w.Store.AppendChunks(ctx, chunks, manifests...)
}

func (w *writes) JudgeLogs(ctx context.Context, m store.LogManifest, v busmsg.LogVerdict) (bool, error) {
	w.verdicts.Add(1)
	return w.Store.JudgeLogs(ctx, m, v)
}

// TestSmallOutputIsCheckedAtOnce: output that comes whole in its result, or none,
// costs no write but its own.
func TestSmallOutputIsCheckedAtOnce(t *testing.T) {
	r := newRig(t)
	db := &writes{Store: r.db}
	r.startAt(db, later)
	whole, silent, unhashed, none := r.assigned(), r.assigned(), r.assigned(), r.assigned()
	withoutHash := declared(unhashed, text(2), text(2)...)
	withoutHash.Manifest.SHA256 = ""
	withoutManifest := declared(none, nil)
	withoutManifest.Manifest = nil
	r.publish(declared(whole, text(20), text(20)...), declared(silent, nil), withoutHash, withoutManifest)

	// One that has to be looked at shows that a round went by.
	other := r.assigned()
	r.publish(declared(other, text(2), text(1)...))
	r.judged(other, busmsg.LogIncomplete)
	for _, e := range []bus.Entry{whole, silent, unhashed, none} {
		require.Empty(t, r.verdict(e))
	}
	require.EqualValues(t, 1, db.manifests.Load())
	require.EqualValues(t, 1, db.verdicts.Load())
	require.Empty(t, r.noted())
}

// TestManifestsAreChecked: whatever way the output came, and whatever is wrong with it.
func TestManifestsAreChecked(t *testing.T) {
	r := newRig(t)
	var warned bytes.Buffer
	r.log = slog.New(slog.NewTextHandler(&locked{w: &warned}, &slog.HandlerOptions{Level: slog.LevelWarn}))
	all := text(50)
	changed := func(at int, data string) []workerproto.Chunk {
		out := text(50)
		out[at].Data = []byte(data)
		return out
	}
	swapped := text(50)
	swapped[49].Seq = 60 // as many chunks as declared, and one of them is not
	var want []busmsg.LogVerdict
	var jobs []bus.Entry
	for _, c := range []struct {
		logs, tail []workerproto.Chunk
		want       busmsg.LogVerdict
	}{
		{all[:40], all[40:], busmsg.LogComplete},
		{all, nil, busmsg.LogComplete},
		{all[:39], all[40:], busmsg.LogIncomplete},
		{nil, nil, busmsg.LogIncomplete},
		{all[1:], nil, busmsg.LogIncomplete},
		{swapped, nil, busmsg.LogIncomplete},
		{changed(7, "line 8\n"), nil, busmsg.LogDiffers},  // as long as what was printed
		{changed(7, "line 7!\n"), nil, busmsg.LogDiffers}, // longer
		{nil, changed(49, "line x\n"), busmsg.LogDiffers}, // whole, and not what it says
		{append(text(50), chunk(51, "more")), nil, busmsg.LogDiffers},
	} {
		e := r.assigned()
		r.publishChunks(e, c.logs...)
		r.publish(declared(e, all, c.tail...))
		jobs, want = append(jobs, e), append(want, c.want)
	}
	early := r.start(r.db)
	r.settled()
	require.Len(t, r.noted(), len(jobs), "none has been quiet for long enough")
	early.stop() // as good as a crash between manifest and verdict
	c := r.startAt(r.db, later)
	bad := 0
	for i, e := range jobs {
		r.judged(e, want[i])
		if want[i].Bad() {
			bad++
		}
	}
	r.eventually("counted", func() bool {
		return c.counted(t, "log_checks_total", "complete") == 2 && c.counted(t, "log_checks_total", "incomplete") == 4 &&
			c.counted(t, "log_checks_total", "differs") == 4
	})
	c.stop()
	require.Equal(t, bad, strings.Count(warned.String(), "is not what its manifest declares"), "one line for each")
	require.Contains(t, warned.String(), "missingChunks=50")
}

// locked is a writer that several goroutines may use.
type locked struct {
	mu sync.Mutex
	w  *bytes.Buffer
}

func (l *locked) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}

func TestOutputThatArrivesAfterTheVerdict(t *testing.T) {
	r := newRig(t)
	r.startAt(r.db, later)
	e, all := r.assigned(), text(30)
	r.publishChunks(e, all[:10]...)
	r.publish(declared(e, all, all[20:]...))
	r.judged(e, busmsg.LogIncomplete)
	r.publishChunks(e, all[10:20]...)
	r.judged(e, busmsg.LogComplete)
	r.publishChunks(e, chunk(99, "nobody declared this"))
	r.judged(e, busmsg.LogDiffers)
}

// TestManyAttemptsAndBytes: more than one page, and more than one batch.
func TestManyAttemptsAndBytes(t *testing.T) {
	r := newRig(t)
	var jobs []bus.Entry
	for range 100 {
		e := r.assigned()
		r.publishChunks(e, text(2)[:1]...)
		r.publish(declared(e, text(2), text(2)[1:]...))
		jobs = append(jobs, e)
	}
	big := r.assigned()
	var all []workerproto.Chunk
	for i := range 64 {
		all = append(all, chunk(int64(i)+1, strings.Repeat(string(rune('a'+i%26)), 32<<10)))
	}
	r.publishChunks(big, all...)
	r.publish(declared(big, all))
	a, b := r.startAt(r.db, later), r.startAt(r.db, later)
	for _, e := range append(jobs, big) {
		r.settled()
		r.judged(e, busmsg.LogComplete)
	}
	total := func() float64 {
		return a.counted(t, "log_checks_total", "complete") + b.counted(t, "log_checks_total", "complete")
	}
	bad := func() float64 {
		return a.counted(t, "log_checks_total", "incomplete") + b.counted(t, "log_checks_total", "incomplete")
	}
	r.eventually("counted", func() bool { return total() >= 101 })
	// Output may have come after a first look: then there were two verdicts.
	require.LessOrEqual(t, total(), 101+bad(), "one verdict for each, by one of the two")
}

// unreadable is a store of which the output of one job cannot be read.
type unreadable struct {
	store.Store
	jobID string
}

func (u unreadable) Logs(ctx context.Context, q busmsg.GetLogs) (busmsg.Logs, error) {
	if q.JobID == u.jobID {
		return busmsg.Logs{}, errors.New("the disk is broken here")
	}
	return u.Store.Logs(ctx, q)
}

func TestUnreadableOutputDoesNotKeepOthersOut(t *testing.T) {
	r := newRig(t)
	broken, good := r.assigned(), r.assigned()
	r.publish(declared(broken, text(2)))
	r.publish(declared(good, text(2)))
	c := r.startAt(unreadable{r.db, broken.Record.ID}, later)
	r.judged(good, busmsg.LogIncomplete)
	r.eventually("counted", func() bool { return c.counted(t, "store_failures_total", "checks") > 0 })
	require.Len(t, r.noted(), 1)
}
