//go:build !linux

package clock

import (
	"sync"
	"time"
)

// System takes, between two readings, the larger of what the monotonic clock
// and the wall clock say has passed: the first stops while the machine sleeps,
// the second may be set back.
type System struct {
	mu   sync.Mutex
	last time.Time
	now  time.Duration
}

// NewSystem returns the machine's sleep-aware clock.
func NewSystem() *System { return &System{last: time.Now()} }

// Now reads the clock.
func (s *System) Now() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := time.Now()
	mono, wall := t.Sub(s.last), t.Round(0).Sub(s.last.Round(0))
	s.now += max(mono, wall, 0)
	s.last = t
	return s.now
}
