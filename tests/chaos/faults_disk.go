package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cmdexec/cmdexec/tests/chaos/history"
)

// smallDisk is an ext4 file system in a file, mounted for the store of NATS. It
// needs root.
type smallDisk struct {
	image, dir string
	mounted    bool
}

const smallDiskBytes = 512 << 20

func newSmallDisk(dir string) (*smallDisk, error) {
	d := &smallDisk{image: filepath.Join(dir, "disk.img"), dir: filepath.Join(dir, "disk")}
	if err := os.MkdirAll(d.dir, 0o700); err != nil {
		return nil, err
	}
	f, err := os.Create(d.image)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(f.Truncate(smallDiskBytes), f.Close()); err != nil {
		return nil, err
	}
	if err := command("mkfs.ext4", "-q", d.image); err != nil {
		return nil, err
	}
	return d, d.mount()
}

func (d *smallDisk) mount() error {
	err := command("mount", "-o", "loop", d.image, d.dir)
	d.mounted = err == nil
	return err
}

func (d *smallDisk) unmount() error {
	if !d.mounted {
		return nil
	}
	err := command("umount", d.dir)
	d.mounted = err != nil
	return err
}

// remount brings the file system back after a shutdown. While a namespace that
// began meanwhile has a copy of the mount, mounting gives the dead one again.
func (d *smallDisk) remount(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	return until(ctx, func() error {
		if err := d.unmount(); err != nil {
			return err
		}
		if err := d.mount(); err != nil {
			return err
		}
		probe := filepath.Join(d.dir, "probe")
		return errors.Join(os.WriteFile(probe, nil, 0o600), os.Remove(probe))
	})
}

func command(name string, args ...string) error {
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, out)
	}
	return nil
}

// shutdown cuts the power of the file system: what was not synced is gone, the
// journal is not flushed, and every further write fails.
func (d *smallDisk) shutdown() error {
	const (
		ext4Shutdown = 0x8004587d // _IOR('X', 125, __u32)
		noLogFlush   = 2
	)
	f, err := os.Open(d.dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.IoctlSetPointerInt(int(f.Fd()), ext4Shutdown, noLogFlush); err != nil {
		return fmt.Errorf("shut the file system down: %w", err)
	}
	return nil
}

// powerCut takes the power from the disk of NATS and from the server.
type powerCut struct{}

// The server stands still from before the cut on. One that lives on with a disk that
// fails is another fault: it acknowledges nothing, but calls what it cannot read not
// found, or gives an older version.
func (powerCut) inject(ctx context.Context, s *scene) error {
	server := s.rig.NATS[0]
	if err := server.Signal(syscall.SIGSTOP); err != nil {
		return err
	}
	if err := s.disk.shutdown(); err != nil {
		return err
	}
	wait(ctx, s.between(0, 500*time.Millisecond))
	return server.Kill()
}

// heal mounts the disk and starts what has stopped. The server does not sync the
// description of a stream in async persist mode: that the power cut took it is for
// the services to mend.
func (powerCut) heal(ctx context.Context, s *scene) error {
	if err := s.disk.remount(ctx); err != nil {
		return err
	}
	return s.rig.StartAll()
}

// diskFull fills the disk of NATS. Submits must be refused and answered; after
// space was made and the server restarted everything that was acknowledged is there.
type diskFull struct{}

func (diskFull) ballast(s *scene) string { return filepath.Join(s.disk.dir, "ballast") }

func (f diskFull) inject(ctx context.Context, s *scene) error {
	file, err := os.Create(f.ballast(s))
	if err != nil {
		return err
	}
	block := make([]byte, 1<<20)
	for err == nil {
		_, err = file.Write(block)
	}
	_ = file.Close()
	if !errors.Is(err, unix.ENOSPC) {
		return fmt.Errorf("fill the disk: %w", err)
	}
	// Streams have allocated ahead: it takes writes until the server notices.
	return s.within(ctx, 90*time.Second, func() error {
		p := history.Plan{Kind: "padding", MaxAttempts: 1}
		spec := s.load.spec(p, "-run", "1ms")
		spec["stdin"] = strings.Repeat("x", 100<<10)
		key := fmt.Sprintf("full-%d", s.rng.Uint64())
		spec["labels"] = map[string]string{"key": key}
		began := time.Now()
		a := s.load.call(ctx, "canary", "POST", "/api/jobs/create", spec, key, 10*time.Second)
		submit := &history.Submit{Key: key, Plan: p, Begin: began.UnixNano(), Code: a.code, Target: "create"}
		if a.err == nil && a.code < 300 {
			submit.JobID = jobID(a.body)
			s.load.acknowledged(submit.JobID, "canary")
		}
		s.w.Add(history.Event{Submit: submit})
		if a.code == 503 || a.code == 507 {
			return nil
		}
		return fmt.Errorf("a submit with the disk full is answered %d (%s, %v)", a.code, a.problem().Code, a.err)
	})
}

func (f diskFull) heal(_ context.Context, s *scene) error {
	if err := os.Remove(f.ballast(s)); err != nil {
		return err
	}
	if err := s.rig.NATS[0].Kill(); err != nil {
		return err
	}
	return s.rig.StartAll()
}
