//go:build unix

package worker

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/events"
	"github.com/docker/docker/api/types/filters"
	"github.com/docker/docker/client"

	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/services/worker/internal/edgetest"
)

const testImage = "cmdexec-test/busybox:1" // what .ci/docker.sh imports

// lives is a worker that is killed and started again, with the edge's view of
// its one job.
type lives struct {
	t      *testing.T
	e      *edgetest.Edge
	api    *client.Client
	env    []string
	dir    string
	worker *life
	link   *edgetest.Link
	lease  workerproto.Lease
	result *workerproto.Result
	chunks map[int64][]byte // by number
	last   int64

	stopped bool // the command, so that only its result is left
}

// newLives starts a worker with containers, or skips the test.
func newLives(t *testing.T) *lives {
	t.Helper()
	host := cmp.Or(os.Getenv("DOCKER_HOST"), client.DefaultDockerHost)
	api, err := client.NewClientWithOpts(client.WithHost(host), client.WithAPIVersionNegotiation())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = api.Close() })
	if _, err := api.ImageInspect(t.Context(), testImage); err != nil {
		t.Skipf("requires docker: no engine at %s, or it has no %s (.ci/docker.sh start makes it): %v", host, testImage, err)
	}
	id := fmt.Sprintf("worker-adopt-%d-%s", os.Getpid(), strings.ToLower(strings.ReplaceAll(t.Name()[4:], "/", "-")))
	v := &lives{
		t: t, e: edgetest.New(t), api: api, dir: t.TempDir(), lease: edgetest.Lease(1), chunks: map[int64][]byte{},
		env: []string{"EXECUTORS=docker", "DOCKER_HOST=" + host, "WORKER_ID=" + id},
	}
	t.Cleanup(func() { // of a test that failed
		for _, c := range v.containers() {
			_ = api.ContainerRemove(context.Background(), c.ID, container.RemoveOptions{Force: true})
		}
	})
	v.start(false)
	return v
}

// start starts the worker, which lists its job or does not.
func (v *lives) start(holds bool) {
	v.t.Helper()
	v.worker = start(v.t, v.e, v.dir, v.env...)
	var reg workerproto.Register
	v.link, reg = v.e.Hello()
	if got := len(reg.Running) == 1 && reg.Running[0].Lease == v.lease; got != holds || len(reg.Running) > 1 {
		v.t.Fatalf("the hello lists %+v", reg.Running)
	}
	if holds && !v.stopped && reg.Running[0].LastSeq < v.last {
		v.t.Errorf("the hello says that it has output up to %d, which had sent %d", reg.Running[0].LastSeq, v.last)
	}
	v.link.Welcome()
}

// run assigns the job.
func (v *lives) run(leaseSeconds int, change func(*job.Spec), command string) {
	v.t.Helper()
	spec := edgetest.Shell(command)
	spec.ContainerImage, spec.PullPolicy = testImage, "never"
	if change != nil {
		change(&spec)
	}
	v.link.Send(workerproto.TypeAssign, workerproto.Assign{Assignments: []workerproto.Assignment{
		{Lease: v.lease, LeaseSeconds: leaseSeconds, Job: spec},
	}})
}

// until plays the edge, which confirms, acknowledges and keeps everything, until
// ok.
func (v *lives) until(what string, ok func() bool) {
	v.t.Helper()
	deadline := time.Now().Add(60 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			v.t.Fatalf("%s: not within a minute; output is %q", what, v.output())
		}
		f := v.link.Next()
		switch f.Kind {
		case workerproto.TypeHeartbeat:
			var h workerproto.Heartbeat
			v.link.Decode(f, f.Kind, &h)
			b := workerproto.Beat{ID: h.ID}
			for _, r := range h.Running {
				b.Confirmed = append(b.Confirmed, r.LeaseID)
			}
			v.link.Send(workerproto.TypeBeat, b)
		case workerproto.TypeOutput:
			v.take(f.Chunk)
			v.link.Send(workerproto.TypeAck, workerproto.Ack{JobID: f.Lease.JobID, Attempt: f.Lease.Attempt, AckedSeq: f.Chunk.Seq})
		case workerproto.TypeResult:
			var r workerproto.Result
			v.link.Decode(f, f.Kind, &r)
			for _, c := range r.Tail {
				v.take(c)
			}
			v.result = &r
			v.link.AckResults(r.Lease)
		}
	}
}

func (v *lives) take(c workerproto.Chunk) {
	v.t.Helper()
	if had, ok := v.chunks[c.Seq]; ok && !bytes.Equal(had, c.Data) {
		v.t.Errorf("chunk %d was %q, and is %q", c.Seq, had, c.Data)
	}
	v.chunks[c.Seq] = c.Data
	v.last = max(v.last, c.Seq)
}

func (v *lives) output() string {
	var out strings.Builder
	for n := int64(1); n <= v.last; n++ {
		data, ok := v.chunks[n]
		if !ok {
			fmt.Fprintf(&out, "[no chunk %d]", n)
		}
		out.Write(data)
	}
	return out.String()
}

func (v *lives) says(text string) {
	v.t.Helper()
	v.until("the command says "+text, func() bool { return strings.Contains(v.output(), text) })
}

