package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// clockTick is the unit of /proc/PID/stat times on Linux: USER_HZ is 100 on
// every architecture that Go runs on.
const clockTick = 10 * time.Millisecond

// server is a `cmdexec up` of our own, with its own data and context folders.
type server struct {
	cmd        *exec.Cmd
	dir        string
	url, token string
}

func start(ctx context.Context, bin string, slots int) (*server, error) {
	dir, err := os.MkdirTemp("", "cmdexec-load-")
	if err != nil {
		return nil, err
	}
	addr, err := freeAddr()
	if err != nil {
		return nil, err
	}
	s := &server{dir: dir, url: "http://" + addr}
	s.cmd = exec.CommandContext(ctx, filepath.Join(bin, "cmdexec"), "up", "--listen", addr,
		"--data-dir", filepath.Join(dir, "data"), "--executor", "process", "--slots", strconv.Itoa(slots))
	s.cmd.Env = append(os.Environ(), "XDG_CONFIG_HOME="+filepath.Join(dir, "config"))
	s.cmd.Stderr = os.Stderr
	s.cmd.Cancel = func() error { return s.cmd.Process.Signal(syscall.SIGTERM) }
	s.cmd.WaitDelay = 20 * time.Second
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	if err := s.ready(ctx); err != nil {
		s.stop()
		return nil, err
	}
	return s, nil
}

func freeAddr() (string, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer ln.Close()
	return ln.Addr().String(), nil
}

func (s *server) ready(ctx context.Context) error {
	deadline := time.Now().Add(30 * time.Second)
	for time.Now().Before(deadline) && ctx.Err() == nil {
		resp, err := http.Get(s.url + "/api/health")
		if err == nil {
			resp.Body.Close()
			if data, err := os.ReadFile(filepath.Join(s.dir, "config", "cmdexec", "context.json")); err == nil {
				var c struct{ Token string }
				if json.Unmarshal(data, &c) == nil && c.Token != "" {
					s.token = c.Token
					return nil
				}
			}
		}
		time.Sleep(20 * time.Millisecond)
	}
	return errors.New("cmdexec up did not become ready within 30 s")
}

func (s *server) stop() {
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	_ = s.cmd.Wait()
	_ = os.RemoveAll(s.dir)
}

type usage struct {
	cpu time.Duration // of the process and of all commands that it has waited for
	rss int64         // bytes
}

func (s *server) usage() (usage, error) {
	pid := strconv.Itoa(s.cmd.Process.Pid)
	stat, err := os.ReadFile("/proc/" + pid + "/stat")
	if err != nil {
		return usage{}, err
	}
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	var u usage
	for _, f := range fields[11:15] { // utime, stime, cutime, cstime
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return usage{}, err
		}
		u.cpu += time.Duration(n) * clockTick
	}
	pages, err := strconv.ParseInt(fields[21], 10, 64)
	u.rss = pages * int64(os.Getpagesize())
	return u, err
}

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
