// Package output turns what a command writes into numbered chunks, keeps head
// and tail of what is too long, and declares the rest in a manifest.
package output

import (
	"crypto/sha256"
	"encoding"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
	"maps"
	"strings"
	"sync"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
)

const (
	// flushAfter is how long a piece of output may wait for more of its kind.
	flushAfter = 20 * time.Millisecond
	// firstAfter is that of the first one: who waits for a command sees at once that
	// it has begun.
	firstAfter = 2 * time.Millisecond
	// chunkBytes is where a chunk is cut without waiting.
	chunkBytes = 32 << 10
	// maxTailBytes and maxTailPieces bound the memory that the kept tail of one
	// attempt takes.
	maxTailBytes  = 8 << 20
	maxTailPieces = 8 << 10
	// maxTurns is how often the two streams may take turns within flushAfter
	// before their order among each other is kept no more: a command that writes
	// single bytes to both would cost a chunk for each.
	maxTurns = 64
	// maxSystemBytes is where a line of the worker's own is cut.
	maxSystemBytes = 4 << 10
)

// Recorder numbers the output of one attempt. The first part, up to the job's
// limit less the tail, is emitted as it comes; what follows goes to a tail of
// which only the end is kept, and is emitted by Close. All methods and the
// writers are safe for concurrent use.
type Recorder struct {
	now  func() time.Time
	emit func(workerproto.Chunk) error

	mu        sync.Mutex
	head      int64 // bytes that are still emitted at once
	tailLimit int64
	seq       int64
	offset    map[workerproto.Stream]int64 // produced so far, kept or not
	pending   []piece                      // at most one of each stream, in the order of their first bytes
	turns     int                          // since the last flush
	timer     *time.Timer
	tail      []piece
	tailBytes int64
	sum       hash.Hash
	kept      int64
	truncated int64
	closed    bool

	// For a later process that goes on; see State.
	mark    func(State)
	settled map[workerproto.Stream]int64 // bytes whose fate is decided: emitted, or given up
	dropped int64                        // of truncated: what fell out of the tail, up to
	edge    map[workerproto.Stream]int64 // these offsets
	told    int64                        // of truncated: what a line says already
	missing int64                        // given up before it came here
}

// State is what another recorder needs to go on where one has stopped, at the
// moment at which the chunk with the number Seq was emitted. What had been
// written by then and is behind Settled has to be written again.
type State struct {
	Seq       int64                        `json:"seq"`
	Kept      int64                        `json:"kept"`
	Head      int64                        `json:"head"` // bytes that are still emitted at once
	Settled   map[workerproto.Stream]int64 `json:"settled,omitempty"`
	Truncated int64                        `json:"truncated,omitempty"`
	Told      int64                        `json:"told,omitempty"`
	Missing   int64                        `json:"missing,omitempty"`
	Sum       []byte                       `json:"sum,omitempty"` // of SHA-256, in the middle of it
}

// First is the state before anything was written.
func First(limit int64) State {
	return State{Head: limit - tailOf(limit), Settled: map[workerproto.Stream]int64{}}
}

func tailOf(limit int64) int64 { return min(limit/2, maxTailBytes) }

// Add takes in a chunk that was emitted after the state. Chunks must come in
// their order, without a gap.
func (s *State) Add(c workerproto.Chunk) error {
	if c.Seq != s.Seq+1 {
		return fmt.Errorf("chunk %d does not follow %d", c.Seq, s.Seq)
	}
	sum, err := s.hash()
	if err != nil {
		return err
	}
	sum.Write(c.Data)
	n := int64(len(c.Data))
	s.Seq, s.Kept, s.Sum = c.Seq, s.Kept+n, stateOf(sum)
	s.Settled = maps.Clone(s.Settled)
	if s.Settled == nil {
		s.Settled = map[workerproto.Stream]int64{}
	}
	s.Settled[c.Stream] = max(s.Settled[c.Stream], c.Offset+n)
	s.Head = max(0, s.Head-n)
	return nil
}

