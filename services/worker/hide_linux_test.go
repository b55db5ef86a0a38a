package worker

import (
	"testing"

	"golang.org/x/sys/unix"
)

func TestCommandsCannotReadTheWorkersMemory(t *testing.T) {
	if err := hideMemory(); err != nil {
		t.Fatal(err)
	}
	if dumpable, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0); err != nil || dumpable != 0 {
		t.Errorf("dumpable is %d, %v", dumpable, err)
	}
}
