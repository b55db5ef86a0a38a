//go:build unix

package process

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
)

// makeFolder makes the working folder with its input files. Where cred is given
// everything belongs to that user.
func (e *Executor) makeFolder(name string, spec executor.Spec, cred *syscall.Credential) (string, error) {
	root, err := e.rootFor(cred)
	if err != nil {
		return "", err
	}
	folder := filepath.Join(root, name)
	if cred != nil || !e.spares.take(folder) {
		err = os.Mkdir(folder, 0o700)
	}
	if errors.Is(err, fs.ErrExist) {
		// Left by an attempt that could not be closed; nothing of it runs any more.
		if err = e.removeFolder(folder); err == nil {
			err = os.Mkdir(folder, 0o700)
		}
	}
	if err != nil {
		return "", executor.InfraError("the working folder cannot be made", err)
	}
	if len(spec.Files) > 0 || cred != nil || (spec.WorkingDir != "" && !filepath.IsAbs(spec.WorkingDir)) {
		if err := fillFolder(folder, spec, cred); err != nil {
			return "", errors.Join(err, e.removeFolder(folder))
		}
	}
	return folder, nil
}

// rootFor picks the folder that holds attempts of a user: the usual one where
// that user can enter all of its parents, else one in the system's folder for
// temporary files.
func (e *Executor) rootFor(cred *syscall.Credential) (string, error) {
	if cred == nil {
		return e.roots[0], nil
	}
	// Names in it can be used but not listed by others.
	if err := os.Chmod(e.roots[0], 0o711); err == nil && enterable(e.roots[0]) {
		return e.roots[0], nil
	}
	root := e.roots[1]
	if err := os.Mkdir(root, 0o711); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", executor.InfraError("the folder for attempts of other users cannot be made", err)
	}
	if !ownFolder(root) {
		return "", executor.InfraError("the folder "+root+" belongs to somebody else", nil)
	}
	if err := os.Chmod(root, 0o711); err != nil || !enterable(root) {
		return "", executor.InfraError("the job's user cannot enter a folder of this worker", err)
	}
	return root, nil
}

// enterable reports whether everybody may pass through all parents of path.
func enterable(path string) bool {
	for dir := path; ; dir = filepath.Dir(dir) {
		info, err := os.Stat(dir)
		if err != nil || info.Mode().Perm()&0o001 == 0 {
			return false
		}
		if dir == filepath.Dir(dir) {
			return true
		}
	}
}

func fillFolder(folder string, spec executor.Spec, cred *syscall.Credential) error {
	root, err := os.OpenRoot(folder)
	if err != nil {
		return executor.InfraError("the working folder cannot be opened", err)
	}
	defer root.Close()
	for _, file := range spec.Files {
		if err := writeFile(root, file); err != nil {
			return err
		}
	}
	if dir := spec.WorkingDir; dir != "" && !filepath.IsAbs(dir) {
		if !filepath.IsLocal(dir) {
			return executor.UserError(fmt.Sprintf("the working directory %q leaves the working folder", dir), nil)
		}
		if err := root.MkdirAll(filepath.Clean(dir), 0o755); err != nil {
			return executor.UserError(fmt.Sprintf("the working directory %q cannot be made", dir), err)
		}
	}
	if cred == nil {
		return nil
	}
	err = fs.WalkDir(root.FS(), ".", func(name string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return root.Lchown(name, int(cred.Uid), int(cred.Gid))
	})
	if err != nil {
		return executor.InfraError("the working folder cannot be given to the job's user", err)
	}
	return nil
}

func writeFile(root *os.Root, file executor.File) error {
	switch {
	case file.Path == "" || strings.ContainsRune(file.Path, 0):
		return executor.UserError("an input file has no usable path", nil)
	case path.IsAbs(file.Path):
		return executor.UserError(fmt.Sprintf("the path of input file %q is absolute", file.Path), nil)
	case !filepath.IsLocal(file.Path):
		return executor.UserError(fmt.Sprintf("the path of input file %q leaves the working folder", file.Path), nil)
	}
	name := path.Clean(file.Path)
	if dir := path.Dir(name); dir != "." {
		if err := root.MkdirAll(dir, 0o755); err != nil {
			return fileError(file, err)
		}
	}
	mode := fs.FileMode(file.Mode) & fs.ModePerm
	if file.Mode == 0 {
		mode = 0o644
	}
	// A second file of the same path is a mistake of the job.
	f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fileError(file, err)
	}
	_, err = f.Write(file.Content)
	if err == nil {
		err = f.Chmod(mode)
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return fileError(file, err)
	}
	return nil
}

func fileError(file executor.File, err error) error {
	reason := fmt.Sprintf("input file %q cannot be written", file.Path)
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || errors.Is(err, syscall.EIO) {
		return executor.InfraError(reason, err)
	}
	return executor.UserError(reason, err)
}

// releaseFolder removes a working folder, or keeps it for another attempt under
// another name where the command left it as it was.
func (e *Executor) releaseFolder(folder string) error {
	if e.spares.put(folder) {
		return nil
	}
	return e.removeFolder(folder)
}

// removeFolder removes a working folder and all it holds, whatever that is.
func (e *Executor) removeFolder(folder string) error {
	// Most commands leave nothing, and then this one call does it.
	err := syscall.Rmdir(folder)
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	// A command of root may have mounted something: removing the content of a
	// bind mount would remove files of the host.
	if err := unmountBelow(folder); err != nil {
		return fmt.Errorf("remove working folder: %w", err)
	}
	if err = os.RemoveAll(folder); err == nil {
		return nil
	}
	parent, openErr := os.OpenRoot(filepath.Dir(folder))
	if openErr != nil {
		return fmt.Errorf("remove working folder: %w", errors.Join(err, openErr))
	}
	defer parent.Close()
	makeRemovable(parent, filepath.Base(folder))
	if err = os.RemoveAll(folder); err != nil {
		return fmt.Errorf("remove working folder: %w", err)
	}
	return nil
}

// makeRemovable opens every folder below name for its owner and takes flags
// away that forbid removal. It follows no links; what fails shows in the
// removal that comes after it.
func makeRemovable(parent *os.Root, name string) {
	info, err := parent.Lstat(name)
	if err != nil || (!info.IsDir() && !info.Mode().IsRegular()) {
		return
	}
	if !info.IsDir() {
		clearFlags(parent, name)
		return
	}
	_ = parent.Chmod(name, 0o700)
	clearFlags(parent, name)
	_ = parent.Chmod(name, 0o700)
	dir, err := parent.OpenRoot(name)
	if err != nil {
		return
	}
	defer dir.Close()
	list, err := dir.Open(".")
	if err != nil {
		return
	}
	names, _ := list.Readdirnames(-1)
	_ = list.Close()
	for _, child := range names {
		makeRemovable(dir, child)
	}
}
