//go:build !unix

package cli

import "syscall"

// signalName knows the two signals that exist everywhere.
func signalName(s syscall.Signal) string {
	switch s {
	case syscall.SIGKILL:
		return "SIGKILL"
	case syscall.SIGTERM:
		return "SIGTERM"
	default:
		return ""
	}
}
