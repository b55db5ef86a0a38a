// Command load measures the product as a user meets it: it starts `cmdexec up`
// as a separate process, sends jobs over HTTP, each of which executes a real
// `/bin/sh -c true`, and prints the figures beside what the machine itself can
// do in the same run. It is a benchmark, not a test: nothing fails by being slow.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"time"
)

func main() {
	jobs := flag.Int("jobs", 2000, "jobs of the throughput run")
	clients := flag.Int("clients", 16, "clients that submit at the same time")
	idle := flag.Int("idle", 50, "jobs of the latency run, one after the other")
	slots := flag.Int("slots", 16, "slots of the local worker")
	bin := flag.String("bin", os.Getenv("CMDEXEC_BIN_DIR"), "folder of the built binaries")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *bin, *slots, *jobs, *clients, *idle); err != nil {
		fmt.Fprintln(os.Stderr, "load:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, bin string, slots, jobs, clients, idle int) error {
	if bin == "" {
		bin = "../bin"
	}
	machine, err := readMachine()
	if err != nil {
		return err
	}
	fmt.Println(machine)
	forks, forkCPU, err := forkExecRate(ctx, jobs, clients)
	if err != nil {
		return err
	}
	srv, err := start(ctx, bin, slots)
	if err != nil {
		return err
	}
	defer srv.stop()

	c := newClient(srv.url, srv.token)
	warm := 50
	if _, err := c.throughput(ctx, warm, clients); err != nil {
		return fmt.Errorf("warm up: %w", err)
	}
	latency, err := c.oneByOne(ctx, idle)
	if err != nil {
		return fmt.Errorf("idle run: %w", err)
	}
	execute, err := c.executes(ctx, idle)
	if err != nil {
		return fmt.Errorf("execute run: %w", err)
	}
	before, err := srv.usage()
	if err != nil {
		return err
	}
	t, err := c.throughput(ctx, jobs, clients)
	if err != nil {
		return fmt.Errorf("throughput run: %w", err)
	}
	after, err := srv.usage()
	if err != nil {
		return err
	}

	row := func(name, format string, args ...any) {
		fmt.Printf("%-44s "+format+"\n", append([]any{name}, args...)...)
	}
	row("fork/exec of /bin/sh -c true", "%8.0f /s   %.2f CPU s per 1,000", forks, forkCPU)
	row(fmt.Sprintf("jobs submitted, %d from %d clients", jobs, clients), "%8.0f /s", t.submitted)
	row("jobs completed", "%8.0f /s   %.0f %% of fork/exec", t.completed, 100*t.completed/forks)
	row("submit while saturated, p50 / p99", "%8.2f / %.2f ms", ms(t.submit.at(50)), ms(t.submit.at(99)))
	row(fmt.Sprintf("idle, submit to done, %d jobs, p50 / p99", idle), "%8.2f / %.2f ms", ms(latency.at(50)), ms(latency.at(99)))
	row("idle, POST /api/execute, p50 / p99", "%8.2f / %.2f ms", ms(execute.at(50)), ms(execute.at(99)))
	row("CPU of server, worker and commands", "%8.2f s per 1,000 jobs", (after.cpu-before.cpu).Seconds()*1000/float64(jobs))
	row("resident memory before / after", "%8.1f / %.1f MB", mb(before.rss), mb(after.rss))
	return nil
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
func mb(bytes int64) float64     { return float64(bytes) / (1 << 20) }
