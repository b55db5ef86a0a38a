package plan

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/cmdexec/cmdexec/libs/core/fleet"
	"github.com/cmdexec/cmdexec/libs/core/job"
)

var t0 = time.Date(2026, 11, 24, 8, 0, 0, 0, time.UTC)

type jobOption func(*job.Spec, *Job)

func prio(n int) jobOption       { return func(_ *job.Spec, j *Job) { j.Priority = n } }
func owned(by string) jobOption  { return func(_ *job.Spec, j *Job) { j.Owner = by } }
func queued(in string) jobOption { return func(_ *job.Spec, j *Job) { j.Queue = in } }
func at(d time.Duration) jobOption {
	return func(_ *job.Spec, j *Job) { j.Created = t0.Add(d) }
}
func cpu(n float64) jobOption  { return func(s *job.Spec, _ *Job) { s.Resources.CPU = n } }
func memory(n int64) jobOption { return func(s *job.Spec, _ *Job) { s.Resources.MemoryMB = n } }
func docker() jobOption        { return func(s *job.Spec, _ *Job) { s.ContainerImage = "alpine" } }
func on(os, arch string) jobOption {
	return func(s *job.Spec, _ *Job) { s.Constraints.OS, s.Constraints.Arch = os, arch }
}

func label(k, v string) jobOption {
	return func(s *job.Spec, _ *Job) {
		if s.Constraints.Labels == nil {
			s.Constraints.Labels = map[string]string{}
		}
		s.Constraints.Labels[k] = v
	}
}

func add(p *Planner, id string, os ...jobOption) {
	spec := job.Spec{Resources: job.Resources{CPU: 1, MemoryMB: 512}}
	j := Job{ID: id, Owner: "ann", Queue: job.DefaultQueue, Priority: job.DefaultPriority, Created: t0}
	for _, o := range os {
		o(&spec, &j)
	}
	j.Need = p.Need(&spec)
	p.Enqueue(j, nil, t0)
}

func machine(id string, slots int) fleet.Worker {
	return fleet.Worker{
		ID: id, OS: "linux", Arch: "amd64", CPUCores: 64, TotalMemory: 64 << 30,
		Executors: []string{job.ExecutorProcess}, Slots: slots,
	}
}

func online(p *Planner, w fleet.Worker) {
	p.PutWorker(w, t0)
	p.UpdateWorker(w.ID, t0, func(a *Availability) { a.Online, a.FreshUntil = true, t0.Add(24*time.Hour) })
}

// all takes every decision that can be taken now.
func all(p *Planner, now time.Time) (ids []string) {
	for {
		d, ok := p.Next(now)
		if !ok {
			return ids
		}
		ids = append(ids, d.JobID)
	}
}

func TestHigherPriorityFirstThenOldest(t *testing.T) {
	p := New(0)
	add(p, "b", at(2*time.Second))
	add(p, "low", prio(0))
	add(p, "a", at(time.Second))
	add(p, "high", prio(100), at(time.Hour))
	add(p, "tie2", at(3*time.Second))
	add(p, "tie1", at(3*time.Second))
	online(p, machine("w", 10))
	require.Equal(t, []string{"high", "a", "b", "tie1", "tie2", "low"}, all(p, t0))
	require.Zero(t, p.Waiting())
}

func TestOwnersTakeTurns(t *testing.T) {
	p := New(0)
	for i := range 50 {
		add(p, fmt.Sprintf("ann%02d", i), owned("ann"), at(time.Duration(i)))
	}
	for i := range 3 {
		add(p, fmt.Sprintf("bob%02d", i), owned("bob"), at(time.Hour+time.Duration(i)))
	}
	online(p, machine("w", 100))
	require.Equal(t, []string{"ann00", "bob00", "ann01", "bob01", "ann02", "bob02", "ann03"}, all(p, t0)[:7])
}

func TestAnOwnersQueuesTakeTurns(t *testing.T) {
	p := New(0)
	for i := range 10 {
		add(p, fmt.Sprintf("bulk%d", i), queued("bulk"), at(time.Duration(i)))
	}
	add(p, "quick", queued("quick"), at(time.Hour))
	add(p, "other", owned("bob"), at(time.Hour))
	online(p, machine("w", 100))
	require.Equal(t, []string{"bulk0", "other", "quick", "bulk1"}, all(p, t0)[:4])
}

