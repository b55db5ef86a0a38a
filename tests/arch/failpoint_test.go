package arch

import (
	"bytes"
	"go/ast"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cmdexec/cmdexec/libs/kit/failpoint"
)

const failpointDir = "libs/kit/failpoint"

// TestFailpointsAreUsedOnce: a moment that is listed and passed nowhere is never
// tested; one that is passed at two places is not a moment.
func TestFailpointsAreUsedOnce(t *testing.T) {
	tr := load(t)
	constants := map[string]string{} // name of the constant -> its value
	for _, f := range tr.source() {
		if f.dir != failpointDir {
			continue
		}
		for _, d := range f.ast.Decls {
			gen, ok := d.(*ast.GenDecl)
			if !ok || gen.Tok != token.CONST {
				continue
			}
			for _, s := range gen.Specs {
				spec := s.(*ast.ValueSpec)
				if typ, ok := spec.Type.(*ast.Ident); !ok || typ.Name != "Name" {
					continue
				}
				constants[spec.Names[0].Name] = strings.Trim(spec.Values[0].(*ast.BasicLit).Value, `"`)
			}
		}
	}
	values := map[string]bool{}
	for name, value := range constants {
		if values[value] {
			t.Errorf("%s: %s is another failpoint's name too", name, value)
		}
		values[value] = true
	}
	for _, n := range failpoint.Names() {
		if !values[string(n)] {
			t.Errorf("failpoint.Names has %s, which is no constant", n)
		}
	}
	if have := len(failpoint.Names()); have != len(constants) || have == 0 {
		t.Errorf("failpoint.Names has %d names, there are %d constants", have, len(constants))
	}

	used := map[string][]string{}
	for _, f := range tr.files {
		local := f.importName(prefix + failpointDir)
		if local == "" || f.inTests() {
			continue
		}
		calls := 0
		ast.Inspect(f.ast, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok || !isSelector(call.Fun, local, "At") {
				return true
			}
			calls++
			arg, ok := call.Args[0].(*ast.SelectorExpr)
			if !ok || !isSelector(arg, local, arg.Sel.Name) || constants[arg.Sel.Name] == "" {
				t.Errorf("%s: a failpoint has one of the names of %s, as a constant", tr.at(call.Pos()), failpointDir)
				return true
			}
			used[arg.Sel.Name] = append(used[arg.Sel.Name], tr.at(call.Pos()))
			return true
		})
		refers := 0
		f.uses(prefix+failpointDir, func(name string, _ token.Pos) {
			if name != "At" && name != "Check" {
				refers++
			}
		})
		if refers != calls {
			t.Errorf("%s uses names of failpoints beside failpoint.At", f.path)
		}
	}
	for name := range constants {
		if len(used[name]) != 1 {
			t.Errorf("failpoint %s is passed at %d places of the code, %v: it must be one", name, len(used[name]), used[name])
		}
	}
}

func isSelector(e ast.Expr, pkg, name string) bool {
	sel, ok := e.(*ast.SelectorExpr)
	if !ok || sel.Sel.Name != name {
		return false
	}
	id, ok := sel.X.(*ast.Ident)
	return ok && id.Name == pkg
}

// TestFailpointsAreNotReleased builds a service as `make build` does, and with
// the tag: only the second may know of failpoints, and must refuse a name that
// does not exist.
func TestFailpointsAreNotReleased(t *testing.T) {
	root := load(t).root
	build := func(tags string) (path string, knows bool) {
		path = filepath.Join(t.TempDir(), "scheduler")
		cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-tags="+tags, "-ldflags=-s -w", "-o", path, "./services/scheduler/cmd/scheduler")
		cmd.Dir, cmd.Env = root, append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		binary, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, trace := range []string{"FAILPOINT", string(failpoint.SchedulerAssigned), "failpoint.killSelf", "failpoint.parse"} {
			if bytes.Contains(binary, []byte(trace)) {
				t.Logf("tags %q: the program contains %q", tags, trace)
				knows = true
			}
		}
		return path, knows
	}
	if _, knows := build(""); knows {
		t.Error("a program without the tag has code of failpoints")
	}
	armed, knows := build("failpoint")
	if !knows {
		t.Fatal("a program with the tag has no trace of failpoints: the test finds nothing")
	}
	cmd := exec.Command(armed)
	cmd.Env = []string{"FAILPOINT=scheduler.assinged:kill"}
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), string(failpoint.SchedulerAssigned)) {
		t.Errorf("a name that does not exist: %v, %s", err, out)
	}

	makefile, err := os.ReadFile(filepath.Join(root, "Makefile"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(makefile)) {
		if strings.Contains(line, "go build") && strings.Contains(line, "-tags") && !strings.Contains(line, "$(FAILPOINT_BIN)") {
			t.Errorf("the Makefile builds something else with a tag: %s", line)
		}
	}
}
