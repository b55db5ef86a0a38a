package spool

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv("SPOOL_TEST_HELPER"); dir != "" {
		helper(dir)
		return
	}
	goleak.VerifyTestMain(m)
}

func open(t testing.TB, dir string, opts Options) *Spool {
	t.Helper()
	s, err := Open(dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// crash lets go of the files without writing anything, as kill -9 does.
func crash(t testing.TB, s *Spool) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.timer.Stop()
	s.closed = true
	for _, seg := range s.segments {
		_ = seg.file.Close()
	}
	_ = s.lock.Close()
}

func chunk(seq int64, data string) Chunk {
	return Chunk{Seq: seq, Offset: seq * 10, Stream: "stdout", Time: time.Unix(seq, 5).UTC(), Data: []byte(data)}
}

func put(t testing.TB, s *Spool, key Key, seqs ...int64) {
	t.Helper()
	for _, seq := range seqs {
		if err := s.Append(key, chunk(seq, fmt.Sprintf("data %s %d", key, seq))); err != nil {
			t.Fatal(err)
		}
	}
}

func result(t testing.TB, s *Spool, key Key, blob string) {
	t.Helper()
	if err := s.PutResult(key, []byte(blob)); err != nil {
		t.Fatal(err)
	}
}

// content is what a spool has, as text.
func content(s *Spool) string {
	var b strings.Builder
	for _, r := range s.Recovered() {
		fmt.Fprintf(&b, "%s:", r.Key)
		for _, c := range r.Chunks {
			fmt.Fprintf(&b, " %d", c.Seq)
		}
		if r.Result != nil {
			fmt.Fprintf(&b, " =%s", r.Result)
		}
		b.WriteString("\n")
	}
	return b.String()
}

func segmentFiles(t testing.TB, dir string) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "*"+segmentSuffix))
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func TestRestartGivesBackWhatIsNotAcknowledged(t *testing.T) {
	for name, end := range map[string]func(t testing.TB, s *Spool){
		"crash": crash,
		"close": func(t testing.TB, s *Spool) {
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s := open(t, dir, Options{})
			put(t, s, "b", 1, 2, 3)
			put(t, s, "a", 1)
			result(t, s, "a", "result a")
			s.Ack("b", 2)
			put(t, s, "c", 7)
			result(t, s, "c", "gone")
			s.Ack("c", 7)
			s.AckResult("c")
			put(t, s, "d", 1, 2)
			if err := s.Drop("d"); err != nil {
				t.Fatal(err)
			}
			put(t, s, "b", 4) // carries the acknowledgements
			end(t, s)

			s = open(t, dir, Options{})
			if got, want := content(s), "b: 3 4\na: 1 =result a\n"; got != want {
				t.Fatalf("got\n%swant\n%s", got, want)
			}
			if s.Damage() != (Damage{}) {
				t.Errorf("damage %+v", s.Damage())
			}
			got, err := s.Read("b", 4)
			if err != nil || !reflect.DeepEqual(got, chunk(4, "data b 4")) {
				t.Fatalf("read %+v, %v", got, err)
			}
			if _, err := s.Read("b", 2); !errors.Is(err, ErrNotFound) {
				t.Errorf("an acknowledged chunk: %v", err)
			}
			blob, err := s.Result("a")
			if err != nil || string(blob) != "result a" {
				t.Errorf("result %q, %v", blob, err)
			}
			// It goes on where it was.
			put(t, s, "b", 5)
			s.Ack("b", 4)
			s.Ack("a", 1)
			s.AckResult("a")
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			if got := content(open(t, dir, Options{})); got != "b: 5\n" {
				t.Fatalf("got %q", got)
			}
		})
	}
}

func TestEverythingAcknowledgedLeavesNoFile(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, Options{})
	put(t, s, "a", 1, 2)
	result(t, s, "a", "r")
	s.AckResult("a")
	s.Ack("a", 2)
	if u := s.Usage(); u.Live != 0 {
		t.Errorf("usage %+v", u)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if files := segmentFiles(t, dir); len(files) > 0 {
		t.Errorf("left: %v", files)
	}
	if err := s.Append("a", chunk(3, "")); !errors.Is(err, ErrClosed) {
		t.Errorf("append after close: %v", err)
	}
}

func TestAnAttemptCostsNoFileAndNoSpaceThatStays(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, Options{MaxBytes: 2 << 20})
	for i := range 20_000 {
		key := Key("job-" + strconv.Itoa(i))
		put(t, s, key, 1)
		result(t, s, key, "result")
		s.Ack(key, 1)
		s.AckResult(key)
	}
	if u := s.Usage(); u.Live != 0 || u.Disk > 1<<20 {
		t.Errorf("usage %+v", u)
	}
	if n := len(segmentFiles(t, dir)); n != 1 {
		t.Errorf("%d files", n)
	}
}

