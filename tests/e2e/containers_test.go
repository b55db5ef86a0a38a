package e2e

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/job"
)

// testImage is what .ci/docker.sh imports.
const testImage = "cmdexec-test/busybox:1"

// needDocker returns the address of an engine that answers and has the image.
func needDocker(t testing.TB) string {
	t.Helper()
	host := os.Getenv("DOCKER_HOST")
	socket, ok := strings.CutPrefix(host, "unix://")
	if !ok {
		t.Skip("requires docker: DOCKER_HOST names no unix socket; .ci/docker.sh starts an engine")
	}
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
	}}
	defer client.CloseIdleConnections()
	resp, err := client.Get("http://docker/images/" + testImage + "/json")
	if err != nil {
		t.Skipf("requires docker: the engine at %s does not answer: %v", host, err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Skipf("requires docker: the engine at %s does not have %s; .ci/docker.sh imports it", host, testImage)
	}
	return host
}

// TestContainers runs jobs in containers of a real engine, from the API to the
// recorded result.
func TestContainers(t *testing.T) {
	host := needDocker(t)
	s := startSystem(t, upOptions{executor: "docker", slots: 4, env: []string{"DOCKER_HOST=" + host}})
	ann := s.user("ann")
	in := func(command any, more map[string]any) map[string]any {
		return with(map[string]any{"command": command, "containerImage": testImage, "resources": small}, more)
	}

	t.Run("exit code, output and digest", func(t *testing.T) {
		j := ann.ended(ann.submit(in("echo out; echo err >&2; exit 3", nil)).JobID)
		if j.Status != job.Failed || j.ExitCode == nil || *j.ExitCode != 3 || !strings.HasPrefix(j.Attempts[0].ImageDigest, "sha256:") {
			t.Fatalf("ended %s %v %s, digest %q", j.Status, j.ExitCode, j.Reason, j.Attempts[0].ImageDigest)
		}
		if out, errs := ann.output(j.JobID, "stdout"), ann.output(j.JobID, "stderr"); out != "out\n" || errs != "err\n" {
			t.Errorf("stdout %q, stderr %q", out, errs)
		}
	})

	t.Run("hardened", func(t *testing.T) {
		script := `grep -E 'CapEff|NoNewPrivs|Seccomp:' /proc/self/status; id -u; touch /x 2>&1; ls /sys/class/net; env | grep -c SECRET; ls /var/run/docker.sock 2>&1`
		j := ann.ended(ann.submit(in(script, nil)).JobID)
		got := ann.output(j.JobID, "stdout")
		for _, want := range []string{"CapEff:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2", "65534\n", "Read-only file system", "lo\n0\n", "No such file"} {
			if !strings.Contains(got, want) {
				t.Errorf("no %q in %q", want, got)
			}
		}
	})

	t.Run("inputs", func(t *testing.T) {
		j := ann.ended(ann.submit(in("cat; cat a/b; echo $GREETING; pwd; echo more >> a/b && echo w > out && touch /tmp/x && cat out", map[string]any{
			"stdin": "stdin\n", "env": map[string]string{"GREETING": "hi"}, "files": []map[string]any{{"path": "a/b", "content": "file\n"}},
		})).JobID)
		if got := ann.output(j.JobID, "stdout"); got != "stdin\nfile\nhi\n/work\nw\n" {
			t.Errorf("printed %q (%s %s)", got, j.Reason, j.Message)
		}
	})

	t.Run("the working folder and /tmp are the command's", func(t *testing.T) {
		j := ann.ended(ann.submit(in("pwd; echo w > out && cat out; touch /tmp/x && echo tmp", nil)).JobID)
		if got := ann.output(j.JobID, "stdout"); got != "/work\nw\ntmp\n" {
			t.Errorf("printed %q, stderr %q", got, ann.output(j.JobID, "stderr"))
		}
	})

	t.Run("timeout and cancel", func(t *testing.T) {
		stubborn := "trap '' TERM; echo up; while :; do sleep 0.1; done"
		stop := map[string]any{"stop": map[string]any{"graceSeconds": 1}}
		late := ann.submit(in(stubborn, with(stop, map[string]any{"timeout": 1})))
		canceled := ann.submit(in(stubborn, stop))
		ann.running(canceled.JobID)
		ann.cancel(canceled.JobID)
		if j := ann.ended(canceled.JobID); j.Status != job.Canceled || j.Cancel == nil || j.Cancel.GoneAt == nil || j.Cancel.StopUnconfirmed {
			t.Errorf("canceled: %s, %+v", j.Status, j.Cancel)
		}
		if j := ann.ended(late.JobID); j.Status != job.TimedOut {
			t.Errorf("timed out: %s %s", j.Status, j.Reason)
		}
	})

	t.Run("out of memory", func(t *testing.T) {
		j := ann.ended(ann.submit(with(in(`exec awk 'BEGIN{s="xxxxxxxxxxxxxxxx"; while(1) s=s s}'`, nil), map[string]any{
			"resources": map[string]any{"cpu": 0.5, "memoryMb": 24},
		})).JobID)
		if j.Status != job.Failed || !j.OOMKilled || j.Reason != job.ReasonOOMKilled {
			t.Errorf("ended %s %s, oomKilled %t", j.Status, j.Reason, j.OOMKilled)
		}
	})

	t.Run("an image that cannot be had", func(t *testing.T) {
		j := ann.ended(ann.submit(with(in("true", nil), map[string]any{"containerImage": "nosuch.invalid/image:1", "pullPolicy": "never"})).JobID)
		if j.Status != job.Failed || j.Reason != job.ReasonStartFailed {
			t.Errorf("never: %s %s", j.Status, j.Reason)
		}
		pulled := ann.submit(with(in("true", nil), map[string]any{"containerImage": "127.0.0.1:1/image:1", "retry": map[string]any{"backoffSeconds": 0}}))
		j = ann.reaches(pulled.JobID, func(j api.Job) bool { return len(j.Attempts) > 0 && j.Attempts[0].Outcome != "" }, "has failed to pull")
		if a := j.Attempts[0]; a.Reason != job.ReasonImagePullFailed || a.ReasonClass != job.ClassInfra {
			t.Errorf("pull: %s %s", a.Outcome, a.Reason)
		}
		ann.cancel(pulled.JobID)
	})

	t.Run("process jobs do not fit", func(t *testing.T) {
		j := ann.submit(shell("true"))
		eventually(t, "explain says so", func() error {
			var ex api.Explain
			if err := ann.get("/api/jobs/"+j.JobID+"/explain", &ex); err != nil {
				return err
			}
			if !slices.ContainsFunc(ex.BlockedBy, func(b api.BlockReason) bool { return b.Reason == "no_executor" }) {
				return fmt.Errorf("blocked by %+v", ex.BlockedBy)
			}
			return nil
		})
		ann.cancel(j.JobID)
	})

	t.Run("by the CLI", func(t *testing.T) {
		if got := finish(t, s.cli("run", "--image", testImage, "--", "sh", "-c", "echo hi; exit 3")); got.code != 3 || got.out != "hi\n" {
			t.Errorf("%+v", got)
		}
	})
}
