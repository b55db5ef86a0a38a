package bus

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/job"
)

const (
	// createTimeout: a submit does not wait longer for a bus that does not answer.
	createTimeout = 2 * time.Second
	// createLimit is the part of the byte limit, in percent, up to which jobs are
	// created. The rest is for updates: one that is refused could end nothing.
	createLimit = 70
	// keepLimit is the part, in percent, up to which updates leave earlier versions
	// behind. Beyond it they make no job larger than its newest version.
	keepLimit = 40
	// keptVersions is how many versions of a job the registry has at most. A quick
	// job has three in its life, and they leave with it. It is below keyMessages, so
	// that the server itself never removes one.
	keptVersions = 6
	// keptBytes bounds a version that is left behind.
	keptBytes = 8 << 10
)

// earlier is what becomes of a job's earlier versions when a version of that many
// bytes is written.
func (r *Registry) earlier(version uint64, bytes int) history {
	return history(version%keptVersions == 0 || bytes > keptBytes || r.c.usage.beyond(keepLimit))
}

// Entry is a record as the registry has it.
type Entry struct {
	Record   job.Record
	Revision uint64 // position in the registry's stream: orders writes, also of different jobs
}

// Registry is the live jobs.
type Registry struct {
	c *Conn
	b bucket
}

// Registry returns the live jobs.
func (c *Conn) Registry() *Registry {
	return &Registry{c: c, b: bucket{c: c, stream: streamJobs, prefix: prefixJobs}}
}

// Create adds a job and returns once that is on disk, in at most two seconds.
// Errors: ErrExists with the entry that is there (of an earlier try of the same
// caller, perhaps: compare the records), ErrQueueFull above 70 % of the byte
// limit, ErrTooLarge, ErrUnavailable (surely not written), ErrAmbiguous (may be
// written).
func (r *Registry) Create(ctx context.Context, rec job.Record) (Entry, error) {
	key, data, err := encode(rec)
	if err != nil {
		return Entry{}, fmt.Errorf("create job: %w", err)
	}
	r.c.startWatching()
	if r.c.usage.beyond(createLimit) {
		r.c.count.queueFull.Add(1)
		return Entry{}, fmt.Errorf("create job: %w", ErrQueueFull)
	}
	ctx, cancel := context.WithTimeout(ctx, createTimeout)
	defer cancel()
	e, err := r.create(ctx, key, data, rec)
	if err != nil {
		return e, fmt.Errorf("create job: %w", err)
	}
	r.c.usage.added.Add(int64(len(data) + len(key)))
	return e, nil
}

func (r *Registry) create(ctx context.Context, key string, data []byte, rec job.Record) (Entry, error) {
	var unknown error // an earlier try that was not answered
	for try := 1; ; try++ {
		revision, err := r.b.write(ctx, key, data, 0, keep)
		switch {
		case err == nil:
			r.c.count.writes.Add(1)
			return Entry{Record: rec, Revision: revision}, nil
		case errors.Is(err, errConflict):
			have, readErr := r.b.leader(ctx, key)
			switch {
			case errors.Is(readErr, ErrNotFound):
				// A replicated stream refuses the only writer now and then.
				r.c.count.spurious.Add(1)
			case readErr != nil && unknown != nil:
				return Entry{}, unknown
			case readErr != nil:
				// Somebody's key is there, or was; ours was refused.
				return Entry{}, readErr
			case unknown != nil && bytes.Equal(have.data, data):
				r.c.count.writes.Add(1)
				return Entry{Record: rec, Revision: have.revision}, nil
			default:
				e, err := decode(have)
				if err != nil {
					return Entry{}, fmt.Errorf("%w: %w", ErrExists, err)
				}
				if unknown != nil && sameSubmit(e.Record, rec) {
					return e, nil // ours, and somebody has moved it on already
				}
				return e, ErrExists
			}
		case errors.Is(err, ErrFull):
			r.c.count.queueFull.Add(1)
			return Entry{}, fmt.Errorf("%w: %w", ErrQueueFull, err)
		case errors.Is(err, ErrAmbiguous):
			if unknown == nil {
				r.c.count.ambiguous.Add(1)
				unknown = err
			}
		case unknown != nil && errors.Is(err, ErrUnavailable):
			// Whether the earlier try got through is still open.
		default:
			return Entry{}, err
		}
		if !pause(ctx, retryPause(try)) {
			if unknown != nil {
				return Entry{}, unknown
			}
			return Entry{}, fmt.Errorf("%w: %w", ErrUnavailable, ctx.Err())
		}
	}
}

// sameSubmit reports whether a stored record grew from the one that was created:
// the time of creation is the submitter's, so two submits of one key differ in it.
func sameSubmit(have, created job.Record) bool {
	return have.Owner == created.Owner && have.CreatedAt.Equal(created.CreatedAt) && have.SpecHash == created.SpecHash
}

