package up

import (
	"os"
	"path/filepath"
)

// self is how the person who started this program can start it again.
func self() string {
	if name := os.Args[0]; filepath.Base(name) != name {
		return name
	}
	return "cmdexec"
}
