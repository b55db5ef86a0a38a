package rig

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// StartArmed starts, where it does not run, the program that was built with
// failpoints in the place of this process, and has it do what points says (the
// value of FAILPOINT). The next Start is that of the plain program again.
func (p *Process) StartArmed(points string) error {
	return p.start(p.armedPath(), "FAILPOINT="+points)
}

func (p *Process) armedPath() string {
	return filepath.Join(filepath.Dir(p.path), "failpoint", filepath.Base(p.path))
}

// StartAside is StartArmed of a service at another address than its own, which
// is returned: nobody comes to it who is not sent there.
func (r *Rig) StartAside(s *Service, points string) (addr string, err error) {
	if addr, err = r.freeAddr(); err != nil {
		return "", err
	}
	return addr, s.start(s.armedPath(), "FAILPOINT="+points, "LISTEN_ADDR="+addr)
}

// AwaitKill waits until the process has killed itself. It is an error when it
// still runs at the end of ctx, and when it ended in another way. The caller has
// started it, and does not end it meanwhile.
func (p *Process) AwaitKill(ctx context.Context) error {
	p.mu.Lock()
	ended := p.ended
	p.mu.Unlock()
	if ended == nil {
		return fmt.Errorf("%s was not started", p.Name)
	}
	began := time.Now()
	select {
	case <-ended:
	case <-ctx.Done():
		return fmt.Errorf("%s has not killed itself within %v", p.Name, time.Since(began))
	}
	p.mu.Lock()
	err := p.err
	p.mu.Unlock()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() && status.Signal() == syscall.SIGKILL {
			return nil
		}
	}
	return fmt.Errorf("%s did not kill itself, it ended: %w", p.Name, err)
}
