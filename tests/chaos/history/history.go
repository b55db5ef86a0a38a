// Package history is what a chaos run leaves behind: everything that clients were
// told, what commands really did, which faults were there, and how registry and
// database were at the end, as JSON lines in one file. The checker reads nothing else.
package history

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/job"
)

// Event is one line. Exactly one of the pointers is set. Times are Unix
// nanoseconds of the one machine that everything runs on.
type Event struct {
	At       int64     `json:"at"`
	Run      *Run      `json:"run,omitempty"`
	Submit   *Submit   `json:"submit,omitempty"`
	Cancel   *Call     `json:"cancel,omitempty"`
	Observe  *Observe  `json:"observe,omitempty"`
	Fault    *Fault    `json:"fault,omitempty"`
	Journal  *Journal  `json:"journal,omitempty"`
	Final    *Final    `json:"final,omitempty"`
	Output   *Output   `json:"output,omitempty"`
	Stored   *Stored   `json:"stored,omitempty"`
	Left     *Left     `json:"left,omitempty"`
	Resource *Resource `json:"resource,omitempty"`
	Sample   *Sample   `json:"sample,omitempty"`
	Quiet    *Quiet    `json:"quiet,omitempty"`
}

// Run says how the run was made, for replaying it, and what the checker may expect.
type Run struct {
	Seed    uint64   `json:"seed"`
	Faults  []string `json:"faults"`
	Command string   `json:"command"`
	Bounds  Bounds   `json:"bounds"`
}

// Bounds are the promises that depend on the settings of the deployment.
type Bounds struct {
	Recovery time.Duration `json:"recovery"` // from a heal until a new job has run
	Drain    time.Duration `json:"drain"`    // from the end of the load until everything has ended
	Overlap  time.Duration `json:"overlap"`  // of two live attempts, outside of frozen time
	Stale    time.Duration `json:"stale"`    // how old an answer to a read may be; 0 on one NATS server
}

// Plan is what a job was made to do, so that its end can be judged.
type Plan struct {
	Kind        string `json:"kind"`
	MaxAttempts int    `json:"maxAttempts"`
	Code        int    `json:"code,omitempty"`  // of the attempts up to Until
	Until       int    `json:"until,omitempty"` // by number of attempt
	Lines       int    `json:"lines,omitempty"`
	LostFails   bool   `json:"lostFails,omitempty"` // onWorkerLost: fail
	TimesOut    bool   `json:"timesOut,omitempty"`
	Stranger    bool   `json:"stranger,omitempty"` // for a worker of the test's own, which keeps no journal
}

// Submit is one try to create a job.
type Submit struct {
	Key    string `json:"key"`
	Plan   Plan   `json:"plan"`
	Begin  int64  `json:"begin"` // Event.At is the end
	Code   int    `json:"code"`  // of HTTP; 0 without an answer
	JobID  string `json:"jobId,omitempty"`
	Err    string `json:"err,omitempty"`
	Target string `json:"target,omitempty"` // create or execute
}

// Acked reports whether the answer promises that the job is not lost.
func (s *Submit) Acked() bool { return s.Code >= 200 && s.Code < 300 }

// Call is another call about a job.
type Call struct {
	JobID string `json:"jobId"`
	Begin int64  `json:"begin"`
	Code  int    `json:"code"`
}

// Observe is a state of a job that a client was told. A read (Begin set) saw the
// newest version of some moment between Begin and Event.At; what was pushed is
// only known to have been there before Event.At.
type Observe struct {
	JobID    string    `json:"jobId"`
	Begin    int64     `json:"begin,omitempty"`
	From     string    `json:"from"` // get, events, execute
	Status   job.State `json:"status"`
	Version  uint64    `json:"version,omitempty"` // 0 where the answer has none
	Attempt  int       `json:"attempt,omitempty"`
	ExitCode *int      `json:"exitCode,omitempty"`
	Missing  bool      `json:"missing,omitempty"` // the answer was that there is no such job
}

// The phases of a fault.
const (
	Inject  = "inject"
	Heal    = "heal"
	Recover = "recover" // a job submitted after the heal has run
	Told    = "told"    // a figure in Detail
	Divided = "divided" // until the heal one of three NATS servers hears nothing of the others
)

