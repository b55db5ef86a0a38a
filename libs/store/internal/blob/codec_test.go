package blob

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/store/storetest"
)

func finished(tb testing.TB) job.Record {
	tb.Helper()
	r, err := storetest.FinishedJob(1)
	require.NoError(tb, err)
	return r
}

func FuzzPlain(f *testing.F) {
	f.Add([]byte("{}"))
	f.Add([]byte{formatDeflate1, 3, 0})
	f.Add([]byte{})
	f.Add([]byte{2})
	f.Fuzz(func(t *testing.T, blob []byte) {
		var c Codec
		_, _ = c.plain(blob) // must not panic, and one that failed must not spoil the next
		summary, tail, err := c.Split(finished(t))
		require.NoError(t, err)
		_, err = c.Join(summary, tail)
		require.NoError(t, err)
	})
}

func BenchmarkEncode(b *testing.B) {
	r := finished(b)
	var c Codec
	for b.Loop() {
		summary, _, err := c.Split(r)
		if err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(len(summary)), "bytes")
	}
}
