package docker

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"path"
	"strings"
	"sync"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/mount"

	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
)

// How files get into a container.
//
// /work is a tmpfs, which exists only while the container runs, and the command
// must find its files when it starts. The root is read-only, so that the engine
// refuses to copy anything there; a folder of the host may not be mounted, nor
// may a volume on the host's disk, which has no size limit; and a wrapper that
// unpacks from standard input would need a shell and tar in the image.
//
// So /work is, for attempts with files only, an anonymous local volume of type
// tmpfs, with the same size and flags. The engine mounts such a volume when its
// first user comes and unmounts it, which empties it, when the last one goes. A
// second container that is never started, the carrier, keeps it mounted: the
// engine mounts a container's volumes for an upload, and an upload that has
// begun and sends nothing lasts as long as we like. That it has begun is known
// from "100 Continue", which a server sends when it first wants to read the
// body, hence after the mount. In that time the files are written through the
// job's own container, looked at again, and the container started, which makes
// it a user of the volume of its own. Then the upload is dropped and the
// carrier removed. The volume goes with the job's container.
type delivery struct {
	engine  *engine
	carrier string
	upload  *stream
	lost    chan struct{} // closed when the engine ended the upload
	reader  sync.WaitGroup
}

const carrierSuffix = "-files"

// workVolume is the mount of /work that can be written before the start.
func (p *plan) workVolume(labels map[string]string, o owner) mount.Mount {
	return mount.Mount{
		Type: mount.TypeVolume, Target: workFolder,
		VolumeOptions: &mount.VolumeOptions{
			NoCopy: true, Labels: labels,
			DriverConfig: &mount.Driver{Name: "local", Options: map[string]string{
				"type": "tmpfs", "device": "tmpfs", "o": strings.TrimPrefix(p.tmpfsOptions(o), "rw,"),
			}},
		},
	}
}

// deliver writes the files into the container's /work and returns what keeps
// them there until the container runs. owner is the user and group they belong to.
func (e *engine) deliver(ctx context.Context, p *plan, container string, owner owner) (*delivery, error) {
	content, err := p.archive(owner)
	if err != nil {
		return nil, err
	}
	d := &delivery{engine: e, carrier: p.name + carrierSuffix, lost: make(chan struct{})}
	if err := d.put(ctx, p, container, content); err != nil {
		return nil, errors.Join(err, d.end(ctx))
	}
	return d, nil
}

func (d *delivery) put(ctx context.Context, p *plan, id string, content []byte) error {
	if err := d.hold(ctx, p, id); err != nil {
		return err
	}
	putCtx, cancel := d.engine.longCall(ctx)
	defer cancel()
	err := d.engine.api.CopyToContainer(putCtx, id, workFolder, bytes.NewReader(content), container.CopyToContainerOptions{})
	if err != nil {
		return err
	}
	// A command must never find its folder empty because an engine mounts
	// volumes in another way than this relies on.
	for _, name := range p.delivered() {
		if _, err := d.engine.api.ContainerStatPath(putCtx, id, path.Join(workFolder, name)); err != nil {
			return fmt.Errorf("this container engine does not keep a file that was put into %s: %w", workFolder, err)
		}
	}
	return d.holding()
}

// delivered names one thing that must be there, if anything is.
func (p *plan) delivered() []string {
	if len(p.files) > 0 {
		return []string{p.files[len(p.files)-1].Path}
	}
	return p.folders[len(p.folders)-1:]
}

func (d *delivery) hold(ctx context.Context, p *plan, id string) error {
	callCtx, cancel := d.engine.longCall(ctx)
	defer cancel()
	job, err := d.engine.api.ContainerInspect(callCtx, id)
	if err != nil {
		return err
	}
	if job.Config == nil {
		return errors.New("the engine described a container without its configuration")
	}
	cfg := &container.Config{
		Image: job.Config.Image, Entrypoint: []string{"/never-started"}, Labels: job.Config.Labels, NetworkDisabled: true,
	}
	host := &container.HostConfig{
		VolumesFrom: []string{id}, ReadonlyRootfs: true, CapDrop: []string{"ALL"},
		LogConfig: container.LogConfig{Type: "none"},
	}
	if _, err := d.engine.api.ContainerCreate(callCtx, cfg, host, nil, nil, d.carrier); err != nil {
		return err
	}
	up, resp, err := d.engine.open(callCtx, http.MethodPut, "/containers/"+d.carrier+"/archive", url.Values{"path": {workFolder}},
		http.Header{"Content-Type": {"application/x-tar"}, "Expect": {"100-continue"}, "Transfer-Encoding": {"chunked"}})
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusContinue {
		return refusal(up, resp)
	}
	d.upload = up
	d.reader.Go(func() {
		var b [1]byte
		_, _ = up.Read(b[:]) // returns only when the engine, or end, ended it
		close(d.lost)
	})
	return nil
}

// holding returns an error when the files may be gone.
func (d *delivery) holding() error {
	select {
	case <-d.lost:
		return errors.New("the container engine dropped the job's files before the start")
	default:
		return nil
	}
}

// end drops the upload and removes the carrier. It is safe to call twice.
func (d *delivery) end(ctx context.Context) error {
	if d.upload != nil {
		_ = d.upload.Close()
		d.reader.Wait()
		d.upload = nil
	}
	if d.carrier == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*d.engine.timeout)
	defer cancel()
	// Without its volumes: the job's container has them too.
	err := d.engine.api.ContainerRemove(ctx, d.carrier, container.RemoveOptions{Force: true})
	if err != nil && !gone(err) {
		return d.engine.describe(err)
	}
	d.carrier = ""
	return nil
}

// archive packs folders and files for their owner.
func (p *plan) archive(o owner) ([]byte, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	now := time.Now()
	add := func(h *tar.Header, content []byte) error {
		h.Uid, h.Gid, h.ModTime, h.Format = o.uid, o.gid, now, tar.FormatPAX
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		_, err := w.Write(content)
		return err
	}
	for _, dir := range p.folders {
		if err := add(&tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755}, nil); err != nil {
			return nil, executor.UserError(fmt.Sprintf("the folder %q cannot be made", dir), err)
		}
	}
	for _, f := range p.files {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: f.Path, Mode: permissions(&f), Size: int64(len(f.Content))}
		if err := add(h, f.Content); err != nil {
			return nil, executor.UserError(fmt.Sprintf("the file %q cannot be written", f.Path), err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return buf.Bytes(), nil
}

func permissions(f *executor.File) int64 { return int64(cmp.Or(f.Mode&0o777, 0o644)) }
