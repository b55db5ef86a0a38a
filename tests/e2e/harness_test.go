package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
)

// The secrets of every instance under test, so that tests can mint tokens.
const (
	jwtSecret    = "e2e-user-tokens-4f1c9a7be2d0835661"
	workerSecret = "e2e-worker-tokens-9b3d7a10c5e2f48866"
	natsPassword = "e2e-nats-51d8c0b7f3a94e26"
)

// formFlag is the layout of the services that the scenarios run on.
var formFlag = flag.String("form", "up",
	"up: all in one process; split: each service its own; pairs: two of each; mongo: split, over MongoDB's protocol; "+
		"http: split, and workers that hold no socket; compose: containers that run already")

// patience bounds every wait for something that should happen soon. Race-built
// binaries on a busy machine are slow; nothing waits longer than it must.
const patience = 60 * time.Second

func binary(t testing.TB, name string) string {
	t.Helper()
	dir := os.Getenv("CMDEXEC_BIN_DIR")
	if dir == "" {
		dir = "../../bin"
	}
	path, err := filepath.Abs(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%s is not built: run the tests by `make test`", path)
	}
	return path
}

// program is a process under test. Its output is shown when the test fails.
type program struct {
	t    testing.TB
	name string
	cmd  *exec.Cmd
	out  *lockedBuffer
	done chan struct{}
	err  error // valid once done is closed
}

type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func startProgram(t testing.TB, name string, env []string, args ...string) *program {
	t.Helper()
	p := &program{t: t, name: name, cmd: exec.Command(binary(t, name), args...), out: &lockedBuffer{}, done: make(chan struct{})}
	p.cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + t.TempDir(), "GORACE=halt_on_error=1"}, env...)
	p.cmd.Stdout, p.cmd.Stderr = p.out, p.out
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	t.Cleanup(func() {
		p.kill()
		out := p.out.String()
		if secret := planted.find([]byte(out)); secret != "" {
			t.Errorf("%s logs the secret %s", name, secret)
		}
		if t.Failed() || strings.Contains(out, "DATA RACE") {
			t.Errorf("output of %s %s:\n%s", name, strings.Join(args, " "), out)
		}
	})
	return p
}

// kill ends the process as kill -9 does. It is harmless when it has ended.
func (p *program) kill() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

// stop asks the process to end and expects that it does so cleanly.
func (p *program) stop() {
	p.t.Helper()
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		p.t.Fatalf("%s had ended before it was stopped: %v\n%s", p.name, p.err, p.out)
	}
	select {
	case <-p.done:
		if p.err != nil {
			p.t.Fatalf("%s did not stop cleanly: %v\n%s", p.name, p.err, p.out)
		}
	case <-time.After(patience):
		p.t.Fatalf("%s did not stop within %v\n%s", p.name, patience, p.out)
	}
}

// system is an instance of the product with a data folder that outlives it.
type system struct {
	t     testing.TB
	addr  string
	dir   string // data, config
	opts  upOptions
	form  form
	local *program // the worker beside separate services

	workerEnv []string // of every worker
	suffix    string   // of the names of users
}

type upOptions struct {
	executor string // of the local worker
	slots    int
	env      []string // of the whole server
	copies   int      // of each separate service; 1 when zero
}

// form is a way to lay out the services. The scenarios do not know which one
// they run on.
type form interface {
	start()                      // blocks until the API answers
	stop()                       // a clean stop
	crash()                      // kill -9 of every process of the server
	ended() string               // why the server is not there; empty while it is
	admin(service string) string // address of a service's metrics
}

func startSystem(t testing.TB, opts upOptions) *system {
	t.Helper()
	opts.copies = max(opts.copies, 1)
	s := &system{t: t, addr: freeAddr(t), dir: t.TempDir(), opts: opts}
	t.Cleanup(func() { noSecretsIn(t, s.dir) }) // after all of its processes have ended
	switch *formFlag {
	case "up":
		s.form = &allInOne{s: s, adminAddr: freeAddr(t)}
	case "split":
		s.form = newSplit(s)
	case "pairs":
		s.opts.copies = max(s.opts.copies, 2)
		s.form = newSplit(s)
	case "mongo":
		f := newSplit(s)
		f.serveMongo()
		s.form = f
	case "http":
		s.workerEnv = []string{"TRANSPORT=http"}
		s.form = newSplit(s)
	case "compose":
		s.form = newCompose(s)
	default:
		t.Fatalf("-form=%s: there is no such form; up, split, pairs, mongo, http or compose", *formFlag)
	}
	s.start()
	return s
}

