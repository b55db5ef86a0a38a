package workerproto

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/job"
)

var update = flag.Bool("update", false, "write golden files that do not exist yet")

var t0 = time.Date(2026, 1, 2, 3, 4, 5, 678e6, time.UTC)

func ptr[T any](v T) *T { return &v }

func lease() Lease {
	return Lease{JobID: "job-01k00000000000000000000000", Attempt: 2, LeaseID: "lease-01k00000000000000000000001"}
}

func chunk() Chunk {
	return Chunk{Seq: 7, Offset: 4096, Stream: Stderr, Time: t0, Data: []byte("oh no\n\x00\xff")}
}

// frame is a frame of each type, as version 1 writes it. into makes the value
// that a reader decodes it into.
type frame struct {
	file string // below testdata/v1
	typ  Type
	body any
	into func() any
}

func frames(t testing.TB) []frame {
	t.Helper()
	spec, errs := job.Normalise(job.Spec{
		Name: "nightly", Command: job.Command{Argv: []string{"sh", "-c", "echo <&>"}}, ContainerImage: "ghcr.io/a/b:1", Timeout: 60,
		Labels: map[string]string{"team": "x"}, Env: map[string]string{"A": "1", "B": "2"}, WorkingDir: "/work", User: "1000", Stdin: "in\n",
		Files: []job.File{{Path: "a/b", Content: "c", Mode: "0755"}}, Constraints: job.Constraints{OS: "linux"},
	})
	if len(errs) > 0 {
		t.Fatal(errs)
	}
	small, errs := job.Normalise(job.Spec{Command: job.Command{Shell: "true"}})
	if len(errs) > 0 {
		t.Fatal(errs)
	}
	return []frame{
		{"worker/hello.json", TypeHello, Register{
			WorkerID: "worker-1", Hostname: "host", OS: "linux", Arch: "amd64", CPUCores: 3.5, TotalMemory: 8 << 30,
			Labels: map[string]string{"zone": "a"}, Executors: []string{"docker", "process"}, Slots: 4, Version: "1.0.0", Protocol: 1,
			Running: []RunningLease{{Lease: lease(), LastSeq: 41}},
		}, func() any { return new(Register) }},
		{"worker/heartbeat.json", TypeHeartbeat, Heartbeat{
			ID: 12, Status: StatusBusy, CPUUsage: 12.5, RAMUsage: 2048, FreeSlots: 3, Running: []PhaseLease{{Lease: lease(), Phase: PhaseStarted}}, Reason: "disk is full",
		}, func() any { return new(Heartbeat) }},
		{"worker/heartbeat-idle.json", TypeHeartbeat, Heartbeat{Status: StatusIdle, Running: []PhaseLease{}}, func() any { return new(Heartbeat) }},
		{"worker/accepted.json", TypeAccepted, Progress{Lease: lease(), At: t0}, func() any { return new(Progress) }},
		{"worker/preparing.json", TypePreparing, Progress{Lease: lease(), At: t0}, func() any { return new(Progress) }},
		{"worker/started.json", TypeStarted, Progress{Lease: lease(), At: t0}, func() any { return new(Progress) }},
		{"worker/rejected.json", TypeRejected, Rejected{Lease: lease(), Reason: "draining"}, func() any { return new(Rejected) }},
		{"worker/output.json", TypeOutput, Output{Lease: lease(), Chunks: []Chunk{
			{Seq: 6, Offset: 0, Stream: Stdout, Time: t0, Data: []byte("hi\n")}, chunk(), {Seq: 8, Offset: 0, Stream: System, Time: t0, Data: []byte("cut")},
		}}, func() any { return new(Output) }},
		{"worker/result.json", TypeResult, Result{
			Lease: lease(), Outcome: job.OutcomeFailed, Reason: job.ReasonOOMKilled, Message: "killed", ExitCode: ptr(137), Signal: "SIGKILL", OOMKilled: true,
			AcceptedAt: t0, PreparedAt: t0.Add(time.Second), StartedAt: t0.Add(2 * time.Second), FinishedAt: t0.Add(3 * time.Second),
			ImageDigest: "sha256:00", PeakMemoryMB: 63, CPUMs: 990, Warm: true,
			Stop:     &job.Cancel{RequestedAt: t0, DeliveredAt: t0, SignalledAt: t0, ExitedAt: t0, GoneAt: t0, StopUnconfirmed: true},
			Manifest: &job.Manifest{Chunks: 8, Bytes: 4107, SHA256: "ab", TruncatedBytes: 5}, Tail: []Chunk{chunk()},
		}, func() any { return new(Result) }},
		{"worker/result-plain.json", TypeResult, Result{Lease: lease(), Outcome: job.OutcomeSucceeded, ExitCode: ptr(0), FinishedAt: t0}, func() any { return new(Result) }},
		{"worker/result-unstarted.json", TypeResult, Result{Lease: lease(), Outcome: job.OutcomeFailed, Reason: job.ReasonImagePullFailed, FinishedAt: t0}, func() any { return new(Result) }},
		{"edge/welcome.json", TypeWelcome, Welcome{HeartbeatSeconds: 5, LeaseSeconds: 60, ServerTime: t0, Protocol: 1, Stale: []Lease{lease()}}, func() any { return new(Welcome) }},
		{"edge/beat.json", TypeBeat, Beat{
			ID: 12, Confirmed: []string{"lease-1"}, Stale: []string{"lease-2"}, Cancel: []Lease{lease()}, Drain: true, Token: "t.o.k", ServerTime: t0,
		}, func() any { return new(Beat) }},
		{"edge/beat-plain.json", TypeBeat, Beat{ServerTime: t0}, func() any { return new(Beat) }},
		{"edge/assign.json", TypeAssign, Assign{Assignments: []Assignment{
			{Lease: lease(), LeaseSeconds: 60, Job: spec, Traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}, {Lease: lease(), LeaseSeconds: 60, Job: small},
		}}, func() any { return new(Assign) }},
		{"edge/cancel.json", TypeCancel, Cancel{Lease: lease()}, func() any { return new(Cancel) }},
		{"edge/drain.json", TypeDrain, Drain{Drain: true}, func() any { return new(Drain) }},
		{"edge/ack-output.json", TypeAck, Ack{JobID: lease().JobID, Attempt: 2, AckedSeq: 41}, func() any { return new(Ack) }},
		{"edge/ack-results.json", TypeAck, Ack{Results: []Lease{lease()}}, func() any { return new(Ack) }},
		{"edge/stale.json", TypeStale, Stale{Leases: []Lease{lease()}}, func() any { return new(Stale) }},
		{"edge/token.json", TypeToken, Token{Token: "t.o.k"}, func() any { return new(Token) }},
		{"edge/goaway.json", TypeGoaway, Goaway{RetryAfterMs: 1500, Reason: "restart"}, func() any { return new(Goaway) }},
	}
}

