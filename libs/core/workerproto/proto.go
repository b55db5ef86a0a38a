// Package workerproto is the contract between a worker and the edge: the
// bodies of wire.md, which are the same over HTTP and over the WebSocket, and
// the frames that carry them on the socket.
//
// # Order and repeats
//
// The first frame of a session is hello, within HelloTimeout; the edge answers
// welcome. Everything after that may be repeated and reordered by reconnects:
// every report carries attempt and leaseId, output carries seq, and repeating
// any of them is harmless. Unknown fields and frame types are ignored, so that
// a newer peer can be talked to.
//
// # Version ledger
//
//	1  2026-11  first version
package workerproto

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/job"
)

// Version is the protocol spoken here; an edge serves Version and Version-1.
const (
	Version     = 1
	MinVersion  = 1
	Subprotocol = "cmdexec.v1"
	TokenHeader = "x-worker-token"
)

// The routes of workers over plain HTTP. Their bodies are the frames' bodies.
const (
	PathConnect     = "/api/workers/connect"
	PathRegister    = "/api/workers/register"
	PathHeartbeat   = "/api/workers/heartbeat"
	PathGetJob      = "/api/jobs/get-job"
	PathOutput      = "/api/jobs/stream-output"
	PathCheckCancel = "/api/jobs/check-cancel"
	PathResult      = "/api/jobs/submit-result"
)

// Paths are all routes of workers: what an ingress sends to the edge, by exact path.
func Paths() []string {
	return []string{PathConnect, PathRegister, PathHeartbeat, PathGetJob, PathOutput, PathCheckCancel, PathResult}
}

// Headers of plain HTTP. The answer to register names the session, and a worker
// that sends the name along is told when another one has taken over. The answer
// to get-job asks for a heartbeat where its answer has something new.
const (
	SessionHeader   = "x-worker-session"
	HeartbeatHeader = "x-worker-heartbeat"
	HeartbeatNow    = "now"
)

// Codes of problems that a worker over plain HTTP acts upon.
const (
	CodeRegisterAgain = "register_again" // 409: there is no session; register lists what the worker holds
	CodeReplaced      = "replaced"       // 409: a newer session of the same worker
	CodeWrongEdge     = "wrong_edge"     // 421: another edge holds the session; try again, then register
)

// How long get-job waits for an assignment.
const (
	DefaultPoll = 20 * time.Second
	MaxPoll     = 30 * time.Second
)

// Sizes and times of the protocol.
const (
	MaxFrameBytes   = 1 << 20  // of one WebSocket message or body; an assignment with a full spec fits
	MaxChunkBytes   = 64 << 10 // data of one output chunk
	MaxTailBytes    = 64 << 10 // data of all chunks that ride in a result
	MaxTailChunks   = 64
	MaxRunning      = 4096 // leases in one hello or heartbeat
	HelloTimeout    = 5 * time.Second
	PingInterval    = 15 * time.Second
	PongTimeout     = 10 * time.Second
	MaxUnackedBytes = 4 << 20 // output a worker sends ahead of acknowledgements
)

// Close codes of the WebSocket.
const (
	CloseProtocol   = 4400
	CloseToken      = 4401
	CloseReplaced   = 4409 // a newer session of the same worker
	CloseSlowDown   = 4429
	CloseOverloaded = 1013
)

// Type is the type of a text frame.
type Type string

// Frames from the worker.
const (
	TypeHello     Type = "hello"
	TypeHeartbeat Type = "heartbeat"
	TypeAccepted  Type = "accepted"
	TypePreparing Type = "preparing"
	TypeStarted   Type = "started"
	TypeRejected  Type = "rejected"
	TypeOutput    Type = "output"
	TypeResult    Type = "result"
)

// Frames from the edge.
const (
	TypeWelcome Type = "welcome"
	TypeBeat    Type = "beat"
	TypeAssign  Type = "assign"
	TypeCancel  Type = "cancel"
	TypeDrain   Type = "drain"
	TypeAck     Type = "ack"
	TypeStale   Type = "stale"
	TypeToken   Type = "token"
	TypeGoaway  Type = "goaway"
)

