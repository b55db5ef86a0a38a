package deploy

import (
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// programs are the services, the worker, and the command that makes the topology.
var programs = []string{"api-gateway", "worker-edge", "scheduler", "result-collector", "registry-persister", "worker"}

// setting is one line of the table that a program prints with `help`.
type setting struct{ def, desc string }

func (s setting) required() bool { return s.def == "(required)" }

// settings asks a program for its settings.
func settings(t *testing.T, program string) map[string]setting {
	t.Helper()
	cmd := exec.Command(binary(t, program), "help")
	cmd.Env = []string{}
	lines := strings.Split(string(output(t, cmd)), "\n")
	head := slices.IndexFunc(lines, func(l string) bool { return strings.HasPrefix(l, "NAME ") })
	if head < 0 {
		t.Fatalf("%s help prints no table:\n%s", program, strings.Join(lines, "\n"))
	}
	def, desc := strings.Index(lines[head], "DEFAULT"), strings.Index(lines[head], "DESCRIPTION")
	out := map[string]setting{}
	for _, l := range lines[head+1:] {
		if len(l) > desc {
			out[strings.TrimSpace(l[:def])] = setting{strings.TrimSpace(l[def:desc]), strings.TrimSpace(l[desc:])}
		}
	}
	if len(out) < 3 {
		t.Fatalf("%s help prints %d settings", program, len(out))
	}
	return out
}

func binary(t *testing.T, name string) string {
	t.Helper()
	dir := os.Getenv("CMDEXEC_BIN_DIR")
	if dir == "" {
		dir = filepath.Join(root, "bin")
	}
	path, err := filepath.Abs(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%s is not built: run the tests by `make test`", path)
	}
	return path
}

// check holds the names that a file sets for a program against what the program
// takes.
func checkNames(t *testing.T, where, program string, names []string) {
	t.Helper()
	known := settings(t, program)
	for _, n := range names {
		if _, ok := known[n]; !ok {
			t.Errorf("%s: %s does not take %s; it takes %v", where, program, n, slices.Sorted(maps.Keys(known)))
		}
	}
	for n, s := range known {
		if s.required() && !slices.Contains(names, n) {
			t.Errorf("%s: %s is required by %s and not set", where, n, program)
		}
	}
}

// bus is what `cmdexec bus apply` takes: what every service takes for the bus.
var busSettings = []string{"NATS_URL", "NATS_CREDS", "DURABILITY", "NATS_MONITOR_URL"}

func checkTopology(t *testing.T, where string, names []string) {
	t.Helper()
	for _, n := range names {
		if !slices.Contains(busSettings, n) {
			t.Errorf("%s: `cmdexec bus apply` does not take %s", where, n)
		}
	}
	if !slices.Contains(names, "NATS_URL") {
		t.Errorf("%s: NATS_URL is not set", where)
	}
}

// The database may be given in two ways, so neither is required by itself.
func checkDatabase(t *testing.T, where string, env []string) {
	t.Helper()
	if !slices.Contains(env, "MONGODB_URI") && !slices.Contains(env, "SQLITE_PATH") {
		t.Errorf("%s names no database", where)
	}
}

// docs/operations.md has a table of every setting of every program.
func TestDocumentedSettings(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(root, "docs", "operations.md"))
	if err != nil {
		t.Fatal(err)
	}
	type row struct{ of, def string }
	documented := map[string][]row{}
	for line := range strings.Lines(string(text)) {
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		if name := strings.TrimSpace(cells[0]); len(cells) == 4 && settingName.MatchString(name) {
			name = strings.Trim(name, "`")
			documented[name] = append(documented[name], row{strings.TrimSpace(cells[1]), strings.Trim(strings.TrimSpace(cells[2]), "`")})
		}
	}
	known := map[string]int{} // rows that a name must have at most
	for _, program := range programs {
		for name, s := range settings(t, program) {
			known[name]++
			var found []row
			for _, r := range documented[name] {
				if r.of == "all" || r.of == "services" && program != "worker" || slices.Contains(strings.Split(r.of, ", "), program) {
					found = append(found, r)
				}
			}
			if len(found) != 1 {
				t.Errorf("docs/operations.md has %d rows for %s of %s (%s; default %s)", len(found), name, program, s.desc, s.def)
				continue
			}
			if s.required() != (found[0].def == "required") || !s.required() && s.def != "-" && s.def != found[0].def {
				t.Errorf("docs/operations.md: the default of %s of %s is %q, not %q", name, program, s.def, found[0].def)
			}
		}
	}
	for name, rows := range documented {
		if len(rows) > known[name] {
			t.Errorf("docs/operations.md has %d rows for %s, of %d programs that take it", len(rows), name, known[name])
		}
	}
}

var settingName = regexp.MustCompile("^`[A-Z][A-Z_]+`$")
