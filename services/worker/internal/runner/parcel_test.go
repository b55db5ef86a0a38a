package runner

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/workerproto"
)

// A poll's answer says nothing newer than the poll itself, however fresh the
// heartbeats are: those may have overtaken it.
func TestPolledLeaseIsAsOldAsItsPoll(t *testing.T) {
	limit := selfStop(defaultLease)
	in(t, 2, func(t *testing.T, b *bench) {
		poll := b.clock.Now()
		b.clock.pass(limit / 2)
		b.r.Heard(b.clock.Now())
		b.r.AssignPolled(workerproto.Assignment{Lease: lease(1), LeaseSeconds: 60, Job: spec()}, poll)
		synctest.Wait()
		b.clock.pass(limit/2 + 1)
		b.r.GiveUpLeases()
		if got := b.stops(lease(1)); len(got) != 1 {
			t.Error("it runs on after three quarters of its lease")
		}
	})
	in(t, 2, func(t *testing.T, b *bench) {
		poll := b.clock.Now()
		b.clock.pass(limit + 1)
		b.r.Heard(b.clock.Now())
		b.r.AssignPolled(workerproto.Assignment{Lease: lease(1), LeaseSeconds: 60, Job: spec()}, poll)
		if got := b.expect("rejected job-1")[0].reason; got != "the assignment came too late" {
			t.Errorf("rejected with %q", got)
		}
	})
	in(t, 2, func(t *testing.T, b *bench) { // a lease that has waited for its poll
		b.r.AssignPolled(workerproto.Assignment{Lease: lease(1), LeaseSeconds: 20, Job: spec()}, b.clock.Now())
		synctest.Wait()
		b.clock.pass(selfStop(20*time.Second) + 1)
		b.r.GiveUpLeases()
		if got := b.stops(lease(1)); len(got) != 1 {
			t.Error("it runs on after three quarters of what was left of its lease")
		}
	})
}

// One parcel of an attempt is under way at a time, output before the result;
// what is not asked for keeps its turn.
func TestParcels(t *testing.T) {
	in(t, 1, func(t *testing.T, b *bench) {
		pieces := make(chan string)
		b.assign(lease(1), script{finished: true, feed: pieces})
		for _, p := range []string{"one", "two", "three"} {
			b.print(pieces, p)
		}
		take := func(reports, outputs bool) Parcel {
			t.Helper()
			p, ok := b.r.Take(reports, outputs)
			if !ok {
				t.Fatal("nothing to send")
			}
			return p
		}
		none := func(reports, outputs bool) {
			t.Helper()
			if p, ok := b.r.Take(reports, outputs); ok {
				t.Fatalf("%s of %v is sent", p.Type, p.Lease)
			}
		}
		if p := take(true, false); p.Type != workerproto.TypeStarted {
			t.Fatalf("%s comes first", p.Type)
		}
		none(true, false)
		first := take(false, true)
		if len(first.Chunks) != 3 || first.Lease != lease(1) {
			t.Fatalf("%d chunks of %v", len(first.Chunks), first.Lease)
		}
		b.print(pieces, "four")
		none(true, true) // one at a time
		b.ackOutput(lease(1), 3)
		none(true, true) // until it is done
		b.r.Done(first)
		second := take(true, true)
		if len(second.Chunks) != 1 || second.Chunks[0].Seq != 4 {
			t.Fatalf("then %d chunks", len(second.Chunks))
		}
		close(pieces)
		synctest.Wait()
		b.r.Done(second)
		none(true, true) // the result waits for the acknowledgement
		b.ackOutput(lease(1), 4)
		none(false, true)
		res := take(true, false)
		if res.Type != workerproto.TypeResult || len(res.Frame) == 0 {
			t.Fatalf("then %s", res.Type)
		}
		none(true, true)

		// A new session sends again what was not acknowledged, though Done never came.
		b.r.Connected()
		if p := take(true, true); p.Type != workerproto.TypeResult {
			t.Fatalf("the new session sends %s", p.Type)
		}
		b.ackResult(lease(1))
		b.r.Done(res)
		none(true, true)
		b.wantIdle()
	})
}

// A parcel fits into a body, whatever an attempt writes.
func TestParcelsAreBounded(t *testing.T) {
	in(t, 1, func(t *testing.T, b *bench) {
		pieces := make(chan string)
		b.assign(lease(1), script{finished: true, feed: pieces})
		const size = 3 << 20
		b.print(pieces, strings.Repeat("x", size))
		close(pieces)
		synctest.Wait()
		total := 0
		for {
			p, ok := b.r.Take(true, true)
			if !ok {
				break
			}
			if p.Type != workerproto.TypeOutput {
				continue
			}
			bytes := 0
			for _, c := range p.Chunks {
				bytes += len(c.Data)
			}
			if bytes > maxParcelBytes || len(p.Chunks) > maxParcelChunks {
				t.Errorf("a parcel of %d chunks and %d bytes", len(p.Chunks), bytes)
			}
			body, err := workerproto.Encode("", workerproto.Output{Lease: p.Lease, Chunks: p.Chunks})
			if err != nil || len(body) > workerproto.MaxFrameBytes {
				t.Errorf("a body of %d bytes, %v", len(body), err)
			}
			total += bytes
			b.ackOutput(lease(1), p.Chunks[len(p.Chunks)-1].Seq)
			b.r.Done(p)
		}
		if total < size-workerproto.MaxTailBytes {
			t.Errorf("%d bytes were sent", total)
		}
	})
}
