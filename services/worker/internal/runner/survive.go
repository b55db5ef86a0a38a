package runner

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
	"github.com/cmdexec/cmdexec/services/worker/internal/journal"
	"github.com/cmdexec/cmdexec/services/worker/internal/output"
	"github.com/cmdexec/cmdexec/services/worker/internal/spool"
)

// How a later process goes on with a command.
//
// Before a command is started its entry is in the journal, and with every
// confirmed heartbeat, chunk of output and stop the entry's mark follows. The
// output itself is in the spool: a mark comes after its chunk, and a chunk leaves
// the spool only when a mark knows of it, so that mark and spool together always
// say exactly what was kept.
//
// The lease does not get longer by it. What the mark has is when a heartbeat was
// sent that the scheduler has confirmed, by a clock that counts for the whole
// machine and stands still in no sleep; it is written after the confirmation has
// come. So a later process gives the lease up at the moment at which the earlier
// one would have, or sooner, where a mark was lost. After a start of the machine
// nothing can be said about the clock, and nothing is gone on with.

// head is what never changes of an entry.
type head struct {
	WorkerID   string            `json:"workerId"`
	Boot       string            `json:"boot"`
	Executor   string            `json:"executor"`
	Lease      workerproto.Lease `json:"lease"`
	Life       time.Duration     `json:"life"`
	Spec       job.Spec          `json:"spec"` // without what only a start needs
	Handle     json.RawMessage   `json:"handle"`
	AcceptedAt time.Time         `json:"acceptedAt"`
	PreparedAt time.Time         `json:"preparedAt"`
}

// mark is what changes of an entry.
type mark struct {
	Renewed   time.Duration       `json:"renewed"` // by the machine's clock, as Started
	Started   time.Duration       `json:"started"` // or about to be
	StartedAt time.Time           `json:"startedAt"`
	Fed       bool                `json:"fed,omitempty"`
	Stop      executor.StopReason `json:"stop,omitempty"`
	StopAt    time.Time           `json:"stopAt,omitzero"`
	Output    output.State        `json:"output"`
	OutputAt  time.Time           `json:"outputAt"` // when the last of it came
}

// enter notes a command that is about to be started, where it can survive, and
// reports whether it does.
func (a *attempt) enter(ex executor.Executor, x executor.Attempt) bool {
	s, ok := x.(executor.Survivor)
	if !ok || a.r.cfg.Journal == nil || a.r.cfg.Boot == "" {
		return false
	}
	handle := s.Handle()
	if handle == nil {
		return false
	}
	a.r.mu.Lock()
	defer a.r.mu.Unlock()
	if a.stale {
		return false
	}
	now := job.Timestamp(time.Now())
	a.mark.Output = output.First(logLimit(&a.spec))
	a.mark.Renewed, a.mark.Started, a.mark.StartedAt, a.mark.OutputAt = a.renewed, a.r.cfg.Clock.Now(), now, now
	select {
	case <-s.Fed():
		a.mark.Fed = true
	default:
	}
	spec := a.spec
	spec.Command, spec.Env, spec.Stdin, spec.Files = job.Command{}, nil, "", nil
	entry, err := a.r.cfg.Journal.Create(string(a.key()), head{
		WorkerID: a.r.cfg.WorkerID, Boot: a.r.cfg.Boot, Executor: ex.Name(), Lease: a.lease, Life: a.life,
		Spec: spec, Handle: handle, AcceptedAt: a.acceptedAt, PreparedAt: now,
	}, a.mark)
	if err != nil {
		a.r.cfg.Logger.Warn("a command that is started now would end with this worker", "job", a.lease.JobID, "error", err)
		return false
	}
	a.entry = entry
	return true
}

