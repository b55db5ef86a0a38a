package runner

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"runtime"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/services/worker/internal/spool"
)

// print prints a piece as a chunk of its own.
func (b *bench) print(pieces chan<- string, text string) {
	pieces <- text
	synctest.Wait()
	time.Sleep(quietFor + time.Millisecond) // longer than output waits for more of its kind
	synctest.Wait()
}

func chunksOf(frames []sent) []workerproto.Chunk {
	var out []workerproto.Chunk
	for _, s := range frames {
		if s.kind == workerproto.TypeOutput {
			out = append(out, s.chunk)
		}
	}
	return out
}

func TestAcksInAnyOrder(t *testing.T) {
	in(t, 1, func(t *testing.T, b *bench) {
		pieces := make(chan string)
		b.assign(lease(1), script{finished: true, feed: pieces})
		for _, p := range []string{"one", "two", "three"} {
			b.print(pieces, p)
		}
		got := chunksOf(b.expect("started job-1", "output job-1 1", "output job-1 2", "output job-1 3"))
		b.ackOutput(lease(1), 2)
		b.ackOutput(lease(1), 1)                                               // late
		b.ackOutput(lease(1), 2)                                               // a repeat
		b.ackOutput(lease(2), 9)                                               // of nobody
		b.ackOutput(workerproto.Lease{JobID: lease(1).JobID, Attempt: 2}, 100) // of another attempt
		b.ackResult(lease(1))                                                  // of a result that does not exist
		if _, err := b.spool.Read(b.r.attempts[lease(1).LeaseID].key(), 3); err != nil {
			t.Errorf("the third chunk is not kept: %v", err)
		}
		b.print(pieces, "four")
		got = append(got, chunksOf(b.expect("output job-1 4"))...)
		close(pieces)
		synctest.Wait()
		b.expect()
		b.ackOutput(lease(1), 3)
		b.expect()
		b.ackOutput(lease(1), 100) // more than there is
		res := b.expect("result job-1 succeeded")[0].result
		checkManifest(t, got, res.Manifest)
		b.ackOutput(lease(1), 4)
		b.ackResult(lease(1))
		b.wantIdle()
	})
}

func TestNewSessionGetsWhatWasNotAcknowledged(t *testing.T) {
	in(t, 1, func(t *testing.T, b *bench) {
		pieces := make(chan string)
		b.assign(lease(1), script{finished: true, feed: pieces})
		for _, p := range []string{"one", "two", "three"} {
			b.print(pieces, p)
		}
		first := chunksOf(b.frames())
		b.ackOutput(lease(1), 1)
		b.r.Connected()
		if got := b.r.Holding(); len(got) != 1 || got[0].Lease != lease(1) || got[0].LastSeq != 3 {
			t.Errorf("holding %+v", got)
		}
		b.ackOutput(lease(1), 3) // an answer to the session before: this one sends it all the same
		b.expect("started job-1", "output job-1 2", "output job-1 3")
		b.r.Connected() // before any answer
		b.print(pieces, "four")
		b.frames()
		pieces <- "five"
		close(pieces) // ends with output that was sent, and some that was not
		synctest.Wait()
		b.r.Connected()
		again := chunksOf(b.expect("output job-1 2", "output job-1 3", "output job-1 4"))
		b.ackOutput(lease(1), 4)
		res := b.expect("result job-1 succeeded")[0].result
		checkManifest(t, slices.Concat(first[:1], again, res.Tail), res.Manifest)
		b.r.Connected()
		b.expect("result job-1 succeeded") // again, until it is acknowledged
		b.ackResult(lease(1))
		b.r.Connected()
		b.expect()
		b.wantIdle()
	})
}

