package arch

import (
	"go/ast"
	"go/token"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// uses visits every use of pkg.Name for the import path pkg, called or not.
func (f *goFile) uses(importPath string, visit func(name string, pos token.Pos)) {
	local := f.importName(importPath)
	if local == "" || local == "_" {
		return
	}
	ast.Inspect(f.ast, func(n ast.Node) bool {
		if sel, ok := n.(*ast.SelectorExpr); ok {
			if id, ok := sel.X.(*ast.Ident); ok && id.Name == local && id.Obj == nil {
				visit(sel.Sel.Name, sel.Pos())
			}
		}
		return true
	})
}

func TestEnvironmentIsReadInConfigOnly(t *testing.T) {
	tr := load(t)
	for _, f := range tr.source() {
		if path.Base(f.dir) == "config" {
			continue
		}
		f.uses("os", func(name string, pos token.Pos) {
			switch name {
			case "Getenv", "LookupEnv", "Setenv", "Unsetenv", "ExpandEnv":
				t.Errorf("%s: os.%s outside a config package: what a program listens to must be listed in one place", tr.at(pos), name)
			}
		})
	}
}

func TestExitInMainOnly(t *testing.T) {
	tr := load(t)
	for _, f := range tr.files {
		if f.ast.Name.Name == "main" {
			continue
		}
		allowed := [2]token.Pos{}
		for _, d := range f.ast.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && f.test && fn.Name.Name == "TestMain" {
				allowed = [2]token.Pos{fn.Pos(), fn.End()}
			}
		}
		bad := func(what string, pos token.Pos) {
			if pos < allowed[0] || pos > allowed[1] {
				t.Errorf("%s: %s outside main: deferred cleanup is skipped, and the all-in-one would die with one part", tr.at(pos), what)
			}
		}
		f.uses("os", func(name string, pos token.Pos) {
			if name == "Exit" {
				bad("os.Exit", pos)
			}
		})
		f.uses("log", func(name string, pos token.Pos) {
			if strings.HasPrefix(name, "Fatal") {
				bad("log."+name, pos)
			}
		})
	}
}

func TestNoInit(t *testing.T) {
	tr := load(t)
	for _, f := range tr.files {
		for _, d := range f.ast.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil && fn.Name.Name == "init" {
				t.Errorf("%s: func init: importing a package must do nothing; build what is needed in New", tr.at(fn.Pos()))
			}
		}
	}
}

var vagueNames = regexp.MustCompile(`^(util|utils|common|helper|helpers|model|models|types|misc|shared|base|lib)(_test)?$`)

func TestPackageNames(t *testing.T) {
	tr := load(t)
	for _, f := range tr.files {
		if vagueNames.MatchString(f.ast.Name.Name) || vagueNames.MatchString(path.Base(f.dir)) {
			t.Errorf("%s: package %s: a package is named for what it provides, else everything ends up in it", f.path, f.ast.Name.Name)
		}
	}
}

func TestPackageDocs(t *testing.T) {
	tr := load(t)
	doc := map[string]bool{} // folder -> some file has a package comment
	for _, f := range tr.files {
		doc[f.dir] = doc[f.dir] || f.ast.Doc != nil && strings.TrimSpace(f.ast.Doc.Text()) != ""
	}
	for dir, has := range doc {
		if !has {
			t.Errorf("%s: no package comment: a reader must learn there what the package is for", dir)
		}
	}
	services := 0
	for _, m := range tr.modules {
		if !strings.HasPrefix(m, "services/") {
			continue
		}
		if _, hasRoot := doc[m]; !hasRoot {
			t.Logf("%s has no root package yet", m)
			continue
		}
		services++
		i := slices.IndexFunc(tr.files, func(f *goFile) bool { return f.path == m+"/doc.go" })
		if i < 0 || tr.files[i].ast.Doc == nil {
			t.Errorf("%s/doc.go is missing or empty: it is the service's contract on one screen (consumes, publishes, owns, on restart, on duplicate delivery, metrics)", m)
		}
	}
	t.Logf("%d packages, %d service root packages", len(doc), services)
}

// TestNoSleepingTests allows time.Sleep where it does not wait for something
// else to happen: between the checks of a polling loop, and in a synctest file,
// where the clock is not the real one.
func TestNoSleepingTests(t *testing.T) {
	tr := load(t)
	for _, f := range tr.files {
		if !f.test || f.importName("testing/synctest") != "" {
			continue
		}
		var loops [][2]token.Pos
		ast.Inspect(f.ast, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.ForStmt:
				loops = append(loops, [2]token.Pos{n.Pos(), n.End()})
			}
			return true
		})
		f.uses("time", func(name string, pos token.Pos) {
			if name != "Sleep" {
				return
			}
			if !slices.ContainsFunc(loops, func(l [2]token.Pos) bool { return l[0] < pos && pos < l[1] }) {
				t.Errorf("%s: time.Sleep outside a polling loop: too short on a busy machine, too long on a fast one; poll a condition with a deadline, or use testing/synctest", tr.at(pos))
			}
		})
	}
}