// awaitFed notes when the command has all of its input.
func (a *attempt) awaitFed(x executor.Attempt, ended <-chan struct{}) {
	s, ok := x.(executor.Survivor)
	if !ok {
		return
	}
	fed := func() {
		a.r.mu.Lock()
		defer a.r.mu.Unlock()
		if !a.mark.Fed {
			a.mark.Fed = true
			a.save()
		}
	}
	select {
	case <-s.Fed():
		fed()
		return
	default:
	}
	a.r.done.Go(func() {
		select {
		case <-s.Fed():
			fed()
		case <-ended:
		}
	})
}

// save brings the entry up to date. The runner's mutex is held.
func (a *attempt) save() {
	if a.entry == nil {
		return
	}
	a.mark.Renewed = a.renewed
	if err := a.entry.Mark(a.mark); err != nil {
		a.entry = nil // and removed
		a.r.cfg.Logger.Warn("a command would end with this worker now", "job", a.lease.JobID, "error", err)
		return
	}
	a.savedSeq = a.mark.Output.Seq
}

// kept is where the recorder says from what state another one could go on.
func (a *attempt) kept(s output.State) {
	a.r.mu.Lock()
	defer a.r.mu.Unlock()
	a.mark.Output, a.mark.OutputAt = s, job.Timestamp(time.Now())
	a.save()
}

// leave removes the entry. The runner's mutex is held.
func (a *attempt) leave() {
	if a.entry == nil {
		return
	}
	if err := a.entry.Remove(); err != nil {
		a.r.cfg.Logger.Warn("journal entry not removed", "job", a.lease.JobID, "error", err)
	}
	a.entry = nil
}

// survivor is an entry of an earlier life.
type survivor struct {
	head   head
	mark   mark
	entry  *journal.Entry
	chunks []spool.ChunkInfo
}

var (
	errHasResult = errors.New("its result is in the spool")
	errBoot      = errors.New("the machine was restarted")
	errOver      = errors.New("its lease is over")
	errGivenUp   = errors.New("its lease was given up")
	errUnfed     = errors.New("it has only a part of its input")
)

// survivors reads the journal.
func (r *Runner) survivors() (map[spool.Key]*survivor, error) {
	found := map[spool.Key]*survivor{}
	if r.cfg.Journal == nil {
		return found, nil
	}
	left, err := r.cfg.Journal.Left()
	if err != nil {
		return nil, err
	}
	for _, l := range left {
		s := &survivor{entry: l.Entry}
		if err := errors.Join(json.Unmarshal(l.Head, &s.head), json.Unmarshal(l.Mark, &s.mark)); err != nil {
			r.cfg.Logger.Warn("journal entry cannot be read, removed", "error", err)
			if err := l.Entry.Remove(); err != nil {
				return nil, err
			}
			continue
		}
		found[keyOf(s.head.Lease)] = s
	}
	return found, nil
}