func TestAJobThatFitsNowhereBlocksNobody(t *testing.T) {
	p := New(0)
	add(p, "impossible", prio(100), label("gpu", "yes"))
	for i := range 5 {
		add(p, fmt.Sprintf("j%d", i), at(time.Duration(i)))
	}
	online(p, machine("w", 3))
	require.Equal(t, []string{"j0", "j1", "j2"}, all(p, t0))
	p.Release("j1", t0)
	require.Equal(t, []string{"j3"}, all(p, t0))
	gpu := machine("g", 1)
	gpu.Labels = map[string]string{"gpu": "yes"}
	online(p, gpu)
	require.Equal(t, []string{"impossible"}, all(p, t0), "the new worker runs what waited for it")
}

func TestWorkersMustMatch(t *testing.T) {
	linux := machine("linux", 4)
	mac := machine("mac", 4)
	mac.OS, mac.Arch, mac.Executors = "darwin", "arm64", []string{job.ExecutorProcess, job.ExecutorDocker}
	mac.Labels = map[string]string{"room": "a", "big": "no"}
	small := machine("small", 4)
	small.CPUCores, small.TotalMemory = 0.5, 256<<20
	for name, c := range map[string]struct {
		options []jobOption
		want    string
		blocked map[fleet.Block]int
	}{
		"docker": {[]jobOption{docker()}, "mac", map[fleet.Block]int{fleet.BlockExecutor: 2}},
		"os":     {[]jobOption{on("darwin", "")}, "mac", map[fleet.Block]int{fleet.BlockOS: 2}},
		"arch":   {[]jobOption{on("", "arm64")}, "mac", map[fleet.Block]int{fleet.BlockArch: 2}},
		"label":  {[]jobOption{label("room", "a")}, "mac", map[fleet.Block]int{fleet.BlockLabels: 2}},
		"value":  {[]jobOption{label("room", "b")}, "", map[fleet.Block]int{fleet.BlockLabels: 3}},
		"cpu":    {[]jobOption{cpu(65)}, "", map[fleet.Block]int{fleet.BlockTooBig: 3}},
		"memory": {[]jobOption{memory(65 << 10), on("linux", "")}, "", map[fleet.Block]int{fleet.BlockTooBig: 2, fleet.BlockOS: 1}},
		"small":  {[]jobOption{cpu(0.5), memory(256), on("linux", "")}, "linux", map[fleet.Block]int{fleet.BlockOS: 1}},
	} {
		t.Run(name, func(t *testing.T) {
			p := New(0)
			for _, w := range []fleet.Worker{linux, mac, small} {
				online(p, w)
			}
			add(p, "j", c.options...)
			require.Equal(t, c.blocked, p.Blocked("j", t0))
			d, ok := p.Next(t0)
			require.Equal(t, c.want != "", ok)
			require.Equal(t, c.want, d.WorkerID)
		})
	}
}

func TestUnusableWorkersGetNothingAndSayWhy(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*Availability)
		reason fleet.Block
	}{
		"closed":     {func(a *Availability) { a.Online = false }, fleet.BlockOffline},
		"late":       {func(a *Availability) { a.FreshUntil = t0 }, fleet.BlockOffline},
		"draining":   {func(a *Availability) { a.Draining = true }, fleet.BlockDraining},
		"set aside":  {func(a *Availability) { a.SetAside = t0.Add(time.Second) }, fleet.BlockSetAside},
		"backed off": {func(a *Availability) { a.NotBefore = t0.Add(time.Second) }, fleet.BlockSetAside},
		"full":       {func(a *Availability) { a.Foreign = 4 }, fleet.BlockSlots},
	} {
		t.Run(name, func(t *testing.T) {
			p := New(0)
			online(p, machine("w", 4))
			p.UpdateWorker("w", t0, c.change)
			add(p, "j")
			require.Empty(t, all(p, t0))
			require.Equal(t, map[fleet.Block]int{c.reason: 1}, p.Blocked("j", t0))
			p.UpdateWorker("w", t0, func(a *Availability) { *a = Availability{Online: true, FreshUntil: t0.Add(time.Hour)} })
			require.Equal(t, []string{"j"}, all(p, t0), "it is found as soon as the worker can be used")
		})
	}
}