// onlyUp skips what is about the all-in-one itself.
func onlyUp(t testing.TB) {
	t.Helper()
	if *formFlag != "up" {
		t.Skip("about cmdexec up: it has nothing to say for separate services")
	}
}

func (s *system) start() {
	s.t.Helper()
	s.form.start()
}

func (s *system) stop() {
	s.t.Helper()
	s.form.stop()
}

func (s *system) crash() { s.form.crash() }

func (s *system) env() []string {
	return []string{
		"XDG_CONFIG_HOME=" + filepath.Join(s.dir, "config"),
		"JWT_SECRET=" + jwtSecret, "WORKER_TOKEN_SECRET=" + workerSecret,
	}
}

func (s *system) await() {
	s.t.Helper()
	eventually(s.t, "the API answers", func() error {
		if why := s.form.ended(); why != "" {
			s.t.Fatal(why)
		}
		resp, err := http.Get("http://" + s.addr + "/api/health")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return errors.New(resp.Status)
		}
		return nil
	})
}

// allInOne is `cmdexec up`.
type allInOne struct {
	s         *system
	adminAddr string
	up        *program
}

func (f *allInOne) admin(string) string { return f.adminAddr }

func (f *allInOne) start() {
	f.s.t.Helper()
	args := []string{"up", "--listen", f.s.addr, "--data-dir", filepath.Join(f.s.dir, "data"), "--executor", f.s.opts.executor}
	if f.s.opts.slots > 0 {
		args = append(args, "--slots", strconv.Itoa(f.s.opts.slots))
	}
	f.up = startProgram(f.s.t, "cmdexec", append(append(f.s.env(), "ADMIN_ADDR="+f.adminAddr), f.s.opts.env...), args...)
	f.s.await()
}

func (f *allInOne) stop() {
	f.s.t.Helper()
	f.up.stop()
}

func (f *allInOne) crash() { f.up.kill() }

func (f *allInOne) ended() string {
	select {
	case <-f.up.done:
		return fmt.Sprintf("up ended: %v\n%s", f.up.err, f.up.out)
	default:
		return ""
	}
}

// addWorker starts bin/worker as a process of its own and waits until it is connected.
func (s *system) addWorker(id string, env ...string) *program {
	s.t.Helper()
	w := s.startWorker(id, env...)
	s.connected(id)
	return w
}

func (s *system) startWorker(id string, env ...string) *program {
	s.t.Helper()
	token, err := auth.MintWorker([]byte(workerSecret), id, time.Hour, time.Now())
	if err != nil {
		s.t.Fatal(err)
	}
	planted.add(signature(token))
	executors := "process"
	if s.opts.executor == "docker" {
		executors = "docker"
		env = append(s.opts.env, env...) // where the engine is
	}
	return startProgram(s.t, "worker", slices.Concat([]string{
		"SERVER_URL=http://" + s.addr, "EXECUTORS=" + executors, "WORKER_TOKEN=" + token,
		"DATA_DIR=" + filepath.Join(s.dir, id), "ADMIN_ADDR=",
	}, s.workerEnv, env))
}

// saveContext gives the CLI what `up` writes by itself.
func (s *system) saveContext() {
	s.t.Helper()
	token, err := auth.MintUser([]byte(jwtSecret), "operator", auth.RoleAdmin, time.Hour, time.Now())
	if err != nil {
		s.t.Fatal(err)
	}
	data, err := json.Marshal(map[string]string{"server": "http://" + s.addr, "token": token})
	if err != nil {
		s.t.Fatal(err)
	}
	dir := filepath.Join(s.dir, "config", "cmdexec")
	if err := errors.Join(os.MkdirAll(dir, 0o700), os.WriteFile(filepath.Join(dir, "context.json"), data, 0o600)); err != nil {
		s.t.Fatal(err)
	}
}

