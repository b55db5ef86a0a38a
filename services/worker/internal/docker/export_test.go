package docker

import "testing"

// MeasureLog is what the log of a container is assumed to take.
func MeasureLog(t *testing.T, x *Executor, id string) int64 {
	t.Helper()
	if err := x.Probe(t.Context()); err != nil {
		t.Fatal(err)
	}
	m, err := (&attempt{x: x, id: id}).measure()
	if err != nil {
		t.Fatal(err)
	}
	return m.atMost()
}
