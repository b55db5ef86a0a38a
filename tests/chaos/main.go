// Command chaos starts the product as separate processes, submits jobs of mixed
// kinds, injects faults drawn by a seed, heals them, waits for quiet, and has the
// whole history judged. docs/reliability.md says what is promised and how to read
// the figures. It exits 0 when every promise held.
//
// The seed decides the mix of jobs, the order of the faults, their victims and their
// times. It does not decide how the processes interleave: that is the machine's.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/cmdexec/cmdexec/tests/chaos/check"
	"github.com/cmdexec/cmdexec/tests/chaos/history"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := program(ctx, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "chaos:", err)
		os.Exit(1)
	}
}

func program(ctx context.Context, args []string, out io.Writer) error {
	o := options{Log: out}
	flags := flag.NewFlagSet("chaos", flag.ContinueOnError)
	flags.StringVar(&o.Suite, "suite", suiteOne, "one (NATS server), cluster (of three), disk (a file system of its own; root), docker (jobs in containers; root), soak (no fault: does anything grow?)")
	flags.Uint64Var(&o.Seed, "seed", 1, "decides jobs, faults, victims and times")
	flags.DurationVar(&o.Duration, "duration", 0, "repeat the faults for so long; 0 for each once")
	flags.Float64Var(&o.Rate, "rate", 4, "jobs a second")
	flags.IntVar(&o.Jobs, "jobs", 1_000_000, "most jobs of the mix")
	flags.IntVar(&o.Storm, "storm", stormWorkers, "idle workers of the fault storm")
	flags.StringVar(&o.BinDir, "bin", "bin", "folder of the programs under test")
	flags.StringVar(&o.Dir, "dir", "", "folder of the run; default a new one in the temporary folder")
	flags.BoolVar(&o.Keep, "keep", false, "keep the folder of a good run too")
	names := flags.String("faults", "", "only these, with commas")
	list := flags.Bool("list", false, "list the faults")
	again := flags.String("check", "", "only judge this history again")
	if err := flags.Parse(args); err != nil {
		return err
	}
	switch {
	case *list:
		for _, e := range catalogue() {
			fmt.Fprintf(out, "%-20s row %-5s suite %s\n", e.name, e.row, e.suite)
		}
		return nil
	case *again != "":
		f, err := os.Open(*again)
		if err != nil {
			return err
		}
		defer f.Close()
		events, err := history.Read(f)
		if err != nil {
			return err
		}
		return report(out, check.Check(events))
	}
	if *names != "" {
		o.Faults = strings.Split(*names, ",")
	}
	return whole(ctx, o)
}

// whole is a run with its folder and its report.
func whole(ctx context.Context, o options) error {
	var err error
	if o.BinDir, err = filepath.Abs(o.BinDir); err != nil {
		return err
	}
	if o.Dir == "" {
		if o.Dir, err = os.MkdirTemp("", "cmdexec-chaos-"); err != nil {
			return err
		}
	} else if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return err
	}
	if o.Dir, err = filepath.Abs(o.Dir); err != nil {
		return err
	}
	fmt.Fprintf(o.Log, "seed %d, in %s\n", o.Seed, o.Dir)
	verdict, err := run(ctx, o)
	if err == nil {
		err = report(o.Log, verdict)
	}
	if err != nil {
		return fmt.Errorf("%w\nhistory and logs are in %s; the same seed again: %s; the same history again: chaos -check %s",
			err, o.Dir, o.command(), filepath.Join(o.Dir, "history.jsonl"))
	}
	if o.Keep {
		return nil
	}
	return os.RemoveAll(o.Dir)
}

// errBroken is the end of a run in which a promise did not hold.
var errBroken = errors.New("a promise was broken")

func report(out io.Writer, v check.Verdict) error {
	f := v.Figures
	fmt.Fprintf(out, "\nseed %d: %d jobs acknowledged, %d lost, %d ended twice, %d stale reports accepted; %d tries got no answer\n",
		f.Seed, f.Acked, f.Lost, f.DoubleEnd, f.StaleTaken, f.Unanswered)
	fmt.Fprintf(out, "%d starts, %d of them again after a worker or its lease was lost; overlap %.2fs, frozen %.2fs\n",
		f.Starts, f.ExtraStarts, f.Overlap.Seconds(), f.FrozenOverlap.Seconds())
	fmt.Fprintf(out, "output: %d undeclared gaps, %d declared incomplete; left behind: %d; database and registry differ in %d; quiet after %.1fs\n",
		f.UndeclaredGaps, f.Incomplete, f.Left, f.Differences, f.Drain.Seconds())
	for _, x := range f.Faults {
		fmt.Fprintf(out, "  %-20s row %-5s %3d times, a new job had run after p50 %5.2fs p99 %5.2fs",
			x.Name, x.Row, x.Times, check.Percentile(x.Recovery, 50).Seconds(), check.Percentile(x.Recovery, 99).Seconds())
		if n := len(x.Restarts); n > 0 {
			fmt.Fprintf(out, "; %d jobs started again after p50 %5.2fs p99 %5.2fs",
				n, check.Percentile(x.Restarts, 50).Seconds(), check.Percentile(x.Restarts, 99).Seconds())
		}
		fmt.Fprintln(out)
	}
	for _, x := range f.Flat {
		fmt.Fprintf(out, "  %-26s %-10s %11d in the second quarter %11d in the last\n", x.Service, x.What, x.Early, x.Late)
	}
	ends, err := json.Marshal(f.Ends)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "ends: %s\n", ends)
	const most = 30
	for i, x := range v.Violations {
		if i == most {
			fmt.Fprintf(out, "... and %d more\n", len(v.Violations)-most)
			break
		}
		fmt.Fprintln(out, x)
	}
	if n := len(v.Violations); n > 0 {
		return fmt.Errorf("%w (%d)", errBroken, n)
	}
	return nil
}

// jobID reads the id from an answer to create.
func jobID(body []byte) string {
	var j struct {
		JobID string `json:"jobId"`
	}
	_ = json.Unmarshal(body, &j) // "" is found by the checker
	return j.JobID
}