// Get reads a job. What it returns may be older than the newest by moments.
// ErrNotFound is certain: it comes from the leader.
func (r *Registry) Get(ctx context.Context, jobID string) (Entry, error) {
	key, err := jobKey(jobID)
	if err != nil {
		return Entry{}, fmt.Errorf("read job: %w", errors.Join(ErrNotFound, err))
	}
	s, err := r.b.direct(ctx, key)
	if err != nil && ctx.Err() == nil {
		s, err = r.b.leader(ctx, key)
	}
	return decoded(s, err)
}

// GetLatest reads a job from the leader.
func (r *Registry) GetLatest(ctx context.Context, jobID string) (Entry, error) {
	key, err := jobKey(jobID)
	if err != nil {
		return Entry{}, fmt.Errorf("read job: %w", errors.Join(ErrNotFound, err))
	}
	return decoded(r.b.leader(ctx, key))
}

func decoded(s stored, err error) (Entry, error) {
	if err != nil {
		return Entry{}, fmt.Errorf("read job: %w", err)
	}
	e, err := decode(s)
	if err != nil {
		return Entry{}, fmt.Errorf("read job: %w", err)
	}
	return e, nil
}

// Transition applies an event to a job: read, job.Apply, compare-and-swap, and
// again from a leader read when somebody else was faster. It returns the entry
// after the event. A refusal (job.ErrTerminal, ErrStale, ErrUnchanged,
// ErrRefused) comes with the current entry and was decided on a leader read.
// ErrNotFound: the job is not in the registry. ErrUnavailable: surely not
// written. ErrAmbiguous only when ctx ended before the outcome was known: give
// it some seconds.
func (r *Registry) Transition(ctx context.Context, jobID string, ev job.Event) (Entry, error) {
	e, err := r.Get(ctx, jobID)
	if err != nil {
		return Entry{}, fmt.Errorf("%s: %w", job.KindOf(ev), err)
	}
	return r.TransitionFrom(ctx, e, ev)
}

// TransitionFrom is Transition that tries the caller's entry first, which saves
// a read. A refusal decided on that entry is decided again on a leader read.
func (r *Registry) TransitionFrom(ctx context.Context, e Entry, ev job.Event) (Entry, error) {
	out, err := r.transition(ctx, e, ev)
	if err != nil {
		return out, fmt.Errorf("%s: %w", job.KindOf(ev), err)
	}
	return out, nil
}

func (r *Registry) transition(ctx context.Context, e Entry, ev job.Event) (Entry, error) {
	key, err := jobKey(e.Record.ID)
	if err != nil {
		return Entry{}, errors.Join(ErrNotFound, err)
	}
	var (
		fresh   bool   // e comes from the leader
		unknown error  // an earlier write that was not answered
		sent    []byte // what that write said
	)
	for try := 1; ; try++ {
		conflict := false
		next, err := job.Apply(e.Record, ev, time.Now())
		if err == nil {
			_, data, err := encode(next)
			if err != nil {
				return e, err
			}
			earlier := r.earlier(next.Version, len(data))
			revision, err := r.b.write(ctx, key, data, e.Revision, earlier)
			switch {
			case err == nil:
				r.c.count.writes.Add(1)
				if earlier == keep {
					r.c.usage.added.Add(int64(len(data) + len(key)))
				}
				return Entry{Record: next, Revision: revision}, nil
			case errors.Is(err, errConflict):
				conflict = true
			case errors.Is(err, ErrAmbiguous):
				r.c.count.ambiguous.Add(1)
				unknown, sent = err, data
			case unknown != nil && errors.Is(err, ErrUnavailable):
				// Whether the earlier write got through is still open.
			default:
				return e, err
			}
		} else if fresh {
			r.c.count.refused.Add(1)
			return e, err
		}
		have, err := r.readBack(ctx, key, unknown)
		if err != nil {
			return e, err
		}
		now, err := decode(have)
		if err != nil {
			return e, err
		}
		// An unanswered write may have got through, and others may have gone on from
		// there: then the event must not be applied a second time.
		if unknown != nil && (bytes.Equal(have.data, sent) || tookEffect(now.Record, ev)) {
			r.c.count.writes.Add(1)
			return now, nil
		}
		switch {
		case conflict && now.Revision == e.Revision:
			r.c.count.spurious.Add(1) // a replicated stream refuses the only writer now and then
		case conflict:
			r.c.count.conflicts.Add(1)
		}
		e, fresh = now, true
		if try > 2 && !pause(ctx, retryPause(try)) {
			if unknown != nil {
				return e, unknown
			}
			return e, fmt.Errorf("%w: %w", ErrUnavailable, ctx.Err())
		}
	}
}