func TestOrderWithinAKey(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	put(t, s, "a", 5)
	for _, seq := range []int64{5, 4} {
		if err := s.Append("a", chunk(seq, "")); !errors.Is(err, ErrOrder) {
			t.Errorf("chunk %d after 5: %v", seq, err)
		}
	}
	put(t, s, "a", 9)
}

func TestTornTailIsCut(t *testing.T) {
	// Every length of what is left of the last record.
	dir := t.TempDir()
	s := open(t, dir, Options{})
	put(t, s, "a", 1, 2)
	whole := s.Usage().Disk
	put(t, s, "a", 3)
	all := s.Usage().Disk
	crash(t, s)
	data, err := os.ReadFile(segmentFiles(t, dir)[0])
	if err != nil {
		t.Fatal(err)
	}
	saltFile, err := os.ReadFile(filepath.Join(dir, "salt"))
	if err != nil {
		t.Fatal(err)
	}
	for size := whole; size < all; size++ {
		dir := t.TempDir()
		for name, content := range map[string][]byte{"0000000000000001.seg": data[:size], "salt": saltFile} {
			if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		s := open(t, dir, Options{})
		if got := content(s); got != "a: 1 2\n" {
			t.Fatalf("%d of %d bytes: got %q", size, all, got)
		}
		if d := s.Damage(); d.Torn != size-whole || d.Skipped != 0 {
			t.Fatalf("%d of %d bytes: damage %+v", size, all, d)
		}
		put(t, s, "a", 3)
		crash(t, s)
		if got := content(open(t, dir, Options{})); got != "a: 1 2 3\n" {
			t.Fatalf("after going on: %q", got)
		}
	}
}

func TestFlippedBitLosesOneRecord(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, Options{})
	put(t, s, "a", 1)
	from := s.Usage().Disk
	put(t, s, "a", 2)
	to := s.Usage().Disk
	put(t, s, "a", 3)
	result(t, s, "a", "r")
	crash(t, s)
	path := segmentFiles(t, dir)[0]
	sound, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for bit := from * 8; bit < to*8; bit++ {
		data := bytes.Clone(sound)
		data[bit/8] ^= 1 << (bit % 8)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		s := open(t, dir, Options{})
		if got := content(s); got != "a: 1 3 =r\n" {
			t.Fatalf("bit %d: got %q", bit-from*8, got)
		}
		if d := s.Damage(); d.Skipped != to-from || d.Torn != 0 {
			t.Fatalf("bit %d: damage %+v, want %d skipped", bit-from*8, d, to-from)
		}
		crash(t, s)
	}
}

func TestDamageAfterOpenIsNoticed(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, Options{})
	put(t, s, "a", 1)
	f, err := os.OpenFile(segmentFiles(t, dir)[0], os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{0xff}, s.Usage().Disk-1); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Read("a", 1); !errors.Is(err, ErrDamaged) {
		t.Fatalf("got %v", err)
	}
}

// Output that looks like a record of the spool must not become one, also where
// the record around it is torn.
func TestOutputCannotForgeARecord(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, Options{})
	put(t, s, "a", 1)
	var unknown salt
	forged := unknown.appendResult(nil, "victim", []byte("forged"))
	if err := s.Append("a", chunk(2, string(forged)+strings.Repeat("x", 100))); err != nil {
		t.Fatal(err)
	}
	size := s.Usage().Disk
	crash(t, s)
	if err := os.Truncate(segmentFiles(t, dir)[0], size-50); err != nil {
		t.Fatal(err)
	}
	if got := content(open(t, dir, Options{})); got != "a: 1\n" {
		t.Fatalf("got %q", got)
	}
}

func TestBudget(t *testing.T) {
	const budget = 1 << 20
	dir := t.TempDir()
	s := open(t, dir, Options{MaxBytes: budget})
	data := strings.Repeat("x", 4000)
	var last int64
	for seq := int64(1); ; seq++ {
		err := s.Append("a", chunk(seq, data))
		if errors.Is(err, ErrFull) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		last = seq
	}
	if last < 200 || last > 260 {
		t.Fatalf("%d chunks of 4,000 bytes in %d", last, budget)
	}
	if u := s.Usage(); u.Disk > budget {
		t.Errorf("usage %+v", u)
	}
	// Results have a place also then.
	result(t, s, "a", "result")
	// Space comes back.
	s.Ack("a", last-10)
	put(t, s, "a", last+1)
	crash(t, s)
	s = open(t, dir, Options{MaxBytes: budget})
	if r := s.Recovered(); len(r) != 1 || len(r[0].Chunks) != 11 || string(r[0].Result) != "result" {
		t.Fatalf("recovered %s", content(s))
	}
}

