package e2e

import (
	"bytes"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

// planted are the secrets of everything under test. What any process prints or
// answers in any test is searched for them, and so is every file that is left.
var planted = canaries{secrets: map[string]bool{jwtSecret: true, workerSecret: true, natsPassword: true, unusedPassword: true}}

// unusedPassword is in addresses at which nobody answers.
const unusedPassword = "e2e-canary-3c90d7be51"

type canaries struct {
	mu      sync.Mutex
	secrets map[string]bool
}

func (c *canaries) add(secret string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.secrets[secret] = true
}

// find returns a secret that the text has, or nothing.
func (c *canaries) find(text []byte) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	for secret := range c.secrets {
		if bytes.Contains(text, []byte(secret)) {
			return secret
		}
	}
	return ""
}

// signature is the part of a token that makes it one.
func signature(token string) string { return token[strings.LastIndexByte(token, '.')+1:] }

// keepers are the files that hold secrets because they are there for that.
var keepers = []string{"nats.conf", "context.json", "secrets.json", "worker-token"}

// noSecretsIn searches the files that an instance left: streams, databases,
// spools, working folders.
func noSecretsIn(t testing.TB, dir string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if slices.Contains(keepers, d.Name()) {
			if info.Mode().Perm()&0o077 != 0 {
				t.Errorf("%s holds secrets and has the mode %v", d.Name(), info.Mode().Perm())
			}
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if secret := planted.find(data); secret != "" {
			t.Errorf("%s has the secret %s", path, secret)
		}
		return nil
	})
	if err != nil {
		t.Errorf("search the files that are left: %v", err)
	}
}

// TestSecrets looks where the other tests do not: at addresses that are wrong,
// requests with bad tokens, command lines and metrics.
func TestSecrets(t *testing.T) {
	s := startSystem(t, upOptions{executor: "process", slots: 2})
	ann := s.user("ann")
	ann.ended(ann.submit(shell("env; for p in /proc/[0-9]*; do tr '\\0' '\\n' < $p/environ; done 2>/dev/null | grep -c . ; true")).JobID)

	t.Run("a command does not inherit the worker's", func(t *testing.T) {
		j := ann.ended(ann.submit(shell("env")).JobID)
		if out := ann.output(j.JobID, "stdout"); planted.find([]byte(out)) != "" || !strings.Contains(out, "CMDEXEC_JOB_ID=") {
			t.Errorf("its environment is %q", out)
		}
	})

	t.Run("refused tokens are not repeated", func(t *testing.T) {
		for _, header := range []http.Header{
			{"Authorization": {"Bearer " + unusedPassword}},
			{"Authorization": {"Basic " + unusedPassword}},
			{"X-Worker-Token": {unusedPassword}},
		} {
			for _, path := range []string{"/api/jobs", "/api/workers/connect", "/api/jobs/get-job?waitSeconds=0", "/api/jobs/" + unusedPassword, "/nowhere?token=" + unusedPassword} {
				req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, ann.url+path, nil)
				if err != nil {
					t.Fatal(err)
				}
				req.Header = header
				resp, err := http.DefaultClient.Do(req)
				if err != nil {
					t.Fatal(err)
				}
				var body bytes.Buffer
				_, err = body.ReadFrom(resp.Body)
				resp.Body.Close()
				if err != nil {
					t.Fatal(err)
				}
				if secret := planted.find(body.Bytes()); secret != "" {
					t.Errorf("%s with %v answers %s", path, header, &body)
				}
			}
		}
	})

	t.Run("command lines and metrics", func(t *testing.T) {
		files, err := filepath.Glob("/proc/[0-9]*/cmdline")
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			data, err := os.ReadFile(file)
			if err != nil {
				continue // it has ended
			}
			if secret := planted.find(data); secret != "" {
				t.Errorf("the secret %s is in the command line %q", secret, data)
			}
		}
		if *formFlag == "compose" {
			return // admin ports are not published
		}
		resp, err := http.Get("http://" + s.form.admin("api-gateway") + "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		var body bytes.Buffer
		if _, err := body.ReadFrom(resp.Body); err != nil {
			t.Fatal(err)
		}
		if secret := planted.find(body.Bytes()); secret != "" || body.Len() == 0 {
			t.Errorf("metrics of %d bytes have the secret %q", body.Len(), secret)
		}
	})

	// Wrong addresses: whatever a service says of them, its output is searched by startProgram.
	t.Run("addresses with passwords", func(t *testing.T) {
		nowhere := freeAddr(t)
		secrets := []string{"JWT_SECRET=" + jwtSecret, "WORKER_TOKEN_SECRET=" + workerSecret}
		for name, env := range map[string][]string{
			"api-gateway, NATS away":           {"NATS_URL=nats://u:" + unusedPassword + "@" + nowhere},
			"api-gateway, NATS address wrong":  {"NATS_URL=nats//u:" + unusedPassword + "@x:y"},
			"scheduler, NATS address wrong":    {"NATS_URL=ws:/u:" + unusedPassword + "@%zz"},
			"worker-edge, Redis address wrong": {"NATS_URL=nats://" + nowhere, "REDIS_URL=redis//:" + unusedPassword + "@%zz"},
			"api-gateway, Redis address wrong": {"NATS_URL=nats://" + nowhere, "REDIS_URL=http://:" + unusedPassword + "@x"},
			"api-gateway, secret too short":    {"NATS_URL=nats://" + nowhere, "JWT_SECRET=" + unusedPassword},
			"worker-edge, secret too short":    {"NATS_URL=nats://" + nowhere, "WORKER_TOKEN_SECRET=" + unusedPassword},
			"registry-persister, MongoDB away": {"NATS_URL=nats://" + nowhere, "MONGODB_URI=mongodb://u:" + unusedPassword + "@" + nowhere + "/x?serverSelectionTimeoutMS=200"},
			"result-collector, address wrong":  {"NATS_URL=nats://" + nowhere, "MONGODB_URI=mongodb://u:" + unusedPassword + "@x:notaport/x"},
			"worker, token is none":            {"SERVER_URL=http://" + nowhere, "EXECUTORS=process", "WORKER_TOKEN=" + unusedPassword},
			"worker, address with a password":  {"SERVER_URL=http://u:" + unusedPassword + "@" + nowhere, "EXECUTORS=process", "WORKER_TOKEN_SECRET=" + workerSecret},
			"cmdexec, bus apply to NATS away":  {"NATS_URL=nats://u:" + unusedPassword + "@" + nowhere},
		} {
			t.Run(name, func(t *testing.T) {
				service, _, _ := strings.Cut(name, ",")
				var args []string
				if service == "cmdexec" {
					args = []string{"bus", "apply"}
				}
				all := slices.Concat(secrets, []string{"ADMIN_ADDR=off", "LISTEN_ADDR=" + freeAddr(t), "DATA_DIR=" + t.TempDir(), "LOG_LEVEL=debug"}, env)
				p := startProgram(t, service, all, args...)
				eventually(t, service+" has said something", func() error {
					select {
					case <-p.done:
						return nil
					default:
					}
					if p.out.String() == "" {
						return os.ErrNotExist
					}
					return nil
				})
			})
		}
	})
}
