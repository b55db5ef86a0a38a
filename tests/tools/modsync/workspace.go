package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"
)

// localVersion is what a local module is required at. It exists nowhere; the
// replace beside it is what resolves it.
const localVersion = "v0.0.0"

// module is one module of the workspace.
type module struct {
	path   string    // module path
	dir    string    // absolute folder
	rel    string    // folder relative to the workspace, with slashes
	direct []*module // local modules its own packages and tests import
	broken error     // a file that could not be parsed; direct may then be incomplete
	absent error     // local packages it imports that do not exist
}

// workspace is what go.work describes.
type workspace struct {
	root      string
	goVersion string
	modules   []*module // in the order of go.work
}

// modJSON is the part of `go mod edit -json` that is used here.
type modJSON struct {
	Module    struct{ Path string }
	Go        string
	Toolchain string
	Require   []struct{ Path, Version string }
	Replace   []struct {
		Old struct{ Path, Version string }
		New struct{ Path, Version string }
	}
}

// workspaceRoot returns dir, or where it is empty the nearest folder with a
// go.work from the working folder upwards.
func workspaceRoot(dir string) (string, error) {
	if dir != "" {
		return filepath.Abs(dir)
	}
	wd, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for d := wd; ; d = filepath.Dir(d) {
		if _, err := os.Stat(filepath.Join(d, "go.work")); err == nil {
			return d, nil
		}
		if d == filepath.Dir(d) {
			return "", fmt.Errorf("no go.work in %s or above", wd)
		}
	}
}

func loadWorkspace(root string) (*workspace, error) {
	out, err := goCmd(root, "work", "edit", "-json", filepath.Join(root, "go.work"))
	if err != nil {
		return nil, err
	}
	var work struct {
		Go  string
		Use []struct{ DiskPath string }
	}
	if err := json.Unmarshal(out, &work); err != nil {
		return nil, fmt.Errorf("reading go.work: %w", err)
	}
	ws := &workspace{root: root, goVersion: work.Go}
	for _, u := range work.Use {
		m := &module{rel: filepath.ToSlash(filepath.Clean(u.DiskPath))}
		m.dir = filepath.Join(root, u.DiskPath)
		mod, err := readMod(m.dir)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", m.rel, err)
		}
		m.path = mod.Module.Path
		ws.modules = append(ws.modules, m)
	}
	if len(ws.modules) == 0 {
		return nil, errors.New("go.work names no module")
	}
	for _, m := range ws.modules {
		imports, err := scanImports(m.dir)
		m.broken = err // concerns this module only: the others can still be synced
		m.absent = ws.missing(imports)
		for _, imp := range imports {
			if dep := ws.owner(imp); dep != nil && dep != m && !slices.Contains(m.direct, dep) {
				m.direct = append(m.direct, dep)
			}
		}
	}
	return ws, nil
}

// missing reports imports that belong to the workspace but have no folder with
// Go files. The go command would ask a public proxy for them.
func (ws *workspace) missing(imports []string) error {
	var errs []error
	prefix := ws.prefix()
	for _, imp := range imports {
		dep := ws.owner(imp)
		if dep == nil {
			if strings.HasPrefix(imp, prefix) {
				errs = append(errs, fmt.Errorf("imports %s, which is in no module of go.work", imp))
			}
			continue
		}
		dir := filepath.Join(dep.dir, filepath.FromSlash(strings.TrimPrefix(imp, dep.path)))
		if files, err := filepath.Glob(filepath.Join(dir, "*.go")); err == nil && len(files) == 0 {
			errs = append(errs, fmt.Errorf("imports %s, which has no Go files", imp))
		}
	}
	return errors.Join(errs...)
}

// prefix is what all module paths begin with, up to and with a slash.
func (ws *workspace) prefix() string {
	prefix := ws.modules[0].path
	for _, m := range ws.modules[1:] {
		n := 0
		for n < len(prefix) && n < len(m.path) && prefix[n] == m.path[n] {
			n++
		}
		prefix = prefix[:n]
	}
	i := strings.LastIndex(prefix, "/")
	if i < 0 {
		return "\x00" // nothing in common: no import is ours by its name alone
	}
	return prefix[:i+1]
}

func readMod(dir string) (modJSON, error) {
	var mod modJSON
	out, err := goCmd(dir, "mod", "edit", "-json", filepath.Join(dir, "go.mod"))
	if err != nil {
		return mod, err
	}
	if err := json.Unmarshal(out, &mod); err != nil {
		return mod, fmt.Errorf("reading go.mod: %w", err)
	}
	return mod, nil
}

// owner returns the local module that holds the package, nil if none does. The
// longest module path wins, as it does for the go command.
func (ws *workspace) owner(pkg string) *module {
	var best *module
	for _, m := range ws.modules {
		if pkg != m.path && !strings.HasPrefix(pkg, m.path+"/") {
			continue
		}
		if best == nil || len(m.path) > len(best.path) {
			best = m
		}
	}
	return best
}