func TestABackoffEndsByItself(t *testing.T) {
	p := New(0)
	online(p, machine("w", 1))
	p.UpdateWorker("w", t0, func(a *Availability) { a.NotBefore = t0.Add(3 * time.Second) })
	add(p, "j")
	require.Empty(t, all(p, t0))
	wake, ok := p.Wake()
	require.True(t, ok)
	require.Equal(t, t0.Add(3*time.Second), wake)
	require.Empty(t, all(p, wake.Add(-1)))
	require.Equal(t, []string{"j"}, all(p, wake))
	_, ok = p.Wake()
	require.False(t, ok)
}

func TestAJobAvoidsTheWorkerThatRefusedIt(t *testing.T) {
	p := New(0)
	online(p, machine("a", 2))
	online(p, machine("b", 1))
	add(p, "other")
	spec := job.Spec{Resources: job.Resources{CPU: 1, MemoryMB: 512}}
	refused := Job{ID: "j", Owner: "ann", Queue: "default", Priority: 90, Created: t0, Need: p.Need(&spec)}
	p.Enqueue(refused, map[string]time.Time{"a": t0.Add(time.Second), "b": t0.Add(-time.Second)}, t0)
	d, ok := p.Next(t0)
	require.True(t, ok)
	require.Equal(t, Decision{JobID: "j", WorkerID: "b"}, d)
	p.Enqueue(refused, map[string]time.Time{"a": t0.Add(time.Second), "b": t0.Add(2 * time.Second)}, t0)
	p.Release("j", t0)
	require.Equal(t, []string{"other"}, all(p, t0), "others of the same shape are not held up")
	require.Equal(t, map[fleet.Block]int{fleet.BlockSetAside: 2}, p.Blocked("j", t0))
	d, ok = p.Next(t0.Add(time.Second))
	require.True(t, ok)
	require.Equal(t, Decision{JobID: "j", WorkerID: "a"}, d)
}

func TestSpreadsAndBreaksTiesByID(t *testing.T) {
	p := New(0)
	for _, id := range []string{"c", "a", "b"} {
		online(p, machine(id, 2))
	}
	for i := range 6 {
		add(p, fmt.Sprintf("j%d", i), at(time.Duration(i)))
	}
	var got []string
	for range 6 {
		d, ok := p.Next(t0)
		require.True(t, ok)
		got = append(got, d.WorkerID)
	}
	require.Equal(t, []string{"a", "b", "c", "a", "b", "c"}, got)
}

func TestReservationsOfTheRegistryCount(t *testing.T) {
	p := New(0)
	p.Reserve("old", "ann", "w", Demand{CPU: 63e6, Memory: 1 << 30}, t0) // before the worker is known
	online(p, machine("w", 4))
	add(p, "big", cpu(2))
	add(p, "small", cpu(1), at(time.Second))
	require.Equal(t, []string{"small"}, all(p, t0))
	require.Equal(t, map[fleet.Block]int{fleet.BlockCPU: 1}, p.Blocked("big", t0))
	p.Reserve("old", "ann", "w", Demand{CPU: 1e6}, t0)
	p.Release("old", t0)
	p.Release("old", t0)
	require.Equal(t, []string{"big"}, all(p, t0))
	_, _, load, known := p.Worker("w")
	require.True(t, known)
	require.Equal(t, Load{Jobs: 2, Demand: Demand{CPU: 3e6, Memory: 1 << 30}}, load)
}

func TestTenTenthsFillACore(t *testing.T) {
	p := New(0)
	w := machine("w", 100)
	w.CPUCores = 1
	online(p, w)
	for i := range 11 {
		add(p, fmt.Sprintf("j%02d", i), cpu(0.1))
	}
	require.Len(t, all(p, t0), 10)
}

func TestPositionIsTheOrderOfDispatch(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		p := New(0)
		n := rapid.IntRange(1, 40).Draw(rt, "n")
		for i := range n {
			add(p, fmt.Sprintf("j%02d", i),
				prio(rapid.IntRange(0, 2).Draw(rt, "prio")),
				owned(rapid.SampledFrom([]string{"a", "b", "c"}).Draw(rt, "owner")),
				at(time.Duration(rapid.IntRange(0, 5).Draw(rt, "at"))))
		}
		positions := map[string]int{}
		for i := range n {
			id := fmt.Sprintf("j%02d", i)
			positions[id] = p.Position(id)
		}
		online(p, machine("w", 1000))
		for i, id := range all(p, t0) {
			if positions[id] != i+1 {
				rt.Fatalf("%s was said to be at %d and went at %d", id, positions[id], i+1)
			}
		}
		if p.Position("nobody") != 0 {
			rt.Fatal("a job that is not there has a position")
		}
	})
}

