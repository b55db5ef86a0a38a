package main

import (
	"context"
	"flag"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"testing"
	"time"

	"go.uber.org/goleak"
)

var (
	seedFlag = flag.Uint64("seed", 20261124, "of the runs")
	rateFlag = flag.Float64("rate", 2.5, "jobs a second of each run")
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestChaos injects every fault of the catalogue once, in an order drawn by the
// seed, and demands that every promise held. Runs of one server share the faults,
// so that two of them can go on at once.
func TestChaos(t *testing.T) {
	dir := os.Getenv("CMDEXEC_BIN_DIR")
	if dir == "" {
		dir = "../../bin"
	}
	for _, name := range []string{"nats-server", "chaosjob", "chaosrunc", "chaosworkers", "scheduler", "worker"} {
		if _, err := os.Stat(dir + "/" + name); err != nil {
			t.Fatalf("%s/%s is not built: run the tests by `make test`", dir, name)
		}
	}
	all, err := byName(suiteOne, nil)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range all {
		names = append(names, e.name)
	}
	rng := rand.New(rand.NewPCG(*seedFlag, 0))
	rng.Shuffle(len(names), func(i, k int) { names[i], names[k] = names[k], names[i] })
	half := len(names) / 2
	// Containers first, and alone: an engine takes all that two cores have.
	for _, run := range []struct {
		name  string
		o     options
		alone bool
	}{
		{"containers", options{Suite: suiteDocker, Seed: *seedFlag + 4}, true},
		{"one server, first half", options{Suite: suiteOne, Seed: *seedFlag, Faults: names[:half]}, false},
		{"one server, second half", options{Suite: suiteOne, Seed: *seedFlag + 1, Faults: names[half:]}, false},
		{"three servers", options{Suite: suiteCluster, Seed: *seedFlag + 2}, false},
		{"a disk of its own", options{Suite: suiteDisk, Seed: *seedFlag + 3}, false},
	} {
		o := run.o
		t.Run(run.name, func(t *testing.T) {
			if !run.alone {
				t.Parallel()
			}
			if o.Suite == suiteDisk && os.Geteuid() != 0 {
				t.Skip("requires root: a file system is mounted, filled, and cut off")
			}
			if o.Suite == suiteDocker {
				if _, err := exec.LookPath("dockerd"); err != nil || os.Geteuid() != 0 {
					t.Skip("requires docker: no dockerd that could be started here (it needs root)")
				}
			}
			ctx, cancel := context.WithTimeout(t.Context(), 9*time.Minute)
			defer cancel()
			o.BinDir, o.Rate, o.Jobs, o.Log = dir, *rateFlag, 600, t.Output()
			if o.Suite == suiteDocker {
				o.Rate = *rateFlag / 3 // a container costs more than a process
			}
			if err := whole(ctx, o); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestCatalogue: names are told apart, and every fault has its row and its suite.
func TestCatalogue(t *testing.T) {
	seen := map[string]bool{}
	for _, e := range catalogue() {
		if seen[e.name] || e.row == "" || e.make() == nil || !slices.Contains([]string{suiteOne, suiteCluster, suiteDisk, suiteDocker, suiteSoak}, e.suite) {
			t.Errorf("the entry %+v", e)
		}
		seen[e.name] = true
	}
	if _, err := byName(suiteOne, []string{"no-such-fault"}); err == nil {
		t.Error("a fault that does not exist is found")
	}
}
