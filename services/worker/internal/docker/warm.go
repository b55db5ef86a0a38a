package docker

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/docker/docker/api/types/container"

	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
	"github.com/cmdexec/cmdexec/services/worker/internal/handover"
)

// How a warm container is used.
//
// It is made and started as any other, by the same hardening, with the init in place
// of a command, and its streams are attached. The init waits for an order (see
// package handover). Prepare takes the container and gives it the name that the
// lease's container has, by which a later process of this worker knows it; its labels
// cannot change. Start sends the order, and the init becomes the command. All that
// follows is as with any container, and it is removed in the same way.
//
// What would not be exactly the same in a warm container is not run in one: see
// shapeOf. A container whose worker dies before it is used ends by itself, since its
// input does.

// labelWarm marks containers that were made before their job was known.
const labelWarm = "cmdexec.warm"

// Bounds of what is run warm. The init is a Go program and needs threads, and its
// order must be one that the system certainly lets it execute.
const (
	minWarmMemoryMB = 16
	minWarmPIDs     = 16
	maxWarmCommand  = 96 << 10
	maxWarmFiles    = 8 << 20
)

// shape is all of a container that cannot change once it is made.
type shape struct {
	image    string // its id
	user     string
	owner    owner
	cpu      float64
	memoryMB int64
	pids     int64
	tmpfsMB  int64
	network  bool
	signal   string
}

// shapeOf gives the shape of the container that a plan needs, where a warm one would
// be exactly that.
func (x *Executor) shapeOf(p *plan, img *imageFacts, f facts) (shape, bool) {
	s := &p.spec
	user, _ := x.userOf(p, img)
	who, known := x.users.known(img.id, user)
	switch {
	case !known, // no container of it has been seen yet
		!f.init, // then the engine looks for the program, in its own way
		s.MemoryMB < minWarmMemoryMB, s.PIDs > 0 && s.PIDs < minWarmPIDs,
		img.hasEnv("GODEBUG"), img.hasEnv("GOTRACEBACK"), // the init would heed them
		p.commandSize(img) > maxWarmCommand,
		p.fileSize() > min(maxWarmFiles, s.MemoryMB<<20/4),
		p.deliver() && !ownGroup(user),
		// The engine would have to make it, as root.
		p.workDir != workFolder && p.workDir != tmpFolder && p.workDir != "/" && !strings.HasPrefix(p.workDir, workFolder+"/"):
		return shape{}, false
	}
	return shape{
		image: img.id, user: user, owner: who, cpu: s.CPU, memoryMB: s.MemoryMB, pids: s.PIDs, tmpfsMB: s.TmpfsMB,
		network: s.NetworkBridge, signal: p.signal,
	}, true
}

// ownGroup reports whether what the user makes certainly gets the group that the
// worker would give it; see users.
func ownGroup(user string) bool {
	name, group, given := strings.Cut(user, ":")
	if !given {
		return strings.Trim(name, "0123456789") != "" || name == "root"
	}
	return strings.Trim(name+group, "0123456789") == ""
}

// commandSize is about what command and environment take when they are executed.
func (p *plan) commandSize(img *imageFacts) int {
	const pointer = 9 // and the end of the text
	size := len(p.spec.Shell)
	for _, list := range [][]string{p.spec.Argv, p.environment(img), img.env} {
		for _, s := range list {
			size += len(s) + pointer
		}
	}
	return size
}

func (p *plan) fileSize() int64 {
	size := int64(0)
	for _, f := range p.files {
		size += int64(len(f.Content))
	}
	return size
}

// warm is a started container that waits for an order.
type warm struct {
	id, name  string
	shape     shape
	stream    *stream
	startedAt time.Time
	watched   chan struct{} // closed when nobody reads the stream any more
	ended     error         // valid then: why
}

// makeWarm makes a container of a shape and starts it. img is the image of it.
func (x *Executor) makeWarm(ctx context.Context, s shape, img *imageFacts, f facts, v *initVolume) (*warm, error) {
	w := &warm{name: "cmdexec-warm-" + strings.ToLower(rand.Text()), shape: s, watched: make(chan struct{})}
	// The one plan that has nothing of a job.
	p := &plan{name: w.name, workDir: workFolder, signal: s.signal, spec: executor.Spec{
		CPU: s.cpu, MemoryMB: s.memoryMB, PIDs: s.pids, TmpfsMB: s.tmpfsMB, NetworkBridge: s.network,
		Argv: []string{initFolder + "/" + initFile},
	}}
	cfg, host := p.configure(img, f, &x.opts, s.user, s.owner)
	cfg.Env, cfg.OpenStdin, cfg.StdinOnce, cfg.AttachStdin = nil, true, true, true
	cfg.Labels = map[string]string{labelWorker: x.opts.WorkerID, labelMark: x.opts.Mark, labelWarm: "1"}
	host.Mounts = append(host.Mounts, v.mount(true))
	if x.survives(f) {
		host.LogConfig = logConfig()
	}
	ctx, cancel := x.engine.longCall(ctx)
	defer cancel()
	w.id = w.name // until it is known
	x.claim(w.name)
	if err := x.startWarm(ctx, w, cfg, host); err != nil {
		x.noteUntidy()
		return nil, errors.Join(err, x.discard(w))
	}
	return w, nil
}

