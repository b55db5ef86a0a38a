package lead

import (
	"fmt"
	"slices"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/fleet"
	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/services/scheduler/internal/plan"
)

// workerState is what a term has of one worker beside what the planner has.
type workerState struct {
	id        string
	facts     fleet.Worker // of the newest registration or hello; Drain as the bucket has it
	known     bool         // facts are set
	session   string       // the newest
	past      []string     // sessions that were replaced, the last few
	connected time.Time    // when that session began; never after it was first seen here
	greeted   bool         // this term saw the hello of that session
	holding   map[string]bool
	heard     time.Time // when that session last spoke
	seen      time.Time // last hello or heartbeat, of any session that counted
	beat      workerproto.Heartbeat

	leases map[string]*tracked // current leases by the registry, by id
	out    outbox

	returns  backoff // assignments in a row that did not reach it
	refusals backoff // or that it refused

	failed     map[string]bool // jobs whose last attempt here failed for infra reasons, since a success
	lostIn     string          // session for which a loss was counted
	aside      time.Time
	asideFor   string // why
	asideSteps int

	tempo tempo
}

const (
	pastSessions  = 16
	asideAfter    = 3 // failed jobs in a row
	asideLeast    = 10 * time.Second
	asideMost     = 5 * time.Minute
	missedBeats   = 3 // heartbeats until a worker is not used
	silentBeats   = 2 // heartbeats until another session is believed without being newer
	refusalOfJob  = time.Second
	refusalOfJobs = 30 * time.Second
)

func (t *Term) worker(workerID string) *workerState {
	w := t.workers[workerID]
	if w == nil {
		w = &workerState{
			id: workerID, leases: map[string]*tracked{},
			returns:  backoff{least: 100 * time.Millisecond, most: 30 * time.Second},
			refusals: backoff{least: 100 * time.Millisecond, most: 5 * time.Second},
		}
		t.workers[workerID] = w
	}
	return w
}

// registered takes in a registration from the bucket. The last one written is the
// newest session, whatever its edge's clock says; only the watch may lag behind
// what a hello has told already.
func (t *Term) registered(r fleet.Worker, now time.Time) {
	w := t.worker(r.ID)
	drain := w.facts.Drain
	if !slices.Contains(w.past, r.SessionID) {
		t.meet(w, r.SessionID, now)
		w.connected = earlier(r.ConnectedAt, now)
		w.facts, w.known = r, true
		t.plan.PutWorker(r, now)
		t.plan.UpdateWorker(w.id, now, func(a *plan.Availability) { a.Online = r.Online })
	}
	w.facts.Drain = r.Drain
	if drain != r.Drain {
		w.out.drain = &r.Drain
		t.outgo(w)
	}
	t.available(w, now)
}

// meet makes a session the worker's newest. It forgets what was known of the
// one before.
func (t *Term) meet(w *workerState, session string, now time.Time) {
	if session == "" || session == w.session {
		return
	}
	if w.session != "" {
		w.past = slices.DeleteFunc(w.past, func(s string) bool { return s == session })
		if w.past = append(w.past, w.session); len(w.past) > pastSessions {
			w.past = w.past[1:]
		}
	}
	w.session, w.heard, w.greeted, w.holding = session, now, false, nil
}

// speaksFor reports whether what a session says counts, and makes it the newest
// if it is. As long as the session that is known speaks, another one must be
// newer; when it is silent, whoever speaks is believed, since clocks of edges
// may differ.
func (t *Term) speaksFor(w *workerState, session string, hello *fleet.Worker, now time.Time) bool {
	_, a, _, _ := t.plan.Worker(w.id)
	silent := !a.Online || now.Sub(w.heard) > silentBeats*t.cfg.Heartbeat
	switch {
	case session == "":
		return false
	case session == w.session:
	case w.session == "", silent:
		t.meet(w, session, now)
	case slices.Contains(w.past, session):
		return false
	case hello != nil && w.known && hello.ConnectedAt.Before(w.facts.ConnectedAt):
		return false
	case hello == nil && !younger(session, w.session):
		return false
	default:
		t.meet(w, session, now)
	}
	w.heard = now
	return true
}

// younger compares the clocks inside two session ids.
func younger(a, b string) bool {
	at, errA := id.Time(a)
	bt, errB := id.Time(b)
	return errA == nil && errB == nil && at.After(bt)
}

// available tells the planner what changed about a worker.
func (t *Term) available(w *workerState, now time.Time) {
	hb := &w.beat
	t.plan.UpdateWorker(w.id, now, func(a *plan.Availability) {
		a.FreshUntil = time.Time{}
		if !w.seen.IsZero() {
			a.FreshUntil = w.seen.Add(missedBeats * t.cfg.Heartbeat)
		}
		a.Draining = w.facts.Drain || hb.Status == workerproto.StatusDraining
		a.SetAside = w.aside
		a.Foreign = 0
		if hb.Status != "" {
			// What it lists is either reserved here or about to be freed.
			a.Foreign = max(0, w.facts.Slots-hb.FreeSlots-len(hb.Running))
		}
	})
}

// backOff keeps a worker out of placement until then.
func (t *Term) backOff(w *workerState, until, now time.Time) {
	t.plan.UpdateWorker(w.id, now, func(a *plan.Availability) { a.NotBefore = until })
}

// refuse notes that a worker rejected a job. One that was sent ahead and did not
// get its turn says something about the jobs before it.
func (t *Term) refuse(j *tracked, w *workerState, now time.Time) {
	if j.ahead {
		w.tempo.slow(now)
		t.hurry(w, now)
		return
	}
	if j.refused == nil {
		j.refused = map[string]*backoff{}
	}
	b := j.refused[w.id]
	if b == nil {
		b = &backoff{least: refusalOfJob, most: refusalOfJobs}
		j.refused[w.id] = b
	}
	b.fail(now)
	t.backOff(w, w.refusals.fail(now), now)
}

// failed counts an attempt that failed for a reason of the worker's side. One
// job counts once, and so do all losses of one session, until something
// succeeds: a broken image or one crash must not look like a broken worker.
func (t *Term) failed(w *workerState, j *tracked, a *job.Attempt, now time.Time) {
	if now.Before(w.aside) || w.failed[j.id] {
		return
	}
	if a.Outcome == job.OutcomeLost {
		if w.lostIn != "" && w.lostIn == w.session {
			return
		}
		w.lostIn = w.session
	}
	if w.failed == nil {
		w.failed = map[string]bool{}
	}
	w.failed[j.id] = true
	if len(w.failed) < asideAfter {
		return
	}
	d := min(asideMost, asideLeast<<min(w.asideSteps, 10))
	w.asideSteps++
	w.aside = now.Add(d)
	w.asideFor = fmt.Sprintf("%d jobs in a row failed here, the last one: %s", len(w.failed), a.Reason)
	t.log.Warn("a worker is set aside", "worker", w.id, "until", w.aside, "reason", a.Reason)
	t.available(w, now)
}

// succeeded notes that an attempt ended by itself.
func (w *workerState) succeeded() {
	w.failed, w.lostIn, w.asideSteps = nil, "", 0
}
