package main

import (
	"math/rand/v2"
	"strconv"

	"github.com/cmdexec/cmdexec/tests/chaos/history"
	"github.com/cmdexec/cmdexec/tests/chaos/rig"
)

// kinds are the jobs of the mix with their weights.
var kinds = []struct {
	name   string
	weight int
}{
	{"quick", 30},
	{"slow", 18},
	{"printing", 12},
	{"failing", 8},
	{"flaky", 8},
	{"fragile", 6},
	{"canceled", 8},
	{"execute", 5},
	{"deaf", 2},
	{"escaping", 2},
	{"endless", 2},
}

// mixed makes a job of a kind drawn by weight.
func (l *load) mixed(rng *rand.Rand) (history.Plan, map[string]any) {
	total := 0
	for _, k := range kinds {
		total += k.weight
	}
	n := rng.IntN(total)
	kind := ""
	for _, k := range kinds {
		if n < k.weight {
			kind = k.name
			break
		}
		n -= k.weight
	}
	p := history.Plan{Kind: kind, MaxAttempts: 1}
	run := func(least, most int) []string {
		return []string{"-run", strconv.Itoa(least+rng.IntN(most-least)) + "ms"}
	}
	var args []string
	extra := map[string]any{}
	switch kind {
	case "quick", "execute":
		args = run(5, 150)
	case "slow":
		args = run(1000, 4000)
	case "printing":
		p.Lines = 5 + rng.IntN(40)
		args = append(run(100, 2000), "-lines", strconv.Itoa(p.Lines))
	case "failing":
		p.MaxAttempts, p.Code, p.Until = 2, 3, 1000
		args = run(5, 200)
	case "flaky":
		p.MaxAttempts, p.Code, p.Until = 3, 4, 1
		args = run(5, 200)
	case "fragile":
		p.LostFails = true
		args = run(500, 3000)
	case "canceled":
		args = run(100, 5000)
	case "deaf":
		args = append(run(20_000, 30_000), "-deaf")
	case "escaping":
		args = append(run(50, 500), "-escape")
	case "endless":
		p.TimesOut = true
		extra["timeout"] = 1
		args = run(60_000, 60_001)
	}
	if p.Code != 0 {
		args = append(args, "-code", strconv.Itoa(p.Code), "-until", strconv.Itoa(p.Until))
	}
	spec := l.spec(p, args...)
	for k, v := range extra {
		spec[k] = v
	}
	return p, spec
}

// spec is a job that runs chaosjob.
func (l *load) spec(p history.Plan, args ...string) map[string]any {
	program, dir := l.rig.Binary("chaosjob"), l.rig.JournalDir()
	if l.rig.Engine != nil {
		program, dir = "/chaosjob", l.rig.Engine.Mount
	}
	spec := map[string]any{
		"name": p.Kind, "command": append([]string{program, "-dir", dir}, args...),
		"resources": map[string]any{"cpu": 0.05, "memoryMb": 32},
		"retry":     map[string]any{"maxAttempts": p.MaxAttempts, "backoffSeconds": 0},
		"stop":      map[string]any{"graceSeconds": rig.GraceSeconds},
	}
	if l.rig.Engine != nil {
		// Starting a container is part of its own share.
		spec["containerImage"], spec["resources"] = l.rig.Engine.Image, map[string]any{"cpu": 0.25, "memoryMb": 32}
	}
	if p.LostFails {
		spec["onWorkerLost"] = "fail"
	}
	return spec
}
