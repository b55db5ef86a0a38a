package sim

import (
	"encoding/json"
	"fmt"
	"reflect"
	"sync"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/tests/sim/natsim"
)

const registryStream = "KV_jobs"

// oracle sees everything that happens and judges it.
type oracle struct {
	db    *database
	began time.Time

	mu      sync.Mutex
	jobs    map[string]*story
	results map[int64]report // by fingerprint

	noting   sync.Mutex // the last to be locked
	problems []string
}

// story is what happened to one job.
type story struct {
	acked  bool
	writes int
	last   job.Record // by the registry
	known  bool
	ghost  *job.Record // what a crash brought back and is still there
	swept  time.Time   // when the last one went
	starts []run
}

// run is one execution of a command.
type run struct {
	lease  workerproto.Lease
	worker string
	began  time.Time
	ended  time.Time // zero: it still runs
	by     string    // what ended it; "" for itself
}

// report is a result that a worker sent.
type report struct {
	lease  workerproto.Lease
	worker string
	forged bool
	out    job.Outcome
}

func newOracle() *oracle {
	return &oracle{began: time.Now(), db: &database{jobs: map[string]job.Record{}}, jobs: map[string]*story{}, results: map[int64]report{}}
}

func (o *oracle) wrong(format string, args ...any) {
	o.noting.Lock()
	defer o.noting.Unlock()
	if len(o.problems) < 20 {
		at := time.Since(o.began).Truncate(time.Millisecond)
		o.problems = append(o.problems, fmt.Sprintf("%v: ", at)+fmt.Sprintf(format, args...))
	}
}

func (o *oracle) story(jobID string) *story {
	s := o.jobs[jobID]
	if s == nil {
		s = &story{}
		o.jobs[jobID] = s
	}
	return s
}

