package deploy

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// root is the top of the repository.
var root = filepath.Join("..", "..")

// tools are the programs of the module in tools, by the package that is built.
var tools = map[string]string{
	"composemodel": "./composemodel",
	"kustomize":    "sigs.k8s.io/kustomize/kustomize/v5",
	"kubeconform":  "github.com/yannh/kubeconform/cmd/kubeconform",
}

// cache returns a folder that outlives the run and is not shared with other
// versions of what is in it.
func cache(version string) (string, error) {
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	dir = filepath.Join(dir, "cmdexec-tools", version)
	return dir, os.MkdirAll(dir, 0o755)
}

// toolDir is named after everything that the tools are made of.
var toolDir = sync.OnceValues(func() (string, error) {
	hash := sha256.New()
	for _, name := range []string{"go.mod", "go.sum", "composemodel/main.go"} {
		data, err := os.ReadFile(filepath.Join("tools", name))
		if err != nil {
			return "", err
		}
		hash.Write(data)
	}
	return cache(fmt.Sprintf("deploy-%x", hash.Sum(nil)[:8]))
})

// tool returns the path of a program, which it builds where it is missing. The test
// is skipped where it cannot be had.
func tool(t *testing.T, name string) string {
	t.Helper()
	dir, err := toolDir()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, name)
	if _, err := os.Stat(path); err == nil {
		return path
	}
	cmd := exec.Command("go", "build", "-trimpath", "-o", path+".new", tools[name])
	cmd.Dir = "tools"
	cmd.Env = append(os.Environ(), "GOWORK=off", "CGO_ENABLED=0", "GOFLAGS=-mod=readonly -buildvcs=false")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Skipf("requires %s: it cannot be built: %v %s", name, err, oneLine(out))
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	return path
}

func oneLine(out []byte) string {
	text := strings.Join(strings.Fields(string(out)), " ")
	return text[max(0, len(text)-300):]
}

// output runs a program and returns what it prints; it fails the test with what
// went wrong.
func output(t *testing.T, cmd *exec.Cmd) []byte {
	t.Helper()
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s%s", strings.Join(cmd.Args, " "), err, out, errs.String())
	}
	return out
}

// Kubernetes' own description of its API is in the module of its programs.
const (
	kubernetes    = "k8s.io/kubernetes@v1.37.2"
	kubernetesSum = "h1:A2VDEiObzkYqFTKhSsn0ZEb0RlLEXpHWj93gi2HqEwE="
)

// schemas returns a folder with a strict JSON schema for each kind, named as
// kubeconform looks for them.
func schemas(t *testing.T) string {
	t.Helper()
	dir, err := cache(strings.ReplaceAll(filepath.Base(kubernetes), "@", "-") + "-schemas-1")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "done")); err == nil {
		return dir
	}
	cmd := exec.Command("go", "mod", "download", "-json", kubernetes)
	cmd.Dir = t.TempDir() // of no module
	cmd.Env = append(os.Environ(), "GOWORK=off", "GOFLAGS=")
	out, err := cmd.Output()
	var module struct{ Dir, Sum, Error string }
	if jsonErr := json.Unmarshal(out, &module); err != nil || jsonErr != nil {
		t.Skipf("requires kubeconform: no schemas, %s cannot be downloaded: %v %s", kubernetes, err, oneLine([]byte(module.Error)))
	}
	if module.Sum != kubernetesSum {
		t.Fatalf("%s has the sum %s, not %s", kubernetes, module.Sum, kubernetesSum)
	}
	file, err := os.Open(filepath.Join(module.Dir, "api", "openapi-spec", "swagger.json"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	made, err := writeSchemas(file, dir)
	if err != nil {
		t.Fatal(err)
	}
	if made < 200 {
		t.Fatalf("only %d kinds in the description of the API", made)
	}
	if err := os.WriteFile(filepath.Join(dir, "done"), []byte(time.Now().UTC().Format(time.RFC3339)), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

// writeSchemas turns an OpenAPI 2 description into one schema for each kind and
// returns how many.
func writeSchemas(swagger io.Reader, dir string) (int, error) {
	var api struct {
		Definitions map[string]map[string]any `json:"definitions"`
	}
	if err := json.NewDecoder(swagger).Decode(&api); err != nil {
		return 0, err
	}
	kinds := map[string]string{} // file to definition
	for name, d := range api.Definitions {
		properties, _ := d["properties"].(map[string]any)
		open := d["x-kubernetes-preserve-unknown-fields"] == true || d["additionalProperties"] != nil
		if properties != nil && !open {
			d["additionalProperties"] = false
		}
		switch {
		case d["format"] == "int-or-string":
			api.Definitions[name] = oneOf("string", "integer")
		case strings.HasSuffix(name, "api.resource.Quantity"):
			api.Definitions[name] = oneOf("string", "number")
		}
		groups, _ := d["x-kubernetes-group-version-kind"].([]any)
		for _, g := range groups {
			gvk, _ := g.(map[string]any)
			group, _ := gvk["group"].(string)
			version, _ := gvk["version"].(string)
			kind, _ := gvk["kind"].(string)
			if len(groups) == 1 {
				fix(properties, "kind", kind)
				fix(properties, "apiVersion", strings.TrimPrefix(group+"/"+version, "/"))
			}
			file := strings.ToLower(kind)
			if group != "" {
				first, _, _ := strings.Cut(group, ".")
				file += "-" + first
			}
			kinds[file+"-"+version+".json"] = name
		}
	}
	relink(api.Definitions)
	if err := writeJSON(filepath.Join(dir, "_definitions.json"), map[string]any{"definitions": api.Definitions}); err != nil {
		return 0, err
	}
	for file, name := range kinds {
		if err := writeJSON(filepath.Join(dir, file), map[string]string{"$ref": definitions + name}); err != nil {
			return 0, err
		}
	}
	return len(kinds), nil
}

const definitions = "_definitions.json#/definitions/"

func oneOf(types ...string) map[string]any {
	var list []any
	for _, t := range types {
		list = append(list, map[string]any{"type": t})
	}
	return map[string]any{"oneOf": list}
}

// fix lets a property have one value only.
func fix(properties map[string]any, name, value string) {
	if p, ok := properties[name].(map[string]any); ok {
		p["enum"] = []string{value}
	}
}

// relink points references at the file that holds all definitions.
func relink(v any) {
	switch v := v.(type) {
	case map[string]map[string]any:
		for _, d := range v {
			relink(d)
		}
	case map[string]any:
		if ref, ok := v["$ref"].(string); ok {
			v["$ref"] = strings.Replace(ref, "#/definitions/", definitions, 1)
		}
		for _, inner := range v {
			relink(inner)
		}
	case []any:
		for _, inner := range v {
			relink(inner)
		}
	}
}

func writeJSON(path string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return os.WriteFile(path, data, 0o644)
}