func (x *Executor) startWarm(ctx context.Context, w *warm, cfg *container.Config, host *container.HostConfig) error {
	made, err := x.create(ctx, cfg, host, w.name)
	if made != "" {
		w.id = made
	}
	if err != nil {
		return err
	}
	if w.stream, err = x.engine.attach(ctx, w.id, true); err != nil {
		return err
	}
	if err := x.engine.api.ContainerStart(ctx, w.id, container.StartOptions{}); err != nil {
		return err
	}
	w.startedAt = time.Now()
	return nil
}

// errSpoke means that a container that waits has written something.
var errSpoke = errors.New("it has written something")

// watch returns when the container has ended, or take wants it. A container that
// waits writes nothing.
func (w *warm) watch() {
	defer close(w.watched)
	if _, w.ended = w.stream.r.Peek(1); w.ended == nil {
		w.ended = errSpoke
	}
}

// release ends the watching, and reports whether the container still waits.
func (w *warm) release() bool {
	_ = w.stream.SetReadDeadline(time.Unix(1, 0))
	<-w.watched
	return errors.Is(w.ended, os.ErrDeadlineExceeded) && w.stream.SetReadDeadline(time.Time{}) == nil
}

// discard removes a container that is not used. What it cannot remove is left to
// Reap.
func (x *Executor) discard(w *warm) error {
	if w.stream != nil {
		_ = w.stream.Close()
	}
	err := x.engine.remove(x.pool.removals, w.id)
	if err != nil {
		x.noteUntidy()
	}
	x.release(w.name)
	return err
}

// takeWarm makes the attempt that of a container that waits, where there is one of
// its shape.
func (a *attempt) takeWarm(ctx context.Context, s shape) bool {
	w := a.x.pool.take(s)
	if w == nil {
		return false
	}
	renameCtx, cancel := a.x.engine.call(ctx)
	defer cancel()
	if err := a.x.engine.api.ContainerRename(renameCtx, w.id, a.plan.name); err != nil {
		a.x.log.Debug("a warm container could not be used", "container", w.id, "error", err)
		if err := a.x.discard(w); err != nil {
			a.x.log.Debug("a warm container is still there, it is removed later", "container", w.id, "error", err)
		}
		return false
	}
	a.warm, a.waited, a.id = w, time.Since(w.startedAt), w.id
	_, _ = rand.Read(a.mark[:])
	return true
}

// order is what the init is told.
func (a *attempt) order() []byte {
	p := a.plan
	o := handover.Order{
		Mark: a.mark, Env: p.environment(a.image), Dir: p.workDir, Folders: p.folders, Stdin: len(p.spec.Stdin) > 0,
	}
	entry, cmd := p.command()
	o.Argv = append(append(o.Argv, entry...), cmd...)
	contents := make([][]byte, len(p.files))
	for i, f := range p.files {
		o.Files = append(o.Files, handover.File{Path: f.Path, Mode: uint32(permissions(&f)), Size: len(f.Content)})
		contents[i] = f.Content
	}
	return o.Encode(contents)
}

// sendOrder starts the command. An order that was not taken whole starts nothing.
func (a *attempt) sendOrder() error {
	s := a.warm.stream
	if err := s.SetWriteDeadline(time.Now().Add(a.x.opts.CallTimeout)); err != nil {
		return err
	}
	if _, err := s.Write(a.order()); err != nil {
		return err
	}
	return s.SetWriteDeadline(time.Time{})
}

// markFilter passes on what a command writes to its standard error, but what the
// init has written instead: that begins with the order's mark.
type markFilter struct {
	w    io.Writer
	mark []byte
	held []byte
	said bool // it is the init that speaks
	past bool // it is the command
}

func (f *markFilter) Write(p []byte) (int, error) {
	if f.past {
		return f.w.Write(p)
	}
	f.held = append(f.held, p...)
	switch n := min(len(f.held), len(f.mark)); {
	case !bytes.Equal(f.held[:n], f.mark[:n]):
		f.flush()
	case n == len(f.mark):
		f.said = true
		f.held = f.held[:min(len(f.held), 4<<10)]
	}
	return len(p), nil
}

func (f *markFilter) flush() {
	if !f.said && !f.past {
		f.past = true
		_, _ = f.w.Write(f.held)
		f.held = nil
	}
}

// failure is what the init has said.
func (f *markFilter) failure() error {
	f.flush()
	if !f.said {
		return nil
	}
	return fmt.Errorf("the container could not begin with the command: %s", oneLine(string(f.held[len(f.mark):])))
}

// String names the shape in logs.
func (s shape) String() string {
	return fmt.Sprintf("%.19s user %s, %g cores, %d MiB", s.image, s.user, s.cpu, s.memoryMB)
}
