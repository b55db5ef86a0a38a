package failpoint

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// Only armed.go refers to what is here, so that the linker leaves it out of
// programs without the tag.

// plan says what happens where.
type plan map[Name]*point

// point is what happens at one moment. It is safe for concurrent use.
type point struct {
	do      string        // kill, sleep or panic
	wait    time.Duration // of sleep, and before kill
	nth     int64         // only then; 0 each time
	percent float64       // how often; 100 always
	passed  atomic.Int64
}

// parse reads the value of FAILPOINT; nothing is an empty plan.
func parse(value string) (plan, error) {
	p := plan{}
	for entry := range strings.SplitSeq(value, ",") {
		if entry = strings.TrimSpace(entry); entry == "" {
			continue
		}
		name, rest, ok := strings.Cut(entry, ":")
		switch {
		case !slices.Contains(Names(), Name(name)):
			return nil, fmt.Errorf("FAILPOINT: there is no failpoint %q; there are %s", name, list())
		case !ok:
			return nil, fmt.Errorf("FAILPOINT: %s has no action, such as %s:kill", name, name)
		case p[Name(name)] != nil:
			return nil, fmt.Errorf("FAILPOINT: %s is there twice", name)
		}
		x, err := parsePoint(rest)
		if err != nil {
			return nil, fmt.Errorf("FAILPOINT: %s: %w", name, err)
		}
		p[Name(name)] = x
	}
	return p, nil
}

func list() string {
	var names []string
	for _, n := range Names() {
		names = append(names, string(n))
	}
	return strings.Join(names, ", ")
}

// parsePoint reads an action and when it happens.
func parsePoint(text string) (*point, error) {
	x := &point{percent: 100}
	var err error
	if action, when, ok := strings.Cut(text, "@"); ok {
		if x.nth, err = strconv.ParseInt(when, 10, 64); err != nil || x.nth < 1 {
			return nil, fmt.Errorf("@%s must be a number from 1", when)
		}
		text = action
	} else if action, when, ok := strings.Cut(text, "%"); ok {
		if x.percent, err = strconv.ParseFloat(when, 64); err != nil || !(x.percent > 0 && x.percent <= 100) {
			return nil, fmt.Errorf("%%%s must be a probability in percent", when)
		}
		text = action
	}
	do, wait, hasWait := strings.Cut(text, "=")
	if hasWait {
		if x.wait, err = time.ParseDuration(wait); err != nil || x.wait <= 0 {
			return nil, fmt.Errorf("%q must be a time such as 500ms", wait)
		}
	}
	switch {
	case do == "kill", do == "panic" && !hasWait, do == "sleep" && hasWait:
		x.do = do
		return x, nil
	}
	return nil, fmt.Errorf("%q is none of kill, kill=20ms, sleep=500ms, panic", text)
}

// at does what the plan says for a moment.
func (p plan) at(n Name) {
	x := p[n]
	if x == nil || !x.due() {
		return
	}
	fmt.Fprintf(os.Stderr, "failpoint %s: %s\n", n, x.do)
	switch {
	case x.do == "sleep":
		time.Sleep(x.wait)
	case x.do == "panic":
		panic("failpoint " + string(n))
	case x.wait > 0:
		time.AfterFunc(x.wait, killSelf)
	default:
		killSelf()
	}
}

// due counts a passing and reports whether it is one at which something happens.
func (x *point) due() bool {
	n := x.passed.Add(1)
	return (x.nth == 0 || n == x.nth) && (x.percent >= 100 || rand.Float64()*100 < x.percent)
}

// killSelf ends the process as kill -9 does, and never returns: nothing may
// happen after the moment.
func killSelf() {
	self, err := os.FindProcess(os.Getpid())
	if err == nil {
		err = self.Kill()
	}
	if err != nil {
		panic(fmt.Errorf("failpoint: kill this process: %w", err))
	}
	select {}
}
