package arch

import (
	"go/ast"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sort"
	"strings"
	"testing"
)

// localRule limits which local modules a module may import.
type localRule struct {
	module string   // folder, or a folder followed by /* for each module in it
	may    []string // allowed local modules; a trailing /* allows each module in it
	test   []string // allowed besides in _test.go files
	why    string
}

var localRules = []localRule{
	{
		module: "libs/core",
		why:    "core is the vocabulary of every part and the worker's wire contract; it depends on nothing",
	},
	{
		module: "libs/kit",
		why:    "kit knows no domain, so that it never changes when the domain does",
	},
	{
		module: "libs/bus", may: []string{"libs/core"}, test: []string{"libs/natsd"},
		why: "bus is an adapter for NATS: it translates core's words and nothing else (its tests run a real server)",
	},
	{
		module: "libs/store", may: []string{"libs/core"},
		why: "store is an adapter for databases: it translates core's words and nothing else",
	},
	{
		module: "libs/client", may: []string{"libs/core"},
		why: "the SDK talks to the public API only, and users must not inherit the server's dependencies",
	},
	{
		module: "libs/*", may: []string{"libs/*"},
		why: "a library that imports a service cannot be used by another service",
	},
	{
		module: "services/worker", may: []string{"libs/core", "libs/kit"},
		why: "a worker runs on other people's machines and reaches the system through the edge only, never NATS or a database",
	},
	{
		module: "services/cmdexec", may: []string{"libs/*", "services/*"},
		why: "the all-in-one wires everything",
	},
	{
		module: "services/*", may: []string{"libs/*"},
		why: "services are deployed and restarted apart; what they share is a library or goes over the bus",
	},
	{
		module: "tests", may: []string{"libs/*", "services/*"},
		why: "tests may drive everything",
	},
	{
		module: "tests/mongo", may: []string{"libs/core", "libs/store"},
		why: "it holds the MongoDB store to its suite, apart because of what FerretDB brings",
	},
}

func ruleFor(module string) *localRule {
	for i, r := range localRules {
		if matches(r.module, module) {
			return &localRules[i]
		}
	}
	return nil
}

func matches(pattern, module string) bool {
	if dir, ok := strings.CutSuffix(pattern, "/*"); ok {
		return strings.HasPrefix(module, dir+"/")
	}
	return pattern == module
}

func anyMatches(patterns []string, module string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return matches(p, module) })
}

// localModule returns the folder of the module that holds a local package.
func (tr *tree) localModule(importPath string) (string, bool) {
	rel, ok := strings.CutPrefix(importPath, prefix)
	if !ok {
		return "", false
	}
	best := ""
	for _, m := range tr.modules {
		if (rel == m || strings.HasPrefix(rel, m+"/")) && len(m) > len(best) {
			best = m
		}
	}
	return best, true
}

func TestLocalImports(t *testing.T) {
	tr := load(t)
	edges := map[string]bool{}
	for _, m := range tr.modules {
		if ruleFor(m) == nil {
			t.Errorf("module %s has no rule: add one to localRules in this file, with a reason", m)
		}
	}
	for _, f := range tr.files {
		rule := ruleFor(f.module)
		if rule == nil {
			continue
		}
		for imp, pos := range f.imports() {
			dep, local := tr.localModule(imp)
			if !local || dep == f.module {
				continue
			}
			if dep == "" {
				t.Errorf("%s: %s is in no module of go.work", tr.at(pos), imp)
				continue
			}
			edges[f.module+" -> "+dep] = true
			if !anyMatches(rule.may, dep) && !(f.test && anyMatches(rule.test, dep)) {
				t.Errorf("%s: %s must not import %s: %s", tr.at(pos), f.module, dep, rule.why)
				continue
			}
			if strings.HasPrefix(dep, "services/") && imp != prefix+dep {
				t.Errorf("%s: %s is an inner package of a service: only the root package (Config, Deps, New) is its contract", tr.at(pos), imp)
			}
		}
	}
	list := make([]string, 0, len(edges))
	for e := range edges {
		list = append(list, e)
	}
	sort.Strings(list)
	t.Logf("%d modules, %d files, module imports:\n%s", len(tr.modules), len(tr.files), strings.Join(list, "\n"))
}

