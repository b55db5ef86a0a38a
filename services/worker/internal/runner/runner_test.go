package runner

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
	"github.com/cmdexec/cmdexec/services/worker/internal/spool"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const me = "worker-1"

// fakeClock is the lease clock, which stands still unless it is moved.
type fakeClock struct {
	mu  sync.Mutex
	now time.Duration
}

func (c *fakeClock) Now() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *fakeClock) pass(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now += d
}

// script is what a fake command does.
type script struct {
	slowPrepare bool // Prepare waits for its context or for command.ready
	deaf        bool // ... and ignores its context
	prepareErr  error
	output      func(stdout, stderr io.Writer)
	feed        <-chan string // printed to stdout until it is closed
	ignoreStop  bool          // only a kill ends it
	finished    bool          // ends by itself at once
	code        int
}

// scripted is an executor whose commands do what the test says.
type scripted struct {
	mu       sync.Mutex
	scripts  map[string]script // by lease id; missing: runs until it is stopped or ended
	commands map[string]*command
	starts   []string // lease ids, in order
}

type command struct {
	x         *scripted
	spec      executor.Spec
	script    script
	ready     chan struct{} // closed: Prepare goes on
	end       chan struct{} // closed: the command ends by itself
	stopped   chan struct{} // closed: the command ends by a signal
	preparing bool
	prepared  error // the context's, when Prepare gave up
	started   bool
	stdout    io.Writer
	stderr    io.Writer
	closed    bool
	stops     []executor.StopReason
}

func (x *scripted) Name() string                  { return job.ExecutorProcess }
func (x *scripted) Probe(context.Context) error   { return nil }
func (x *scripted) Recover(context.Context) error { return nil }

