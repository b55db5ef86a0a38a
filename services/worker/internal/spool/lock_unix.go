//go:build unix

package spool

import (
	"errors"
	"os"
	"syscall"
	"time"
)

// A process that was killed while it started another one has left its lock with
// that one for the moment until it becomes what it is to be.
const (
	lockWait  = time.Second
	lockPause = 5 * time.Millisecond
)

// lockFolder takes the lock of a folder, for which it waits lockWait at most. The
// kernel gives it back when the process ends, however it ends.
func lockFolder(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	for until := time.Now().Add(lockWait); ; time.Sleep(lockPause) {
		err := tryLock(f)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, errors.Join(err, f.Close())
		}
		if time.Now().After(until) {
			return nil, errors.Join(ErrInUse, f.Close())
		}
	}
}

func tryLock(f *os.File) error {
	return syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
}

// syncFolder flushes the names in a folder to the disk.
func syncFolder(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
