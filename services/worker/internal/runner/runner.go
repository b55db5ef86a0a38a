// Package runner is the worker's own side of every lease: it takes
// assignments, runs them through an executor, records their output, and keeps
// output and results until the edge has acknowledged them. It knows nothing of
// sockets: a session feeds it with frames from the edge and pulls from it what
// is to be sent, and sessions may come and go while attempts run.
package runner

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/failpoint"
	"github.com/cmdexec/cmdexec/services/worker/internal/clock"
	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
	"github.com/cmdexec/cmdexec/services/worker/internal/journal"
	"github.com/cmdexec/cmdexec/services/worker/internal/spool"
)

// quietFor is how long an attempt goes unreported: one that ends within it is
// only ever known by its result, which spares the edge and the scheduler three
// reports for each short job.
const quietFor = 75 * time.Millisecond

// defaultLease is assumed until the edge says how long leases are.
const defaultLease = 60 * time.Second

// Bounds of the unacknowledged output that is kept in memory, for one attempt
// and for all. What is beyond is read back from the spool when its turn comes.
const (
	memoryPerAttempt = 2 << 20
	memoryInAll      = 32 << 20
)

// maxUndelivered is how many results may wait for their acknowledgement before
// nothing new is taken. All of them, and the commands that run, are listed in a
// hello, which holds workerproto.MaxRunning leases.
const maxUndelivered = 1024

// recentLeases is how many leases that are over are remembered at least.
const recentLeases = 1024

// Usage is the load of the machine: percent of all its cores, and MiB in use.
type Usage struct{ CPU, RAM float64 }

// Config is what a Runner needs.
type Config struct {
	WorkerID  string
	Offer     Offer
	Backlog   int // assignments that may wait for room
	Executors map[string]executor.Executor
	Spool     *spool.Spool
	Clock     clock.Clock
	Usage     func() Usage
	Logger    *slog.Logger

	// Journal is where commands are noted that a later process of this worker is
	// to go on with; nil: none is. Boot names the span within which readings of
	// Clock by different processes can be compared; empty: they never can, and no
	// command is gone on with.
	Journal *journal.Journal
	Boot    string
}

// Runner holds the worker's leases. Its methods are safe for concurrent use
// and none blocks for long, except Next and Stop.
type Runner struct {
	cfg  Config
	wake chan struct{} // there may be something to send

	mu        sync.Mutex
	attempts  map[string]*attempt // by lease id, until the result is acknowledged
	ended     [2]map[string]bool  // lease ids that are over, the younger ones first
	room      room
	waiting   []*attempt    // without room, oldest first
	memory    int           // bytes of output that attempts hold
	confirmed time.Duration // when the last confirmed heartbeat was sent
	everHeard bool
	selfStop  time.Duration     // a lease that is not confirmed for so long is given up
	draining  bool              // asked for by the edge
	stopping  bool              // asked for by Stop
	unready   map[string]string // executors that take nothing now, and why
	control   [][]byte
	turn      []*attempt // attempts that may have something to send, next first
	done      sync.WaitGroup
}

// New returns a runner and takes over the results that an earlier life of the
// worker left in the spool, and claims the commands that go on without it; Begin
// takes those up. All other attempts are forgotten: the edge learns from the next
// hello that nobody holds their leases.
func New(cfg Config) (*Runner, error) {
	r := &Runner{cfg: cfg, wake: make(chan struct{}, 1), attempts: map[string]*attempt{}, ended: [2]map[string]bool{{}, {}}, room: room{offer: cfg.Offer}}
	r.LeaseIs(defaultLease)
	return r, r.recover()
}

// LeaseIs notes how long the scheduler's leases are. The worker gives one up
// after three quarters of it: before the scheduler may hand the job to another.
func (r *Runner) LeaseIs(d time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.selfStop = selfStop(d)
}

func selfStop(lease time.Duration) time.Duration { return lease / 4 * 3 }

// Assign takes or rejects an assignment. sentAt is when this session's hello
// was sent: the scheduler answered that before it assigned anything.
func (r *Runner) Assign(asg workerproto.Assignment, sentAt time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.heard(sentAt)
	r.assign(asg, r.confirmed)
}

// AssignPolled takes or rejects the answer to a poll that was sent at sentAt.
// Answers may overtake each other, so nothing but the poll itself says how old
// the lease is.
func (r *Runner) AssignPolled(asg workerproto.Assignment, sentAt time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.assign(asg, sentAt)
}