// readBack reads a key from the leader. While the outcome of a write is unknown it
// does so until it gets an answer or ctx ends.
func (r *Registry) readBack(ctx context.Context, key string, unknown error) (stored, error) {
	for try := 1; ; try++ {
		s, err := r.b.leader(ctx, key)
		if err == nil || unknown == nil || errors.Is(err, ErrNotFound) {
			return s, err
		}
		if !pause(ctx, backoff(try, 50*time.Millisecond, time.Second)) {
			return stored{}, unknown
		}
	}
}

// tookEffect reports whether an unanswered write of an event happened, although the
// record has moved on. Only an assignment can be applied twice (its worker may have
// given the job back), and it leaves a trace that is its own; of every other event
// a second application is refused.
func tookEffect(rec job.Record, ev job.Event) bool {
	a, ok := ev.(job.Assign)
	if !ok {
		return false
	}
	for i := range rec.Attempts {
		if rec.Attempts[i].LeaseID == a.LeaseID {
			return true
		}
	}
	return false
}

// retryPause spreads writers that compete for one key.
func retryPause(try int) time.Duration {
	most := backoff(try, 2*time.Millisecond, 100*time.Millisecond)
	return time.Duration(rand.Int64N(int64(most)) + 1)
}

// Purge removes the messages of a job up to and including a revision. It leaves
// no marker. A job that is not there is no error.
func (r *Registry) Purge(ctx context.Context, jobID string, upTo uint64) error {
	key, err := jobKey(jobID)
	if err != nil {
		return fmt.Errorf("purge job: %w", err)
	}
	return r.c.purge(ctx, streamJobs, prefixJobs+key, upTo)
}

// PurgeGroup removes the messages of a whole group of jobs (id.Group) up to and
// including a revision.
func (r *Registry) PurgeGroup(ctx context.Context, group string, upTo uint64) error {
	filter, err := groupFilter(group)
	if err != nil {
		return fmt.Errorf("purge group: %w", err)
	}
	return r.c.purge(ctx, streamJobs, filter, upTo)
}

// encode gives the key and the value of a record.
func encode(rec job.Record) (key string, data []byte, err error) {
	if key, err = jobKey(rec.ID); err != nil {
		return "", nil, err
	}
	if data, err = json.Marshal(rec); err != nil {
		return "", nil, fmt.Errorf("encode record: %w", err)
	}
	if len(data) > job.MaxRecordBytes {
		return "", nil, fmt.Errorf("%w: the record has %d bytes", ErrTooLarge, len(data))
	}
	return key, data, nil
}

// decode reads a value of the registry. ErrMalformed.
func decode(s stored) (Entry, error) {
	e := Entry{Revision: s.revision}
	if err := json.Unmarshal(s.data, &e.Record); err != nil {
		return Entry{}, fmt.Errorf("%w: record: %w", ErrMalformed, err)
	}
	if e.Record.Schema > job.Schema {
		return Entry{}, fmt.Errorf("%w: record of schema %d, this version reads %d", ErrMalformed, e.Record.Schema, job.Schema)
	}
	if key, err := jobKey(e.Record.ID); err != nil || key != s.key {
		return Entry{}, fmt.Errorf("%w: record under another job's key", ErrMalformed)
	}
	return e, nil
}

// DecodeRecord reads a message of JobsProjection. ErrMalformed.
func DecodeRecord(m Msg) (Entry, error) {
	return decode(stored{key: strings.TrimPrefix(m.Subject, prefixJobs), data: m.Data, revision: m.Sequence})
}

// usage is how full the registry is, and which one it is.
type usage struct {
	used, limit atomic.Int64
	added       atomic.Int64 // by writes here, since used was read
	generation  atomic.Pointer[string]
}

// beyond reports whether more than that many percent of the limit are used.
func (u *usage) beyond(percent int64) bool {
	limit := u.limit.Load()
	return limit > 0 && u.used.Load()+u.added.Load() > limit/100*percent
}

// refreshUsage reads the registry's stream. It keeps what it has when the bus is away.
func (c *Conn) refreshUsage(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	before := c.usage.added.Load()
	s, err := c.js.Stream(ctx, streamJobs)
	if err != nil {
		return
	}
	info := s.CachedInfo()
	c.usage.used.Store(int64(info.State.Bytes))
	c.usage.limit.Store(info.Config.MaxBytes)
	c.usage.added.Add(-before)
	generation := info.Config.Metadata[metadataGeneration]
	c.usage.generation.Store(&generation)
}

// Usage returns the registry's bytes and its limit, about a second old. Both are
// 0 until first known.
func (r *Registry) Usage() (used, limit int64) {
	r.c.startWatching()
	u := &r.c.usage
	return u.used.Load() + u.added.Load(), u.limit.Load()
}

// Generation identifies this life of the registry: another one means that all
// earlier records are gone. Empty before Bind; about a second old.
func (r *Registry) Generation() string {
	if g := r.c.usage.generation.Load(); g != nil {
		return *g
	}
	return ""
}
