package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

// forkExecRate is the yardstick: how many `/bin/sh -c true` this machine starts
// and waits for in a second, and the CPU seconds of 1,000 of them.
func forkExecRate(ctx context.Context, n, parallel int) (perSecond, cpuPerThousand float64, err error) {
	errs := make([]error, parallel)
	before, err := childTimes()
	if err != nil {
		return 0, 0, err
	}
	var wg sync.WaitGroup
	began := time.Now()
	for p := range parallel {
		wg.Go(func() {
			for i := p; i < n; i += parallel {
				if err := exec.CommandContext(ctx, "/bin/sh", "-c", "true").Run(); err != nil {
					errs[p] = err
					return
				}
			}
		})
	}
	wg.Wait()
	took := time.Since(began)
	after, err := childTimes()
	return float64(n) / took.Seconds(), (after - before).Seconds() * 1000 / float64(n), errors.Join(append(errs, err)...)
}

func childTimes() (time.Duration, error) {
	var sum time.Duration
	for _, who := range []int{syscall.RUSAGE_SELF, syscall.RUSAGE_CHILDREN} {
		var r syscall.Rusage
		if err := syscall.Getrusage(who, &r); err != nil {
			return 0, err
		}
		sum += time.Duration(r.Utime.Nano() + r.Stime.Nano())
	}
	return sum, nil
}

// syncedWrites appends about a record to a file and syncs it, again and again: no
// durable write of the product can be quicker.
func syncedWrites(n int) (took samples, err error) {
	f, err := os.CreateTemp("", "cmdexec-load-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close(), os.Remove(f.Name())) }()
	record := make([]byte, 1500)
	for range n {
		at := time.Now()
		if _, err := f.Write(record); err != nil {
			return nil, err
		}
		if err := f.Sync(); err != nil {
			return nil, err
		}
		took = append(took, time.Since(at))
	}
	return took, nil
}

func readMachine() (string, error) {
	model := "unknown processor"
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return "", err
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if name, value, ok := strings.Cut(lines.Text(), ":"); ok && strings.TrimSpace(name) == "model name" {
			model = strings.TrimSpace(value)
			break
		}
	}
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%d cores, %s, %s, load before %s", runtime.NumCPU(), model, runtime.Version(),
		strings.Join(strings.Fields(string(load))[:3], " ")), nil
}
