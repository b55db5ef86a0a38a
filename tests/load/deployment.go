package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
)

// deployment is a running product of our own, with its own folder.
type deployment struct {
	what       string
	dir        string
	url, token string
	procs      []*exec.Cmd // in the order of their start

	// Of separate services only.
	edge string   // address
	env  []string // that they share
}

const readyWithin = 30 * time.Second

// add starts a program of the deployment.
func (d *deployment) add(ctx context.Context, env []string, program string, args ...string) error {
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = append(os.Environ(), env...)
	log, err := os.Create(filepath.Join(d.dir, fmt.Sprintf("%s-%d.log", filepath.Base(program), len(d.procs))))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 20 * time.Second
	if err := cmd.Start(); err != nil {
		return err
	}
	d.procs = append(d.procs, cmd)
	return nil
}

// process is the newest process of a program.
func (d *deployment) process(program string) (*exec.Cmd, error) {
	for _, cmd := range slices.Backward(d.procs) {
		if filepath.Base(cmd.Path) == program {
			return cmd, nil
		}
	}
	return nil, fmt.Errorf("there is no %s", program)
}

func (d *deployment) stop() {
	for _, cmd := range slices.Backward(d.procs) {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
	}
	_ = os.RemoveAll(d.dir)
}

// startUp starts `cmdexec up`.
func startUp(ctx context.Context, p plan) (*deployment, error) {
	return start("cmdexec up, one process", func(d *deployment) error {
		addr, err := freeAddr()
		if err != nil {
			return err
		}
		d.url = "http://" + addr
		err = d.add(ctx, append([]string{"XDG_CONFIG_HOME=" + filepath.Join(d.dir, "config")}, p.env...), filepath.Join(p.bin, "cmdexec"), "up", "--listen", addr,
			"--data-dir", filepath.Join(d.dir, "data"), "--executor", p.executor, "--slots", strconv.Itoa(p.slots))
		if err != nil {
			return err
		}
		return d.await(ctx, "cmdexec up", func() error {
			data, err := os.ReadFile(filepath.Join(d.dir, "config", "cmdexec", "context.json"))
			if err != nil {
				return err
			}
			var c struct{ Token string }
			if err := json.Unmarshal(data, &c); err != nil {
				return err
			}
			d.token = c.Token
			return d.hasWorkers(ctx, 1)
		})
	})
}

const natsConfig = `listen: %q
http: %q
jetstream { store_dir: %q, sync_interval: always }
max_payload: 2MB
`

const userSecret, workerSecret = "load-user-tokens-7a1f3c9e5b2d4680", "load-worker-tokens-2e8b6d0f4a9c7135"

// startSplit starts nats-server, one process of each service, and a worker.
func startSplit(ctx context.Context, p plan) (*deployment, error) {
	d, err := startServices(ctx, p)
	if err != nil {
		return nil, err
	}
	d.what += ", and a worker"
	err = d.addWorker(ctx, p, "worker", "SLOTS="+strconv.Itoa(p.slots))
	if err == nil {
		err = d.await(ctx, "a worker", func() error { return d.hasWorkers(ctx, 1) })
	}
	if err != nil {
		d.stop()
		return nil, err
	}
	return d, nil
}

// addWorker starts a worker with a folder of its own.
func (d *deployment) addWorker(ctx context.Context, p plan, name string, env ...string) error {
	own := append(slices.Clone(d.env), "SERVER_URL=http://"+d.edge, "DATA_DIR="+filepath.Join(d.dir, name), "EXECUTORS="+p.executor)
	return d.add(ctx, append(own, env...), filepath.Join(p.bin, "worker"))
}