// owners says which modules may import a third-party package, by the beginning
// of its path; the longest match counts. The tests module may import anything.
var owners = []struct {
	path    string
	modules []string
	why     string
}{
	{"github.com/nats-io/nats.go", []string{"libs/bus"}, "one module speaks to NATS, so that its traps are known in one place"},
	{"github.com/nats-io/", []string{"libs/natsd"}, "the embedded server is 20 MB of code that only the all-in-one wants"},
	{"modernc.org/sqlite", []string{"libs/store"}, "one module speaks SQL"},
	{"github.com/FerretDB/", []string{"tests/mongo"}, "a stand-in for MongoDB in tests, which never ships"},
	{"go.mongodb.org/", []string{"libs/store"}, "one module speaks to MongoDB"},
	{"github.com/redis/", []string{"libs/store"}, "one module speaks to Redis"},
	{"github.com/golang-jwt/jwt/", []string{"libs/kit"}, "tokens are minted and checked in kit/auth only, with pinned algorithms"},
	{"github.com/kelseyhightower/envconfig", []string{"libs/kit"}, "the environment is read by kit/config only"},
	{"github.com/lmittmann/tint", []string{"libs/kit"}, "log formats are chosen by kit/logging only"},
	{"github.com/mattn/go-isatty", []string{"libs/kit", "services/cmdexec"}, "log formats are chosen in kit, output formats in the CLI"},
	{"github.com/go-chi/chi/", []string{"services/api-gateway", "services/worker-edge"}, "the two services with HTTP routes"},
	{"github.com/danielgtaylor/huma/", []string{"services/api-gateway", "services/worker-edge"}, "the two services with HTTP routes"},
	{"github.com/coder/websocket", []string{"services/worker-edge", "services/worker"}, "the two ends of a worker session"},
	{"github.com/shirou/gopsutil/", []string{"services/worker"}, "only a worker describes its machine"},
	{"github.com/docker/", []string{"services/worker"}, "only a worker starts containers"},
	{"github.com/containerd/", []string{"services/worker"}, "only a worker starts containers"},
	{"github.com/distribution/", []string{"services/worker"}, "only a worker starts containers"},
	{"github.com/moby/", []string{"services/worker"}, "only a worker starts containers"},
	{"github.com/opencontainers/", []string{"services/worker"}, "only a worker starts containers"},
	{"github.com/spf13/", []string{"services/cmdexec"}, "only the CLI parses commands"},
	{"github.com/jedib0t/go-pretty/", []string{"services/cmdexec"}, "only the CLI prints tables"},
	{"github.com/joho/godotenv", []string{"services/cmdexec"}, "a .env file is read by cmdexec only"},
	{"go.yaml.in/yaml/", []string{"services/cmdexec", "services/api-gateway"}, "only the CLI prints YAML, and only the gateway reads it"},
	{"github.com/prometheus/", []string{"services/*", "libs/kit"}, "metrics belong to services; libraries return numbers"},
	{"golang.org/x/", []string{"libs/*", "services/*"}, "the extended standard library"},
}

// testOnly are packages for _test.go files of any module, core included, and
// for packages that exist to test others.
var testOnly = []string{
	"github.com/stretchr/testify/require",
	"pgregory.net/rapid",
	"go.uber.org/goleak",
	"github.com/google/go-cmp/",
}

// testSupport says that a package is a test suite for others by its name, such as
// libs/store/storetest.
func testSupport(dir string) bool { return strings.HasSuffix(dir, "test") }

func thirdParty(importPath string) bool {
	first, _, _ := strings.Cut(importPath, "/")
	return strings.Contains(first, ".") && !strings.HasPrefix(importPath, prefix)
}

func hasPrefix(importPath, p string) bool {
	return importPath == p || strings.HasPrefix(importPath, strings.TrimSuffix(p, "/")+"/")
}

func TestThirdPartyImports(t *testing.T) {
	tr := load(t)
	seen := map[string]map[string]bool{}
	for _, f := range tr.files {
		for imp, pos := range f.imports() {
			if !thirdParty(imp) || f.module == "tests" || f.module == "tests/mongo" {
				continue
			}
			if slices.ContainsFunc(testOnly, func(p string) bool { return hasPrefix(imp, p) }) {
				if !f.test && !testSupport(f.dir) {
					t.Errorf("%s: %s is for tests only: what ships must not carry it", tr.at(pos), imp)
				}
				continue
			}
			if strings.HasPrefix(imp, "github.com/stretchr/testify") {
				t.Errorf("%s: of testify only require is used, so that a failed check ends its test", tr.at(pos))
				continue
			}
			if f.module == "libs/core" {
				t.Errorf("%s: %s: core imports nothing outside the standard library: every part and every SDK user carries it", tr.at(pos), imp)
				continue
			}
			best := -1
			for i, o := range owners {
				if hasPrefix(imp, o.path) && (best < 0 || len(o.path) > len(owners[best].path)) {
					best = i
				}
			}
			if best < 0 {
				t.Errorf("%s: %s has no owning module: add it to owners in tests/arch/imports_test.go with a reason, or do without it", tr.at(pos), imp)
				continue
			}
			o := owners[best]
			if !anyMatches(o.modules, f.module) {
				t.Errorf("%s: %s belongs to %s (%s), not to %s", tr.at(pos), imp, strings.Join(o.modules, ", "), o.why, f.module)
			}
			if seen[o.path] == nil {
				seen[o.path] = map[string]bool{}
			}
			seen[o.path][f.module] = true
		}
	}
	t.Logf("third-party packages by module: %v", seen)
}

// leaky are vendor types that may cross modules.
var leaky = []string{
	"github.com/prometheus/", // a registry is passed in
	"golang.org/x/",
}