// One key that is never acknowledged must not keep the space of all the others.
func TestPinnedRecordsAreMoved(t *testing.T) {
	const budget = 1 << 20
	dir := t.TempDir()
	s := open(t, dir, Options{MaxBytes: budget})
	data := strings.Repeat("x", 4000)
	var pinned []int64
	for seq := int64(1); seq <= 3000; seq++ {
		if err := s.Append("busy", chunk(seq, data)); err != nil {
			t.Fatalf("chunk %d: %v (usage %+v)", seq, err, s.Usage())
		}
		if seq > 5 {
			s.Ack("busy", seq-5)
		}
		if seq%100 == 0 {
			put(t, s, "pinned", seq)
			pinned = append(pinned, seq)
		}
		if u := s.Usage(); u.Disk > budget+2*smallestSegment {
			t.Fatalf("usage %+v", u)
		}
	}
	for range 2 {
		for _, seq := range pinned {
			c, err := s.Read("pinned", seq)
			if err != nil || string(c.Data) != fmt.Sprintf("data pinned %d", seq) {
				t.Fatalf("chunk %d: %q, %v", seq, c.Data, err)
			}
		}
		crash(t, s)
		s = open(t, dir, Options{MaxBytes: budget})
		for _, r := range s.Recovered() {
			if r.Key == "pinned" && len(r.Chunks) != len(pinned) {
				t.Fatalf("recovered %d of %d", len(r.Chunks), len(pinned))
			}
			if r.Key == "busy" && len(r.Chunks) > 6 {
				t.Fatalf("%d acknowledged chunks came back", len(r.Chunks)-5)
			}
		}
	}
}

func TestManyKeysAtOnce(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, Options{MaxBytes: 16 << 20, SyncAfter: time.Millisecond})
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			for round := range 20 {
				key := Key(fmt.Sprintf("job-%d-%d", i, round))
				for seq := int64(1); seq <= 20; seq++ {
					if err := s.Append(key, chunk(seq, fmt.Sprint(key, seq))); err != nil {
						t.Error(err)
					}
					if c, err := s.Read(key, seq); err != nil || string(c.Data) != fmt.Sprint(key, seq) {
						t.Errorf("%s %d: %q, %v", key, seq, c.Data, err)
					}
					if seq%3 == 0 {
						s.Ack(key, seq-1)
					}
				}
				if err := s.PutResult(key, []byte(key)); err != nil {
					t.Error(err)
				}
				if round%2 == 0 {
					s.Ack(key, 20)
					s.AckResult(key)
				}
			}
		})
	}
	wg.Wait()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir, Options{})
	if n := len(s.Recovered()); n != 160 {
		t.Fatalf("%d keys, want 160", n)
	}
	for _, r := range s.Recovered() {
		if string(r.Result) != string(r.Key) || len(r.Chunks) != 3 || r.Chunks[0].Seq != 18 {
			t.Fatalf("recovered %+v", r)
		}
	}
}

func TestResultIsFlushedByItself(t *testing.T) {
	s := open(t, t.TempDir(), Options{SyncAfter: time.Millisecond})
	result(t, s, "a", "r")
	deadline := time.Now().Add(10 * time.Second)
	for {
		s.mu.Lock()
		synced := s.entries["a"].synced
		s.mu.Unlock()
		if synced {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("the result was not flushed")
		}
		time.Sleep(time.Millisecond)
	}
}

func TestSecondOpenIsRefused(t *testing.T) {
	dir := t.TempDir()
	open(t, dir, Options{})
	if _, err := Open(dir, Options{}); !errors.Is(err, ErrInUse) {
		t.Fatalf("got %v", err)
	}
}

func TestReplacedResult(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, Options{SyncAfter: -1})
	result(t, s, "a", "first")
	result(t, s, "a", "second")
	crash(t, s)
	if got := content(open(t, dir, Options{})); got != "a: =second\n" {
		t.Fatalf("got %q", got)
	}
}

// helper appends and acknowledges until it is killed, and says how far it got.
func helper(dir string) {
	s, err := Open(dir, Options{MaxBytes: 64 << 20})
	if err != nil {
		panic(err)
	}
	data := bytes.Repeat([]byte("0123456789"), 100)
	for seq := int64(1); ; seq++ {
		if err := s.Append("long", Chunk{Seq: seq, Stream: "stdout", Data: data}); err != nil {
			panic(err)
		}
		key := Key("job-" + strconv.FormatInt(seq, 10))
		if err := s.PutResult(key, []byte(key)); err != nil {
			panic(err)
		}
		if seq%2 == 0 {
			s.AckResult(key)
		}
		if seq > 100 {
			s.Ack("long", seq-100)
		}
		fmt.Println(seq)
	}
}

