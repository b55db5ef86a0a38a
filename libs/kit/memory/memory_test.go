package memory

import (
	"testing"
	"time"
)

// at is a look at a process, some seconds after the one before.
type at struct {
	seconds, allocated int // allocated in MiB since then
	due                bool
}

func TestWatch(t *testing.T) {
	busy, idle := at{1, 100, false}, at{1, 0, false}
	for name, looks := range map[string][]at{
		"busy all the time":           {busy, busy, busy, busy, busy, busy, busy},
		"soon, and once more":         {busy, {2, 0, false}, {1, 0, true}, {1, 0, false}, {25, 0, false}, {1, 0, true}, {100, 0, false}},
		"a pause is no quiet time":    {busy, {2, 0, false}, busy, {2, 0, false}, busy},
		"again after it was busy":     {busy, {3, 0, true}, busy, {2, 0, false}, {1, 0, true}, {27, 0, true}},
		"nothing was needed":          {idle, {10, 0, false}, {60, 0, false}},
		"not worth it":                {{1, 5, false}, {5, 0, false}, {60, 0, false}},
		"little more is not worth it": {busy, {3, 0, true}, {1, 5, false}, {5, 0, false}, {60, 0, false}},
		"little by little it is":      {{1, 9, false}, {5, 0, false}, {1, 9, false}, {3, 0, true}},
	} {
		t.Run(name, func(t *testing.T) {
			var w watch
			now, allocated := time.Now(), uint64(0)
			w.due(now, allocated)
			for i, look := range looks {
				now = now.Add(time.Duration(look.seconds) * time.Second)
				allocated += uint64(look.allocated) << 20
				if due := w.due(now, allocated); due != look.due {
					t.Fatalf("look %d: %t", i, due)
				}
			}
		})
	}
}
