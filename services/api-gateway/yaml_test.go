package gateway

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/kit/auth"
)

func TestYAML(t *testing.T) {
	e := start(t, nil)
	ann := token(t, "ann", auth.RoleUser)
	const asYAML = `
# A job.
command: [sh, -c, "echo hi"]
timeout: 60
labels: {team: x, answer: yes}
env:
  PORT: "8080"
files:
  - path: run.sh
    mode: 0755
    content: |
      echo one
      echo two
retry:
  maxAttempts: 3
  onExitCodes: [75]
priority: 0
`
	const asJSON = `{"command":["sh","-c","echo hi"],"timeout":60,"labels":{"team":"x","answer":"yes"},"env":{"PORT":"8080"},
		"files":[{"path":"run.sh","mode":"0755","content":"echo one\necho two\n"}],"retry":{"maxAttempts":3,"onExitCodes":[75]},"priority":0}`
	want := e.do("POST", "/api/jobs/create", ann, asJSON).job(t)
	for _, media := range []string{"application/yaml", "application/x-yaml", "text/yaml; charset=utf-8", "text/x-yaml"} {
		a := e.do("POST", "/api/jobs/create", ann, asYAML, "Content-Type", media)
		require.Equal(t, 201, a.status, "%s: %s", media, a.body)
		require.Equal(t, want.Spec, a.job(t).Spec, media)
	}
	// Under a key the two are the same job.
	require.Equal(t, 201, e.do("POST", "/api/jobs/create", ann, asJSON, "Idempotency-Key", "k").status)
	require.Equal(t, 200, e.do("POST", "/api/jobs/create", ann, asYAML, "Idempotency-Key", "k", "Content-Type", "application/yaml").status)

	for name, c := range map[string]struct {
		body, media string
		status      int
		code        string
	}{
		"empty":         {" ", "application/yaml", 400, "bad_yaml"},
		"text":          {"canary4242", "application/yaml", 400, "bad_yaml"},
		"sequence":      {"- command: x", "application/yaml", 400, "bad_yaml"},
		"two documents": {"command: x\n---\ncommand: y", "application/yaml", 400, "bad_yaml"},
		"duplicate":     {"command: canary4242\ncommand: y", "application/yaml", 400, "bad_yaml"},
		"alias":         {"command: x\nenv: {A: &a canary4242, B: *a}", "application/yaml", 400, "bad_yaml"},
		"merge":         {"command: x\n<<: {timeout: 5}", "application/yaml", 400, "bad_yaml"},
		"tag":           {"command: !!str canary4242", "application/yaml", 400, "bad_yaml"},
		"deep":          {"command: " + strings.Repeat("[", 5000), "application/yaml", 400, "bad_yaml"},
		"utf-8":         {"command: \xff", "application/yaml", 400, "bad_yaml"},
		"nul":           {`command: "\0"`, "application/yaml", 400, "bad_json"},
		"unknown":       {"command: x\ntimout: 5", "application/yaml", 422, "unknown_field"},
		"unknown below": {"command: x\nretry: {max: 5}", "application/yaml", 422, "unknown_field"},
		"unsupported":   {"command: x\nwebhook: {url: http://canary4242}", "application/yaml", 422, "unsupported_field"},
		"number in env": {"command: x\nenv: {PORT: 4242}", "application/yaml", 422, "invalid_field"},
		"text timeout":  {"command: x\ntimeout: canary4242", "application/yaml", 422, "invalid_field"},
		"no command":    {"timeout: 5", "application/yaml", 422, "invalid_job"},
		"latin1":        {"command: x", "application/yaml; charset=latin1", 415, "unsupported_media_type"},
		"too large":     {"command: x\nstdin: " + strings.Repeat("x", maxYAMLBody), "application/yaml", 413, "body_too_large"},
	} {
		for _, path := range []string{"/api/jobs/create", "/api/execute"} {
			a := e.do("POST", path, ann, c.body, "Content-Type", c.media)
			require.Equal(t, c.code, a.problem(t).Code, "%s: %s", name, a.body)
			require.Equal(t, c.status, a.status, name)
			require.NotContains(t, string(a.body), "4242", name)
		}
	}
	for _, path := range []string{"/api/jobs/cancel", "/api/jobs/batch", "/api/jobs/rerun", "/api/jobs/cancel-batch"} {
		require.Equal(t, 415, e.do("POST", path, ann, "jobId: x", "Content-Type", "application/yaml").status, path)
	}
	for range maxYAMLs {
		e.svc.yamls <- struct{}{}
	}
	require.Equal(t, "busy", e.do("POST", "/api/jobs/create", ann, asYAML, "Content-Type", "text/yaml").problem(t).Code)
	require.Equal(t, 201, e.do("POST", "/api/jobs/create", ann, asJSON).status, "JSON does not wait for YAML")
}
