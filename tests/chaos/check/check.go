// Package check judges the history of a chaos run by the invariants of
// docs/reliability.md. It is pure: events in, verdict out.
package check

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/tests/chaos/history"
)

// The invariants.
const (
	I1Lost       = "I1 no acknowledged job is lost"
	I2Result     = "I2 one result"
	I3Fenced     = "I3 the result is that of the last attempt, and what the command did"
	I4Starts     = "I4 bounded starts, no overlap"
	I5Left       = "I5 nothing is left"
	I6Output     = "I6 output is complete or declared not to be"
	I7Alive      = "I7 everything ends in time"
	I8Projection = "I8 the database is the registry"
)

// ForgedMessage is in every report that the run's own clients made up without a
// lease: a record that has it believed one.
const ForgedMessage = "forged-by-the-chaos-run"

// Violation is a broken promise.
type Violation struct {
	Invariant string `json:"invariant"`
	JobID     string `json:"jobId,omitempty"`
	What      string `json:"what"`
}

func (v Violation) String() string {
	return strings.TrimSpace(v.Invariant + ": " + v.JobID + " " + v.What)
}

// Figures are what is published of a run.
type Figures struct {
	Seed           uint64         `json:"seed"`
	Acked          int            `json:"acked"` // distinct jobs
	Lost           int            `json:"lost"`
	Unanswered     int            `json:"unanswered"`  // tries of submits that got no 2xx
	DoubleEnd      int            `json:"doubleEnd"`   // jobs seen with two ends
	StaleTaken     int            `json:"staleTaken"`  // made-up reports that were believed
	Starts         int            `json:"starts"`      // of commands, by their own journal
	ExtraStarts    int            `json:"extraStarts"` // starts that no failure of the command itself asked for
	Overlap        time.Duration  `json:"overlap"`     // sum, outside of frozen time
	FrozenOverlap  time.Duration  `json:"frozenOverlap"`
	Incomplete     int            `json:"incompleteOutput"` // declared so
	UndeclaredGaps int            `json:"undeclaredGaps"`
	Left           int            `json:"left"`
	Differences    int            `json:"differences"` // of registry and database
	Drain          time.Duration  `json:"drain"`
	Ends           map[string]int `json:"ends"`
	Faults         []FaultFigures `json:"faults"`
	Flat           []Flat         `json:"flat,omitempty"` // of a soak
}

// FaultFigures are about one kind of fault.
type FaultFigures struct {
	Name     string          `json:"name"`
	Row      string          `json:"row"`
	Times    int             `json:"times"`
	Recovery []time.Duration `json:"recovery"` // from the heal until a new job had run; sorted
	Restarts []time.Duration `json:"restarts"` // from the fault until a job that it ended started again; sorted
}

// Percentile of sorted times, 0 without any.
func Percentile(sorted []time.Duration, p int) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[min(len(sorted)-1, len(sorted)*p/100)]
}

// Verdict is the outcome of a check.
type Verdict struct {
	Violations []Violation `json:"violations"`
	Figures    Figures     `json:"figures"`
}

// facts are what a history says about one job.
type facts struct {
	id       string
	plan     history.Plan
	keys     []string
	acked    bool
	ackedAt  int64
	canceled bool
	missing  int // reads that were told that there is no such job
	seen     []seen
	journal  []history.Journal
	final    *history.Final
	output   *history.Output
	stored   map[string]history.Stored
}

type seen struct {
	history.Observe
	end int64
}

type window struct{ from, to int64 }

type injected struct {
	at     int64
	healed int64 // 0 until it is
	figure int   // index in Figures.Faults
}

type checker struct {
	v       Verdict
	run     history.Run
	jobs    map[string]*facts
	keys    map[string]string // acknowledged id of a key
	gone    map[string]bool   // keys of calls to execute whose caller went away
	frozen  []window
	divided []window
	faults  []injected
	reset   int64 // when the registry was lost; 0 for never
	lastEnd int64
	samples map[Flat][]int64 // of a soak, by service and what
}

