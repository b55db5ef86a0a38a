//go:build unix

package process

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
)

// Executor runs attempts as host processes. It is safe for concurrent use.
type Executor struct {
	worker    string
	mark      string
	roots     []string // folders that hold attempts; the first one is the usual one
	killBound time.Duration
	log       *slog.Logger
	host      *host
	null      *os.File // standard input of commands that have none
	buffers   sync.Pool
	spares    spares
}

var _ executor.Executor = (*Executor)(nil)

// New finds out how process trees can be tracked and limited on this machine,
// which starts a few short processes, and makes DataDir/attempts. It starts no
// goroutine. Without control groups on Linux it makes this process the
// subreaper of its descendants.
func New(opts Options) (*Executor, error) { return newExecutor(opts, anyTracking) }

func newExecutor(opts Options, allowed tracking) (*Executor, error) {
	if opts.Mark == "" {
		opts.Mark = opts.WorkerID
	}
	if !safeName(opts.Mark) {
		return nil, fmt.Errorf("process executor: the mark %q is not a plain name", opts.Mark)
	}
	if opts.DataDir == "" {
		return nil, errors.New("process executor: no data folder")
	}
	data, err := filepath.Abs(opts.DataDir)
	if err != nil {
		return nil, fmt.Errorf("process executor: data folder: %w", err)
	}
	e := &Executor{
		worker: opts.WorkerID,
		mark:   opts.Mark,
		roots: []string{
			filepath.Join(data, "attempts"),
			// For commands of another user where DataDir is closed to that user.
			filepath.Join(os.TempDir(), "cmdexec-"+opts.Mark),
		},
		killBound: opts.KillBound,
		log:       opts.Log,
	}
	if e.killBound <= 0 {
		e.killBound = DefaultKillBound
	}
	if e.log == nil {
		e.log = slog.New(slog.DiscardHandler)
	}
	e.buffers.New = func() any { return new(copyBuffer) }
	if err := os.MkdirAll(e.roots[0], 0o700); err != nil {
		return nil, fmt.Errorf("process executor: make folder for attempts: %w", err)
	}
	// Mounts below it are looked up by their real path.
	if e.roots[0], err = filepath.EvalSymlinks(e.roots[0]); err != nil {
		return nil, fmt.Errorf("process executor: folder for attempts: %w", err)
	}
	e.spares.root = e.roots[0]
	if e.null, err = os.OpenFile(os.DevNull, os.O_RDWR, 0); err != nil {
		return nil, fmt.Errorf("process executor: %w", err)
	}
	if e.host, err = newHost(opts.Mark, data, int(e.null.Fd()), allowed, e.log); err != nil {
		return nil, errors.Join(fmt.Errorf("process executor: %w", err), e.null.Close())
	}
	return e, nil
}

// Name returns "process".
func (e *Executor) Name() string { return "process" }

// Describe says in one line, for the worker's owner, how process trees are
// tracked and which limits hold here.
func (e *Executor) Describe() string { return e.host.describe() }

// Limits says which limits of a spec hold on this machine. Those that do not
// hold are not applied; the caller decides whether to offer this worker.
func (e *Executor) Limits() Limits { return e.host.limits() }

// Probe checks that commands can be run: a shell, and a folder to write to.
func (e *Executor) Probe(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if info, err := os.Stat(shellPath); err != nil || info.IsDir() || info.Mode().Perm()&0o111 == 0 {
		return fmt.Errorf("no shell at %s", shellPath)
	}
	folder, err := os.MkdirTemp(e.roots[0], ".probe-")
	if err != nil {
		return fmt.Errorf("the folder for attempts cannot be written: %w", err)
	}
	if err := os.Remove(folder); err != nil {
		return fmt.Errorf("the folder for attempts cannot be written: %w", err)
	}
	return nil
}

