package poll

import (
	"encoding/json"
	"slices"
	"sync"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
	"github.com/cmdexec/cmdexec/services/worker-edge/internal/session"
)

const (
	// pollGap is how long a worker may be between two polls and still count as
	// asking for work.
	pollGap = 2 * time.Second
	// fetchWithin is how long an assignment waits for a poll, and a quarter of a
	// lease at most.
	fetchWithin = 5 * time.Second
	// Bounds of the assignments that wait for one worker.
	maxQueued      = 256
	maxQueuedBytes = 4 << 20
	// maxRequests is how many requests of one worker may be under way.
	maxRequests = 64
)

// peer is the session.Peer of a worker over plain HTTP.
type peer struct {
	h        *Handler
	workerID string
	silence  *time.Timer // closes the session of a worker that is not heard
	fetch    *time.Timer // rejects what the worker does not fetch; runs while something waits

	mu       sync.Mutex
	sess     *session.Session
	news     chan struct{} // closed and replaced when something below changed
	closing  *closing
	heard    time.Time
	requests int
	welcome  *workerproto.Welcome

	polls   int       // open now
	polled  time.Time // when the last one ended
	queue   []*handover
	bytes   int         // of queue
	handed  []*handover // that the worker has not shown to have, oldest first
	nudge   bool        // a heartbeat's answer would have something new
	last    *workerproto.Heartbeat
	hidden  bool // the free slots of last were not passed on
	beats   int64
	asked   []asked             // what the scheduler has not answered yet, oldest first
	known   time.Time           // when the newest that it has answered was passed on, or the session began
	beat    workerproto.Beat    // the newest answer; ID is of beats
	results map[string]*waiting // results under way, by lease id
}

// asked is a heartbeat that was passed on.
type asked struct {
	n  int64
	at time.Time
}

// maxAsked is how many of them are kept while nobody answers.
const maxAsked = 64

type closing struct {
	code   int
	reason string
	after  time.Duration // that the worker should wait
}

// waiting are the requests that wait for the bus to have a result.
type waiting struct {
	requests int
	done     bool
}

// handover is an assignment on its way to the worker.
type handover struct {
	workerproto.Assignment
	data    []byte    // as JSON, as long as the lease has its full length
	taken   time.Time // from the scheduler
	since   time.Time // its lease was given no earlier than that
	handed  time.Time // last written to a poll
	missing bool      // a heartbeat since then does not list it
}

func newPeer(h *Handler, workerID string) *peer {
	now := time.Now()
	return &peer{
		h: h, workerID: workerID, news: make(chan struct{}), heard: now, polled: now, // about to poll
		results: map[string]*waiting{},
	}
}

// begin starts the session.
func (p *peer) begin(claims auth.WorkerClaims, hello *workerproto.Register) error {
	p.mu.Lock() // the session may send before Start returns
	defer p.mu.Unlock()
	p.known = time.Now() // nothing that was sent before reaches this session
	sess, err := p.h.o.Hub.Start(claims, hello, "http", p)
	if err != nil {
		return err
	}
	p.sess = sess
	p.fetch = time.AfterFunc(time.Hour, p.rejectUnfetched)
	p.fetch.Stop()
	p.silence = time.AfterFunc(p.h.o.Silence, p.checkSilence)
	return nil
}

// changed wakes whoever waits. mu is held.
func (p *peer) changed() {
	close(p.news)
	p.news = make(chan struct{})
}

// enter begins a request, unless the session is over or has too many.
func (p *peer) enter() (end *closing, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.heard = time.Now()
	if p.closing != nil || p.requests >= maxRequests {
		return p.closing, false
	}
	p.requests++
	return nil, true
}

func (p *peer) leave() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.heard = time.Now()
	p.requests--
}

func (p *peer) checkSilence() {
	p.mu.Lock()
	quiet, over := time.Since(p.heard), p.closing != nil
	p.mu.Unlock()
	switch {
	case over:
	case quiet >= p.h.o.Silence:
		p.sess.Close(silent, "the worker is not heard any more")
	default:
		p.silence.Reset(p.h.o.Silence - quiet)
	}
}

// silent is the close code of a session whose worker is not heard any more, the
// same as of a socket that breaks.
const silent = 1006

// asking reports whether the worker takes work now. mu is held.
func (p *peer) asking(now time.Time) bool { return p.polls > 0 || now.Sub(p.polled) < pollGap }