func (x *scripted) Prepare(ctx context.Context, spec executor.Spec) (executor.Attempt, error) {
	x.mu.Lock()
	c := &command{
		x: x, spec: spec, script: x.scripts[spec.LeaseID], preparing: true,
		ready: make(chan struct{}), end: make(chan struct{}), stopped: make(chan struct{}),
	}
	x.commands[spec.LeaseID] = c
	x.mu.Unlock()
	if c.script.slowPrepare {
		done := ctx.Done()
		if c.script.deaf {
			done = nil
		}
		select {
		case <-c.ready:
		case <-done:
		}
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	c.preparing = false
	if err := ctx.Err(); err != nil && !c.script.deaf {
		c.prepared = err
		return nil, executor.InfraError("preparing was called off", err)
	}
	if c.script.prepareErr != nil {
		return nil, c.script.prepareErr
	}
	return c, nil
}

func (c *command) Start(stdout, stderr io.Writer) error {
	c.x.mu.Lock()
	if len(c.stops) > 0 {
		c.x.mu.Unlock()
		return executor.InfraError("the attempt was stopped", executor.ErrStopped)
	}
	c.started = true
	c.x.starts = append(c.x.starts, c.spec.LeaseID)
	c.stdout, c.stderr = stdout, stderr
	c.x.mu.Unlock()
	return nil
}

func (c *command) Wait() executor.Exit {
	now := time.Now()
	exit := executor.Exit{StartedAt: now, FinishedAt: now}
	if c.script.output != nil {
		c.script.output(c.stdout, c.stderr)
	}
	for feeding := c.script.feed != nil; feeding; {
		select {
		case p, more := <-c.script.feed:
			feeding = more
			_, _ = io.WriteString(c.stdout, p)
		case <-c.stopped:
			feeding = false
		}
	}
	if c.script.finished {
		close(c.end)
	}
	select {
	case <-c.end:
		exit.Code = &c.script.code
	case <-c.stopped:
		exit.Signal = "SIGTERM"
	}
	c.x.mu.Lock()
	defer c.x.mu.Unlock()
	if len(c.stops) > 0 {
		exit.Stop = &executor.StopReceipt{Reason: c.stops[0], DeliveredAt: now, ExitedAt: now, GoneAt: now}
		if exit.Code == nil {
			exit.Stop.SignalledAt = now
		}
	}
	return exit
}

func (c *command) Stop(why executor.StopReason) {
	c.x.mu.Lock()
	defer c.x.mu.Unlock()
	c.stops = append(c.stops, why)
	if c.script.ignoreStop && why != executor.StopLeaseLost {
		return
	}
	select {
	case <-c.stopped:
	default:
		close(c.stopped)
	}
}

func (c *command) Close() error {
	c.x.mu.Lock()
	defer c.x.mu.Unlock()
	c.closed = true
	return nil
}

// bench is a runner with everything around it. The test is its session.
type bench struct {
	t     testing.TB
	r     *Runner
	clock *fakeClock
	x     *scripted
	spool *spool.Spool
	dir   string
}

// newBench must be called in a synctest bubble: settle needs one.
func newBench(t testing.TB, slots int) *bench {
	b := &bench{t: t, clock: &fakeClock{now: time.Hour}, dir: t.TempDir()}
	b.x = &scripted{scripts: map[string]script{}, commands: map[string]*command{}}
	b.open(slots)
	return b
}

func (b *bench) open(slots int) {
	b.t.Helper()
	var err error
	if b.spool, err = spool.Open(b.dir, spool.Options{SyncAfter: time.Hour}); err != nil {
		b.t.Fatal(err)
	}
	if b.r, err = New(b.config(slots)); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) config(slots int) Config {
	return Config{
		WorkerID: me, Offer: Offer{Slots: slots}, Executors: map[string]executor.Executor{b.x.Name(): b.x}, Spool: b.spool,
		Clock: b.clock, Usage: func() Usage { return Usage{} }, Logger: slog.New(slog.DiscardHandler),
	}
}

// close kills what runs and closes the spool, as a stopping worker does.
func (b *bench) close() {
	b.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	b.r.Stop(ctx)
	if err := b.spool.Close(); err != nil {
		b.t.Error(err)
	}
}

func lease(n int) workerproto.Lease { return leaseOf(fmt.Sprintf("job-%d", n), 1) }

func leaseOf(jobID string, attempt int) workerproto.Lease {
	return workerproto.Lease{JobID: jobID, Attempt: attempt, LeaseID: fmt.Sprintf("lease-%s-%d", jobID, attempt)}
}

func (b *bench) assign(l workerproto.Lease, s script) {
	b.x.mu.Lock()
	if _, known := b.x.scripts[l.LeaseID]; !known {
		b.x.scripts[l.LeaseID] = s
	}
	b.x.mu.Unlock()
	b.r.Assign(workerproto.Assignment{Lease: l, LeaseSeconds: 60, Job: spec()}, b.clock.Now())
	synctest.Wait()
}

func spec() job.Spec {
	s, problems := job.Normalise(job.Spec{Command: job.Command{Shell: "true"}})
	if len(problems) > 0 {
		panic(problems)
	}
	return s
}

func (b *bench) command(l workerproto.Lease) *command {
	b.t.Helper()
	b.x.mu.Lock()
	defer b.x.mu.Unlock()
	c := b.x.commands[l.LeaseID]
	if c == nil {
		b.t.Fatalf("%s never reached the executor", l.LeaseID)
	}
	return c
}

// stops are the reasons that a command was given.
func (b *bench) stops(l workerproto.Lease) []executor.StopReason {
	c := b.command(l)
	b.x.mu.Lock()
	defer b.x.mu.Unlock()
	return slices.Clone(c.stops)
}

func (b *bench) end(l workerproto.Lease) {
	close(b.command(l).end)
	synctest.Wait()
}

// sent is one frame of the worker, decoded.
type sent struct {
	kind   workerproto.Type
	lease  workerproto.Lease
	chunk  workerproto.Chunk
	result workerproto.Result
	reason string
}

func (s sent) String() string {
	switch s.kind {
	case workerproto.TypeOutput:
		return fmt.Sprintf("output %s %d", s.lease.JobID, s.chunk.Seq)
	case workerproto.TypeResult:
		return fmt.Sprintf("result %s %s", s.lease.JobID, s.result.Outcome)
	}
	return string(s.kind) + " " + s.lease.JobID
}

// frames are what a session would write now.
func (b *bench) frames() []sent {
	b.t.Helper()
	var out []sent
	for {
		f, ok := b.r.take()
		if !ok {
			return out
		}
		out = append(out, b.decode(f))
	}
}

func (b *bench) decode(f Frame) sent {
	b.t.Helper()
	if len(f.Data) > workerproto.MaxFrameBytes {
		b.t.Errorf("a frame of %d bytes", len(f.Data))
	}
	if f.Binary {
		l, c, err := workerproto.DecodeChunk(f.Data)
		if err == nil {
			err = c.Validate()
		}
		if err != nil {
			b.t.Fatal(err)
		}
		return sent{kind: workerproto.TypeOutput, lease: l, chunk: c}
	}
	kind, err := workerproto.TypeOf(f.Data)
	if err != nil {
		b.t.Fatal(err)
	}
	s := sent{kind: kind}
	switch kind {
	case workerproto.TypeResult:
		err = workerproto.Decode(f.Data, &s.result)
		if err == nil {
			err = s.result.Validate()
		}
		s.lease = s.result.Lease
	case workerproto.TypeRejected:
		var body workerproto.Rejected
		err = workerproto.Decode(f.Data, &body)
		s.lease, s.reason = body.Lease, body.Reason
	default:
		var body workerproto.Progress
		err = workerproto.Decode(f.Data, &body)
		if err == nil && body.At.IsZero() {
			err = errors.New("a step without its time")
		}
		s.lease = body.Lease
	}
	if err != nil {
		b.t.Fatal(err)
	}
	return s
}

// expect compares the frames that are due with their short form.
func (b *bench) expect(want ...string) []sent {
	b.t.Helper()
	got := b.frames()
	short := []string{}
	for _, s := range got {
		short = append(short, s.String())
	}
	if !slices.Equal(short, append([]string{}, want...)) {
		b.t.Fatalf("frames are %q, want %q", short, want)
	}
	return got
}

func (b *bench) ackResult(l workerproto.Lease) {
	b.r.Ack(workerproto.Ack{Results: []workerproto.Lease{l}})
}

func (b *bench) ackOutput(l workerproto.Lease, seq int64) {
	b.r.Ack(workerproto.Ack{JobID: l.JobID, Attempt: l.Attempt, AckedSeq: seq})
}

func (b *bench) wantIdle() {
	b.t.Helper()
	if !b.r.Idle() || b.r.Busy() != 0 || len(b.r.Holding()) != 0 {
		b.t.Errorf("not idle: %d busy, holding %v", b.r.Busy(), b.r.Holding())
	}
	b.r.mu.Lock()
	defer b.r.mu.Unlock()
	if b.r.memory != 0 {
		b.t.Errorf("%d bytes of output are counted as held", b.r.memory)
	}
	if live := b.spool.Usage().Live; live != 0 {
		b.t.Errorf("%d bytes are left in the spool", live)
	}
}

// checkManifest: what was sent under a lease is what the manifest declares.
func checkManifest(t testing.TB, chunks []workerproto.Chunk, m *job.Manifest) {
	t.Helper()
	if m == nil {
		t.Fatal("a result without a manifest")
	}
	sum := sha256.New()
	var total int64
	for i, c := range chunks {
		if c.Seq != int64(i+1) {
			t.Fatalf("chunk %d has seq %d", i+1, c.Seq)
		}
		sum.Write(c.Data)
		total += int64(len(c.Data))
	}
	if m.Chunks != int64(len(chunks)) || m.Bytes != total || m.SHA256 != hex.EncodeToString(sum.Sum(nil)) {
		t.Fatalf("manifest %+v does not declare the %d chunks with %d bytes", *m, len(chunks), total)
	}
}

func in(t *testing.T, slots int, f func(t *testing.T, b *bench)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, slots)
		defer b.close()
		f(t, b)
	})
}

