// Package spool keeps what a worker has produced and nobody has acknowledged
// yet: numbered chunks and one result per key, on disk, in order. It knows
// nothing of what they mean.
//
// All keys share one log of segment files, so that a short-lived key costs no
// file of its own: each chunk and each result is one write, an acknowledgement
// is usually none (it rides with the next write), and a segment goes when
// everything in it is acknowledged.
//
// What survives:
//
//   - kill -9 of the process: everything that Append and PutResult accepted,
//     since it is in the page cache of the kernel. The latest acknowledgements
//     may be forgotten, so a chunk or result may be offered again.
//   - loss of power: a result that stays unacknowledged is flushed to the disk,
//     with all chunks before it, within Options.SyncAfter; many share one flush.
//     A worker whose results are acknowledged promptly never flushes.
//
// A torn end, as kill -9 or a power cut leaves it, is cut when the spool is
// opened. A damaged record is skipped, and counted in [Spool.Damage].
package spool

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Defaults of Options.
const (
	DefaultMaxBytes  = 1 << 30
	DefaultSyncAfter = time.Second
)

const (
	largestSegment  = 8 << 20
	smallestSegment = 64 << 10
	segmentSuffix   = ".seg"
)

var (
	// ErrFull means that the disk budget, or the disk, is used up. Nothing was
	// kept; space comes back by acknowledgements.
	ErrFull = errors.New("spool is full")
	// ErrNotFound means that there is no such unacknowledged chunk or result.
	ErrNotFound = errors.New("not in the spool")
	// ErrOrder means that a chunk's number is not above the one before it.
	ErrOrder = errors.New("chunk out of order")
	// ErrTooLarge means that a record is beyond what the format allows (16 MiB).
	ErrTooLarge = errors.New("record is too large")
	// ErrDamaged means that a record on disk does not match its checksum.
	ErrDamaged = errors.New("record is damaged")
	// ErrInUse means that another process has the folder open.
	ErrInUse = errors.New("spool is in use by another process")
	// ErrClosed means that the spool was closed.
	ErrClosed = errors.New("spool is closed")
)

// Options are the settings of a Spool.
type Options struct {
	// MaxBytes bounds the disk space; 0: DefaultMaxBytes. Results are kept also
	// beyond it, since losing one is worse than a few kilobytes more.
	MaxBytes int64
	// SyncAfter is how long a result may stay unacknowledged before it is flushed
	// to the disk; 0: DefaultSyncAfter; below 0: PutResult flushes before it
	// returns.
	SyncAfter time.Duration
	Log       *slog.Logger // nil: nothing is logged
}

// Key names a series of chunks and their result. It may be any string that is
// not longer than 1,024 bytes.
type Key string

// Chunk is one piece of output.
type Chunk struct {
	Seq    int64 // rises within a key
	Offset int64
	Stream string
	Time   time.Time // kept to the nanosecond, in UTC
	Data   []byte
}

// ChunkInfo is a chunk without its data.
type ChunkInfo struct {
	Seq  int64
	Size int // of the data
}

// Recovered is what an earlier life left of one key.
type Recovered struct {
	Key    Key
	Chunks []ChunkInfo // in order
	Result []byte      // nil where there is none
}

// Damage counts what could not be read when the spool was opened.
type Damage struct {
	Torn    int64 // bytes cut from the end of the log; an interrupted write
	Skipped int64 // bytes of damaged records in the middle of it
}

// Usage is the space in use.
type Usage struct {
	Live int64 // bytes of unacknowledged records
	Disk int64 // bytes of all segment files
}

// Spool is safe for concurrent use. Its calls block for one small file
// operation at most, except PutResult where SyncAfter is below 0.
type Spool struct {
	dir       string
	maxBytes  int64
	segment   int64
	syncAfter time.Duration
	log       *slog.Logger
	lock      *os.File
	salt      salt

	mu        sync.Mutex
	closed    bool
	created   bool       // a segment was, since the last flush
	segments  []*segment // oldest first; the last one takes new records
	entries   map[Key]*entry
	lastEntry uint64
	live      int64
	disk      int64
	buf       []byte
	notes     map[Key]note // acknowledgements that are not written yet
	timer     *time.Timer
	ticking   bool
	damage    Damage
	recovered []Recovered
}