// hash is the hash of what was kept, ready for more.
func (s *State) hash() (hash.Hash, error) {
	h := sha256.New()
	if len(s.Sum) == 0 {
		return h, nil
	}
	if err := h.(encoding.BinaryUnmarshaler).UnmarshalBinary(s.Sum); err != nil {
		return nil, fmt.Errorf("the hash of the output cannot be continued: %w", err)
	}
	return h, nil
}

func stateOf(h hash.Hash) []byte {
	data, err := h.(encoding.BinaryMarshaler).MarshalBinary()
	if err != nil {
		panic("output: the standard library's SHA-256 does not give its state: " + err.Error()) // it never fails
	}
	return data
}

// piece is output that has no number yet.
type piece struct {
	stream workerproto.Stream
	offset int64
	time   time.Time
	data   []byte
}

// New returns a recorder that keeps at most limit bytes. emit gets each chunk
// in order of seq, never two at once, and owns its data; when it fails the
// chunk's bytes are counted as not kept and its number is used again.
func New(limit int64, now func() time.Time, emit func(workerproto.Chunk) error) *Recorder {
	return newRecorder(limit, now, emit, First(limit), sha256.New())
}

// Resume returns a recorder that goes on where another one had stopped. The
// error is of a state that cannot be continued.
func Resume(limit int64, now func() time.Time, emit func(workerproto.Chunk) error, from State) (*Recorder, error) {
	sum, err := from.hash()
	if err != nil {
		return nil, err
	}
	return newRecorder(limit, now, emit, from, sum), nil
}

func newRecorder(limit int64, now func() time.Time, emit func(workerproto.Chunk) error, from State, sum hash.Hash) *Recorder {
	r := &Recorder{
		now: now, emit: emit, head: from.Head, tailLimit: tailOf(limit), seq: from.Seq, kept: from.Kept,
		offset: map[workerproto.Stream]int64{}, settled: map[workerproto.Stream]int64{}, sum: sum,
		truncated: from.Truncated, told: from.Told, missing: from.Missing, edge: map[workerproto.Stream]int64{},
	}
	maps.Copy(r.offset, from.Settled)
	maps.Copy(r.settled, from.Settled)
	return r
}

// Mark has f called after each chunk with the state from which another recorder
// could go on, in order and never two at once. It must be called before the
// first output, if at all.
func (r *Recorder) Mark(f func(State)) { r.mark = f }

func (r *Recorder) state() State {
	return State{
		Seq: r.seq, Kept: r.kept, Head: r.head, Settled: maps.Clone(r.settled),
		Truncated: r.truncated - r.dropped, Told: r.told, Missing: r.missing, Sum: stateOf(r.sum),
	}
}

// Writer returns the writer for one stream of the command. Its Write never
// fails: what cannot be kept is counted.
func (r *Recorder) Writer(s workerproto.Stream) io.Writer { return writer{r, s} }

type writer struct {
	r *Recorder
	s workerproto.Stream
}

func (w writer) Write(p []byte) (int, error) {
	w.r.write(w.s, p)
	return len(p), nil
}

func (r *Recorder) write(s workerproto.Stream, p []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		r.truncated += int64(len(p)) // a writer that outlives its attempt; declared, not lost silently
		return
	}
	for len(p) > 0 {
		i := r.piece(s)
		n := min(len(p), chunkBytes-len(r.pending[i].data))
		r.pending[i].data = append(r.pending[i].data, p[:n]...)
		r.offset[s] += int64(n)
		p = p[n:]
		if len(r.pending[i].data) == chunkBytes {
			r.cut()
		}
	}
	if len(r.pending) > 0 && r.timer == nil {
		after := flushAfter
		if r.seq == 0 {
			after = firstAfter
		}
		r.timer = time.AfterFunc(after, r.flush)
	}
}