func say(text string) func(stdout, stderr io.Writer) {
	return func(stdout, _ io.Writer) { fmt.Fprint(stdout, text) }
}

func TestShortAttemptIsOneFrame(t *testing.T) {
	in(t, 1, func(t *testing.T, b *bench) {
		b.assign(lease(1), script{finished: true, output: func(o, e io.Writer) { fmt.Fprint(o, "out"); fmt.Fprint(e, "err") }})
		got := b.expect("result job-1 succeeded")[0].result
		if len(got.Tail) != 2 || string(got.Tail[0].Data) != "out" || got.Tail[1].Stream != workerproto.Stderr {
			t.Errorf("tail is %+v", got.Tail)
		}
		checkManifest(t, got.Tail, got.Manifest)
		if got.WorkerID != me || got.ExitCode == nil || *got.ExitCode != 0 || got.AcceptedAt.IsZero() || got.PreparedAt.IsZero() {
			t.Errorf("result is %+v", got)
		}
		if b.r.Busy() != 0 || b.r.Idle() {
			t.Error("an unacknowledged result takes a slot, or is forgotten")
		}
		if h := b.r.Heartbeat(); len(h.Running) != 1 || h.Running[0].Phase != workerproto.PhaseEnded {
			t.Errorf("the heartbeat lists %+v", h.Running)
		}
		b.expect() // once
		if !b.command(lease(1)).closed {
			t.Error("the attempt was not closed")
		}
		b.ackResult(lease(1))
		b.wantIdle()
		b.ackResult(lease(1)) // a repeat
		b.wantIdle()
	})
}

