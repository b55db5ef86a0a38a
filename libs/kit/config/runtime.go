package config

import (
	"runtime"
	"runtime/debug"
)

// HalfTheCores has Go code run on half of the machine's cores at a time, at least one:
// the others are for the commands, and for the processes beside this one. A thread
// that looks for work on a core of its own costs more than it does while several
// processes share few cores. GOMAXPROCS and a container's limit of CPU say otherwise.
// It is for main, before anything else runs.
func HalfTheCores() {
	if _, given := lookup("GOMAXPROCS"); !given && runtime.GOMAXPROCS(0) == runtime.NumCPU() {
		runtime.GOMAXPROCS(max(1, runtime.NumCPU()/2))
	}
}

// CollectAt has garbage collected when the heap has grown by so many percent. GOGC
// says otherwise. It is for main, before anything else runs.
func CollectAt(percent int) {
	if _, given := lookup("GOGC"); !given {
		debug.SetGCPercent(percent)
	}
}
