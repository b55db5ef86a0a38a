package failpoint

import (
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

func TestParse(t *testing.T) {
	p, err := parse("gateway.afterCreate:kill@3, edge.logged:sleep=500ms%2.5,worker.ended:kill=20ms,persister.stored:panic")
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[Name]*point{
		GatewayAfterCreate: {do: "kill", nth: 3, percent: 100},
		EdgeLogged:         {do: "sleep", wait: 500 * time.Millisecond, percent: 2.5},
		WorkerEnded:        {do: "kill", wait: 20 * time.Millisecond, percent: 100},
		PersisterStored:    {do: "panic", percent: 100},
	} {
		have := p[name]
		if have == nil || have.do != want.do || have.wait != want.wait || have.nth != want.nth || have.percent != want.percent {
			t.Errorf("%s: %+v", name, have)
		}
	}
	if len(p) != 4 {
		t.Errorf("%d points", len(p))
	}
	if p, err := parse(""); err != nil || len(p) != 0 {
		t.Errorf("nothing gives %v, %v", p, err)
	}
	for _, bad := range []string{
		"gateway.afterCreate", "gateway.afterCreate:", "gateway.afterCreate:kil", "gateway.afterCreate:kill@0", "gateway.afterCreate:kill@x",
		"gateway.afterCreate:kill%0", "gateway.afterCreate:kill%101", "gateway.afterCreate:kill%NaN", "gateway.afterCreate:sleep",
		"gateway.afterCreate:sleep=-1s", "gateway.afterCreate:panic=1s", "gateway.afterCreate:kill,gateway.afterCreate:kill", ":kill",
	} {
		if _, err := parse(bad); err == nil || !strings.HasPrefix(err.Error(), "FAILPOINT: ") {
			t.Errorf("%q gives the error %v", bad, err)
		}
	}
}

// Whoever mistypes a name is told all of them.
func TestUnknownName(t *testing.T) {
	_, err := parse("gateway.aftercreate:kill")
	if err == nil {
		t.Fatal("a name that does not exist is accepted")
	}
	for _, n := range Names() {
		if !strings.Contains(err.Error(), string(n)) {
			t.Errorf("the error %q does not name %s", err, n)
		}
	}
}

func TestDue(t *testing.T) {
	third := &point{nth: 3, percent: 100}
	for n := 1; n <= 5; n++ {
		if third.due() != (n == 3) {
			t.Errorf("passing %d of @3", n)
		}
	}
	sometimes, times := &point{percent: 20}, 0
	for range 10_000 {
		if sometimes.due() {
			times++
		}
	}
	if times < 1_500 || times > 2_500 {
		t.Errorf("%d of 10,000 at 20 percent", times)
	}
}

func TestSleepAndPanic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, err := parse("edge.logged:sleep=3s@2,worker.ended:panic")
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		p.at(GatewayAfterCreate)
		p.at(EdgeLogged)
		if took := time.Since(began); took != 0 {
			t.Errorf("%v where nothing was to happen", took)
		}
		p.at(EdgeLogged)
		if took := time.Since(began); took != 3*time.Second {
			t.Errorf("slept for %v", took)
		}
		defer func() {
			if recover() == nil {
				t.Error("no panic")
			}
		}()
		p.at(WorkerEnded)
	})
}

// TestKill has a process of its own kill itself: at the moment, or later and not
// before what it does next.
func TestKill(t *testing.T) {
	const variable = "TEST_KILL_PLAN"
	for _, e := range os.Environ() {
		value, ok := strings.CutPrefix(e, variable+"=")
		if !ok {
			continue
		}
		p, err := parse(value)
		if err != nil {
			t.Fatal(err)
		}
		p.at(WorkerStarted)
		p.at(WorkerStarted)
		os.Stdout.WriteString("went on\n")
		<-t.Context().Done() // until it is killed
	}
	for value, wentOn := range map[string]bool{"worker.started:kill@2": false, "worker.started:kill=50ms@2": true} {
		cmd := exec.Command(os.Args[0], "-test.run=^TestKill$", "-test.timeout=60s")
		cmd.Env = append(os.Environ(), variable+"="+value)
		out, err := cmd.Output()
		status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus)
		if err == nil || !ok || !status.Signaled() || status.Signal() != syscall.SIGKILL {
			t.Errorf("%s: the process ended by %v: %s", value, cmd.ProcessState, out)
		}
		if strings.Contains(string(out), "went on") != wentOn {
			t.Errorf("%s: it wrote %q", value, out)
		}
	}
}
