package clock

import (
	"testing"
	"time"
)

func TestSystemGoesOn(t *testing.T) {
	c := NewSystem()
	began, first := time.Now(), c.Now()
	last := first
	for time.Since(began) < 20*time.Millisecond {
		now := c.Now()
		if now < last {
			t.Fatalf("went back from %v to %v", last, now)
		}
		last = now
	}
	if passed := last - first; passed < 10*time.Millisecond || passed > time.Minute {
		t.Errorf("%v have passed, by the clock", passed)
	}
}