// model is what the planner is compared with: plain lists, no index.
type model struct {
	jobs    map[string]Job
	specs   map[string]job.Spec
	workers map[string]fleet.Worker
	avail   map[string]Availability
	placed  map[string]string
	owners  map[string]string // of every job
	most    int               // jobs of one owner that may be placed; 0: any number
}

func (m *model) full(owner string) bool {
	n := 0
	for j := range m.placed {
		if m.owners[j] == owner {
			n++
		}
	}
	return m.most > 0 && n >= m.most
}

func (m *model) times(id string, now time.Time) int {
	if a := m.avail[id]; now.Before(a.AheadUntil) && m.workers[id].Backlog > 0 {
		return max(1, a.Ahead)
	}
	return 1
}

func (m *model) free(id string, now time.Time) (slots int, d Demand) {
	w, times := m.workers[id], m.times(id, now)
	slots = min(w.Slots*times, w.Slots+w.Backlog) - m.avail[id].Foreign
	d = Demand{CPU: micro(w.CPUCores) * int64(times), Memory: w.TotalMemory * int64(times)}
	for j, at := range m.placed {
		if at == id {
			s := m.specs[j]
			used := DemandOf(&s)
			slots--
			d.CPU -= used.CPU
			d.Memory -= used.Memory
		}
	}
	return slots, d
}

func (m *model) fits(j, worker string, now time.Time) bool {
	if m.full(m.owners[j]) {
		return false
	}
	w, s, a := m.workers[worker], m.specs[j], m.avail[worker]
	if _, ok := w.CanEverRun(&s); !ok || !a.Usable(now) {
		return false
	}
	slots, free := m.free(worker, now)
	d := DemandOf(&s)
	return slots > 0 && d.CPU <= free.CPU && d.Memory <= free.Memory
}

func (m *model) placeable(j string, now time.Time) bool {
	for w := range m.workers {
		if m.fits(j, w, now) {
			return true
		}
	}
	return false
}

