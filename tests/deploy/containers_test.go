package deploy

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
)

const (
	patience  = 90 * time.Second
	baseImage = "cmdexec-test/busybox:1" // .ci/docker.sh imports it
	label     = "cmdexec.test=deploy"
)

// stack is what docker-compose.yml describes, as containers of the engine at
// DOCKER_HOST. Three things differ: images are made of what this tree builds and
// of programs of this machine, since no registry can be relied on; SQLite on a
// shared volume takes the place of MongoDB; the port is any free one.
type stack struct {
	t       *testing.T
	prefix  string
	project *project
	cli     *composeService // not started with the others
	started []string        // services, in the order of their start
	url     string
}

func docker(t *testing.T, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	return strings.TrimSpace(string(output(t, exec.CommandContext(ctx, "docker", args...))))
}

func requireDocker(t *testing.T) {
	t.Helper()
	if os.Getenv("DOCKER_HOST") == "" {
		t.Skip("requires docker: DOCKER_HOST is not set; `.ci/docker.sh start DIR` starts an engine for tests")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if out, err := exec.CommandContext(ctx, "docker", "image", "inspect", baseImage).CombinedOutput(); err != nil {
		t.Skipf("requires docker: no engine with the image %s answers at DOCKER_HOST: %s", baseImage, oneLine(out))
	}
	for name, program := range map[string]string{"nginx": "nginx", "redis": "redis-server"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("requires %s: %s is not in PATH", name, program)
		}
	}
}

func newStack(t *testing.T) *stack {
	t.Helper()
	requireDocker(t)
	s := &stack{t: t, prefix: "cmdexec-deploy", project: compose(t, secrets)}
	s.sweep() // what an earlier run left: its networks have the same addresses
	t.Cleanup(s.sweep)
	delete(s.project.Services, "mongo")
	s.cli = s.project.Services["cli"]
	delete(s.project.Services, "cli")
	for _, name := range []string{"registry-persister", "result-collector"} {
		sv := s.project.Services[name]
		delete(sv.Environment, "MONGODB_URI")
		delete(sv.DependsOn, "mongo")
		sv.Environment["SQLITE_PATH"] = "/data/cmdexec.db"
	}
	// What the scenarios of tests/e2e expect: they ask more often than people do,
	// and one waits until a job has left the registry.
	s.project.Services["api-gateway"].Environment["RATE_LIMIT_USER"] = "off"
	s.project.Services["api-gateway"].Environment["RATE_LIMIT_IP"] = "off"
	s.project.Services["registry-persister"].Environment["IDEMPOTENCY_GRACE_SECONDS"] = "20"
	return s
}

// sweep removes the containers, networks and volumes of this test.
func (s *stack) sweep() {
	ids := func(args ...string) []string {
		return strings.Fields(docker(s.t, append(args, "-q", "--filter", "label="+label)...))
	}
	if list := ids("ps", "-a"); len(list) > 0 {
		docker(s.t, append([]string{"rm", "-f", "-v"}, list...)...)
	}
	docker(s.t, "image", "prune", "-f", "--filter", "label="+label) // those that have lost their name
	for _, kind := range []string{"network", "volume"} {
		if list := ids(kind, "ls"); len(list) > 0 {
			docker(s.t, append([]string{kind, "rm"}, list...)...)
		}
	}
}

func (s *stack) name(service string) string { return s.prefix + "-" + service }

