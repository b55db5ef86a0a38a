package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/filters"
	docker "github.com/docker/docker/client"
	"github.com/docker/docker/pkg/stdcopy"

	"github.com/cmdexec/cmdexec/libs/core/api"
)

// containerLoad is what the row containers runs.
type containerLoad struct {
	jobs  int
	image string
}

func (l *containerLoad) flags() {
	flag.IntVar(&l.jobs, "containers", 96, "of the row containers: jobs, and as many containers by the engine's API alone")
	flag.StringVar(&l.image, "image", "cmdexec-test/busybox:1", "of the row containers: an image that the engine has")
}

const (
	containersAtOnce = 8
	containerRounds  = 4 // of jobs and of bare containers, in turns: both see the same machine
	containersIdle   = 40
	containerJob     = `{"command":["/bin/true"],"containerImage":%q,"resources":{"cpu":0.2,"memoryMb":64}}`
	printingOne      = `{"command":["/bin/echo","here"],"containerImage":%q,"resources":{"cpu":0.2,"memoryMb":64}}`
	lookedAtJob      = `{"command":["/bin/sleep","60"],"containerImage":%q,"resources":{"cpu":0.2,"memoryMb":64}}`
)

// containers measures jobs in containers beside what the engine's API alone does
// with the same settings. Without an engine it says so.
func containers(ctx context.Context, p plan) error {
	if os.Getenv("DOCKER_HOST") == "" {
		fmt.Println("\ncontainers: skipped: DOCKER_HOST names no engine")
		return nil
	}
	engine, err := docker.NewClientWithOpts(docker.FromEnv, docker.WithAPIVersionNegotiation())
	if err != nil {
		return err
	}
	defer engine.Close()
	version, err := engine.ServerVersion(ctx)
	if err != nil {
		fmt.Println("\ncontainers: skipped: no engine answers:", err)
		return nil
	}
	p.executor, p.slots = "docker", containersAtOnce
	fmt.Printf("\ncontainers: cmdexec up, one process, Docker %s\n", version.Version)
	if err := coldContainers(ctx, p, engine); err != nil {
		return err
	}
	return warmContainers(ctx, p)
}

// coldContainers measures jobs whose containers are made for them, and the engine
// alone, in turns.
func coldContainers(ctx context.Context, p plan, engine *docker.Client) error {
	p.env = []string{"WARM_CONTAINERS=0"}
	d, err := startUp(ctx, p)
	if err != nil {
		return err
	}
	defer d.stop()
	c := newClient(d.url, d.token)
	bare, err := c.settings(ctx, engine, p.containers.image)
	if err != nil {
		return err
	}
	spec := fmt.Sprintf(containerJob, p.containers.image)

	var idle, bareDone, bareGone samples
	for range containersIdle {
		at := time.Now()
		if _, err := c.execute(ctx, spec); err != nil {
			return err
		}
		idle = append(idle, time.Since(at))
		done, gone, err := bare.run(ctx)
		if err != nil {
			return err
		}
		bareDone, bareGone = append(bareDone, done), append(bareGone, gone)
	}

	var jobsTook, bareTook time.Duration
	each := p.containers.jobs / containerRounds
	for range containerRounds {
		took, err := atOnce(containersAtOnce, each, func() error {
			_, err := c.execute(ctx, spec)
			return err
		})
		if err != nil {
			return err
		}
		jobsTook += took
		took, err = atOnce(containersAtOnce, each, func() error {
			_, _, err := bare.run(ctx)
			return err
		})
		if err != nil {
			return err
		}
		bareTook += took
	}
	ran := float64(each * containerRounds)
	jobsRate, bareRate := ran/jobsTook.Seconds(), ran/bareTook.Seconds()
	row(fmt.Sprintf("the engine alone, %d at a time", containersAtOnce), "%8.1f /s   create, attach, start, wait, remove", bareRate)
	row(fmt.Sprintf("jobs, %d at a time", containersAtOnce), "%8.1f /s   %.0f %% of that", jobsRate, 100*jobsRate/bareRate)
	row("the engine alone, one by one: ended / removed, p50", "%8.1f / %.1f ms   p99 %.1f / %.1f ms", ms(bareDone.at(50)), ms(bareGone.at(50)), ms(bareDone.at(99)), ms(bareGone.at(99)))
	row("jobs on an idle worker, submit to done, p50 / p99", "%8.1f / %.1f ms", ms(idle.at(50)), ms(idle.at(99)))
	return nil
}