// golden compares got with a file byte by byte. The files are the contract with
// released workers: one that differs needs a new version, not a new file.
// The flag -update writes those of new frames, and changes none.
func golden(t *testing.T, file string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", "v1", filepath.FromSlash(file))
	want, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) && *update {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s: this is another wire format\n got %s\nwant %s", file, got, want)
	}
}

func TestGoldenFrames(t *testing.T) {
	seen := map[Type]bool{}
	files := []string{"worker/chunk.bin"}
	for _, f := range frames(t) {
		t.Run(f.file, func(t *testing.T) {
			got, err := Encode(f.typ, f.body)
			if err != nil {
				t.Fatal(err)
			}
			golden(t, f.file, got)
			typ, err := TypeOf(got)
			if err != nil || typ != f.typ {
				t.Errorf("the type is %q, %v", typ, err)
			}
			into := f.into()
			if err := Decode(got, into); err != nil {
				t.Fatal(err)
			}
			if back := reflect.ValueOf(into).Elem().Interface(); !reflect.DeepEqual(back, f.body) {
				t.Errorf("comes back as\n%+v\nwas\n%+v", back, f.body)
			}
		})
		seen[f.typ] = true
		files = append(files, f.file)
	}
	for _, typ := range []Type{
		TypeHello, TypeHeartbeat, TypeAccepted, TypePreparing, TypeStarted, TypeRejected, TypeOutput, TypeResult,
		TypeWelcome, TypeBeat, TypeAssign, TypeCancel, TypeDrain, TypeAck, TypeStale, TypeToken, TypeGoaway,
	} {
		if !seen[typ] {
			t.Errorf("no golden frame of type %s", typ)
		}
	}
	found, err := filepath.Glob(filepath.Join("testdata", "v1", "*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range found {
		rel, _ := filepath.Rel(filepath.Join("testdata", "v1"), path)
		if !slices.Contains(files, filepath.ToSlash(rel)) {
			t.Errorf("%s is held by no test", path)
		}
	}
}

func TestGoldenChunkFrame(t *testing.T) {
	got, err := EncodeChunk(lease(), chunk())
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "worker/chunk.bin", got)
	l, c, err := DecodeChunk(got)
	if err != nil || l != lease() || !reflect.DeepEqual(c, chunk()) {
		t.Errorf("comes back as %+v %+v, %v", l, c, err)
	}
	if err := c.Validate(); err != nil {
		t.Error(err)
	}
}