// buildImages makes the images of the services from the last stage of the real
// Dockerfile, and those of NATS, Redis and nginx from programs of this machine.
func (s *stack) buildImages() {
	s.t.Helper()
	dir := s.t.TempDir()
	bin := filepath.Join(dir, "bin")
	build := func(in, out, pkg string) {
		cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", filepath.Join(bin, out), pkg)
		cmd.Dir = in
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		output(s.t, cmd)
	}
	build(".", "nats-server", "github.com/nats-io/nats-server/v2")

	text, err := os.ReadFile(filepath.Join(root, "deploy", "docker", "Dockerfile"))
	if err != nil {
		s.t.Fatal(err)
	}
	head, last, ok := strings.Cut(string(text), "\nFROM ${BASE}\n")
	if !ok || !strings.Contains(head, "chmod 0111 /out/root/service") || !strings.Contains(head, "mkdir -p -m 0750 /out/own/data && mkdir -m 1777 /out/root/tmp") {
		s.t.Fatal("the Dockerfile is not what this test knows")
	}
	dockerfile := "ARG BASE=scratch\nFROM " + baseImage + " AS build\nCOPY etc /etc\nCOPY out /out\nFROM ${BASE}\n" + last
	for name, sv := range s.project.Services {
		if sv.Build == nil {
			continue
		}
		program := *sv.Build.Args["SERVICE"]
		build(root, program, "./services/"+program+"/cmd/"+program)
		ctx := filepath.Join(dir, name)
		s.write(filepath.Join(ctx, "Dockerfile"), []byte(dockerfile), 0o644)
		s.write(filepath.Join(ctx, "etc", "ssl", "certs", "ca-certificates.crt"), nil, 0o644)
		s.copy(filepath.Join(bin, program), filepath.Join(ctx, "out", "root", "service"), 0o111)
		s.folder(filepath.Join(ctx, "out", "root", "tmp"), 0o777|os.ModeSticky)
		s.folder(filepath.Join(ctx, "out", "own", "data"), 0o750)
		args := []string{"build", "-q", "--network", "none", "--label", label, "-t", s.name(name)}
		if sv.Build.Args["BASE"] != nil {
			args = append(args, "--build-arg", "BASE="+baseImage)
		}
		docker(s.t, append(args, ctx)...)
		sv.Image = s.name(name)
	}

	nats := filepath.Join(dir, "nats")
	s.copy(filepath.Join(bin, "nats-server"), filepath.Join(nats, "nats-server"), 0o755)
	s.write(filepath.Join(nats, "Dockerfile"), []byte("FROM "+baseImage+"\nCOPY nats-server /bin/nats-server\nENTRYPOINT [\"nats-server\"]\n"), 0o644)
	docker(s.t, "build", "-q", "--network", "none", "--label", label, "-t", s.name("nats"), nats)
	s.project.Services["nats"].Image = s.name("nats")

	s.machineImage(dir, "redis", "redis-server", "redis-cli")
	s.machineImage(dir, "ingress", "nginx")
}

// machineImage makes a service's image of programs of this machine.
func (s *stack) machineImage(dir, service string, programs ...string) {
	s.t.Helper()
	ctx := filepath.Join(dir, service)
	for _, name := range programs {
		program, err := exec.LookPath(name)
		if err != nil {
			s.t.Fatal(err)
		}
		s.copy(program, filepath.Join(ctx, "root", "bin", name), 0o755)
		for _, word := range strings.Fields(string(output(s.t, exec.Command("ldd", program)))) {
			if strings.HasPrefix(word, "/") {
				s.copy(word, filepath.Join(ctx, "root", word), 0o755)
			}
		}
	}
	s.folder(filepath.Join(ctx, "root", "tmp"), 0o777|os.ModeSticky)
	s.write(filepath.Join(ctx, "root", "var", "log", "nginx", "error.log"), nil, 0o666)
	s.write(filepath.Join(ctx, "Dockerfile"), []byte("FROM "+baseImage+"\nCOPY root /\n"), 0o644)
	docker(s.t, "build", "-q", "--network", "none", "--label", label, "-t", s.name(service), ctx)
	s.project.Services[service].Image = s.name(service)
}

func (s *stack) write(path string, data []byte, mode os.FileMode) {
	s.t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, data, mode), os.Chmod(path, mode)); err != nil {
		s.t.Fatal(err)
	}
}

// folder makes a folder with these rights. An engine gives a tmpfs those of the
// folder that it covers.
func (s *stack) folder(path string, mode os.FileMode) {
	s.t.Helper()
	if err := errors.Join(os.MkdirAll(path, 0o755), os.Chmod(path, mode)); err != nil {
		s.t.Fatal(err)
	}
}

func (s *stack) copy(from, to string, mode os.FileMode) {
	s.t.Helper()
	data, err := os.ReadFile(from)
	if err != nil {
		s.t.Fatal(err)
	}
	s.write(to, data, mode)
}

