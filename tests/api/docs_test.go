package api

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

const patience = 60 * time.Second

func binary(t *testing.T) string {
	t.Helper()
	dir := os.Getenv("CMDEXEC_BIN_DIR")
	if dir == "" {
		dir = "../../bin"
	}
	path, err := filepath.Abs(filepath.Join(dir, "cmdexec"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%s is not built: run the tests by `make test`", path)
	}
	return path
}

// up starts a server of its own and returns its address, and the environment in
// which its secrets are known.
func up(t *testing.T, bin string) (server string, env []string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := ln.Addr().String()
	_ = ln.Close()
	dir := t.TempDir()
	env = append(os.Environ(),
		"XDG_CONFIG_HOME="+filepath.Join(dir, "config"),
		"JWT_SECRET=q7Rf2sVx9TzB4nKd8LmW3pHc6JyG1aUe", "WORKER_TOKEN_SECRET=Zx5Cv8Bn2Mq7Ws4Ed9Rf3Tg6Yh1Uj0Ik",
	)
	var log bytes.Buffer
	cmd := exec.CommandContext(context.WithoutCancel(t.Context()), bin, "up", "--listen", addr, "--data-dir", filepath.Join(dir, "data"), "--executor", "process")
	cmd.Env, cmd.Dir, cmd.Stdout, cmd.Stderr = env, dir, &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil || t.Failed() {
			t.Logf("the server ended with %v and said:\n%s", err, log.String())
		}
	})
	server = "http://" + addr
	client := &http.Client{Timeout: time.Second}
	for deadline := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		if resp, err := client.Get(server + "/api/health"); err == nil {
			_ = resp.Body.Close()
			return server, env
		}
		if time.Now().After(deadline) {
			t.Fatal("the server does not answer")
		}
	}
}

func mint(t *testing.T, bin string, env []string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), bin, append([]string{"token", "user"}, args...)...)
	cmd.Env = env
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

var example = regexp.MustCompile("(?ms)^```sh run\n(.*?)^```\n(?:```text\n(.*?)^```\n)?")

// TestExamples runs each example in one shell, one after the other, and looks
// in what it prints for the lines that the page shows, in their order.
func TestExamples(t *testing.T) {
	if _, err := exec.LookPath("curl"); err != nil {
		t.Skip("requires curl: it is not in PATH")
	}
	page, err := os.ReadFile("../../docs/api.md")
	if err != nil {
		t.Fatal(err)
	}
	found := example.FindAllStringSubmatch(string(page), -1)
	if want := strings.Count(string(page), "```sh run"); len(found) != want || want < 15 {
		t.Fatalf("%d of %d examples could be read", len(found), want)
	}
	bin := binary(t)
	server, env := up(t, bin)
	sh := startShell(t, append(env, "SERVER="+server, "TOKEN="+mint(t, bin, env, "--name", "ann"), "ADMIN="+mint(t, bin, env, "--name", "root", "--role", "admin")))
	for i, m := range found {
		out := sh.run(t, m[1])
		rest := out
		for line := range strings.Lines(m[2]) {
			line = strings.TrimSuffix(line, "\n")
			at := regexp.MustCompile(pattern(line)).FindStringIndex(rest)
			if at == nil {
				t.Fatalf("example %d:\n%s\nprinted:\n%s\nwithout, in its place:\n%s", i+1, m[1], out, line)
			}
			rest = rest[at[1]:] // the next may be on the same line
		}
	}
}

// pattern makes an expression of a line in which ... stands for anything.
func pattern(line string) string {
	line = strings.TrimSuffix(strings.TrimPrefix(line, "..."), "...")
	parts := strings.Split(line, "...")
	for i := range parts {
		parts[i] = regexp.QuoteMeta(parts[i])
	}
	return strings.Join(parts, `.*?`)
}

// shell is one bash that runs piece after piece.
type shell struct {
	in  io.Writer
	out *output
}

// output collects what is printed.
type output struct {
	text chan []byte
}

func (o *output) Write(p []byte) (int, error) {
	o.text <- bytes.Clone(p)
	return len(p), nil
}

func startShell(t *testing.T, env []string) *shell {
	t.Helper()
	cmd := exec.CommandContext(context.WithoutCancel(t.Context()), "bash", "-uo", "pipefail")
	cmd.Env, cmd.Dir = env, t.TempDir()
	out := &output{text: make(chan []byte, 1024)}
	cmd.Stdout, cmd.Stderr = out, out
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = in.Close()
		_ = cmd.Process.Kill()
		go func() {
			for range out.text { // whoever still writes must not hang
			}
		}()
		_ = cmd.Wait()
		close(out.text)
	})
	return &shell{in: in, out: out}
}

// run returns what a piece prints; it fails where its last command does.
func (s *shell) run(t *testing.T, piece string) string {
	t.Helper()
	const mark = "--the-end-of-this-example--"
	if _, err := fmt.Fprintf(s.in, "%s\nprintf '\\n%s%%d\\n' $?\n", piece, mark); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	late := time.After(patience)
	for {
		select {
		case p := <-s.out.text:
			out.Write(p)
		case <-late:
			t.Fatalf("this does not end:\n%s\nIt printed:\n%s", piece, out.String())
		}
		if text, status, ok := strings.Cut(out.String(), "\n"+mark); ok && strings.HasSuffix(status, "\n") {
			if strings.TrimSpace(status) != "0" {
				t.Fatalf("this ends with status %s:\n%s\nIt printed:\n%s", strings.TrimSpace(status), piece, text)
			}
			return text
		}
	}
}
