package runner

import (
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
)

// full is a bench with one slot, which is taken by job-1, and room for two to wait.
func full(t *testing.T, f func(t *testing.T, b *bench)) {
	in(t, 1, func(t *testing.T, b *bench) {
		b.r.cfg.Backlog = 2
		b.assign(lease(1), script{})
		f(t, b)
	})
}

func TestTheNextStartsWhenOneEnds(t *testing.T) {
	full(t, func(t *testing.T, b *bench) {
		b.assign(lease(2), script{finished: true})
		b.assign(lease(3), script{finished: true})
		b.assign(lease(4), script{finished: true})
		if got := b.expect("rejected job-4")[0].reason; got != busy {
			t.Errorf("rejected because %q", got)
		}
		if h := b.r.Heartbeat(); h.FreeSlots != 0 || len(h.Running) != 3 {
			t.Errorf("what waits is held too, and has no slot: %+v", h)
		}
		if got := b.r.Holding(); len(got) != 3 {
			t.Errorf("holding %v", got)
		}
		b.end(lease(1))
		b.expect("result job-1 succeeded", "result job-2 succeeded", "result job-3 succeeded")
		if got := fmt.Sprint(b.x.starts); got != fmt.Sprint([]string{lease(1).LeaseID, lease(2).LeaseID, lease(3).LeaseID}) {
			t.Errorf("started %s", got)
		}
		if b.r.Busy() != 0 || b.r.Heartbeat().FreeSlots != 1 {
			t.Error("the slot is not free again")
		}
	})
}

// One that waits is not reported while it does, and goes back before it would be
// written that it is being prepared.
func TestWhatWaitsTooLongGoesBack(t *testing.T) {
	full(t, func(t *testing.T, b *bench) {
		b.assign(lease(2), script{finished: true})
		time.Sleep(patience - time.Millisecond)
		synctest.Wait()
		b.expect("started job-1")
		time.Sleep(time.Millisecond)
		synctest.Wait()
		if got := b.expect("rejected job-2")[0].reason; got != busy {
			t.Errorf("rejected because %q", got)
		}
		b.assign(lease(2), script{})
		b.end(lease(1))
		b.expect("result job-1 succeeded")
		if len(b.x.starts) != 1 || len(b.r.Holding()) != 1 {
			t.Errorf("started %v, holding %v", b.x.starts, b.r.Holding())
		}
		b.assign(leaseOf("job-2", 2), script{finished: true})
		b.expect("result job-2 succeeded")
	})
}

func TestWhatWaitsCanBeStopped(t *testing.T) {
	for name, c := range map[string]struct {
		stop   func(b *bench)
		frames []string
	}{
		"canceled":       {func(b *bench) { b.r.Cancel(lease(2)) }, []string{"result job-2 canceled"}},
		"stale":          {func(b *bench) { b.r.Stale(lease(2).LeaseID) }, nil},
		"all stopped":    {func(b *bench) { b.r.stopAll(executor.StopShutdown) }, []string{"result job-1 failed", "result job-2 failed"}},
		"lease given up": {func(b *bench) { b.clock.pass(time.Hour); b.r.GiveUpLeases() }, []string{"result job-1 failed", "result job-2 failed"}},
	} {
		t.Run(name, func(t *testing.T) {
			full(t, func(t *testing.T, b *bench) {
				b.assign(lease(2), script{})
				c.stop(b)
				synctest.Wait()
				var got []string
				for _, f := range b.frames() {
					got = append(got, f.String())
				}
				slices.Sort(got) // those that were stopped at once end in any order
				if !slices.Equal(got, c.frames) {
					t.Errorf("frames are %q, want %q", got, c.frames)
				}
				if len(b.x.starts) != 1 {
					t.Errorf("started %v", b.x.starts)
				}
			})
		})
	}
}

// The owner's limits hold here too, not only where jobs are placed.
func TestCoresAndMemoryAreCounted(t *testing.T) {
	in(t, 8, func(t *testing.T, b *bench) {
		b.r.room.offer.CPU, b.r.room.offer.Memory = 0.3, 1<<30
		assign := func(n int, r job.Resources) {
			s := spec()
			s.Resources = r
			b.r.Assign(workerproto.Assignment{Lease: lease(n), LeaseSeconds: 60, Job: s}, b.clock.Now())
			synctest.Wait()
		}
		for n := range 3 { // 0.1 thrice is more than 0.3 in binary
			assign(n, job.Resources{CPU: 0.1, MemoryMB: 256})
		}
		assign(3, job.Resources{CPU: 0.1, MemoryMB: 256})
		assign(4, job.Resources{CPU: 0.4, MemoryMB: 256})
		got := b.expect("rejected job-3", "rejected job-4")
		if got[0].reason != busy || got[1].reason != "asks for more than this worker offers" {
			t.Errorf("%q, %q", got[0].reason, got[1].reason)
		}
		b.end(lease(1))
		b.expect("result job-1 succeeded")
		assign(5, job.Resources{CPU: 0.1, MemoryMB: 1024})
		b.expect("rejected job-5")
		assign(6, job.Resources{CPU: 0.1, MemoryMB: 512})
		if len(b.x.starts) != 4 {
			t.Errorf("started %v", b.x.starts)
		}
	})
}
