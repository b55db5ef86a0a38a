package config

import (
	"os"
	"runtime"
	"runtime/debug"
	"testing"
)

// unset takes a variable away for a test.
func unset(t *testing.T, name string) {
	t.Setenv(name, "") // has it put back
	if err := os.Unsetenv(name); err != nil {
		t.Fatal(err)
	}
}

func TestUseCores(t *testing.T) {
	before := runtime.GOMAXPROCS(0)
	defer runtime.GOMAXPROCS(before)
	cores := runtime.NumCPU()
	half := max(1, cores/2)

	runtime.GOMAXPROCS(cores)
	UseCores(0)
	if n := runtime.GOMAXPROCS(0); n != half {
		t.Errorf("on %d cores: %d, want %d", cores, n, half)
	}
	runtime.GOMAXPROCS(cores + 1) // as a container's limit would have it be another number
	UseCores(0)
	if n := runtime.GOMAXPROCS(0); n != cores+1 {
		t.Errorf("what a limit says is made %d", n)
	}
	UseCores(3)
	if n := runtime.GOMAXPROCS(0); n != 3 {
		t.Errorf("%d, want the 3 that are asked for", n)
	}
}

func TestCollectAt(t *testing.T) {
	before := debug.SetGCPercent(100)
	defer debug.SetGCPercent(before)

	unset(t, "GOGC")
	CollectAt(25)
	if got := debug.SetGCPercent(100); got != 25 {
		t.Errorf("%d %%, want 25", got)
	}
	t.Setenv("GOGC", "100")
	CollectAt(25)
	if got := debug.SetGCPercent(100); got != 100 {
		t.Errorf("GOGC=100 is made %d %%", got)
	}
}
