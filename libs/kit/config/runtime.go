package config

import (
	"runtime"
	"runtime/debug"
)

// UseCores has Go code run on n of the machine's cores at a time. With 0 it is half of
// them, at least one: the others are for the commands, and for the processes beside
// this one. A thread that looks for work on a core of its own costs more than it does
// while several processes share few cores. What a container's limit of CPU leaves is
// not halved. It is for main, before anything else runs.
func UseCores(n int) {
	switch {
	case n > 0:
		runtime.GOMAXPROCS(n)
	case runtime.GOMAXPROCS(0) == runtime.NumCPU():
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