// TestAgainstTheModel runs random histories and checks every decision: the worker
// fits, nothing is ever over capacity and no owner over the limit, no placeable job of a higher priority is
// passed over, nor an older one of the same owner, queue and priority, and the
// planner never stops while something can be placed.
func TestAgainstTheModel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		most := rapid.SampledFrom([]int{0, 1, 2, 4}).Draw(rt, "most")
		p := New(most)
		now := t0
		m := model{
			map[string]Job{},
			map[string]job.Spec{},
			map[string]fleet.Worker{},
			map[string]Availability{},
			map[string]string{},
			map[string]string{},
			most,
		}
		workerIDs := []string{"w0", "w1", "w2", "w3"}
		serial := 0
		pick := func(ids []string) string { return rapid.SampledFrom(ids).Draw(rt, "pick") }
		keysOf := func(m map[string]string) []string {
			out := []string{}
			for k := range m {
				out = append(out, k)
			}
			slices.Sort(out)
			return out
		}
		step := func() {
			d, ok := p.Next(now)
			if !ok {
				for id := range m.jobs {
					if m.placeable(id, now) {
						rt.Fatalf("%s can be placed and was not", id)
					}
				}
				return
			}
			j, there := m.jobs[d.JobID]
			if !there {
				rt.Fatalf("%s is not in the queue", d.JobID)
			}
			if !m.fits(d.JobID, d.WorkerID, now) {
				rt.Fatalf("%s does not fit on %s", d.JobID, d.WorkerID)
			}
			for id, other := range m.jobs {
				if id == d.JobID || !m.placeable(id, now) {
					continue
				}
				if other.Priority > j.Priority {
					rt.Fatalf("%s of priority %d was passed over for %d", id, other.Priority, j.Priority)
				}
				if other.Priority == j.Priority && other.Owner == j.Owner && other.Queue == j.Queue && other.Created.Before(j.Created) {
					rt.Fatalf("%s is older than %s", id, d.JobID)
				}
			}
			delete(m.jobs, d.JobID)
			m.placed[d.JobID] = d.WorkerID
		}
		rt.Repeat(map[string]func(*rapid.T){
			"submit": func(rt *rapid.T) {
				serial++
				j := Job{
					ID: fmt.Sprintf("j%03d", serial), Owner: pick([]string{"a", "b", "c"}), Queue: pick([]string{"q", "r"}),
					Priority: rapid.IntRange(0, 2).Draw(rt, "prio"), Created: t0.Add(time.Duration(rapid.IntRange(0, 9).Draw(rt, "at")) * time.Second),
				}
				s := job.Spec{Resources: job.Resources{
					CPU: rapid.SampledFrom([]float64{0.5, 1, 2}).Draw(rt, "cpu"), MemoryMB: rapid.SampledFrom([]int64{64, 512}).Draw(rt, "mem"),
				}}
				if rapid.Bool().Draw(rt, "docker") {
					s.ContainerImage = "i" + j.ID
				}
				if rapid.Bool().Draw(rt, "label") {
					s.Constraints.Labels = map[string]string{"l": pick([]string{"x", "y"})}
				}
				j.Need = p.Need(&s)
				p.Enqueue(j, nil, now)
				m.jobs[j.ID], m.specs[j.ID], m.owners[j.ID] = j, s, j.Owner
			},
			"withdraw": func(rt *rapid.T) {
				ids := map[string]string{}
				for id := range m.jobs {
					ids[id] = ""
				}
				if len(ids) == 0 {
					return
				}
				id := pick(keysOf(ids))
				if !p.Dequeue(id) {
					rt.Fatalf("%s was not there", id)
				}
				delete(m.jobs, id)
			},
			"adopt": func(rt *rapid.T) { // what the registry says is placed, whatever the limits are
				serial++
				id, worker, owner := fmt.Sprintf("r%03d", serial), pick(workerIDs), pick([]string{"a", "b", "c"})
				if _, ok := m.workers[worker]; !ok {
					return
				}
				s := job.Spec{Resources: job.Resources{CPU: 0.5, MemoryMB: 64}}
				p.Reserve(id, owner, worker, DemandOf(&s), now)
				p.Reserve(id, owner, worker, DemandOf(&s), now)
				m.specs[id], m.owners[id], m.placed[id] = s, owner, worker
			},
			"finish": func(rt *rapid.T) {
				if len(m.placed) == 0 {
					return
				}
				id := pick(keysOf(m.placed))
				p.Release(id, now)
				delete(m.placed, id)
			},
			"register": func(rt *rapid.T) {
				w := machine(pick(workerIDs), rapid.IntRange(1, 3).Draw(rt, "slots"))
				w.Backlog = rapid.IntRange(0, 4).Draw(rt, "backlog")
				w.CPUCores = rapid.SampledFrom([]float64{1, 2, 4}).Draw(rt, "cores")
				w.TotalMemory = rapid.SampledFrom([]int64{256 << 20, 1 << 30}).Draw(rt, "ram")
				w.Executors = rapid.SampledFrom([][]string{{"docker"}, {"process"}, {"docker", "process"}}).Draw(rt, "executors")
				w.Labels = rapid.SampledFrom([]map[string]string{nil, {"l": "x"}, {"l": "y"}}).Draw(rt, "labels")
				p.PutWorker(w, now)
				m.workers[w.ID] = w
			},
			"availability": func(rt *rapid.T) {
				id := pick(workerIDs)
				if _, ok := m.workers[id]; !ok {
					return
				}
				a := Availability{
					Online: rapid.IntRange(0, 3).Draw(rt, "online") > 0, FreshUntil: now.Add(time.Duration(rapid.IntRange(0, 30).Draw(rt, "fresh")) * time.Second),
					Draining: rapid.IntRange(0, 5).Draw(rt, "draining") == 0, Foreign: rapid.IntRange(0, 1).Draw(rt, "foreign"),
					NotBefore: now.Add(time.Duration(rapid.IntRange(-3, 3).Draw(rt, "notBefore")) * time.Second),
					SetAside:  now.Add(time.Duration(rapid.IntRange(-3, 3).Draw(rt, "aside")) * time.Second),
					Ahead:     rapid.IntRange(0, 3).Draw(rt, "ahead"), AheadUntil: now.Add(time.Duration(rapid.IntRange(-3, 3).Draw(rt, "aheadUntil")) * time.Second),
				}
				p.UpdateWorker(id, now, func(to *Availability) { *to = a })
				m.avail[id] = a
			},
			"time":   func(rt *rapid.T) { now = now.Add(time.Duration(rapid.IntRange(1, 5).Draw(rt, "s")) * time.Second) },
			"decide": func(*rapid.T) { step() },
			"": func(rt *rapid.T) {
				if p.Waiting() != len(m.jobs) {
					rt.Fatalf("%d jobs wait, not %d", p.Waiting(), len(m.jobs))
				}
				for id := range m.workers {
					// A registration may shrink under its load; then free is negative in both.
					slots, free := m.free(id, now)
					w := p.workers[id]
					if times := w.times(now); w.freeSlots(times) != slots || w.free(times) != free {
						rt.Fatalf("%s has %d slots and %+v free, not %d and %+v", id, w.freeSlots(times), w.free(times), slots, free)
					}
				}
			},
		})
	})
}