func TestLongAttemptTellsItsSteps(t *testing.T) {
	in(t, 1, func(t *testing.T, b *bench) {
		b.assign(lease(1), script{output: say("early")})
		b.expect()
		time.Sleep(quietFor + time.Millisecond)
		synctest.Wait()
		got := b.expect("started job-1", "output job-1 1")
		b.end(lease(1))
		b.expect() // the result waits for the output's acknowledgement
		b.ackOutput(lease(1), 1)
		res := b.expect("result job-1 succeeded")[0].result
		if len(res.Tail) != 0 {
			t.Error("what was sent rides in the result again")
		}
		checkManifest(t, []workerproto.Chunk{got[1].chunk}, res.Manifest)
		b.ackResult(lease(1))
		b.wantIdle()
	})
}

// What a container prints is seen before the container is removed.
func TestContainersTellTheirStepsAtOnce(t *testing.T) {
	in(t, 1, func(t *testing.T, b *bench) {
		cfg := b.config(1)
		cfg.Executors = map[string]executor.Executor{job.ExecutorDocker: b.x}
		var err error
		if b.r, err = New(cfg); err != nil {
			t.Fatal(err)
		}
		s := spec()
		s.ContainerImage = "image"
		b.x.scripts[lease(1).LeaseID] = script{slowPrepare: true, output: say("early")}
		b.r.Assign(workerproto.Assignment{Lease: lease(1), LeaseSeconds: 60, Job: s}, b.clock.Now())
		time.Sleep(time.Millisecond)
		synctest.Wait()
		if len(b.frames()) == 0 { // preparing, and perhaps accepted before
			t.Error("nothing is said of it")
		}
		close(b.command(lease(1)).ready)
		time.Sleep(5 * time.Millisecond)
		synctest.Wait()
		b.expect("started job-1", "output job-1 1")
		b.end(lease(1))
		b.ackOutput(lease(1), 1)
		b.expect("result job-1 succeeded")
		b.ackResult(lease(1))
		b.wantIdle()
	})
}

func TestSlowPreparationTellsItsSteps(t *testing.T) {
	in(t, 1, func(t *testing.T, b *bench) {
		b.assign(lease(1), script{slowPrepare: true})
		time.Sleep(quietFor + time.Millisecond)
		synctest.Wait()
		b.expect("preparing job-1")
		close(b.command(lease(1)).ready)
		synctest.Wait()
		b.expect("started job-1")
		b.r.Connected() // a new session hears where it is
		b.expect("started job-1")
	})
}

func TestRepeatedAssignmentStartsNothing(t *testing.T) {
	in(t, 1, func(t *testing.T, b *bench) {
		b.assign(lease(1), script{})
		b.assign(lease(1), script{})
		b.assign(lease(2), script{})
		if got := b.expect("rejected job-2"); got[0].reason != "busy" {
			t.Errorf("rejected because %q", got[0].reason)
		}
		b.end(lease(1))
		b.assign(lease(1), script{}) // its result is not acknowledged
		b.expect("result job-1 succeeded")
		b.ackResult(lease(1))
		b.assign(lease(1), script{}) // it is
		b.assign(lease(2), script{}) // went back to the queue, perhaps to another worker
		b.expect()
		if want := []string{lease(1).LeaseID}; !slices.Equal(b.x.starts, want) {
			t.Errorf("started %q, want %q", b.x.starts, want)
		}
		b.wantIdle()
		for n := range recentLeases { // the memory of old leases is bounded, and long enough
			b.r.remember(lease(10_000 + n))
		}
		b.assign(lease(1), script{})
		b.expect()
		if n := len(b.r.ended[0]) + len(b.r.ended[1]); n > 2*recentLeases {
			t.Errorf("%d leases are remembered", n)
		}
	})
}

func TestAttemptsOfOneJobDoNotOverlap(t *testing.T) {
	in(t, 4, func(t *testing.T, b *bench) {
		older, newer, newest := leaseOf("job-1", 1), leaseOf("job-1", 2), leaseOf("job-1", 3)
		b.assign(newer, script{ignoreStop: true})
		b.assign(older, script{}) // late
		b.expect("rejected job-1")
		if got := b.stops(newer); len(got) != 0 {
			t.Fatalf("an older assignment stopped the newer attempt: %v", got)
		}
		b.assign(newest, script{})
		got := b.expect("rejected job-1")
		if got[0].lease != newest {
			t.Errorf("rejected %+v, want the newest", got[0].lease)
		}
		if got := b.stops(newer); !slices.Contains(got, executor.StopLeaseLost) {
			t.Fatalf("the older attempt was not killed: %v", got)
		}
		synctest.Wait()
		b.expect() // nothing of it is reported
		b.wantIdle()
		b.assign(leaseOf("job-1", 4), script{finished: true})
		b.expect("result job-1 succeeded")
	})
}

