package session

import (
	"context"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/failpoint"
	"github.com/cmdexec/cmdexec/libs/kit/lifecycle"
)

const (
	// maxInflight bounds what one session may have in flight: what a worker may
	// send ahead of acknowledgements, and as much again for headers and results.
	maxInflight = 2 * workerproto.MaxUnackedBytes
	// logSlack is how much more than the job keeps a worker may send: markers of
	// what it left out.
	logSlack = 4 * workerproto.MaxChunkBytes
	// One publish takes at most this much of a job.
	maxPublishFrames = 256
	maxPublishBytes  = 1 << 20

	publishTimeout   = 10 * time.Second
	maxAckResults    = 1024
	maxStale         = 1024 // leases remembered as stale, at least
	resultOverhead   = 1 << 10
	unknownSeq       = -1
	maxSignalLen     = 32
	maxReasonWordLen = 64
	maxSHA256Len     = 64
)

// lease is an attempt that this session's worker works on. Guarded by Session.mu.
type lease struct {
	workerproto.Lease
	confirmed bool // assigned here, or confirmed by the leader: output is published
	gone      bool // not in the session any more: nothing further is published
	cancel    bool // the scheduler wants it stopped
	seen      time.Time

	limit int64 // bytes of output
	bytes int64 // taken so far
	last  int64 // seq taken so far; unknownSeq: any seq may come first
	acked int64 // seq that the bus has

	queue      []chunk
	publishing bool
	ackDue     bool
}

type chunk struct {
	seq   int64
	data  int // bytes of output
	frame []byte
}

// addLease is called with mu held, or before the session is shared. It reports
// whether the lease is new here; one that is known is at most confirmed.
func (s *Session) addLease(l workerproto.Lease, limit, last int64, confirmed bool, now time.Time) bool {
	if le := s.leases[l.LeaseID]; le != nil {
		if confirmed {
			s.confirm(le)
		}
		return false
	}
	if s.leases == nil {
		s.leases = map[string]*lease{}
	}
	if limit <= 0 {
		limit = job.MaxLogBytes
	}
	s.leases[l.LeaseID] = &lease{Lease: l, confirmed: confirmed, seen: now, limit: limit + logSlack, last: last}
	return true
}

func (s *Session) dropLease(leaseID string) {
	s.mu.Lock()
	s.drop(s.leases[leaseID])
	s.mu.Unlock()
}

// drop forgets a lease and the output that waits under it. mu is held.
func (s *Session) drop(le *lease) {
	if le == nil || le.gone {
		return
	}
	le.gone = true
	delete(s.leases, le.LeaseID)
	for i := range le.queue {
		s.release(int64(len(le.queue[i].frame)))
	}
	le.queue = nil
}

// discardAll forgets everything that was not published when the session closed;
// the worker still has it.
func (s *Session) discardAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, le := range s.leases {
		s.drop(le)
	}
}

// prune forgets leases that the worker has not listed for long.
func (s *Session) prune(running []workerproto.PhaseLease, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range running {
		if le := s.leases[running[i].LeaseID]; le != nil {
			le.seen = now
		}
	}
	for _, le := range s.leases {
		if !le.publishing && now.Sub(le.seen) > 2*s.hub.o.Lease {
			s.drop(le)
		}
	}
}

// settle takes what the leader says about leases.
func (s *Session) settle(r *busmsg.WorkerReply) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range r.Stale {
		s.drop(s.leases[r.Stale[i].LeaseID])
		s.noteStale(r.Stale[i].LeaseID)
	}
	for _, leaseID := range r.Confirmed {
		s.confirm(s.leases[leaseID])
	}
	for i := range r.Cancel { // to be stopped, but the worker's own
		le := s.leases[r.Cancel[i].LeaseID]
		s.confirm(le)
		if le != nil {
			le.cancel = true
		}
	}
}

