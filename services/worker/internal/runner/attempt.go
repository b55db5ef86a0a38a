package runner

import (
	"cmp"
	"context"
	"errors"
	"strconv"
	"strings"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/failpoint"
	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
	"github.com/cmdexec/cmdexec/services/worker/internal/journal"
	"github.com/cmdexec/cmdexec/services/worker/internal/output"
	"github.com/cmdexec/cmdexec/services/worker/internal/spool"
)

// attempt is one lease: first a command, then a result that waits for its
// acknowledgement. Its fields are guarded by the runner's mutex.
type attempt struct {
	r       *Runner
	lease   workerproto.Lease
	spec    job.Spec
	renewed time.Duration // by the worker's clock
	life    time.Duration // without a renewal, before the lease is given up

	turn   chan struct{} // closed when it has room
	inside bool          // it has

	phase                                          workerproto.Phase
	acceptedAt, preparingAt, preparedAt, startedAt time.Time
	quiet                                          *time.Timer
	loud                                           bool                // its steps are reported
	stale                                          bool                // not ours any more: nothing is reported
	gaveUp                                         bool                // its lease was not confirmed in time
	stopAsked                                      executor.StopReason // the first reason
	stopAskedAt                                    time.Time
	killed                                         bool             // it must not wait for its grace
	unprepare                                      func()           // ends Prepare
	running                                        executor.Attempt // nil until prepared

	pending     []queuedChunk // not acknowledged, in order of seq
	sent        int           // of pending
	inFlight    int           // bytes sent and not acknowledged
	memory      int           // bytes held in pending
	lastSeq     int64
	triedSeq    int64 // the highest that was ever sent, in whatever session
	resultFrame []byte
	resultSent  bool
	queued      bool // has a turn at sending
	underWay    bool // a parcel is

	entry    *journal.Entry // nil: a later process cannot go on with it
	mark     mark           // what the entry says
	savedSeq int64          // up to here the entry knows of the output
	resume   func()         // of a command of an earlier life, until Begin
}

// queuedChunk is an output chunk on its way. Where memory was short it is here
// without its data; then the spool has it, or lost says that nobody has.
type queuedChunk struct {
	seq   int64
	size  int // of the data
	chunk *workerproto.Chunk
	lost  bool
}

// chunkOverhead is about what a chunk takes in memory beside its data.
const chunkOverhead = 160

func newAttempt(r *Runner, asg workerproto.Assignment) *attempt {
	return &attempt{
		r: r, lease: asg.Lease, spec: asg.Job, turn: make(chan struct{}),
		phase: workerproto.PhaseAccepted, acceptedAt: job.Timestamp(time.Now()),
	}
}

func (a *attempt) key() spool.Key { return keyOf(a.lease) }

func keyOf(l workerproto.Lease) spool.Key {
	return spool.Key(l.JobID + "/" + strconv.Itoa(l.Attempt) + "/" + l.LeaseID)
}

// run takes the attempt from its acceptance to its result, or back where there is
// no room for it. It blocks until nothing of the command is left.
func (a *attempt) run(ctx context.Context, ex executor.Executor) {
	if !a.awaitTurn(ctx) {
		a.unprepare()
		return
	}
	rec := output.New(logLimit(&a.spec), time.Now, a.keep)
	res, prepared := a.execute(ctx, ex, rec)
	a.conclude(rec, res, prepared)
}

func logLimit(s *job.Spec) int64 { return cmp.Or(s.LogMaxBytes, job.DefaultLogMaxBytes) }

// conclude takes an attempt that has ended to its result. The result is in the
// spool before anything is removed by which another process would see that the
// command has run.
func (a *attempt) conclude(rec *output.Recorder, res *workerproto.Result, x executor.Attempt) {
	failpoint.At(failpoint.WorkerEnded)
	manifest := rec.Close()
	res.Manifest = &manifest
	a.settle(res)
	failpoint.At(failpoint.WorkerSpooled)
	if x != nil {
		if err := x.Close(); err != nil {
			a.r.cfg.Logger.Warn("attempt not cleaned up, tried again at the next start",
				"job", a.lease.JobID, "attempt", a.lease.Attempt, "error", err)
		}
	}
	a.finish()
}

