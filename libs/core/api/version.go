package api

// Version and Commit are set by the linker at build time; they are not written
// while a program runs.
var (
	Version = "dev"
	Commit  = "unknown"
)