// addLocal starts the worker beside separate services, when there is to be one.
func (s *system) addLocal() {
	s.t.Helper()
	if s.opts.executor == "none" {
		return
	}
	var env []string
	if s.opts.slots > 0 {
		env = []string{"SLOTS=" + strconv.Itoa(s.opts.slots)}
	}
	s.local = s.addWorker("local", env...)
}

func (s *system) stopLocal() {
	s.t.Helper()
	if s.local != nil {
		s.local.stop()
	}
}

func (s *system) killLocal() {
	if s.local != nil {
		s.local.kill()
	}
}

// metric sums the series of a metric of a service.
func (s *system) metric(service, name string) (float64, error) {
	return metricAt(s.form.admin(service), name)
}

func metricAt(admin, name string) (float64, error) {
	resp, err := http.Get("http://" + admin + "/metrics")
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err
	}
	sum := 0.0
	for line := range strings.Lines(string(text)) {
		series, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if base, _, _ := strings.Cut(series, "{"); base != name {
			continue
		}
		n, err := strconv.ParseFloat(value, 64)
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return sum, nil
}

// connected waits until a worker is there and takes jobs.
func (s *system) connected(id string) {
	s.t.Helper()
	admin := s.as("admin", auth.RoleAdmin)
	eventually(s.t, "worker "+id+" is connected", func() error {
		var list api.WorkerList
		if err := admin.get("/api/workers/list", &list); err != nil {
			return err
		}
		for _, w := range list.Items {
			if w.WorkerID == id && (w.Status == "idle" || w.Status == "busy") {
				return nil
			}
		}
		return errors.New("not in the list yet")
	})
}

// lastPort is the port that freeAddr gave last.
var lastPort atomic.Int32

// freeAddr names a loopback address that nobody listens on. The kernel never
// takes these ports for outgoing connections, so that it is still free when a
// process started later listens on it.
func freeAddr(t testing.TB) string {
	t.Helper()
	const first, count = 10_000, 22_000 // below Linux's ephemeral ports, which begin at 32,768
	lastPort.CompareAndSwap(0, rand.Int32N(count))
	for range 100 {
		addr := net.JoinHostPort("127.0.0.1", strconv.Itoa(first+int(lastPort.Add(1)%count)))
		if ln, err := net.Listen("tcp", addr); err == nil {
			_ = ln.Close()
			return addr
		}
	}
	t.Fatal("no free port among 100")
	return ""
}

