package plan

import (
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/job"
)

// Demand is what a job reserves on a worker beside its slot.
type Demand struct {
	CPU    int64 // millionths of a core
	Memory int64 // bytes
}

// DemandOf returns what a job of this spec reserves.
func DemandOf(s *job.Spec) Demand {
	return Demand{CPU: micro(s.Resources.CPU), Memory: s.Resources.MemoryMB << 20}
}

// micro rounds, so that ten jobs of 0.1 fill one core exactly.
func micro(cores float64) int64 { return int64(math.Round(cores * 1e6)) }

// lower makes d at most other.
func (d *Demand) lower(other Demand) {
	d.CPU, d.Memory = min(d.CPU, other.CPU), min(d.Memory, other.Memory)
}

// Need is what a job asks of a worker. Jobs of one shape share it; it is never
// changed.
type Need struct {
	Demand Demand
	class  string   // key of executor and constraints
	key    string   // of all of it
	spec   job.Spec // only the fields that decide placement
}

// shape is what jobs with the same need share.
type shape struct {
	*Need
	id     string // the need's key, or one of its own
	class  *class
	avoid  map[string]time.Time // of a shape that one job has for itself: workers not to use until then
	lines  int                  // lines that hold jobs of this shape
	parked bool                 // fits nowhere at the moment
	index  int                  // in Planner.parked
	off    []*line              // lines taken out of their queue's ready heap while parked
}

// class is the part of a shape that does not change with load: executor and
// constraints. Its workers are those that match them.
type class struct {
	key     string
	spec    job.Spec
	workers []*worker
	shapes  int
}

// narrow keeps of a spec what decides placement.
func narrow(s *job.Spec) job.Spec {
	n := job.Spec{
		Constraints: job.Constraints{OS: s.Constraints.OS, Arch: s.Constraints.Arch, Labels: maps.Clone(s.Constraints.Labels)},
		Resources:   job.Resources{CPU: s.Resources.CPU, MemoryMB: s.Resources.MemoryMB},
	}
	if s.Executor() == job.ExecutorDocker {
		n.ContainerImage = "any" // the image itself decides nothing, its presence does
	}
	return n
}

// keys returns the class key and the shape key of a spec. Labels are quoted, so
// no two different specs share a key.
func keys(s *job.Spec) (classKey, shapeKey string) {
	var b strings.Builder
	b.Grow(64)
	b.WriteString(s.Executor())
	b.WriteByte('|')
	b.WriteString(strconv.Quote(s.Constraints.OS))
	b.WriteString(strconv.Quote(s.Constraints.Arch))
	for _, k := range slices.Sorted(maps.Keys(s.Constraints.Labels)) {
		b.WriteString(strconv.Quote(k))
		b.WriteString(strconv.Quote(s.Constraints.Labels[k]))
	}
	n := b.Len()
	d := DemandOf(s)
	b.WriteByte('|')
	b.WriteString(strconv.FormatInt(d.CPU, 10))
	b.WriteByte('|')
	b.WriteString(strconv.FormatInt(d.Memory, 10))
	all := b.String()
	return all[:n], all
}

// compact forgets lines that became empty while the shape was parked, so that
// jobs that come and go do not fill memory.
func (s *shape) compact() {
	if len(s.off) > 2*s.lines+16 {
		s.off = slices.DeleteFunc(s.off, func(ln *line) bool { return len(ln.jobs) == 0 })
	}
}
