// Package natsdtest starts embedded NATS servers for tests.
package natsdtest

import (
	"testing"

	"github.com/cmdexec/cmdexec/libs/natsd"
)

// Start runs a server on a temporary folder for the length of the test. It takes
// in-process connections only. A test that closes its connections by t.Cleanup
// after calling Start closes them before the server goes.
func Start(t testing.TB) *natsd.Server {
	t.Helper()
	return StartIn(t, t.TempDir())
}

// StartIn is Start on a folder of the caller's, such as that of a server that was
// shut down before.
func StartIn(t testing.TB, dir string) *natsd.Server {
	t.Helper()
	s, err := natsd.Start(natsd.Options{StoreDir: dir})
	if err != nil {
		t.Fatalf("start embedded nats: %v", err)
	}
	t.Cleanup(s.Shutdown)
	return s
}