// Fault is a phase of a fault.
type Fault struct {
	Name   string        `json:"name"`
	Row    string        `json:"row"` // of the fault matrix
	Phase  string        `json:"phase"`
	Took   time.Duration `json:"took,omitempty"`
	Detail string        `json:"detail,omitempty"`
	Frozen bool          `json:"frozen,omitempty"` // from inject to heal, commands exist and do not run
}

// The events of a journal.
const (
	Start   = "start"
	Stop    = "stop"
	Overlap = "overlap" // another attempt of the same job lives
	Alone   = "alone"   // it does not any more
)

// Journal is a line that a command wrote itself.
type Journal struct {
	Event   string `json:"event"`
	Job     string `json:"job"`
	Attempt int    `json:"attempt"`
	PID     int    `json:"pid"`
	At      int64  `json:"at"`
	Code    int    `json:"code,omitempty"`
	Why     string `json:"why,omitempty"`
	Worker  string `json:"worker,omitempty"`
}

// Final is a job as the API shows it after everything is quiet. Code is that of
// the answer.
type Final struct {
	JobID string   `json:"jobId"`
	Code  int      `json:"code"`
	Job   *api.Job `json:"job,omitempty"`
}

// Output is the output of a job as the API shows it at the end.
type Output struct {
	JobID    string  `json:"jobId"`
	Seqs     []int64 `json:"seqs"`
	Stdout   string  `json:"stdout"`
	Bytes    int64   `json:"bytes"`
	Complete bool    `json:"complete"`
	EOF      bool    `json:"eof"`
}

// Stored is a job in the registry or in the database at the end.
type Stored struct {
	Where   string    `json:"where"` // registry or database
	JobID   string    `json:"jobId"`
	Version uint64    `json:"version"`
	State   job.State `json:"state"`
	Key     string    `json:"key,omitempty"`
}

// The places of Stored.
const (
	Registry = "registry"
	Database = "database"
)

// Left is something that should be gone: a process, a folder, a consumer.
type Left struct {
	What string `json:"what"`
}

// Resource is what a process of the server used when the run began and ended.
type Resource struct {
	Service string `json:"service"`
	What    string `json:"what"` // fds, goroutines, rss
	Before  int64  `json:"before"`
	After   int64  `json:"after"`
}

// Sample is what a process used at one moment of a soak.
type Sample struct {
	Service string `json:"service"`
	What    string `json:"what"` // fds, goroutines, rss
	Value   int64  `json:"value"`
}

// Quiet says how long it took until every job had ended and was stored.
type Quiet struct {
	Took time.Duration `json:"took"`
	Open int           `json:"open"` // jobs that had not ended when waiting was given up
}

// Writer appends events to a file. It is safe for concurrent use.
type Writer struct {
	mu   sync.Mutex
	file *os.File
	buf  *bufio.Writer
	err  error
}

// Create makes the file of a history.
func Create(path string) (*Writer, error) {
	f, err := os.Create(path)
	if err != nil {
		return nil, fmt.Errorf("create the history: %w", err)
	}
	return &Writer{file: f, buf: bufio.NewWriter(f)}, nil
}

// Add writes an event; At is now where it is zero. The first error is told by Close.
func (w *Writer) Add(e Event) {
	if e.At == 0 {
		e.At = time.Now().UnixNano()
	}
	data, err := json.Marshal(e)
	w.mu.Lock()
	defer w.mu.Unlock()
	if err == nil {
		_, err = w.buf.Write(append(data, '\n'))
	}
	if w.err == nil {
		w.err = err
	}
}

// Close writes what is buffered.
func (w *Writer) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, err := range []error{w.buf.Flush(), w.file.Close()} {
		if w.err == nil {
			w.err = err
		}
	}
	if w.err != nil {
		return fmt.Errorf("write the history: %w", w.err)
	}
	return nil
}

// Read returns the events of a history.
func Read(r io.Reader) ([]Event, error) {
	var events []Event
	for d := json.NewDecoder(r); ; {
		var e Event
		switch err := d.Decode(&e); err {
		case nil:
			events = append(events, e)
		case io.EOF:
			return events, nil
		default:
			return nil, fmt.Errorf("read the history: event %d: %w", len(events)+1, err)
		}
	}
}