// What an earlier session has sent may be on the bus: it does not ride in the
// result too, while what never left does.
func TestTailHoldsOnlyWhatWasNeverSent(t *testing.T) {
	in(t, 1, func(t *testing.T, b *bench) {
		pieces := make(chan string)
		b.assign(lease(1), script{finished: true, feed: pieces})
		b.print(pieces, "one")
		b.print(pieces, "two")
		sentOnce := chunksOf(b.expect("started job-1", "output job-1 1", "output job-1 2"))
		b.r.Connected()
		pieces <- "three"
		close(pieces)
		synctest.Wait()
		b.expect("started job-1", "output job-1 1", "output job-1 2")
		b.ackOutput(lease(1), 2)
		res := b.expect("result job-1 succeeded")[0].result
		if len(res.Tail) != 1 || string(res.Tail[0].Data) != "three" {
			t.Errorf("tail is %+v", res.Tail)
		}
		checkManifest(t, append(sentOnce, res.Tail...), res.Manifest)
	})
}

// An edge that acknowledges nothing costs bounded memory, and gets no more than
// the protocol allows; what is beyond is on the disk, and comes in order.
func TestBackPressure(t *testing.T) {
	const size = 12 << 20
	in(t, 2, func(t *testing.T, b *bench) {
		data := make([]byte, size)
		if _, err := rand.Read(data); err != nil {
			t.Fatal(err)
		}
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		for n := range 2 {
			b.assign(lease(n), script{finished: true, output: func(o, _ io.Writer) { _, _ = io.Copy(o, bytes.NewReader(data)) }})
		}
		synctest.Wait()
		got := map[workerproto.Lease][]workerproto.Chunk{}
		frames := b.frames()
		inFlight := map[workerproto.Lease]int{}
		for _, s := range frames {
			if s.kind == workerproto.TypeOutput {
				inFlight[s.lease] += len(s.chunk.Data)
				got[s.lease] = append(got[s.lease], s.chunk)
			}
		}
		frames = nil
		for l, n := range inFlight {
			if n > workerproto.MaxUnackedBytes {
				t.Errorf("%d bytes of %s are ahead of acknowledgements", n, l.JobID)
			}
		}
		b.r.mu.Lock()
		held := b.r.memory
		b.r.mu.Unlock()
		if held > 2*memoryPerAttempt {
			t.Errorf("%d bytes are held for two attempts", held)
		}
		sentBytes := 0
		for _, n := range inFlight {
			sentBytes += n
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc) - int64(sentBytes); grown > 3*2*memoryPerAttempt {
			t.Errorf("the heap has grown by %d bytes", grown)
		}
		if len(inFlight) != 2 {
			t.Fatalf("output of %d attempts was sent, want both", len(inFlight))
		}
		results := map[workerproto.Lease]workerproto.Result{}
		for range 10_000 {
			if len(results) == 2 {
				break
			}
			for l, chunks := range got {
				b.ackOutput(l, chunks[len(chunks)-1].Seq)
			}
			for _, s := range b.frames() {
				switch s.kind {
				case workerproto.TypeOutput:
					got[s.lease] = append(got[s.lease], s.chunk)
				case workerproto.TypeResult:
					results[s.lease] = s.result
				}
			}
		}
		for n := range 2 {
			res, ok := results[lease(n)]
			if !ok {
				t.Fatalf("no result of %s", lease(n).JobID)
			}
			chunks := append(got[lease(n)], res.Tail...)
			checkManifest(t, chunks, res.Manifest)
			sum := sha256.New()
			for _, c := range chunks {
				sum.Write(c.Data)
			}
			if want := sha256.Sum256(data); !bytes.Equal(sum.Sum(nil), want[:]) {
				t.Errorf("the output of %s is not what was printed", lease(n).JobID)
			}
			b.ackResult(lease(n))
		}
		b.wantIdle()
	})
}