// up creates the networks and starts every service after those it depends on, when
// these are what it wants them to be.
func (s *stack) up() {
	s.t.Helper()
	s.buildImages()
	for name, n := range s.project.Networks {
		args := []string{"network", "create", "--label", label}
		if n.Internal {
			args = append(args, "--internal")
		}
		for _, c := range n.IPAM.Config {
			args = append(args, "--subnet", c.Subnet)
		}
		docker(s.t, append(args, s.name(name))...)
	}
	for len(s.started) < len(s.project.Services) {
		next := ""
		for name, sv := range s.project.Services {
			ready := !slices.Contains(s.started, name)
			for dep := range sv.DependsOn {
				ready = ready && slices.Contains(s.started, dep)
			}
			if ready && (next == "" || name < next) {
				next = name
			}
		}
		if next == "" {
			s.t.Fatalf("services depend on each other in a circle, or on one that is not there; started: %v", s.started)
		}
		for dep, on := range s.project.Services[next].DependsOn {
			s.await(dep, on.Condition)
		}
		s.start(next)
		s.started = append(s.started, next)
	}
	for _, name := range s.started {
		if name != "topology" {
			s.await(name, "service_healthy")
		}
	}
	s.url = "http://" + docker(s.t, "port", s.name("ingress"), "8080/tcp")
}

// start turns a service of the compose file into a container.
func (s *stack) start(name string) {
	s.t.Helper()
	sv := s.project.Services[name]
	args := []string{"create", "--name", s.name(name), "--label", label}
	add := func(flag, value string) {
		if value != "" {
			args = append(args, flag, value)
		}
	}
	for k, v := range sv.Environment {
		add("--env", k+"="+v)
	}
	if sv.ReadOnly {
		args = append(args, "--read-only")
	}
	add("--user", sv.User)
	for _, v := range sv.Tmpfs {
		add("--tmpfs", v)
	}
	for _, v := range sv.CapDrop {
		add("--cap-drop", v)
	}
	for _, v := range sv.SecurityOpt {
		add("--security-opt", v)
	}
	if sv.CPUs > 0 {
		add("--cpus", strconv.FormatFloat(sv.CPUs, 'f', -1, 64))
	}
	add("--memory", sv.MemLimit.String())
	if sv.PidsLimit > 0 {
		add("--pids-limit", strconv.Itoa(sv.PidsLimit))
	}
	if h := sv.Healthcheck; h != nil {
		if h.Disable {
			args = append(args, "--no-healthcheck")
		} else {
			quoted := make([]string, 0, len(h.Test))
			for _, word := range h.Test[1:] {
				quoted = append(quoted, "'"+word+"'")
			}
			add("--health-cmd", strings.Join(quoted, " "))
			add("--health-timeout", h.Timeout)
			add("--health-start-period", h.StartPeriod)
			add("--health-retries", strconv.Itoa(h.Retries))
		}
	}
	if sv.Healthcheck == nil || !sv.Healthcheck.Disable {
		add("--health-interval", "2s") // sooner than in production, so that nobody waits
	}
	for _, p := range sv.Ports {
		add("--publish", fmt.Sprintf("%s::%d", p.HostIP, p.Target))
	}
	for _, v := range sv.Volumes {
		mode := ""
		if v.ReadOnly {
			mode = ":ro"
		}
		switch {
		case v.Type == "bind":
			source, err := filepath.Abs(filepath.Join(root, v.Source))
			if err != nil {
				s.t.Fatal(err)
			}
			add("--volume", source+":"+v.Target+mode)
		case v.Source == "":
			add("--volume", v.Target)
		default:
			docker(s.t, "volume", "create", "--label", label, s.name(v.Source))
			add("--volume", s.name(v.Source)+":"+v.Target+mode)
		}
	}
	if sv.Environment["SQLITE_PATH"] != "" {
		docker(s.t, "volume", "create", "--label", label, s.name("sqlite"))
		add("--volume", s.name("sqlite")+":/data")
	}
	names := make([]string, 0, len(sv.Networks))
	for n := range sv.Networks {
		names = append(names, n)
	}
	slices.Sort(names)
	args = append(args, "--network", s.name(names[0]), "--network-alias", name)
	if n := sv.Networks[names[0]]; n != nil {
		add("--ip", n.Address)
	}
	command := sv.Command
	if len(sv.Entrypoint) > 0 {
		add("--entrypoint", sv.Entrypoint[0])
		command = append(slices.Clone(sv.Entrypoint[1:]), command...)
	}
	docker(s.t, append(append(args, sv.Image), command...)...)
	for _, n := range names[1:] {
		docker(s.t, "network", "connect", "--alias", name, s.name(n), s.name(name))
	}
	docker(s.t, "start", s.name(name))
}