// segment is one file of the log.
type segment struct {
	id    uint64
	file  *os.File
	path  string
	size  int64
	live  int64
	dirty bool // written since the last flush
}

// entry is what is kept of one key.
type entry struct {
	number uint64 // by first record
	chunks []chunkRef
	result location // seg is nil where there is none
	synced bool
}

type chunkRef struct {
	seq  int64
	size int // of the data
	at   location
}

type location struct {
	seg  *segment
	off  int64
	size int64 // of the frame
}

// note is an acknowledgement: of chunks, of the result, of everything.
type note struct {
	seq          int64
	result, drop bool
}

// Open opens the spool in dir, which is made where it is missing, and reads what
// an earlier life left. One process can have it open.
func Open(dir string, opts Options) (*Spool, error) {
	s := &Spool{
		dir: dir, maxBytes: opts.MaxBytes, syncAfter: opts.SyncAfter, log: opts.Log,
		entries: map[Key]*entry{}, notes: map[Key]note{},
	}
	if s.maxBytes <= 0 {
		s.maxBytes = DefaultMaxBytes
	}
	if s.syncAfter == 0 {
		s.syncAfter = DefaultSyncAfter
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	s.segment = min(max(s.maxBytes/16, smallestSegment), largestSegment)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open spool: %w", err)
	}
	var err error
	if s.lock, err = lockFolder(filepath.Join(dir, "lock")); err != nil {
		return nil, fmt.Errorf("open spool: %w", err)
	}
	if s.salt, err = loadSalt(dir); err == nil {
		err = s.load()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open spool: %w", err), s.closeFiles())
	}
	s.timer = time.AfterFunc(time.Hour, s.tick)
	s.timer.Stop()
	if s.live > 0 {
		s.release()
		s.tickLater() // nobody knows how much of it is on the disk
	} else if err := s.empty(); err != nil {
		return nil, errors.Join(fmt.Errorf("open spool: %w", err), s.closeFiles())
	}
	return s, nil
}

// Damage says what could not be read when the spool was opened.
func (s *Spool) Damage() Damage { return s.damage }

// Recovered lists what Open found, oldest key first. Chunks are read with Read.
func (s *Spool) Recovered() []Recovered { return s.recovered }

// Usage says how much is kept.
func (s *Spool) Usage() Usage {
	s.mu.Lock()
	defer s.mu.Unlock()
	return Usage{Live: s.live, Disk: s.disk}
}

// Append keeps a chunk. The data is copied. Errors are ErrFull, ErrOrder,
// ErrTooLarge, ErrClosed, or those of the file system; the chunk is not kept
// then, and the spool stays usable.
func (s *Spool) Append(key Key, c Chunk) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ErrClosed
	}
	if len(c.Data) > maxRecord/2 || len(c.Stream) > maxKey || len(key) > maxKey {
		return ErrTooLarge
	}
	e := s.entries[key]
	if e != nil && len(e.chunks) > 0 && e.chunks[len(e.chunks)-1].seq >= c.Seq {
		return ErrOrder
	}
	at, err := s.write(false, func(buf []byte) []byte { return s.salt.appendChunk(buf, key, c) })
	if err != nil {
		return fmt.Errorf("spool chunk: %w", err)
	}
	e = s.entry(key)
	e.chunks = append(e.chunks, chunkRef{seq: c.Seq, size: len(c.Data), at: at})
	return nil
}

// PutResult keeps the result of a key, in place of an earlier one.
func (s *Spool) PutResult(key Key, blob []byte) error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return ErrClosed
	}
	if len(blob) > maxRecord/2 || len(key) > maxKey {
		s.mu.Unlock()
		return ErrTooLarge
	}
	at, err := s.write(true, func(buf []byte) []byte { return s.salt.appendResult(buf, key, blob) })
	if err != nil {
		s.mu.Unlock()
		return fmt.Errorf("spool result: %w", err)
	}
	e := s.entry(key)
	if e.result.seg != nil {
		s.free(e.result)
	}
	e.result, e.synced = at, false
	if s.syncAfter > 0 {
		s.tickLater()
		s.mu.Unlock()
		return nil
	}
	s.mu.Unlock()
	return s.Sync()
}

