//go:build !linux

// Command warm-init is of use in containers only.
package main

func main() {}