func TestRefusals(t *testing.T) {
	in(t, 1, func(t *testing.T, b *bench) {
		reason := func(n int) string {
			t.Helper()
			b.assign(lease(n), script{finished: true})
			return b.expect(fmt.Sprintf("rejected job-%d", n))[0].reason
		}
		b.r.Drain(true)
		if h := b.r.Heartbeat(); h.Status != workerproto.StatusDraining || h.FreeSlots != 0 {
			t.Errorf("a draining worker says %+v", h)
		}
		if got := reason(1); got != "draining" {
			t.Errorf("rejected because %q", got)
		}
		b.r.Drain(false)
		b.r.Unready(map[string]string{job.ExecutorProcess: "the disk is full"})
		if h := b.r.Heartbeat(); h.FreeSlots != 0 || !strings.Contains(h.Reason, "the disk is full") {
			t.Errorf("a worker that takes nothing says %+v", h)
		}
		if got := reason(2); got != "the disk is full" {
			t.Errorf("rejected because %q", got)
		}
		b.r.Unready(nil)
		docker := workerproto.Assignment{Lease: lease(3), Job: spec()}
		docker.Job.ContainerImage = "alpine"
		b.r.Assign(docker, b.clock.Now())
		if got := b.expect("rejected job-3")[0].reason; !strings.Contains(got, "docker") {
			t.Errorf("rejected because %q", got)
		}
		b.assign(lease(4), script{finished: true})
		b.expect("result job-4 succeeded")
	})
}

func TestUndeliveredResultsAreBounded(t *testing.T) {
	in(t, 8, func(t *testing.T, b *bench) {
		for n := range maxUndelivered {
			b.assign(lease(n), script{finished: true})
		}
		if got := len(b.frames()); got != maxUndelivered {
			t.Fatalf("%d frames", got)
		}
		next := lease(maxUndelivered)
		b.assign(next, script{finished: true})
		if got := b.expect("rejected " + next.JobID)[0].reason; !strings.Contains(got, "results wait") {
			t.Errorf("rejected because %q", got)
		}
		reg, err := workerproto.Encode(workerproto.TypeHello, workerproto.Register{Running: b.r.Holding()})
		if err != nil || len(b.r.Holding()) > workerproto.MaxRunning || len(reg) > workerproto.MaxFrameBytes {
			t.Errorf("a hello of %d bytes lists %d leases, %v", len(reg), len(b.r.Holding()), err)
		}
		b.ackResult(lease(0))
		b.assign(lease(maxUndelivered+1), script{finished: true})
		if got := b.frames(); len(got) != 1 || got[0].kind != workerproto.TypeResult {
			t.Errorf("frames are %v", got)
		}
	})
}