func TestAnOwnerAtTheLimitWaitsAndHoldsUpNobody(t *testing.T) {
	p := New(2)
	online(p, machine("w", 100))
	for i := range 5 {
		add(p, fmt.Sprintf("ann%d", i), owned("ann"), prio(100), at(time.Duration(i)))
		add(p, fmt.Sprintf("bob%d", i), owned("bob"), prio(0), at(time.Duration(i)))
	}
	require.Equal(t, []string{"ann0", "ann1", "bob0", "bob1"}, all(p, t0))
	require.Equal(t, map[fleet.Block]int{fleet.BlockOwner: 1}, p.Blocked("ann2", t0))
	add(p, "cid", owned("cid"), prio(0), at(time.Hour))
	require.Equal(t, []string{"cid"}, all(p, t0), "others are not held up")
	add(p, "ann-high", owned("ann"), prio(90))
	require.Empty(t, all(p, t0), "the limit is over all priorities")

	p.Release("ann0", t0)
	require.Equal(t, map[fleet.Block]int{}, p.Blocked("ann2", t0))
	require.Equal(t, []string{"ann2"}, all(p, t0))
	p.Release("ann1", t0)
	p.Release("ann2", t0)
	require.Equal(t, []string{"ann3", "ann4"}, all(p, t0))

	// The registry may say that more run than may: a limit that was lowered.
	for i := range 5 {
		p.Reserve(fmt.Sprintf("dan-run%d", i), "dan", "w", Demand{}, t0)
	}
	add(p, "dan", owned("dan"))
	for i := range 4 {
		require.Empty(t, all(p, t0), "%d run", 5-i)
		p.Release(fmt.Sprintf("dan-run%d", i), t0)
	}
	require.Equal(t, []string{"dan"}, all(p, t0))
	for _, id := range []string{"ann3", "ann4", "bob0", "bob1", "cid", "dan", "dan-run4"} {
		p.Release(id, t0)
	}
	for i := range 5 {
		p.Dequeue(fmt.Sprintf("bob%d", i))
	}
	p.Dequeue("ann-high")
	require.Empty(t, p.running.counts, "owners without jobs are forgotten")
}

// Owners at the limit get their turns back when something of them ends.
func TestFairTurnsUnderALimit(t *testing.T) {
	p := New(1)
	online(p, machine("w", 100))
	for i := range 20 {
		for _, o := range []string{"a", "b", "c"} {
			add(p, fmt.Sprintf("%s%02d", o, i), owned(o), at(time.Duration(i)))
		}
	}
	for p.Waiting() > 0 {
		got := all(p, t0)
		require.Len(t, got, 3, "one of each owner")
		for _, id := range got {
			p.Release(id, t0)
		}
	}
}

// TestFairTurns: while two owners both have placeable jobs of one priority, neither
// gets more than one turn ahead of the other.
func TestFairTurns(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		p := New(0)
		online(p, machine("w", 4))
		owners := []string{"a", "b", "c", "d"}
		left := map[string]int{}
		for i, o := range owners {
			left[o] = rapid.IntRange(1, 30).Draw(rt, o)
			for k := range left[o] {
				add(p, fmt.Sprintf("%s%02d", o, k), owned(o), cpu(float64(1+k%2)), at(time.Duration(i*100+k)))
			}
		}
		turns := map[string]int{}
		for p.Waiting() > 0 {
			d, ok := p.Next(t0)
			if !ok {
				rt.Fatal("stuck")
			}
			o := d.JobID[:1]
			turns[o]++
			left[o]--
			p.Release(d.JobID, t0)
			for _, other := range owners {
				if left[other] > 0 && turns[o] > turns[other]+1 {
					rt.Fatalf("%s had %d turns while %s, who waits, had %d", o, turns[o], other, turns[other])
				}
			}
		}
	})
}