func TestKilledInTheMiddleOfWriting(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for round := range 5 {
		dir := t.TempDir()
		cmd := exec.Command(self)
		cmd.Env = append(os.Environ(), "SPOOL_TEST_HELPER="+dir)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		var kept int64
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			n, err := strconv.ParseInt(lines.Text(), 10, 64)
			if err != nil {
				break // the last line is torn
			}
			kept = n
			if n == int64(200+round*300) {
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
		}
		_ = cmd.Wait()

		s := open(t, dir, Options{})
		results := map[Key]string{}
		var long []ChunkInfo
		for _, r := range s.Recovered() {
			if r.Key == "long" {
				long = r.Chunks
			} else {
				results[r.Key] = string(r.Result)
			}
		}
		if len(long) < 100 || len(long) > 103 || long[len(long)-1].Seq < kept {
			t.Fatalf("kept up to %d; recovered %d chunks", kept, len(long))
		}
		for i, c := range long {
			if c.Seq != long[0].Seq+int64(i) || c.Size != 1000 {
				t.Fatalf("chunk %d is %+v", i, c)
			}
			if got, err := s.Read("long", c.Seq); err != nil || len(got.Data) != 1000 {
				t.Fatal(err)
			}
		}
		for seq := int64(1); seq <= kept; seq += 2 {
			key := Key("job-" + strconv.FormatInt(seq, 10))
			if results[key] != string(key) {
				t.Fatalf("the result of %s is lost", key)
			}
		}
		if s.Damage().Skipped != 0 {
			t.Fatalf("damage %+v", s.Damage())
		}
	}
}

func FuzzScan(f *testing.F) {
	var unsalted salt
	seed := unsalted.appendChunk(nil, "a", chunk(1, "x"))
	seed = unsalted.appendResult(seed, "a", []byte("r"))
	seed = unsalted.appendNote(seed, "a", note{seq: 1, result: true})
	f.Add(seed)
	f.Add(unsalted.endFrame(append(make([]byte, headerSize), kindChunk, 0xff, 0xff), 0))
	f.Fuzz(func(t *testing.T, data []byte) {
		// Whatever a body holds, it is read back as it was written or refused.
		if r, err := decode(data); err == nil && r.kind == kindChunk {
			frame := unsalted.appendChunk(nil, r.key, r.chunk)
			again, err := decode(frame[headerSize:])
			if err != nil || !reflect.DeepEqual(again.chunk, r.chunk) || again.key != r.key {
				t.Fatalf("%+v came back as %+v, %v", r, again, err)
			}
		}
		framed := unsalted.endFrame(append(make([]byte, headerSize), data...), 0)
		for _, log := range [][]byte{data, framed, append(framed, data...)} {
			var sum int64
			end, skipped := unsalted.scan(log, func(_ record, off, size int64) {
				if off < 0 || size < headerSize || off+size > int64(len(log)) {
					t.Fatalf("record at %d of %d bytes in %d", off, size, len(log))
				}
				sum += size
			})
			if sum+skipped != end || end > int64(len(log)) {
				t.Fatalf("%d bytes of records and %d skipped end at %d", sum, skipped, end)
			}
		}
	})
}

// One short job: a chunk, its result, both acknowledged.
func BenchmarkAttempt(b *testing.B) {
	s := open(b, b.TempDir(), Options{})
	data, blob := bytes.Repeat([]byte("x"), 100), bytes.Repeat([]byte("y"), 600)
	keys := make([]Key, 64)
	for i := range keys {
		keys[i] = Key(fmt.Sprintf("job-01hzzzzzzzzzzzzzzzzzzzzz%02d/1/lease-01hzzzzzzzzzzzzzzzzzzzzzzz", i))
	}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		key := keys[i%len(keys)]
		if err := s.Append(key, Chunk{Seq: 1, Stream: "stdout", Data: data}); err != nil {
			b.Fatal(err)
		}
		if err := s.PutResult(key, blob); err != nil {
			b.Fatal(err)
		}
		s.Ack(key, 1)
		s.AckResult(key)
	}
}

// Output of a chatty job in chunks of 32 KiB, acknowledged a little later.
func BenchmarkOutput(b *testing.B) {
	s := open(b, b.TempDir(), Options{})
	data := bytes.Repeat([]byte("x"), 32<<10)
	b.SetBytes(int64(len(data)))
	for seq := int64(1); b.Loop(); seq++ {
		if err := s.Append("job", Chunk{Seq: seq, Stream: "stdout", Data: data}); err != nil {
			b.Fatal(err)
		}
		s.Ack("job", seq-16)
	}
}