func TestLeases(t *testing.T) {
	const limit = 45 * time.Second
	beat := func(b *bench, sentAt time.Duration, confirmed ...string) {
		b.r.Beat(workerproto.Beat{Confirmed: confirmed}, sentAt)
	}
	t.Run("unconfirmed for three quarters", func(t *testing.T) {
		in(t, 1, func(t *testing.T, b *bench) {
			b.assign(lease(1), script{ignoreStop: true, output: say("x")})
			b.clock.pass(limit)
			b.r.GiveUpLeases()
			if got := b.stops(lease(1)); len(got) != 0 {
				t.Fatalf("stopped in time: %v", got)
			}
			b.clock.pass(1)
			b.r.GiveUpLeases()
			b.r.GiveUpLeases()
			synctest.Wait()
			if got := b.stops(lease(1)); !slices.Equal(got, []executor.StopReason{executor.StopLeaseLost}) {
				t.Fatalf("stops are %v, want one kill", got)
			}
			if got := b.expect("result job-1 failed")[0].result; got.Reason != job.ReasonLeaseLost {
				t.Errorf("reason is %s", got.Reason)
			}
		})
	})
	t.Run("counted from the sending of the heartbeat", func(t *testing.T) {
		in(t, 1, func(t *testing.T, b *bench) {
			b.assign(lease(1), script{})
			b.clock.pass(20 * time.Second)
			sentAt := b.clock.Now()
			b.clock.pass(20 * time.Second) // the answer is slow
			beat(b, sentAt, lease(1).LeaseID)
			beat(b, sentAt-5*time.Second, lease(1).LeaseID) // an older answer, overtaken
			b.clock.pass(limit - 20*time.Second)
			b.r.GiveUpLeases()
			if got := b.stops(lease(1)); len(got) != 0 {
				t.Fatalf("stopped in time: %v", got)
			}
			b.clock.pass(1)
			b.r.GiveUpLeases()
			if got := b.stops(lease(1)); len(got) != 1 {
				t.Fatal("not stopped")
			}
		})
	})
	t.Run("a beat that does not list it confirms nothing", func(t *testing.T) {
		in(t, 1, func(t *testing.T, b *bench) {
			b.assign(lease(1), script{})
			b.clock.pass(limit + 1)
			beat(b, b.clock.Now(), "lease-other")
			b.r.GiveUpLeases()
			if got := b.stops(lease(1)); len(got) != 1 {
				t.Fatal("not stopped")
			}
		})
	})
	t.Run("the assignment's own lease is shorter", func(t *testing.T) {
		in(t, 1, func(t *testing.T, b *bench) {
			b.r.Assign(workerproto.Assignment{Lease: lease(1), LeaseSeconds: 20, Job: spec()}, b.clock.Now())
			synctest.Wait()
			b.clock.pass(15*time.Second + 1)
			b.r.GiveUpLeases()
			if got := b.stops(lease(1)); len(got) != 1 {
				t.Fatal("not stopped")
			}
		})
	})
	t.Run("an assignment too late is rejected", func(t *testing.T) {
		in(t, 1, func(t *testing.T, b *bench) {
			hello := b.clock.Now()
			b.r.Heard(hello)
			b.clock.pass(limit + 1)
			b.r.Assign(workerproto.Assignment{Lease: lease(1), Job: spec()}, hello)
			if got := b.expect("rejected job-1")[0].reason; got != "the assignment came too late" {
				t.Errorf("rejected because %q", got)
			}
			beat(b, b.clock.Now()) // confirmed again
			b.r.Assign(workerproto.Assignment{Lease: lease(2), Job: spec()}, hello)
			synctest.Wait()
			if got := b.command(lease(2)); !got.started {
				t.Error("not started")
			}
		})
	})
	t.Run("ends a preparation", func(t *testing.T) {
		in(t, 1, func(t *testing.T, b *bench) {
			b.assign(lease(1), script{slowPrepare: true})
			b.clock.pass(limit + 1)
			b.r.GiveUpLeases()
			synctest.Wait()
			got := b.expect("result job-1 failed")[0].result
			if got.Reason != job.ReasonLeaseLost || len(b.x.starts) != 0 {
				t.Errorf("reason %s, started %v", got.Reason, b.x.starts)
			}
		})
	})
	t.Run("too old after the preparation: not started", func(t *testing.T) {
		in(t, 1, func(t *testing.T, b *bench) {
			b.assign(lease(1), script{slowPrepare: true, deaf: true})
			b.clock.pass(limit + 1) // the machine slept, and nobody has looked since
			close(b.command(lease(1)).ready)
			synctest.Wait()
			got := b.expect("result job-1 failed")[0].result
			if got.Reason != job.ReasonLeaseLost || len(b.x.starts) != 0 {
				t.Errorf("reason %s, started %v", got.Reason, b.x.starts)
			}
		})
	})
	t.Run("takes the grace of a cancel away", func(t *testing.T) {
		in(t, 1, func(t *testing.T, b *bench) {
			b.assign(lease(1), script{ignoreStop: true})
			b.r.Cancel(lease(1))
			b.clock.pass(limit + 1)
			b.r.GiveUpLeases()
			synctest.Wait()
			if got := b.stops(lease(1)); !slices.Equal(got, []executor.StopReason{executor.StopCancel, executor.StopLeaseLost}) {
				t.Errorf("stops are %v", got)
			}
			b.expect("result job-1 canceled") // it was the user who ended it
		})
	})
	t.Run("an ended attempt keeps its result", func(t *testing.T) {
		in(t, 1, func(t *testing.T, b *bench) {
			b.assign(lease(1), script{finished: true})
			b.clock.pass(time.Hour)
			b.r.GiveUpLeases()
			b.expect("result job-1 succeeded")
		})
	})
	t.Run("looked at often enough", func(t *testing.T) {
		in(t, 1, func(t *testing.T, b *bench) {
			for _, d := range []time.Duration{4 * time.Second, 15 * time.Second, time.Minute, time.Hour} {
				b.r.LeaseIs(d)
				if every := b.r.GiveUpLeases(); every <= 0 || every > time.Second || every > d/20 {
					t.Errorf("leases of %v are looked at every %v", d, every)
				}
			}
		})
	})
}