// TestNoPackageState finds package-level variables that are assigned, indexed
// into or counted up after their declaration, and package-level locks.
func TestNoPackageState(t *testing.T) {
	tr := load(t)
	const why = "package-level state is shared by everything in the process, and the all-in-one runs all services in one"
	vars := map[string]map[string]*ast.ValueSpec{} // folder -> name
	for _, f := range tr.source() {
		for _, d := range f.ast.Decls {
			gen, ok := d.(*ast.GenDecl)
			if !ok || gen.Tok != token.VAR {
				continue
			}
			for _, s := range gen.Specs {
				spec := s.(*ast.ValueSpec)
				for _, name := range spec.Names {
					if vars[f.dir] == nil {
						vars[f.dir] = map[string]*ast.ValueSpec{}
					}
					vars[f.dir][name.Name] = spec
				}
				if sel, ok := spec.Type.(*ast.SelectorExpr); ok {
					if id, ok := sel.X.(*ast.Ident); ok && (id.Name == f.importName("sync") || id.Name == f.importName("sync/atomic")) {
						t.Errorf("%s: var %s %s.%s: %s", tr.at(spec.Pos()), spec.Names[0].Name, id.Name, sel.Sel.Name, why)
					}
				}
			}
		}
	}
	count := 0
	for _, v := range vars {
		count += len(v)
	}
	for _, f := range tr.source() {
		assigned := func(e ast.Expr) {
			id := baseIdent(e)
			if id == nil || id.Name == "_" {
				return
			}
			spec := vars[f.dir][id.Name]
			// id.Obj is what the name means within the file; nil is the package's.
			if spec == nil || id.Obj != nil && id.Obj.Decl != spec {
				return
			}
			t.Errorf("%s: package-level %s is changed: %s", tr.at(id.Pos()), id.Name, why)
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.AssignStmt:
				if n.Tok != token.DEFINE {
					for _, l := range n.Lhs {
						assigned(l)
					}
				}
			case *ast.IncDecStmt:
				assigned(n.X)
			case *ast.CallExpr:
				if id, ok := n.Fun.(*ast.Ident); ok && (id.Name == "delete" || id.Name == "clear") && len(n.Args) > 0 {
					assigned(n.Args[0])
				}
			}
			return true
		})
	}
	t.Logf("looked at %d package-level variables", count)
}

// baseIdent returns x of x, x.f, x[i], *x and (x).
func baseIdent(e ast.Expr) *ast.Ident {
	for {
		switch x := e.(type) {
		case *ast.Ident:
			return x
		case *ast.SelectorExpr:
			e = x.X
		case *ast.IndexExpr:
			e = x.X
		case *ast.StarExpr:
			e = x.X
		case *ast.ParenExpr:
			e = x.X
		default:
			return nil
		}
	}
}

func TestNoDefaultRegistries(t *testing.T) {
	tr := load(t)
	globals := map[string][]string{
		"github.com/prometheus/client_golang/prometheus":          {"DefaultRegisterer", "DefaultGatherer", "MustRegister", "Register", "Unregister"},
		"github.com/prometheus/client_golang/prometheus/promhttp": {"Handler"},
		"net/http":     {"DefaultServeMux", "Handle", "HandleFunc", "ListenAndServe", "ListenAndServeTLS", "DefaultClient", "Get", "Post"},
		"math/rand":    {"Seed"},
		"flag":         {"CommandLine", "Parse", "String", "Int", "Bool", "Duration"},
		"expvar":       {"Publish", "NewInt", "NewMap", "NewString"},
		"database/sql": {"Register"},
	}
	for _, f := range tr.source() {
		if f.ast.Name.Name == "main" {
			continue
		}
		for imp, names := range globals {
			f.uses(imp, func(name string, pos token.Pos) {
				if slices.Contains(names, name) {
					t.Errorf("%s: %s.%s is shared by the whole process: two services in one process would meet in it; pass one in", tr.at(pos), path.Base(imp), name)
				}
			})
		}
		f.uses("log/slog", func(name string, pos token.Pos) {
			if name == "SetDefault" {
				t.Errorf("%s: slog.SetDefault outside main: the logger is passed in", tr.at(pos))
			}
		})
	}
}

var busNames = regexp.MustCompile(`\$KV\.|^KV_|^(RESULTS|LOGS)(\.|$)`)