// openPoll notes that the worker asks for work. Free slots that were held back
// are passed on at once: with the heartbeat that told them, which confirms
// nothing to the worker this time.
func (p *peer) openPoll() {
	p.mu.Lock()
	p.polls++
	var beat *workerproto.Heartbeat
	if p.hidden {
		p.hidden = false
		again := *p.last
		p.beats++
		p.ask(p.beats)
		again.ID = p.beats
		beat = &again
	}
	p.mu.Unlock()
	if beat != nil {
		_ = p.sess.Heartbeat(*beat) // it was accepted before
	}
}

func (p *peer) closePoll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.polls--
	p.polled = time.Now()
}

// ask notes that number n is passed on to the scheduler now. mu is held.
func (p *peer) ask(n int64) {
	if len(p.asked) == maxAsked {
		p.asked = slices.Delete(p.asked, 0, 1)
	}
	p.asked = append(p.asked, asked{n, time.Now()})
}

// answered notes that the scheduler has answered number n, and with it all before.
// mu is held.
func (p *peer) answered(n int64) {
	for len(p.asked) > 0 && p.asked[0].n <= n {
		p.known = p.asked[0].at
		p.asked = p.asked[1:]
	}
}

// next is what a poll is answered with: an assignment, or only that a heartbeat
// would learn something, or neither and what to wait for.
func (p *peer) next(now time.Time) (a *handover, nudge bool, end *closing, news <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closing != nil {
		return nil, false, p.closing, nil
	}
	p.handed = slices.DeleteFunc(p.handed, func(a *handover) bool { return p.left(a, now) < p.lease(a)/2 })
	if i := slices.IndexFunc(p.handed, func(a *handover) bool { return a.missing }); i >= 0 {
		a = p.handed[i]
		p.h.metrics.repeats.Inc()
	} else if len(p.queue) > 0 {
		a = p.queue[0]
		p.queue[0] = nil
		p.queue = p.queue[1:]
		p.bytes -= len(a.data)
		p.handed = append(p.handed, a)
	}
	if a != nil {
		a.handed, a.missing = now, false
		again := *a
		return &again, p.nudge, nil, nil
	}
	return nil, p.nudge, nil, p.news
}

// lost notes that an answer to a poll was not delivered for all we know.
func (p *peer) lost(leaseID string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, a := range p.handed {
		if a.LeaseID == leaseID {
			a.missing = true
			p.changed()
		}
	}
}

// lease is the length of an assignment's lease, left what is left of it.
func (p *peer) lease(a *handover) time.Duration {
	if a.LeaseSeconds <= 0 {
		return p.h.o.Lease
	}
	return time.Duration(a.LeaseSeconds) * time.Second
}

func (p *peer) left(a *handover, now time.Time) time.Duration {
	return p.lease(a) - now.Sub(a.since)
}

// encode is the assignment as the worker gets it at now. The seconds of its
// lease are what is left of them, rounded down.
func (p *peer) encode(a *handover, now time.Time) ([]byte, error) {
	if now.Sub(a.since) < 250*time.Millisecond {
		return a.data, nil
	}
	again := a.Assignment
	again.LeaseSeconds = int(p.left(a, now) / time.Second)
	return json.Marshal(again)
}

// has notes that the worker has shown to have an assignment.
func (p *peer) has(leaseID string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.handed = slices.DeleteFunc(p.handed, func(a *handover) bool { return a.LeaseID == leaseID })
}

// heartbeat passes a heartbeat on and returns the number of its answer. It
// arrived (began to arrive) at the given time.
func (p *peer) heartbeat(hb workerproto.Heartbeat, arrived time.Time) (int64, error) {
	p.mu.Lock()
	own := hb
	p.beats++
	n := p.beats
	p.ask(n)
	hb.ID = n
	hidden := hb.FreeSlots > 0 && !p.asking(time.Now())
	if hidden {
		hb.FreeSlots = 0
	}
	p.mu.Unlock()
	if err := p.sess.Heartbeat(hb); err != nil {
		return 0, err
	}
	listed := make(map[string]bool, len(hb.Running))
	for i := range hb.Running {
		listed[hb.Running[i].LeaseID] = true
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.last, p.hidden, p.nudge = &own, hidden && p.polls == 0, false
	p.handed = slices.DeleteFunc(p.handed, func(a *handover) bool { return listed[a.LeaseID] })
	for _, a := range p.handed {
		if a.handed.Before(arrived) && !a.missing {
			a.missing = true
			p.changed()
		}
	}
	return n, nil
}

// newestBeat is the newest answer to a heartbeat. It answers all before it as well.
func (p *peer) newestBeat() workerproto.Beat {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.beat
}

// expect begins to wait for a result; the returned function ends it.
func (p *peer) expect(leaseID string) (w *waiting, done func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	w = p.results[leaseID]
	if w == nil || w.done {
		w = &waiting{}
		p.results[leaseID] = w
	}
	w.requests++
	return w, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if w.requests--; w.requests == 0 && p.results[leaseID] == w {
			delete(p.results, leaseID)
		}
	}
}