func TestCancel(t *testing.T) {
	t.Run("unknown", func(t *testing.T) {
		in(t, 1, func(t *testing.T, b *bench) {
			b.r.Cancel(lease(1))
			b.expect()
		})
	})
	t.Run("while preparing", func(t *testing.T) {
		for _, deaf := range []bool{false, true} {
			in(t, 1, func(t *testing.T, b *bench) {
				b.assign(lease(1), script{slowPrepare: true, deaf: deaf})
				b.r.Cancel(lease(1))
				b.r.Cancel(lease(1))
				synctest.Wait()
				if deaf {
					close(b.command(lease(1)).ready)
					synctest.Wait()
				}
				got := b.expect("result job-1 canceled")[0].result
				if got.Reason != job.ReasonCanceled || got.Stop == nil || got.Stop.DeliveredAt.IsZero() || got.Stop.GoneAt.IsZero() {
					t.Errorf("result is %+v, stop %+v", got, got.Stop)
				}
				if len(b.x.starts) != 0 || deaf != b.command(lease(1)).closed {
					t.Error("started, or not closed")
				}
			})
		}
	})
	t.Run("while running", func(t *testing.T) {
		in(t, 1, func(t *testing.T, b *bench) {
			b.assign(lease(1), script{output: say("so far")})
			b.r.Beat(workerproto.Beat{Cancel: []workerproto.Lease{lease(1)}}, b.clock.Now())
			b.r.Cancel(lease(1)) // repeated
			synctest.Wait()
			got := b.expect("result job-1 canceled")[0].result
			if got.Stop == nil || got.Stop.SignalledAt.IsZero() || got.Stop.StopUnconfirmed {
				t.Errorf("stop is %+v", got.Stop)
			}
			checkManifest(t, got.Tail, got.Manifest)
		})
	})
	t.Run("ended by itself meanwhile", func(t *testing.T) {
		in(t, 1, func(t *testing.T, b *bench) {
			b.assign(lease(1), script{ignoreStop: true})
			b.r.Cancel(lease(1))
			b.end(lease(1))
			got := b.expect("result job-1 succeeded")[0].result
			if got.Stop == nil || !got.Stop.SignalledAt.IsZero() {
				t.Errorf("stop is %+v", got.Stop)
			}
		})
	})
	t.Run("after the end", func(t *testing.T) {
		in(t, 1, func(t *testing.T, b *bench) {
			b.assign(lease(1), script{finished: true, code: 7})
			b.r.Cancel(lease(1))
			got := b.expect("result job-1 failed")[0].result
			if got.Reason != job.ReasonExitCode || *got.ExitCode != 7 || len(b.stops(lease(1))) != 0 {
				t.Errorf("result is %+v", got)
			}
		})
	})
}

func TestStaleIsForgotten(t *testing.T) {
	in(t, 3, func(t *testing.T, b *bench) {
		b.assign(lease(1), script{ignoreStop: true, output: say("x")})
		b.assign(lease(2), script{finished: true, output: say("x")})
		b.assign(lease(3), script{slowPrepare: true})
		b.r.Stale(lease(1).LeaseID, lease(2).LeaseID, "lease-unknown")
		b.r.Beat(workerproto.Beat{Stale: []string{lease(3).LeaseID}}, b.clock.Now())
		synctest.Wait()
		b.expect()
		if got := b.stops(lease(1)); !slices.Contains(got, executor.StopLeaseLost) {
			t.Errorf("stops are %v", got)
		}
		b.wantIdle()
		b.r.Connected()
		b.expect()
	})
}

func TestOutputAfterStaleIsNotKept(t *testing.T) {
	in(t, 1, func(t *testing.T, b *bench) {
		wait, more := make(chan struct{}), make(chan struct{})
		b.assign(lease(1), script{finished: true, output: func(o, _ io.Writer) {
			close(wait)
			<-more
			fmt.Fprint(o, strings.Repeat("x", 1<<20))
		}})
		<-wait
		b.r.Stale(lease(1).LeaseID)
		close(more)
		synctest.Wait()
		b.expect()
		b.wantIdle()
	})
}

