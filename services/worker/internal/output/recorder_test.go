package output

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
)

type sink struct {
	mu     sync.Mutex
	chunks []workerproto.Chunk
	fail   bool
}

func (s *sink) emit(c workerproto.Chunk) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail {
		return errors.New("full")
	}
	s.chunks = append(s.chunks, c)
	return nil
}

// count is how many chunks have come, while a flush may be adding one.
func (s *sink) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.chunks)
}

func (s *sink) bytes(streams ...workerproto.Stream) []byte {
	var out []byte
	for _, c := range s.chunks {
		for _, want := range streams {
			if c.Stream == want {
				out = append(out, c.Data...)
			}
		}
	}
	return out
}

func checkManifest(t *testing.T, s *sink, m job.Manifest) {
	t.Helper()
	sum := sha256.New()
	var total int64
	for i, c := range s.chunks {
		if c.Seq != int64(i+1) {
			t.Fatalf("chunk %d has seq %d", i, c.Seq)
		}
		if err := c.Validate(); err != nil {
			t.Fatalf("chunk %d: %v", i, err)
		}
		sum.Write(c.Data)
		total += int64(len(c.Data))
	}
	if m.Chunks != int64(len(s.chunks)) || m.Bytes != total || m.SHA256 != hex.EncodeToString(sum.Sum(nil)) {
		t.Fatalf("manifest %+v does not declare the %d chunks with %d bytes", m, len(s.chunks), total)
	}
}

func TestStreamsKeepOrderAndOffsets(t *testing.T) {
	s := &sink{}
	r := New(1<<20, time.Now, s.emit)
	out, errw := r.Writer(workerproto.Stdout), r.Writer(workerproto.Stderr)
	fmt.Fprint(out, "one ")
	fmt.Fprint(out, "two ")
	fmt.Fprint(errw, "oops ")
	fmt.Fprint(out, "three")
	m := r.Close()
	checkManifest(t, s, m)
	if got := string(s.bytes(workerproto.Stdout, workerproto.Stderr)); got != "one two oops three" {
		t.Errorf("order is %q", got)
	}
	if last := s.chunks[2]; last.Stream != workerproto.Stdout || last.Offset != 8 {
		t.Errorf("third chunk is %+v, want stdout at offset 8", last)
	}
}

func TestWaitingOutputIsFlushed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &sink{}
		r := New(1<<20, time.Now, s.emit)
		fmt.Fprint(r.Writer(workerproto.Stdout), "prompt> ")
		time.Sleep(flushAfter + time.Millisecond)
		synctest.Wait()
		if got := string(s.bytes(workerproto.Stdout)); got != "prompt> " {
			t.Fatalf("after the flush time %q was emitted", got)
		}
		r.Close()
	})
}

func TestHeadAndTailAreKept(t *testing.T) {
	s := &sink{}
	const limit = 1 << 20
	r := New(limit, time.Now, s.emit)
	w := r.Writer(workerproto.Stdout)
	var all bytes.Buffer
	for i := range 400_000 {
		fmt.Fprintf(&all, "line %d\n", i)
	}
	if _, err := w.Write(all.Bytes()); err != nil {
		t.Fatal(err)
	}
	m := r.Close()
	checkManifest(t, s, m)
	kept := s.bytes(workerproto.Stdout)
	if int64(len(kept)) > limit {
		t.Errorf("kept %d bytes, limit %d", len(kept), limit)
	}
	if m.TruncatedBytes != int64(all.Len()-len(kept)) {
		t.Errorf("declared %d lost bytes, really %d", m.TruncatedBytes, all.Len()-len(kept))
	}
	half := len(kept) / 3
	if !bytes.HasPrefix(all.Bytes(), kept[:half]) || !bytes.HasSuffix(all.Bytes(), kept[len(kept)-half:]) {
		t.Error("head or tail of the output is not what was printed")
	}
	if len(s.bytes(workerproto.System)) == 0 {
		t.Error("no marker where output is missing")
	}
}

func TestLossIsDeclared(t *testing.T) {
	s := &sink{fail: true}
	r := New(1<<20, time.Now, s.emit)
	fmt.Fprint(r.Writer(workerproto.Stdout), "gone")
	r.System("x")
	s.fail = false
	fmt.Fprint(r.Writer(workerproto.Stderr), "kept")
	m := r.Close()
	checkManifest(t, s, m)
	if m.TruncatedBytes < 4 {
		t.Errorf("lost 4 bytes, declared %d", m.TruncatedBytes)
	}
}

func TestNothingWritten(t *testing.T) {
	s := &sink{}
	m := New(1<<20, time.Now, s.emit).Close()
	if m.Chunks != 0 || m.Bytes != 0 || m.TruncatedBytes != 0 {
		t.Errorf("manifest of nothing is %+v", m)
	}
}

func TestTurnsOfTheStreamsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &sink{}
		r := New(1<<20, time.Now, s.emit)
		out, errw := r.Writer(workerproto.Stdout), r.Writer(workerproto.Stderr)
		const each = 100_000
		for range each {
			fmt.Fprint(out, "o")
			fmt.Fprint(errw, "e")
		}
		if most := maxTurns + 1 + 2*(each/chunkBytes+1); s.count() > most {
			t.Errorf("%d chunks within one flush, want at most %d", s.count(), most)
		}
		before := s.count()
		time.Sleep(flushAfter + time.Millisecond)
		synctest.Wait()
		fmt.Fprint(out, "1")
		fmt.Fprint(errw, "2")
		fmt.Fprint(out, "3")
		m := r.Close()
		checkManifest(t, s, m)
		if len(s.chunks) < before+3 {
			t.Error("after a flush the order of the streams is not kept again")
		}
		if got := s.bytes(workerproto.Stdout); string(got) != strings.Repeat("o", each)+"13" {
			t.Errorf("stdout has %d bytes, or is not in order", len(got))
		}
		if got := s.bytes(workerproto.Stderr); string(got) != strings.Repeat("e", each)+"2" {
			t.Errorf("stderr has %d bytes, or is not in order", len(got))
		}
		checkOffsets(t, s)
	})
}

// checkOffsets: without loss every chunk begins where its stream's last one ended.
func checkOffsets(t *testing.T, s *sink) {
	t.Helper()
	at := map[workerproto.Stream]int64{}
	for _, c := range s.chunks {
		if c.Offset != at[c.Stream] {
			t.Fatalf("chunk %d of %s is at offset %d, want %d", c.Seq, c.Stream, c.Offset, at[c.Stream])
		}
		at[c.Stream] += int64(len(c.Data))
	}
}

func TestTailOfTinyPiecesTakesLittleMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &sink{}
		r := New(2048, time.Now, s.emit)
		out, errw := r.Writer(workerproto.Stdout), r.Writer(workerproto.Stderr)
		fmt.Fprint(out, strings.Repeat("x", 4096))
		for range 3 * maxTailPieces { // in turns, each flushed before the next
			fmt.Fprint(out, "o")
			time.Sleep(flushAfter + time.Millisecond)
			fmt.Fprint(errw, "e")
			time.Sleep(flushAfter + time.Millisecond)
		}
		synctest.Wait()
		r.mu.Lock()
		pieces := len(r.tail)
		r.mu.Unlock()
		if pieces > maxTailPieces {
			t.Errorf("the tail has %d pieces", pieces)
		}
		checkManifest(t, s, r.Close())
	})
}

func TestPiecesOfOneStreamAreJoinedInTheTail(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &sink{}
		r := New(64<<10, time.Now, s.emit)
		out := r.Writer(workerproto.Stdout)
		fmt.Fprint(out, strings.Repeat("x", 128<<10))
		for range 2000 {
			fmt.Fprint(out, "one more line\n")
			time.Sleep(flushAfter + time.Millisecond)
		}
		synctest.Wait()
		m := r.Close()
		checkManifest(t, s, m)
		if m.Chunks > 8 {
			t.Errorf("%d chunks for 64 KiB", m.Chunks)
		}
		if got := s.bytes(workerproto.Stdout); !strings.HasSuffix(string(got), strings.Repeat("one more line\n", 2000)) {
			t.Error("the end of the output is not kept")
		}
	})
}

func TestLineOfTheWorkersOwnIsBounded(t *testing.T) {
	s := &sink{}
	r := New(1<<20, time.Now, s.emit)
	r.System(strings.Repeat("é", 1<<20))
	checkManifest(t, s, r.Close())
	if len(s.chunks) != 1 || len(s.chunks[0].Data) > maxSystemBytes+1 || !utf8.Valid(s.chunks[0].Data) {
		t.Error("a long line is not cut, or in the middle of a character")
	}
}

func TestWriterThatOutlivesItsAttemptIsCounted(t *testing.T) {
	s := &sink{}
	r := New(1<<20, time.Now, s.emit)
	w := r.Writer(workerproto.Stdout)
	fmt.Fprint(w, "in time")
	m := r.Close()
	if n, err := fmt.Fprint(w, "late"); n != 4 || err != nil {
		t.Errorf("a late write gives %d, %v", n, err)
	}
	checkManifest(t, s, m)
	if string(s.bytes(workerproto.Stdout)) != "in time" {
		t.Error("late output was emitted")
	}
}