// TestNewerPeersAreTolerated: a field and a type that this version does not know
// are no reason to fail.
func TestNewerPeersAreTolerated(t *testing.T) {
	for _, f := range frames(t) {
		data, err := Encode(f.typ, f.body)
		if err != nil {
			t.Fatal(err)
		}
		newer := append(bytes.TrimSuffix(data, []byte("}")), `,"zzNew":{"deep":[1,null,"x"]},"zzOther":null}`...)
		into := f.into()
		if err := Decode(newer, into); err != nil {
			t.Errorf("%s: %v", f.typ, err)
		} else if back := reflect.ValueOf(into).Elem().Interface(); !reflect.DeepEqual(back, f.body) {
			t.Errorf("%s: the new fields changed it to %+v", f.typ, back)
		}
		if typ, err := TypeOf(newer); err != nil || typ != f.typ {
			t.Errorf("%s is read as %s, %v", f.typ, typ, err)
		}
	}
	if typ, err := TypeOf([]byte(`{"type":"telepathy","x":1}`)); err != nil || typ != "telepathy" {
		t.Errorf("an unknown type: %q, %v", typ, err)
	}
	var h ChunkHeader
	if err := json.Unmarshal([]byte(`{"seq":1,"zz":2}`), &h); err != nil || h.Seq != 1 {
		t.Errorf("%+v, %v", h, err)
	}
}

func TestTypeOf(t *testing.T) {
	for in, want := range map[string]Type{
		`{"type":"hello"}`: TypeHello, ` {"type":"hello"}`: TypeHello, `{"a":1,"type":"hello"}`: TypeHello, `{ "type" : "hello" }`: TypeHello,
		`{"type":"h\u0065llo"}`: TypeHello, `{"type":"a\"b"}`: `a"b`, "{\"type\":\"a\xffb\"}": "a\uFFFDb", `{"type":"größe"}`: "größe",
	} {
		if got, err := TypeOf([]byte(in)); err != nil || got != want {
			t.Errorf("%s: %q, %v, want %q", in, got, err, want)
		}
	}
	for _, in := range []string{
		``, `{}`, `null`, `[]`, `"hello"`, `{"type":""}`, `{"type":1}`, `{"type":null}`, `{"type":["hello"]}`, `{"type":"hello`, `{"type":`, "{\"type\":\"a\nb\"}", "\xef\xbb\xbf{\"type\":\"hello\"}",
	} {
		if got, err := TypeOf([]byte(in)); !errors.Is(err, ErrFrame) {
			t.Errorf("%q: %q, %v", in, got, err)
		}
	}
}

func TestEncodeRefuses(t *testing.T) {
	for _, body := range []any{1, "x", []int{1}, nil, func() {}, Progress{At: time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC)}} {
		if data, err := Encode(TypeHello, body); err == nil {
			t.Errorf("%T was written as %s", body, data)
		}
	}
	if data, err := Encode(TypeDrain, struct{}{}); err != nil || string(data) != `{"type":"drain"}` {
		t.Errorf("an empty body: %s, %v", data, err)
	}
}

// TestErrorsNeverEchoValues: what a worker sent must not get into logs and close reasons.
func TestErrorsNeverEchoValues(t *testing.T) {
	const canary = "sk_canary_7"
	for _, in := range []string{
		`{"workerId":{"` + canary + `":1}}`, `{"labels":{"` + canary + `":1}}`, `{"slots":"` + canary + `"}`, `{"slots":` + canary + `}`, canary,
		`{"running":[{"attempt":"` + canary + `"}]}`, `{"executors":{"` + canary + `":[]}}`,
	} {
		if err := Decode([]byte(in), new(Register)); !errors.Is(err, ErrFrame) || strings.Contains(err.Error(), "canary") {
			t.Errorf("%s: %v", in, err)
		}
	}
	for _, in := range []string{`{"assignments":[{"job":{"command":{"` + canary + `":1}}}]}`, `{"assignments":[{"job":{"command":"x","env":{"` + canary + `":1}}}]}`, `{"assignments":[{"job":{"timeout":"` + canary + `"}}]}`} {
		if err := Decode([]byte(in), new(Assign)); !errors.Is(err, ErrFrame) || strings.Contains(err.Error(), "canary") {
			t.Errorf("%s: %v", in, err)
		}
	}
	head := `{"seq":"` + canary + `"}`
	if _, _, err := DecodeChunk(append([]byte{0, 0, 0, byte(len(head))}, head...)); !errors.Is(err, ErrFrame) || strings.Contains(err.Error(), "canary") {
		t.Errorf("chunk header: %v", err)
	}
}

