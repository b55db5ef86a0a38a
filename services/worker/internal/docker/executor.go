package docker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/filters"
	"github.com/docker/docker/api/types/network"
	"github.com/docker/docker/api/types/volume"

	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
)

// Executor runs attempts as containers. It is safe for concurrent use. Unlike
// the port says, Recover need not have succeeded before the first Prepare: an
// engine may be absent then, and Probe and Prepare make up for it.
type Executor struct {
	opts   Options
	log    *slog.Logger
	engine *engine
	images *images
	users  users
	pool   *pool

	recovering sync.Mutex // one at a time

	mu        sync.Mutex
	live      map[string]bool // names of containers of attempts that are not closed
	recovered bool

	untidyUntil atomic.Int64 // in nanoseconds
}

var _ executor.Executor = (*Executor)(nil)

// New checks the settings. It does not talk to the engine and starts no
// goroutine: an engine that is not there yet is for Probe to tell.
func New(opts Options) (*Executor, error) {
	opts.setDefaults()
	if !safeID.MatchString(opts.WorkerID) {
		return nil, fmt.Errorf("docker executor: worker id %q is not a plain name", opts.WorkerID)
	}
	if opts.Mark == "" {
		opts.Mark = opts.WorkerID
	}
	w, err := newWire(&opts)
	if err != nil {
		return nil, fmt.Errorf("docker executor: %w", err)
	}
	x := &Executor{opts: opts, log: opts.Log, live: map[string]bool{}}
	x.engine = &engine{wire: w, runtime: opts.Runtime, timeout: opts.CallTimeout}
	x.pool = newPool(x, opts.Warm)
	x.images = &images{engine: x.engine, credentials: &credentials{dir: opts.ConfigDir}}
	return x, nil
}

// Name returns "docker".
func (x *Executor) Name() string { return "docker" }

// Host is where the engine is looked for.
func (x *Executor) Host() string { return x.engine.host }

// Close removes the containers that wait, and gives back idle connections. Attempts
// must be closed before.
func (x *Executor) Close() error {
	x.pool.close()
	x.engine.http.CloseIdleConnections()
	return nil
}

// KeepWarm sets whether containers wait for jobs, within the bounds of the options:
// not while no job is to come. At first they do. It does not block.
func (x *Executor) KeepWarm(on bool) { x.pool.keep(on) }

// Describe says in one line, for the worker's owner, what engine there is. It
// asks the engine.
func (x *Executor) Describe(ctx context.Context) string {
	f, err := x.engine.look(ctx)
	if err != nil {
		return err.Error()
	}
	text := fmt.Sprintf("Docker %s at %s, %d cores", f.version, x.engine.host, f.cores)
	if x.opts.Runtime != "" {
		text += ", runtime " + x.opts.Runtime
	}
	if !f.init {
		text += ", without an init process: a command that does not handle its stop signal is stopped by the kill after the grace"
	}
	return text
}

// Probe says whether containers can be run now. The first time that it finds
// an engine it also does what Recover could not do without one.
func (x *Executor) Probe(ctx context.Context) error {
	if err := x.engine.ping(ctx); err != nil {
		x.engine.forget()
		return err
	}
	if _, err := x.engine.look(ctx); err != nil {
		return err
	}
	return x.recoverOnce(ctx)
}

func (x *Executor) recoverOnce(ctx context.Context) error {
	x.mu.Lock()
	done := x.recovered
	x.mu.Unlock()
	if done {
		return nil
	}
	if err := x.Recover(ctx); err != nil {
		return fmt.Errorf("containers of an earlier run are still there: %w", err)
	}
	return nil
}

