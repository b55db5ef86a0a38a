//go:build unix

package process

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	sparePrefix = ".spare-"
	mostSpares  = 64
	// largestSpare is the size of a folder that never held many entries.
	largestSpare = 4096
)

// spares are empty folders that wait for an attempt. Most commands leave nothing
// in their working folder, and to rename one costs a twentieth of making and
// removing it: a file system with a journal allocates and frees a block for
// each. A folder is kept only if nothing tells it from a new one.
type spares struct {
	root string

	mu    sync.Mutex
	next  int
	names []string
}

// take turns a spare folder into folder.
func (s *spares) take(folder string) bool {
	s.mu.Lock()
	if len(s.names) == 0 {
		s.mu.Unlock()
		return false
	}
	name := s.names[len(s.names)-1]
	s.names = s.names[:len(s.names)-1]
	s.mu.Unlock()
	if err := syscall.Rename(name, folder); err == nil {
		return true
	}
	_ = syscall.Rmdir(name)
	return false
}

// put keeps folder, or reports that it has to be removed.
func (s *spares) put(folder string) bool {
	if filepath.Dir(folder) != s.root || !asNew(folder) {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.names) >= mostSpares {
		return false
	}
	s.next++
	name := filepath.Join(s.root, sparePrefix+strconv.Itoa(s.next))
	if err := syscall.Rename(folder, name); err != nil {
		return false
	}
	s.names = append(s.names, name)
	return true
}

// remove removes the spare folders.
func (s *spares) remove() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, name := range s.names {
		if err := syscall.Rmdir(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, &fs.PathError{Op: "rmdir", Path: name, Err: err})
		}
	}
	s.names = nil
	return errors.Join(errs...)
}

// asNew reports whether a folder is empty and has the mode, owner and size of a
// new one, and no attributes.
func asNew(folder string) bool {
	fd, err := unix.Open(folder, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil ||
		uint32(st.Mode) != unix.S_IFDIR|0o700 || int(st.Uid) != os.Geteuid() || int(st.Gid) != os.Getegid() || st.Size > largestSpare {
		return false
	}
	return plain(fd) && isEmpty(fd)
}

func isEmpty(fd int) bool {
	var buf [512]byte
	for {
		n, err := unix.ReadDirent(fd, buf[:])
		if err != nil {
			return false
		}
		if n == 0 {
			return true
		}
		if _, _, names := unix.ParseDirent(buf[:n], 1, nil); len(names) > 0 { // skips . and ..
			return false
		}
	}
}
