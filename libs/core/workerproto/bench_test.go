package workerproto_test

import (
	"bytes"
	"testing"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
)

func benchLease() workerproto.Lease {
	return workerproto.Lease{JobID: "job-01kp8s6q9v7h3m5d2c4x6z8b0n", Attempt: 1, LeaseID: "lease-01kp8s6q9v7h3m5d2c4x6z8b0n"}
}

func benchHeartbeat() workerproto.Heartbeat {
	return workerproto.Heartbeat{
		ID: 7, WorkerID: "worker-01kp8s6q9v7h3m5d2c4x6z8b0n", Status: workerproto.StatusBusy, FreeSlots: 3, CPUUsage: 12.5, RAMUsage: 2048,
		Running: []workerproto.PhaseLease{{Lease: benchLease(), Phase: workerproto.PhaseStarted}},
	}
}

// BenchmarkHeartbeat is what one heartbeat costs each side's codec.
func BenchmarkHeartbeat(b *testing.B) {
	h := benchHeartbeat()
	frame, err := workerproto.Encode(workerproto.TypeHeartbeat, h)
	if err != nil {
		b.Fatal(err)
	}
	b.Run("encode", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := workerproto.Encode(workerproto.TypeHeartbeat, &h); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("type", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := workerproto.TypeOf(frame); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("decode", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			var got workerproto.Heartbeat
			if err := workerproto.Decode(frame, &got); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkBeat is the answer to a heartbeat.
func BenchmarkBeat(b *testing.B) {
	beat := workerproto.Beat{ID: 7, Confirmed: []string{benchLease().LeaseID}, ServerTime: time.Unix(1_800_000_000, 0).UTC()}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := workerproto.Encode(workerproto.TypeBeat, &beat); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkChunk is a chunk of output as large as recorders make them.
func BenchmarkChunk(b *testing.B) {
	c := workerproto.Chunk{
		Seq: 9, Offset: 9 << 15, Stream: workerproto.Stdout, Time: job.Timestamp(time.Unix(1_800_000_000, 0)), Data: bytes.Repeat([]byte("x"), 32<<10),
	}
	frame, err := workerproto.EncodeChunk(benchLease(), c)
	if err != nil {
		b.Fatal(err)
	}
	b.Run("encode", func(b *testing.B) {
		b.ReportAllocs()
		b.SetBytes(int64(len(c.Data)))
		for b.Loop() {
			if _, err := workerproto.EncodeChunk(benchLease(), c); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("decode", func(b *testing.B) {
		b.ReportAllocs()
		b.SetBytes(int64(len(c.Data)))
		for b.Loop() {
			if _, _, err := workerproto.DecodeChunk(frame); err != nil {
				b.Fatal(err)
			}
		}
	})
}
