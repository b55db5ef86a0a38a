package ratelimit

import (
	"container/heap"
	"context"
	"hash/maphash"
	"sync"
	"time"
)

// Limits of Local.
const (
	DefaultMaxKeys = 100_000
	shards         = 64
	sweepPerCall   = 2 // idle keys forgotten per call: more than one call can add
)

// Local is a Limiter in the memory of the process. A key whose burst is whole again is forgotten, which changes no decision. When all of
// a shard's places are taken by keys that are not idle, events of new keys are refused until one is: forgetting a busy key would
// let whoever can make up many keys escape their limits. Safe for concurrent use.
type Local struct {
	now    func() int64 // nanoseconds, monotonic
	seed   maphash.Seed
	shards [shards]shard
}

type shard struct {
	mu     sync.Mutex
	max    int
	byName map[string]*entry
	byTime byTime // soonest idle first
}

type entry struct {
	key   string
	tat   int64 // theoretical arrival time: the key is idle from then on
	index int   // in byTime
}

// NewLocal returns a limiter for about maxKeys keys at once (DefaultMaxKeys if not above zero; at least one per shard). A key costs
// roughly 150 bytes plus its own length.
func NewLocal(maxKeys int) *Local {
	start := time.Now()
	return newLocal(maxKeys, func() int64 { return int64(time.Since(start)) })
}

func newLocal(maxKeys int, now func() int64) *Local {
	if maxKeys <= 0 {
		maxKeys = DefaultMaxKeys
	}
	l := &Local{now: now, seed: maphash.MakeSeed()}
	for i := range l.shards {
		l.shards[i].max = max(1, maxKeys/shards)
		l.shards[i].byName = map[string]*entry{}
	}
	return l
}

// Allow never blocks for long and never returns an error.
func (l *Local) Allow(_ context.Context, key string, rate Rate) (Decision, error) {
	if rate.Off() {
		return Decision{Allowed: true}, nil
	}
	s := &l.shards[maphash.String(l.seed, key)%shards]
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.allow(key, rate, l.now()), nil
}

// AllowAll is Allow of each event up to the first refusal.
func (l *Local) AllowAll(ctx context.Context, events ...Event) (Decision, error) {
	all := Decision{Allowed: true}
	for _, e := range events {
		d, _ := l.Allow(ctx, e.Key, e.Rate) // never fails
		d.Policy = e.Policy
		if !d.Allowed {
			return d, nil
		}
		all = tighter(all, d)
	}
	return all, nil
}

// Len returns how many keys are remembered.
func (l *Local) Len() int {
	n := 0
	for i := range l.shards {
		s := &l.shards[i]
		s.mu.Lock()
		n += len(s.byName)
		s.mu.Unlock()
	}
	return n
}

func (s *shard) allow(key string, rate Rate, now int64) Decision {
	s.forgetIdle(now)
	e := s.byName[key]
	if e == nil {
		if len(s.byName) >= s.max {
			wait := time.Duration(s.byTime[0].tat - now)
			return Decision{Limit: rate.Count, Per: rate.Per, ResetAfter: wait, RetryAfter: wait}
		}
		e = &entry{key: key, tat: now}
		s.byName[key] = e
		heap.Push(&s.byTime, e)
	}
	tat, d := gcra(e.tat, now, rate)
	if tat != e.tat {
		e.tat = tat
		heap.Fix(&s.byTime, e.index)
	}
	return d
}

func (s *shard) forgetIdle(now int64) {
	for range sweepPerCall {
		if len(s.byTime) == 0 || s.byTime[0].tat > now {
			return
		}
		e := heap.Pop(&s.byTime).(*entry)
		delete(s.byName, e.key)
	}
}

// byTime is a heap.Interface.
type byTime []*entry

func (h byTime) Len() int           { return len(h) }
func (h byTime) Less(i, j int) bool { return h[i].tat < h[j].tat }
func (h byTime) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}

func (h *byTime) Push(x any) {
	e := x.(*entry)
	e.index = len(*h)
	*h = append(*h, e)
}

func (h *byTime) Pop() any {
	old := *h
	last := len(old) - 1
	e := old[last]
	old[last] = nil
	*h = old[:last]
	return e
}
