//go:build unix

package spool

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// A process that is killed between its fork and the exec of the child leaves the
// lock with that child for a moment. Found by tests/chaos: a worker that was
// killed and started again at once said that its folder was in use.
func TestLockThatIsAboutToEndIsWaitedFor(t *testing.T) {
	dir := t.TempDir()
	f, err := lockFolder(filepath.Join(dir, "lock"))
	if err != nil {
		t.Fatal(err)
	}
	child := exec.Command("cat")
	child.ExtraFiles = []*os.File{f}
	stdin, err := child.StdinPipe()
	if err == nil {
		err = child.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil { // only the child has it now
		t.Fatal(err)
	}
	if !locked(t, dir) {
		t.Fatal("the child does not hold the lock")
	}
	opened := make(chan error, 1)
	go func() {
		s, err := Open(dir, Options{})
		if err == nil {
			err = s.Close()
		}
		opened <- err
	}()
	if err := stdin.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-opened; err != nil {
		t.Errorf("got %v", err)
	}
	if err := child.Wait(); err != nil {
		t.Error(err)
	}
}

func locked(t *testing.T, dir string) bool {
	t.Helper()
	f, err := os.Open(filepath.Join(dir, "lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	return tryLock(f) != nil
}