// byDir finds a module by its folder, given from the workspace root or from the
// working folder.
func (ws *workspace) byDir(dir string) (*module, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, m := range ws.modules {
		if m.rel == filepath.ToSlash(filepath.Clean(dir)) || m.dir == abs {
			return m, nil
		}
		names = append(names, m.rel)
	}
	return nil, fmt.Errorf("%s is no module of go.work (it names %s)", dir, strings.Join(names, ", "))
}

// closure returns every local module that m needs, directly or not, by path.
func (ws *workspace) closure(m *module) []*module {
	seen := map[*module]bool{m: true}
	var out []*module
	var walk func(*module)
	walk = func(m *module) {
		for _, d := range m.direct {
			if !seen[d] {
				seen[d] = true
				out = append(out, d)
				walk(d)
			}
		}
	}
	walk(m)
	sort.Slice(out, func(i, j int) bool { return out[i].path < out[j].path })
	return out
}

// ordered returns the modules with dependencies before dependents.
func (ws *workspace) ordered() []*module {
	seen := map[*module]bool{}
	var out []*module
	var visit func(*module)
	visit = func(m *module) {
		if seen[m] {
			return
		}
		seen[m] = true
		for _, d := range m.direct {
			visit(d)
		}
		out = append(out, m)
	}
	for _, m := range ws.modules {
		visit(m)
	}
	return out
}

// edits returns the flags of `go mod edit` that bring m's go.mod in step with
// its closure; none when it already is.
func (ws *workspace) edits(m *module) ([]string, error) {
	mod, err := readMod(m.dir)
	if err != nil {
		return nil, err
	}
	want := map[string]string{} // module path -> relative folder
	for _, dep := range ws.closure(m) {
		rel, err := filepath.Rel(m.dir, dep.dir)
		if err != nil {
			return nil, err
		}
		rel = filepath.ToSlash(rel)
		if !strings.HasPrefix(rel, "../") {
			rel = "./" + rel
		}
		want[dep.path] = rel
	}
	local := map[string]bool{}
	for _, w := range ws.modules {
		local[w.path] = true
	}

	var edits []string
	if mod.Go != ws.goVersion {
		edits = append(edits, "-go="+ws.goVersion)
	}
	if mod.Toolchain != "" {
		edits = append(edits, "-toolchain=none")
	}
	required := map[string]bool{}
	for _, r := range mod.Require {
		if !local[r.Path] {
			continue
		}
		if _, ok := want[r.Path]; !ok {
			edits = append(edits, "-droprequire="+r.Path)
		} else if r.Version == localVersion {
			required[r.Path] = true
		}
	}
	replaced := map[string]bool{}
	for _, r := range mod.Replace {
		if !local[r.Old.Path] {
			continue
		}
		if rel, ok := want[r.Old.Path]; ok && rel == r.New.Path && r.Old.Version == "" {
			replaced[r.Old.Path] = true
			continue
		}
		old := r.Old.Path
		if r.Old.Version != "" {
			old += "@" + r.Old.Version
		}
		edits = append(edits, "-dropreplace="+old)
	}
	for _, path := range sortedKeys(want) {
		if !required[path] {
			edits = append(edits, "-require="+path+"@"+localVersion)
		}
		if !replaced[path] {
			edits = append(edits, "-replace="+path+"="+want[path])
		}
	}
	return edits, nil
}

// scanImports returns the import paths of every Go file of the module in dir,
// whatever its build constraints, leaving out what the go command leaves out:
// testdata, names that begin with . or _, nested modules, and files tagged
// ignore. With an error it still returns what it could read.
func scanImports(dir string) ([]string, error) {
	found := map[string]string{}
	var broken []error
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // removed while we walked: somebody else edits the tree
		}
		if err != nil {
			return err
		}
		name := d.Name()
		if d.IsDir() {
			if path == dir {
				return nil
			}
			if name == "testdata" || name == "vendor" || strings.HasPrefix(name, ".") || strings.HasPrefix(name, "_") {
				return fs.SkipDir
			}
			if _, err := os.Stat(filepath.Join(path, "go.mod")); err == nil {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(name, ".go") || strings.HasPrefix(name, ".") || strings.HasPrefix(name, "_") {
			return nil
		}
		src, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, src, parser.ImportsOnly|parser.ParseComments)
		if err != nil {
			broken = append(broken, err)
		}
		if f == nil {
			return nil
		}
		for _, group := range f.Comments {
			for _, c := range group.List {
				if c.Pos() < f.Package && strings.TrimSpace(c.Text) == "//go:build ignore" {
					return nil
				}
			}
		}
		for _, imp := range f.Imports {
			if p, err := strconv.Unquote(imp.Path.Value); err == nil {
				found[p] = path
			}
		}
		return nil
	})
	return sortedKeys(found), errors.Join(append(broken, err)...)
}

func sortedKeys(m map[string]string) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	return keys
}
