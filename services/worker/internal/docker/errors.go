package docker

import (
	"strings"

	cerrdefs "github.com/containerd/errdefs"
)

// gone reports whether the engine said that the object does not exist.
func gone(err error) bool { return cerrdefs.IsNotFound(err) }

// inUse reports whether the engine said that the object's state is in the way.
func inUse(err error) bool { return cerrdefs.IsConflict(err) }

// answered reports whether err is the engine's own answer, so that it is known
// what it did, and not a connection that failed or an answer that never came.
func answered(err error) bool {
	return cerrdefs.IsNotFound(err) || cerrdefs.IsConflict(err) || cerrdefs.IsInvalidArgument(err) ||
		cerrdefs.IsPermissionDenied(err) || cerrdefs.IsUnauthorized(err) || cerrdefs.IsNotImplemented(err) ||
		cerrdefs.IsNotModified(err) || cerrdefs.IsInternal(err)
}

// userFault reports whether the engine refused to start a container for what
// the job asks, which is told only by words.
func userFault(err error) (string, bool) {
	text := err.Error()
	for _, fault := range [...]struct{ words, reason string }{
		{"unable to find user", "the image has no such user"},
		{"unable to find group", "the image has no such group"},
		{"no matching entries in passwd file", "the image has no such user"},
		{"no matching entries in group file", "the image has no such group"},
		{"not a directory", "the working directory, or a folder that the worker mounts, is a file in the image"},
		{"argument list too long", "arguments and environment are too long"},
	} {
		if strings.Contains(text, fault.words) {
			return fault.reason, true
		}
	}
	return "", false
}

// notRunnable gives the exit code that a shell would have for a program that
// the engine could not start. It matters only where no init process starts it.
func notRunnable(err error) (code int, ok bool) {
	text := err.Error()
	switch {
	case strings.Contains(text, "executable file not found"), strings.Contains(text, "no such file or directory") && strings.Contains(text, "exec"):
		return 127, true
	case strings.Contains(text, "permission denied") && strings.Contains(text, "exec:"), strings.Contains(text, "exec format error"):
		return 126, true
	}
	return 0, false
}