// Recover removes the containers and volumes of this worker that no attempt of
// this Executor has.
func (x *Executor) Recover(ctx context.Context) error {
	if err := x.Reap(ctx, nil); err != nil {
		return err
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	x.recovered = true
	return nil
}

// Reap removes the containers and volumes of this worker that belong to no
// attempt of this Executor and to no lease that holds says is held. Call it now
// and then: it is how what could not be removed while the engine was away goes
// in the end. An error names what is still there.
func (x *Executor) Reap(ctx context.Context, holds func(leaseID string) bool) error {
	x.recovering.Lock()
	defer x.recovering.Unlock()
	mine := filters.NewArgs(filters.Arg("label", labelMark+"="+x.opts.Mark))
	listCtx, cancel := x.engine.longCall(ctx)
	found, err := x.engine.api.ContainerList(listCtx, container.ListOptions{All: true, Filters: mine})
	cancel()
	if err != nil {
		return x.engine.describe(err)
	}
	var errs []error
	for _, c := range found {
		// Not every engine can be trusted to filter.
		if c.Labels[labelMark] != x.opts.Mark || x.holds(c.Names, c.Labels[labelLease], holds) {
			continue
		}
		if err := x.engine.remove(ctx, c.ID); err != nil {
			errs = append(errs, fmt.Errorf("remove container %.12s: %w", c.ID, err))
			continue
		}
		x.log.Info("removed a container that nobody holds any more",
			"container", c.ID, "job", c.Labels[labelJob], "attempt", c.Labels[labelAttempt])
	}
	return errors.Join(append(errs, x.reapVolumes(ctx))...)
}

// untidyFor is how long an engine may take to make a container that nobody waits
// for any more, or to come back.
const untidyFor = time.Minute

// Untidy reports whether a container may have been left lately: one that could not be
// prepared to its end, since the engine may have taken the request and not answered,
// or one that waited and could not be removed. Then Reap is worth a call earlier than
// else.
func (x *Executor) Untidy() bool { return time.Now().UnixNano() < x.untidyUntil.Load() }

func (x *Executor) noteUntidy() { x.untidyUntil.Store(time.Now().Add(untidyFor).UnixNano()) }

func (x *Executor) holds(names []string, lease string, holds func(string) bool) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, n := range names {
		if len(n) > 0 && x.live[strings.TrimSuffix(n[1:], carrierSuffix)] { // the engine puts a slash before it
			return true
		}
	}
	return holds != nil && holds(lease)
}

// reapVolumes removes volumes of this worker that no container has. A volume
// is made and removed together with its container, so there is one only where
// the engine died in between.
func (x *Executor) reapVolumes(ctx context.Context) error {
	mine := filters.NewArgs(filters.Arg("label", labelMark+"="+x.opts.Mark), filters.Arg("dangling", "true"))
	listCtx, cancel := x.engine.longCall(ctx)
	defer cancel()
	found, err := x.engine.api.VolumeList(listCtx, volume.ListOptions{Filters: mine})
	if err != nil {
		return x.engine.describe(err)
	}
	var errs []error
	for _, v := range found.Volumes {
		if v == nil || v.Labels[labelMark] != x.opts.Mark || x.pool.uses(v.Name) {
			continue
		}
		rmCtx, cancel := x.engine.call(ctx)
		err := x.engine.api.VolumeRemove(rmCtx, v.Name, false)
		cancel()
		if err != nil && !gone(err) && !inUse(err) { // a container that is just being made has it
			errs = append(errs, fmt.Errorf("remove volume %.12s: %w", v.Name, x.engine.describe(err)))
		}
	}
	return errors.Join(errs...)
}

// Prepare checks the spec, gets the image, creates the container and puts the
// files into it. Nothing runs yet.
func (x *Executor) Prepare(ctx context.Context, spec executor.Spec) (executor.Attempt, error) {
	if err := ctx.Err(); err != nil {
		return nil, executor.InfraError("preparing was called off", err)
	}
	p, err := makePlan(spec, x.opts.WorkerID, x.opts.AllowBridge)
	if err != nil {
		return nil, err
	}
	if spec.PrepareTimeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, spec.PrepareTimeout)
		defer cancel()
	}
	x.pool.begin()
	a, err := x.prepare(ctx, p)
	if err != nil {
		x.pool.end()
		return nil, err
	}
	return a, nil
}

