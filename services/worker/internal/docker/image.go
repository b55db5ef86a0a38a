package docker

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/docker/docker/api/types/image"
	"github.com/docker/docker/client"

	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
)

// maxPullTime bounds a pull that nobody else bounds.
const maxPullTime = time.Hour

// imageFacts are what matters of an image.
type imageFacts struct {
	id      string // of its content, as the engine names it
	digest  string // what the registry calls it, else id
	user    string
	env     []string
	volumes []string
}

func (i *imageFacts) hasEnv(name string) bool {
	return slices.ContainsFunc(i.env, func(v string) bool { return strings.HasPrefix(v, name+"=") })
}

// images finds and pulls images.
type images struct {
	engine      *engine
	credentials *credentials

	mu    sync.Mutex
	pulls map[string]*pull
}

// pull is one pull that is under way, with everybody who waits for it. It ends
// early when the last of them has left.
type pull struct {
	done    chan struct{}
	err     error
	waiters int
	cancel  context.CancelFunc
}

// get gives the image that a plan wants by its pull policy. Its error is
// always a *executor.PrepareError.
func (im *images) get(ctx context.Context, p *plan) (*imageFacts, error) {
	name := reference.FamiliarString(p.image)
	if p.spec.PullPolicy != pullAlways {
		found, err := im.inspect(ctx, p.image)
		switch {
		case err == nil:
			return found, nil
		case !cerrdefs.IsNotFound(err):
			return nil, im.engine.failed(ctx, err)
		case p.spec.PullPolicy == pullNever:
			return nil, executor.UserError(fmt.Sprintf("the image %s is not on this worker, and the job's pull policy is never", name), err)
		}
	}
	if err := im.pull(ctx, p.image); err != nil {
		if ctx.Err() != nil {
			return nil, prepareTimeout("pulling the image "+name+" took too long", ctx.Err())
		}
		failed := executor.InfraError(fmt.Sprintf("the image %s could not be pulled: %s", name, oneLine(err.Error())), err)
		failed.Code = executor.CodeImagePull
		return nil, failed
	}
	found, err := im.inspect(ctx, p.image)
	if cerrdefs.IsNotFound(err) {
		failed := executor.InfraError(fmt.Sprintf("the image %s was pulled and is not there", name), err)
		failed.Code = executor.CodeImagePull
		return nil, failed
	}
	if err != nil {
		return nil, im.engine.failed(ctx, err)
	}
	return found, nil
}

func (im *images) inspect(ctx context.Context, ref reference.Named) (*imageFacts, error) {
	ctx, cancel := im.engine.call(ctx)
	defer cancel()
	got, err := im.engine.api.ImageInspect(ctx, reference.FamiliarString(ref))
	if err != nil {
		return nil, err
	}
	if got.ID == "" {
		return nil, errors.New("the engine described an image without an id")
	}
	facts := &imageFacts{id: got.ID, digest: digestOf(got, ref)}
	if c := got.Config; c != nil {
		facts.user, facts.env = c.User, c.Env
		facts.volumes = slices.Sorted(maps.Keys(c.Volumes))
	}
	return facts, nil
}

// digestOf is the digest by which the image can be had again from where it came.
func digestOf(img image.InspectResponse, ref reference.Named) string {
	for _, d := range img.RepoDigests {
		if named, err := reference.ParseNormalizedNamed(d); err == nil && named.Name() == ref.Name() {
			if digested, ok := named.(reference.Digested); ok {
				return digested.Digest().String()
			}
		}
	}
	return img.ID
}

// pull joins the pull of that image that is under way, or begins one. It
// returns when that has ended, or ctx has.
func (im *images) pull(ctx context.Context, ref reference.Named) error {
	key := ref.String()
	im.mu.Lock()
	p := im.pulls[key]
	if p == nil {
		own, cancel := context.WithTimeout(context.WithoutCancel(ctx), maxPullTime)
		p = &pull{done: make(chan struct{}), cancel: cancel}
		if im.pulls == nil {
			im.pulls = map[string]*pull{}
		}
		im.pulls[key] = p
		go func() {
			err := im.pullNow(own, ref)
			cancel()
			im.mu.Lock()
			defer im.mu.Unlock()
			p.err = err
			if im.pulls[key] == p {
				delete(im.pulls, key)
			}
			close(p.done)
		}()
	}
	p.waiters++
	im.mu.Unlock()

	select {
	case <-p.done:
		return p.err
	case <-ctx.Done():
	}
	im.mu.Lock()
	defer im.mu.Unlock()
	if p.waiters--; p.waiters == 0 {
		p.cancel()
		if im.pulls[key] == p {
			delete(im.pulls, key) // the next one must not join a pull that was given up
		}
	}
	return ctx.Err()
}

func (im *images) pullNow(ctx context.Context, ref reference.Named) error {
	auth, err := im.credentials.header(ctx, reference.Domain(ref))
	if err != nil {
		return err
	}
	// The answer begins when the pull does; from then on the caller's patience and
	// maxPullTime are the bounds.
	began, cancel := context.WithCancel(ctx)
	defer cancel()
	timer := time.AfterFunc(2*im.engine.timeout, cancel)
	progress, err := im.engine.api.ImagePull(began, ref.String(), image.PullOptions{RegistryAuth: auth})
	if err != nil {
		if !timer.Stop() && ctx.Err() == nil {
			return errors.New("the container engine does not answer")
		}
		return err
	}
	defer progress.Close()
	if !timer.Stop() {
		return errors.New("the container engine does not answer")
	}
	return readProgress(progress)
}

// readProgress reads the engine's account of a pull to its end, and returns
// the error it tells of. Only an account that came to its end counts.
func readProgress(r io.Reader) error {
	lines := bufio.NewScanner(r)
	lines.Buffer(make([]byte, 4<<10), 1<<20)
	for lines.Scan() {
		if len(lines.Bytes()) == 0 {
			continue
		}
		var line struct {
			Error       string `json:"error"`
			ErrorDetail struct {
				Message string `json:"message"`
			} `json:"errorDetail"`
		}
		if err := json.Unmarshal(lines.Bytes(), &line); err != nil {
			return errors.New("the container engine's account of the pull cannot be read")
		}
		if text := line.ErrorDetail.Message; text != "" {
			return errors.New(oneLine(text))
		}
		if line.Error != "" {
			return errors.New(oneLine(line.Error))
		}
	}
	return lines.Err()
}

// failed makes a PrepareError of a call that failed: prepare_timeout where the
// job's time was over, else engine_error.
func (e *engine) failed(ctx context.Context, err error) *executor.PrepareError {
	if pe, ok := errors.AsType[*executor.PrepareError](err); ok {
		return pe
	}
	if ctx.Err() != nil {
		return prepareTimeout("preparing the container took too long", ctx.Err())
	}
	// It may come back as another one.
	if client.IsErrConnectionFailed(err) {
		e.forget()
	}
	failed := executor.InfraError(e.describe(err).Error(), err)
	failed.Code = executor.CodeEngine
	return failed
}

func prepareTimeout(reason string, err error) *executor.PrepareError {
	if errors.Is(err, context.Canceled) {
		return executor.InfraError("preparing was called off", err)
	}
	failed := executor.InfraError(reason, err)
	failed.Code = executor.CodePrepareTimeout
	return failed
}
