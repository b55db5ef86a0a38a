// Command modsync keeps the go.mod files of the workspace in step with the
// code, so that every module builds without go.work.
//
// For each module that go.work names it reads the imports of its packages
// (tests and files of every platform included), follows the local ones from
// module to module, and writes `require <local> v0.0.0` and `replace <local> =>
// <relative path>` for that whole closure. A replace is needed for modules that
// are reached only indirectly too, since replaces of a dependency do not count.
// Then it tidies the module with GOWORK=off.
//
// Usage, from anywhere inside the workspace:
//
//	modsync              sync and tidy every module
//	modsync -only DIR    sync and tidy one module, touch nothing else
//	modsync -check       change nothing; exit 1 and name each module that would change
//
// It uses the standard library only, so that it runs when the go.mod files are
// in no state to be loaded (GO111MODULE=off go run .).
package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

func main() {
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

func run(args []string, stdout, stderr io.Writer) int {
	fs := flag.NewFlagSet("modsync", flag.ContinueOnError)
	fs.SetOutput(stderr)
	check := fs.Bool("check", false, "change nothing, exit 1 when a module would change")
	only := fs.String("only", "", "sync only the module in this `folder`")
	root := fs.String("root", "", "workspace `folder` (default: the nearest one upwards with a go.work)")
	if err := fs.Parse(args); err != nil {
		return 2
	}
	if fs.NArg() > 0 {
		fmt.Fprintln(stderr, "modsync: unexpected argument", fs.Arg(0))
		return 2
	}
	if err := sync(*root, *only, *check, stdout); err != nil {
		fmt.Fprintln(stderr, "modsync:", err)
		return 1
	}
	return 0
}

// sync brings the modules in step, or with check only reports what is not.
// Every module is attempted; the errors of all of them are joined.
func sync(root, only string, check bool, out io.Writer) error {
	root, err := workspaceRoot(root)
	if err != nil {
		return err
	}
	ws, err := loadWorkspace(root)
	if err != nil {
		return err
	}
	todo := ws.ordered()
	if only != "" {
		m, err := ws.byDir(only)
		if err != nil {
			return err
		}
		todo = []*module{m}
	}
	tmp, err := os.MkdirTemp("", "modsync-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)

	var errs []error
	for i, m := range todo {
		if m.broken != nil {
			errs = append(errs, fmt.Errorf("%s: %w", m.rel, m.broken))
			continue
		}
		dir := filepath.Join(tmp, fmt.Sprint(i))
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		changed, err := ws.syncModule(m, dir, check)
		switch {
		case err != nil:
			errs = append(errs, fmt.Errorf("%s: %w", m.rel, err))
		case changed != "" && check:
			errs = append(errs, fmt.Errorf("%s: %s out of step with its imports; run `make mod-sync`", m.rel, changed))
		case changed != "":
			fmt.Fprintf(out, "%s: %s updated\n", m.rel, changed)
		}
	}
	return errors.Join(errs...)
}

// syncModule works on copies of go.mod and go.sum in tmp, then writes them back
// unless check is set. It returns the names of the files that differ, "" if none.
// When tidying fails or cannot be tried the synced local requires are still written back (unless
// check is set), since they are often what is missing.
func (ws *workspace) syncModule(m *module, tmp string, check bool) (string, error) {
	modFile, sumFile := filepath.Join(m.dir, "go.mod"), filepath.Join(m.dir, "go.sum")
	tmpMod, tmpSum := filepath.Join(tmp, "go.mod"), filepath.Join(tmp, "go.sum")
	oldMod, err := os.ReadFile(modFile)
	if err != nil {
		return "", err
	}
	oldSum, err := os.ReadFile(sumFile)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", err
	}
	if err := os.WriteFile(tmpMod, oldMod, 0o644); err != nil {
		return "", err
	}
	if oldSum != nil {
		if err := os.WriteFile(tmpSum, oldSum, 0o644); err != nil {
			return "", err
		}
	}
	edits, err := ws.edits(m)
	if err != nil {
		return "", err
	}
	if len(edits) > 0 {
		if _, err := goCmd(m.dir, append(append([]string{"mod", "edit"}, edits...), tmpMod)...); err != nil {
			return "", err
		}
	}
	err = m.absent
	if err == nil {
		_, err = goCmd(m.dir, "mod", "tidy", "-modfile="+tmpMod)
	}
	if err != nil {
		if !check {
			if synced, rerr := os.ReadFile(tmpMod); rerr == nil && !bytes.Equal(synced, oldMod) {
				err = errors.Join(err, replaceFile(modFile, synced))
			}
		}
		return "", err
	}

	var changed []string
	for _, f := range []struct {
		name, tmp, dst string
		old            []byte
	}{{"go.mod", tmpMod, modFile, oldMod}, {"go.sum", tmpSum, sumFile, oldSum}} {
		now, err := os.ReadFile(f.tmp)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return "", err
		}
		if bytes.Equal(now, f.old) {
			continue
		}
		changed = append(changed, f.name)
		if check {
			continue
		}
		if len(now) == 0 {
			if err := os.Remove(f.dst); err != nil && !errors.Is(err, os.ErrNotExist) {
				return "", err
			}
			continue
		}
		if err := replaceFile(f.dst, now); err != nil {
			return "", err
		}
	}
	return strings.Join(changed, " and "), nil
}

// replaceFile writes through a rename, so that a go command running beside this
// one never reads half a file.
func replaceFile(path string, data []byte) error {
	tmp := path + ".modsync"
	if err := os.WriteFile(tmp, data, 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

// goCmd runs the go command outside the workspace and returns its stdout.
func goCmd(dir string, args ...string) ([]byte, error) {
	cmd := exec.Command("go", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOWORK=off", "GO111MODULE=on")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("go %s: %w\n%s", strings.Join(args[:min(2, len(args))], " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.Bytes(), nil
}
