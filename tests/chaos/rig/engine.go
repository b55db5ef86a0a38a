package rig

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Engine is a container engine that belongs to the rig alone, with an image whose
// only program is chaosjob. It needs root. The folder of the journal is mounted in
// each container by the runtime (see chaosrunc).
type Engine struct {
	*Process
	Image string // with chaosjob
	Mount string // where containers have the journal's folder

	dir  string
	http *http.Client
}

// Container is one that carries a worker's label.
type Container struct {
	ID    string
	Names []string
	State string
}

const workerLabel = "cmdexec.worker"

// Runs reports whether it is the container of an attempt. Names say so, since one
// that was started before its job came has no label of it.
func (c *Container) Runs(jobID string, attempt int) bool {
	return c.named("/cmdexec-" + jobID + "-" + strconv.Itoa(attempt) + "-")
}

// Waits reports whether it is kept for a job that may come.
func (c *Container) Waits() bool {
	return c.named("/cmdexec-warm-") && (c.State == "created" || c.State == "running")
}

func (c *Container) named(prefix string) bool {
	return slices.ContainsFunc(c.Names, func(name string) bool { return strings.HasPrefix(name, prefix) })
}

const imageName = "cmdexec-chaos/job"

func (r *Rig) newEngine() (*Engine, error) {
	daemon, err := exec.LookPath("dockerd")
	if err != nil {
		return nil, err
	}
	e := &Engine{Image: imageName + ":1", Mount: "/chaos-" + r.name, dir: filepath.Join(r.Options.Dir, "engine")}
	if err := os.MkdirAll(e.dir, 0o700); err != nil {
		return nil, err
	}
	// Commands in containers are nobody, and write the journal.
	for _, dir := range []string{r.JournalDir(), filepath.Join(r.JournalDir(), "locks")} {
		if err := os.Chmod(dir, 0o777); err != nil { //nolint:gosec // below a folder of the run's user
			return nil, err
		}
	}
	script := fmt.Sprintf("#!/bin/sh\nexec '%s' '%s' '%s' \"$@\"\n", r.Binary("chaosrunc"), r.JournalDir(), e.Mount)
	if err := os.WriteFile(e.runtime(), []byte(script), 0o700); err != nil { //nolint:gosec // it is executed
		return nil, err
	}
	if err := e.KeepContainers(false); err != nil {
		return nil, err
	}
	e.http = &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", e.socket())
	}}}
	e.Process = r.process("dockerd", "dockerd", nil, "--config-file", e.config())
	e.path, e.before = daemon, e.forgetContainerd
	return e, nil
}

// forgetContainerd removes the note of a containerd that died with its dockerd. Its
// process may still have to be reaped, or its id may be somebody else's by now, and
// dockerd would wait for that one to answer until it gives up.
func (e *Engine) forgetContainerd() error {
	note := filepath.Join(e.dir, "exec", "containerd", "containerd.pid")
	pid, err := os.ReadFile(note)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	command, err := os.ReadFile(filepath.Join("/proc", strings.TrimSpace(string(pid)), "cmdline")) // a dead one has none
	if err == nil && strings.Contains(string(command), e.dir) {
		return nil
	}
	return os.Remove(note)
}

func (e *Engine) config() string  { return filepath.Join(e.dir, "daemon.json") }
func (e *Engine) socket() string  { return filepath.Join(e.dir, "docker.sock") }
func (e *Engine) runtime() string { return filepath.Join(e.dir, "runtime") }

// Host is its address for clients.
func (e *Engine) Host() string { return "unix://" + e.socket() }

// KeepContainers sets whether containers outlive the daemon. A daemon that runs
// already learns of it.
func (e *Engine) KeepContainers(keep bool) error {
	data, err := json.Marshal(map[string]any{
		"hosts": []string{e.Host()}, "data-root": filepath.Join(e.dir, "data"), "exec-root": filepath.Join(e.dir, "exec"),
		"pidfile": filepath.Join(e.dir, "pid"), "bridge": "none", "iptables": false, "ip6tables": false,
		"runtimes": map[string]any{"chaos": map[string]any{"path": e.runtime()}}, "default-runtime": "chaos",
		"live-restore": keep, "shutdown-timeout": 5,
	})
	if err != nil {
		return err
	}
	if err := os.WriteFile(e.config(), data, 0o600); err != nil {
		return err
	}
	if e.Process == nil {
		return nil
	}
	return e.Signal(syscall.SIGHUP)
}