func TestMemoryOfTinyChunksIsBounded(t *testing.T) {
	in(t, 1, func(t *testing.T, b *bench) {
		a := newAttempt(b.r, workerproto.Assignment{Lease: lease(1)})
		a.loud = true
		for seq := int64(1); a.memory+1+chunkOverhead <= memoryPerAttempt; seq++ {
			if err := a.keep(workerproto.Chunk{Seq: seq, Stream: workerproto.Stdout, Time: time.Now(), Data: []byte("x")}); err != nil {
				t.Fatal(err)
			}
		}
		if n := len(a.pending); n > memoryPerAttempt/chunkOverhead {
			t.Errorf("%d chunks are in memory", n)
		}
		b.r.mu.Lock()
		defer b.r.mu.Unlock()
		b.r.attempts[lease(1).LeaseID] = a
		b.r.forget(a)
	})
}

// restart ends the worker without a word, as kill -9 does: the spool's files are
// as they are then.
func (b *bench) restart(slots int) {
	b.t.Helper()
	if err := b.spool.Close(); err != nil {
		b.t.Fatal(err)
	}
	b.open(slots)
}

func TestResultsOutliveTheWorker(t *testing.T) {
	in(t, 4, func(t *testing.T, b *bench) {
		pieces := make(chan string)
		b.assign(lease(1), script{finished: true, output: say("in the result")})
		b.assign(lease(2), script{finished: true, feed: pieces})
		b.print(pieces, "one")
		b.print(pieces, "two")
		b.frames() // the first is sent
		b.ackOutput(lease(2), 1)
		b.r.Connected()
		pieces <- "three"
		close(pieces)
		synctest.Wait()
		b.assign(lease(3), script{finished: true})
		b.ackResult(lease(3))

		for range 2 { // restarts
			b.restart(4)
			holding := map[string]int64{}
			for _, l := range b.r.Holding() {
				holding[l.JobID] = l.LastSeq
			}
			if fmt.Sprint(holding) != fmt.Sprint(map[string]int64{"job-1": 1, "job-2": 3}) {
				t.Fatalf("holding %v after a restart", holding)
			}
			if h := b.r.Heartbeat(); len(h.Running) != 2 || h.FreeSlots != 4 {
				t.Errorf("the heartbeat says %+v", h)
			}
		}
		b.r.Cancel(lease(1))
		b.r.GiveUpLeases()
		b.r.Connected()
		frames := b.frames()
		slices.SortFunc(frames, func(a, c sent) int { return bytes.Compare([]byte(a.String()), []byte(c.String())) })
		if got := fmt.Sprint(frames); got != "[output job-2 2 result job-1 succeeded]" {
			t.Fatalf("frames are %s", got)
		}
		checkManifest(t, frames[1].result.Tail, frames[1].result.Manifest)
		b.ackOutput(lease(2), 2)
		res := b.expect("result job-2 succeeded")[0].result
		one := workerproto.Chunk{Seq: 1, Data: []byte("one")}
		checkManifest(t, append([]workerproto.Chunk{one, frames[0].chunk}, res.Tail...), res.Manifest)
		b.ackResult(lease(1))
		b.ackResult(lease(2))
		b.wantIdle()
		b.restart(4)
		b.wantIdle()
	})
}

func TestAttemptThatDiedWithTheWorkerIsForgotten(t *testing.T) {
	in(t, 1, func(t *testing.T, b *bench) {
		err := b.spool.Append("job-1/1/lease", spool.Chunk{Seq: 1, Stream: "stdout", Data: []byte("half of it")})
		if err != nil {
			t.Fatal(err)
		}
		b.restart(1)
		b.wantIdle()
		b.r.Connected()
		b.expect()
	})
}

func TestResultsOfAnotherWorkerAreNotTaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, 1)
		b.assign(lease(1), script{finished: true})
		b.close()
		var err error
		if b.spool, err = spool.Open(b.dir, spool.Options{SyncAfter: time.Hour}); err != nil {
			t.Fatal(err)
		}
		cfg := b.config(1)
		cfg.WorkerID = "worker-2"
		if _, err := New(cfg); err == nil || !bytes.Contains([]byte(err.Error()), []byte(me)) {
			t.Errorf("error is %v", err)
		}
		b.restart(1) // as the worker that it is
		defer b.close()
		if got := b.r.Holding(); len(got) != 1 {
			t.Errorf("holding %v", got)
		}
	})
}