// piece finds the pending piece that the next bytes of a stream go to.
func (r *Recorder) piece(s workerproto.Stream) int {
	last := len(r.pending) - 1
	if last >= 0 && r.pending[last].stream == s {
		return last
	}
	if last >= 0 && r.turns < maxTurns { // the other stream's goes first
		r.turns++
		r.cut()
	}
	for i := range r.pending {
		if r.pending[i].stream == s {
			return i
		}
	}
	r.pending = append(r.pending, piece{stream: s, offset: r.offset[s], time: r.now()})
	return len(r.pending) - 1
}

func (r *Recorder) flush() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.timer, r.turns = nil, 0
	r.cut()
}

// cut ends the pending pieces: they are emitted, or go to the tail.
func (r *Recorder) cut() {
	for i := range r.pending {
		p := r.pending[i]
		r.pending[i] = piece{}
		if len(r.tail) == 0 && int64(len(p.data)) <= r.head {
			r.head -= int64(len(p.data))
			r.number(p)
			continue
		}
		r.head = 0
		r.toTail(p)
	}
	r.pending = r.pending[:0]
}

// toTail adds a piece to the tail, joined with the last one where that is its
// beginning, and drops what is too much from the front.
func (r *Recorder) toTail(p piece) {
	r.tailBytes += int64(len(p.data))
	if n := len(r.tail) - 1; n >= 0 && r.tail[n].stream == p.stream && len(r.tail[n].data)+len(p.data) <= chunkBytes {
		r.tail[n].data = append(r.tail[n].data, p.data...)
	} else {
		r.tail = append(r.tail, p)
	}
	for r.tailBytes > r.tailLimit || len(r.tail) > maxTailPieces {
		n := int64(len(r.tail[0].data))
		r.edge[r.tail[0].stream] = r.tail[0].offset + n
		r.tail[0].data = nil
		r.tail = r.tail[1:]
		r.tailBytes -= n
		r.truncated += n
		r.dropped += n
	}
}

func (r *Recorder) number(p piece) {
	c := workerproto.Chunk{Seq: r.seq + 1, Offset: p.offset, Stream: p.stream, Time: job.Timestamp(p.time), Data: p.data}
	r.settled[p.stream] = p.offset + int64(len(p.data))
	if err := r.emit(c); err != nil {
		r.truncated += int64(len(p.data))
		return
	}
	r.seq++
	r.kept += int64(len(p.data))
	r.sum.Write(p.data)
	if r.mark != nil {
		r.mark(r.state())
	}
}

// Missing notes that output was lost before it came here, of which text tells,
// in a line of the worker's own at this place. bytes is at least 1, so that a
// log with a hole of an unknown size never counts as complete.
func (r *Recorder) Missing(bytes int64, text string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.closed {
		r.missing += max(bytes, 1)
		r.cut()
		r.system(text)
	}
}

// System adds a line of the worker's own, which is not the command's output.
func (r *Recorder) System(text string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.closed {
		r.cut()
		r.system(text)
	}
}

func (r *Recorder) system(text string) {
	data := []byte(strings.ToValidUTF8(text[:min(len(text), maxSystemBytes)], "") + "\n")
	at := r.offset[workerproto.System]
	r.offset[workerproto.System] += int64(len(data))
	r.number(piece{stream: workerproto.System, offset: at, time: r.now(), data: data})
}

// Close emits what is left and returns the manifest. The command's writers
// must have ended. It may be called once.
func (r *Recorder) Close() job.Manifest {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.timer != nil {
		r.timer.Stop()
		r.timer = nil
	}
	r.cut()
	// From here on what is kept of the tail is emitted, so what is not is settled.
	r.dropped = 0
	for stream, offset := range r.edge {
		r.settled[stream] = max(r.settled[stream], offset)
	}
	if n := r.truncated - r.told; n > 0 {
		r.told = r.truncated
		r.system(fmt.Sprintf("[cmdexec: %d bytes of output were not kept here]", n))
	}
	for _, p := range r.tail {
		r.number(p)
	}
	r.tail, r.closed = nil, true
	return job.Manifest{
		Chunks: r.seq, Bytes: r.kept, SHA256: hex.EncodeToString(r.sum.Sum(nil)), TruncatedBytes: r.truncated + r.missing,
	}
}
