package clock

import (
	"os"
	"strings"
)

// boot is the kernel's id of this boot, with the time namespace, which may
// have its own idea of how long that has been.
func boot() string {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	space, err := os.Readlink("/proc/self/ns/time")
	if err != nil {
		space = "" // a kernel before 5.6 has none
	}
	return strings.TrimSpace(string(id)) + " " + space
}