// Ack lets go of the chunks of key up to and including seq.
func (s *Spool) Ack(key Key, seq int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.entries[key]
	if s.closed || e == nil {
		return
	}
	n := 0
	for n < len(e.chunks) && e.chunks[n].seq <= seq {
		s.free(e.chunks[n].at)
		n++
	}
	if n == 0 {
		return
	}
	e.chunks = slices.Delete(e.chunks, 0, n)
	note := s.notes[key]
	note.seq = max(note.seq, seq)
	s.noted(key, e, note)
}

// AckResult lets go of the result of key. Its chunks stay until they are
// acknowledged or dropped.
func (s *Spool) AckResult(key Key) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.entries[key]
	if s.closed || e == nil || e.result.seg == nil {
		return
	}
	s.free(e.result)
	e.result = location{}
	note := s.notes[key]
	note.result = true
	s.noted(key, e, note)
}

// Drop lets go of all that is kept of key. The only error is ErrClosed.
func (s *Spool) Drop(key Key) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ErrClosed
	}
	e := s.entries[key]
	if e == nil {
		return nil
	}
	for _, c := range e.chunks {
		s.free(c.at)
	}
	if e.result.seg != nil {
		s.free(e.result)
	}
	e.chunks, e.result = nil, location{}
	s.noted(key, e, note{drop: true})
	return nil
}

// noted remembers an acknowledgement for the next write, and gives back what it
// has made free.
func (s *Spool) noted(key Key, e *entry, n note) {
	s.notes[key] = n
	if len(e.chunks) == 0 && e.result.seg == nil {
		delete(s.entries, key)
	}
	s.release()
	if len(s.notes) > 0 {
		s.tickLater()
	}
}

// Read gives an unacknowledged chunk back.
func (s *Spool) Read(key Key, seq int64) (Chunk, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return Chunk{}, ErrClosed
	}
	e := s.entries[key]
	if e == nil {
		return Chunk{}, ErrNotFound
	}
	i, found := slices.BinarySearchFunc(e.chunks, seq, func(c chunkRef, seq int64) int { return cmp.Compare(c.seq, seq) })
	if !found {
		return Chunk{}, ErrNotFound
	}
	r, err := s.read(e.chunks[i].at)
	if err == nil && (r.kind != kindChunk || r.key != key || r.chunk.Seq != seq) {
		err = ErrDamaged
	}
	if err != nil {
		return Chunk{}, fmt.Errorf("read spooled chunk: %w", err)
	}
	return r.chunk, nil
}

// Result gives an unacknowledged result back.
func (s *Spool) Result(key Key) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, ErrClosed
	}
	e := s.entries[key]
	if e == nil || e.result.seg == nil {
		return nil, ErrNotFound
	}
	return s.readResult(key, e.result)
}

func (s *Spool) readResult(key Key, at location) ([]byte, error) {
	r, err := s.read(at)
	if err == nil && (r.kind != kindResult || r.key != key) {
		err = ErrDamaged
	}
	if err != nil {
		return nil, fmt.Errorf("read spooled result: %w", err)
	}
	return r.blob, nil
}

func (s *Spool) read(at location) (record, error) {
	frame := make([]byte, at.size) // fresh: the record's data points into it
	if _, err := at.seg.file.ReadAt(frame, at.off); err != nil {
		return record{}, err
	}
	body, n := s.salt.nextFrame(frame)
	if n != at.size || body == nil {
		return record{}, ErrDamaged
	}
	return decode(body)
}