// Answers waits until the daemon answers.
func (e *Engine) Answers(ctx context.Context) error {
	return poll(ctx, func() error {
		ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		return e.call(ctx, http.MethodGet, "/_ping", nil, nil)
	})
}

func (e *Engine) call(ctx context.Context, method, path string, body io.Reader, into any) error {
	req, err := http.NewRequestWithContext(ctx, method, "http://engine"+path, body)
	if err != nil {
		return err
	}
	resp, err := e.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	var text strings.Builder
	if _, err := copyLimited(&text, resp.Body); err != nil {
		return err
	}
	// The engine says 200 before it knows how an import ends.
	if resp.StatusCode >= 300 || strings.Contains(text.String(), `"errorDetail"`) {
		return fmt.Errorf("the engine answers %s to %s: %s", resp.Status, path, strings.TrimSpace(text.String()))
	}
	if into == nil {
		return nil
	}
	return json.Unmarshal([]byte(text.String()), into)
}

// importImage makes the image, where it is not there yet.
func (e *Engine) importImage(ctx context.Context, program string) error {
	data, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	var image bytes.Buffer
	w := tar.NewWriter(&image)
	if err := w.WriteHeader(&tar.Header{Name: "chaosjob", Mode: 0o755, Size: int64(len(data)), Typeflag: tar.TypeReg}); err != nil {
		return err
	}
	if _, err := w.Write(data); err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	return e.call(ctx, http.MethodPost, "/images/create?fromSrc=-&repo="+url.QueryEscape(imageName)+"&tag=1", &image, nil)
}

// Containers lists those of all workers, ended ones too.
func (e *Engine) Containers(ctx context.Context) ([]Container, error) {
	var all []Container
	filter := url.QueryEscape(`{"label":["` + workerLabel + `"]}`)
	return all, e.call(ctx, http.MethodGet, "/containers/json?all=1&filters="+filter, nil, &all)
}

// start starts the daemon and gives it the image.
func (e *Engine) start(ctx context.Context, program string) error {
	if err := e.Start(); err != nil {
		return err
	}
	if err := e.Answers(ctx); err != nil {
		return fmt.Errorf("the container engine does not answer (its log is %s): %w", e.log, err)
	}
	return e.importImage(ctx, program)
}

// close removes what is left of it: containers that outlived the daemon, and mounts.
func (e *Engine) close() {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if e.Running() {
		_ = e.Signal(syscall.SIGCONT)
		if all, err := e.Containers(ctx); err == nil {
			for _, c := range all {
				_ = e.call(ctx, http.MethodDelete, "/containers/"+c.ID+"?force=1", nil, nil)
			}
		}
		_ = e.Stop(20 * time.Second)
	}
	e.http.CloseIdleConnections()
	e.endShims()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return
	}
	var points []string
	for line := range strings.Lines(string(mounts)) {
		if fields := strings.Fields(line); len(fields) > 4 && strings.HasPrefix(fields[4], e.dir+"/") {
			points = append(points, fields[4])
		}
	}
	slices.Sort(points)
	for _, point := range slices.Backward(points) { // inner ones first
		_ = exec.CommandContext(ctx, "umount", "-l", point).Run()
	}
}

// endShims ends what the daemon has left of itself when it was killed: the keepers of
// containers, which name its folder, and what they keep that was never started.
func (e *Engine) endShims() {
	socket := "\x00" + filepath.Join(e.dir, "exec") + "/"
	var shims []int
	for _, pid := range processes() {
		line, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cmdline")
		program, _, _ := strings.Cut(string(line), "\x00")
		if err == nil && strings.HasPrefix(filepath.Base(program), "containerd-shim") && strings.Contains(string(line), socket) {
			shims = append(shims, pid)
		}
	}
	for _, pid := range processes() {
		if slices.Contains(shims, parentOf(pid)) {
			_ = syscall.Kill(pid, syscall.SIGKILL) // it may have ended
		}
	}
	for _, pid := range shims {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
}

// needsRoot says why an engine of the rig's own cannot be had.
func needsRoot() error {
	if os.Geteuid() != 0 {
		return errors.New("a container engine of the run's own needs root")
	}
	return nil
}
