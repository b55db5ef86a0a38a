package output

import (
	"bytes"
	"testing"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/workerproto"
)

// BenchmarkWrite is output as it comes from a pipe: kept as it comes, beyond the
// limit, and line by line to both streams.
func BenchmarkWrite(b *testing.B) {
	drop := func(workerproto.Chunk) error { return nil }
	pipe := bytes.Repeat([]byte("x"), 32<<10)
	b.Run("kept", func(b *testing.B) {
		w := New(1<<62, time.Now, drop).Writer(workerproto.Stdout)
		b.ReportAllocs()
		b.SetBytes(int64(len(pipe)))
		for b.Loop() {
			_, _ = w.Write(pipe)
		}
	})
	b.Run("tail", func(b *testing.B) {
		w := New(16<<20, time.Now, drop).Writer(workerproto.Stdout)
		b.ReportAllocs()
		b.SetBytes(int64(len(pipe)))
		for b.Loop() {
			_, _ = w.Write(pipe)
		}
	})
	b.Run("lines", func(b *testing.B) {
		r := New(1<<62, time.Now, drop)
		out, errs := r.Writer(workerproto.Stdout), r.Writer(workerproto.Stderr)
		line := pipe[:80]
		b.ReportAllocs()
		b.SetBytes(int64(2 * len(line)))
		for b.Loop() {
			_, _ = out.Write(line)
			_, _ = errs.Write(line)
		}
	})
}
