package rig

import "syscall"

// dieWithParent has the kernel kill a process of the product when the driver dies.
func dieWithParent() *syscall.SysProcAttr { return &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} }
