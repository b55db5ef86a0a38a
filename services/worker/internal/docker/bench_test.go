package docker_test

import (
	"context"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/client"
	"github.com/docker/docker/pkg/stdcopy"
	"github.com/docker/go-units"

	"github.com/cmdexec/cmdexec/services/worker/internal/docker"
)

// Hardened `true` containers, 8 at a time: through the executor, and by the
// least that the engine's API needs for the same container in the same run.
// Run it with -benchtime=200x.
func BenchmarkTrue(b *testing.B) {
	api := engine(b)
	b.Run("executor", func(b *testing.B) {
		x := newExecutor(b)
		if err := x.Probe(b.Context()); err != nil {
			b.Fatal(err)
		}
		eight(b, func() {
			if r := run(b, x, shell("true")); r.code() != 0 {
				b.Error(r)
			}
		})
	})
	b.Run("engine", func(b *testing.B) {
		eight(b, func() {
			if err := bare(b.Context(), api); err != nil {
				b.Error(err)
			}
		})
	})
}

// eight does one thing b.N times, 8 at a time.
func eight(b *testing.B, one func()) {
	var next atomic.Int64
	var all sync.WaitGroup
	b.ResetTimer()
	for range 8 {
		all.Go(func() {
			for next.Add(1) <= int64(b.N) {
				one()
			}
		})
	}
	all.Wait()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "containers/s")
}

// bare runs a container with the same settings and no questions asked.
func bare(ctx context.Context, api *client.Client) error {
	yes, never, pids := true, int64(0), int64(65)
	made, err := api.ContainerCreate(ctx, &container.Config{
		Image: testImage, Entrypoint: []string{"/bin/sh"}, Cmd: []string{"-c", "true"}, User: "65534:65534",
		AttachStdout: true, AttachStderr: true, NetworkDisabled: true, WorkingDir: "/work",
	}, &container.HostConfig{
		CapDrop: []string{"ALL"}, SecurityOpt: []string{"no-new-privileges:true"}, IpcMode: "private", CgroupnsMode: "private",
		ReadonlyRootfs: true, Init: &yes, OomScoreAdj: 500, LogConfig: container.LogConfig{Type: "none"},
		Tmpfs: map[string]string{"/tmp": "rw,nosuid,nodev,size=16m,nr_inodes=16384", "/work": "rw,nosuid,nodev,exec,size=16m,nr_inodes=16384"},
		Resources: container.Resources{
			Memory: 128 << 20, MemorySwap: 128 << 20, MemorySwappiness: &never, NanoCPUs: 1e9, PidsLimit: &pids,
			Ulimits: []*units.Ulimit{{Name: "nofile", Soft: 1024, Hard: 1024}},
		},
	}, nil, nil, "")
	if err != nil {
		return err
	}
	streams, err := api.ContainerAttach(ctx, made.ID, container.AttachOptions{Stream: true, Stdout: true, Stderr: true})
	if err != nil {
		return err
	}
	defer streams.Close()
	if err := api.ContainerStart(ctx, made.ID, container.StartOptions{}); err != nil {
		return err
	}
	if _, err := stdcopy.StdCopy(io.Discard, io.Discard, streams.Reader); err != nil {
		return err
	}
	done, failed := api.ContainerWait(ctx, made.ID, container.WaitConditionNotRunning)
	select {
	case <-done:
	case err := <-failed:
		return err
	}
	return api.ContainerRemove(ctx, made.ID, container.RemoveOptions{Force: true, RemoveVolumes: true})
}

// From the request to the first output of a command on a worker that does nothing
// else, with a container that waits and without. Run it with -benchtime=50x.
func BenchmarkFirstOutput(b *testing.B) {
	engine(b)
	for _, path := range []struct {
		name   string
		change []func(*docker.Options)
	}{{"cold", nil}, {"warm", []func(*docker.Options){warmly}}} {
		b.Run(path.name, func(b *testing.B) {
			x := newExecutor(b, path.change...)
			var took []time.Duration
			for range b.N {
				b.StopTimer()
				spec := shell("echo x")
				docker.Prime(b, x, spec)
				b.StartTimer()
				began := time.Now()
				a, err := x.Prepare(b.Context(), spec)
				if err != nil {
					b.Fatal(err)
				}
				first := make(chan time.Time, 1)
				w := writerFunc(func(p []byte) (int, error) { first <- time.Now(); return len(p), nil })
				if err := a.Start(w, io.Discard); err != nil {
					b.Fatal(err)
				}
				took = append(took, (<-first).Sub(began))
				a.Wait()
				if err := a.Close(); err != nil {
					b.Fatal(err)
				}
			}
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)/2].Microseconds())/1e3, "p50-ms")
			b.ReportMetric(float64(took[len(took)*9/10].Microseconds())/1e3, "p90-ms")
			b.ReportMetric(0, "ns/op")
		})
	}
}