// noteStale remembers the last leases that the leader has called stale. mu is held.
func (s *Session) noteStale(leaseID string) {
	if s.stale[0][leaseID] || s.stale[1][leaseID] {
		return
	}
	if s.stale[0] == nil || len(s.stale[0]) >= maxStale {
		s.stale[0], s.stale[1] = map[string]bool{}, s.stale[0]
	}
	s.stale[0][leaseID] = true
}

// Stale reports whether the leader has said in this session that the lease is
// not the worker's any more.
func (s *Session) Stale(leaseID string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stale[0][leaseID] || s.stale[1][leaseID]
}

// Acked returns up to which seq the bus has a lease's output. It reports false
// when the lease is not the session's, or not any more.
func (s *Session) Acked(l workerproto.Lease) (seq int64, held bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	le := s.leases[l.LeaseID]
	if le == nil || le.Lease != l {
		return 0, false
	}
	return le.acked, true
}

// Canceled reports whether the scheduler wants an attempt stopped, and whether
// the session holds it at all.
func (s *Session) Canceled(jobID string, attempt int) (cancel, held bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, le := range s.leases {
		if le.JobID == jobID && le.Attempt == attempt {
			return le.cancel, true
		}
	}
	return false, false
}

func (s *Session) noteCancel(leases []workerproto.Lease) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range leases {
		if le := s.leases[leases[i].LeaseID]; le != nil {
			le.cancel = true
		}
	}
}

func (s *Session) confirm(le *lease) {
	if le != nil && !le.confirmed {
		le.confirmed = true
		s.publish(le)
	}
}