// Lease names one dispatch of a job to a worker. Every report carries it.
type Lease struct {
	JobID   string `json:"jobId"`
	Attempt int    `json:"attempt"`
	LeaseID string `json:"leaseId"`
}

// Fence is the lease as the state table wants it.
func (l Lease) Fence() job.Fence { return job.Fence{Attempt: l.Attempt, LeaseID: l.LeaseID} }

// Register is the body of hello and of POST /api/workers/register. Running is
// complete: a lease of an older session that it does not list has ended.
type Register struct {
	WorkerID    string            `json:"workerId"`
	Hostname    string            `json:"hostname,omitempty"`
	OS          string            `json:"os"`
	Arch        string            `json:"arch"`
	CPUCores    float64           `json:"cpuCores"`
	TotalMemory int64             `json:"totalMemory"`
	Labels      map[string]string `json:"labels,omitempty"`
	Executors   []string          `json:"executors"`
	Slots       int               `json:"slots"`
	Backlog     int               `json:"backlog,omitempty"` // assignments that it lets wait for a free slot, a moment at most
	Version     string            `json:"version,omitempty"`
	Protocol    int               `json:"protocol"`
	Running     []RunningLease    `json:"running"`
}

// RunningLease is a lease that a worker still works on, with the highest seq
// of output that it has produced.
type RunningLease struct {
	Lease
	LastSeq int64 `json:"lastSeq"`
}

// Welcome answers Register.
type Welcome struct {
	HeartbeatSeconds int       `json:"heartbeatSeconds"`
	LeaseSeconds     int       `json:"leaseSeconds"`
	ServerTime       time.Time `json:"serverTime"`
	Protocol         int       `json:"protocol"`
	Stale            []Lease   `json:"stale,omitempty"`
}

// Status is what a worker says of itself.
type Status string

// The statuses that a worker reports.
const (
	StatusIdle     Status = "idle"
	StatusBusy     Status = "busy"
	StatusDraining Status = "draining"
)

// Phase is how far a worker is with a lease.
type Phase string

// The phases, in order. PhaseEnded: the command is over and the result is on its way.
const (
	PhaseAccepted  Phase = "accepted"
	PhasePreparing Phase = "preparing"
	PhaseStarted   Phase = "started"
	PhaseEnded     Phase = "ended"
)

// Heartbeat is sent every HeartbeatSeconds. Only the Beat that answers it
// confirms leases, counted from the time at which the heartbeat was sent: ID
// tells the worker which one was answered.
type Heartbeat struct {
	ID        int64        `json:"id,omitempty"`
	WorkerID  string       `json:"workerId,omitempty"`
	Status    Status       `json:"status"`
	CPUUsage  float64      `json:"cpuUsage"` // percent of the whole machine
	RAMUsage  float64      `json:"ramUsage"` // MiB
	FreeSlots int          `json:"freeSlots"`
	Running   []PhaseLease `json:"running"`
	Reason    string       `json:"reason,omitempty"` // why the worker takes nothing, if so
}

// PhaseLease is a lease and how far the worker is with it.
type PhaseLease struct {
	Lease
	Phase Phase `json:"phase"`
}

// Beat answers a heartbeat. A lease in neither list was not decided: the
// worker's time for it runs on.
type Beat struct {
	ID         int64     `json:"id,omitempty"`
	Confirmed  []string  `json:"confirmed,omitempty"` // lease ids
	Stale      []string  `json:"stale,omitempty"`     // lease ids: stop, clean up, report nothing
	Cancel     []Lease   `json:"cancel,omitempty"`
	Drain      bool      `json:"drain"`
	Token      string    `json:"token,omitempty"` // replaces the worker's token
	ServerTime time.Time `json:"serverTime"`
}

// Assignment hands a job to a worker. The worker starts it only while its own
// lease clock allows.
type Assignment struct {
	Lease
	LeaseSeconds int      `json:"leaseSeconds"`
	Job          job.Spec `json:"job"`
	Traceparent  string   `json:"traceparent,omitempty"`
}

