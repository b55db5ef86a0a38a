//go:build unix

package process

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
)

const (
	shellPath   = "/bin/sh"
	defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

	// markName is the variable by which a worker finds its own processes again.
	markName = "CMDEXEC_MARK"
)

// markOf is Options.Mark/job/attempt/lease digest. The lease id itself stays with
// the worker: whoever can read a job's environment must not learn it.
func markOf(mark string, spec executor.Spec) string {
	sum := sha256.Sum256([]byte(spec.LeaseID))
	return mark + "/" + spec.JobID + "/" + strconv.Itoa(spec.Attempt) + "/" + hex.EncodeToString(sum[:6])
}

func reserved(name string) bool {
	return name == markName || name == "CMDEXEC_JOB_ID" || name == "CMDEXEC_ATTEMPT"
}

func checkEnv(env map[string]string) error {
	for name, value := range env {
		switch {
		case name == "" || strings.ContainsAny(name, "=\x00"):
			return executor.UserError("an environment variable has an impossible name", nil)
		case strings.ContainsRune(value, 0):
			return executor.UserError("an environment variable contains a NUL byte", nil)
		case reserved(name):
			return executor.UserError("the environment variable "+name+" is set by the worker", nil)
		}
	}
	return nil
}

// environment builds a command's whole environment, sorted behind the fixed
// part, from the spec alone.
func environment(spec executor.Spec, folder, mark string) []string {
	env := make([]string, 0, 7+len(spec.Env))
	for _, base := range [...][2]string{
		{"PATH", defaultPath}, {"HOME", folder}, {"TMPDIR", folder}, {"LANG", "C.UTF-8"},
	} {
		if _, given := spec.Env[base[0]]; !given {
			env = append(env, base[0]+"="+base[1])
		}
	}
	env = append(env,
		"CMDEXEC_JOB_ID="+spec.JobID,
		"CMDEXEC_ATTEMPT="+strconv.Itoa(spec.Attempt),
		markName+"="+mark)
	if len(spec.Env) > 0 {
		for _, name := range slices.Sorted(maps.Keys(spec.Env)) {
			env = append(env, name+"="+spec.Env[name])
		}
	}
	return env
}

// Results of findProgram, as exit codes of a shell.
const (
	exitNotExecutable = 126
	exitNotFound      = 127
)

// findProgram gives the file that a shell would run for name, or the exit code
// and message with which a shell would refuse it.
func findProgram(name, path, dir string) (file string, code int, message string) {
	if strings.Contains(name, "/") {
		file = name
		if !filepath.IsAbs(file) {
			file = filepath.Join(dir, file)
		}
		switch err := runnable(file); {
		case err == nil:
			return file, 0, ""
		case errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR):
			return "", exitNotFound, name + ": not found"
		case errors.Is(err, errIsFolder):
			return "", exitNotExecutable, name + ": is a directory"
		default:
			return "", exitNotExecutable, name + ": permission denied"
		}
	}
	denied := false
	for _, folder := range strings.Split(path, ":") {
		if !filepath.IsAbs(folder) {
			folder = filepath.Join(dir, folder)
		}
		file = filepath.Join(folder, name)
		err := runnable(file)
		if err == nil {
			return file, 0, ""
		}
		denied = denied || errors.Is(err, fs.ErrPermission)
	}
	if denied {
		return "", exitNotExecutable, name + ": permission denied"
	}
	return "", exitNotFound, name + ": not found"
}

var errIsFolder = errors.New("is a directory")

func runnable(file string) error {
	info, err := os.Stat(file)
	switch {
	case err != nil:
		return err
	case info.IsDir():
		return errIsFolder
	case info.Mode().Perm()&0o111 == 0:
		return fs.ErrPermission
	}
	return nil
}
