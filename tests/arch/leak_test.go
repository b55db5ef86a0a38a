package arch

import (
	"go/ast"
	"slices"
	"testing"
)

// TestGoroutinesAreAccountedFor: tests of a package that starts goroutines end by
// looking for those that are left (goleak). What leaks in a test leaks in a service
// for as long as it runs. A package without tests is looked after by those of the
// packages that use it.
func TestGoroutinesAreAccountedFor(t *testing.T) {
	tr := load(t)
	starts := map[string]string{} // folder -> where
	tested, verified := map[string]bool{}, map[string]bool{}
	for _, f := range tr.files {
		if f.test {
			tested[f.dir] = true
			verified[f.dir] = verified[f.dir] || f.importName("go.uber.org/goleak") != ""
			continue
		}
		if _, ok := starts[f.dir]; ok {
			continue
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.GoStmt:
				starts[f.dir] = tr.at(n.Pos())
			case *ast.CallExpr: // of a sync.WaitGroup or an errgroup.Group
				if sel, ok := n.Fun.(*ast.SelectorExpr); ok && sel.Sel.Name == "Go" && len(n.Args) == 1 {
					starts[f.dir] = tr.at(n.Pos())
				}
			}
			return true
		})
	}
	var dirs []string
	untested := 0
	for dir := range starts {
		switch {
		case !tested[dir]:
			untested++
		case !verified[dir]:
			dirs = append(dirs, dir)
		}
	}
	slices.Sort(dirs)
	for _, dir := range dirs {
		t.Errorf("%s starts goroutines (%s), and its tests do not look for those that are left: add func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }", dir, starts[dir])
	}
	t.Logf("%d packages start goroutines, %d of them have no tests of their own", len(starts), untested)
}
