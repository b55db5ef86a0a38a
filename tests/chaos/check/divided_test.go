package check

import (
	"strings"
	"testing"

	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/tests/chaos/history"
)

// A NATS server that is cut off from the others may tell what it knew before, as
// long as it is; nobody may do so before or after.
func TestOldReadsOfADividedCluster(t *testing.T) {
	for _, c := range []struct {
		name      string
		from, to  int64 // of the division, seconds; 0 for none
		tolerated bool
	}{
		{"while it is divided", 19, 40, true},
		{"after it", 9, 12, false},
		{"divided after the end was seen", 23, 40, false},
		{"never divided", 0, 0, false},
	} {
		h := good()
		if c.to != 0 {
			h = append(h,
				history.Event{At: c.from * second, Fault: &history.Fault{Name: "leader-partitioned", Row: "11", Phase: history.Inject}},
				history.Event{At: c.from * second, Fault: &history.Fault{Name: "leader-partitioned", Row: "11", Phase: history.Divided}},
				history.Event{At: c.to * second, Fault: &history.Fault{Name: "leader-partitioned", Row: "11", Phase: history.Heal}})
		}
		// It was seen succeeded at 20 s.
		h = append(h, history.Event{At: 25 * second, Observe: &history.Observe{
			JobID: "a", Begin: 24 * second, From: "get", Status: job.Running, Version: 8, Attempt: 2,
		}})
		broken := ""
		for _, v := range Check(h).Violations {
			broken += v.String() + "; "
		}
		if c.tolerated && broken != "" || !c.tolerated && !strings.Contains(broken, I2Result) {
			t.Errorf("%s: %q", c.name, broken)
		}
	}
}

// A caller of execute who goes away cancels what it waited for.
func TestAbandonedExecuteIsACancel(t *testing.T) {
	for _, target := range []string{"execute", "create"} {
		h := without(good(), func(e history.Event) bool { return e.Cancel != nil })
		h = append(h, history.Event{At: 2 * second, Submit: &history.Submit{Key: "kb", Target: target, Err: "the answer did not come"}})
		// The try that was answered came later.
		h = append(without(h, func(e history.Event) bool { return e.Submit != nil && e.Submit.JobID == "b" }),
			history.Event{At: 3 * second, Submit: &history.Submit{Key: "kb", Plan: history.Plan{Kind: "execute", MaxAttempts: 1}, Target: target, Code: 200, JobID: "b"}})
		if broken := Check(h).Violations; (len(broken) == 0) != (target == "execute") {
			t.Errorf("%s: %v", target, broken)
		}
	}
}
