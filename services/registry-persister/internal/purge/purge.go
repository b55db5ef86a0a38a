// Package purge decides which ended jobs leave the registry, and how. It is pure
// apart from its own memory: no clock, no bus.
//
// Purging one key costs the server 160 to 270 us, a key of a whole group 7 to 9.
// But a group may be purged only up to the first of its keys that must stay, and
// to know that one the registry is scanned, which costs time for every live job.
package purge

import (
	"cmp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/core/job"
)

// Graces are how long an ended job stays in the registry, where everybody finds
// it at once.
type Graces struct {
	Plain time.Duration
	Keyed time.Duration // so long repeats of the submit are refused by the key itself, database or not
}

const (
	few     = 25                     // so few are purged at once, one by one
	most    = 5000                   // single purges in one plan
	gather  = 15 * time.Second       // how long many wait for more
	costOne = 200 * time.Microsecond // of a single purge
)

// Key is a job that has ended and is durably stored.
type Key struct {
	JobID    string
	Revision uint64
	Due      time.Time // when its grace is over
	Keyed    bool      // its group says nothing about when it was created
}

// KeyOf returns the key of an ended record. The grace counts from its end, and
// is never longer than from now, whatever the clocks say.
func (g Graces) KeyOf(r *job.Record, revision uint64, now time.Time) Key {
	grace := g.Plain
	if r.Keyed {
		grace = g.Keyed
	}
	due := r.FinishedAt.Add(grace)
	if latest := now.Add(grace); due.After(latest) {
		due = latest
	}
	return Key{JobID: r.ID, Revision: revision, Due: due, Keyed: r.Keyed}
}

// Tracker remembers what waits for its purge. It is safe for concurrent use.
type Tracker struct {
	mu   sync.Mutex
	keys map[string]tracked
}

type tracked struct {
	Key
	alone bool // its group was purged and it stayed
}

// Note adds keys. The newest revision of a job counts.
func (t *Tracker) Note(keys ...Key) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.keys == nil {
		t.keys = map[string]tracked{}
	}
	for _, k := range keys {
		if have, ok := t.keys[k.JobID]; !ok || have.Revision < k.Revision {
			t.keys[k.JobID] = tracked{Key: k}
		}
	}
}

// Forget removes keys that were purged, unless a newer revision came since.
func (t *Tracker) Forget(keys ...Key) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, k := range keys {
		if have, ok := t.keys[k.JobID]; ok && have.Revision <= k.Revision {
			delete(t.keys, k.JobID)
		}
	}
}

// Alone has keys purged one by one from now on.
func (t *Tracker) Alone(keys ...Key) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, k := range keys {
		if have, ok := t.keys[k.JobID]; ok {
			have.alone = true
			t.keys[k.JobID] = have
		}
	}
}

// Clear forgets everything.
func (t *Tracker) Clear() {
	t.mu.Lock()
	defer t.mu.Unlock()
	clear(t.keys)
}

// Len is how many jobs wait.
func (t *Tracker) Len() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.keys)
}

// Has reports whether that revision of a job, or a newer one, is known.
func (t *Tracker) Has(jobID string, revision uint64) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	have, ok := t.keys[jobID]
	return ok && have.Revision >= revision
}

// Plan is what to purge now.
type Plan struct {
	Singles []Key
	Groups  map[string][]Key // nil: none. A scan must say up to where; see Bound
}

// Plan decides. scanCost is how long the last scan of the registry took.
func (t *Tracker) Plan(now time.Time, scanCost time.Duration) Plan {
	t.mu.Lock()
	defer t.mu.Unlock()
	var singles, many []Key
	for _, k := range t.keys {
		switch {
		case k.Due.After(now):
		case k.Keyed || k.alone:
			singles = append(singles, k.Key)
		default:
			many = append(many, k.Key)
		}
	}
	if len(many) < few {
		singles = append(singles, many...)
		return Plan{Singles: oldest(singles)}
	}
	// More keys of a group may come until its time is over.
	many = slices.DeleteFunc(many, func(k Key) bool { return now.Before(groupEnd(k.JobID)) })
	if len(many) == 0 {
		return Plan{Singles: oldest(singles)}
	}
	first := slices.MinFunc(many, func(a, b Key) int { return a.Due.Compare(b.Due) }).Due
	saved := time.Duration(len(many)) * costOne
	switch {
	case saved <= 8*scanCost && now.Before(first.Add(gather)):
		return Plan{Singles: oldest(singles)} // it pays to wait for more
	case saved <= scanCost:
		return Plan{Singles: oldest(append(singles, many...))}
	}
	groups := map[string][]Key{}
	for _, k := range many {
		g := id.Group(k.JobID)
		groups[g] = append(groups[g], k)
	}
	return Plan{Singles: oldest(singles), Groups: groups}
}

// oldest orders by due time and bounds the work of one plan.
func oldest(keys []Key) []Key {
	slices.SortFunc(keys, func(a, b Key) int {
		return cmp.Or(a.Due.Compare(b.Due), strings.Compare(a.JobID, b.JobID))
	})
	return keys[:min(most, len(keys))]
}

// groupEnd is when no more jobs get ids of that group.
func groupEnd(jobID string) time.Time {
	start, err := id.Time(string(id.Job) + "-" + id.Group(jobID) + strings.Repeat("0", id.ULIDLen-id.GroupLen))
	if err != nil {
		return time.Time{} // not an id that New makes: nothing to wait for
	}
	return start.Add(1 << 15 * time.Millisecond)
}

// Bound returns the revision up to which a group may be purged, given the
// revisions of its live keys that must stay and of those that may go; 0 when
// nothing may. Purging up to it removes nothing that must stay.
func Bound(stay, mayGo []uint64) uint64 {
	limit := ^uint64(0)
	for _, r := range stay {
		limit = min(limit, r)
	}
	var upTo uint64
	for _, r := range mayGo {
		if r < limit {
			upTo = max(upTo, r)
		}
	}
	return upTo
}
