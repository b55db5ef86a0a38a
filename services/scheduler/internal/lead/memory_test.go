package lead

import (
	"encoding/json"
	"log/slog"
	"runtime"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/core/job"
)

// TestMemoryOfALongQueue: 20,000 jobs wait, every second one with 16 KiB of
// input. Memory keeps what placement needs, and small records up to a bound.
func TestMemoryOfALongQueue(t *testing.T) {
	const jobs = 20_000
	m, err := NewMetrics(prometheus.NewRegistry())
	require.NoError(t, err)
	term := New(newFakeBus(), Config{}, m, slog.New(slog.DiscardHandler))
	defer term.stopOps()
	spec, problems := job.Normalise(job.Spec{Command: job.Command{Shell: "cat"}})
	require.Empty(t, problems)
	now := time.Now()
	term.swept = true
	before := heapInUse()
	for i := range jobs {
		data, err := json.Marshal(job.New(id.New(id.Job, now), "ann", spec, now))
		require.NoError(t, err)
		var rec job.Record // with strings of its own, as from the bus
		require.NoError(t, json.Unmarshal(data, &rec))
		if i%2 == 0 {
			rec.Spec.Stdin = string(make([]byte, 16<<10))
		}
		term.observe(bus.Entry{Record: rec, Revision: uint64(i + 1)}, now)
	}
	used := heapInUse() - before
	t.Logf("%d bytes for each waiting job, %d MiB in all; records kept count as %d MiB", used/jobs, used>>20, term.kept>>20)
	require.Less(t, used, int64(jobs*2500))
	require.LessOrEqual(t, term.kept, keepEntries)
	require.Equal(t, jobs, term.plan.Waiting())
	runtime.KeepAlive(term)
}

func heapInUse() int64 {
	runtime.GC()
	var s runtime.MemStats
	runtime.ReadMemStats(&s)
	return int64(s.HeapAlloc)
}
