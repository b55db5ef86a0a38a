package busmsg

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/fleet"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
)

var t0 = time.Date(2026, 1, 2, 3, 4, 5, 678e6, time.UTC)

// messages has one full value of every body that crosses the bus.
func messages(t *testing.T) []any {
	t.Helper()
	lease := workerproto.Lease{JobID: "job-1", Attempt: 2, LeaseID: "lease-1"}
	chunk := workerproto.Chunk{Seq: 1, Offset: 2, Stream: workerproto.Stdout, Time: t0, Data: []byte("x\xff")}
	spec, errs := job.Normalise(job.Spec{Command: job.Command{Argv: []string{"true"}}})
	if len(errs) > 0 {
		t.Fatal(errs)
	}
	worker := fleet.Worker{
		ID: "w", Hostname: "h", OS: "linux", Arch: "amd64", CPUCores: 1.5, TotalMemory: 1 << 30, Labels: map[string]string{"a": "b"},
		Executors: []string{"process"}, Slots: 2, Version: "1", Protocol: 1, Transport: "websocket", SessionID: "s", EdgeID: "e",
		Online: true, ConnectedAt: t0, LastSeenAt: t0, Drain: true,
	}
	code, yes := 3, true
	return []any{
		Result{
			Result: workerproto.Result{
				WorkerID: "w", Lease: lease, Outcome: job.OutcomeFailed, Reason: job.ReasonExitCode, Message: "m", ExitCode: &code, Signal: "SIGTERM", OOMKilled: true,
				AcceptedAt: t0, PreparedAt: t0, StartedAt: t0, FinishedAt: t0, ImageDigest: "d", PeakMemoryMB: 1, CPUMs: 2, Warm: true,
				Stop: &job.Cancel{GoneAt: t0}, Manifest: &job.Manifest{Chunks: 1, Bytes: 2}, Tail: []workerproto.Chunk{chunk},
			},
			EdgeID: "e", ReceivedAt: t0,
		},
		BeatRequest{EdgeID: "e", Workers: []WorkerBeat{{
			WorkerID: "w", SessionID: "s", Hello: &worker, Holding: []workerproto.Lease{lease}, Closed: true,
			Progress:  []Progress{{Lease: lease, Step: workerproto.TypeRejected, At: t0, Reason: "busy"}},
			Heartbeat: &workerproto.Heartbeat{ID: 1, Status: workerproto.StatusBusy, Running: []workerproto.PhaseLease{{Lease: lease, Phase: workerproto.PhaseEnded}}},
		}}},
		BeatReply{SchedulerID: "s", Workers: []WorkerReply{{
			WorkerID: "w", SessionID: "s", Confirmed: []string{"lease-1"}, Stale: []workerproto.Lease{lease}, Cancel: []workerproto.Lease{lease}, Drain: true,
		}}},
		WorkerCommand{
			Assign: []workerproto.Assignment{{Lease: lease, LeaseSeconds: 60, Job: spec, Traceparent: "t"}},
			Cancel: []workerproto.Lease{lease}, Drain: &yes,
		},
		WorkerCommandReply{SessionID: "s", Assign: []Delivery{{LeaseID: "lease-1", Delivered: true, Reason: "r"}}},
		QueryError{Code: CodeNotFound, Message: "m"},
		GetJob{JobID: "job-1"},
		ListJobs{
			Owner: "ann", States: []job.State{job.Queued}, Queue: "q", Labels: map[string]string{"a": "b"},
			Since: t0, Until: t0, BeforeAt: t0, BeforeID: "job-1", Limit: 5,
		},
		JobPage{Items: []job.Record{job.New("job-1", "ann", spec, t0).WithIdempotency()}, More: true, AsOf: t0},
		Stats{ByState: map[job.State]int64{job.Queued: 1}, AsOf: t0},
		GetLogs{JobID: "job-1", Attempt: 2, Stream: workerproto.Stderr, After: 3, Limit: 4, MaxBytes: 5},
		Logs{Chunks: []workerproto.Chunk{chunk}, More: true, StoredChunks: 1, StoredBytes: 2, Verdict: LogIncomplete},
		Explain{JobID: "job-1"},
		Explanation{JobID: "job-1", Position: 1, BlockedBy: []BlockReason{{Reason: fleet.BlockCPU, Workers: 2}}},
		ListWorkers{},
		WorkerList{Items: []WorkerState{{
			Worker: worker, FreeSlots: 1, Running: 1, Status: fleet.StatusBusy, CPUUsage: 0.5, RAMUsage: 6, SetAsideUntil: t0, Reason: "r",
		}}, AsOf: t0},
		OwnerCount{Owner: "ann"},
		OwnerCounts{Queued: 1, Running: 2},
		DeadLetter{Stream: "s", Consumer: "c", Subject: "x", Sequence: 1 << 63, Reason: "r", At: t0, Data: []byte("\xff")},
	}
}

func TestRoundTrip(t *testing.T) {
	for _, m := range messages(t) {
		typ := reflect.TypeOf(m)
		t.Run(typ.Name(), func(t *testing.T) {
			if v := reflect.ValueOf(m); typ.NumField() > 0 {
				for i := range v.NumField() {
					if v.Field(i).IsZero() {
						t.Errorf("the test leaves %s empty", typ.Field(i).Name)
					}
				}
			}
			data, err := json.Marshal(m)
			if err != nil {
				t.Fatal(err)
			}
			back := reflect.New(typ)
			if err := json.Unmarshal(data, back.Interface()); err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(back.Elem().Interface(), m) {
				t.Errorf("comes back as\n%+v\nwas\n%+v", back.Elem(), m)
			}
			// A newer sender's fields are ignored.
			newer := strings.TrimSuffix(string(data), "}")
			if len(data) > 2 {
				newer += ","
			}
			again := reflect.New(typ)
			if err := json.Unmarshal([]byte(newer+`"zzNew":[{}]}`), again.Interface()); err != nil || !reflect.DeepEqual(again.Elem().Interface(), m) {
				t.Errorf("with a new field it comes back as %+v, %v", again.Elem(), err)
			}
		})
	}
}

// TestZeroValues: what is absent stays absent, so that a zero time is no year 1
// for a reader, and an edge's short beat is short.
func TestZeroValues(t *testing.T) {
	for want, m := range map[string]any{
		`{"workerId":"","sessionId":""}`: WorkerBeat{},
		`{"limit":0}`:                    ListJobs{},
		`{}`:                             WorkerCommand{},
	} {
		data, err := json.Marshal(m)
		if err != nil || string(data) != want {
			t.Errorf("%T: %s, %v, want %s", m, data, err, want)
		}
	}
}

func TestQueryError(t *testing.T) {
	var err error = &QueryError{Code: CodeUnavailable, Message: "the database is away"}
	if err.Error() != "unavailable: the database is away" {
		t.Errorf("got %q", err)
	}
}
