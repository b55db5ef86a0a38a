//go:build !linux

package rig

import "syscall"

// dieWithParent does nothing where there is no such thing.
func dieWithParent() *syscall.SysProcAttr { return nil }