// Sync flushes everything to the disk. It blocks for as long as the disk takes,
// without holding up the other calls.
func (s *Spool) Sync() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return ErrClosed
	}
	err := s.writeNotes()
	created := s.created
	s.created = false
	var dirty []*segment
	for _, seg := range s.segments {
		if seg.dirty {
			seg.dirty = false
			dirty = append(dirty, seg)
		}
	}
	var covered []*entry
	for _, e := range s.entries {
		if e.result.seg != nil && !e.synced {
			covered = append(covered, e)
		}
	}
	results := make([]location, len(covered))
	for i, e := range covered {
		results[i] = e.result
	}
	s.mu.Unlock()

	for _, seg := range dirty {
		// A segment that was released meanwhile needs no flush.
		if syncErr := seg.file.Sync(); syncErr != nil && !errors.Is(syncErr, os.ErrClosed) {
			err = errors.Join(err, syncErr)
		}
	}
	if created {
		err = errors.Join(err, syncFolder(s.dir))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		s.created = s.created || created
		for _, seg := range dirty {
			seg.dirty = true
		}
		return fmt.Errorf("flush spool: %w", err)
	}
	for i, e := range covered {
		if e.result == results[i] {
			e.synced = true
		}
	}
	return nil
}

// tickLater arms the timer that flushes results and tidies up. The mutex is held.
func (s *Spool) tickLater() {
	if !s.ticking {
		s.ticking = true
		delay := s.syncAfter
		if delay < 0 {
			delay = DefaultSyncAfter
		}
		s.timer.Reset(delay)
	}
}

func (s *Spool) tick() {
	s.mu.Lock()
	s.ticking = false
	if s.closed {
		s.mu.Unlock()
		return
	}
	unsynced := false
	for _, e := range s.entries {
		unsynced = unsynced || (e.result.seg != nil && !e.synced)
	}
	var err error
	if s.live == 0 {
		err = s.empty()
	} else if !unsynced {
		err = s.writeNotes()
	}
	s.mu.Unlock()
	if unsynced {
		err = errors.Join(err, s.Sync())
	}
	if err != nil && !errors.Is(err, ErrClosed) {
		s.log.Warn("spool cannot be flushed", "error", err)
	}
}

// Close flushes what is kept and closes the files. A spool that keeps nothing
// leaves no file behind but its lock. Closing twice is harmless.
func (s *Spool) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.timer.Stop()
	var err error
	if s.live == 0 {
		err = s.empty()
	}
	s.mu.Unlock()
	if syncErr := s.Sync(); !errors.Is(syncErr, ErrClosed) {
		err = errors.Join(err, syncErr)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	return errors.Join(err, s.closeFiles())
}

func (s *Spool) closeFiles() error {
	var errs []error
	for _, seg := range s.segments {
		errs = append(errs, seg.file.Close())
		if seg.size == 0 {
			errs = append(errs, os.Remove(seg.path))
		}
	}
	s.segments = nil
	return errors.Join(append(errs, s.lock.Close())...)
}

func (s *Spool) entry(key Key) *entry {
	e := s.entries[key]
	if e == nil {
		s.lastEntry++
		e = &entry{number: s.lastEntry}
		s.entries[key] = e
	}
	return e
}

// write appends one record, and before it the acknowledgements that wait. The
// place is already counted as live.
func (s *Spool) write(beyondBudget bool, encode func([]byte) []byte) (location, error) {
	buf := s.appendNotes(s.buf[:0])
	start := len(buf)
	buf = encode(buf)
	s.buf = buf[:0]
	if cap(s.buf) > 1<<20 {
		s.buf = nil
	}
	if !beyondBudget && s.disk+int64(len(buf)) > s.maxBytes {
		s.compact(int64(len(buf)))
		if s.disk+int64(len(buf)) > s.maxBytes {
			return location{}, ErrFull
		}
		// Compacting wrote the acknowledgements and used the buffer.
		buf = encode(s.appendNotes(nil))
		start = len(buf) - len(encode(nil))
	}
	seg, off, err := s.writeBytes(buf)
	if err != nil {
		return location{}, err
	}
	clear(s.notes)
	at := location{seg: seg, off: off + int64(start), size: int64(len(buf) - start)}
	seg.live += at.size
	s.live += at.size
	return at, nil
}

// writeBytes appends to the last segment; all of it is in the file, or nothing.
func (s *Spool) writeBytes(buf []byte) (*segment, int64, error) {
	seg, err := s.active()
	if err != nil {
		return nil, 0, full(err)
	}
	if _, err := seg.file.WriteAt(buf, seg.size); err != nil {
		// What is behind the size is written over, or cut at the next start.
		return nil, 0, full(errors.Join(err, seg.file.Truncate(seg.size)))
	}
	off := seg.size
	seg.size += int64(len(buf))
	seg.dirty = true
	s.disk += int64(len(buf))
	return seg, off, nil
}