// Prepare checks the spec, makes the working folder with the input files, and
// the control groups with their limits.
func (e *Executor) Prepare(ctx context.Context, spec executor.Spec) (executor.Attempt, error) {
	if err := ctx.Err(); err != nil {
		return nil, executor.InfraError("preparing was called off", err)
	}
	if err := e.check(spec); err != nil {
		return nil, err
	}
	sig, ok := ParseSignal(spec.StopSignal)
	if !ok {
		return nil, executor.UserError(fmt.Sprintf("stop signal %q is not known", spec.StopSignal), nil)
	}
	cred, err := credential(spec.User)
	if err != nil {
		return nil, err
	}
	a := &attempt{executor: e, spec: spec, stopSignal: sig}
	a.command.cred = cred
	name := spec.JobID + "-" + strconv.Itoa(spec.Attempt)
	if a.folder, err = e.makeFolder(name, spec, cred); err != nil {
		return nil, executor.AsPrepareError(err)
	}
	if err := a.prepare(); err != nil {
		return nil, executor.AsPrepareError(errors.Join(err, e.removeFolder(a.folder)))
	}
	return a, nil
}

func (e *Executor) check(spec executor.Spec) error {
	switch {
	case !safeName(spec.JobID) || spec.Attempt < 0:
		return executor.InfraError("the assignment has no usable job id and attempt", nil)
	case spec.WorkerID != "" && spec.WorkerID != e.worker:
		return executor.InfraError("the assignment is for another worker", nil)
	case spec.Image != "":
		return executor.InfraError("the process executor runs no container images", nil)
	case len(spec.Argv) == 0 && spec.Shell == "":
		return executor.UserError("there is no command", nil)
	case strings.ContainsRune(spec.Shell, 0):
		return executor.UserError("the command contains a NUL byte", nil)
	case strings.ContainsRune(spec.WorkingDir, 0):
		return executor.UserError("the working directory contains a NUL byte", nil)
	}
	for _, arg := range spec.Argv {
		if strings.ContainsRune(arg, 0) {
			return executor.UserError("an argument contains a NUL byte", nil)
		}
	}
	if len(spec.Argv) > 0 && spec.Argv[0] == "" {
		return executor.UserError("the program has no name", nil)
	}
	return checkEnv(spec.Env)
}

// Recover kills every process and removes every control group and working
// folder that carry this worker's id. Call it before the first Prepare, and
// only while no other process uses the same worker id.
func (e *Executor) Recover(ctx context.Context) error {
	errs := []error{e.host.recover(ctx, e.killBound)}
	for _, root := range e.roots {
		if !ownFolder(root) {
			continue
		}
		entries, err := os.ReadDir(root)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		for _, entry := range entries {
			if err := ctx.Err(); err != nil {
				return errors.Join(append(errs, err)...)
			}
			if err := e.removeFolder(filepath.Join(root, entry.Name())); err != nil {
				errs = append(errs, err)
				continue
			}
			e.log.Info("removed the working folder of an earlier life", "folder", entry.Name())
		}
		if root != e.roots[0] {
			errs = append(errs, os.Remove(root))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("recover process executor: %w", err)
	}
	return nil
}

// Close gives back what the executor itself holds. Attempts must be closed
// before. It is optional: the next life's Recover does the same.
func (e *Executor) Close() error {
	if err := errors.Join(e.spares.remove(), e.host.close(), e.null.Close()); err != nil {
		return fmt.Errorf("close process executor: %w", err)
	}
	return nil
}

// safeName reports whether s can be part of a file name, a control group's name
// and a mark, whose separators '.' and '/' it must not hold.
func safeName(s string) bool {
	if s == "" || len(s) > 128 {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '_' {
			return false
		}
	}
	return s[0] != '-'
}

// ownFolder reports whether path is a folder, not a link to one, of this user.
func ownFolder(path string) bool {
	info, err := os.Lstat(path)
	if err != nil || !info.IsDir() {
		return false
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && int(st.Uid) == os.Geteuid()
}
