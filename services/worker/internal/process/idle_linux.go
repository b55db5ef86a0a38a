package process

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
	"golang.org/x/sys/unix"
)

const (
	mostIdleGroups = 64
	// idleMemory bounds what an idle group may still be charged with, such as files
	// in memory that a command left: the next one would have that much less.
	idleMemory = 1 << 20
	// idleShare bounds it by the group's limit too.
	idleShare = 64
)

// quotas are the limits of a group.
type quotas struct {
	memoryMB, pids int64
	cpu            float64
}

// quotasOf gives those limits of a spec that a hierarchy enforces.
func quotasOf(c *hierarchy, spec executor.Spec) quotas {
	var q quotas
	if c.memory {
		q.memoryMB = spec.MemoryMB
	}
	if c.pids {
		q.pids = spec.PIDs
	}
	if c.cpu {
		q.cpu = spec.CPU
	}
	return q
}

// idleGroups are empty groups of version 1 that wait for an attempt with the same
// limits. Making, filling in and removing three of them for each command costs as
// much as a third of starting it. A group is kept only if nothing of an attempt is
// left in it.
type idleGroups struct {
	mu     sync.Mutex
	next   int
	groups []*group
}

// idleGroupName names a group that several attempts use, one after the other.
func idleGroupName(worker string, n int) string {
	return groupPrefix + worker + ".limits." + strconv.Itoa(n)
}

func (i *idleGroups) number() int {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.next++
	return i.next
}

// take gives an idle group with these limits, nil where there is none.
func (i *idleGroups) take(want quotas) *group {
	i.mu.Lock()
	defer i.mu.Unlock()
	for n := len(i.groups) - 1; n >= 0; n-- {
		if g := i.groups[n]; *g.again == want {
			i.groups = append(i.groups[:n], i.groups[n+1:]...)
			return g
		}
	}
	return nil
}

// put keeps a group. Where there are too many, the one that has waited longest goes.
func (i *idleGroups) put(g *group) {
	i.mu.Lock()
	var surplus *group
	if len(i.groups) >= mostIdleGroups {
		surplus = i.groups[0]
		i.groups = append(i.groups[:0], i.groups[1:]...)
	}
	i.groups = append(i.groups, g)
	i.mu.Unlock()
	if surplus != nil {
		surplus.destroy(time.Now().Add(time.Second))
	}
}

// remove removes the idle groups.
func (i *idleGroups) remove() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	var errs []error
	for _, g := range i.groups {
		if !g.destroy(time.Now().Add(time.Second)) {
			errs = append(errs, fmt.Errorf("control group still in use: %s", g.path))
		}
	}
	i.groups = nil
	return errors.Join(errs...)
}

// release gives a group that its attempt no longer needs back to be used again, or
// destroys it. It reports what destroy does.
func (g *group) release(deadline time.Time) bool {
	if g.gone || g.again == nil || !g.asNew() {
		return g.destroy(deadline)
	}
	next := *g
	g.gone, g.fd, g.files = true, -1, nil
	g.h.idle.put(&next)
	return true
}

// asNew reports whether the group has no member, none below it, and no memory to
// speak of. It notes what it cannot reset.
func (g *group) asNew() bool {
	var st unix.Stat_t
	if g.fd < 0 || unix.Fstat(g.fd, &st) != nil || st.Nlink != 2 { // each group below is a link more
		return false
	}
	var buf [32]byte
	if members, err := readFileAt(g.fd, "cgroup.procs", buf[:]); err != nil || len(members) > 0 {
		return false
	}
	if !g.h.memory {
		return true
	}
	most := int64(idleMemory)
	if g.again.memoryMB > 0 {
		most = min(most, g.again.memoryMB<<20/idleShare)
	}
	used, known := number(g.fd, "memory.usage_in_bytes")
	if !known || used > most {
		return false
	}
	g.oomKills, known = keyed(g.fd, "memory.oom_control", "oom_kill")
	return known
}

// renew makes an idle group ready for an attempt. The limits are written again, since
// a command of root could have changed them.
func (g *group) renew(spec executor.Spec) error {
	if g.h.memory {
		if err := g.write("memory.max_usage_in_bytes", "0"); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("reset peak memory: %w", err)
		}
	}
	return g.limit(spec)
}
