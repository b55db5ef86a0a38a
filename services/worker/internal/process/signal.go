//go:build unix

package process

import "syscall"

// ParseSignal gives the signal that a job may name as its stop signal. Empty
// means SIGTERM.
func ParseSignal(name string) (syscall.Signal, bool) {
	switch name {
	case "", "SIGTERM":
		return syscall.SIGTERM, true
	case "SIGINT":
		return syscall.SIGINT, true
	case "SIGKILL":
		return syscall.SIGKILL, true
	case "SIGHUP":
		return syscall.SIGHUP, true
	case "SIGQUIT":
		return syscall.SIGQUIT, true
	case "SIGUSR1":
		return syscall.SIGUSR1, true
	case "SIGUSR2":
		return syscall.SIGUSR2, true
	}
	return 0, false
}
