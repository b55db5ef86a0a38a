package docker_test

import (
	"testing"

	"github.com/cmdexec/cmdexec/services/worker/internal/docker"
)

func TestWarm(t *testing.T) {
	engine(t)
	x := newExecutor(t, warmly)
	r := run(t, x, shell("echo out; echo err >&2; exit 3"))
	if !r.Warm || r.code() != 3 || r.out != "out\n" || r.errs != "err\n" {
		t.Fatal(r)
	}
	_ = docker.Waiting(x)
}
