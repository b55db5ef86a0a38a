package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// write makes a tree of files below a new folder and returns the folder.
func write(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		path := filepath.Join(root, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// tree is a workspace in which app imports mid, mid's test imports base, and
// app still requires old, which it no longer imports.
func tree(t *testing.T) string {
	return write(t, map[string]string{
		"go.work":          "go 1.26.0\n\nuse (\n\t./svc/app\n\t./libs/mid\n\t./libs/base\n\t./libs/old\n)\n",
		"libs/base/go.mod": "module example.test/x/libs/base\n\ngo 1.26.0\n",
		"libs/base/b.go":   "// Package base is the bottom.\npackage base\n",
		"libs/old/go.mod":  "module example.test/x/libs/old\n\ngo 1.26.0\n",
		"libs/old/o.go":    "// Package old is unused.\npackage old\n",
		"libs/mid/go.mod":  "module example.test/x/libs/mid\n\ngo 1.25.0\n",
		"libs/mid/m.go":    "// Package mid is the middle.\npackage mid\n",
		"libs/mid/m_test.go": "package mid_test\n\nimport (\n\t\"testing\"\n\n\t_ \"example.test/x/libs/base\"\n)\n\n" +
			"func TestNothing(t *testing.T) { t.Skip(\"only here for its import\") }\n",
		"svc/app/go.mod": "module example.test/x/svc/app\n\ngo 1.26.0\n\nrequire example.test/x/libs/old v0.0.0\n\n" +
			"replace example.test/x/libs/old => ../../libs/old\n",
		"svc/app/main.go":            "// Command app runs.\npackage main\n\nimport _ \"example.test/x/libs/mid\"\n\nfunc main() {}\n",
		"svc/app/testdata/broken.go": "this is no Go",
	})
}

func modsync(args ...string) (code int, out string) {
	var b bytes.Buffer
	code = run(args, &b, &b)
	return code, b.String()
}

func read(t *testing.T, root, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, filepath.FromSlash(name)))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestCheckNamesTheModulesAndTouchesNothing(t *testing.T) {
	root := tree(t)
	app, mid := read(t, root, "svc/app/go.mod"), read(t, root, "libs/mid/go.mod")

	code, out := modsync("-root", root, "-check")

	if code != 1 {
		t.Errorf("exit code %d, want 1\n%s", code, out)
	}
	for _, want := range []string{"svc/app: go.mod out of step", "libs/mid: go.mod out of step", "make mod-sync"} {
		if !strings.Contains(out, want) {
			t.Errorf("output lacks %q:\n%s", want, out)
		}
	}
	if strings.Contains(out, "libs/base") {
		t.Errorf("libs/base is in step but is named:\n%s", out)
	}
	if read(t, root, "svc/app/go.mod") != app || read(t, root, "libs/mid/go.mod") != mid {
		t.Error("-check changed a go.mod")
	}
}

func TestSyncWritesTheClosureAndIsIdempotent(t *testing.T) {
	root := tree(t)
	if code, out := modsync("-root", root); code != 0 {
		t.Fatalf("exit code %d\n%s", code, out)
	}

	mid := read(t, root, "libs/mid/go.mod")
	for _, want := range []string{"go 1.26.0", "example.test/x/libs/base v0.0.0", "example.test/x/libs/base => ../base"} {
		if !strings.Contains(mid, want) {
			t.Errorf("libs/mid/go.mod lacks %q:\n%s", want, mid)
		}
	}
	// base is reached through mid's test only: not built by app, but named in
	// mid's go.mod, so that app cannot load without replacing it as well.
	app := read(t, root, "svc/app/go.mod")
	for _, want := range []string{"example.test/x/libs/mid v0.0.0", "example.test/x/libs/mid => ../../libs/mid", "example.test/x/libs/base => ../../libs/base"} {
		if !strings.Contains(app, want) {
			t.Errorf("svc/app/go.mod lacks %q:\n%s", want, app)
		}
	}
	if strings.Contains(app, "libs/old") {
		t.Errorf("svc/app/go.mod keeps a module that nothing imports:\n%s", app)
	}
	if _, err := goCmd(filepath.Join(root, "svc", "app"), "build", "-o", os.DevNull, "."); err != nil {
		t.Errorf("svc/app does not build without the workspace: %v", err)
	}

	if code, out := modsync("-root", root, "-check"); code != 0 {
		t.Errorf("-check after a sync: exit code %d\n%s", code, out)
	}
	if code, out := modsync("-root", root); code != 0 || out != "" {
		t.Errorf("second sync: exit code %d, output %q", code, out)
	}
}

func TestOnlyTouchesOneModule(t *testing.T) {
	root := tree(t)
	mid := read(t, root, "libs/mid/go.mod")
	if code, out := modsync("-root", root, "-only", "svc/app"); code != 0 {
		t.Fatalf("exit code %d\n%s", code, out)
	}
	if read(t, root, "libs/mid/go.mod") != mid {
		t.Error("-only svc/app changed libs/mid")
	}
	if !strings.Contains(read(t, root, "svc/app/go.mod"), "libs/mid v0.0.0") {
		t.Error("svc/app was not synced")
	}
	if code, out := modsync("-root", root, "-only", "svc/none"); code != 1 || !strings.Contains(out, "no module of go.work") {
		t.Errorf("unknown folder: exit code %d\n%s", code, out)
	}
}

func TestBrokenFileStopsItsOwnModuleOnly(t *testing.T) {
	root := tree(t)
	if err := os.WriteFile(filepath.Join(root, "libs", "old", "half.go"), []byte("package old\n\nimport \""), 0o644); err != nil {
		t.Fatal(err)
	}
	code, out := modsync("-root", root)
	if code != 1 || !strings.Contains(out, "libs/old: ") {
		t.Errorf("exit code %d, want 1 and libs/old named:\n%s", code, out)
	}
	if !strings.Contains(read(t, root, "svc/app/go.mod"), "libs/mid v0.0.0") {
		t.Error("svc/app was not synced")
	}
}

func TestMissingLocalPackageIsNamed(t *testing.T) {
	root := tree(t)
	src := "package old\n\nimport (\n\t_ \"example.test/x/libs/base/later\"\n\t_ \"example.test/x/libs/none\"\n)\n"
	if err := os.WriteFile(filepath.Join(root, "libs", "old", "early.go"), []byte(src), 0o644); err != nil {
		t.Fatal(err)
	}
	code, out := modsync("-root", root, "-only", "libs/old")
	if code != 1 {
		t.Errorf("exit code %d, want 1", code)
	}
	for _, want := range []string{
		"libs/old: imports example.test/x/libs/base/later, which has no Go files",
		"imports example.test/x/libs/none, which is in no module of go.work",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("output lacks %q:\n%s", want, out)
		}
	}
	// What can be done is done, so that the rest of the work can go on.
	if !strings.Contains(read(t, root, "libs/old/go.mod"), "libs/base => ../base") {
		t.Error("the replace was not written")
	}
}