// execute runs the command. What it returns beside the result is to be closed,
// unless it is nil.
func (a *attempt) execute(ctx context.Context, ex executor.Executor, rec *output.Recorder) (*workerproto.Result, executor.Attempt) {
	a.step(workerproto.PhasePreparing)
	prepared, err := ex.Prepare(ctx, specFor(a.r.cfg.WorkerID, a.lease, &a.spec))
	a.unprepare() // gives the context back
	if err != nil {
		return a.notStarted(rec, err), nil
	}
	a.attach(prepared)
	if a.enter(ex, prepared) {
		rec.Mark(a.kept)
	}
	if err := prepared.Start(rec.Writer(workerproto.Stdout), rec.Writer(workerproto.Stderr)); err != nil {
		return a.notStarted(rec, err), prepared
	}
	failpoint.At(failpoint.WorkerStarted)
	a.step(workerproto.PhaseStarted)
	ended := make(chan struct{})
	defer close(ended)
	a.awaitFed(prepared, ended)
	return a.resultOf(prepared.Wait()), prepared
}

// attach makes the prepared command reachable for stop, and passes on what was
// asked while it was prepared. A command does not start under a lease that is
// too old: the machine may have slept since the last look at it.
func (a *attempt) attach(x executor.Attempt) {
	a.r.mu.Lock()
	defer a.r.mu.Unlock()
	a.running = x
	a.r.giveUp(a, a.r.cfg.Clock.Now())
	if a.stopAsked != 0 {
		x.Stop(a.stopAsked)
	}
	if a.killed {
		x.Stop(executor.StopLeaseLost)
	}
}

// stop asks for the end of the attempt. The first reason stands; a lost lease
// only takes away the grace of an earlier one. The runner's mutex is held.
func (a *attempt) stop(why executor.StopReason) {
	if a.phase == workerproto.PhaseEnded {
		return
	}
	if a.stopAsked == 0 {
		a.stopAsked, a.stopAskedAt = why, time.Now()
		a.mark.Stop, a.mark.StopAt = a.stopAsked, a.stopAskedAt
		a.save()
	}
	a.killed = a.killed || why == executor.StopLeaseLost
	if a.running != nil {
		a.running.Stop(why)
		return
	}
	a.unprepare()
}

func (a *attempt) step(p workerproto.Phase) {
	now := job.Timestamp(time.Now())
	a.r.mu.Lock()
	defer a.r.mu.Unlock()
	a.phase = p
	switch p {
	case workerproto.PhasePreparing:
		a.preparingAt = now
	case workerproto.PhaseStarted:
		a.preparedAt, a.startedAt = now, now
		a.mark.Started, a.mark.StartedAt = a.r.cfg.Clock.Now(), now
		a.save()
	}
	if a.loud {
		a.r.sayPhase(a)
	}
}

// keep is where the recorder hands over a chunk: to the spool, and to the
// queue for the edge.
func (a *attempt) keep(c workerproto.Chunk) error {
	if a.forgotten() {
		return nil // nobody wants it
	}
	kept := spool.Chunk{Seq: c.Seq, Offset: c.Offset, Stream: string(c.Stream), Time: c.Time, Data: c.Data}
	if err := a.r.cfg.Spool.Append(a.key(), kept); err != nil {
		return err
	}
	a.r.mu.Lock()
	defer a.r.mu.Unlock()
	q := queuedChunk{seq: c.Seq, size: len(c.Data)}
	if n := q.size + chunkOverhead; a.memory+n <= memoryPerAttempt && a.r.memory+n <= memoryInAll {
		q.chunk = &c
		a.hold(n)
	}
	a.pending = append(a.pending, q)
	a.lastSeq = c.Seq
	if !a.loud && (a.memory > workerproto.MaxTailBytes/2 || len(a.pending) > workerproto.MaxTailChunks/2) {
		a.speakUp() // it may be more than a result can carry
	}
	if a.loud {
		a.r.queue(a) // until then the output may be small enough to ride in the result
	}
	return nil
}