func full(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%w: %w", ErrFull, err)
	}
	return err
}

// active gives the segment that takes new records.
func (s *Spool) active() (*segment, error) {
	var id uint64 = 1
	if n := len(s.segments); n > 0 {
		last := s.segments[n-1]
		if last.size < s.segment {
			return last, nil
		}
		id = last.id + 1
	}
	path := filepath.Join(s.dir, fmt.Sprintf("%016x%s", id, segmentSuffix))
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	seg := &segment{id: id, file: f, path: path}
	s.segments = append(s.segments, seg)
	s.created = true
	return seg, nil
}

func (s *Spool) appendNotes(buf []byte) []byte {
	for key, n := range s.notes {
		buf = s.salt.appendNote(buf, key, n)
	}
	return buf
}

// writeNotes writes the acknowledgements that wait.
func (s *Spool) writeNotes() error {
	if len(s.notes) == 0 || s.disk == 0 {
		return nil
	}
	if _, _, err := s.writeBytes(s.appendNotes(nil)); err != nil {
		return err
	}
	clear(s.notes)
	return nil
}

func (s *Spool) free(at location) {
	at.seg.live -= at.size
	s.live -= at.size
}

// release removes segments of which nothing is needed. It goes from the oldest
// on and stops at the first that is, since a later one may hold acknowledgements
// for it.
func (s *Spool) release() {
	for len(s.segments) > 1 && s.segments[0].live == 0 {
		s.remove()
	}
	// Emptying the last one at once would cost a call for every short job.
	if s.live == 0 && s.disk >= s.segment/4 {
		if err := s.empty(); err != nil {
			s.log.Warn("spool segment cannot be emptied", "error", err)
		}
	}
}

// remove removes the oldest segment.
func (s *Spool) remove() {
	seg := s.segments[0]
	s.segments = slices.Delete(s.segments, 0, 1)
	s.disk -= seg.size
	if err := errors.Join(seg.file.Close(), os.Remove(seg.path)); err != nil {
		s.log.Warn("spool segment cannot be removed", "error", err)
	}
}

// empty removes everything from disk. Nothing is live.
func (s *Spool) empty() error {
	for len(s.segments) > 1 {
		s.remove()
	}
	clear(s.notes)
	if len(s.segments) == 0 || s.segments[0].size == 0 {
		return nil
	}
	seg := s.segments[0]
	if err := seg.file.Truncate(0); err != nil {
		return err
	}
	s.disk -= seg.size
	seg.size, seg.dirty = 0, false
	return nil
}

// compact makes room for n bytes by moving what is live in the oldest segments
// to the end, as long as half of the space or more is taken by what is not
// needed any more. For a moment it takes one segment more than the budget.
func (s *Spool) compact(n int64) {
	for range len(s.segments) {
		if s.disk+n <= s.maxBytes {
			return
		}
		if s.live*2 > s.disk {
			return
		}
		oldest := s.segments[0]
		if err := s.move(oldest); err != nil {
			s.log.Warn("spool cannot be compacted", "error", err)
			return
		}
		s.remove()
	}
}

// move copies the live records of a segment to the end of the log.
func (s *Spool) move(from *segment) error {
	if from == s.segments[len(s.segments)-1] {
		// It is the last one too: start another one behind it.
		limit := s.segment
		s.segment = 0
		_, err := s.active()
		s.segment = limit
		if err != nil {
			return err
		}
	}
	if err := s.writeNotes(); err != nil {
		return err
	}
	move := func(at *location) error {
		if at.seg != from {
			return nil
		}
		frame := make([]byte, at.size)
		if _, err := from.file.ReadAt(frame, at.off); err != nil {
			return err
		}
		seg, off, err := s.writeBytes(frame)
		if err != nil {
			return err
		}
		from.live -= at.size
		seg.live += at.size
		*at = location{seg: seg, off: off, size: at.size}
		return nil
	}
	entries := make([]*entry, 0, len(s.entries))
	for _, e := range s.entries {
		entries = append(entries, e)
	}
	slices.SortFunc(entries, func(a, b *entry) int { return cmp.Compare(a.number, b.number) })
	for _, e := range entries {
		for i := range e.chunks {
			if err := move(&e.chunks[i].at); err != nil {
				return err
			}
		}
		if e.result.seg != nil {
			if err := move(&e.result); err != nil {
				return err
			}
			if e.result.seg != from {
				e.synced = false
			}
		}
	}
	return nil
}

