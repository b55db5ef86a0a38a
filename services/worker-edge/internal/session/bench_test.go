package session

import (
	"context"
	"fmt"
	"log/slog"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/fleet"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
	"github.com/cmdexec/cmdexec/libs/kit/lifecycle"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// answering is a bus on which a scheduler confirms every lease.
type answering struct{ Bus }

func (answering) RequestBeat(_ context.Context, r busmsg.BeatRequest) (busmsg.BeatReply, error) {
	reply := busmsg.BeatReply{SchedulerID: "scheduler", Workers: make([]busmsg.WorkerReply, len(r.Workers))}
	for i := range r.Workers {
		reply.Workers[i] = busmsg.WorkerReply{WorkerID: r.Workers[i].WorkerID, SessionID: r.Workers[i].SessionID}
	}
	return reply, nil
}

// deaf is a peer that throws away what it is sent.
type deaf struct{ Peer }

func (deaf) Send(workerproto.Type, any)  {}
func (deaf) Welcome(workerproto.Welcome) {}

// BenchmarkBeats is what a heartbeat costs the edge between its frame and the
// frame of its answer, with the heartbeats of 20 workers in one request to the
// scheduler, as those of a thousand are.
func BenchmarkBeats(b *testing.B) {
	const workers = 20
	hub := NewHub(Options{
		Bus: answering{}, EdgeID: "edge", Lease: time.Minute, Heartbeat: 5 * time.Second, MaxInflightBytes: 1 << 20,
		Logger: slog.New(slog.DiscardHandler), Metrics: NewMetrics(nil),
	})
	hub.base = b.Context()
	sessions := make([]*Session, workers)
	for i := range sessions {
		w := fleet.Worker{ID: fmt.Sprintf("worker-%d", i), SessionID: fmt.Sprintf("session-%d", i)}
		sessions[i] = newSession(hub, w, &workerproto.Register{}, auth.WorkerClaims{ExpiresAt: time.Now().Add(time.Hour)}, deaf{})
		sessions[i].report.greeted = true
	}
	backoff := lifecycle.Backoff{Max: time.Second}
	b.ReportAllocs()
	for n := 0; b.Loop(); n++ {
		s := sessions[n%workers]
		if err := s.Heartbeat(workerproto.Heartbeat{ID: int64(n), Status: workerproto.StatusIdle, FreeSlots: 2}); err != nil {
			b.Fatal(err)
		}
		if n%workers == workers-1 && !hub.beater.flush(b.Context(), &backoff) {
			b.Fatal("not answered")
		}
	}
}
