package e2e

import (
	"os"
	"testing"
)

func touch(path string) error { return os.WriteFile(path, nil, 0o600) }

func read(t testing.TB, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}