// startServices starts everything but workers.
func startServices(ctx context.Context, p plan) (*deployment, error) {
	return start("nats-server and five services, each its own process, over SQLite", func(d *deployment) error {
		var addrs [4]string // of nats-server and its monitor, gateway and edge
		for i := range addrs {
			var err error
			if addrs[i], err = freeAddr(); err != nil {
				return err
			}
		}
		config := filepath.Join(d.dir, "nats.conf")
		if err := os.WriteFile(config, fmt.Appendf(nil, natsConfig, addrs[0], addrs[1], filepath.Join(d.dir, "nats")), 0o600); err != nil {
			return err
		}
		if err := d.add(ctx, nil, filepath.Join(p.bin, "nats-server"), "-c", config); err != nil {
			return err
		}
		d.url = "http://" + addrs[2]
		env := []string{
			"NATS_URL=nats://" + addrs[0], "NATS_MONITOR_URL=http://" + addrs[1], "SQLITE_PATH=" + filepath.Join(d.dir, "jobs.db"), "JWT_SECRET=" + userSecret,
			"WORKER_TOKEN_SECRET=" + workerSecret, "RATE_LIMIT_USER=off", "RATE_LIMIT_IP=off", "RATE_LIMIT_WORKER=off", "ADMIN_ADDR=off",
		}
		env = append(env, p.env...)
		d.edge, d.env = addrs[3], env
		if p.fill != nil {
			if err := p.fill(ctx, filepath.Join(d.dir, "jobs.db")); err != nil {
				return err
			}
		}
		apply := exec.CommandContext(ctx, filepath.Join(p.bin, "cmdexec"), "bus", "apply")
		apply.Env = append(os.Environ(), env...)
		if out, err := apply.CombinedOutput(); err != nil {
			return fmt.Errorf("bus apply: %w: %s", err, out)
		}
		for _, name := range []string{"registry-persister", "result-collector", "scheduler", "worker-edge", "api-gateway"} {
			own := env
			switch name {
			case "api-gateway":
				own = append(slices.Clone(env), "LISTEN_ADDR="+addrs[2])
			case "worker-edge":
				own = append(slices.Clone(env), "LISTEN_ADDR="+addrs[3])
			}
			if err := d.add(ctx, own, filepath.Join(p.bin, name)); err != nil {
				return err
			}
		}
		var err error
		if d.token, err = auth.MintUser([]byte(userSecret), "load", auth.RoleUser, time.Hour, time.Now()); err != nil {
			return err
		}
		return d.await(ctx, "the services", func() error { return d.hasWorkers(ctx, 0) })
	})
}

func start(what string, begin func(*deployment) error) (*deployment, error) {
	dir, err := os.MkdirTemp("", "cmdexec-load-")
	if err != nil {
		return nil, err
	}
	d := &deployment{what: what, dir: dir}
	if err := begin(d); err != nil {
		d.stop()
		return nil, err
	}
	return d, nil
}

// await asks again until there is no error.
func (d *deployment) await(ctx context.Context, what string, ready func() error) error {
	ctx, cancel := context.WithTimeout(ctx, readyWithin)
	defer cancel()
	for {
		err := ready()
		if err == nil {
			return nil
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("%s: not ready within %v: %w", what, readyWithin, err)
		}
	}
}

// hasWorkers is nil when that many workers are there.
func (d *deployment) hasWorkers(ctx context.Context, n int) error {
	var list busmsg.WorkerList
	if err := newClient(d.url, d.token).do(ctx, http.MethodGet, "/api/workers/list", "", &list); err != nil {
		return err
	}
	if len(list.Items) < n {
		return fmt.Errorf("%d workers of %d are connected", len(list.Items), n)
	}
	return nil
}

func freeAddr() (string, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer ln.Close()
	return ln.Addr().String(), nil
}

// clockTick is the unit of /proc/PID/stat times on Linux: USER_HZ is 100 on
// every architecture that Go runs on.
const clockTick = 10 * time.Millisecond

type usage struct {
	cpu time.Duration // of the processes and of all commands that they have waited for
	rss int64         // bytes
}

func (d *deployment) usage() (all usage, err error) {
	for _, cmd := range d.procs {
		u, one := usageOf(cmd.Process.Pid)
		all.cpu, all.rss, err = all.cpu+u.cpu, all.rss+u.rss, errors.Join(err, one)
	}
	return all, err
}

func usageOf(process int) (u usage, err error) {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(process) + "/stat")
	if err != nil {
		return usage{}, err
	}
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
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

// startWarmed is startSplit after the first jobs, which are slower than all others.
func startWarmed(ctx context.Context, p plan) (*deployment, *client, error) {
	d, err := startSplit(ctx, p)
	if err != nil {
		return nil, nil, err
	}
	c := newClient(d.url, d.token)
	if _, err := c.throughput(ctx, warm, p.clients); err != nil {
		d.stop()
		return nil, nil, fmt.Errorf("warm up: %w", err)
	}
	return d, c, nil
}