// stored judges a write to the registry.
func (o *oracle) stored(stream string, m natsim.Message) {
	if stream != registryStream {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	var r job.Record
	if err := json.Unmarshal(m.Data, &r); err != nil {
		o.wrong("the registry got what is no record: %v", err)
		return
	}
	s := o.story(r.ID)
	s.writes++
	from, known := s.last, s.known
	if s.ghost != nil {
		from = *s.ghost
		s.ghost = &r
	}
	another := known && r.Version == 1 && r.CreatedAt.After(from.CreatedAt)
	switch {
	case !known || another:
		if r.Version != 1 || r.State != job.Queued {
			o.wrong("%s began as %s v%d", r.ID, r.State, r.Version)
		}
		if another && !from.State.Terminal() {
			o.wrong("%s was created again while it was %s", r.ID, from.State)
		}
		if another {
			*s = story{acked: s.acked}
		}
	case from.State.Terminal():
		o.wrong("%s: %s v%d was written after its end, %s v%d", r.ID, r.State, r.Version, from.State, from.Version)
	case r.Version != from.Version+1:
		o.wrong("%s: v%d follows v%d", r.ID, r.Version, from.Version)
	case r.Attempt != from.Attempt && (r.Attempt != from.Attempt+1 || r.State != job.Assigned || r.LeaseID == from.LeaseID):
		o.wrong("%s: attempt %d (%s) follows attempt %d", r.ID, r.Attempt, r.State, from.Attempt)
	case r.Attempt != from.Attempt && s.ghost != nil && s.last.State.Terminal():
		o.wrong("%s: attempt %d was dispatched, and it has ended with attempt %d: a crash brought it back", r.ID, r.Attempt, s.last.Attempt)
	case r.Attempt != from.Attempt && from.State != job.Queued:
		o.wrong("%s: attempt %d was dispatched while it was %s", r.ID, r.Attempt, from.State)
	}
	if known && r.State == job.Canceled && from.State.Leased() && from.State != job.Canceling {
		o.wrong("%s was canceled while it was %s, and nobody had asked its worker to stop", r.ID, from.State)
	}
	lost := 0
	for i := range r.Attempts {
		o.checkAttempt(&r, &r.Attempts[i])
		if r.Attempts[i].Outcome == job.OutcomeLost {
			lost++
		}
	}
	if lost > min(r.InfraFailures, job.InfraBudget+1) && r.State != job.Canceled {
		o.wrong("%s has lost %d attempts, and %d are counted", r.ID, lost, r.InfraFailures)
	}
	if s.ghost == nil {
		s.last, s.known = r, true
	}
}

// checkAttempt: a result that took effect is that of its attempt, by the worker that held it.
func (o *oracle) checkAttempt(r *job.Record, a *job.Attempt) {
	if a.CPUMs == 0 {
		return
	}
	switch rep, ok := o.results[a.CPUMs]; {
	case !ok:
		o.wrong("%s: attempt %d has a result that nobody sent", r.ID, a.Number)
	case rep.forged:
		o.wrong("%s: a forged result was accepted for attempt %d", r.ID, a.Number)
	case rep.lease.JobID != r.ID || rep.lease.Attempt != a.Number || rep.lease.LeaseID != a.LeaseID || rep.worker != a.WorkerID:
		o.wrong("%s: attempt %d of %s has the result of %+v by %s", r.ID, a.Number, a.WorkerID, rep.lease, rep.worker)
	}
}

// purged judges a purge: what leaves the registry has ended in the database.
func (o *oracle) purged(stream string, m natsim.Message) {
	if stream != registryStream {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	var r job.Record
	if err := json.Unmarshal(m.Data, &r); err != nil {
		return
	}
	have, ok := o.db.get(r.ID)
	ghost := o.story(r.ID).ghost
	if !ok || !have.State.Terminal() || !have.CreatedAt.Equal(r.CreatedAt) || ghost == nil && have.Version < r.Version {
		o.wrong("%s (%s v%d) was purged, and the database has %s v%d", r.ID, r.State, r.Version, have.State, have.Version)
	}
	if ghost != nil && r.Version >= ghost.Version { // with its newest version it has gone
		o.story(r.ID).ghost, o.story(r.ID).swept = nil, time.Now()
	}
}

// back notes a ghost and reports whether it is one of the registry.
func (o *oracle) back(stream string, m natsim.Message) bool {
	var r job.Record
	if stream != registryStream || json.Unmarshal(m.Data, &r) != nil {
		return false
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.story(r.ID).ghost = &r
	return true
}

// started notes that a command begins, and judges it.
func (o *oracle) started(l workerproto.Lease, worker string, spec *job.Spec) {
	o.mu.Lock()
	defer o.mu.Unlock()
	s := o.story(l.JobID)
	for _, have := range s.starts {
		if have.ended.IsZero() {
			o.wrong("%s: attempt %d begins on %s while attempt %d still runs on %s", l.JobID, l.Attempt, worker, have.lease.Attempt, have.worker)
		}
		if have.lease.LeaseID == l.LeaseID {
			o.wrong("%s: attempt %d began twice", l.JobID, l.Attempt)
		}
	}
	s.starts = append(s.starts, run{
		lease: l, worker: worker, began: time.Now(),
	})
	if most := spec.Retry.MaxAttempts + job.InfraBudget; len(s.starts) > most {
		o.wrong("%s began %d times, and %d are allowed", l.JobID, len(s.starts), most)
	}
	if spec.OnWorkerLost == job.OnWorkerLostFail && spec.Retry.MaxAttempts <= 1 && len(s.starts) > 1 {
		o.wrong("%s began %d times, and must not after a loss", l.JobID, len(s.starts))
	}
	// Not by the time of the start: the scheduler may end it while the news is on its way.
	if have, ok := o.db.get(l.JobID); ok && have.State.Terminal() && have.Attempt < l.Attempt {
		o.wrong("%s: attempt %d began, and the database had its end with attempt %d", l.JobID, l.Attempt, have.Attempt)
	}
}

func (o *oracle) stopped(l workerproto.Lease, by string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	s := o.story(l.JobID)
	for i := range s.starts {
		if s.starts[i].lease.LeaseID == l.LeaseID && s.starts[i].ended.IsZero() {
			s.starts[i].ended, s.starts[i].by = time.Now(), by
		}
	}
}

// send notes a result before it is sent and returns what marks it.
func (o *oracle) send(l workerproto.Lease, worker string, out job.Outcome, forged bool) int64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	mark := int64(len(o.results) + 1)
	o.results[mark] = report{lease: l, worker: worker, forged: forged, out: out}
	return mark
}

func (o *oracle) acknowledged(jobID string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.story(jobID).acked = true
}

// haunted says whether a ghost of a job was in the registry at some moment since
// then: readers may be shown it until the sweep.
func (o *oracle) haunted(jobID string, since time.Time) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	s := o.story(jobID)
	return s.ghost != nil || !s.swept.Before(since)
}

// quiet says what is not at its end yet, "" for nothing.
func (o *oracle) quiet(s *natsim.Server) string {
	if left := s.Messages(registryStream); len(left) > 0 {
		var r job.Record
		if err := json.Unmarshal(left[0].Data, &r); err != nil {
			return err.Error()
		}
		have, _ := o.db.get(r.ID)
		return fmt.Sprintf("%d jobs are in the registry, the first %s, %s v%d, and the database has %s v%d",
			len(left), r.ID, r.State, r.Version, have.State, have.Version)
	}
	if n := s.Pending(registryStream) + s.Pending("RESULTS"); n > 0 {
		return fmt.Sprintf("%d messages are not acknowledged", n)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	for jobID, s := range o.jobs {
		if r, ok := o.db.get(jobID); s.known && (!ok || !r.State.Terminal()) {
			return fmt.Sprintf("%s is %s in the database", jobID, r.State)
		}
		for _, r := range s.starts {
			if r.ended.IsZero() {
				return fmt.Sprintf("attempt %d of %s still runs", r.lease.Attempt, jobID)
			}
		}
	}
	return ""
}

// final judges the end, when everything is quiet.
func (o *oracle) final() {
	o.mu.Lock()
	defer o.mu.Unlock()
	for jobID, s := range o.jobs {
		have, ok := o.db.get(jobID)
		switch {
		case !ok && s.acked:
			o.wrong("%s was acknowledged and is lost", jobID)
			continue
		case !ok && !s.known:
			continue // never stored
		case !ok:
			o.wrong("%s was in the registry and is not in the database", jobID)
			continue
		case !s.known:
			o.wrong("%s was never in the registry and is in the database", jobID)
			continue
		case !reflect.DeepEqual(have, s.last):
			o.wrong("%s is %s v%d in the database and was %s v%d in the registry", jobID, have.State, have.Version, s.last.State, s.last.Version)
		}
		o.checkEnd(&have, s)
	}
}

// checkEnd: the end of a job is that of the attempt that was dispatched last.
func (o *oracle) checkEnd(r *job.Record, s *story) {
	for _, x := range s.starts {
		if x.lease.Attempt > r.Attempt {
			o.wrong("%s ended with attempt %d, and attempt %d had begun", r.ID, r.Attempt, x.lease.Attempt)
		}
	}
	last := r.Last()
	switch {
	case r.State == job.Succeeded && (last == nil || last.Number != r.Attempt || last.Outcome != job.OutcomeSucceeded):
		o.wrong("%s succeeded without its last attempt", r.ID)
	case r.State == job.Succeeded:
		done := false
		for _, x := range s.starts {
			done = done || x.lease.LeaseID == last.LeaseID && x.by == ""
		}
		if !done {
			o.wrong("%s succeeded, and the command of attempt %d did not run to its end", r.ID, r.Attempt)
		}
	case r.State == job.Canceled && r.Cancel == nil:
		o.wrong("%s was canceled by nobody", r.ID)
	}
}
