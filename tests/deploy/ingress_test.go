package deploy

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// startNginx runs nginx with the configuration of deploy/ingress, with other
// addresses only, and returns where it listens.
func startNginx(t *testing.T, gateway, edge string) string {
	t.Helper()
	program, err := exec.LookPath("nginx")
	if err != nil {
		t.Skip("requires nginx: it is not in PATH")
	}
	text, err := os.ReadFile(filepath.Join(root, "deploy", "ingress", "nginx.conf"))
	if err != nil {
		t.Fatal(err)
	}
	dir, addr := t.TempDir(), freeAddr(t)
	config := string(text)
	for old, other := range map[string]string{
		"listen 8080;": "listen " + addr + ";", "resolver 127.0.0.11 valid=2s ipv6=off;": "", "/tmp/": dir + "/",
		`"api-gateway:3000"`: `"` + gateway + `"`, `"worker-edge:3001"`: `"` + edge + `"`,
	} {
		if !strings.Contains(config, old) {
			t.Fatalf("nginx.conf has no %q", old)
		}
		config = strings.ReplaceAll(config, old, other)
	}
	file := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(file, []byte("user root;\n"+config), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, "-p", dir, "-c", file, "-g", "daemon off;")
	var out strings.Builder
	cmd.Stderr = &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil || t.Failed() {
			t.Logf("nginx: %v\n%s", err, out.String())
		}
	})
	eventually(t, "nginx listens", func() error {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			return err
		}
		return conn.Close()
	})
	return addr
}

func freeAddr(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

// upstream answers with its name and what it was asked; /stream says one word and
// then waits.
func upstream(t *testing.T, name string) string {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Header.Get("Upgrade") == "websocket":
			conn, rw, err := http.NewResponseController(w).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			fmt.Fprint(rw, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
			_ = rw.Flush()
			line, _ := rw.ReadString('\n')
			fmt.Fprintf(rw, "%s says %s", name, line)
			_ = rw.Flush()
		case r.URL.Path == "/stream":
			fmt.Fprintln(w, "word")
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
		default:
			n, _ := io.Copy(io.Discard, r.Body)
			fmt.Fprintf(w, "%s %s %s host=%s for=%s body=%d", name, r.Method, r.URL.RequestURI(), r.Host, r.Header.Values("X-Forwarded-For"), n)
		}
	}))
	t.Cleanup(server.Close)
	return strings.TrimPrefix(server.URL, "http://")
}

func TestIngress(t *testing.T) {
	gateway, edge := upstream(t, "gateway"), upstream(t, "edge")
	addr := startNginx(t, gateway, edge)
	client := &http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true}}
	ask := func(method, path, body string) string {
		t.Helper()
		req, err := http.NewRequest(method, "http://"+addr+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("X-Forwarded-For", "6.6.6.6")
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}

	for _, path := range append(slices.Clone(workerRoutes), "/", "/api/jobs", "/api/jobs/create", "/api/workers/list", "/api/workers/drain",
		"/api/workers/connect/", "/api/workers/connected", "/API/workers/connect", "/x/api/workers/connect", "/api/jobs/get-job/logs", "/api/jobs/get-jobs") {
		want := "gateway"
		if slices.Contains(workerRoutes, path) {
			want = "edge"
		}
		want += fmt.Sprintf(" GET %s?a=%%2F host=%s for=[127.0.0.1] body=0", path, addr)
		if got := ask(http.MethodGet, path+"?a=%2F", ""); got != want {
			t.Errorf("%s: %q, not %q", path, got, want)
		}
	}
	if got := ask(http.MethodPost, "/api/jobs/create", strings.Repeat("x", 3<<20)); !strings.HasSuffix(got, "body=3145728") {
		t.Errorf("a body of 3 MiB: %s", got)
	}

	t.Run("output passes at once", func(t *testing.T) {
		resp, err := client.Get("http://" + addr + "/stream")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if line, err := bufio.NewReader(resp.Body).ReadString('\n'); err != nil || line != "word\n" {
			t.Errorf("%q, %v", line, err)
		}
	})

	t.Run("a socket of a worker", func(t *testing.T) {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(conn, "GET /api/workers/connect HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", addr)
		r := bufio.NewReader(conn)
		resp, err := http.ReadResponse(r, nil)
		if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
			t.Fatalf("%v, %v", resp, err)
		}
		fmt.Fprintln(conn, "hello")
		if line, err := r.ReadString('\n'); err != nil || line != "edge says hello\n" {
			t.Errorf("%q, %v", line, err)
		}
	})

	t.Run("a service that is away", func(t *testing.T) {
		addr := startNginx(t, freeAddr(t), edge)
		resp, err := client.Get("http://" + addr + "/api/jobs")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusServiceUnavailable || resp.Header.Get("Content-Type") != "application/problem+json" || resp.Header.Get("Retry-After") == "" {
			t.Errorf("%s %v", resp.Status, resp.Header)
		}
	})
}
