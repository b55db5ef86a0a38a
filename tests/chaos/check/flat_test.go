package check

import (
	"strings"
	"testing"

	"github.com/cmdexec/cmdexec/tests/chaos/history"
)

func TestFlat(t *testing.T) {
	soak := func(what string, value func(i int64) int64, n int64) []history.Event {
		events := good()
		for i := range n {
			events = append(events, history.Event{Sample: &history.Sample{Service: "scheduler", What: what, Value: value(i)}})
		}
		return events
	}
	warming := func(i int64) int64 { return 50<<20 + min(i, 25)<<20 } // and then level
	for name, row := range map[string]struct {
		events []history.Event
		grew   bool
	}{
		"memory that levels off":    {soak("rss", warming, 100), false},
		"memory that grows":         {soak("rss", func(i int64) int64 { return 50<<20 + i<<19 }, 100), true},
		"files that leak":           {soak("fds", func(i int64) int64 { return 20 + i }, 100), true},
		"goroutines that vary":      {soak("goroutines", func(i int64) int64 { return 100 + i*7%10 }, 100), false},
		"too short to say anything": {soak("fds", func(i int64) int64 { return 20 + 10*i }, 20), false},
	} {
		t.Run(name, func(t *testing.T) {
			v := Check(row.events)
			grew := false
			for _, x := range v.Violations {
				grew = grew || strings.Contains(x.String(), "grew")
			}
			if grew != row.grew {
				t.Error(v.Violations, v.Figures.Flat)
			}
		})
	}
}