// Assign carries assignments. A worker answers each with accepted or rejected.
type Assign struct {
	Assignments []Assignment `json:"assignments"`
}

// Progress is the body of accepted, preparing and started.
type Progress struct {
	Lease
	At time.Time `json:"at"`
}

// Rejected answers an assignment that the worker will not run.
type Rejected struct {
	Lease
	Reason string `json:"reason"`
}

// Cancel asks to stop one attempt: signal, grace, kill, proof, result.
type Cancel struct {
	Lease
}

// Drain tells a worker to take no new work (or to take it again).
type Drain struct {
	Drain bool `json:"drain"`
}

// Stream is the origin of output.
type Stream string

// The streams. System marks lines that the worker wrote itself.
const (
	Stdout Stream = "stdout"
	Stderr Stream = "stderr"
	System Stream = "system"
)

// Valid reports whether s is a stream.
func (s Stream) Valid() bool { return s == Stdout || s == Stderr || s == System }

// Chunk is a piece of output. Seq counts the chunks of an attempt from 1 over
// all streams without a gap; Offset is the position of Data in its own stream.
type Chunk struct {
	Seq    int64     `json:"seq"`
	Offset int64     `json:"offset"`
	Stream Stream    `json:"stream"`
	Time   time.Time `json:"time"`
	Data   []byte    `json:"data,omitempty"`
}

// Validate reports what makes a chunk unacceptable.
func (c *Chunk) Validate() error {
	switch {
	case c.Seq < 1:
		return errors.New("seq must be at least 1")
	case c.Offset < 0:
		return errors.New("offset must not be negative")
	case !c.Stream.Valid():
		return errors.New("stream must be stdout, stderr or system")
	case len(c.Data) == 0 || len(c.Data) > MaxChunkBytes:
		return fmt.Errorf("a chunk has from 1 to %d bytes of data", MaxChunkBytes)
	}
	// Near both ends an offset makes a time that JSON can say only with that offset.
	if y := c.Time.UTC().Year(); y < 0 || y > 9999 {
		return errors.New("time must be within the years 0 to 9999 in UTC")
	}
	return nil
}

// Output is the body of output and of POST /api/jobs/stream-output.
type Output struct {
	WorkerID string `json:"workerId,omitempty"`
	Lease
	Chunks []Chunk `json:"chunks"`
}

// Result is the body of result and of POST /api/jobs/submit-result. Repeating
// it is harmless; it is sent until it is acknowledged. All output chunks that
// are not in Tail have been acknowledged before it is sent.
type Result struct {
	WorkerID string `json:"workerId,omitempty"`
	Lease
	Outcome      job.Outcome   `json:"outcome"`
	Reason       job.Reason    `json:"reason,omitempty"`
	Message      string        `json:"message,omitempty"`
	ExitCode     *int          `json:"exitCode"`
	Signal       string        `json:"signal,omitempty"`
	OOMKilled    bool          `json:"oomKilled,omitempty"`
	AcceptedAt   time.Time     `json:"acceptedAt,omitzero"`
	PreparedAt   time.Time     `json:"preparedAt,omitzero"`
	StartedAt    time.Time     `json:"startedAt,omitzero"`
	FinishedAt   time.Time     `json:"finishedAt"`
	ImageDigest  string        `json:"imageDigest,omitempty"`
	PeakMemoryMB int64         `json:"peakMemoryMb,omitempty"`
	CPUMs        int64         `json:"cpuMs,omitempty"`
	Warm         bool          `json:"warm,omitempty"`
	Stop         *job.Cancel   `json:"stop,omitempty"`
	Manifest     *job.Manifest `json:"manifest,omitempty"`
	Tail         []Chunk       `json:"tail,omitempty"` // the last chunks, where they are small
}