// TestNobodyStarves: whatever arrives, a job that fits an empty worker is placed
// after the jobs that were there before it and its share of later turns.
func TestNobodyStarves(t *testing.T) {
	p := New(0)
	online(p, machine("w", 1))
	for i := range 100 {
		add(p, fmt.Sprintf("before%03d", i), owned("busy"), at(time.Duration(i)))
	}
	add(p, "patient", owned("quiet"), at(time.Hour))
	for i := range 10 {
		d, ok := p.Next(t0)
		require.True(t, ok)
		p.Release(d.JobID, t0)
		add(p, fmt.Sprintf("more%03d", i), owned("busy"), at(0)) // older than the patient one
		if d.JobID == "patient" {
			return
		}
	}
	t.Fatal("ten turns went by")
}

func TestParkedShapesDoNotGrow(t *testing.T) {
	p := New(0)
	w := machine("w", 4)
	w.CPUCores = 2
	online(p, w)
	add(p, "stays", cpu(4))
	for i := range 10_000 {
		id := fmt.Sprintf("j%d", i)
		add(p, id, cpu(4), owned(fmt.Sprintf("o%d", i)))
		require.Empty(t, all(p, t0))
		require.True(t, p.Dequeue(id))
	}
	require.Len(t, p.shapes, 1)
	require.LessOrEqual(t, len(p.parked), 1)
	for _, s := range p.shapes {
		require.Less(t, len(s.off), 100)
	}
	require.Len(t, p.levels[job.DefaultPriority].owners, 1)
	require.True(t, p.Dequeue("stays"))
	require.Empty(t, p.shapes)
	require.Empty(t, p.classes)
	require.Empty(t, p.parked)
}

// BenchmarkDecide is one decision with 100,000 jobs waiting and 1,000 workers of
// mixed labels, nearly full: each turn one job ends and another takes its place.
// What ends, and the submit of a new job, are in the rate and not in the percentile.
func BenchmarkDecide(b *testing.B) {
	for _, shapes := range []int{12, 1000} {
		b.Run(fmt.Sprintf("shapes=%d", shapes), func(b *testing.B) { benchmarkDecide(b, shapes) })
	}
}

func benchmarkDecide(b *testing.B, shapes int) {
	r := rand.New(rand.NewPCG(1, 2))
	p := New(0)
	zones := []string{"a", "b", "c", "d"}
	for i := range 1000 {
		w := machine(fmt.Sprintf("w%04d", i), 8)
		w.CPUCores = 8
		w.Labels = map[string]string{"zone": zones[i%4]}
		online(p, w)
	}
	serial := 0
	submit := func() {
		serial++
		n := r.IntN(shapes)
		add(p, fmt.Sprintf("j%07d", serial), owned(fmt.Sprintf("u%02d", r.IntN(50))), prio(r.IntN(3)*50),
			label("zone", zones[n%4]), cpu(1+float64(n%3)/2), memory(512+int64(n)), at(time.Duration(serial)))
	}
	for range 100 { // these fit nowhere
		add(p, fmt.Sprintf("x%d", serial), prio(100), label("zone", "e"))
		serial++
	}
	for p.Waiting() < 100_000 {
		submit()
	}
	running := all(p, t0)
	for p.Waiting() < 100_000 {
		submit()
	}
	b.ResetTimer()
	var took []time.Duration // of each decision
	for range b.N {
		k := r.IntN(len(running))
		p.Release(running[k], t0)
		running[k] = running[len(running)-1]
		running = running[:len(running)-1]
		for {
			began := time.Now()
			d, ok := p.Next(t0)
			if !ok {
				break
			}
			took = append(took, time.Since(began))
			running = append(running, d.JobID)
			submit()
		}
	}
	b.ReportMetric(float64(len(took))/b.Elapsed().Seconds(), "decisions/s")
	slices.Sort(took)
	if n := len(took); n > 0 {
		b.ReportMetric(float64(took[n*99/100].Nanoseconds())/1e3, "p99-us")
		b.ReportMetric(float64(took[n-1].Nanoseconds())/1e3, "max-us")
	}
}