// assign takes or rejects an assignment whose lease counts as renewed at renewed.
func (r *Runner) assign(asg workerproto.Assignment, renewed time.Duration) {
	if r.attempts[asg.LeaseID] != nil || r.ended[0][asg.LeaseID] || r.ended[1][asg.LeaseID] {
		return // a repeat
	}
	ex := r.cfg.Executors[asg.Job.Executor()]
	if why := r.refusal(asg, ex, renewed); why != "" {
		r.remember(asg.Lease)
		r.say(workerproto.TypeRejected, workerproto.Rejected{Lease: asg.Lease, Reason: why})
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	a := newAttempt(r, asg)
	a.renewed, a.life, a.unprepare = renewed, r.lifeOf(asg), cancel
	r.attempts[asg.LeaseID] = a
	if len(r.waiting) == 0 && r.room.fits(asg.Job.Resources) {
		r.admit(a)
	} else {
		r.waiting = append(r.waiting, a)
	}
	r.done.Go(func() { a.run(ctx, ex) })
}

// lifeOf is how long an assignment's lease lives without a renewal.
func (r *Runner) lifeOf(asg workerproto.Assignment) time.Duration {
	if asg.LeaseSeconds <= 0 {
		return r.selfStop
	}
	return min(r.selfStop, selfStop(time.Duration(asg.LeaseSeconds)*time.Second))
}

func (r *Runner) refusal(asg workerproto.Assignment, ex executor.Executor, renewed time.Duration) string {
	for _, a := range r.attempts {
		if a.lease.JobID != asg.JobID || a.phase == workerproto.PhaseEnded {
			continue
		}
		if a.lease.Attempt > asg.Attempt {
			return "a newer attempt of this job is here"
		}
		// There is a newer attempt, so this one is not current any more. The two
		// must not overlap: the newer goes back until the older is gone.
		r.drop(a)
		return "an older attempt of this job is still being stopped here"
	}
	switch {
	case r.stopping || r.draining:
		return "draining"
	case ex == nil:
		return "this worker does not run " + asg.Job.Executor() + " jobs"
	case r.unready[ex.Name()] != "":
		return r.unready[ex.Name()]
	case r.room.never(asg.Job.Resources):
		return "asks for more than this worker offers"
	case len(r.waiting) >= r.cfg.Backlog && !r.room.fits(asg.Job.Resources):
		return busy
	case len(r.attempts)-r.room.slots-len(r.waiting) >= maxUndelivered || len(r.attempts) >= workerproto.MaxRunning:
		return "too many results wait for the server"
	case r.cfg.Clock.Now()-renewed > r.lifeOf(asg):
		return "the assignment came too late"
	}
	return ""
}

// Cancel stops an attempt because its user asked for it. An unknown lease is
// ignored: its result is acknowledged, or the edge says stale.
func (r *Runner) Cancel(l workerproto.Lease) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if a := r.attempts[l.LeaseID]; a != nil {
		a.stop(executor.StopCancel)
	}
}

// Stale stops attempts that are not this worker's any more and forgets all
// that is kept for them.
func (r *Runner) Stale(leaseIDs ...string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, id := range leaseIDs {
		if a := r.attempts[id]; a != nil {
			r.drop(a)
		}
	}
}

// drop kills an attempt and forgets it: nothing of it is reported.
func (r *Runner) drop(a *attempt) {
	a.stale = true
	a.stop(executor.StopLeaseLost)
	if a.phase == workerproto.PhaseEnded {
		r.forget(a)
	}
}

// forget lets go of an attempt that has ended.
func (r *Runner) forget(a *attempt) {
	delete(r.attempts, a.lease.LeaseID)
	a.stale = true
	for i := range a.pending {
		a.release(&a.pending[i])
	}
	a.pending = nil
	r.remember(a.lease)
	if err := r.cfg.Spool.Drop(a.key()); err != nil {
		r.cfg.Logger.Warn("spool entry not removed", "job", a.lease.JobID, "error", err)
	}
}

// remember keeps a lease that is over, so that a repeated assignment does not
// start it again: its job may be with another worker by then.
func (r *Runner) remember(l workerproto.Lease) {
	if len(r.ended[0]) >= recentLeases {
		r.ended[0], r.ended[1] = map[string]bool{}, r.ended[0]
	}
	r.ended[0][l.LeaseID] = true
}