// adopt claims a command of the earlier life, if that may be gone on with.
func (r *Runner) adopt(key spool.Key, s *survivor) error {
	h, now := &s.head, r.cfg.Clock.Now()
	ex, ok := r.cfg.Executors[h.Executor].(executor.Adopter)
	switch {
	case !ok:
		return fmt.Errorf("this worker does not run %s jobs any more", h.Executor)
	case h.WorkerID != r.cfg.WorkerID:
		return fmt.Errorf("it belongs to worker %s", h.WorkerID)
	case h.Boot != r.cfg.Boot || r.cfg.Boot == "" || s.mark.Renewed > now || s.mark.Started > now:
		return errBoot
	case now-s.mark.Renewed > h.Life:
		return errOver
	case !s.mark.Fed:
		return errUnfed
	case s.mark.Stop == executor.StopLeaseLost:
		return errGivenUp
	}
	// The last chunk may be in the spool without the mark's knowing.
	for _, c := range s.chunks {
		if c.Seq <= s.mark.Output.Seq {
			continue
		}
		kept, err := r.cfg.Spool.Read(key, c.Seq)
		if err != nil {
			return err
		}
		if err := s.mark.Output.Add(chunkOf(kept)); err != nil {
			return err
		}
		s.mark.OutputAt = kept.Time
	}
	a := newAttempt(r, workerproto.Assignment{Lease: h.Lease, Job: h.Spec})
	rec, err := output.Resume(logLimit(&h.Spec), time.Now, a.keep, s.mark.Output)
	if err != nil {
		return err
	}
	rec.Mark(a.kept)
	x, err := ex.Adopt(specFor(r.cfg.WorkerID, h.Lease, &h.Spec), h.Handle, executor.Past{
		StartedAt: s.mark.StartedAt, Ran: now - s.mark.Started, Stop: s.mark.Stop, StopAt: s.mark.StopAt,
	})
	if err != nil {
		return err
	}
	a.renewed, a.life, a.acceptedAt, a.preparedAt, a.startedAt = s.mark.Renewed, h.Life, h.AcceptedAt, h.PreparedAt, s.mark.StartedAt
	a.phase, a.running, a.loud, a.unprepare = workerproto.PhaseStarted, x, true, func() {}
	a.stopAsked, a.stopAskedAt = s.mark.Stop, s.mark.StopAt
	a.entry, a.mark, a.savedSeq = s.entry, s.mark, s.mark.Output.Seq
	for _, c := range s.chunks {
		a.expect(c.Seq)
		a.pending = append(a.pending, queuedChunk{seq: c.Seq, size: c.Size})
	}
	if len(a.pending) > 0 {
		a.expect(s.mark.Output.Seq + 1)
	}
	a.lastSeq, a.triedSeq = s.mark.Output.Seq, s.mark.Output.Seq // any of it may have been sent
	a.resume = func() { a.goOn(x, rec) }
	r.attempts[h.Lease.LeaseID] = a
	r.admit(a)
	r.cfg.Logger.Info("going on with a command of an earlier run", "job", h.Lease.JobID, "attempt", h.Lease.Attempt, "lastSeq", a.lastSeq)
	return nil
}

// goOn takes an adopted command to its result.
func (a *attempt) goOn(x executor.Adopted, rec *output.Recorder) {
	has := a.mark.Output.Settled // nobody writes to it before Resume
	err := x.Resume(executor.Continuation{
		Stdout: rec.Writer(workerproto.Stdout), Stderr: rec.Writer(workerproto.Stderr),
		HasStdout: has[workerproto.Stdout], HasStderr: has[workerproto.Stderr], Since: a.mark.OutputAt,
		Missing: func(n int64, why string) { rec.Missing(n, "[cmdexec: "+why+"]") },
	})
	if err != nil {
		rec.Missing(0, "[cmdexec: the worker was restarted, and what the command wrote meanwhile is not known]")
		a.conclude(rec, a.notResumed(err, x.Close()), x)
		return
	}
	a.conclude(rec, a.resultOf(x.Wait()), x)
}

// notResumed is the result of a command of which nothing is known any more. left
// is why something of it is still there; nil: nothing is.
func (a *attempt) notResumed(err, left error) *workerproto.Result {
	why := executor.AsPrepareError(err)
	a.r.cfg.Logger.Warn("a command of an earlier run could not be gone on with", "job", a.lease.JobID, "attempt", a.lease.Attempt, "error", err)
	res := a.newResult()
	a.r.mu.Lock()
	asked, receipt := a.stopAsked != 0, executor.StopReceipt{Reason: a.stopAsked, DeliveredAt: a.stopAskedAt}
	a.r.mu.Unlock()
	if left == nil {
		receipt.GoneAt = time.Now()
	}
	res.Outcome, res.Reason, res.Message = job.OutcomeFailed, job.ReasonWorkerError, clip(why.Reason)
	if why.Code != "" {
		res.Reason = job.Reason(why.Code)
	}
	if asked {
		a.describeStop(res, &receipt, left != nil)
	}
	res.StartedAt = a.mark.StartedAt
	return res
}

func chunkOf(c spool.Chunk) workerproto.Chunk {
	return workerproto.Chunk{Seq: c.Seq, Offset: c.Offset, Stream: workerproto.Stream(c.Stream), Time: c.Time, Data: c.Data}
}