func TestBusNamesInOneFile(t *testing.T) {
	tr := load(t)
	inBus := map[string]bool{}
	for _, f := range tr.source() {
		ast.Inspect(f.ast, func(n ast.Node) bool {
			lit, ok := n.(*ast.BasicLit)
			if !ok || lit.Kind != token.STRING {
				return true
			}
			s, err := strconv.Unquote(lit.Value)
			if err != nil || !busNames.MatchString(s) {
				return true
			}
			if f.dir == "libs/bus" {
				inBus[f.path] = true
			} else {
				t.Errorf("%s: %q: subjects, streams and buckets are named in one file of libs/bus, so that a change of the topology is one change", tr.at(lit.Pos()), s)
			}
			return true
		})
	}
	files := make([]string, 0, len(inBus))
	for f := range inBus {
		files = append(files, f)
	}
	slices.Sort(files)
	if len(files) > 1 {
		t.Errorf("bus names are written in %s: they belong into one file", strings.Join(files, " and "))
	}
	t.Logf("bus names are in %v", files)
}

// TestStateIsAssignedInTheTableOnly has no types to go by: in a file that imports
// libs/core/job, what counts is an assignment to a field called State, and a
// literal of a job type that sets it, in which the value names the job package.
func TestStateIsAssignedInTheTableOnly(t *testing.T) {
	tr := load(t)
	const jobDir = "libs/core/job"
	const why = "a job's state changes only through job.Apply and its table, which is what makes two schedulers safe"
	inTable := map[string]bool{}
	for _, f := range tr.source() {
		own := f.dir == jobDir
		name := f.importName(prefix + jobDir)
		if !own && name == "" {
			continue
		}
		namesJob := func(e ast.Expr) bool {
			found := false
			ast.Inspect(e, func(n ast.Node) bool {
				if sel, ok := n.(*ast.SelectorExpr); ok {
					if id, ok := sel.X.(*ast.Ident); ok && id.Name == name && id.Obj == nil {
						found = true
					}
				}
				return !found
			})
			return found
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.AssignStmt:
				for i, l := range n.Lhs {
					sel, ok := l.(*ast.SelectorExpr)
					if !ok || sel.Sel.Name != "State" {
						continue
					}
					if own {
						inTable[f.path] = true
					} else if len(n.Rhs) != len(n.Lhs) || namesJob(n.Rhs[i]) {
						t.Errorf("%s: State is assigned: %s", tr.at(sel.Pos()), why)
					}
				}
			case *ast.CompositeLit:
				sel, ok := n.Type.(*ast.SelectorExpr)
				if !ok || own {
					return true
				}
				if id, ok := sel.X.(*ast.Ident); !ok || id.Name != name || (sel.Sel.Name != "Record" && sel.Sel.Name != "Job") {
					return true
				}
				for _, e := range n.Elts {
					if kv, ok := e.(*ast.KeyValueExpr); ok {
						if key, ok := kv.Key.(*ast.Ident); ok && key.Name == "State" {
							t.Errorf("%s: job.%s is made with a State: %s", tr.at(kv.Pos()), sel.Sel.Name, why)
						}
					}
				}
			}
			return true
		})
	}
	files := make([]string, 0, len(inTable))
	for f := range inTable {
		files = append(files, f)
	}
	slices.Sort(files)
	if len(files) > 1 {
		t.Errorf("State is assigned in %s: it belongs into the table's file: %s", strings.Join(files, " and "), why)
	}
	t.Logf("State is assigned in %v", files)
}

func TestNoModeChecks(t *testing.T) {
	tr := load(t)
	mode := regexp.MustCompile(`(?i)all_?in_?one`)
	for _, f := range tr.source() {
		if !strings.HasPrefix(f.module, "services/") || f.module == "services/cmdexec" {
			continue
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			if id, ok := n.(*ast.Ident); ok && mode.MatchString(id.Name) {
				t.Errorf("%s: %s: a service never knows whether it runs alone; give it other Deps instead", tr.at(id.Pos()), id.Name)
			}
			return true
		})
	}
}

// TestBinaries: a service's main is where make build and the images look for it.
func TestBinaries(t *testing.T) {
	tr := load(t)
	for _, m := range tr.modules {
		name, ok := strings.CutPrefix(m, "services/")
		if !ok {
			continue
		}
		if _, err := os.Stat(filepath.Join(tr.root, m, "cmd", name, "main.go")); err == nil {
			continue
		}
		if slices.ContainsFunc(tr.files, func(f *goFile) bool { return f.dir == m && declares(f, "New") }) {
			t.Errorf("%s has New but no cmd/%s/main.go: every service runs by itself", m, name)
		} else {
			t.Logf("%s has no constructor yet", m)
		}
	}
}

func declares(f *goFile, name string) bool {
	return slices.ContainsFunc(f.ast.Decls, func(d ast.Decl) bool {
		fn, ok := d.(*ast.FuncDecl)
		return ok && fn.Recv == nil && fn.Name.Name == name
	})
}
