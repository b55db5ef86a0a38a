package output

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/workerproto"
)

// Recorders that are killed at any moment and followed by another one, as often
// as one likes, keep every byte once, in order, under numbers without a gap, as
// one alone does.
func TestResume(t *testing.T) {
	for seed := range uint64(100) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		limit := int64(64 << rnd.IntN(14))
		total := rnd.IntN(int(2 * limit))
		written := map[workerproto.Stream][]byte{}
		for i := range total {
			s := []workerproto.Stream{workerproto.Stdout, workerproto.Stderr}[rnd.IntN(2)]
			written[s] = append(written[s], byte(i), byte(i>>8))
		}
		s := &sink{}
		state := First(limit)
		lives := 1 + rnd.IntN(4)
		for life := range lives {
			state = live(t, s, limit, state, written, rnd, life == lives-1)
			if t.Failed() {
				t.Fatalf("seed %d, limit %d, %d bytes, life %d of %d", seed, limit, 2*total, life, lives)
			}
		}
		for stream, want := range written {
			got := s.bytes(stream)
			if int64(2*total) <= limit/2 && !bytes.Equal(got, want) {
				t.Fatalf("seed %d: %s is %d bytes, want %d", seed, stream, len(got), len(want))
			}
			for _, c := range s.chunks {
				if c.Stream == stream && !bytes.Equal(want[c.Offset:c.Offset+int64(len(c.Data))], c.Data) {
					t.Fatalf("seed %d: %s at %d is not what was written there", seed, stream, c.Offset)
				}
			}
		}
	}
}

// live is one recorder's life, from what an earlier one left to its death, or to
// the end of the output.
func live(t *testing.T, s *sink, limit int64, from State, written map[workerproto.Stream][]byte, rnd *rand.Rand, last bool) State {
	t.Helper()
	r, err := Resume(limit, time.Now, s.emit, from)
	if err != nil {
		t.Fatal(err)
	}
	marked := from
	r.Mark(func(st State) { marked = st })
	rest := map[workerproto.Stream][]byte{}
	for stream, all := range written {
		rest[stream] = all[from.Settled[stream]:]
	}
	budget := rnd.IntN(int(2*limit) + 1)
	for len(rest[workerproto.Stdout])+len(rest[workerproto.Stderr]) > 0 && (last || budget > 0) {
		stream := []workerproto.Stream{workerproto.Stdout, workerproto.Stderr}[rnd.IntN(2)]
		n := min(len(rest[stream]), 1+rnd.IntN(int(limit)))
		_, _ = r.Writer(stream).Write(rest[stream][:n])
		rest[stream] = rest[stream][n:]
		budget -= n
		if rnd.IntN(4) == 0 {
			r.flush()
		}
	}
	if last || rnd.IntN(4) == 0 && len(rest[workerproto.Stdout])+len(rest[workerproto.Stderr]) == 0 {
		m := r.Close()
		if !last {
			return marked // died after its last chunk
		}
		checkManifest(t, s, m)
		var produced, told int64
		for _, all := range written {
			produced += int64(len(all))
		}
		for _, c := range s.chunks {
			var n int64
			if c.Stream == workerproto.System {
				told += int64(len(c.Data))
				if _, err := fmt.Sscanf(string(c.Data), "[cmdexec: %d bytes of output were not kept here]", &n); err != nil || n <= 0 {
					t.Errorf("a line says %q", c.Data)
				}
			}
		}
		if m.Bytes-told+m.TruncatedBytes != produced {
			t.Errorf("kept %d and declared %d of %d", m.Bytes-told, m.TruncatedBytes, produced)
		}
		return marked
	}
	r.mu.Lock() // a timer may flush
	defer r.mu.Unlock()
	if r.timer != nil {
		r.timer.Stop()
	}
	r.closed, r.pending = true, nil
	s.mu.Lock()
	defer s.mu.Unlock()
	if rnd.IntN(2) == 0 && len(s.chunks) > int(from.Seq) && marked.Seq > from.Seq {
		// The last chunk was kept, and the mark of it was not.
		again := from
		for _, c := range s.chunks[from.Seq:] {
			if err := again.Add(c); err != nil {
				t.Fatal(err)
			}
		}
		if again.Seq != marked.Seq || again.Kept != marked.Kept || !bytes.Equal(again.Sum, marked.Sum) || fmt.Sprint(again.Settled) != fmt.Sprint(marked.Settled) {
			t.Errorf("by its chunks the state is %+v, by its mark %+v", again, marked)
		}
		marked = again
	}
	return marked
}

func TestMissing(t *testing.T) {
	s := &sink{}
	r := New(1<<10, time.Now, s.emit)
	fmt.Fprint(r.Writer(workerproto.Stdout), "before")
	r.Missing(0, "[cmdexec: a hole]")
	fmt.Fprint(r.Writer(workerproto.Stdout), "after")
	m := r.Close()
	checkManifest(t, s, m)
	if got := string(s.bytes(workerproto.Stdout, workerproto.System)); got != "before[cmdexec: a hole]\nafter" {
		t.Errorf("output is %q", got)
	}
	if m.TruncatedBytes != 1 {
		t.Errorf("a hole of unknown size counts as %d bytes", m.TruncatedBytes)
	}
}

func TestStateThatCannotBeContinued(t *testing.T) {
	s := First(100)
	s.Sum = []byte(strings.Repeat("x", 108))
	if _, err := Resume(100, time.Now, (&sink{}).emit, s); err == nil {
		t.Error("a state with a broken hash was taken")
	}
	s = First(100)
	if err := s.Add(workerproto.Chunk{Seq: 2}); err == nil {
		t.Error("a gap was taken")
	}
}