// Drain sets whether the edge wants this worker to take no new work.
func (r *Runner) Drain(on bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.draining = on
}

// Draining reports whether no new work is taken.
func (r *Runner) Draining() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.draining || r.stopping
}

// Heard notes that the scheduler answered something that was sent at sentAt.
func (r *Runner) Heard(sentAt time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.heard(sentAt)
}

func (r *Runner) heard(sentAt time.Duration) {
	if !r.everHeard || sentAt > r.confirmed {
		r.confirmed, r.everHeard = sentAt, true
	}
}

// Beat takes in the answer to the heartbeat that was sent at sentAt.
func (r *Runner) Beat(b workerproto.Beat, sentAt time.Duration) {
	r.mu.Lock()
	r.heard(sentAt)
	for _, id := range b.Confirmed {
		if a := r.attempts[id]; a != nil && sentAt > a.renewed {
			a.renewed = sentAt
			a.save()
		}
	}
	r.draining = b.Drain
	r.mu.Unlock()
	r.Stale(b.Stale...)
	for _, l := range b.Cancel {
		r.Cancel(l)
	}
}

// GiveUpLeases stops every attempt whose lease has not been confirmed for
// three quarters of its length. It returns when to call it again, at the latest.
func (r *Runner) GiveUpLeases() time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.cfg.Clock.Now()
	for _, a := range r.attempts {
		r.giveUp(a, now)
	}
	// A lease is given up at most a fifteenth of its length late. The second is
	// for a machine that wakes up: its timers have stood still.
	return min(r.selfStop/20, time.Second)
}

func (r *Runner) giveUp(a *attempt, now time.Duration) {
	if a.phase == workerproto.PhaseEnded || a.gaveUp || now-a.renewed <= a.life {
		return
	}
	r.cfg.Logger.Warn("lease not confirmed in time, stopping its command",
		"job", a.lease.JobID, "attempt", a.lease.Attempt, "unconfirmed", now-a.renewed)
	a.gaveUp = true
	a.stop(executor.StopLeaseLost)
}

// Ack notes what the bus has.
func (r *Runner) Ack(ack workerproto.Ack) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, l := range ack.Results {
		if a := r.attempts[l.LeaseID]; a != nil && a.phase == workerproto.PhaseEnded {
			failpoint.At(failpoint.WorkerAcked)
			r.forget(a)
		}
	}
	if ack.AckedSeq == 0 {
		return
	}
	for _, a := range r.attempts {
		if a.lease.JobID == ack.JobID && a.lease.Attempt == ack.Attempt {
			a.acked(ack.AckedSeq)
			r.queue(a)
		}
	}
}

// Holding lists every lease that this worker still works on or has an
// unacknowledged result for, for the hello of a new session.
func (r *Runner) Holding() []workerproto.RunningLease {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := []workerproto.RunningLease{}
	for _, a := range r.attempts {
		if !a.stale {
			out = append(out, workerproto.RunningLease{Lease: a.lease, LastSeq: a.lastSeq})
		}
	}
	return out
}

// Heartbeat says how the worker is.
func (r *Runner) Heartbeat() workerproto.Heartbeat {
	usage := r.cfg.Usage()
	r.mu.Lock()
	defer r.mu.Unlock()
	h := workerproto.Heartbeat{
		WorkerID: r.cfg.WorkerID, Status: workerproto.StatusIdle, CPUUsage: usage.CPU, RAMUsage: usage.RAM,
		FreeSlots: max(0, r.cfg.Offer.Slots-r.room.slots), Running: []workerproto.PhaseLease{}, Reason: r.idle(),
	}
	if r.room.slots > 0 {
		h.Status = workerproto.StatusBusy
	}
	if r.draining || r.stopping {
		h.Status, h.FreeSlots = workerproto.StatusDraining, 0
	}
	if h.Reason != "" {
		h.FreeSlots = 0
	}
	for _, a := range r.attempts {
		if !a.stale {
			h.Running = append(h.Running, workerproto.PhaseLease{Lease: a.lease, Phase: a.phase})
		}
	}
	return h
}

// Connected begins a new session: whatever the last one did not get
// acknowledged is sent again.
func (r *Runner) Connected() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.control, r.turn = nil, nil
	for _, a := range r.attempts {
		a.rewind()
		r.queue(a)
		if a.loud && a.phase != workerproto.PhaseEnded {
			r.sayPhase(a)
		}
	}
}

