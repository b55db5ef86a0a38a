package rig

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A dockerd takes a process with the id of its dead containerd for one that is
// starting: a stranger that has got the id, or the dead one until it is reaped. CI
// has seen it.
func TestTheNoteOfADeadContainerdIsForgotten(t *testing.T) {
	e := &Engine{dir: t.TempDir()}
	require.NoError(t, e.forgetContainerd(), "there is none")
	note := filepath.Join(e.dir, "exec", "containerd", "containerd.pid")
	require.NoError(t, os.MkdirAll(filepath.Dir(note), 0o700))
	dead := exec.Command("true")
	require.NoError(t, dead.Start())
	defer func() { require.NoError(t, dead.Wait()) }()                                                   // a zombie until then
	for _, pid := range []string{strconv.Itoa(os.Getpid()), strconv.Itoa(dead.Process.Pid), "4194305"} { // nobody has the last one
		require.Eventually(t, func() bool { // the command has ended
			data, err := os.ReadFile(filepath.Join("/proc", pid, "cmdline"))
			return err != nil || len(data) == 0 || pid == strconv.Itoa(os.Getpid())
		}, 10*time.Second, time.Millisecond)
		require.NoError(t, os.WriteFile(note, []byte(pid), 0o600))
		require.NoError(t, e.forgetContainerd())
		require.NoFileExists(t, note)
	}
}
