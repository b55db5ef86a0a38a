// Package store is the port to the database that keeps jobs after they have
// left the registry, and the output of their attempts. sqlitestore and
// mongostore implement it, dial opens the one that a service's settings name, and
// storetest is the conformance suite that both pass.
//
// The database follows the registry and is never ahead of it: whatever writes
// here may be run again, in any order, without harm. A job's own version says
// which of two writes is the newer one.
package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
)

// ErrNotFound says that the database does not have the job. It is never
// returned for a database that cannot be asked.
var ErrNotFound = errors.New("job not found in the database")

// ErrInvalid is wrapped by errors about an argument that no repetition makes
// acceptable.
var ErrInvalid = errors.New("not storable")

// Bounds of what one answer holds. MaxPageBytes keeps its JSON below what the
// bus carries in one message.
const (
	DefaultListLimit = 50
	MaxListLimit     = 500
	DefaultLogLimit  = 500
	MaxLogLimit      = 1000
	MaxPageBytes     = 700 << 10
)

// Store is a database of jobs and their output. All methods block until the
// database has answered (writes: until it is durable) or ctx ends, and may be
// called concurrently. An error that is neither ErrNotFound nor ErrInvalid
// means that the database is away or busy: try again later.
type Store interface {
	// UpsertJobs writes records. Of two records of a job the one with the higher
	// version is kept, whatever the order. An end that is stored stays: what comes
	// later is the work of a registry that has forgotten it. A record that cannot be
	// stored is reported in Poison and does not keep the others out. After an error
	// some may be written, or none: write them all again.
	//
	// A record created later than the stored one is another job under the same
	// idempotency key: it replaces the old job, with its output, whatever the versions.
	UpsertJobs(ctx context.Context, recs []job.Record) (Upserted, error)

	// Job returns one job, whole, or ErrNotFound.
	Job(ctx context.Context, id string) (job.Record, error)

	// ListJobs returns a page, newest first by (createdAt, id), of records without
	// files and stdin, and of attempts only how long the last one's command ran.
	// The page ends early when it would exceed MaxPageBytes; more says whether anything follows. A limit that is
	// not positive is DefaultListLimit; one above MaxListLimit is that.
	ListJobs(ctx context.Context, q busmsg.ListJobs) (items []job.Record, more bool, err error)

	// Stats counts jobs by state. States without jobs are left out. Its cost grows with the number of jobs.
	Stats(ctx context.Context) (map[job.State]int64, error)

	// TerminalVersions returns, of the given ids, those that are stored in a terminal state, with the stored version.
	TerminalVersions(ctx context.Context, ids []string) (map[string]uint64, error)

	// ResetNonTerminal ends every job that is not terminal, by job.Reset, and
	// returns how many. For a lost registry only. It may be repeated after an error.
	ResetNonTerminal(ctx context.Context, now time.Time) (int, error)

	// Generation returns the id of the registry that the database follows, "" at first.
	Generation(ctx context.Context) (string, error)
	SetGeneration(ctx context.Context, generation string) error

	// DeleteFinished deletes at most limit jobs that finished before the given
	// time, oldest first, with their output, a bounded part at a time: call it
	// until it returns 0. Output without a job goes once it is as old.
	DeleteFinished(ctx context.Context, before time.Time, limit int) (int, error)

	// AppendChunks stores output, and notes manifests that it has to be compared
	// with. A chunk that is stored already (same job, attempt and seq), or a manifest
	// of an attempt that has one, is left as it is. A chunk that arrives for an attempt
	// with a manifest takes its verdict back. ErrInvalid when a chunk or a manifest is
	// not acceptable; then nothing was written. After another error some may be: write
	// them all again. The job need not be known.
	AppendChunks(ctx context.Context, chunks []LogChunk, manifests ...LogManifest) error

	// Logs returns stored output of one attempt in order of seq, and the verdict on it.
	// Gaps are not reported: the attempt's manifest says what should be there. Limits
	// are as in ListJobs; at least one chunk is returned where there is one.
	Logs(ctx context.Context, q busmsg.GetLogs) (busmsg.Logs, error)

	// UncheckedLogs returns, oldest first and at most limit, noted manifests without a
	// verdict of attempts that got neither a chunk nor the manifest since before.
	UncheckedLogs(ctx context.Context, before time.Time, limit int) ([]LogManifest, error)

	// JudgeLogs stores a verdict on the output that was read after UncheckedLogs had
	// returned its manifest. It returns false and stores nothing where a chunk has
	// arrived since, somebody else was faster, or the attempt is gone.
	JudgeLogs(ctx context.Context, m LogManifest, v busmsg.LogVerdict) (bool, error)

	// BadLogs reports whether the verdict on an attempt's output is a bad one.
	BadLogs(ctx context.Context, jobID string, attempt int) (bool, error)

	// Ping reports whether the database answers.
	Ping(ctx context.Context) error
	Close() error
}

// Upserted says what became of the records of one UpsertJobs. The three add up
// to the records given.
type Upserted struct {
	Written int
	Stale   int // not newer than what is stored, or than another of the same batch
	Poison  []Rejected
}

// Rejected is a record that cannot be stored, ever.
type Rejected struct {
	ID  string
	Err error
}

// LogManifest is what a worker declared of the output of one attempt of a job.
type LogManifest struct {
	JobID   string
	Attempt int
	job.Manifest

	// Seen is the database's mark of what was stored when it returned the manifest.
	// It means nothing elsewhere.
	Seen int64
}

// Validate returns an error that wraps ErrInvalid where the manifest cannot be noted.
func (m *LogManifest) Validate() error {
	switch {
	case m.JobID == "" || m.Attempt < 1:
		return fmt.Errorf("%w: a manifest needs a job and an attempt", ErrInvalid)
	case m.Chunks < 0 || m.Bytes < 0:
		return fmt.Errorf("%w: a manifest has no negative numbers", ErrInvalid)
	}
	return nil
}

// LogChunk is a piece of output of one attempt of a job.
type LogChunk struct {
	JobID   string
	Attempt int
	workerproto.Chunk
}
