package deploy

import (
	"bytes"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

var kustomizations = []string{"k8s/base", "k8s/overlays/example"}

func render(t *testing.T, dir string) []byte {
	t.Helper()
	return output(t, exec.Command(tool(t, "kustomize"), "build", filepath.Join(root, filepath.FromSlash(dir))))
}

// object is the part of a manifest that the tests use.
type object struct {
	Kind     string `yaml:"kind"`
	Metadata struct {
		Name string `yaml:"name"`
	} `yaml:"metadata"`
	Data map[string]string `yaml:"data"`
	Spec struct {
		Selector struct {
			MatchLabels map[string]string `yaml:"matchLabels"`
		} `yaml:"selector"`
		Template struct {
			Metadata struct {
				Labels map[string]string `yaml:"labels"`
			} `yaml:"metadata"`
			Spec podSpec `yaml:"spec"`
		} `yaml:"template"`
		Rules []struct {
			HTTP struct {
				Paths []ingressPath `yaml:"paths"`
			} `yaml:"http"`
		} `yaml:"rules"`
	} `yaml:"spec"`
}

type ingressPath struct {
	Path     string `yaml:"path"`
	PathType string `yaml:"pathType"`
	Backend  struct {
		Service struct {
			Name string `yaml:"name"`
		} `yaml:"service"`
	} `yaml:"backend"`
}

type podSpec struct {
	AutomountToken  *bool `yaml:"automountServiceAccountToken"`
	Grace           int   `yaml:"terminationGracePeriodSeconds"`
	SecurityContext struct {
		RunAsNonRoot   bool `yaml:"runAsNonRoot"`
		SeccompProfile struct {
			Type string `yaml:"type"`
		} `yaml:"seccompProfile"`
	} `yaml:"securityContext"`
	Containers []struct {
		Name  string   `yaml:"name"`
		Image string   `yaml:"image"`
		Args  []string `yaml:"args"`
		Env   []struct {
			Name      string `yaml:"name"`
			Value     string `yaml:"value"`
			ValueFrom struct {
				Secret *struct {
					Name string `yaml:"name"`
					Key  string `yaml:"key"`
				} `yaml:"secretKeyRef"`
			} `yaml:"valueFrom"`
		} `yaml:"env"`
		Startup   *probe                    `yaml:"startupProbe"`
		Liveness  *probe                    `yaml:"livenessProbe"`
		Readiness *probe                    `yaml:"readinessProbe"`
		Resources map[string]map[string]any `yaml:"resources"`
		Ports     []struct {
			Name string `yaml:"name"`
			Port int    `yaml:"containerPort"`
		} `yaml:"ports"`
		SecurityContext struct {
			Escalation   *bool `yaml:"allowPrivilegeEscalation"`
			ReadOnlyRoot bool  `yaml:"readOnlyRootFilesystem"`
			Capabilities struct {
				Drop []string `yaml:"drop"`
			} `yaml:"capabilities"`
		} `yaml:"securityContext"`
	} `yaml:"containers"`
}

type probe struct {
	HTTP struct {
		Path string `yaml:"path"`
		Port string `yaml:"port"`
	} `yaml:"httpGet"`
}

func objects(t *testing.T, manifests []byte) []object {
	t.Helper()
	var out []object
	dec := yaml.NewDecoder(bytes.NewReader(manifests))
	for {
		var o object
		err := dec.Decode(&o)
		if err != nil {
			if len(out) < 10 {
				t.Fatalf("%d objects: %v", len(out), err)
			}
			return out
		}
		out = append(out, o)
	}
}

func TestManifestsAgainstSchemas(t *testing.T) {
	kubeconform, dir := tool(t, "kubeconform"), schemas(t)
	validate := func(manifests []byte) (string, error) {
		cmd := exec.Command(kubeconform, "-strict", "-summary", "-schema-location", dir+"/{{.ResourceKind}}{{.KindSuffix}}.json", "-")
		cmd.Stdin = bytes.NewReader(manifests)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	for _, k := range kustomizations {
		manifests := render(t, k)
		out, err := validate(manifests)
		if err != nil || !strings.Contains(out, "Skipped: 0") {
			t.Errorf("%s: %v\n%s", k, err, out)
		}
		t.Logf("%s: %s", k, out)
		// The schemas must be able to refuse.
		for old, wrong := range map[string]string{
			"terminationGracePeriodSeconds: ": "terminationGracePeriod: ", "containerPort: 3000": "containerPort: three", "replicas: 2": "replicas: two",
		} {
			if bad := bytes.Replace(manifests, []byte(old), []byte(wrong), 1); bytes.Equal(bad, manifests) {
				t.Errorf("%s has no %q", k, old)
			} else if _, err := validate(bad); err == nil {
				t.Errorf("%s is valid with %q", k, wrong)
			}
		}
	}
}

// Kubernetes sets these names: what a Secret must have.
var secretKeys = []string{"JWT_SECRET", "WORKER_TOKEN_SECRET", "NATS_URL", "NATS_PASSWORD", "MONGODB_URI", "MONGO_PASSWORD", "REDIS_URL"}

func TestManifests(t *testing.T) {
	longest := map[string]int{"worker-edge": 45, "worker": 55} // seconds that a stop may take; the others 30
	for _, k := range kustomizations {
		found := map[string]bool{}
		for _, o := range objects(t, render(t, k)) {
			pod := o.Spec.Template.Spec
			if len(pod.Containers) != 1 {
				continue
			}
			c, name := pod.Containers[0], o.Metadata.Name
			where := k + ": " + name
			found[name] = true
			ours := strings.Contains(c.Image, "cmdexec/")
			if pod.AutomountToken == nil || *pod.AutomountToken || !pod.SecurityContext.RunAsNonRoot || pod.SecurityContext.SeccompProfile.Type != "RuntimeDefault" ||
				c.SecurityContext.Escalation == nil || *c.SecurityContext.Escalation || !slices.Equal(c.SecurityContext.Capabilities.Drop, []string{"ALL"}) ||
				name != "mongo" && !c.SecurityContext.ReadOnlyRoot {
				t.Errorf("%s is not restricted", where)
			}
			if c.Resources["requests"]["cpu"] == nil || c.Resources["requests"]["memory"] == nil || c.Resources["limits"]["memory"] == nil {
				t.Errorf("%s has no resources", where)
			}
			var env []string
			for _, e := range c.Env {
				env = append(env, e.Name)
				if s := e.ValueFrom.Secret; s != nil && (s.Name != "cmdexec" || !slices.Contains(secretKeys, s.Key)) {
					t.Errorf("%s: the secret %s has no key %s", where, s.Name, s.Key)
				} else if s == nil && slices.Contains(secretKeys, e.Name) {
					t.Errorf("%s: %s is not in a secret", where, e.Name)
				}
			}
			switch {
			case !ours:
			case name == "topology":
				checkTopology(t, where, env)
				if !slices.Equal(c.Args, []string{"bus", "apply"}) {
					t.Errorf("%s runs %v", where, c.Args)
				}
			default:
				checkNames(t, where, name, env)
				if name == "registry-persister" || name == "result-collector" {
					checkDatabase(t, where, env)
				}
				for what, p := range map[*probe]string{c.Startup: "/livez", c.Liveness: "/livez", c.Readiness: "/readyz"} {
					if what == nil || what.HTTP.Path != p || what.HTTP.Port != "admin" {
						t.Errorf("%s: the probe for %s asks %+v", where, p, what)
					}
				}
				for _, e := range c.Env {
					for _, p := range c.Ports {
						if e.Name == "ADMIN_ADDR" && p.Name == "admin" && !strings.HasSuffix(e.Value, ":"+strconv.Itoa(p.Port)) ||
							e.Name == "LISTEN_ADDR" && p.Name == "http" && !strings.HasSuffix(e.Value, ":"+strconv.Itoa(p.Port)) {
							t.Errorf("%s: %s is %s, the port %s %d", where, e.Name, e.Value, p.Name, p.Port)
						}
					}
				}
				if stop := max(30, longest[name]); pod.Grace <= stop {
					t.Errorf("%s is killed after %d s, a stop may take %d s", where, pod.Grace, stop)
				}
			}
		}
		for _, program := range append([]string{"nats", "topology"}, programs...) {
			if !found[program] {
				t.Errorf("%s has no %s", k, program)
			}
		}
	}
}

// workerRoutes are those that the edge serves (docs/protocol.md).
var workerRoutes = []string{
	"/api/jobs/check-cancel", "/api/jobs/get-job", "/api/jobs/stream-output", "/api/jobs/submit-result",
	"/api/workers/connect", "/api/workers/heartbeat", "/api/workers/register",
}

func TestIngressPaths(t *testing.T) {
	for _, k := range kustomizations {
		var edge []string
		rest := 0
		for _, o := range objects(t, render(t, k)) {
			for _, rule := range o.Spec.Rules {
				for _, p := range rule.HTTP.Paths {
					switch {
					case p.Backend.Service.Name == "worker-edge" && p.PathType == "Exact":
						edge = append(edge, p.Path)
					case p.Backend.Service.Name == "api-gateway" && p.PathType == "Prefix" && p.Path == "/":
						rest++
					default:
						t.Errorf("%s: path %+v", k, p)
					}
				}
			}
		}
		if slices.Sort(edge); !slices.Equal(edge, workerRoutes) || rest != 1 {
			t.Errorf("%s: the edge gets %v, the gateway %d paths", k, edge, rest)
		}
	}
}

// Both ways of deployment have the same NATS.
func TestOneNATSConfiguration(t *testing.T) {
	a, err := os.ReadFile(filepath.Join(root, "deploy", "nats", "nats.conf"))
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range kustomizations {
		seen := map[string]bool{}
		for _, o := range objects(t, render(t, k)) {
			if conf, ok := o.Data["nats.conf"]; ok {
				seen[o.Metadata.Name] = conf == string(a)
			}
		}
		if same := slices.Collect(maps.Values(seen)); !slices.Equal(same, []bool{true}) {
			t.Errorf("%s: nats.conf is not that of deploy/nats: cp deploy/nats/nats.conf k8s/base/", k)
		}
	}
}
