package main

import (
	"testing"

	"github.com/cmdexec/cmdexec/libs/kit/failpoint"
)

// TestEveryFailpointIsInjected: a point that no fault arms proves nothing.
func TestEveryFailpointIsInjected(t *testing.T) {
	armed := map[failpoint.Name]bool{}
	for _, e := range pointFaults() {
		for _, p := range e.make().(points) {
			armed[p.name] = true
		}
	}
	for _, n := range failpoint.Names() {
		if !armed[n] {
			t.Errorf("no fault kills a program at %s", n)
		}
	}
	if len(armed) != len(failpoint.Names()) {
		t.Errorf("faults arm %v", armed)
	}
}