func TestPreparationFails(t *testing.T) {
	for name, c := range map[string]struct {
		err    error
		reason job.Reason
	}{
		"user":    {executor.UserError("no such user", nil), job.ReasonStartFailed},
		"infra":   {executor.InfraError("the disk is full", nil), job.ReasonWorkerError},
		"timeout": {executor.InfraError("the image was not there in time", context.DeadlineExceeded), job.ReasonPrepareTimeout},
		"coded":   {&executor.PrepareError{Reason: "no image", Class: executor.ClassInfra, Code: executor.CodeImagePull}, job.ReasonImagePullFailed},
		"unknown": {errors.New("oops"), job.ReasonWorkerError},
	} {
		t.Run(name, func(t *testing.T) {
			in(t, 1, func(t *testing.T, b *bench) {
				b.assign(lease(1), script{prepareErr: c.err})
				got := b.expect("result job-1 failed")[0].result
				if got.Reason != c.reason || got.Message == "" || got.ExitCode != nil || !got.StartedAt.IsZero() {
					t.Errorf("result is %+v", got)
				}
				checkManifest(t, got.Tail, got.Manifest)
				if len(got.Tail) != 1 || got.Tail[0].Stream != workerproto.System {
					t.Errorf("the log does not say why: %+v", got.Tail)
				}
			})
		})
	}
}

func TestResultAlwaysFitsIntoAFrame(t *testing.T) {
	in(t, 1, func(t *testing.T, b *bench) {
		// The most that may ride along, in as many pieces as may, and a reason of
		// characters that JSON makes six of each.
		b.assign(lease(1), script{
			finished: true,
			output: func(o, e io.Writer) {
				for i := range workerproto.MaxTailChunks/2 - 1 {
					fmt.Fprint([]io.Writer{o, e}[i%2], strings.Repeat("\x00", workerproto.MaxTailBytes/workerproto.MaxTailChunks))
				}
			},
		})
		b.assign(lease(2), script{prepareErr: executor.UserError(strings.Repeat("\x01é", 1<<20), nil)})
		for _, s := range b.frames() { // decode checks sizes and validates
			if s.kind == workerproto.TypeResult && len(s.result.Message) > job.MaxReasonBytes {
				t.Errorf("a message of %d bytes", len(s.result.Message))
			}
		}
	})
	worst := workerproto.Result{
		WorkerID: strings.Repeat("w", 63), Lease: lease(1), Message: strings.Repeat("\x01", job.MaxReasonBytes),
		Manifest: &job.Manifest{SHA256: strings.Repeat("f", 64)}, Stop: &job.Cancel{},
	}
	for i := range workerproto.MaxTailChunks {
		worst.Tail = append(worst.Tail, workerproto.Chunk{
			Seq: int64(i) + 1<<50, Offset: 1 << 50, Stream: workerproto.Stdout, Time: time.Now().UTC(),
			Data: make([]byte, workerproto.MaxTailBytes/workerproto.MaxTailChunks),
		})
	}
	frame, err := workerproto.Encode(workerproto.TypeResult, worst)
	if err != nil || len(frame) > workerproto.MaxFrameBytes/4 {
		t.Errorf("the largest result takes %d of %d bytes, %v", len(frame), workerproto.MaxFrameBytes, err)
	}
}

func TestStopKillsAfterTheGrace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, 4)
		b.assign(lease(1), script{})
		b.assign(lease(2), script{ignoreStop: true})
		b.assign(lease(3), script{slowPrepare: true})
		b.assign(lease(4), script{finished: true})
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		began := time.Now()
		b.r.Stop(ctx)
		if d := time.Since(began); d != 20*time.Second {
			t.Errorf("stopped after %v", d)
		}
		b.assign(lease(5), script{})
		got := map[string]string{}
		for _, s := range b.frames() {
			if s.kind != workerproto.TypeStarted { // of the one that took its time
				got[s.String()] = string(s.result.Reason) + s.reason
			}
		}
		want := map[string]string{
			"result job-1 failed": "worker_stopped", "result job-2 failed": "worker_stopped", "result job-3 failed": "worker_stopped",
			"result job-4 succeeded": "", "rejected job-5": "draining",
		}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("frames are %v, want %v", got, want)
		}
		if err := b.spool.Close(); err != nil {
			t.Fatal(err)
		}
		// The next life has all of it.
		b.open(4)
		defer b.close()
		if got := len(b.r.Holding()); got != 4 {
			t.Errorf("%d results are there after a restart, want 4", got)
		}
	})
}

func TestNextWaits(t *testing.T) {
	in(t, 1, func(t *testing.T, b *bench) {
		got := make(chan error, 1)
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			f, err := b.r.Next(ctx)
			if err == nil && len(f.Data) == 0 {
				err = errors.New("an empty frame")
			}
			got <- err
		}()
		synctest.Wait()
		b.assign(lease(1), script{finished: true})
		if err := <-got; err != nil {
			t.Error(err)
		}
		go func() {
			_, err := b.r.Next(ctx)
			got <- err
		}()
		synctest.Wait()
		cancel()
		if err := <-got; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}
