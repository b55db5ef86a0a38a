package e2e

import (
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestTypeScript generates types from the document that an instance serves, and
// compiles a program that uses them.
func TestTypeScript(t *testing.T) {
	onlyUp(t) // the document is the same everywhere
	npm, err := exec.LookPath("npm")
	if err != nil {
		t.Skip("requires npm: it is not in PATH")
	}
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS("typescript")); err != nil {
		t.Fatal(err)
	}
	run := func(name string, args ...string) ([]byte, error) {
		cmd := exec.CommandContext(t.Context(), name, args...)
		cmd.Dir = dir
		return cmd.CombinedOutput()
	}
	if out, err := run(npm, "ci", "--no-audit", "--no-fund", "--ignore-scripts"); err != nil {
		t.Skipf("requires npm: the packages cannot be had: %v %s", err, out)
	}

	s := startSystem(t, upOptions{executor: "none"})
	resp, err := http.Get("http://" + s.addr + "/openapi.json")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	document, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%s, %v", resp.Status, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "openapi.json"), document, 0o600); err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(dir, "node_modules", ".bin")
	if out, err := run(filepath.Join(bin, "openapi-typescript"), "openapi.json", "-o", "api.d.ts"); err != nil {
		t.Fatalf("the types cannot be generated: %v\n%s", err, out)
	}
	if out, err := run(filepath.Join(bin, "tsc"), "--project", "."); err != nil {
		t.Fatalf("the types do not compile: %v\n%s", err, out)
	}
}
