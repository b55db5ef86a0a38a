package bus_test

import (
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/core/job"
)

// BenchmarkWrites measures acknowledged compare-and-swaps per second on an embedded
// server that syncs every write, by the number of callers. TMPDIR says on which disk.
func BenchmarkWrites(b *testing.B) {
	b.Logf("store on %s", os.TempDir())
	for _, callers := range []int{1, 16, 64} {
		b.Run(fmt.Sprintf("callers=%d", callers), func(b *testing.B) {
			c := start(b)
			ctx := testContext(b)
			r := c.Registry()
			var left atomic.Int64
			left.Store(int64(b.N))
			var wg sync.WaitGroup
			began := time.Now()
			b.ResetTimer()
			for range callers {
				wg.Go(func() {
					e, err := r.Create(ctx, newRecord(b))
					for n := 0; err == nil && left.Add(-1) >= 0; n++ {
						if n%2 == 0 {
							e, err = r.TransitionFrom(ctx, e, job.Assign{WorkerID: "worker-a", LeaseID: fmt.Sprint("lease-", n)})
						} else {
							e, err = r.TransitionFrom(ctx, e, job.Return{Fence: e.Record.Fence(), Outcome: job.OutcomeReturned})
						}
					}
					if err != nil {
						b.Error(err)
					}
				})
			}
			wg.Wait()
			b.StopTimer()
			require.Zero(b, c.Stats().Conflicts)
			b.ReportMetric(float64(b.N)/time.Since(began).Seconds(), "writes/s")
		})
	}
}

// BenchmarkCreates measures submits.
func BenchmarkCreates(b *testing.B) {
	for _, callers := range []int{1, 16, 64} {
		b.Run(fmt.Sprintf("callers=%d", callers), func(b *testing.B) {
			c := start(b)
			ctx := testContext(b)
			r := c.Registry()
			var left atomic.Int64
			left.Store(int64(b.N))
			var wg sync.WaitGroup
			began := time.Now()
			b.ResetTimer()
			for range callers {
				wg.Go(func() {
					for left.Add(-1) >= 0 {
						if _, err := r.Create(ctx, newRecord(b)); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			b.StopTimer()
			b.ReportMetric(float64(b.N)/time.Since(began).Seconds(), "writes/s")
		})
	}
}