// state is how the session stands, for requests that wait for it to change.
func (p *peer) state(done func() bool) (ok bool, end *closing, news <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return done(), p.closing, p.news
}

// rejectUnfetched gives back what the worker has not fetched in time.
func (p *peer) rejectUnfetched() {
	now := time.Now()
	p.mu.Lock()
	var late []*handover
	for len(p.queue) > 0 && now.Sub(p.queue[0].taken) >= p.h.fetchIn {
		late = append(late, p.queue[0])
		p.bytes -= len(p.queue[0].data)
		p.queue = p.queue[1:]
	}
	if len(p.queue) > 0 && p.closing == nil {
		p.fetch.Reset(p.h.fetchIn - now.Sub(p.queue[0].taken))
	}
	p.mu.Unlock()
	p.reject(late, "the worker did not fetch it in time")
}

// reject rejects assignments that the worker has never seen, in its name.
func (p *peer) reject(as []*handover, reason string) {
	for _, a := range as {
		p.sess.Reject(a.Lease, time.Now().UTC(), reason)
	}
}

// Welcome implements session.Peer.
func (p *peer) Welcome(w workerproto.Welcome) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.welcome = &w
	p.changed()
}

// Assign implements session.Peer.
func (p *peer) Assign(as []workerproto.Assignment) []error {
	errs := make([]error, len(as))
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := range as {
		errs[i] = p.queueUp(&as[i], now)
	}
	p.changed()
	return errs
}

func (p *peer) queueUp(a *workerproto.Assignment, now time.Time) error {
	switch {
	case p.closing != nil:
		return session.ErrClosing
	case !p.asking(now):
		return session.ErrNoPoll
	}
	// A command may have been under way for long: over a connection that stood still, or
	// to an edge that did. It came after the answers that are here, so its lease began
	// no earlier than what they answer was sent. A poll says nothing about that.
	h := &handover{Assignment: *a, taken: now, since: p.known}
	if p.left(h, now) < p.lease(h)/4 {
		return session.ErrLate
	}
	data, err := json.Marshal(a)
	switch {
	case err != nil:
		return err
	case len(data) > workerproto.MaxFrameBytes:
		return session.ErrTooLarge
	case len(p.queue) >= maxQueued || p.bytes+len(data) > maxQueuedBytes:
		return session.ErrBusy
	}
	h.data = data
	p.queue = append(p.queue, h)
	p.bytes += len(data)
	if len(p.queue) == 1 {
		p.fetch.Reset(p.h.fetchIn)
	}
	return nil
}

// Send implements session.Peer. Cancels and drains are told by the answer to
// the next heartbeat, which the open poll asks for.
func (p *peer) Send(t workerproto.Type, body any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if beat, ok := body.(workerproto.Beat); ok && t == workerproto.TypeBeat {
		p.beat = beat
		p.answered(beat.ID)
	} else {
		p.nudge = true
	}
	p.changed()
}

// AcksReady implements session.Peer.
func (p *peer) AcksReady() {
	acks := p.sess.TakeAcks()
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := range acks {
		for _, l := range acks[i].Results {
			if w := p.results[l.LeaseID]; w != nil {
				w.done = true
			}
		}
	}
	p.changed()
}

// Close implements session.Peer.
func (p *peer) Close(code int, reason string, goaway *workerproto.Goaway) {
	end := &closing{code: code, reason: reason}
	if goaway != nil {
		end.after = time.Duration(goaway.RetryAfterMs) * time.Millisecond
	}
	p.mu.Lock()
	p.closing = end
	unseen := p.queue
	p.queue, p.bytes = nil, 0
	p.silence.Stop()
	p.fetch.Stop()
	p.changed()
	p.mu.Unlock()
	p.reject(unseen, "the worker's session ended before it fetched this")
	p.h.remove(p)
}