// Output takes one chunk; frame is its binary form, which the session keeps. It
// blocks while too much is in flight, and does not wait for the bus otherwise.
// It reports stale when the lease is not the session's: nothing was taken. Calls
// for the same chunk may overlap: one of them is taken.
func (s *Session) Output(l workerproto.Lease, c *workerproto.Chunk, frame []byte) (stale bool, err error) {
	if err := checkLease(&l); err != nil {
		return false, err
	}
	if err := c.Validate(); err != nil {
		return false, protocolError("output refused: " + err.Error())
	}
	s.mu.Lock()
	le := s.leases[l.LeaseID]
	if le == nil || le.Lease != l {
		s.mu.Unlock()
		s.hub.o.Metrics.Stale.Inc()
		return true, nil
	}
	if c.Seq <= le.last { // a repeat
		due := le.acked >= c.Seq && s.ackDue(le)
		s.mu.Unlock()
		if due {
			s.peer.AcksReady()
		}
		return false, nil
	}
	err = le.refusal(c)
	s.mu.Unlock()
	if err != nil {
		return false, err
	}

	if err := s.reserve(int64(len(frame))); err != nil {
		return false, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if le.gone || c.Seq <= le.last { // it went, or the same came in, while it waited
		s.release(int64(len(frame)))
		return false, nil
	}
	if err := le.refusal(c); err != nil {
		s.release(int64(len(frame)))
		return false, err
	}
	le.last = c.Seq
	le.bytes += int64(len(c.Data))
	le.queue = append(le.queue, chunk{seq: c.Seq, data: len(c.Data), frame: frame})
	s.publish(le)
	return false, nil
}

// refusal is why a chunk that is not a repeat is not taken; nil: it is.
// Session.mu is held.
func (le *lease) refusal(c *workerproto.Chunk) error {
	switch {
	case le.last != unknownSeq && c.Seq != le.last+1:
		return protocolError("output refused: a seq was left out")
	case le.bytes+int64(len(c.Data)) > le.limit:
		return protocolError("output refused: more than the job keeps")
	}
	return nil
}

// reserve waits for room for n bytes. A worker that honours the limit of
// unacknowledged bytes waits only while the bus or the edge is in trouble; one
// that makes the session wait for longer than its heartbeats can bear is closed.
func (s *Session) reserve(n int64) error {
	limit := s.hub.o.Lease / 6
	ctx, cancel := context.WithTimeout(s.ctx, limit)
	defer cancel()
	for {
		s.mu.Lock()
		fits := s.inflight == 0 || s.inflight+n <= maxInflight
		if fits {
			s.inflight += n
		}
		s.mu.Unlock()
		if fits {
			s.tellRoom() // another caller may fit as well
			break
		}
		select {
		case <-s.room:
		case <-ctx.Done():
			if err := s.ctx.Err(); err != nil {
				return err
			}
			return &Violation{Code: workerproto.CloseSlowDown, Reason: "too much was sent ahead of acknowledgements"}
		}
	}
	if err := s.hub.budget.Acquire(ctx, n); err != nil {
		s.mu.Lock()
		s.inflight -= n
		s.mu.Unlock()
		if err := s.ctx.Err(); err != nil {
			return err
		}
		return &Violation{Code: workerproto.CloseOverloaded, Reason: "the edge holds too much that the bus does not take"}
	}
	s.hub.o.Metrics.InflightBytes.Add(float64(n))
	return nil
}

// release gives back what reserve took. mu is held.
func (s *Session) release(n int64) {
	s.inflight -= n
	s.hub.budget.Release(n)
	s.hub.o.Metrics.InflightBytes.Sub(float64(n))
	s.tellRoom()
}

func (s *Session) tellRoom() {
	select {
	case s.room <- struct{}{}:
	default:
	}
}

// publish makes sure that the lease's output is on its way. mu is held.
func (s *Session) publish(le *lease) {
	if !le.confirmed || le.publishing || le.gone || s.closed || len(le.queue) == 0 {
		return
	}
	le.publishing = true
	s.hub.running.Add(1) // the session counts, so it is not zero
	go s.publishAll(le)
}

// publishAll publishes a lease's output in order until there is none. Each job
// has its own, so that one that is slow keeps up no other.
func (s *Session) publishAll(le *lease) {
	defer s.hub.running.Done()
	backoff := lifecycle.Backoff{Max: 5 * time.Second}
	for {
		batch := s.nextBatch(le)
		if batch == nil {
			return
		}
		frames := make([][]byte, len(batch))
		for i := range batch {
			frames[i] = batch[i].frame
		}
		ctx, cancel := context.WithTimeout(s.hub.base, publishTimeout)
		stored, err := s.hub.o.Bus.PublishChunks(ctx, le.JobID, frames)
		cancel()
		if err == nil {
			failpoint.At(failpoint.EdgeLogged)
		}
		s.stored(le, min(max(stored, 0), len(batch)))
		if err == nil {
			backoff.Reset()
			continue
		}
		s.hub.o.Metrics.PublishErrors.WithLabelValues("output").Inc()
		s.hub.o.Logger.Debug("output was not stored; trying again", "jobId", le.JobID, "stored", stored, "err", err)
		_ = lifecycle.Sleep(s.ctx, backoff.Next()) // nextBatch sees that the session has ended
	}
}

// nextBatch returns the head of a lease's queue, which stays there, or nil and
// ends the publishing.
func (s *Session) nextBatch(le *lease) []chunk {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || le.gone || len(le.queue) == 0 {
		le.publishing = false
		return nil
	}
	n, size := 0, 0
	for n < len(le.queue) && n < maxPublishFrames && (n == 0 || size+len(le.queue[n].frame) <= maxPublishBytes) {
		size += len(le.queue[n].frame)
		n++
	}
	return le.queue[:n:n]
}

// stored takes the first n chunks off a lease's queue and acknowledges them.
func (s *Session) stored(le *lease, n int) {
	if n == 0 {
		return
	}
	s.mu.Lock()
	data := 0
	due := false
	if !le.gone { // else drop has released the queue
		le.acked = le.queue[n-1].seq
		for i := range le.queue[:n] {
			data += le.queue[i].data
			s.release(int64(len(le.queue[i].frame)))
			le.queue[i] = chunk{}
		}
		le.queue = le.queue[n:]
		if len(le.queue) == 0 {
			le.queue = nil
		}
		due = s.ackDue(le)
	}
	s.mu.Unlock()
	s.hub.o.Metrics.OutputBytes.Add(float64(data))
	if due {
		s.peer.AcksReady()
	}
}

// ackDue notes that a lease has something to acknowledge. mu is held.
func (s *Session) ackDue(le *lease) bool {
	if le.ackDue || s.closed {
		return false
	}
	le.ackDue = true
	s.ackOutput = append(s.ackOutput, le)
	return true
}

// TakeAcks returns the acknowledgements that are due, in their newest state.
func (s *Session) TakeAcks() []workerproto.Ack {
	s.mu.Lock()
	defer s.mu.Unlock()
	var acks []workerproto.Ack
	for _, le := range s.ackOutput {
		le.ackDue = false
		acks = append(acks, workerproto.Ack{JobID: le.JobID, Attempt: le.Attempt, AckedSeq: le.acked})
	}
	for rest := s.ackResults; len(rest) > 0; {
		n := min(len(rest), maxAckResults)
		acks = append(acks, workerproto.Ack{Results: rest[:n:n]})
		rest = rest[n:]
	}
	s.ackOutput, s.ackResults = nil, nil
	return acks
}

// Result takes a result and sends it to the bus; its acknowledgement comes when
// the bus has it. It blocks while too much is in flight. size is about what the
// result takes in memory.
func (s *Session) Result(r workerproto.Result, size int) error {
	if err := checkLease(&r.Lease); err != nil {
		return err
	}
	if r.WorkerID != "" && r.WorkerID != s.workerID {
		return protocolError("workerId is not this session's")
	}
	if err := r.Validate(); err != nil {
		return protocolError("result refused: " + err.Error())
	}
	r.WorkerID = s.workerID
	trim(&r)

	s.mu.Lock()
	if s.sending[r.LeaseID] { // the one under way is acknowledged
		s.mu.Unlock()
		return nil
	}
	if s.sending == nil {
		s.sending = map[string]bool{}
	}
	s.sending[r.LeaseID] = true
	s.mu.Unlock()

	n := int64(size + resultOverhead)
	err := s.reserve(n)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		delete(s.sending, r.LeaseID) // its repeat is another try
		return err
	}
	if s.closed {
		s.release(n)
		return s.ctx.Err()
	}
	s.hub.running.Add(1) // the session counts, so it is not zero
	go s.publishResult(busmsg.Result{Result: r, EdgeID: s.hub.o.EdgeID, ReceivedAt: time.Now().UTC()}, n)
	return nil
}

