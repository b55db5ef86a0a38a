// Command load measures the product as a user meets it: it starts it as separate
// processes, sends jobs over HTTP, each of which executes a real `/bin/sh -c true`,
// and prints the figures beside what the machine itself can do in the same run. It
// is a benchmark, not a test: nothing fails by being slow.
package main

import (
	"context"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"
)

// plan is what is measured.
type plan struct {
	bin     string
	slots   int
	jobs    int
	clients int
	idle    int
	forms   []string

	fleet, busy int // workers of the row fleet, and how many of them have an attempt
	backlog     int // jobs of the row queue

	// Of single rows.
	output     outputLoad
	history    historyLoad
	containers containerLoad
	growth     growthLoad
	executor   string   // of the worker
	env        []string // of all processes, beside what each needs
	fill       func(ctx context.Context, database string) error
}

// warm is how many jobs go before what is measured.
const warm = 200

func main() {
	if len(os.Args) > 1 && os.Args[1] == fleetWord {
		if err := runFleet(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, "load: fleet:", err)
			os.Exit(1)
		}
		return
	}
	var p plan
	flag.IntVar(&p.jobs, "jobs", 2000, "jobs of the throughput run")
	flag.IntVar(&p.clients, "clients", 16, "clients that submit at the same time")
	flag.IntVar(&p.idle, "idle", 100, "jobs of each latency run, one after the other")
	flag.IntVar(&p.slots, "slots", 16, "slots of the worker")
	flag.StringVar(&p.bin, "bin", os.Getenv("CMDEXEC_BIN_DIR"), "folder of the built binaries")
	flag.IntVar(&p.fleet, "fleet", 10_000, "workers of the row fleet")
	flag.IntVar(&p.busy, "busy", 200, "of them that have a running attempt")
	flag.IntVar(&p.backlog, "backlog", 100_000, "jobs of the row queue that wait")
	forms := flag.String("forms", "up,split", "of the row jobs. up: all in one process; split: nats-server, each service and a worker, each its own process")
	chosen := flag.String("rows", "jobs", "what is measured: "+strings.Join(slices.Sorted(maps.Keys(rows())), ", "))
	p.output.flags()
	p.history.flags()
	p.containers.flags()
	p.growth.flags()
	load := flag.Bool("promises", false, "measure what the product promises, with 100 workers, and nothing else")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if p.bin == "" {
		p.bin = "../bin"
	}
	p.forms = strings.Split(*forms, ",")
	p.executor = "process"
	measured := func() error { return run(ctx, p, strings.Split(*chosen, ",")) }
	if *load {
		measured = func() error { return promises(ctx, p) }
	}
	if err := measured(); err != nil {
		fmt.Fprintln(os.Stderr, "load:", err)
		os.Exit(1)
	}
}

// rows are what `make bench` can measure. Each prints its own figures.
func rows() map[string]func(context.Context, plan) error {
	return map[string]func(context.Context, plan) error{
		"busy":       busy,
		"containers": containers,
		"fleet":      fleetOf,
		"followers":  followers,
		"growth":     growth,
		"history":    history,
		"jobs":       jobs,
		"output":     output,
		"queue":      queueOf,
	}
}

func run(ctx context.Context, p plan, chosen []string) error {
	known := rows()
	for _, name := range chosen {
		if known[name] == nil {
			return fmt.Errorf("there is no row %q", name)
		}
	}
	machine, err := readMachine()
	if err != nil {
		return err
	}
	fmt.Println(machine)
	for _, name := range chosen {
		if err := known[name](ctx, p); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

// jobs measures throughput and latency of jobs that do nothing.
func jobs(ctx context.Context, p plan) error {
	forks, forkCPU, err := forkExecRate(ctx, p.jobs, p.clients)
	if err != nil {
		return err
	}
	synced, err := syncedWrites(500)
	if err != nil {
		return err
	}
	row("fork/exec of /bin/sh -c true", "%8.0f /s   %.2f CPU s per 1,000", forks, forkCPU)
	row("a synced write of 1.5 KB, p50 / p99", "%8.2f / %.2f ms", ms(synced.at(50)), ms(synced.at(99)))
	for _, form := range p.forms {
		start, err := starter(form)
		if err != nil {
			return err
		}
		if err := measure(ctx, p, form, start, forks); err != nil {
			return fmt.Errorf("%s: %w", form, err)
		}
	}
	return nil
}

// starter starts a form of the product.
func starter(form string) (func(context.Context, plan) (*deployment, error), error) {
	switch form {
	case "up":
		return startUp, nil
	case "split":
		return startSplit, nil
	}
	return nil, fmt.Errorf("there is no form %q: up or split", form)
}

func measure(ctx context.Context, p plan, form string, start func(context.Context, plan) (*deployment, error), forks float64) error {
	d, err := start(ctx, p)
	if err != nil {
		return err
	}
	defer d.stop()
	fresh, err := d.usage()
	if err != nil {
		return err
	}
	c := newClient(d.url, d.token)
	if _, err := c.throughput(ctx, warm, p.clients); err != nil {
		return fmt.Errorf("warm up: %w", err)
	}
	submit, done, err := c.oneByOne(ctx, p.idle)
	if err != nil {
		return fmt.Errorf("idle run: %w", err)
	}
	execute, err := c.executes(ctx, p.idle)
	if err != nil {
		return fmt.Errorf("execute run: %w", err)
	}
	before, err := d.usage()
	if err != nil {
		return err
	}
	t, err := c.throughput(ctx, p.jobs, p.clients)
	if err != nil {
		return fmt.Errorf("throughput run: %w", err)
	}
	after, err := d.usage()
	if err != nil {
		return err
	}
	fmt.Printf("\n%s: %s\n", form, d.what)
	row(fmt.Sprintf("jobs completed, %d from %d clients", p.jobs, p.clients), "%8.0f /s   %.0f %% of fork/exec", t.completed, 100*t.completed/forks)
	row("CPU of all processes and commands", "%8.2f s per 1,000 jobs", (after.cpu-before.cpu).Seconds()*1000/float64(p.jobs))
	row("submit while saturated, p50 / p99", "%8.2f / %.2f ms", ms(t.submit.at(50)), ms(t.submit.at(99)))
	row("submit, idle, p50 / p99", "%8.2f / %.2f ms", ms(submit.at(50)), ms(submit.at(99)))
	row("idle, submit to done, p50 / p99", "%8.2f / %.2f ms", ms(done.at(50)), ms(done.at(99)))
	row("idle, POST /api/execute, p50 / p99", "%8.2f / %.2f ms", ms(execute.at(50)), ms(execute.at(99)))
	row("resident memory: fresh / before / after the jobs", "%8.1f / %.1f / %.1f MB", mb(fresh.rss), mb(before.rss), mb(after.rss))
	return nil
}

func row(name, format string, args ...any) {
	fmt.Printf("%-50s "+format+"\n", append([]any{name}, args...)...)
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
func mb(bytes int64) float64     { return float64(bytes) / (1 << 20) }
