package docker

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/docker/docker/api/types/system"
	"github.com/docker/docker/api/types/versions"
	"github.com/docker/docker/client"
)

// minAPI is the oldest API version that is spoken: Docker 20.10.
const minAPI = "1.41"

// factsFor is how long what is known of an engine is believed. A probe that
// fails ends it at once, since the engine may come back as another one.
const factsFor = 2 * time.Minute

// facts are what an engine can do, as far as it matters.
type facts struct {
	version   string
	cgroupV1  bool
	rootless  bool
	init      bool   // it has an init process to put into containers
	keepsLogs bool   // it has the log driver that keeps output byte by byte
	restores  bool   // it lets containers run while it is restarted
	arch      string // as the engine says it
	cores     int
	memory    int64 // bytes
	checkedAt time.Time
}

// judge decides from what an engine says of itself whether it can isolate and
// limit as a job was promised. The error's text is for the worker's owner.
func judge(info system.Info, runtime string) (facts, error) {
	f := facts{
		version: oneLine(info.ServerVersion), cores: info.NCPU, memory: info.MemTotal,
		cgroupV1: info.CgroupVersion == "" || info.CgroupVersion == "1",
		init:     info.InitCommit.ID != "N/A", keepsLogs: slices.Contains(info.Plugins.Log, logDriver),
		restores: info.LiveRestoreEnabled, arch: info.Architecture,
	}
	seccomp := false
	for _, option := range info.SecurityOptions {
		fields := strings.Split(option, ",")
		switch {
		case slices.Contains(fields, "name=seccomp"):
			seccomp = !slices.Contains(fields, "profile=unconfined")
		case slices.Contains(fields, "name=rootless"):
			f.rootless = true
		}
	}
	var missing []string
	for _, need := range []struct {
		there bool
		what  string
	}{
		{seccomp, "seccomp's default profile"},
		{info.MemoryLimit, "memory limits"},
		{info.SwapLimit, "swap limits"},
		{info.CPUCfsPeriod && info.CPUCfsQuota, "CPU limits"},
		{info.PidsLimit, "process limits"},
	} {
		if !need.there {
			missing = append(missing, need.what)
		}
	}
	_, known := info.Runtimes[runtime]
	switch {
	case info.OSType != "linux":
		return f, fmt.Errorf("the container engine runs %q containers, jobs need linux ones", oneLine(info.OSType))
	case len(missing) > 0:
		return f, fmt.Errorf("the container engine cannot give containers %s, and no job runs with less", strings.Join(missing, ", "))
	case runtime != "" && !known:
		return f, fmt.Errorf("the container engine does not know the runtime %q", runtime)
	}
	return f, nil
}

// engine is the one engine of an executor, and what is known of it.
type engine struct {
	*wire
	runtime string
	timeout time.Duration // of one call

	mu    sync.Mutex
	facts facts
}

// call bounds one call of the engine.
func (e *engine) call(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, e.timeout)
}

// longCall bounds a call that makes the engine work.
func (e *engine) longCall(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, 2*e.timeout)
}

// ping asks whether the engine is there and of an age that is understood.
func (e *engine) ping(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, min(e.timeout, 3*time.Second))
	defer cancel()
	pong, err := e.api.Ping(ctx)
	if err != nil {
		return e.describe(err)
	}
	if pong.APIVersion == "" || versions.LessThan(pong.APIVersion, minAPI) {
		return fmt.Errorf("the container engine at %s is too old: it speaks API %q, %s is needed (Docker 20.10)",
			e.host, oneLine(pong.APIVersion), minAPI)
	}
	e.api.NegotiateAPIVersionPing(pong)
	return nil
}

// look returns what the engine can do, asking it where that is not known.
func (e *engine) look(ctx context.Context) (facts, error) {
	e.mu.Lock()
	known := e.facts
	e.mu.Unlock()
	if time.Since(known.checkedAt) < factsFor {
		return known, nil
	}
	ctx, cancel := e.call(ctx)
	defer cancel()
	if err := e.ping(ctx); err != nil {
		return facts{}, err
	}
	info, err := e.api.Info(ctx)
	if err != nil {
		return facts{}, e.describe(err)
	}
	found, err := judge(info, e.runtime)
	if err != nil {
		return facts{}, err
	}
	found.checkedAt = time.Now()
	e.mu.Lock()
	e.facts = found
	e.mu.Unlock()
	return found, nil
}

// forgetsLineEnds: see lines. API 1.42 is of 23.0.
func (e *engine) forgetsLineEnds() bool { return versions.LessThan(e.api.ClientVersion(), "1.42") }

// forget makes the next look ask again.
func (e *engine) forget() {
	e.mu.Lock()
	e.facts = facts{}
	e.mu.Unlock()
}

// describe makes one line for the worker's owner of an error of a call.
func (e *engine) describe(err error) error {
	var text string
	switch {
	case errors.Is(err, context.DeadlineExceeded) || os.IsTimeout(err):
		text = "the container engine at " + e.host + " does not answer"
	case errors.Is(err, fs.ErrPermission):
		text = "this user may not use the container engine at " + e.host
	case client.IsErrConnectionFailed(err) || errors.Is(err, fs.ErrNotExist):
		text = "no container engine at " + e.host
	default:
		text = "the container engine at " + e.host + " failed: " + oneLine(err.Error())
	}
	return &engineError{text, err}
}

// engineError is one line of text, with the cause for errors.Is.
type engineError struct {
	text  string
	cause error
}

func (e *engineError) Error() string { return e.text }
func (e *engineError) Unwrap() error { return e.cause }