// Check judges a history.
func Check(events []history.Event) Verdict {
	c := &checker{jobs: map[string]*facts{}, keys: map[string]string{}, gone: map[string]bool{}}
	c.read(events)
	for _, id := range slices.Sorted(keysOf(c.jobs)) {
		f := c.jobs[id]
		c.lost(f)
		c.result(f)
		c.fenced(f)
		c.starts(f)
		c.outputs(f)
		c.projection(f)
	}
	c.sortFigures()
	return c.v
}

func keysOf(m map[string]*facts) func(func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

func (c *checker) broken(invariant, jobID, format string, args ...any) {
	c.v.Violations = append(c.v.Violations, Violation{invariant, jobID, fmt.Sprintf(format, args...)})
}

func (c *checker) job(id string) *facts {
	f := c.jobs[id]
	if f == nil {
		f = &facts{id: id, stored: map[string]history.Stored{}}
		c.jobs[id] = f
	}
	return f
}

// read sorts the events by what they are about, and judges what is about no job.
func (c *checker) read(events []history.Event) {
	fig := &c.v.Figures
	fig.Ends = map[string]int{}
	freezing := map[string]int64{}
	quiet := false
	for _, e := range events {
		c.lastEnd = max(c.lastEnd, e.At)
		switch {
		case e.Run != nil:
			c.run = *e.Run
			fig.Seed = e.Run.Seed
		case e.Submit != nil:
			c.submitted(e.Submit, e.At)
		case e.Cancel != nil:
			// Also one without an answer may have arrived.
			c.job(e.Cancel.JobID).canceled = true
		case e.Observe != nil:
			f := c.job(e.Observe.JobID)
			if e.Observe.Missing {
				f.missing++
				continue
			}
			f.seen = append(f.seen, seen{*e.Observe, e.At})
		case e.Journal != nil:
			f := c.job(e.Journal.Job)
			f.journal = append(f.journal, *e.Journal)
		case e.Final != nil:
			c.job(e.Final.JobID).final = e.Final
		case e.Output != nil:
			c.job(e.Output.JobID).output = e.Output
		case e.Stored != nil:
			c.job(e.Stored.JobID).stored[e.Stored.Where] = *e.Stored
		case e.Left != nil:
			fig.Left++
			c.broken(I5Left, "", "%s", e.Left.What)
		case e.Resource != nil:
			c.resource(e.Resource)
		case e.Sample != nil:
			c.sample(e.Sample)
		case e.Fault != nil:
			c.fault(e, freezing)
		case e.Quiet != nil:
			quiet = true
			fig.Drain = e.Quiet.Took
			if e.Quiet.Open > 0 || e.Quiet.Took > c.run.Bounds.Drain {
				c.broken(I7Alive, "", "%d jobs were open %v after the load and the faults had ended; %v is the bound",
					e.Quiet.Open, e.Quiet.Took, c.run.Bounds.Drain)
			}
		}
	}
	c.flat()
	if !quiet {
		c.broken(I7Alive, "", "the history does not say that the system became quiet")
	}
}

// sortFigures comes last: facts refer to faults by their place.
func (c *checker) sortFigures() {
	fig := &c.v.Figures
	slices.SortFunc(fig.Faults, func(a, b FaultFigures) int { return cmp.Compare(a.Name, b.Name) })
	for i := range fig.Faults {
		slices.Sort(fig.Faults[i].Recovery)
		slices.Sort(fig.Faults[i].Restarts)
	}
}

func (c *checker) submitted(s *history.Submit, at int64) {
	fig := &c.v.Figures
	if !s.Acked() {
		fig.Unanswered++
		if s.Target == "execute" && s.Code == 0 {
			c.gone[s.Key] = true
		}
		if s.JobID != "" {
			f := c.job(s.JobID)
			f.plan = s.Plan
		}
		return
	}
	if s.JobID == "" {
		c.broken(I1Lost, "", "the submit with key %s was acknowledged without an id", s.Key)
		return
	}
	f := c.job(s.JobID)
	f.plan = s.Plan
	if c.gone[s.Key] { // a caller that goes away cancels what it waited for
		f.canceled = true
	}
	if !slices.Contains(f.keys, s.Key) {
		f.keys = append(f.keys, s.Key)
	}
	if first, ok := c.keys[s.Key]; ok && first != s.JobID {
		c.broken(I1Lost, s.JobID, "the key %s made this job and %s", s.Key, first)
	}
	c.keys[s.Key] = s.JobID
	if !f.acked {
		f.acked, f.ackedAt = true, at
		fig.Acked++
	}
}

// Resources may grow by this much over a run without being called a leak.
const (
	allowedGrowth = 64
	allowedFactor = 2
)

func (c *checker) resource(r *history.Resource) {
	if r.What == "rss" { // published, and no promise on a run this short
		return
	}
	if r.After > r.Before*allowedFactor+allowedGrowth {
		c.broken(I5Left, "", "%s of %s grew from %d to %d", r.What, r.Service, r.Before, r.After)
	}
}

func (c *checker) fault(e history.Event, freezing map[string]int64) {
	f := e.Fault
	fig := &c.v.Figures
	i := slices.IndexFunc(fig.Faults, func(x FaultFigures) bool { return x.Name == f.Name })
	if i < 0 {
		fig.Faults = append(fig.Faults, FaultFigures{Name: f.Name, Row: f.Row})
		i = len(fig.Faults) - 1
	}
	switch f.Phase {
	case history.Inject:
		fig.Faults[i].Times++
		c.faults = append(c.faults, injected{at: e.At, figure: i})
		freezing[f.Name] = e.At
		if f.Name == "registry-lost" {
			c.reset = e.At
		}
	case history.Divided:
		c.divided = append(c.divided, window{from: e.At})
	case history.Heal:
		if n := len(c.divided); n > 0 && c.divided[n-1].to == 0 {
			c.divided[n-1].to = e.At
		}
		if n := len(c.faults); n > 0 {
			c.faults[n-1].healed = e.At
		}
		if f.Frozen {
			c.frozen = append(c.frozen, window{freezing[f.Name], e.At})
		}
	case history.Recover:
		fig.Faults[i].Recovery = append(fig.Faults[i].Recovery, f.Took)
		if f.Took > c.run.Bounds.Recovery {
			c.broken(I7Alive, "", "%v from the end of %s until a new job had run; %v is the bound", f.Took, f.Name, c.run.Bounds.Recovery)
		}
	}
}

// lost is I1: what was acknowledged is there and has ended.
func (c *checker) lost(f *facts) {
	if len(f.keys) > 1 {
		c.broken(I1Lost, f.id, "it was returned for several keys: %s", strings.Join(f.keys, ", "))
	}
	if !f.acked {
		return
	}
	if f.missing > 0 { // it is only read after it was acknowledged
		c.broken(I1Lost, f.id, "%d reads were told that it does not exist", f.missing)
	}
	switch {
	case f.final == nil:
		c.broken(I1Lost, f.id, "nobody asked for it at the end")
	case f.final.Code != 200 || f.final.Job == nil:
		c.v.Figures.Lost++
		c.broken(I1Lost, f.id, "it was acknowledged, and in the end the API answers %d", f.final.Code)
	case !f.final.Job.Status.Terminal():
		c.v.Figures.Lost++
		c.broken(I1Lost, f.id, "it is %s at the end", f.final.Job.Status)
	default:
		c.v.Figures.Ends[string(f.final.Job.Status)+" "+string(f.final.Job.Reason)]++
	}
}

// result is I2: a job is a register with a version that only grows, and a
// terminal state is its last value. Reads are compared in real time: a read that
// began after another observation was made must not be older, but for what a
// replica that answers it may lag.
func (c *checker) result(f *facts) {
	all := slices.Clone(f.seen)
	if f.final != nil && f.final.Job != nil {
		j := f.final.Job
		all = append(all, seen{history.Observe{
			JobID: f.id, Begin: c.lastEnd, From: "the end", Status: j.Status, Version: j.Version, Attempt: j.Attempt, ExitCode: j.ExitCode,
		}, c.lastEnd})
	}
	slices.SortStableFunc(all, func(a, b seen) int { return cmp.Compare(a.end, b.end) })
	var ends []*seen
	for i := range all {
		o := &all[i]
		if !o.Status.Valid() {
			c.broken(I2Result, f.id, "%s showed the state %q", o.From, o.Status)
		}
		if !o.Status.Terminal() {
			continue
		}
		for _, end := range ends {
			if o.Status != end.Status || differs(o.ExitCode, end.ExitCode) || o.Attempt != 0 && end.Attempt != 0 && o.Attempt != end.Attempt ||
				o.Version != 0 && end.Version != 0 && o.Version != end.Version {
				c.v.Figures.DoubleEnd++
				c.broken(I2Result, f.id, "it ended twice: %s by %s, %s by %s", describe(end), end.From, describe(o), o.From)
				return
			}
		}
		ends = append(ends, o)
	}
	for i := range all {
		read := &all[i]
		if read.Begin == 0 {
			continue
		}
		stale := c.mayBeOld(read.Begin)
		for k := range all[:i] {
			before := &all[k]
			if before.end+stale >= read.Begin {
				break
			}
			older := read.Version != 0 && before.Version > read.Version
			if older || before.Status.Terminal() && !read.Status.Terminal() {
				c.broken(I2Result, f.id, "%s showed %s, %v later %s showed %s", before.From, describe(before),
					time.Duration(read.Begin-before.end), read.From, describe(read))
				return
			}
		}
	}
}

// mayBeOld is how old the answer to a read may be that began then: a server that
// is cut off tells what it knew before. The heal ends when it has caught up.
func (c *checker) mayBeOld(begin int64) int64 {
	old := int64(c.run.Bounds.Stale)
	for _, w := range c.divided {
		if begin > w.from && (w.to == 0 || begin < w.to) {
			old = max(old, int64(c.run.Bounds.Stale)+begin-w.from)
		}
	}
	return old
}

func differs(a, b *int) bool { return a != nil && b != nil && *a != *b }

func describe(o *seen) string {
	s := fmt.Sprintf("%s (version %d, attempt %d", o.Status, o.Version, o.Attempt)
	if o.ExitCode != nil {
		s += fmt.Sprintf(", exit code %d", *o.ExitCode)
	}
	return s + ")"
}

// fenced is I3: the record's result is the last attempt's, and agrees with what
// that attempt's command wrote down itself.
func (c *checker) fenced(f *facts) {
	if f.final == nil || f.final.Job == nil || !f.final.Job.Status.Terminal() {
		return
	}
	j := f.final.Job
	if strings.Contains(j.Message, ForgedMessage) {
		c.v.Figures.StaleTaken++
		c.broken(I3Fenced, f.id, "it has the message of a report that nobody with a lease sent")
	}
	for i, a := range j.Attempts {
		if i > 0 && a.Number != j.Attempts[i-1].Number+1 {
			c.broken(I3Fenced, f.id, "attempt %d follows attempt %d", a.Number, j.Attempts[i-1].Number)
		}
		if a.Outcome == job.OutcomeSucceeded && (i != len(j.Attempts)-1 || j.Status != job.Succeeded) {
			c.broken(I3Fenced, f.id, "attempt %d of %d succeeded and the job is %s", a.Number, j.Attempt, j.Status)
		}
	}
	var last *api.Attempt
	if n := len(j.Attempts); n > 0 {
		last = &j.Attempts[n-1]
		if last.Number != j.Attempt {
			c.broken(I3Fenced, f.id, "attempt %d was dispatched last and the result is that of %d", j.Attempt, last.Number)
		}
	}
	c.reasonable(f, j)
	if f.plan.Stranger || last == nil {
		return
	}
	exited := func(code int) bool {
		return slices.ContainsFunc(f.journal, func(n history.Journal) bool {
			return n.Event == history.Stop && n.Attempt == last.Number && n.Code == code
		})
	}
	switch {
	case j.Status == job.Succeeded && !exited(0):
		c.broken(I3Fenced, f.id, "it succeeded by attempt %d, whose command never wrote that it ended with code 0", last.Number)
	case j.Status == job.Failed && j.Reason == job.ReasonExitCode && (j.ExitCode == nil || !exited(*j.ExitCode)):
		c.broken(I3Fenced, f.id, "it failed by attempt %d, whose command never wrote the recorded exit code", last.Number)
	}
}

// reasonable is the part of I3 about ends that nobody asked for.
func (c *checker) reasonable(f *facts, j *api.Job) {
	user, infra := 0, 0
	for _, a := range j.Attempts {
		switch {
		case a.Outcome == job.OutcomeReturned, a.Outcome == job.OutcomeRejected, a.Outcome == job.OutcomeSucceeded, a.Outcome == "":
		case a.ReasonClass == job.ClassInfra:
			infra++
		default:
			user++
		}
	}
	bad := ""
	switch j.Status {
	case job.Succeeded:
	case job.Canceled:
		if !f.canceled {
			bad = "nobody canceled it"
		}
	case job.TimedOut:
		if !f.plan.TimesOut {
			bad = "its command does not run that long"
		}
	case job.Failed:
		switch {
		case j.Reason == job.ReasonRegistryReset:
			if c.reset == 0 {
				bad = "the registry was never lost"
			}
		case j.ReasonClass == job.ClassInfra:
			if infra <= job.InfraBudget && !f.plan.LostFails {
				bad = fmt.Sprintf("only %d attempts failed for want of a worker, %d are forgiven", infra, job.InfraBudget)
			}
		case j.Reason == job.ReasonExitCode:
			if f.plan.Code == 0 && !f.canceled { // a canceled command may say so by its exit code
				bad = "its command does not fail"
			} else if user < f.plan.MaxAttempts && !f.canceled {
				bad = fmt.Sprintf("%d of %d attempts were used", user, f.plan.MaxAttempts)
			}
		default:
			bad = "its command does not end that way"
		}
	default:
		bad = "nothing asks for that"
	}
	if bad != "" {
		c.broken(I3Fenced, f.id, "(%s) it ended %s (%s), and %s", f.plan.Kind, j.Status, j.Reason, bad)
	}
}

// starts is I4, from the journals of the commands.
func (c *checker) starts(f *facts) {
	fig := &c.v.Figures
	slices.SortStableFunc(f.journal, func(a, b history.Journal) int { return cmp.Compare(a.At, b.At) })
	byAttempt := map[int]int{}
	n := 0
	for _, l := range f.journal {
		if l.Event == history.Start {
			n++
			byAttempt[l.Attempt]++
		}
	}
	fig.Starts += n
	for attempt, starts := range byAttempt {
		if starts > 1 || attempt == 0 {
			c.broken(I4Starts, f.id, "attempt %d started %d times", attempt, starts)
		}
	}
	wanted := 0 // starts that the command's own failures asked for
	for _, l := range f.journal {
		if l.Event == history.Stop && l.Code != 0 && l.Code == f.plan.Code {
			wanted++
		}
	}
	if n > 0 {
		fig.ExtraStarts += max(0, n-1-min(wanted, f.plan.MaxAttempts-1))
	}
	budget := f.plan.MaxAttempts + job.InfraBudget
	if f.plan.LostFails {
		budget = f.plan.MaxAttempts
	}
	if n > budget {
		c.broken(I4Starts, f.id, "its command started %d times, %d are allowed", n, budget)
	}
	c.restarted(f)
	c.overlap(f)
}

// restarted notes how long after a fault a job started again whose attempt did
// not get to its end.
func (c *checker) restarted(f *facts) {
	running := map[int]int64{} // start by PID
	for _, l := range f.journal {
		switch l.Event {
		case history.Stop:
			delete(running, l.PID)
		case history.Start:
			for pid, began := range running {
				// The first fault that it can have met.
				for _, x := range c.faults {
					if x.at < l.At && (x.healed == 0 || x.healed > began) {
						fig := &c.v.Figures.Faults[x.figure]
						fig.Restarts = append(fig.Restarts, time.Duration(l.At-max(x.at, began)))
						break
					}
				}
				delete(running, pid)
			}
			running[l.PID] = l.At
		}
	}
}

func (c *checker) overlap(f *facts) {
	for i, l := range f.journal {
		if l.Event != history.Overlap {
			continue
		}
		end := f.journal[len(f.journal)-1].At
		for _, later := range f.journal[i+1:] {
			if later.PID == l.PID && later.Attempt == l.Attempt && (later.Event == history.Alone || later.Event == history.Stop) {
				end = later.At
				break
			}
		}
		whole := time.Duration(end - l.At)
		frozen := c.frozenWithin(l.At, end)
		c.v.Figures.FrozenOverlap += frozen
		c.v.Figures.Overlap += whole - frozen
		if whole-frozen > c.run.Bounds.Overlap {
			c.broken(I4Starts, f.id, "attempt %d and another one lived at once for %v (and %v frozen); %v is the bound",
				l.Attempt, whole-frozen, frozen, c.run.Bounds.Overlap)
		}
	}
}

func (c *checker) frozenWithin(from, to int64) time.Duration {
	sum := int64(0)
	for _, w := range c.frozen {
		sum += max(0, min(to, w.to)-max(from, w.from))
	}
	return time.Duration(sum)
}

// outputs is I6.
func (c *checker) outputs(f *facts) {
	if f.output == nil || f.final == nil || f.final.Job == nil {
		return
	}
	o, j := f.output, f.final.Job
	if !o.Complete {
		c.v.Figures.Incomplete++
		return
	}
	gap := func(format string, args ...any) {
		c.v.Figures.UndeclaredGaps++
		c.broken(I6Output, f.id, format, args...)
	}
	for i, seq := range o.Seqs {
		if seq != int64(i)+1 {
			gap("its output is called complete, and chunk %d follows %d others", seq, i)
			return
		}
	}
	if j.Logs != nil && (int64(len(o.Seqs)) != j.Logs.Chunks || o.Bytes != j.Logs.Bytes) {
		gap("its output is called complete, and has %d chunks and %d bytes of the declared %d and %d", len(o.Seqs), o.Bytes, j.Logs.Chunks, j.Logs.Bytes)
		return
	}
	if j.Status == job.Succeeded && !f.plan.Stranger {
		if want := expected(f.plan.Lines, j.Attempt); o.Stdout != want {
			gap("its output is called complete, and is %q instead of %q", cut(o.Stdout), cut(want))
		}
	}
}

// expected is what chaosjob prints.
func expected(lines, attempt int) string {
	var b strings.Builder
	for i := range lines {
		fmt.Fprintf(&b, "line %d of attempt %d\n", i+1, attempt)
	}
	return b.String()
}

func cut(s string) string {
	const most = 200
	if len(s) > most {
		return s[:most] + "..."
	}
	return s
}

// projection is I8.
func (c *checker) projection(f *facts) {
	reg, inRegistry := f.stored[history.Registry]
	db, inDatabase := f.stored[history.Database]
	differs := func(format string, args ...any) {
		c.v.Figures.Differences++
		c.broken(I8Projection, f.id, format, args...)
	}
	switch {
	case inRegistry && !inDatabase:
		differs("the registry has it as %s, the database does not have it", reg.State)
	case inRegistry && (reg.Version != db.Version || reg.State != db.State):
		differs("the registry has %s (version %d), the database %s (version %d)", reg.State, reg.Version, db.State, db.Version)
	case !inRegistry && inDatabase && !db.State.Terminal():
		differs("it left the registry, and the database has it as %s", db.State)
	case f.acked && !inRegistry && !inDatabase:
		differs("it was acknowledged, and neither has it")
	case inDatabase && f.final != nil && f.final.Job != nil && (f.final.Job.Version != db.Version || f.final.Job.Status != db.State):
		differs("the API shows %s (version %d), the database has %s (version %d)", f.final.Job.Status, f.final.Job.Version, db.State, db.Version)
	}
}
