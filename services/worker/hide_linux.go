package worker

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// hideMemory keeps other processes of the same user, commands among them, from
// reading this one's memory and environment, where its secrets are. Root can.
func hideMemory() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("hide this process from its commands: %w", err)
	}
	return nil
}
