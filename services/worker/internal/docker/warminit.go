package docker

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/mount"
)

// How the init gets into warm containers.
//
// The engine may be on another machine, or this worker in a container, so that no
// folder of the host can be mounted. So the init is in a volume of the engine, which
// is filled through a container that is never started, and is mounted read-only. It
// belongs to this worker alone and is named by its content. As soon as no warm
// container is left it is removed.

const (
	initFolder = "/.cmdexec"
	initFile   = "init"
	maxInit    = 16 << 20
)

//go:embed warminit
var builtIn embed.FS

// errNoInit means that this worker was built without the init.
var errNoInit = errors.New("this worker was built without the init of warm containers")

// initFor is the init for the engine's kind of machine.
func initFor(files fs.FS, arch string) ([]byte, error) {
	if files == nil {
		inner, err := fs.Sub(builtIn, "warminit")
		if err != nil {
			return nil, err
		}
		files = inner
	}
	switch arch {
	case "x86_64":
		arch = "amd64"
	case "aarch64":
		arch = "arm64"
	}
	program, err := fs.ReadFile(files, "warm-init-"+path.Base(arch))
	if err != nil {
		return nil, fmt.Errorf("%w for %s; make build has it", errNoInit, oneLine(arch))
	}
	return program, nil
}

// initVolume is the volume with the init, of one worker.
type initVolume struct {
	name    string
	labels  map[string]string
	program []byte
}

func newInitVolume(program []byte, opts *Options) *initVolume {
	sum := sha256.New()
	fmt.Fprintf(sum, "%s\x00", opts.Mark)
	sum.Write(program)
	return &initVolume{
		name: "cmdexec-init-" + hex.EncodeToString(sum.Sum(nil)[:8]), program: program,
		labels: map[string]string{labelWorker: opts.WorkerID, labelMark: opts.Mark},
	}
}

func (v *initVolume) mount(readOnly bool) mount.Mount {
	return mount.Mount{
		Type: mount.TypeVolume, Source: v.name, Target: initFolder, ReadOnly: readOnly,
		VolumeOptions: &mount.VolumeOptions{NoCopy: true, Labels: v.labels},
	}
}

// fill makes the volume and puts the init into it, and reads it back. Any image of
// the engine will do.
func (v *initVolume) fill(ctx context.Context, e *engine, image string) (err error) {
	cfg := &container.Config{Image: image, Entrypoint: []string{"/never-started"}, Labels: v.labels, NetworkDisabled: true}
	host := &container.HostConfig{
		Mounts: []mount.Mount{v.mount(false)}, ReadonlyRootfs: true, CapDrop: []string{"ALL"}, LogConfig: container.LogConfig{Type: "none"},
	}
	ctx, cancel := e.longCall(ctx)
	defer cancel()
	if err := e.remove(ctx, v.name); err != nil { // of a fill that was cut off
		return err
	}
	if _, err := e.api.ContainerCreate(ctx, cfg, host, nil, nil, v.name); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, e.remove(context.WithoutCancel(ctx), v.name)) }()
	var packed bytes.Buffer
	w := tar.NewWriter(&packed)
	h := &tar.Header{Typeflag: tar.TypeReg, Name: initFile, Mode: 0o555, Size: int64(len(v.program)), ModTime: time.Unix(0, 0)}
	if err := w.WriteHeader(h); err != nil {
		return err
	}
	if _, err := w.Write(v.program); err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	if err := e.api.CopyToContainer(ctx, v.name, initFolder, &packed, container.CopyToContainerOptions{}); err != nil {
		return err
	}
	body, _, err := e.api.CopyFromContainer(ctx, v.name, initFolder+"/"+initFile)
	if err != nil {
		return err
	}
	defer body.Close()
	r := tar.NewReader(body)
	if _, err := r.Next(); err != nil {
		return err
	}
	if back, err := io.ReadAll(io.LimitReader(r, maxInit)); err != nil || !bytes.Equal(back, v.program) {
		return errors.Join(errors.New("the container engine does not keep what was put into a volume"), err)
	}
	return nil
}

// drop removes the volume, once no container has it.
func (v *initVolume) drop(ctx context.Context, e *engine) error {
	ctx, cancel := e.call(ctx)
	defer cancel()
	err := e.api.VolumeRemove(ctx, v.name, false)
	if gone(err) {
		return nil
	}
	return err
}