// await waits for a condition of compose's depends_on.
func (s *stack) await(name, condition string) {
	s.t.Helper()
	eventually(s.t, name+" is "+condition, func() error {
		var state struct {
			Status   string
			ExitCode int
			Health   *struct{ Status string }
		}
		if err := json.Unmarshal([]byte(docker(s.t, "inspect", "-f", "{{json .State}}", s.name(name))), &state); err != nil {
			return err
		}
		switch {
		case condition == "service_completed_successfully" && state.Status == "exited" && state.ExitCode == 0,
			condition == "service_healthy" && state.Health != nil && state.Health.Status == "healthy":
			return nil
		case state.Status == "exited":
			s.t.Fatalf("%s ended with %d:\n%s", name, state.ExitCode, s.logs(name))
		}
		return fmt.Errorf("%s %+v\n%s", state.Status, state.Health, s.logs(name))
	})
}

func (s *stack) logs(name string) string {
	out, err := exec.Command("docker", "logs", "--tail", "40", s.name(name)).CombinedOutput()
	return fmt.Sprintf("%s%v", out, err)
}

func eventually(t *testing.T, what string, check func() error) {
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
		time.Sleep(50 * time.Millisecond)
	}
}

// call asks the published port as a user, or without a token.
func (s *stack) call(method, path, token string, body, into any) (int, error) {
	var data io.Reader
	if body != nil {
		encoded, err := json.Marshal(body)
		if err != nil {
			return 0, err
		}
		data = bytes.NewReader(encoded)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, s.url+path, data)
	if err != nil {
		return 0, err
	}
	req.Header.Set("Content-Type", "application/json")
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err
	}
	if resp.StatusCode >= 300 {
		return resp.StatusCode, fmt.Errorf("%s %s: %s %s", method, path, resp.Status, text)
	}
	return resp.StatusCode, json.Unmarshal(text, into)
}

type client struct {
	*stack
	token string
}

func (s *stack) user(name string) client {
	s.t.Helper()
	token, err := auth.MintUser([]byte(secrets["JWT_SECRET"]), name, auth.RoleUser, time.Hour, time.Now())
	if err != nil {
		s.t.Fatal(err)
	}
	return client{s, token}
}

func (c client) submit(t *testing.T, command string, more map[string]any) string {
	t.Helper()
	fields := map[string]any{"command": command, "resources": map[string]any{"cpu": 0.1, "memoryMb": 64}}
	for k, v := range more {
		fields[k] = v
	}
	var j api.Job
	if _, err := c.call(http.MethodPost, "/api/jobs/create", c.token, fields, &j); err != nil {
		t.Fatal(err)
	}
	return j.JobID
}

func (c client) reaches(t *testing.T, id, what string, there func(api.Job) bool) api.Job {
	t.Helper()
	var j api.Job
	eventually(t, id+" "+what, func() error {
		j = api.Job{}
		if _, err := c.call(http.MethodGet, "/api/jobs/"+id, c.token, nil, &j); err != nil {
			return err
		}
		if !there(j) {
			return fmt.Errorf("it is %s (%s %s)", j.Status, j.Reason, j.Message)
		}
		return nil
	})
	return j
}

func (c client) ended(t *testing.T, id string) api.Job {
	t.Helper()
	return c.reaches(t, id, "has ended", func(j api.Job) bool { return j.Status.Terminal() })
}

// execute runs a command and returns its standard output and exit code.
func (c client) execute(t *testing.T, command string) (string, int) {
	t.Helper()
	var r struct {
		Status   job.State `json:"status"`
		ExitCode *int      `json:"exitCode"`
		Stdout   string    `json:"stdout"`
	}
	fields := map[string]any{"command": command, "resources": map[string]any{"cpu": 0.1, "memoryMb": 64}}
	if _, err := c.call(http.MethodPost, "/api/execute", c.token, fields, &r); err != nil {
		t.Fatal(err)
	}
	if r.ExitCode == nil {
		t.Fatalf("%q ended %s without an exit code", command, r.Status)
	}
	return r.Stdout, *r.ExitCode
}

