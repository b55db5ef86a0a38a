package arch

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
)

// prefix is what the paths of all modules begin with.
const prefix = "github.com/cmdexec/cmdexec/"

// goFile is one parsed source file.
type goFile struct {
	path   string // from the workspace root, with slashes
	dir    string // folder of path
	module string // folder of its module, e.g. libs/core
	test   bool   // name ends in _test.go
	ast    *ast.File
}

// inTests says that the file is test code: a _test.go file or anything in the
// tests module.
func (f *goFile) inTests() bool { return f.test || f.module == "tests" }

// imports returns the import paths of the file with where they are written.
func (f *goFile) imports() map[string]token.Pos {
	out := map[string]token.Pos{}
	for _, i := range f.ast.Imports {
		if p, err := strconv.Unquote(i.Path.Value); err == nil {
			out[p] = i.Pos()
		}
	}
	return out
}

// importName returns the identifier by which the file uses the import, "" if it
// does not import it. Version suffixes are not package names: the element before
// is taken.
func (f *goFile) importName(importPath string) string {
	for _, i := range f.ast.Imports {
		p, err := strconv.Unquote(i.Path.Value)
		if err != nil || p != importPath {
			continue
		}
		if i.Name != nil {
			return i.Name.Name
		}
		return defaultName(p)
	}
	return ""
}

var versionSuffix = regexp.MustCompile(`^v[0-9]+$`)

func defaultName(importPath string) string {
	base := path.Base(importPath)
	if versionSuffix.MatchString(base) {
		base = path.Base(path.Dir(importPath))
	}
	base = strings.TrimPrefix(strings.TrimSuffix(base, ".go"), "go-")
	return base
}

// tree is the whole workspace.
type tree struct {
	root    string
	fset    *token.FileSet
	modules []string // folders, in the order of go.work
	files   []*goFile
}

// at formats a position relative to the workspace root.
func (tr *tree) at(pos token.Pos) string {
	p := tr.fset.Position(pos)
	rel, err := filepath.Rel(tr.root, p.Filename)
	if err != nil {
		rel = p.Filename
	}
	return filepath.ToSlash(rel) + ":" + strconv.Itoa(p.Line)
}

// source returns the files that are not test code.
func (tr *tree) source() []*goFile {
	return slices.DeleteFunc(slices.Clone(tr.files), (*goFile).inTests)
}

var loadOnce = sync.OnceValues(loadTree)

// load returns the parsed workspace; it is read once for all tests.
func load(t *testing.T) *tree {
	t.Helper()
	tr, err := loadOnce()
	if err != nil {
		t.Fatal(err)
	}
	if len(tr.files) == 0 {
		t.Fatal("no Go file found: the tests would prove nothing")
	}
	return tr
}

var useLine = regexp.MustCompile(`(?m)^\s*\./(\S+)`)

func loadTree() (*tree, error) {
	root, err := filepath.Abs(filepath.Join("..", ".."))
	if err != nil {
		return nil, err
	}
	work, err := os.ReadFile(filepath.Join(root, "go.work"))
	if err != nil {
		return nil, err
	}
	tr := &tree{root: root, fset: token.NewFileSet()}
	for _, m := range useLine.FindAllSubmatch(work, -1) {
		tr.modules = append(tr.modules, string(m[1]))
	}
	for _, module := range tr.modules {
		top := filepath.Join(root, filepath.FromSlash(module))
		err := filepath.WalkDir(top, func(p string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			name := d.Name()
			if d.IsDir() {
				if p != top && (name == "testdata" || name == "bin" || strings.HasPrefix(name, ".") || strings.HasPrefix(name, "_")) {
					return fs.SkipDir
				}
				return nil
			}
			if !strings.HasSuffix(name, ".go") {
				return nil
			}
			file, err := parser.ParseFile(tr.fset, p, nil, parser.ParseComments)
			if err != nil {
				return err
			}
			rel, err := filepath.Rel(root, p)
			if err != nil {
				return err
			}
			rel = filepath.ToSlash(rel)
			tr.files = append(tr.files, &goFile{
				path: rel, dir: path.Dir(rel), module: module,
				test: strings.HasSuffix(name, "_test.go"), ast: file,
			})
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return tr, nil
}