// TestVendorTypesStayInside looks at what other modules can see: the exported
// declarations of libraries and of service root packages.
func TestVendorTypesStayInside(t *testing.T) {
	tr := load(t)
	looked := 0
	for _, f := range tr.source() {
		visible := strings.HasPrefix(f.module, "libs/") || f.dir == f.module
		if !visible || f.ast.Name.Name == "main" || strings.Contains("/"+f.dir+"/", "/internal/") || testSupport(f.dir) {
			continue
		}
		vendor := map[string]string{}
		for imp := range f.imports() {
			if thirdParty(imp) && !slices.ContainsFunc(leaky, func(p string) bool { return hasPrefix(imp, p) }) {
				vendor[f.importName(imp)] = imp
			}
		}
		if len(vendor) == 0 {
			continue
		}
		check := func(what string, e ast.Node) {
			looked++
			ast.Inspect(e, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.StructType:
					for _, field := range n.Fields.List {
						if !visibleField(field) {
							continue
						}
						ast.Inspect(field.Type, func(n ast.Node) bool { return report(t, tr, what, vendor, n) })
					}
					return false
				default:
					return report(t, tr, what, vendor, n)
				}
			})
		}
		for _, d := range f.ast.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				if d.Name.IsExported() && (d.Recv == nil || receiverExported(d.Recv)) {
					check(d.Name.Name, d.Type)
				}
			case *ast.GenDecl:
				for _, s := range d.Specs {
					switch s := s.(type) {
					case *ast.TypeSpec:
						if s.Name.IsExported() {
							check(s.Name.Name, s.Type)
						}
					case *ast.ValueSpec:
						if s.Type != nil && slices.ContainsFunc(s.Names, (*ast.Ident).IsExported) {
							check(s.Names[0].Name, s.Type)
						}
					}
				}
			}
		}
	}
	t.Logf("looked at %d exported declarations in files that import third-party packages", looked)
}

func report(t *testing.T, tr *tree, what string, vendor map[string]string, n ast.Node) bool {
	sel, ok := n.(*ast.SelectorExpr)
	if !ok {
		return true
	}
	if id, ok := sel.X.(*ast.Ident); ok && vendor[id.Name] != "" {
		t.Errorf("%s: exported %s shows %s.%s of %s: vendor types stay in the module that owns them, else replacing the vendor changes every caller",
			tr.at(sel.Pos()), what, id.Name, sel.Sel.Name, vendor[id.Name])
	}
	return false
}

func visibleField(f *ast.Field) bool {
	if len(f.Names) == 0 {
		return true // embedded: its methods become ours
	}
	return slices.ContainsFunc(f.Names, (*ast.Ident).IsExported)
}

func receiverExported(recv *ast.FieldList) bool {
	exported := false
	ast.Inspect(recv.List[0].Type, func(n ast.Node) bool {
		if id, ok := n.(*ast.Ident); ok && !exported {
			exported = id.IsExported()
			return false
		}
		return true
	})
	return exported
}

var (
	moduleLine  = regexp.MustCompile(`(?m)^module (\S+)`)
	goLine      = regexp.MustCompile(`(?m)^go (\S+)`)
	requireLine = regexp.MustCompile(`(?m)^(?:require |\t)(\S+\.\S+) (v\S+)( // indirect)?$`)
)

func TestModuleFiles(t *testing.T) {
	tr := load(t)
	work, err := os.ReadFile(filepath.Join(tr.root, "go.work"))
	if err != nil {
		t.Fatal(err)
	}
	version := string(goLine.FindSubmatch(work)[1])
	type use struct{ module, version string }
	direct := map[string][]use{}
	for _, m := range tr.modules {
		mod, err := os.ReadFile(filepath.Join(tr.root, filepath.FromSlash(m), "go.mod"))
		if err != nil {
			t.Error(err)
			continue
		}
		if got := moduleLine.FindSubmatch(mod); got == nil || string(got[1]) != prefix+m {
			t.Errorf("%s/go.mod: the module must be called %s%s, as its folder", m, prefix, m)
		}
		if got := goLine.FindSubmatch(mod); got == nil || string(got[1]) != version {
			t.Errorf("%s/go.mod: the go version must be that of go.work, %s: one compiler for all", m, version)
		}
		for _, r := range requireLine.FindAllSubmatch(mod, -1) {
			if len(r[3]) == 0 && !strings.HasPrefix(string(r[1]), prefix) {
				direct[string(r[1])] = append(direct[string(r[1])], use{m, string(r[2])})
			}
		}
	}
	for dep, uses := range direct {
		for _, u := range uses[1:] {
			if u.version != uses[0].version {
				t.Errorf("%s: %s has %s, %s has %s: the workspace would test one and ship the other",
					dep, uses[0].module, uses[0].version, u.module, u.version)
			}
		}
	}
	t.Logf("go %s, %d third-party modules required directly", version, len(direct))
}