// load reads the segments.
func (s *Spool) load() error {
	names, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	for _, name := range names { // sorted, and so are the ids
		hex, ok := strings.CutSuffix(name.Name(), segmentSuffix)
		if !ok {
			continue
		}
		id, err := strconv.ParseUint(hex, 16, 64)
		if err != nil {
			continue
		}
		path := filepath.Join(s.dir, name.Name())
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		s.segments = append(s.segments, &segment{id: id, file: f, path: path, dirty: true})
	}
	for i, seg := range s.segments {
		if err := s.loadSegment(seg, i == len(s.segments)-1); err != nil {
			return fmt.Errorf("segment %x: %w", seg.id, err)
		}
	}
	return s.listRecovered()
}

func (s *Spool) loadSegment(seg *segment, last bool) error {
	data, err := os.ReadFile(seg.path)
	if err != nil {
		return err
	}
	good, skipped := s.salt.scan(data, func(r record, off, size int64) {
		s.replay(r, location{seg: seg, off: off, size: size})
	})
	s.damage.Skipped += skipped
	seg.size = int64(len(data))
	if rest := seg.size - good; rest > 0 {
		if last {
			if err := seg.file.Truncate(good); err != nil {
				return err
			}
			s.damage.Torn += rest
			seg.size = good
		} else {
			s.damage.Skipped += rest
		}
	}
	s.disk += seg.size
	return nil
}

// replay does again what a record says.
func (s *Spool) replay(r record, at location) {
	keep := func() {
		at.seg.live += at.size
		s.live += at.size
	}
	switch r.kind {
	case kindChunk:
		e := s.entry(r.key)
		ref := chunkRef{seq: r.chunk.Seq, size: len(r.chunk.Data), at: at}
		// Records that were moved come after younger ones; the copy wins.
		i, found := slices.BinarySearchFunc(e.chunks, ref.seq, func(c chunkRef, seq int64) int { return cmp.Compare(c.seq, seq) })
		if found {
			s.free(e.chunks[i].at)
			e.chunks[i] = ref
		} else {
			e.chunks = slices.Insert(e.chunks, i, ref)
		}
		keep()
	case kindResult:
		e := s.entry(r.key)
		if e.result.seg != nil {
			s.free(e.result)
		}
		e.result = at
		keep()
	case kindNote:
		e := s.entries[r.key]
		if e == nil {
			return
		}
		for len(e.chunks) > 0 && (r.note.drop || e.chunks[0].seq <= r.note.seq) {
			s.free(e.chunks[0].at)
			e.chunks = e.chunks[1:]
		}
		if e.result.seg != nil && (r.note.drop || r.note.result) {
			s.free(e.result)
			e.result = location{}
		}
		if len(e.chunks) == 0 && e.result.seg == nil {
			delete(s.entries, r.key)
		}
	}
}

func (s *Spool) listRecovered() error {
	keys := make([]Key, 0, len(s.entries))
	for key := range s.entries {
		keys = append(keys, key)
	}
	slices.SortFunc(keys, func(a, b Key) int { return cmp.Compare(s.entries[a].number, s.entries[b].number) })
	for _, key := range keys {
		e := s.entries[key]
		r := Recovered{Key: key}
		for _, c := range e.chunks {
			r.Chunks = append(r.Chunks, ChunkInfo{Seq: c.seq, Size: c.size})
		}
		if e.result.seg != nil {
			blob, err := s.readResult(key, e.result)
			if err != nil {
				return err
			}
			r.Result = blob
		}
		s.recovered = append(s.recovered, r)
	}
	return nil
}
