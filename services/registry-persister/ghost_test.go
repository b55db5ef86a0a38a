package persister_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/core/job"
	persister "github.com/cmdexec/cmdexec/services/registry-persister"
)

// A scheduler ends the lease of a job that a crash brought back as soon as its worker
// does not know it, which may be before the sweep. Then its version is above that
// of the end, and it must go all the same: it would run again.
func TestGhostsThatWereMovedOnArePurged(t *testing.T) {
	r := newRig(t)
	require.NoError(t, r.conn.SetSwept(t.Context(), "an earlier life"))
	e := r.create(r.newJob(time.Now()))
	end := r.endedCopy(e.Record)
	for e.Record.Version <= end.Version {
		e = r.apply(e, job.Assign{WorkerID: "worker-a", LeaseID: id.New(id.Lease, time.Now())})
		e = r.apply(e, job.Return{Fence: e.Record.Fence(), Outcome: job.OutcomeReturned})
	}
	other := r.create(r.newJob(time.Now()))
	otherEnd := r.endedCopy(other.Record)
	for other.Record.Version <= otherEnd.Version {
		other = r.apply(other, job.Assign{WorkerID: "worker-a", LeaseID: id.New(id.Lease, time.Now())})
		other = r.apply(other, job.Return{Fence: other.Record.Fence(), Outcome: job.OutcomeReturned})
	}
	other = r.apply(other, job.CancelRequest{}) // it ended once more, in another way
	_, err := r.db.UpsertJobs(t.Context(), []job.Record{end, otherEnd})
	require.NoError(t, err)
	require.NoError(t, r.db.SetGeneration(t.Context(), r.conn.Registry().Generation()))

	r.start(r.db, persister.Config{PurgeGraceSeconds: 1})
	r.eventually("swept", func() bool { return r.swept() == r.conn.ServerID() })
	require.False(t, r.live(e.Record.ID), "gone by the time that schedulers hear")
	r.eventually("the second end is purged too", func() bool { return !r.live(other.Record.ID) })
	r.eventually("everything is stored", func() bool {
		n, err := r.conn.Pending(t.Context(), bus.JobsProjection)
		return err == nil && n == 0
	})
	r.same(r.db, end)
	r.same(r.db, otherEnd)
}