func TestDecodeChunkRefuses(t *testing.T) {
	good, err := EncodeChunk(lease(), chunk())
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{
		"nothing": nil, "no length": {0, 0, 0}, "length past the end": {0, 0, 0, 9, '{', '}'}, "length over the limit": append([]byte{0, 0, 4, 1}, bytes.Repeat([]byte(" "), 2048)...),
		"negative as signed": {0xff, 0xff, 0xff, 0xff, '{', '}'}, "no header": {0, 0, 0, 0}, "cut header": good[:40], "not JSON": {0, 0, 0, 2, 'h', 'i'}, "wrong type": append([]byte{0, 0, 0, 11}, `{"seq":"x"}`...),
	} {
		if _, _, err := DecodeChunk(data); !errors.Is(err, ErrFrame) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestChunkValidate(t *testing.T) {
	for _, c := range []struct {
		name     string
		at, past func(*Chunk)
	}{
		{"seq", func(c *Chunk) { c.Seq = 1 }, func(c *Chunk) { c.Seq = 0 }},
		{"negative seq", func(c *Chunk) { c.Seq = 1 << 62 }, func(c *Chunk) { c.Seq = -1 }},
		{"offset", func(c *Chunk) { c.Offset = 0 }, func(c *Chunk) { c.Offset = -1 }},
		{"stream", func(c *Chunk) { c.Stream = System }, func(c *Chunk) { c.Stream = "stdin" }},
		{"no stream", func(c *Chunk) { c.Stream = Stdout }, func(c *Chunk) { c.Stream = "" }},
		{"least data", func(c *Chunk) { c.Data = []byte{0} }, func(c *Chunk) { c.Data = nil }},
		{"MaxChunkBytes", func(c *Chunk) { c.Data = make([]byte, MaxChunkBytes) }, func(c *Chunk) { c.Data = make([]byte, MaxChunkBytes+1) }},
		{"the last year", func(c *Chunk) { c.Time = time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC) }, func(c *Chunk) {
			c.Time = time.Date(9999, 12, 31, 23, 59, 59, 0, time.FixedZone("", -3600)) // in UTC it is the year 10000, which JSON cannot say
		}},
		{"the first year", func(c *Chunk) { c.Time = time.Time{} }, func(c *Chunk) {
			c.Time = time.Date(0, 1, 1, 0, 0, 0, 0, time.FixedZone("", 3600))
		}},
	} {
		ch := chunk()
		if c.at(&ch); ch.Validate() != nil {
			t.Errorf("%s: at the limit: %v", c.name, ch.Validate())
		}
		if c.past(&ch); ch.Validate() == nil {
			t.Errorf("%s: past the limit it is accepted", c.name)
		}
	}
}

func TestResultValidate(t *testing.T) {
	tail := func(n, size int) []Chunk {
		cs := make([]Chunk, n)
		for i := range cs {
			cs[i] = Chunk{Seq: int64(i + 1), Stream: Stdout, Data: make([]byte, size)}
		}
		return cs
	}
	for _, c := range []struct {
		name     string
		at, past func(*Result)
	}{
		{"outcome", func(r *Result) { r.Outcome = job.OutcomeRejected }, func(r *Result) { r.Outcome = job.OutcomeLost }},
		{"no outcome", func(r *Result) { r.Outcome = job.OutcomeCanceled }, func(r *Result) { r.Outcome = "" }},
		{"MaxTailChunks", func(r *Result) { r.Tail = tail(MaxTailChunks, 1) }, func(r *Result) { r.Tail = tail(MaxTailChunks+1, 1) }},
		{"MaxTailBytes", func(r *Result) { r.Tail = tail(4, MaxTailBytes/4) }, func(r *Result) { r.Tail = append(tail(4, MaxTailBytes/4), tail(1, 1)...) }},
		{"chunk of tail", func(r *Result) { r.Tail = tail(1, 1) }, func(r *Result) { r.Tail = tail(1, 0) }},
		{"peakMemoryMb", func(r *Result) { r.PeakMemoryMB = 0 }, func(r *Result) { r.PeakMemoryMB = -1 }},
		{"cpuMs", func(r *Result) { r.PeakMemoryMB, r.CPUMs = 0, 0 }, func(r *Result) { r.CPUMs = -1 }},
		{"manifest chunks", func(r *Result) { r.Manifest = &job.Manifest{} }, func(r *Result) { r.Manifest = &job.Manifest{Chunks: -1} }},
		{"manifest bytes", func(r *Result) { r.Manifest = &job.Manifest{} }, func(r *Result) { r.Manifest = &job.Manifest{Bytes: -1} }},
		{"manifest truncated", func(r *Result) { r.Manifest = nil }, func(r *Result) { r.Manifest = &job.Manifest{TruncatedBytes: -1} }},
	} {
		r := Result{Outcome: job.OutcomeSucceeded}
		if c.at(&r); r.Validate() != nil {
			t.Errorf("%s: at the limit: %v", c.name, r.Validate())
		}
		if c.past(&r); r.Validate() == nil {
			t.Errorf("%s: past the limit it is accepted", c.name)
		}
	}
}

// TestResultEvent: every field of a result reaches the state table.
func TestResultEvent(t *testing.T) {
	for _, f := range frames(t) {
		r, ok := f.body.(Result)
		if !ok || f.file != "worker/result.json" {
			continue
		}
		r.WorkerID = "worker-1"
		e := reflect.ValueOf(r.Event())
		for i := range e.NumField() {
			if e.Field(i).IsZero() {
				t.Errorf("%s is lost on the way", e.Type().Field(i).Name)
			}
		}
		if r.Event().Fence != (job.Fence{Attempt: 2, LeaseID: lease().LeaseID}) {
			t.Errorf("fence %+v", r.Event().Fence)
		}
	}
}

// TestFullFramesFit: what the limits allow fits into one message of the socket.
func TestFullFramesFit(t *testing.T) {
	s := job.Spec{Command: job.Command{Shell: "true"}, Stdin: strings.Repeat(`"`, 200<<10)}
	n, _ := job.Normalise(s)
	data, err := json.Marshal(n)
	if err != nil {
		t.Fatal(err)
	}
	s.Command.Shell += strings.Repeat("a", job.MaxSpecBytes-len(data))
	n, errs := job.Normalise(s)
	if len(errs) > 0 {
		t.Fatal(errs)
	}
	assign, err := Encode(TypeAssign, Assign{Assignments: []Assignment{{Lease: lease(), LeaseSeconds: 60, Job: n}}})
	if err != nil || len(assign) > MaxFrameBytes {
		t.Errorf("an assignment with a full spec has %d bytes, %v", len(assign), err)
	}
	c := chunk()
	c.Seq, c.Offset, c.Data = 1<<62, 1<<62, make([]byte, MaxChunkBytes)
	out, err := EncodeChunk(lease(), c)
	if err != nil || len(out) > MaxFrameBytes || len(out)-len(c.Data)-4 > maxChunkHeader {
		t.Errorf("a full chunk has %d bytes, %v", len(out), err)
	}
	hello := Register{WorkerID: strings.Repeat("w", 63)}
	for range MaxRunning {
		hello.Running = append(hello.Running, RunningLease{Lease: lease(), LastSeq: 1 << 62})
	}
	data, err = Encode(TypeHello, hello)
	if err != nil || len(data) > MaxFrameBytes {
		t.Errorf("a hello with %d leases has %d bytes, %v", MaxRunning, len(data), err)
	}
	beat := Heartbeat{WorkerID: strings.Repeat("w", 63), Status: StatusDraining}
	for range MaxRunning {
		beat.Running = append(beat.Running, PhaseLease{Lease: lease(), Phase: PhasePreparing})
	}
	data, err = Encode(TypeHeartbeat, beat)
	if err != nil || len(data) > MaxFrameBytes {
		t.Errorf("a heartbeat with %d leases has %d bytes, %v", MaxRunning, len(data), err)
	}
}

func TestStreams(t *testing.T) {
	for _, s := range []Stream{Stdout, Stderr, System} {
		if !s.Valid() {
			t.Errorf("%s is not valid", s)
		}
	}
	for _, s := range []Stream{"", "stdin", "STDOUT", "stdout "} {
		if s.Valid() {
			t.Errorf("%q is valid", s)
		}
	}
}