func (x *Executor) prepare(ctx context.Context, p *plan) (*attempt, error) {
	spec := &p.spec
	f, err := x.engine.look(ctx)
	if err != nil {
		return nil, x.unready(ctx, err)
	}
	if err := x.recoverOnce(ctx); err != nil {
		return nil, x.unready(ctx, err)
	}
	if spec.CPU > float64(f.cores) && f.cores > 0 {
		return nil, executor.InfraError(fmt.Sprintf("the job asks for %g cores, this worker's container engine has %d", spec.CPU, f.cores), nil)
	}
	if spec.NetworkBridge {
		if err := x.bridge(ctx); err != nil {
			return nil, err
		}
	}
	img, err := x.images.get(ctx, p)
	if err != nil {
		return nil, err
	}
	if len(img.volumes) > maxVolumes {
		return nil, executor.UserError("the image declares too many volumes", nil)
	}
	if !x.claim(p.name) {
		return nil, executor.InfraError("this lease has a container already", nil)
	}
	a := &attempt{
		x: x, plan: p, image: img, facts: f, id: p.name, fed: make(chan struct{}),
		ended: make(chan struct{}), stopped: make(chan struct{}), killed: make(chan struct{}),
	}
	s, ok := x.shapeOf(p, img, f)
	if ok {
		x.pool.ask(s, img, time.Now())
		if a.takeWarm(ctx, s) {
			return a, nil
		}
	}
	if len(spec.Stdin) == 0 {
		close(a.fed)
	}
	if err := a.create(ctx); err != nil {
		failed := x.engine.failed(ctx, err)
		x.noteUntidy()
		a.settled.Do(func() {}) // the caller has it
		if err := a.Close(); err != nil {
			x.log.Warn("a container that was not to be is still there, it is removed later", "job", spec.JobID, "error", err)
		}
		return nil, failed
	}
	return a, nil
}

// bridge checks that the engine has a network to give. One that was started
// without a bridge would silently give none.
func (x *Executor) bridge(ctx context.Context) error {
	callCtx, cancel := x.engine.call(ctx)
	defer cancel()
	_, err := x.engine.api.NetworkInspect(callCtx, "bridge", network.InspectOptions{})
	switch {
	case gone(err):
		failed := executor.InfraError("the job asks for a network, and this worker's container engine has none to give", err)
		failed.Code = executor.CodeEngine
		return failed
	case err != nil:
		return x.engine.failed(ctx, err)
	}
	return nil
}

// unready is the PrepareError of an engine that cannot be used.
func (x *Executor) unready(ctx context.Context, err error) *executor.PrepareError {
	if ctx.Err() != nil {
		return prepareTimeout("the container engine did not answer in time", ctx.Err())
	}
	failed := executor.InfraError(oneLine(err.Error()), err)
	failed.Code = executor.CodeEngine
	return failed
}

// claim notes that an attempt has the container of that name.
func (x *Executor) claim(name string) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.live[name] {
		return false
	}
	x.live[name] = true
	return true
}

func (x *Executor) release(name string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	delete(x.live, name)
}

// remove removes a container with its volumes, running or not, and returns nil
// only when the engine says that it does not exist.
func (e *engine) remove(ctx context.Context, id string) error {
	rmCtx, cancel := e.longCall(ctx)
	defer cancel()
	err := e.api.ContainerRemove(rmCtx, id, container.RemoveOptions{Force: true, RemoveVolumes: true})
	if gone(err) {
		return nil
	}
	if err != nil && !inUse(err) { // a removal under way ends as well
		return e.describe(err)
	}
	for pause := 5 * time.Millisecond; ; pause = min(2*pause, 250*time.Millisecond) {
		_, err := e.api.ContainerInspect(rmCtx, id)
		if gone(err) {
			return nil
		}
		if err != nil {
			return e.describe(err)
		}
		if !sleep(rmCtx, pause) {
			return e.describe(rmCtx.Err())
		}
	}
}

// sleep waits, and reports whether it came to the end of that.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