// Event is the result as the state table wants it.
func (r *Result) Event() job.Result {
	return job.Result{
		Fence: r.Fence(), WorkerID: r.WorkerID, Outcome: r.Outcome, Reason: r.Reason, Message: r.Message,
		ExitCode: r.ExitCode, Signal: r.Signal, OOMKilled: r.OOMKilled,
		AcceptedAt: r.AcceptedAt, PreparedAt: r.PreparedAt, StartedAt: r.StartedAt, FinishedAt: r.FinishedAt,
		ImageDigest: r.ImageDigest, PeakMemoryMB: r.PeakMemoryMB, CPUMs: r.CPUMs, Warm: r.Warm,
		Stop: r.Stop, Manifest: r.Manifest,
	}
}

// Validate reports what makes a result unacceptable.
func (r *Result) Validate() error {
	switch {
	case !r.Outcome.FromWorker():
		return errors.New("outcome must be succeeded, failed, timed_out, canceled or rejected")
	case len(r.Tail) > MaxTailChunks:
		return fmt.Errorf("at most %d chunks in tail", MaxTailChunks)
	case r.PeakMemoryMB < 0 || r.CPUMs < 0:
		return errors.New("peakMemoryMb and cpuMs must not be negative")
	case r.Manifest != nil && (r.Manifest.Chunks < 0 || r.Manifest.Bytes < 0 || r.Manifest.TruncatedBytes < 0):
		return errors.New("a manifest has no negative numbers")
	}
	total := 0
	for i := range r.Tail {
		if err := r.Tail[i].Validate(); err != nil {
			return fmt.Errorf("tail: %w", err)
		}
		total += len(r.Tail[i].Data)
	}
	if total > MaxTailBytes {
		return fmt.Errorf("at most %d bytes in tail", MaxTailBytes)
	}
	return nil
}

// Ack acknowledges what the bus has: output of one attempt up to AckedSeq, or
// results.
type Ack struct {
	JobID    string  `json:"jobId,omitempty"`
	Attempt  int     `json:"attempt,omitempty"`
	AckedSeq int64   `json:"ackedSeq,omitempty"`
	Results  []Lease `json:"results,omitempty"`
}

// Stale tells a worker that leases are not its own any more: stop, clean up,
// report nothing, forget what is spooled for them.
type Stale struct {
	Leases []Lease `json:"leases"`
}

// Token replaces the worker's token.
type Token struct {
	Token string `json:"token"`
}

// Goaway asks the worker to connect again later, possibly elsewhere.
type Goaway struct {
	RetryAfterMs int    `json:"retryAfterMs"`
	Reason       string `json:"reason"`
}

// OutputReply answers POST /api/jobs/stream-output.
type OutputReply struct {
	AckedSeq int64 `json:"ackedSeq"`
	Stale    bool  `json:"stale"`
}

// ResultReply answers POST /api/jobs/submit-result.
type ResultReply struct {
	Accepted bool `json:"accepted"`
	Stale    bool `json:"stale"`
}

// CancelReply answers GET /api/jobs/check-cancel.
type CancelReply struct {
	Cancel bool `json:"cancel"`
	Stale  bool `json:"stale"`
}

// ErrFrame is wrapped by every error about a frame that cannot be read.
var ErrFrame = errors.New("malformed frame")

// Encode writes a text frame: the body's JSON object with its type in front.
func Encode(t Type, body any) ([]byte, error) {
	e := encoders.Get().(*encoder)
	defer e.done()
	if err := e.Encode(body); err != nil {
		return nil, fmt.Errorf("encode %s frame: %w", t, err)
	}
	data := e.buf.Bytes()
	data = data[:len(data)-1] // the line's end
	if len(data) < 2 || data[0] != '{' {
		return nil, fmt.Errorf("encode %s frame: the body must be an object", t)
	}
	out := make([]byte, 0, len(data)+len(t)+12)
	out = append(out, `{"type":"`...)
	out = append(out, t...)
	out = append(out, '"')
	if len(data) > 2 {
		out = append(out, ',')
	}
	return append(out, data[1:]...), nil
}

// encoder is a JSON encoder that writes what json.Marshal would and a line's end,
// into memory that is used again: a worker's every heartbeat and its answer is a
// frame.
type encoder struct {
	*json.Encoder
	buf bytes.Buffer
}