// Chunks that the disk has lost are replaced under their number: an edge takes
// no gap, and the manifest shows what is missing.
func TestLostChunksDoNotHoldUpTheResult(t *testing.T) {
	in(t, 1, func(t *testing.T, b *bench) {
		pieces := make(chan string)
		b.assign(lease(1), script{finished: true, feed: pieces})
		for range 6 {
			b.print(pieces, "x")
		}
		b.frames()
		close(pieces)
		synctest.Wait()
		b.ackOutput(lease(1), 1)
		if err := b.spool.Close(); err != nil {
			t.Fatal(err)
		}
		var err error
		if b.spool, err = spool.Open(b.dir, spool.Options{SyncAfter: time.Hour}); err != nil {
			t.Fatal(err)
		}
		left := b.spool.Recovered()[0]
		if len(left.Chunks) != 5 || left.Result == nil {
			t.Fatalf("the spool has %+v", left)
		}
		left.Chunks = []spool.ChunkInfo{left.Chunks[0], left.Chunks[3]} // 2 and 5, not 3, 4 and 6
		if b.r, err = New(b.config(1)); err != nil {
			t.Fatal(err)
		}
		a, err := b.r.recovered(left)
		if err != nil {
			t.Fatal(err)
		}
		b.r.attempts[lease(1).LeaseID] = a
		if err := b.spool.Drop(left.Key); err != nil { // and the file system spoils the rest
			t.Fatal(err)
		}
		b.r.Connected()
		got := b.expect("output job-1 2", "output job-1 3", "output job-1 4", "output job-1 5", "output job-1 6")
		for _, s := range got {
			if s.chunk.Stream != workerproto.System {
				t.Errorf("chunk %d is %q", s.chunk.Seq, s.chunk.Data)
			}
		}
		b.ackOutput(lease(1), 6)
		b.expect("result job-1 succeeded")
		b.ackResult(lease(1))
	})
}

func TestFullSpoolIsDeclared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, 1)
		if err := b.spool.Close(); err != nil {
			t.Fatal(err)
		}
		var err error
		if b.spool, err = spool.Open(b.dir, spool.Options{MaxBytes: 256 << 10}); err != nil {
			t.Fatal(err)
		}
		if b.r, err = New(b.config(1)); err != nil {
			t.Fatal(err)
		}
		defer b.close()
		const size = 1 << 20
		b.assign(lease(1), script{finished: true, output: func(o, _ io.Writer) { _, _ = o.Write(make([]byte, size)) }})
		got := chunksOf(b.frames())
		b.ackOutput(lease(1), got[len(got)-1].Seq)
		res := b.expect("result job-1 succeeded")[0].result
		checkManifest(t, append(got, res.Tail...), res.Manifest)
		if res.Manifest.TruncatedBytes < size-256<<10 {
			t.Errorf("declared %d lost bytes", res.Manifest.TruncatedBytes)
		}
	})
}

// TestAnyOrder lets assignments, output, ends, acknowledgements, reconnects and
// restarts come in random order. Whatever it is: an edge that takes chunks as
// they come, without gaps, ends up with exactly what each manifest declares.
func TestAnyOrder(t *testing.T) {
	for seed := range uint64(12) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			in(t, 4, func(t *testing.T, b *bench) { anyOrder(t, b, mathrand.New(mathrand.NewPCG(seed, 1))) })
		})
	}
}

// edgeSide is what the bus has.
type edgeSide struct {
	chunks  map[workerproto.Lease][]workerproto.Chunk // deduplicated
	results map[workerproto.Lease]workerproto.Result
}

