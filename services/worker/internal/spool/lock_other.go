//go:build !unix

package spool

import "os"

// lockFolder opens the lock file without a lock: on this system the worker's own
// lock of its data folder is the only one.
func lockFolder(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
}

// syncFolder does nothing: this system writes names with their files.
func syncFolder(string) error { return nil }