func (s *Session) publishResult(r busmsg.Result, reserved int64) {
	defer s.hub.running.Done()
	backoff := lifecycle.Backoff{Max: 2 * time.Second}
	for {
		ctx, cancel := context.WithTimeout(s.hub.base, publishTimeout)
		err := s.hub.o.Bus.PublishResult(ctx, r)
		cancel()
		if err == nil {
			break
		}
		s.hub.o.Metrics.PublishErrors.WithLabelValues("result").Inc()
		s.hub.o.Logger.Debug("result was not stored; trying again", "jobId", r.JobID, "err", err)
		if lifecycle.Sleep(s.ctx, backoff.Next()) != nil { // the worker sends it again in its next session
			s.mu.Lock()
			s.release(reserved)
			s.mu.Unlock()
			return
		}
	}
	failpoint.At(failpoint.EdgeReported)
	s.hub.o.Metrics.Results.Inc()
	s.mu.Lock()
	s.release(reserved)
	delete(s.sending, r.LeaseID)
	s.drop(s.leases[r.LeaseID])
	s.ackResults = append(s.ackResults, r.Lease)
	s.mu.Unlock()
	s.peer.AcksReady()
}

// trim cuts a result's texts to what a record keeps, so that no result is too
// large for the bus.
func trim(r *workerproto.Result) {
	r.Message = clip(r.Message, job.MaxReasonBytes)
	r.Reason = job.Reason(clip(string(r.Reason), maxReasonWordLen))
	r.Signal = clip(r.Signal, maxSignalLen)
	r.ImageDigest = clip(r.ImageDigest, job.MaxImageDigestLen)
	if r.Manifest != nil {
		r.Manifest.SHA256 = clip(r.Manifest.SHA256, maxSHA256Len)
	}
}