func (a *attempt) forgotten() bool {
	a.r.mu.Lock()
	defer a.r.mu.Unlock()
	return a.stale
}

// hold counts bytes that are kept in memory, or below zero not any more.
func (a *attempt) hold(n int) {
	a.memory += n
	a.r.memory += n
}

// release lets go of a chunk that nobody needs any more.
func (a *attempt) release(q *queuedChunk) {
	if q.chunk != nil {
		a.hold(-q.size - chunkOverhead)
	}
	*q = queuedChunk{}
}

// speakUp ends the quiet time of an attempt: from here each step is told.
func (a *attempt) speakUp() {
	a.loud = true
	a.r.sayPhase(a)
}

func (a *attempt) notStarted(rec *output.Recorder, err error) *workerproto.Result {
	res := a.newResult()
	a.r.mu.Lock()
	asked, askedAt := a.stopAsked, a.stopAskedAt
	a.r.mu.Unlock()
	if asked != 0 {
		now := time.Now()
		a.describeStop(res, &executor.StopReceipt{Reason: asked, DeliveredAt: askedAt, ExitedAt: now, GoneAt: now}, false)
		return res
	}
	why := executor.AsPrepareError(err)
	res.Outcome, res.Message = job.OutcomeFailed, clip(why.Reason)
	switch {
	case why.Class == executor.ClassUser:
		res.Reason = job.ReasonStartFailed
	case why.Code != "":
		res.Reason = job.Reason(why.Code)
		a.r.cfg.Logger.Warn("attempt could not be prepared", "job", a.lease.JobID, "attempt", a.lease.Attempt, "error", err)
	case errors.Is(err, context.DeadlineExceeded):
		res.Reason = job.ReasonPrepareTimeout
	default:
		res.Reason = job.ReasonWorkerError
		a.r.cfg.Logger.Warn("attempt could not be prepared", "job", a.lease.JobID, "attempt", a.lease.Attempt, "error", err)
	}
	rec.System("[cmdexec: " + res.Message + "]")
	return res
}

// clip cuts a text for people to what a record keeps of it, so that a result
// always fits into a frame.
func clip(s string) string {
	return strings.ToValidUTF8(s[:min(len(s), job.MaxReasonBytes)], "")
}

func (a *attempt) newResult() *workerproto.Result {
	a.r.mu.Lock()
	defer a.r.mu.Unlock()
	return &workerproto.Result{
		WorkerID: a.r.cfg.WorkerID, Lease: a.lease, AcceptedAt: a.acceptedAt, PreparedAt: a.preparedAt,
		FinishedAt: job.Timestamp(time.Now()),
	}
}

func (a *attempt) resultOf(exit executor.Exit) *workerproto.Result {
	res := a.newResult()
	res.StartedAt, res.FinishedAt = job.Timestamp(exit.StartedAt), job.Timestamp(exit.FinishedAt)
	res.ExitCode, res.Signal, res.OOMKilled, res.Message = exit.Code, exit.Signal, exit.OOMKilled, clip(exit.Reason)
	res.PeakMemoryMB, res.CPUMs, res.ImageDigest, res.Warm = exit.PeakMemoryMB, exit.CPUms, exit.ImageDigest, exit.Warm
	if exit.Stop != nil {
		a.describeStop(res, exit.Stop, exit.Survivors)
	}
	switch {
	case res.Outcome != "": // it was a stop that ended it
	case exit.Failure != "": // how it ended is not known, so it is not told
		res.Outcome, res.Reason = job.OutcomeFailed, job.Reason(exit.Failure)
	case exit.TimedOut:
		res.Outcome, res.Reason = job.OutcomeTimedOut, job.ReasonExecutionTimeout
	case exit.OOMKilled && (exit.Code == nil || *exit.Code != 0):
		res.Outcome, res.Reason = job.OutcomeFailed, job.ReasonOOMKilled
	case exit.Signal != "":
		res.Outcome, res.Reason = job.OutcomeFailed, job.ReasonSignaled
	case exit.Code != nil && *exit.Code == 0:
		res.Outcome = job.OutcomeSucceeded
	default:
		res.Outcome, res.Reason = job.OutcomeFailed, job.ReasonExitCode
	}
	return res
}