func (e *edgeSide) take(t *testing.T, s sent) {
	switch s.kind {
	case workerproto.TypeOutput:
		have := int64(len(e.chunks[s.lease]))
		if s.chunk.Seq > have+1 {
			t.Fatalf("%s: chunk %d came after %d", s.lease.JobID, s.chunk.Seq, have)
		}
		if s.chunk.Seq == have+1 {
			e.chunks[s.lease] = append(e.chunks[s.lease], s.chunk)
		}
	case workerproto.TypeResult:
		if old, ok := e.results[s.lease]; ok && old.Outcome != s.result.Outcome {
			t.Fatalf("%s: two results, %s and %s", s.lease.JobID, old.Outcome, s.result.Outcome)
		}
		e.results[s.lease] = s.result
	}
}

func anyOrder(t *testing.T, b *bench, rng *mathrand.Rand) {
	edge := &edgeSide{chunks: map[workerproto.Lease][]workerproto.Chunk{}, results: map[workerproto.Lease]workerproto.Result{}}
	running := map[workerproto.Lease]chan string{}
	var started []workerproto.Lease
	var wire []sent // written and not yet read by the edge
	assigned := 0
	pick := func() (workerproto.Lease, bool) {
		if len(running) == 0 {
			return workerproto.Lease{}, false
		}
		var all []workerproto.Lease
		for _, l := range started {
			if running[l] != nil {
				all = append(all, l)
			}
		}
		return all[rng.IntN(len(all))], true
	}
	for range 300 {
		switch rng.IntN(9) {
		case 0, 1:
			if len(running) < 4 {
				assigned++
				l := lease(assigned)
				pieces := make(chan string)
				running[l] = pieces
				started = append(started, l)
				b.assign(l, script{finished: true, feed: pieces})
			}
		case 2, 3:
			if l, ok := pick(); ok {
				running[l] <- string(bytes.Repeat([]byte{byte('a' + rng.IntN(26))}, 1+rng.IntN(40<<10)))
			}
		case 4:
			if l, ok := pick(); ok {
				close(running[l])
				delete(running, l)
			}
		case 5:
			time.Sleep(time.Duration(rng.IntN(100)) * time.Millisecond)
		case 6: // the session writes a few frames
			for range rng.IntN(8) {
				if f, ok := b.r.take(); ok {
					wire = append(wire, b.decode(f))
				}
			}
		case 7: // the edge reads, stores and acknowledges
			n := rng.IntN(len(wire) + 1)
			for _, s := range wire[:n] {
				edge.take(t, s)
				switch {
				case rng.IntN(4) == 0: // its answer gets lost
				case s.kind == workerproto.TypeOutput:
					b.ackOutput(s.lease, int64(len(edge.chunks[s.lease])))
				case s.kind == workerproto.TypeResult:
					b.ackResult(s.lease)
				}
			}
			wire = wire[n:]
		case 8:
			if rng.IntN(4) == 0 { // the connection breaks; some of what was written arrives
				for _, s := range wire[:rng.IntN(len(wire)+1)] {
					edge.take(t, s)
				}
				wire = nil
				if len(running) == 0 && rng.IntN(2) == 0 {
					synctest.Wait()
					b.restart(4)
				}
				b.r.Connected()
			}
		}
		synctest.Wait()
	}
	for _, pieces := range running {
		close(pieces)
	}
	synctest.Wait()
	for range 1000 {
		if b.r.Idle() {
			break
		}
		for _, s := range append(wire, b.frames()...) {
			edge.take(t, s)
			if s.kind == workerproto.TypeResult {
				b.ackResult(s.lease)
			} else {
				b.ackOutput(s.lease, int64(len(edge.chunks[s.lease])))
			}
		}
		wire = nil
		b.r.Connected() // for answers that were lost
	}
	b.wantIdle()
	for _, l := range started {
		res, ok := edge.results[l]
		if !ok {
			t.Fatalf("no result of %s", l.JobID)
		}
		checkManifest(t, append(edge.chunks[l], res.Tail...), res.Manifest)
	}
}