var encoders = sync.Pool{New: func() any {
	e := &encoder{}
	e.Encoder = json.NewEncoder(&e.buf)
	return e
}}

// keptBuffer is how large a buffer may be that is kept.
const keptBuffer = 16 << 10

func (e *encoder) done() {
	if e.buf.Cap() <= keptBuffer {
		e.buf.Reset()
		encoders.Put(e)
	}
}

// TypeOf reads the type of a text frame.
func TypeOf(frame []byte) (Type, error) {
	// Frames of this package begin with their type, which saves a pass over the body.
	if rest, ok := bytes.CutPrefix(frame, []byte(`{"type":"`)); ok {
		if i := bytes.IndexByte(rest, '"'); i > 0 && plain(rest[:i]) {
			if string(rest[:i]) == string(TypeHeartbeat) { // by far the most
				return TypeHeartbeat, nil
			}
			return Type(rest[:i]), nil
		}
	}
	var head struct {
		Type Type `json:"type"`
	}
	if err := json.Unmarshal(frame, &head); err != nil || head.Type == "" {
		return "", fmt.Errorf("%w: not a JSON object with a type", ErrFrame)
	}
	return head.Type, nil
}

// plain reports whether a JSON string of these bytes means just these bytes.
func plain(b []byte) bool {
	for _, c := range b {
		if c < ' ' || c > '~' || c == '\\' {
			return false
		}
	}
	return true
}

// Decode reads the body of a text frame into dst. Unknown fields are ignored.
func Decode(frame []byte, dst any) error {
	if err := json.Unmarshal(frame, dst); err != nil {
		return fmt.Errorf("%w: %s", ErrFrame, jsonProblem(err))
	}
	return nil
}

// jsonProblem describes a JSON error without the value that caused it.
func jsonProblem(err error) string {
	var typeErr *json.UnmarshalTypeError
	if errors.As(err, &typeErr) {
		return "field " + typeErr.Field + " has the wrong type"
	}
	return "not valid JSON"
}

// ChunkHeader is the JSON header of a binary chunk frame.
type ChunkHeader struct {
	Lease
	Seq    int64     `json:"seq"`
	Offset int64     `json:"offset"`
	Stream Stream    `json:"stream"`
	Time   time.Time `json:"time"`
}

const maxChunkHeader = 1024

// EncodeChunk writes a binary frame: a 4-byte big-endian header length, the
// JSON header, the bytes. The same form is stored in the LOGS stream.
func EncodeChunk(l Lease, c Chunk) ([]byte, error) {
	head, err := json.Marshal(ChunkHeader{Lease: l, Seq: c.Seq, Offset: c.Offset, Stream: c.Stream, Time: c.Time})
	if err != nil {
		return nil, fmt.Errorf("encode chunk: %w", err)
	}
	out := make([]byte, 4, 4+len(head)+len(c.Data))
	binary.BigEndian.PutUint32(out, uint32(len(head)))
	out = append(out, head...)
	return append(out, c.Data...), nil
}

// DecodeChunk reads a binary frame. The chunk's data points into frame. It
// checks the form, not whether the chunk is acceptable: see Chunk.Validate.
func DecodeChunk(frame []byte) (Lease, Chunk, error) {
	if len(frame) < 4 {
		return Lease{}, Chunk{}, fmt.Errorf("%w: no header length", ErrFrame)
	}
	n := binary.BigEndian.Uint32(frame)
	if n > maxChunkHeader || int(n) > len(frame)-4 {
		return Lease{}, Chunk{}, fmt.Errorf("%w: header length out of range", ErrFrame)
	}
	var h ChunkHeader
	if err := json.Unmarshal(frame[4:4+n], &h); err != nil {
		return Lease{}, Chunk{}, fmt.Errorf("%w: header: %s", ErrFrame, jsonProblem(err))
	}
	return h.Lease, Chunk{Seq: h.Seq, Offset: h.Offset, Stream: h.Stream, Time: h.Time, Data: frame[4+n:]}, nil
}