// describeStop adds the receipt, and the outcome where the stop is what ended
// the command: a command that had ended by itself keeps its own outcome.
func (a *attempt) describeStop(res *workerproto.Result, s *executor.StopReceipt, survivors bool) {
	res.Stop = &job.Cancel{
		DeliveredAt: job.Timestamp(s.DeliveredAt), SignalledAt: job.Timestamp(s.SignalledAt),
		ExitedAt: job.Timestamp(s.ExitedAt), GoneAt: job.Timestamp(s.GoneAt), StopUnconfirmed: survivors,
	}
	if s.SignalledAt.IsZero() && !res.StartedAt.IsZero() {
		return
	}
	switch s.Reason {
	case executor.StopLeaseLost:
		res.Outcome, res.Reason = job.OutcomeFailed, job.ReasonLeaseLost
	case executor.StopShutdown:
		res.Outcome, res.Reason = job.OutcomeFailed, job.ReasonWorkerStopped
	case executor.StopCancel:
		res.Outcome, res.Reason = job.OutcomeCanceled, job.ReasonCanceled
	}
}

// settle puts the result into the spool. It is not sent before finish.
func (a *attempt) settle(res *workerproto.Result) {
	a.r.mu.Lock()
	defer a.r.mu.Unlock()
	if a.quiet != nil { // it had its room
		a.quiet.Stop()
	}
	if a.stale {
		return
	}
	if err := a.setResult(res); err != nil {
		a.r.cfg.Logger.Error("result not spooled, it is lost if this worker dies now",
			"job", a.lease.JobID, "attempt", a.lease.Attempt, "error", err)
	}
}

// finish frees the slot and hands the result over. From here the attempt only
// waits for acknowledgements.
func (a *attempt) finish() {
	a.r.mu.Lock()
	defer a.r.mu.Unlock()
	a.r.vacate(a)
	a.phase, a.running, a.spec = workerproto.PhaseEnded, nil, job.Spec{}
	a.leave()
	if a.stale {
		a.r.forget(a)
		return
	}
	a.r.queue(a)
}

// setResult encodes the result, with the output that fits into it, and puts it
// into the spool. Only an error of the spool is possible.
func (a *attempt) setResult(res *workerproto.Result) error {
	res.Tail = a.takeTail()
	frame, err := workerproto.Encode(workerproto.TypeResult, res)
	if err != nil {
		return err
	}
	a.resultFrame = frame
	return a.r.cfg.Spool.PutResult(a.key(), frame)
}

// takeTail moves the chunks that were never sent into the result, where they
// are few.
func (a *attempt) takeTail() []workerproto.Chunk {
	from := a.sent
	for from < len(a.pending) && a.pending[from].seq <= a.triedSeq {
		from++ // the edge may have it from an earlier session
	}
	rest := a.pending[from:]
	if len(rest) == 0 || len(rest) > workerproto.MaxTailChunks {
		return nil
	}
	total := 0
	for i := range rest {
		total += rest[i].size
	}
	if total > workerproto.MaxTailBytes {
		return nil
	}
	tail := make([]workerproto.Chunk, len(rest))
	for i := range rest {
		tail[i] = a.data(&rest[i])
		a.release(&rest[i])
	}
	a.pending = a.pending[:from]
	return tail
}