// Frame is one message for a transport that sends one after the other, as a
// WebSocket does.
type Frame struct {
	Data   []byte
	Binary bool
}

// Next returns what is to be sent next. It blocks until there is something or
// ctx ends. One session at a time may call it.
func (r *Runner) Next(ctx context.Context) (Frame, error) {
	for {
		if f, ok := r.take(); ok {
			return f, nil
		}
		select {
		case <-r.wake:
		case <-ctx.Done():
			return Frame{}, ctx.Err()
		}
	}
}

func (r *Runner) take() (Frame, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.control) > 0 {
		f := r.control[0]
		r.control = r.control[1:]
		return Frame{Data: f}, true
	}
	for len(r.turn) > 0 {
		a := r.turn[0]
		r.turn = slices.Delete(r.turn, 0, 1)
		a.queued = false
		if f, ok := a.next(); ok {
			r.queue(a) // one frame each, in turns
			return f, true
		}
	}
	return Frame{}, false
}

// Parcel is a message for a transport that waits for an answer to each and
// sends several at once, as HTTP does.
type Parcel struct {
	Type   workerproto.Type
	Lease  workerproto.Lease   // of output and results
	Chunks []workerproto.Chunk // of output, else nil
	Frame  []byte              // of everything else: the text frame
}

// Take is Next for parcels, and does not block: it returns what may be sent now,
// of the kinds that are asked for. An attempt has one parcel of output or result
// under way at most; Done ends it.
func (r *Runner) Take(reports, outputs bool) (Parcel, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if reports && len(r.control) > 0 {
		frame := r.control[0]
		r.control = r.control[1:]
		t, err := workerproto.TypeOf(frame)
		return Parcel{Type: t, Frame: frame}, err == nil // it was encoded here
	}
	for i := 0; i < len(r.turn); {
		a := r.turn[i]
		kind := a.ready()
		if kind == workerproto.TypeOutput && !outputs || kind == workerproto.TypeResult && !reports {
			i++ // keeps its turn
			continue
		}
		r.turn = slices.Delete(r.turn, i, i+1)
		a.queued = false
		if kind != "" {
			return a.parcel(kind), true
		}
	}
	return Parcel{}, false
}

// Done ends a parcel. What of it was not acknowledged is not sent again in this
// session.
func (r *Runner) Done(p Parcel) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if a := r.attempts[p.Lease.LeaseID]; a != nil {
		a.underWay = false
		r.queue(a)
	}
}

// Wake is told when Take may have something new. One session at a time may use it.
func (r *Runner) Wake() <-chan struct{} { return r.wake }

// queue gives an attempt a turn at sending, at the end of the line.
func (r *Runner) queue(a *attempt) {
	if !a.queued && !a.stale {
		a.queued = true
		r.turn = append(r.turn, a)
	}
	r.notify()
}

func (r *Runner) notify() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

func (r *Runner) say(t workerproto.Type, body any) {
	frame, err := workerproto.Encode(t, body)
	if err != nil {
		r.cfg.Logger.Error("frame not encoded", "type", t, "error", err)
		return
	}
	r.control = append(r.control, frame)
	r.notify()
}

// report ends the quiet time of an attempt that has its room and still runs.
func (r *Runner) report(a *attempt) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if a.phase != workerproto.PhaseEnded && !a.stale && !a.loud {
		a.speakUp()
		r.queue(a)
	}
}

func (r *Runner) sayPhase(a *attempt) {
	p := workerproto.Progress{Lease: a.lease}
	switch a.phase {
	case workerproto.PhaseAccepted:
		p.At = a.acceptedAt
		r.say(workerproto.TypeAccepted, p)
	case workerproto.PhasePreparing:
		p.At = a.preparingAt
		r.say(workerproto.TypePreparing, p)
	case workerproto.PhaseStarted:
		p.At = a.startedAt
		r.say(workerproto.TypeStarted, p)
	}
}

// Idle reports whether no command runs and no result waits for its acknowledgement.
func (r *Runner) Idle() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.attempts) == 0
}

// Busy is the number of slots taken.
func (r *Runner) Busy() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.room.slots
}

// Unready says which executors take nothing now, and why: their assignments are
// rejected, and where that is all of them the heartbeat says so.
func (r *Runner) Unready(why map[string]string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.unready = why
}

