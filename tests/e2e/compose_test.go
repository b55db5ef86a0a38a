package e2e

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

// containersFlag names the containers of -form=compose: PREFIX-api-gateway and so on.
var containersFlag = flag.String("containers", "", "with -form=compose: what the names of the containers begin with")

// compose is a topology of containers that somebody else started (tests/deploy),
// used through its published port. Workers are processes of this machine. The
// containers stay from test to test, with all that was submitted so far.
type compose struct {
	s      *system
	prefix string
}

func newCompose(s *system) *compose {
	s.t.Helper()
	f := &compose{s: s, prefix: *containersFlag}
	if f.prefix == "" {
		s.t.Fatal("-form=compose needs -containers; it is run by the tests in tests/deploy")
	}
	s.addr = f.docker("port", f.container("ingress"), "8080/tcp")
	s.suffix = "-" + strconv.FormatInt(time.Now().UnixNano(), 36) // nobody sees what another test submitted
	return f
}

func (f *compose) container(service string) string { return f.prefix + "-" + service }

// servers are all containers but the ingress, which keeps the published port.
func (f *compose) servers() []string {
	out := []string{f.container("nats")}
	for _, name := range serviceNames {
		out = append(out, f.container(name))
	}
	return out
}

func (f *compose) docker(args ...string) string {
	f.s.t.Helper()
	cmd := exec.Command("docker", args...)
	cmd.Env = os.Environ()
	out, err := cmd.CombinedOutput()
	if err != nil {
		f.s.t.Fatalf("docker %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

func (f *compose) start() {
	f.s.t.Helper()
	f.docker(append([]string{"start"}, f.servers()...)...) // harmless for those that run
	f.s.await()
	for _, name := range f.servers()[1:] {
		eventually(f.s.t, name+" is ready", func() error {
			if health := f.docker("inspect", "-f", "{{.State.Health.Status}}", name); health != "healthy" {
				return errors.New(health)
			}
			return nil
		})
	}
	f.s.saveContext()
	f.s.addLocal()
}

func (f *compose) stop() {
	f.s.t.Helper()
	f.s.stopLocal()
	f.docker(append([]string{"stop", "-t", "60"}, f.servers()...)...)
}

func (f *compose) crash() {
	f.s.t.Helper()
	f.s.killLocal()
	f.docker(append([]string{"kill"}, f.servers()...)...)
}

func (f *compose) ended() string {
	for _, name := range f.servers() {
		if state := f.docker("inspect", "-f", "{{.State.Status}}", name); state != "running" {
			return fmt.Sprintf("%s is %s\n%s", name, state, f.docker("logs", "--tail", "50", name))
		}
	}
	return ""
}

// admin asks from this machine: its bridge is in the containers' network.
func (f *compose) admin(service string) string {
	f.s.t.Helper()
	ip := f.docker("inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}} {{end}}", f.container(service))
	for variable := range strings.Lines(f.docker("inspect", "-f", "{{range .Config.Env}}{{println .}}{{end}}", f.container(service))) {
		if port, ok := strings.CutPrefix(strings.TrimSpace(variable), "ADMIN_ADDR=0.0.0.0:"); ok {
			return strings.Fields(ip)[0] + ":" + port
		}
	}
	f.s.t.Fatalf("%s has no ADMIN_ADDR", service)
	return ""
}
