//go:build !failpoint

package failpoint

// At does nothing: this program has no failpoints.
func At(Name) {}

// Check returns an error when FAILPOINT cannot be used. Here it is not read.
func Check() error { return nil }
