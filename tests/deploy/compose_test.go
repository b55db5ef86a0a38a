package deploy

import (
	"encoding/json"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// project is the part of a compose file that the tests use.
type project struct {
	Services map[string]*composeService `json:"services"`
	Networks map[string]struct {
		Internal bool `json:"internal"`
		IPAM     struct {
			Config []struct {
				Subnet string `json:"subnet"`
			} `json:"config"`
		} `json:"ipam"`
	} `json:"networks"`
}

type composeService struct {
	Profiles    []string          `json:"profiles"`
	Image       string            `json:"image"`
	Command     []string          `json:"command"`
	Entrypoint  []string          `json:"entrypoint"`
	Environment map[string]string `json:"environment"`
	ReadOnly    bool              `json:"read_only"`
	User        string            `json:"user"`
	Tmpfs       []string          `json:"tmpfs"`
	CapDrop     []string          `json:"cap_drop"`
	SecurityOpt []string          `json:"security_opt"`
	CPUs        float64           `json:"cpus"`
	MemLimit    json.Number       `json:"mem_limit"`
	PidsLimit   int               `json:"pids_limit"`
	StopGrace   string            `json:"stop_grace_period"`
	Build       *struct {
		Args map[string]*string `json:"args"`
	} `json:"build"`
	DependsOn map[string]struct {
		Condition string `json:"condition"`
	} `json:"depends_on"`
	Networks map[string]*struct {
		Address string `json:"ipv4_address"`
	} `json:"networks"`
	Ports []struct {
		HostIP string `json:"host_ip"`
		Target int    `json:"target"`
	} `json:"ports"`
	Volumes []struct {
		Type     string `json:"type"`
		Source   string `json:"source"`
		Target   string `json:"target"`
		ReadOnly bool   `json:"read_only"`
	} `json:"volumes"`
	Healthcheck *struct {
		Test        []string `json:"test"`
		Timeout     string   `json:"timeout"`
		StartPeriod string   `json:"start_period"`
		Retries     int      `json:"retries"`
		Disable     bool     `json:"disable"`
	} `json:"healthcheck"`
}

// The secrets of the containers under test. The first two are those of tests/e2e,
// whose scenarios run on these containers too.
var secrets = map[string]string{
	"JWT_SECRET":          "e2e-user-tokens-4f1c9a7be2d0835661",
	"WORKER_TOKEN_SECRET": "e2e-worker-tokens-9b3d7a10c5e2f48866",
	"NATS_PASSWORD":       "b7d20c9e41fa58360d1ce9b2",
	"MONGO_PASSWORD":      "59e0c1d7ab3f86244fd1ba70",
	"REDIS_PASSWORD":      "c04d7a91e83f52b6610fd2a9",
}

func composeModel(t *testing.T, env map[string]string) ([]byte, error) {
	t.Helper()
	cmd := exec.Command(tool(t, "composemodel"), "docker-compose.yml")
	cmd.Dir = root
	cmd.Env = []string{"HOME=" + t.TempDir()}
	for k, v := range env {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	return cmd.CombinedOutput()
}

func compose(t *testing.T, env map[string]string) *project {
	t.Helper()
	out, err := composeModel(t, env)
	if err != nil {
		t.Fatalf("docker-compose.yml: %v\n%s", err, out)
	}
	var p project
	if err := json.Unmarshal(out, &p); err != nil {
		t.Fatal(err)
	}
	return &p
}

func TestComposeNames(t *testing.T) {
	p := compose(t, secrets)
	for _, program := range programs {
		s := p.Services[program]
		if s == nil {
			t.Errorf("there is no service %s", program)
			continue
		}
		env := slices.Collect(maps.Keys(s.Environment))
		checkNames(t, "docker-compose.yml", program, env)
		if program == "registry-persister" || program == "result-collector" {
			checkDatabase(t, "docker-compose.yml: "+program, env)
		}
	}
	checkTopology(t, "docker-compose.yml", slices.Collect(maps.Keys(p.Services["topology"].Environment)))
	for _, n := range slices.Sorted(maps.Keys(p.Services["cli"].Environment)) {
		if !slices.Contains([]string{"CMDEXEC_SERVER", "CMDEXEC_TOKEN", "DATA_DIR", "JWT_SECRET", "WORKER_TOKEN_SECRET"}, n) {
			t.Errorf("docker-compose.yml: cmdexec does not take %s", n)
		}
	}
	if a, b := p.Services["scheduler"].Environment, p.Services["worker-edge"].Environment; a["LEASE_SECONDS"] != b["LEASE_SECONDS"] ||
		a["HEARTBEAT_SECONDS"] != b["HEARTBEAT_SECONDS"] {
		t.Error("scheduler and edge have different leases")
	}
}

// What is not set must be said, and nothing may start with a secret that everybody
// knows.
func TestComposeRefusesToStartWithoutSecrets(t *testing.T) {
	for name := range secrets {
		for what, env := range map[string]map[string]string{"missing": maps.Clone(secrets), "empty": maps.Clone(secrets)} {
			delete(env, name)
			if what == "empty" {
				env[name] = ""
			}
			out, err := composeModel(t, env)
			if want := "set " + name + " in .env, see .env.example"; err == nil || !strings.Contains(string(out), want) {
				t.Errorf("%s %s: error %v; the message lacks %q:\n%s", name, what, err, want, out)
			}
		}
	}
}

var (
	reference = regexp.MustCompile(`\$\{([A-Z_]+)(:-([^}]*)|:\?[^}]*)\}`)
	assigned  = regexp.MustCompile(`(?m)^(#?)([A-Z_]+)=(.*)$`)
)

// .env.example explains every variable of the compose file and has no other, and
// shows the default that is in force.
func TestEnvExample(t *testing.T) {
	file, err := os.ReadFile(filepath.Join(root, "docker-compose.yml"))
	if err != nil {
		t.Fatal(err)
	}
	example, err := os.ReadFile(filepath.Join(root, ".env.example"))
	if err != nil {
		t.Fatal(err)
	}
	defaults := map[string]string{}
	for _, m := range reference.FindAllStringSubmatch(string(file), -1) {
		if before, ok := defaults[m[1]]; ok && before != m[3] {
			t.Errorf("docker-compose.yml has two defaults for %s: %q and %q", m[1], before, m[3])
		}
		defaults[m[1]] = m[3]
	}
	if n := strings.Count(string(file), "${"); n != len(reference.FindAllString(string(file), -1)) {
		t.Error("docker-compose.yml has a variable without a default and without a message")
	}
	for _, m := range assigned.FindAllStringSubmatch(string(example), -1) {
		def, ok := defaults[m[2]]
		switch _, secret := secrets[m[2]]; {
		case !ok:
			t.Errorf(".env.example has %s, which docker-compose.yml does not use", m[2])
		case secret && (m[1] != "" || m[3] != ""):
			t.Errorf(".env.example must leave %s empty: a secret that everybody knows is none", m[2])
		case !secret && (m[1] == "" || m[3] != def):
			t.Errorf(".env.example shows %q for %s; the default is %q, in a comment", m[3], m[2], def)
		}
		delete(defaults, m[2])
	}
	for name := range defaults {
		t.Errorf(".env.example does not explain %s", name)
	}
}

// Images are pinned to a version.
func TestComposeImages(t *testing.T) {
	for name, s := range compose(t, secrets).Services {
		_, tag, _ := strings.Cut(s.Image, ":")
		if own := strings.HasPrefix(s.Image, "cmdexec/"); own != (s.Build != nil) && name != "cli" || !own && !regexp.MustCompile(`^\d+\.\d+\.\d+`).MatchString(tag) {
			t.Errorf("%s has the image %s, which is not pinned", name, s.Image)
		}
		if s.Build != nil && s.Build.Args["SERVICE"] == nil {
			t.Errorf("%s is built without SERVICE", name)
		}
	}
}
