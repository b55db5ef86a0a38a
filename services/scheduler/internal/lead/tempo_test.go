package lead

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
)

// ends has the worker's newest assignment end after it ran for so long.
func (m *machine) ends(ran time.Duration) {
	m.w.t.Helper()
	as := m.w.assigned(m.facts.ID)
	a := as[len(as)-1]
	from := time.Now()
	m.w.after(ran)
	m.w.event(a.JobID, job.Result{
		Fence: a.Fence(), WorkerID: m.facts.ID, Outcome: job.OutcomeSucceeded, ExitCode: new(int),
		AcceptedAt: from, StartedAt: from, FinishedAt: time.Now(),
	})
}

// quick makes a worker that has just ended many attempts, each after so long.
func (w *world) quick(backlog int, each time.Duration) *machine {
	w.t.Helper()
	m := w.machine("m", 2)
	m.facts.Backlog = backlog
	m.hello()
	for range manyEnds {
		w.submit()
		m.ends(each)
	}
	return m
}

func TestAQuickWorkerIsAssignedAhead(t *testing.T) {
	for name, c := range map[string]struct {
		backlog int
		each    time.Duration
		gets    int
	}{
		"very short jobs":      {64, 2 * time.Millisecond, 2 * mostAhead},
		"short jobs":           {64, 15 * time.Millisecond, 2 * 2},
		"long jobs":            {64, 50 * time.Millisecond, 2},
		"it lets nothing wait": {0, 2 * time.Millisecond, 2},
		"it lets a few wait":   {3, 2 * time.Millisecond, 2 + 3},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(w *world) {
				w.quick(c.backlog, c.each)
				for range 20 {
					w.submit()
				}
				require.Len(t, w.assigned("m"), manyEnds+c.gets)
				w.after(2 * aheadFor)
				w.submit()
				require.Len(t, w.assigned("m"), manyEnds+c.gets)
			})
		})
	}
}

func TestAWorkerThatHasDoneLittleIsNotAssignedAhead(t *testing.T) {
	inBubble(t, func(w *world) {
		m := w.machine("m", 2)
		m.facts.Backlog = 64
		m.hello()
		for range manyEnds - 1 {
			w.submit()
			m.ends(time.Millisecond)
		}
		for range 5 {
			w.submit()
		}
		require.Len(t, w.assigned("m"), manyEnds-1+2)
	})
}

// What does not get its turn goes back to the queue, also where a heartbeat has
// listed it, and is no fault of the worker: it gets the job again when it has room.
func TestWhatWasSentAheadInVainIsNoRefusal(t *testing.T) {
	inBubble(t, func(w *world) {
		m := w.quick(64, time.Millisecond)
		for range 3 {
			w.submit()
		}
		as := w.assigned("m")[manyEnds:]
		require.Len(t, as, 3)
		for _, a := range as {
			m.holds(a, workerproto.PhaseAccepted)
		}
		m.heartbeat()
		delete(m.running, as[2].LeaseID)
		m.reports(as[2], workerproto.TypeRejected)
		require.Equal(t, job.Queued, w.job(as[2].JobID).State)
		require.Empty(t, w.job(as[2].JobID).LeaseID)
		require.Len(t, w.assigned("m"), manyEnds+3, "nothing is sent ahead any more")

		w.event(as[0].JobID, job.Result{
			Fence: as[0].Fence(), WorkerID: "m", Outcome: job.OutcomeSucceeded, ExitCode: new(int), AcceptedAt: time.Now(), FinishedAt: time.Now(),
		})
		require.Equal(t, job.Assigned, w.job(as[2].JobID).State, "without a pause")
	})
}