// TestContainers starts what docker-compose.yml describes and uses it through its
// one published port.
func TestContainers(t *testing.T) {
	s := newStack(t)
	s.up()
	ann := s.user("ann")

	t.Run("submit, exit code, list", func(t *testing.T) {
		id := ann.submit(t, "echo out; echo err >&2; exit 7", nil)
		j := ann.ended(t, id)
		if j.Status != job.Failed || j.ExitCode == nil || *j.ExitCode != 7 {
			t.Errorf("ended %s %v %s", j.Status, j.ExitCode, j.Message)
		}
		eventually(t, "the job is in the list", func() error {
			var list struct {
				Items []api.Job `json:"items"`
			}
			if _, err := s.call(http.MethodGet, "/api/jobs?status=failed", ann.token, nil, &list); err != nil {
				return err
			}
			if !slices.ContainsFunc(list.Items, func(j api.Job) bool { return j.JobID == id }) {
				return fmt.Errorf("%d others", len(list.Items))
			}
			return nil
		})
		if _, err := s.call(http.MethodGet, "/api/jobs/"+id, s.user("bob").token, nil, &j); err == nil || !strings.Contains(err.Error(), "404") {
			t.Errorf("somebody else's job: %v", err)
		}
	})

	t.Run("output is followed while the job runs", func(t *testing.T) {
		id := ann.submit(t, "echo first; until [ -e go ]; do sleep 0.1; done; echo last", nil)
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url+"/api/jobs/"+id+"/logs?follow=true", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+ann.token)
		req.Header.Set("Accept", "text/event-stream")
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		lines := bufio.NewScanner(resp.Body)
		for lines.Scan() && !strings.Contains(lines.Text(), "first") {
		}
		if lines.Err() != nil || !strings.Contains(lines.Text(), "first") {
			t.Fatalf("the stream ended before the first line: %v", lines.Err())
		}
		ann.reaches(t, id, "runs", func(j api.Job) bool { return j.Status == job.Running })
		if _, err := s.call(http.MethodPost, "/api/jobs/cancel", ann.token, api.CancelRequest{JobID: id}, &api.Job{}); err != nil {
			t.Fatal(err)
		}
		for lines.Scan() && lines.Text() != "event: end" {
		}
		if lines.Err() != nil || lines.Text() != "event: end" {
			t.Errorf("the stream did not end in order: %v", lines.Err())
		}
		if j := ann.ended(t, id); j.Status != job.Canceled || j.Cancel == nil || j.Cancel.GoneAt == nil {
			t.Errorf("ended %s, receipt %+v", j.Status, j.Cancel)
		}
	})

	t.Run("a command has no secret and reaches no service", func(t *testing.T) {
		out, _ := ann.execute(t, "for p in /proc/[0-9]*; do tr '\\0' '\\n' < $p/environ; done 2>/dev/null; env")
		for name, secret := range secrets {
			if strings.Contains(out, secret) {
				t.Errorf("a command can read %s", name)
			}
		}
		if !strings.Contains(out, "CMDEXEC_JOB_ID=") {
			t.Errorf("the command did not read its own environment, so nothing was shown: %q", out)
		}
		out, _ = ann.execute(t, "for h in ingress nats scheduler; do nslookup $h >/dev/null 2>&1 && echo $h; done; true")
		if out != "ingress\n" {
			t.Errorf("a command knows the addresses of %q", out)
		}
	})

	t.Run("containers are restricted", func(t *testing.T) {
		for _, name := range s.started {
			if name == "topology" {
				continue
			}
			out := docker(t, "inspect", "-f", "{{.HostConfig.ReadonlyRootfs}} {{.HostConfig.CapDrop}} {{.HostConfig.SecurityOpt}} {{.Config.User}}", s.name(name))
			want := "true [ALL] [no-new-privileges:true] 65532:65532"
			if name == "nats" {
				want = "true [ALL] [no-new-privileges:true] " // root without any right: a new volume belongs to root
			}
			if strings.TrimSpace(out) != strings.TrimSpace(want) {
				t.Errorf("%s is %s", name, out)
			}
		}
		if out := docker(t, "exec", s.name("api-gateway"), "/service", "healthcheck"); out != "" {
			t.Errorf("healthcheck prints %q", out)
		}
	})

	t.Run("rate limits are shared by Redis", func(t *testing.T) {
		for name, port := range map[string]string{"api-gateway": "9100", "worker-edge": "9101"} {
			ip := docker(t, "inspect", "-f", "{{(index .NetworkSettings.Networks \""+s.name("backend")+"\").IPAddress}}", s.name(name))
			resp, err := http.Get("http://" + ip + ":" + port + "/metrics") // the bridge is one of this machine's
			if err != nil {
				t.Fatal(err)
			}
			text, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if err != nil || !strings.Contains(string(text), "\ncmdexec_ratelimit_remote_up 1\n") {
				t.Errorf("%s does not count in Redis: %v", name, err)
			}
		}
	})

	t.Run("the command line as a container", func(t *testing.T) {
		s.project.Services["cli"] = s.cli
		defer delete(s.project.Services, "cli")
		s.cli.Image = s.name("topology")
		s.cli.Command = []string{"token", "user", "--name", "ann"}
		s.start("cli")
		s.await("cli", "service_completed_successfully")
		token := docker(t, "logs", s.name("cli"))
		docker(t, "rm", s.name("cli"))
		s.cli.Environment["CMDEXEC_TOKEN"] = token
		s.cli.Command = []string{"run", "--", "echo", "hello from", "a container"}
		s.start("cli")
		s.await("cli", "service_completed_successfully")
		if out := docker(t, "logs", s.name("cli")); !strings.Contains(out, "hello from a container") {
			t.Errorf("cmdexec run prints %q", out)
		}
	})

	t.Run("durability is read from the server", func(t *testing.T) {
		var info api.Info
		if _, err := s.call(http.MethodGet, "/api/info", "", nil, &info); err != nil || info.Durability != "committed" {
			t.Errorf("durability %q, %v", info.Durability, err)
		}
	})

	t.Run("every service is killed in the middle of a job", func(t *testing.T) {
		for _, name := range []string{"nats", "scheduler", "worker-edge", "result-collector", "registry-persister", "api-gateway", "ingress"} {
			id := ann.submit(t, "sleep 1; echo done", nil)
			ann.reaches(t, id, "has started", func(j api.Job) bool { return j.StartedAt != nil })
			docker(t, "kill", s.name(name))
			docker(t, "start", s.name(name))
			s.await(name, "service_healthy")
			if name == "ingress" {
				s.url = "http://" + docker(t, "port", s.name("ingress"), "8080/tcp")
			}
			j := ann.ended(t, id)
			starts := 0
			for _, a := range j.Attempts { // those that never reached a worker did no harm
				if a.StartedAt != nil {
					starts++
				}
			}
			if j.Status != job.Succeeded || starts != 1 {
				t.Errorf("%s was killed: the job ended %s after %d starts: %s %s", name, j.Status, starts, j.Reason, j.Message)
			}
		}
	})

	t.Run("the end-to-end scenarios", func(t *testing.T) {
		docker(t, "stop", "-t", "10", s.name("worker")) // the scenarios bring their own workers
		cmd := exec.Command("go", "test", "-race", "-vet=off", "-count=1", "-timeout=20m", "-v", "./e2e", "-args", "-form=compose", "-containers="+s.prefix)
		cmd.Dir = filepath.Join(root, "tests")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=1")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		if n := strings.Count(string(out), "\n--- PASS: "); n < 10 {
			t.Errorf("%d scenarios passed\n%s", n, out)
		}
		docker(t, "start", s.name("worker"))
		s.await("worker", "service_healthy")
	})

	t.Run("everything stops by itself", func(t *testing.T) {
		for _, name := range slices.Backward(s.started) {
			if name == "topology" {
				continue
			}
			grace := 10 * time.Second // compose's default
			if g := s.project.Services[name].StopGrace; g != "" {
				var err error
				if grace, err = time.ParseDuration(g); err != nil {
					t.Fatal(err)
				}
			}
			docker(t, "stop", "-t", strconv.Itoa(int(grace.Seconds())), s.name(name))
			if code := docker(t, "inspect", "-f", "{{.State.ExitCode}}", s.name(name)); code != "0" && !(name == "nats" && code == "1") {
				t.Errorf("%s ended with %s:\n%s", name, code, s.logs(name))
			}
		}
	})
}
