//go:build unix

package natsd

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// A process that was killed while it started another one has left its lock with
// that one for the moment until it becomes what it is to be.
const (
	lockWait  = time.Second
	lockPause = 5 * time.Millisecond
)

// lockFile takes an exclusive lock that ends with the file's handle, and so with
// the process, however it dies. It waits for it lockWait at most.
func lockFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open lock file: %w", err)
	}
	for until := time.Now().Add(lockWait); ; time.Sleep(lockPause) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, errors.Join(fmt.Errorf("lock data folder: %w", err), f.Close())
		}
		if time.Now().After(until) {
			return nil, errors.Join(ErrInUse, f.Close())
		}
	}
}

func diskFree(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, err
	}
	return int64(uint64(st.Bavail) * uint64(st.Bsize)), nil
}