// idle is why nothing is taken at all; empty: something is.
func (r *Runner) idle() string {
	if len(r.unready) < len(r.cfg.Executors) {
		return ""
	}
	var why []string
	for _, name := range slices.Sorted(maps.Keys(r.unready)) {
		why = append(why, name+": "+r.unready[name])
	}
	return strings.Join(why, "; ")
}

// Begin goes on with the commands of the earlier life that New has claimed. It
// does not block. Call it once, when leftovers are removed.
func (r *Runner) Begin() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, a := range r.attempts {
		if resume := a.resume; resume != nil {
			a.resume = nil
			r.done.Go(resume)
		}
	}
}

// Stop stops every command (signal, grace, kill; from the end of ctx on without
// grace) and blocks until all of them are gone. Their results are in the spool
// then, and may still be sent.
func (r *Runner) Stop(ctx context.Context) {
	r.stopAll(executor.StopShutdown)
	hurry := context.AfterFunc(ctx, func() { r.stopAll(executor.StopLeaseLost) })
	defer hurry()
	r.done.Wait()
}

func (r *Runner) stopAll(why executor.StopReason) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stopping = true
	for _, a := range r.attempts {
		a.stop(why)
	}
}

// ErrOtherWorker means that the spool holds results of another worker, which
// the edge does not take from this one.
var ErrOtherWorker = errors.New("the data folder holds results of another worker that were not delivered")

// recover takes up what the spool and the journal have of an earlier life.
func (r *Runner) recover() error {
	survivors, err := r.survivors()
	if err != nil {
		return err
	}
	for _, left := range r.cfg.Spool.Recovered() {
		a, err := r.recovered(left)
		if err != nil {
			return err
		}
		if a != nil {
			r.attempts[a.lease.LeaseID] = a
			continue // the result stands; a survivor of that lease is removed below
		}
		if s := survivors[left.Key]; s != nil {
			s.chunks = left.Chunks
		} else if err := r.cfg.Spool.Drop(left.Key); err != nil {
			return err
		}
	}
	for key, s := range survivors {
		err := error(errHasResult)
		if r.attempts[s.head.Lease.LeaseID] == nil {
			err = r.adopt(key, s)
		}
		if err == nil {
			continue
		}
		if !errors.Is(err, errHasResult) {
			r.cfg.Logger.Warn("a command of an earlier run is not gone on with, what is left of it is removed",
				"job", s.head.Lease.JobID, "attempt", s.head.Lease.Attempt, "because", err)
			if err := r.cfg.Spool.Drop(key); err != nil {
				return err
			}
		}
		if err := s.entry.Remove(); err != nil {
			return err
		}
	}
	return nil
}

func (r *Runner) recovered(left spool.Recovered) (*attempt, error) {
	if left.Result == nil {
		return nil, nil // it died with the worker; nobody holds its lease
	}
	var res workerproto.Result
	if err := workerproto.Decode(left.Result, &res); err != nil {
		r.cfg.Logger.Error("spooled result cannot be read, dropped", "error", err)
		return nil, nil
	}
	if res.WorkerID != r.cfg.WorkerID {
		return nil, fmt.Errorf("%w (%s)", ErrOtherWorker, res.WorkerID)
	}
	a := &attempt{r: r, lease: res.Lease, phase: workerproto.PhaseEnded, resultFrame: left.Result}
	end := int64(math.MaxInt64) // the first number that rides in the result
	if len(res.Tail) > 0 {
		end = res.Tail[0].Seq
		a.lastSeq = res.Tail[len(res.Tail)-1].Seq
	}
	for _, c := range left.Chunks {
		if c.Seq >= end {
			break
		}
		a.expect(c.Seq)
		a.pending = append(a.pending, queuedChunk{seq: c.Seq, size: c.Size})
	}
	if len(a.pending) > 0 {
		if len(res.Tail) > 0 {
			a.expect(end)
		} else if res.Manifest != nil {
			a.expect(res.Manifest.Chunks + 1)
		}
		a.lastSeq = max(a.lastSeq, a.pending[len(a.pending)-1].seq)
	}
	return a, nil
}

// expect fills the gap that a damaged disk left between the last pending chunk
// and the one with this number.
func (a *attempt) expect(seq int64) {
	for n := len(a.pending); n > 0 && a.pending[n-1].seq+1 < seq; n++ {
		a.pending = append(a.pending, queuedChunk{seq: a.pending[n-1].seq + 1, lost: true})
	}
}