// ends waits for the result, and for everything to be gone.
func (v *lives) ends() *workerproto.Result {
	v.t.Helper()
	v.until("the result", func() bool { return v.result != nil })
	if left := v.containers(); len(left) > 0 {
		v.t.Errorf("left: %v", left)
	}
	r := v.result
	if r.Manifest == nil || r.Manifest.Chunks != v.last || r.Manifest.Bytes != int64(len(v.output())) || r.Manifest.TruncatedBytes != 0 {
		v.t.Errorf("the manifest is %+v, of %d chunks with %d bytes", r.Manifest, v.last, len(v.output()))
	}
	v.worker.stop()
	if entries, err := os.ReadDir(v.dir + "/attempts"); err != nil || len(entries) > 0 {
		v.t.Errorf("the journal holds %v (%v)", entries, err)
	}
	return r
}

func (v *lives) containers() []container.Summary {
	v.t.Helper()
	found, err := v.api.ContainerList(context.Background(), container.ListOptions{
		All: true, Filters: filters.NewArgs(filters.Arg("label", "cmdexec.worker="+strings.TrimPrefix(v.env[2], "WORKER_ID="))),
	})
	if err != nil {
		v.t.Fatal(err)
	}
	return found
}

// container is the job's one.
func (v *lives) container() container.InspectResponse {
	v.t.Helper()
	found := v.containers()
	if len(found) != 1 {
		v.t.Fatalf("containers are %v", found)
	}
	c, err := v.api.ContainerInspect(context.Background(), found[0].ID)
	if err != nil {
		v.t.Fatal(err)
	}
	return c
}

// meanwhile waits while there is no worker.
func (v *lives) meanwhile(what string, ok func() bool) {
	v.t.Helper()
	deadline := time.Now().Add(60 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			v.t.Fatal(what + ": not within a minute")
		}
		time.Sleep(20 * time.Millisecond) // between two looks
	}
}

const numbers = "i=0; while [ $i -lt %d ]; do echo line $i; i=$((i+1)); sleep 0.05; done; "

func lines(n int) string {
	var out strings.Builder
	for i := range n {
		fmt.Fprintf(&out, "line %d\n", i)
	}
	return out.String()
}