// next is the attempt's next frame: output first, and the result once all
// output that does not ride in it is acknowledged.
func (a *attempt) next() (Frame, bool) {
	if a.stale {
		return Frame{}, false
	}
	if a.sent < len(a.pending) {
		q := &a.pending[a.sent]
		if a.inFlight > 0 && a.inFlight+q.size > workerproto.MaxUnackedBytes {
			return Frame{}, false // an acknowledgement gives it another turn
		}
		frame, err := workerproto.EncodeChunk(a.lease, a.data(q))
		if err != nil {
			a.r.cfg.Logger.Error("output not encoded", "job", a.lease.JobID, "seq", q.seq, "error", err)
			return Frame{}, false
		}
		a.sent++
		a.inFlight += q.size
		a.triedSeq = max(a.triedSeq, q.seq)
		return Frame{Data: frame, Binary: true}, true
	}
	if a.hasResult() {
		a.resultSent = true
		return Frame{Data: a.resultFrame}, true
	}
	return Frame{}, false
}

// hasResult reports whether the result is what comes next.
func (a *attempt) hasResult() bool {
	return a.phase == workerproto.PhaseEnded && a.resultFrame != nil && !a.resultSent && len(a.pending) == 0
}

// Bounds of one parcel of output, which JSON makes a third larger.
const (
	maxParcelBytes  = 512 << 10
	maxParcelChunks = 512
)

// ready is what the attempt's next parcel is: output, a result, or nothing.
func (a *attempt) ready() workerproto.Type {
	switch {
	case a.stale || a.underWay:
		return ""
	case a.sent < len(a.pending):
		return workerproto.TypeOutput
	case a.hasResult():
		return workerproto.TypeResult
	}
	return ""
}

// parcel makes the parcel that is ready.
func (a *attempt) parcel(kind workerproto.Type) Parcel {
	a.underWay = true
	p := Parcel{Type: kind, Lease: a.lease}
	if kind == workerproto.TypeResult {
		a.resultSent = true
		p.Frame = a.resultFrame
		return p
	}
	for size := 0; a.sent < len(a.pending) && len(p.Chunks) < maxParcelChunks; a.sent++ {
		q := &a.pending[a.sent]
		if size += q.size; size > maxParcelBytes && len(p.Chunks) > 0 {
			break
		}
		p.Chunks = append(p.Chunks, a.data(q))
		a.inFlight += q.size
		a.triedSeq = max(a.triedSeq, q.seq)
	}
	return p
}

// data is a pending chunk with its data. One that the disk has spoilt is
// replaced by a line that says so, under its number: a gap would hold up all
// that follows, and the manifest shows that the log is not complete.
func (a *attempt) data(q *queuedChunk) workerproto.Chunk {
	if q.chunk != nil {
		return *q.chunk
	}
	if !q.lost {
		kept, err := a.r.cfg.Spool.Read(a.key(), q.seq)
		if err == nil {
			return chunkOf(kept)
		}
		q.lost = true
		a.r.cfg.Logger.Error("spooled output cannot be read", "job", a.lease.JobID, "seq", q.seq, "error", err)
	}
	return workerproto.Chunk{
		Seq: q.seq, Stream: workerproto.System, Time: job.Timestamp(time.Now()),
		Data: []byte("[cmdexec: output is missing here, the worker's disk has lost it]\n"),
	}
}

// acked forgets the output that the bus has.
func (a *attempt) acked(seq int64) {
	n := 0
	for n < a.sent && a.pending[n].seq <= seq {
		a.inFlight -= a.pending[n].size
		a.release(&a.pending[n])
		n++
	}
	if n == 0 {
		return
	}
	a.pending = a.pending[n:] // append moves it to a fresh array when this one is used up
	if len(a.pending) == 0 {
		a.pending = nil
	}
	a.sent -= n
	if a.entry != nil {
		// A chunk that the entry does not know of yet must be in the spool.
		seq = min(seq, a.savedSeq)
	}
	a.r.cfg.Spool.Ack(a.key(), seq)
}

// rewind makes everything that is not acknowledged unsent.
func (a *attempt) rewind() {
	a.sent, a.inFlight, a.resultSent, a.queued, a.underWay = 0, 0, false, false, false
}