// eventually asks again until there is no error, and fails the test with the
// last one when patience ends.
func eventually(t testing.TB, what string, check func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("waited %v until %s: %v", patience, what, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// user is somebody who speaks to the API with a token of their own.
type user struct {
	t     testing.TB
	url   string
	token string
}

func (s *system) as(name string, role auth.Role) *user {
	s.t.Helper()
	token, err := auth.MintUser([]byte(jwtSecret), name+s.suffix, role, time.Hour, time.Now())
	if err != nil {
		s.t.Fatal(err)
	}
	planted.add(signature(token))
	return &user{t: s.t, url: "http://" + s.addr, token: token}
}

func (s *system) user(name string) *user { return s.as(name, auth.RoleUser) }

// status is an answer that is not 2xx.
type status struct {
	code    int
	problem api.Problem
}

func (s *status) Error() string {
	return fmt.Sprintf("%d %s: %s", s.code, s.problem.Code, s.problem.Detail)
}

func (u *user) request(ctx context.Context, method, path string, body any, header http.Header) (*http.Response, error) {
	var data io.Reader
	switch b := body.(type) {
	case nil:
	case string:
		data = strings.NewReader(b)
	default:
		encoded, err := json.Marshal(b)
		if err != nil {
			return nil, err
		}
		data = bytes.NewReader(encoded)
	}
	req, err := http.NewRequestWithContext(ctx, method, u.url+path, data)
	if err != nil {
		return nil, err
	}
	for k, v := range header {
		req.Header[k] = v
	}
	req.Header.Set("Authorization", "Bearer "+u.token)
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	return http.DefaultClient.Do(req)
}

func (u *user) call(method, path string, body, into any, header http.Header) (int, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	resp, err := u.request(ctx, method, path, body, header)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		return resp.StatusCode, err
	}
	if secret := planted.find(data); secret != "" {
		u.t.Errorf("%s %s answers with the secret %s", method, path, secret)
	}
	if resp.StatusCode >= 300 {
		failure := &status{code: resp.StatusCode}
		if err := json.Unmarshal(data, &failure.problem); err != nil {
			return resp.StatusCode, fmt.Errorf("%s with a body that is no problem+json: %q", resp.Status, data)
		}
		return resp.StatusCode, failure
	}
	return resp.StatusCode, json.Unmarshal(data, into)
}

func (u *user) get(path string, into any) error {
	_, err := u.call(http.MethodGet, path, nil, into, nil)
	return err
}

// submit creates a job from fields of the API.
func (u *user) submit(fields map[string]any) api.Job {
	u.t.Helper()
	var j api.Job
	if _, err := u.call(http.MethodPost, "/api/jobs/create", fields, &j, nil); err != nil {
		u.t.Fatalf("create: %v", err)
	}
	return j
}

func (u *user) job(id string) api.Job {
	u.t.Helper()
	var j api.Job
	if err := u.get("/api/jobs/"+id, &j); err != nil {
		u.t.Fatalf("job %s: %v", id, err)
	}
	return j
}

// ended waits until the job has ended.
func (u *user) ended(id string) api.Job {
	u.t.Helper()
	return u.reaches(id, func(j api.Job) bool { return j.Status.Terminal() }, "has ended")
}

func (u *user) reaches(id string, there func(api.Job) bool, what string) api.Job {
	u.t.Helper()
	var j api.Job
	eventually(u.t, "job "+id+" "+what, func() error {
		if err := u.get("/api/jobs/"+id, &j); err != nil {
			return err
		}
		if !there(j) {
			return fmt.Errorf("it is %s (%s %s)", j.Status, j.Reason, j.Message)
		}
		return nil
	})
	return j
}

func (u *user) running(id string) api.Job {
	u.t.Helper()
	return u.reaches(id, func(j api.Job) bool { return j.Status == job.Running }, "runs")
}

func (u *user) cancel(id string) api.Job {
	u.t.Helper()
	var j api.Job
	if _, err := u.call(http.MethodPost, "/api/jobs/cancel", api.CancelRequest{JobID: id}, &j, nil); err != nil {
		u.t.Fatalf("cancel: %v", err)
	}
	return j
}

// output reads one stream of an ended job as text, once the log is complete.
func (u *user) output(id, stream string) string {
	u.t.Helper()
	var text strings.Builder
	eventually(u.t, "the log of "+id+" is complete", func() error {
		text.Reset()
		after := int64(0)
		for {
			var page api.Logs
			if err := u.get(fmt.Sprintf("/api/jobs/%s/logs?after=%d", id, after), &page); err != nil {
				return err
			}
			for _, item := range page.Items {
				if string(item.Stream) == stream {
					text.WriteString(item.Data)
					text.Write(item.DataBase64)
				}
			}
			if page.EOF {
				if !page.Complete {
					return errors.New("it ended and is not complete")
				}
				return nil
			}
			if page.NextAfter == after {
				return errors.New("not all of it is there yet")
			}
			after = page.NextAfter
		}
	})
	return text.String()
}

// journal is a folder to which jobs note each of their starts, synced to disk
// by the job itself.
type journal struct{ dir string }

func newJournal(t testing.TB) journal { return journal{t.TempDir()} }

// command notes a start and then runs the rest.
func (j journal) command(rest string) string {
	return `echo start | dd of=` + j.dir + `/$CMDEXEC_JOB_ID oflag=append conv=notrunc,fsync status=none; ` + rest
}

func (j journal) starts(t testing.TB, id string) int {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(j.dir, id))
	if errors.Is(err, os.ErrNotExist) {
		return 0
	}
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(data), "start\n")
}

// alive lists processes whose environment or command line holds the marker.
func alive(t testing.TB, marker string) []int {
	t.Helper()
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	var found []int
	for _, dir := range dirs {
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil || pid == os.Getpid() {
			continue
		}
		for _, file := range []string{"environ", "cmdline"} {
			data, err := os.ReadFile(filepath.Join(dir, file))
			if err == nil && bytes.Contains(data, []byte(marker)) {
				found = append(found, pid)
				break
			}
		}
	}
	return found
}