// A worker that is killed twice in the middle of a command goes on with it:
// it is started once, every line comes once, and its end is told.
func TestKilledWorkerGoesOn(t *testing.T) {
	v := newLives(t)
	v.run(60, nil, fmt.Sprintf(numbers, 100)+"exit 5")
	v.says("line 10\n")
	before := v.container()
	for _, text := range []string{"line 40\n", "line 70\n"} {
		v.worker.kill()
		v.start(true)
		v.says(text)
		if now := v.container(); now.ID != before.ID || now.State.StartedAt != before.State.StartedAt {
			t.Errorf("the container is %s of %s, was %s of %s", now.ID, now.State.StartedAt, before.ID, before.State.StartedAt)
		}
	}
	r := v.ends()
	if r.ExitCode == nil || *r.ExitCode != 5 || r.Outcome != job.OutcomeFailed || r.Reason != job.ReasonExitCode || r.ImageDigest == "" {
		t.Errorf("result is %+v", r)
	}
	if got := v.output(); got != lines(100) {
		t.Errorf("output is %q", got)
	}
	started, err := time.Parse(time.RFC3339Nano, before.State.StartedAt)
	if err != nil || !r.StartedAt.Equal(job.Timestamp(started)) || r.AcceptedAt.After(r.StartedAt) || r.AcceptedAt.IsZero() || r.PreparedAt.IsZero() || r.FinishedAt.Sub(r.StartedAt) < 5*time.Second {
		t.Errorf("times are %v, %v, %v, %v; the container's %s (%v)", r.AcceptedAt, r.PreparedAt, r.StartedAt, r.FinishedAt, before.State.StartedAt, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	starts := 0
	messages, ended := v.api.Events(ctx, events.ListOptions{
		Since: fmt.Sprint(started.Unix() - 10), Until: fmt.Sprint(time.Now().Unix()),
		Filters: filters.NewArgs(filters.Arg("event", "start"), filters.Arg("label", "cmdexec.lease="+v.lease.LeaseID), filters.Arg("container", before.ID)),
	})
	for open := true; open; {
		select {
		case <-messages:
			starts++
		case <-ended:
			open = false
		}
	}
	if starts > 1 {
		t.Errorf("the command was started %d times", starts)
	}
}

func TestEndedWhileTheWorkerWasAway(t *testing.T) {
	v := newLives(t)
	v.run(60, nil, fmt.Sprintf(numbers, 40)+"echo oops >&2; exit 3")
	v.says("line 5\n")
	v.worker.kill()
	v.meanwhile("the command ends", func() bool { return !v.container().State.Running })
	v.start(true)
	if r := v.ends(); r.ExitCode == nil || *r.ExitCode != 3 || r.Reason != job.ReasonExitCode {
		t.Errorf("result is %+v", r)
	}
	if got := v.output(); got != lines(40)+"oops\n" {
		t.Errorf("output is %q", got)
	}
}

// A lease does not get longer by a restart: when it is over, what is left of the
// command is removed, and the worker does not list it.
func TestLeaseOverWhileTheWorkerWasAway(t *testing.T) {
	v := newLives(t)
	v.run(8, nil, "echo ready; sleep 600") // given up after 6 s
	v.says("ready")
	v.worker.kill()
	killed := time.Now()
	id := v.container().ID
	v.meanwhile("the lease is over", func() bool { return time.Since(killed) > 6*time.Second })
	v.start(false)
	for _, c := range v.containers() {
		t.Errorf("is still there when the worker connects: %s", c.ID)
	}
	if _, err := v.api.ContainerInspect(t.Context(), id); err == nil {
		t.Error("the container is still there")
	}
	v.worker.stop()
}

// What is left of the lease after a restart is what was left before.
func TestLeaseRunsOnAfterTheRestart(t *testing.T) {
	v := newLives(t)
	v.run(16, nil, "echo ready; sleep 600") // given up after 12 s
	confirmed := time.Now()
	v.says("ready")
	v.worker.kill()
	v.meanwhile("a part of the lease is over", func() bool { return time.Since(confirmed) > 6*time.Second })
	v.start(true)
	// Nothing is confirmed from here on.
	v.meanwhile("the lease is given up", func() bool { return len(v.containers()) == 0 })
	if took := time.Since(confirmed); took > 25*time.Second {
		t.Errorf("given up after %v", took)
	}
	v.until("the result", func() bool { return v.result != nil })
	if v.result.Reason != job.ReasonLeaseLost {
		t.Errorf("result is %+v", v.result)
	}
	v.worker.stop()
}

func TestStaleAfterTheRestart(t *testing.T) {
	v := newLives(t)
	v.run(60, nil, "echo ready; sleep 600")
	v.says("ready")
	v.worker.kill()
	v.start(true)
	v.link.Send(workerproto.TypeStale, workerproto.Stale{Leases: []workerproto.Lease{v.lease}})
	v.until("the container is removed", func() bool { return len(v.containers()) == 0 })
	v.worker.stop()
	if v.result != nil {
		t.Errorf("a result: %+v", v.result)
	}
}

func TestCancelAfterTheRestart(t *testing.T) {
	for _, when := range []string{"after", "before"} {
		t.Run(when, func(t *testing.T) {
			v := newLives(t)
			command := "trap 'sleep 2; echo bye; exit 0' TERM; echo ready; while :; do sleep 0.1; done"
			v.run(60, func(s *job.Spec) { s.Stop.GraceSeconds = new(20) }, command)
			v.says("ready")
			if when == "before" {
				v.link.Send(workerproto.TypeCancel, workerproto.Cancel{Lease: v.lease})
				api, id := v.api, v.container().ID
				v.meanwhile("the signal", func() bool { return signalled(t, api, id) })
			}
			v.worker.kill()
			v.start(true)
			v.link.Send(workerproto.TypeCancel, workerproto.Cancel{Lease: v.lease})
			r := v.ends()
			if r.Outcome != job.OutcomeCanceled || r.Stop == nil || r.Stop.SignalledAt.IsZero() || r.Stop.GoneAt.IsZero() || r.Stop.StopUnconfirmed {
				t.Errorf("result is %+v, %+v", r, r.Stop)
			}
			if !strings.HasPrefix(v.output(), "ready\nbye\n") {
				t.Errorf("output is %q", v.output())
			}
		})
	}
}

// signalled reports whether the engine has sent a signal to the container.
func signalled(t *testing.T, api *client.Client, id string) bool {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	messages, ended := api.Events(ctx, events.ListOptions{
		Since: fmt.Sprint(time.Now().Unix() - 60), Until: fmt.Sprint(time.Now().Unix()),
		Filters: filters.NewArgs(filters.Arg("event", "kill"), filters.Arg("container", id)),
	})
	found := false
	for {
		select {
		case <-messages:
			found = true
		case <-ended:
			return found
		}
	}
}

func TestTimeoutWhileTheWorkerWasAway(t *testing.T) {
	v := newLives(t)
	v.run(60, func(s *job.Spec) { s.Timeout = 3 }, "echo ready; sleep 600")
	v.says("ready")
	began := time.Now()
	v.worker.kill()
	v.meanwhile("the timeout", func() bool { return time.Since(began) > 3*time.Second })
	v.start(true)
	if r := v.ends(); r.Outcome != job.OutcomeTimedOut || r.Reason != job.ReasonExecutionTimeout || r.Stop == nil || r.Stop.GoneAt.IsZero() {
		t.Errorf("result is %+v, %+v", r, r.Stop)
	}
}

// A worker that is stopped stops its commands, as ever.
func TestStopDoesNotLeaveContainers(t *testing.T) {
	v := newLives(t)
	v.run(60, nil, "echo ready; sleep 600")
	v.says("ready")
	v.worker.stop()
	if left := v.containers(); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	v.stopped = true
	v.start(true) // its result was not acknowledged
	if r := v.ends(); r.Reason != job.ReasonWorkerStopped {
		t.Errorf("result is %+v", r)
	}
}