// warmContainers measures jobs that come one after the other to a worker that keeps
// containers started.
func warmContainers(ctx context.Context, p plan) error {
	d, err := startUp(ctx, p)
	if err != nil {
		return err
	}
	defer d.stop()
	c := newClient(d.url, d.token)
	spec := fmt.Sprintf(printingOne, p.containers.image)
	var first, done samples
	for range containersIdle {
		at := time.Now()
		id, err := c.submit(ctx, spec)
		if err != nil {
			return err
		}
		j, err := c.wait(ctx, id, 2*time.Millisecond)
		if err != nil {
			return err
		}
		took := time.Since(at)
		if !warmed(&j) {
			continue
		}
		done = append(done, took)
		spoke, err := c.firstOutput(ctx, id)
		if err != nil {
			return err
		}
		first = append(first, spoke.Sub(at))
	}
	if len(done) == 0 {
		return errors.New("no job ran in a container that waited")
	}
	row("in warm containers, submit to first output, p50 / p99", "%8.1f / %.1f ms   %d of %d", ms(first.at(50)), ms(first.at(99)), len(first), containersIdle)
	row("  submit to done, p50 / p99", "%8.1f / %.1f ms", ms(done.at(50)), ms(done.at(99)))
	return nil
}

// firstOutput is when the first chunk of a job's output came out of its command.
func (c *client) firstOutput(ctx context.Context, jobID string) (time.Time, error) {
	var logs api.Logs
	if err := c.do(ctx, http.MethodGet, "/api/jobs/"+jobID+"/logs", "", &logs); err != nil {
		return time.Time{}, err
	}
	if len(logs.Items) == 0 {
		return time.Time{}, fmt.Errorf("job %s has printed nothing", jobID)
	}
	return logs.Items[0].Time, nil
}

func warmed(j *api.Job) bool { return len(j.Attempts) > 0 && j.Attempts[len(j.Attempts)-1].Warm }

// atOnce does one thing n times, some of them at the same time.
func atOnce(parallel, n int, do func() error) (time.Duration, error) {
	errs := make([]error, parallel)
	var next atomic.Int64
	var all sync.WaitGroup
	began := time.Now()
	for i := range parallel {
		all.Go(func() {
			for next.Add(1) <= int64(n) && errs[i] == nil {
				errs[i] = do()
			}
		})
	}
	all.Wait()
	return time.Since(began), errors.Join(errs...)
}

// bareContainer is a container as the product makes it, for the engine alone.
type bareContainer struct {
	engine *docker.Client
	config *container.Config
	host   *container.HostConfig
}

// settings looks at a container that the product has made.
func (c *client) settings(ctx context.Context, engine *docker.Client, image string) (b bareContainer, err error) {
	id, err := c.submit(ctx, fmt.Sprintf(lookedAtJob, image))
	if err != nil {
		return b, err
	}
	defer func() {
		var canceled api.Job
		err = errors.Join(err, c.do(ctx, http.MethodPost, "/api/jobs/cancel", `{"jobId":"`+id+`"}`, &canceled))
	}()
	until := time.Now().Add(readyWithin)
	for {
		found, err := engine.ContainerList(ctx, container.ListOptions{Filters: filters.NewArgs(filters.Arg("label", "cmdexec.job="+id))})
		if err != nil {
			return b, err
		}
		if len(found) > 0 {
			made, err := engine.ContainerInspect(ctx, found[0].ID)
			if err != nil {
				return b, err
			}
			made.Config.Labels = nil // else the worker would take what we make for its own
			made.Config.Cmd, made.Config.Entrypoint = nil, []string{"/bin/true"}
			return bareContainer{engine, made.Config, made.HostConfig}, nil
		}
		if time.Now().After(until) {
			return b, errors.New("no container came of a job")
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return b, ctx.Err()
		}
	}
}

// run makes the container, runs it and removes it, with the calls that this needs
// and no more, and says when its end was known and when it was gone.
func (b *bareContainer) run(ctx context.Context) (done, gone time.Duration, err error) {
	began := time.Now()
	made, err := b.engine.ContainerCreate(ctx, b.config, b.host, nil, nil, "")
	if err != nil {
		return 0, 0, err
	}
	streams, err := b.engine.ContainerAttach(ctx, made.ID, container.AttachOptions{Stream: true, Stdout: true, Stderr: true})
	if err != nil {
		return 0, 0, err
	}
	defer streams.Close()
	if err := b.engine.ContainerStart(ctx, made.ID, container.StartOptions{}); err != nil {
		return 0, 0, err
	}
	if _, err := stdcopy.StdCopy(io.Discard, io.Discard, streams.Reader); err != nil {
		return 0, 0, err
	}
	ended, failed := b.engine.ContainerWait(ctx, made.ID, container.WaitConditionNotRunning)
	select {
	case <-ended:
	case err := <-failed:
		return 0, 0, err
	}
	done = time.Since(began)
	err = b.engine.ContainerRemove(ctx, made.ID, container.RemoveOptions{Force: true, RemoveVolumes: true})
	return done, time.Since(began), err
}
