//go:build unix

package process

import (
	"os"
	"syscall"
)

// outputPipe makes a pipe whose reading end waits in the poller, without a
// thread, and whose writing end is a plain descriptor for a child.
func outputPipe() (r *os.File, w int, err error) {
	fds, err := pipe()
	if err != nil {
		return nil, -1, err
	}
	if err := syscall.SetNonblock(fds[0], true); err != nil {
		_ = syscall.Close(fds[0])
		_ = syscall.Close(fds[1])
		return nil, -1, err
	}
	return os.NewFile(uintptr(fds[0]), "output"), fds[1], nil
}

// inputPipe makes a pipe whose writing end waits in the poller and whose
// reading end is a plain descriptor for a child.
func inputPipe() (r int, w *os.File, err error) {
	fds, err := pipe()
	if err != nil {
		return -1, nil, err
	}
	if err := syscall.SetNonblock(fds[1], true); err != nil {
		_ = syscall.Close(fds[0])
		_ = syscall.Close(fds[1])
		return -1, nil, err
	}
	return fds[0], os.NewFile(uintptr(fds[1]), "input"), nil
}
