package docker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/events"
	"github.com/docker/docker/api/types/filters"

	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
	"github.com/cmdexec/cmdexec/services/worker/internal/handover"
)

// Codes as a shell gives them, where no init process says them.
const exitKilled = 128 + 9

const (
	// waitSlice is how long one wait stream is believed before the engine is
	// asked whether it is still there.
	waitSlice = 20 * time.Second
	// settle is how long the engine may take between the end of a container's
	// output and knowing that it has ended, and the other way round.
	settle = 5 * time.Second
)

type phase int

const (
	prepared phase = iota
	starting
	running
	finished
)

// attempt is one container.
type attempt struct {
	x        *Executor
	plan     *plan
	image    *imageFacts
	facts    facts
	id       string // or the name, before it is known
	delivery *delivery
	settled  sync.Once // it is not being prepared or started any more

	warm   *warm         // the container has waited for this attempt; nil: it was made for it
	waited time.Duration // how long
	mark   [handover.MarkSize]byte

	stream  *stream
	outlets [2]*outlet
	copied  chan struct{}    // closed when the output has ended
	copyErr error            // valid then
	unbegun error            // valid then: the init of a warm container has failed
	last    *container.State // valid then: what the container was when it did
	exited  atomic.Bool      // the container is known to have ended
	workers sync.WaitGroup

	// notFound is the exit code of a program that the engine could not start.
	refusal     int
	refusalText string
	stderr      io.Writer
	unclear     error // the start was not answered

	fed     chan struct{} // closed when the command has all of its input
	past    *past         // of one that an earlier process has started
	ended   chan struct{} // closed when Wait knows how it ended
	stopped chan struct{} // closed by the first Stop
	killed  chan struct{} // closed by the first Stop that allows no grace

	mu        sync.Mutex
	phase     phase
	startedAt time.Time
	receipt   *executor.StopReceipt
	goneBy    time.Time // when a stop should have shown its effect
	lost      bool      // StopLeaseLost was asked
	stopping  bool
	sentKill  bool
	sentStop  bool
	timeout   *time.Timer
	closed    bool
	removed   bool
}

// userOf is who runs the command, and whether it is the image that says so.
func (x *Executor) userOf(p *plan, img *imageFacts) (user string, fromImage bool) {
	switch {
	case p.spec.User != "":
		return p.spec.User, false
	case x.mayRun(img):
		return img.user, true
	}
	return nobody, false
}

// create makes the container, for the right user, with its files.
func (a *attempt) create(ctx context.Context) error {
	user, fromImage := a.x.userOf(a.plan, a.image)
	// The tmpfs belong to the user, by number. What number a name has only the
	// image knows, which can be read once there is a container of it.
	found, known := a.x.users.known(a.image.id, user)
	if err := a.createFor(ctx, user, found); err != nil {
		return err
	}
	if !known {
		var err error
		found, err = a.x.users.learn(ctx, a.x.engine, a.image.id, a.id, user)
		if errors.Is(err, errNoSuchUser) && !fromImage {
			return executor.UserError("the image has no such user", err)
		}
		if err != nil && !errors.Is(err, errNoSuchUser) {
			return err
		}
		known = err == nil
		if err := a.x.engine.remove(ctx, a.id); err != nil {
			return err
		}
		if fromImage && (!known || found.uid == 0) { // another name of root
			user, found = nobody, owner{nobodyID, nobodyID}
		}
		if err := a.createFor(ctx, user, found); err != nil {
			return err
		}
	}
	if !a.plan.deliver() {
		return nil
	}
	var err error
	a.delivery, err = a.x.engine.deliver(ctx, a.plan, a.id, found)
	return err
}

func (a *attempt) createFor(ctx context.Context, user string, o owner) error {
	cfg, host := a.plan.configure(a.image, a.facts, &a.x.opts, user, o)
	if a.x.survives(a.facts) {
		host.LogConfig = logConfig()
	}
	if a.plan.deliver() {
		delete(host.Tmpfs, workFolder)
		host.Mounts = append(host.Mounts, a.plan.workVolume(cfg.Labels, o))
	}
	ctx, cancel := a.x.engine.longCall(ctx)
	defer cancel()
	a.id = a.plan.name // until it is known, and where an answer gets lost
	made, err := a.x.create(ctx, cfg, host, a.plan.name)
	if made != "" {
		a.id = made
	}
	return err
}

// create makes a container, and fails where the engine leaves out a limit.
func (x *Executor) create(ctx context.Context, cfg *container.Config, host *container.HostConfig, name string) (id string, err error) {
	made, err := x.engine.api.ContainerCreate(ctx, cfg, host, nil, nil, name)
	if err != nil {
		if reason, ok := userFault(err); ok {
			return "", executor.UserError(reason, err)
		}
		return "", err
	}
	if made.ID == "" || strings.ContainsAny(made.ID, "/?#%") {
		return "", errors.New("the container engine made a container without a usable id")
	}
	// A warning here is a limit that the engine leaves out.
	for _, w := range made.Warnings {
		if !harmless(w) {
			return made.ID, fmt.Errorf("the container engine would give the container less than was asked for: %s", oneLine(w))
		}
	}
	return made.ID, nil
}

// harmless reports whether a warning is not about what was asked for.
func harmless(warning string) bool {
	return strings.TrimSpace(warning) == "" ||
		strings.Contains(warning, "requested image's platform") // runs by emulation, or fails to
}

// Start starts the command.
func (a *attempt) Start(stdout, stderr io.Writer) error {
	a.mu.Lock()
	switch {
	case a.phase != prepared || a.past != nil:
		a.mu.Unlock()
		return executor.InfraError("the attempt was started before", nil)
	case a.receipt != nil:
		a.mu.Unlock()
		return executor.InfraError("the attempt was stopped", executor.ErrStopped)
	}
	a.phase = starting
	a.mu.Unlock()

	err := a.start(stdout, stderr)
	a.settle()
	if err != nil {
		a.mu.Lock()
		a.phase = finished
		a.mu.Unlock()
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.phase = running
	a.startedAt = time.Now()
	if a.refusal == 0 && a.plan.spec.Timeout > 0 {
		a.timeout = time.AfterFunc(a.plan.spec.Timeout, func() { a.Stop(executor.StopTimeout) })
	}
	if a.receipt != nil {
		a.beginStop()
	}
	return nil
}

func (a *attempt) start(stdout, stderr io.Writer) error {
	var s *stream
	var err error
	if a.warm != nil {
		s = a.warm.stream
		err = a.sendOrder()
	} else {
		s, err = a.startContainer(stderr)
	}
	if err != nil {
		return a.x.engine.failed(context.Background(), err)
	}
	if a.refusal != 0 {
		return nil
	}
	a.read(s, stdout, stderr)
	a.feed(s)
	if a.delivery != nil {
		if err := a.delivery.end(context.Background()); err != nil {
			a.x.log.Warn("the carrier of an attempt's files is still there, it is removed later", "job", a.plan.spec.JobID, "error", err)
		}
	}
	return nil
}

// startContainer attaches to the container and starts it. A program that cannot be
// started is no error but noted as such.
func (a *attempt) startContainer(stderr io.Writer) (*stream, error) {
	e := a.x.engine
	ctx := context.Background()
	attachCtx, cancel := e.call(ctx)
	s, err := e.attach(attachCtx, a.id, len(a.plan.spec.Stdin) > 0)
	cancel()
	if err != nil {
		return nil, err
	}
	if a.delivery != nil {
		if err := a.delivery.holding(); err != nil {
			_ = s.Close()
			return nil, err
		}
	}
	startCtx, cancel := e.longCall(ctx)
	err = e.api.ContainerStart(startCtx, a.id, container.StartOptions{})
	cancel()
	switch {
	case err == nil:
		if a.delivery != nil {
			// It has a hold of its own now, unless the other one ended before.
			a.unclear = a.delivery.holding()
		}
	case !answered(err):
		// It may run or not: Wait finds out, and sees to it that it does not.
		a.unclear = err
	default:
		_ = s.Close()
		if reason, ok := userFault(err); ok {
			return nil, executor.UserError(reason, err)
		}
		code, ok := notRunnable(err)
		if !ok || a.facts.init {
			return nil, err
		}
		a.refusal, a.refusalText, a.stderr = code, a.program()+": not found", stderr
		if code == 126 {
			a.refusalText = a.program() + ": permission denied"
		}
	}
	return s, nil
}

// read hands on the output.
func (a *attempt) read(s *stream, stdout, stderr io.Writer) {
	a.stream, a.copied = s, make(chan struct{})
	a.outlets = [2]*outlet{newOutlet(stdout), newOutlet(stderr)}
	for _, o := range a.outlets {
		a.workers.Go(o.run)
	}
	a.workers.Go(func() {
		if a.warm != nil {
			errs := &markFilter{w: a.outlets[1], mark: a.mark[:]}
			a.copyErr = demux(endingReader{a}, a.outlets[0], errs)
			a.unbegun = errs.failure()
		} else {
			a.copyErr = demux(endingReader{a}, a.outlets[0], a.outlets[1])
		}
		a.lookAtEnd()
		close(a.copied)
		for _, o := range a.outlets {
			o.close()
		}
	})
}

// feed gives the command its input.
func (a *attempt) feed(s *stream) {
	stdin := a.plan.spec.Stdin
	if len(stdin) == 0 {
		a.hasInput()
		return
	}
	a.workers.Go(func() {
		// A command that does not read all of it is no error.
		_, _ = s.Write(stdin)
		_ = s.CloseWrite()
		a.hasInput()
	})
}

// hasInput notes that the command has all that it is to read, and that it was told
// to begin.
func (a *attempt) hasInput() {
	select {
	case <-a.fed:
	default:
		close(a.fed)
	}
}

// settle notes that the attempt is not being prepared or started any more.
func (a *attempt) settle() { a.settled.Do(a.x.pool.end) }

// lookAtEnd asks how the container is at the moment when its output ends. The
// engine ends the output of a container and notes its end in one step: one that
// still runs now has lost the rest of its output, also if it ends soon.
func (a *attempt) lookAtEnd() {
	state, err := a.look()
	switch {
	case err != nil:
		a.copyErr = errors.Join(a.copyErr, err)
	case stillRuns(state):
		a.copyErr = errors.Join(a.copyErr, errors.New("the connection ended before the command"))
	default:
		a.last = state
	}
}

// look asks the engine how the container is.
func (a *attempt) look() (*container.State, error) {
	ctx, cancel := a.x.engine.call(context.Background())
	defer cancel()
	got, err := a.x.engine.api.ContainerInspect(ctx, a.id)
	if err != nil {
		return nil, err
	}
	if got.ContainerJSONBase == nil || got.State == nil {
		return nil, errors.New("the engine described a container without its state")
	}
	return got.State, nil
}

func stillRuns(s *container.State) bool {
	return s.Running || s.Restarting || s.Status == container.StateCreated
}

func (a *attempt) program() string {
	if len(a.plan.spec.Argv) > 0 {
		return a.plan.spec.Argv[0]
	}
	return "/bin/sh"
}

// endingReader reads the output. Once the container has ended, an engine that
// sends nothing for a while and does not end the output either is cut off.
type endingReader struct{ a *attempt }

func (r endingReader) Read(p []byte) (int, error) {
	if r.a.exited.Load() {
		_ = r.a.stream.SetReadDeadline(time.Now().Add(settle))
	}
	return r.a.stream.Read(p)
}

// Stop signals the command and kills it after the grace.
func (a *attempt) Stop(reason executor.StopReason) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.phase == finished && reason == executor.StopTimeout {
		return
	}
	now := time.Now()
	if a.receipt == nil {
		a.receipt = &executor.StopReceipt{Reason: reason, DeliveredAt: now}
		a.goneBy = now.Add(a.plan.spec.Grace + a.x.opts.KillBound)
		close(a.stopped)
	}
	if reason == executor.StopLeaseLost && !a.lost {
		a.lost = true
		if by := now.Add(a.x.opts.KillBound); by.Before(a.goneBy) {
			a.goneBy = by
		}
		close(a.killed)
	}
	if a.phase == running {
		a.beginStop()
	}
}

// beginStop sets the stopping going, once. The mutex is held, the phase running.
func (a *attempt) beginStop() {
	if a.stopping || a.refusal != 0 || a.past != nil && a.past.vanished {
		return
	}
	a.stopping = true
	a.workers.Go(a.stop)
}

// stop takes the command from its stop signal to its end. Wait has its own
// eye on the engine and gives up by itself.
func (a *attempt) stop() {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	a.workers.Go(func() { // ends with cancel at the latest
		select {
		case <-a.ended:
			cancel()
		case <-ctx.Done():
		}
	})
	select {
	case <-a.killed:
	default:
		grace := time.NewTimer(a.plan.spec.Grace)
		defer grace.Stop()
		a.sendStopSignal(ctx, grace)
	}
	a.makeRoom(killBacklog)
	for ctx.Err() == nil && a.signal(ctx, "SIGKILL") != nil {
		if !sleep(ctx, 200*time.Millisecond) {
			return
		}
	}
}

// sendStopSignal sends the job's stop signal and waits for its effect, until
// the grace is over. An engine that fails is asked again.
func (a *attempt) sendStopSignal(ctx context.Context, grace *time.Timer) {
	a.makeRoom(stopBacklog)
	// An engine that hangs must not put off the kill.
	ctx, cancel := context.WithTimeout(ctx, max(a.plan.spec.Grace, time.Second))
	defer cancel()
	a.workers.Go(func() { // ends with cancel at the latest
		select {
		case <-a.killed:
			cancel()
		case <-ctx.Done():
		}
	})
	retry := time.NewTicker(500 * time.Millisecond)
	defer retry.Stop()
	sent := a.signal(ctx, a.plan.signal) == nil
	for {
		select {
		case <-grace.C:
			return
		case <-a.killed:
			return
		case <-ctx.Done():
			return
		case <-retry.C:
			if !sent {
				sent = a.signal(ctx, a.plan.signal) == nil
			}
		}
	}
}

// makeRoom lets the output come, so that the engine can notice the end.
func (a *attempt) makeRoom(bytes int) {
	for _, o := range a.outlets {
		o.raise(bytes)
	}
}

// signal sends a signal to the container's main process and notes that it did.
// A container that does not run any more is no error.
func (a *attempt) signal(ctx context.Context, name string) error {
	ctx, cancel := a.x.engine.call(ctx)
	defer cancel()
	// Noted before it is sent: the container's end may be seen before the answer.
	forget := a.noteSignal(name, time.Now())
	err := a.x.engine.api.ContainerKill(ctx, a.id, name)
	if errors.Is(err, context.Canceled) {
		return err // called off since the container has ended, perhaps by this
	}
	if err != nil {
		forget()
		if gone(err) {
			return nil
		}
		if inUse(err) {
			if strings.Contains(err.Error(), "paused") {
				_ = a.x.engine.api.ContainerUnpause(ctx, a.id)
				return err
			}
			return nil // it is not running
		}
		return err
	}
	return nil
}

// noteSignal notes a signal that is about to be sent. forget takes that back.
func (a *attempt) noteSignal(name string, at time.Time) (forget func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	sent := &a.sentStop
	if name == "SIGKILL" {
		sent = &a.sentKill
	}
	before := *sent
	*sent = true
	if a.receipt.SignalledAt.IsZero() {
		a.receipt.SignalledAt = at
	}
	return func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		*sent = before
		if a.receipt.SignalledAt.Equal(at) {
			a.receipt.SignalledAt = time.Time{}
		}
	}
}

// Wait blocks until the container has ended and its output is delivered.
func (a *attempt) Wait() executor.Exit {
	if a.refusal != 0 {
		return a.waitRefusal()
	}
	if a.past != nil && a.past.vanished {
		return a.waitVanished()
	}
	state, failure := a.await()
	a.exited.Store(true)
	switch {
	case a.past != nil:
		a.past.trusted = failure == nil
	case failure == nil:
		// Wakes a read that is blocked already.
		_ = a.stream.SetReadDeadline(time.Now().Add(settle))
	default:
		_ = a.stream.SetDeadline(time.Unix(1, 0)) // nothing of it can be trusted
	}
	close(a.ended)
	a.mu.Lock()
	a.phase = finished
	if a.timeout != nil {
		a.timeout.Stop()
	}
	stopped := a.receipt != nil
	a.mu.Unlock()

	<-a.copied
	if a.stream != nil {
		_ = a.stream.Close() // frees the writer of standard input
	}
	a.workers.Wait()
	if failure == nil && a.copyErr != nil {
		failure = fmt.Errorf("the container engine lost a part of the output: %w", a.copyErr)
	}
	if failure == nil {
		failure = a.unbegun
	}
	var left error
	if failure != nil || stopped {
		left = a.removeWithin(a.x.opts.KillBound)
	}
	return a.judge(state, failure, left, time.Now())
}

// await finds out how the container ended. A wait stream that ends decides
// nothing: what the engine says when it is looked at again does, and only if
// the engine was there all the time.
func (a *attempt) await() (*container.State, error) {
	if a.unclear != nil {
		return nil, fmt.Errorf("the container engine did not say whether the command was started: %w", a.unclear)
	}
	var silentSince time.Time
	for {
		status, err := a.waitOnce()
		if err == nil && status.Error != nil && status.Error.Message != "" {
			return nil, fmt.Errorf("waiting failed: %s", oneLine(status.Error.Message))
		}
		if err != nil && !errors.Is(err, context.DeadlineExceeded) && a.streamEnds(settle/10) {
			return nil, errors.New("the container engine went away while the command ran")
		}
		state, lookErr := a.stateNow()
		switch {
		case gone(lookErr):
			return nil, errors.New("the container was removed by somebody else")
		case lookErr != nil:
			// The stream has ended and nobody can say why, or nobody answers for long.
			// Where our own reader is what holds it up, that is no silence.
			if silentSince.IsZero() || a.outlets[0].full() || a.outlets[1].full() {
				silentSince = time.Now()
			}
			if a.streamEnds(0) || time.Since(silentSince) > a.patience() {
				return nil, fmt.Errorf("the container engine does not answer: %w", errors.Join(lookErr, err))
			}
			_ = sleep(context.Background(), 250*time.Millisecond)
			continue
		case !stillRuns(state):
			if err == nil && status.StatusCode != int64(state.ExitCode) {
				return nil, errors.New("the container engine does not know how the command ended")
			}
			return state, a.stoppedByOthers(state)
		case a.streamEnds(0):
			return nil, errors.New("the container engine lost the output of the command")
		case a.overdue():
			return nil, errors.New("the container could not be killed")
		}
		silentSince = time.Time{}
	}
}

// stateNow is the last word on the container where there is one.
func (a *attempt) stateNow() (*container.State, error) {
	if a.streamEnds(0) && a.last != nil {
		return a.last, nil
	}
	return a.look()
}

// stoppedByOthers returns an error when it was somebody else who stopped the
// container: an engine that is shut down does so, and answers to the last, and
// the command may well exit with 0 then. Such a stop is told by the engine's events.
func (a *attempt) stoppedByOthers(state *container.State) error {
	if a.past != nil {
		return a.endedAway(state)
	}
	a.mu.Lock()
	ours := a.sentStop || a.sentKill
	a.mu.Unlock()
	from, to := engineTime(state.StartedAt, time.Time{}), engineTime(state.FinishedAt, time.Time{})
	if ours || from.IsZero() || to.Before(from) {
		return nil
	}
	killed, err := a.killedBefore(from, to)
	if err != nil {
		return fmt.Errorf("the container engine went away when the command had ended: %w", err)
	}
	if killed {
		return errOthers
	}
	return nil
}

// forgottenEnd is how long the engine is waited for to tell the end of a
// container: it does so at once, unless so much happens that it has forgotten it.
const forgottenEnd = 3 * time.Second

// killedBefore reports whether the engine tells of a signal to the container
// before it tells of its end. The time of the end does not divide them: the engine
// notes a signal after it has sent it, when a quick command has ended already.
func (a *attempt) killedBefore(from, to time.Time) (bool, error) {
	ctx, cancel := a.x.engine.call(context.Background())
	defer cancel() // also of a stream that has told the end
	messages, ends := a.x.engine.api.Events(ctx, events.ListOptions{
		Since: unixTime(from), Until: unixTime(to.Add(forgottenEnd)),
		Filters: filters.NewArgs(filters.Arg("container", a.id),
			filters.Arg("event", string(events.ActionKill)), filters.Arg("event", string(events.ActionDie))),
	})
	for {
		select {
		case m := <-messages:
			if m.Actor.ID != a.id {
				continue
			}
			switch m.Action { //nolint:exhaustive // others are not asked for
			case events.ActionKill:
				return true, nil
			case events.ActionDie:
				return false, nil
			}
		case err := <-ends:
			if errors.Is(err, io.EOF) {
				return false, nil
			}
			return false, err
		}
	}
}

var errOthers = errors.New("the container was stopped by its engine, or by somebody else on this machine")

// events are what the engine remembers of one kind of event of the container.
func (a *attempt) events(kind events.Action, from, to time.Time) ([]events.Message, error) {
	ctx, cancel := a.x.engine.call(context.Background())
	defer cancel()
	messages, ends := a.x.engine.api.Events(ctx, events.ListOptions{
		Since: unixTime(from), Until: unixTime(to),
		Filters: filters.NewArgs(filters.Arg("container", a.id), filters.Arg("event", string(kind))),
	})
	var found []events.Message
	for {
		select {
		case m := <-messages:
			if m.Actor.ID == a.id && m.Action == kind {
				found = append(found, m)
			}
		case err := <-ends:
			if errors.Is(err, io.EOF) {
				return found, nil
			}
			return nil, err
		}
	}
}

func unixTime(t time.Time) string { return fmt.Sprintf("%d.%09d", t.Unix(), t.Nanosecond()) }

// patience is how long an engine that does not answer is waited for: while
// the command is to be dead, no longer than a kill may take.
func (a *attempt) patience() time.Duration {
	if a.overdue() {
		return 0
	}
	return a.x.opts.Patience
}

// overdue reports whether a kill should have shown its effect by now.
func (a *attempt) overdue() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return !a.goneBy.IsZero() && time.Now().After(a.goneBy)
}

// streamEnds reports whether the output has ended, or does within d.
func (a *attempt) streamEnds(d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-a.copied:
		return true
	case <-timer.C:
		select { // both may be ready
		case <-a.copied:
			return true
		default:
			return false
		}
	}
}

// waitOnce waits on one stream until the container ends. It returns
// context.DeadlineExceeded when it is time to look at the engine: after a
// while, when a stop has been asked for, or when the output has ended and the
// engine says nothing.
func (a *attempt) waitOnce() (container.WaitResponse, error) {
	slice, stopped := waitSlice, a.stopped
	select {
	case <-a.stopped: // known; a stop has narrower bounds
		slice, stopped = min(waitSlice, max(a.x.opts.KillBound/4, 100*time.Millisecond)), nil
	default:
	}
	ctx, cancel := context.WithTimeout(context.Background(), slice)
	defer cancel()
	var watch sync.WaitGroup
	watch.Go(func() {
		select {
		case <-a.copied:
			_ = sleep(ctx, settle)
		case <-stopped:
		case <-ctx.Done():
		}
		cancel()
	})
	var status container.WaitResponse
	var err error
	answers, failures := a.x.engine.api.ContainerWait(ctx, a.id, container.WaitConditionNotRunning)
	// Not on ctx as well: the library's goroutine must be able to hand over.
	select {
	case status = <-answers:
	case err = <-failures:
	}
	if err != nil && ctx.Err() != nil {
		err = context.DeadlineExceeded
	}
	cancel()
	watch.Wait()
	return status, err
}

// judge makes an Exit of what is known. left is why the container is still
// there, where it should not be.
func (a *attempt) judge(state *container.State, failure, left error, now time.Time) executor.Exit {
	a.mu.Lock()
	defer a.mu.Unlock()
	exit := executor.Exit{
		ImageDigest: a.image.digest, Warm: a.waited > 0, StartedAt: a.startedAt, FinishedAt: now, Survivors: left != nil,
	}
	var reasons []string
	if failure != nil {
		exit.Failure = executor.CodeEngine
		reasons = append(reasons, oneLine(failure.Error()))
	}
	if state != nil {
		exit.StartedAt = a.began(state, exit.StartedAt)
		exit.FinishedAt = engineTime(state.FinishedAt, exit.FinishedAt)
		if exit.FinishedAt.Before(exit.StartedAt) { // the engine notes the start of a quick command late
			exit.StartedAt = exit.FinishedAt
		}
	}
	oom := false
	if failure == nil {
		code := state.ExitCode
		// The engine notes that the memory limit killed any process of the
		// container, and a status of 128 + 9 also where a shell passes on how its
		// child died. Both together, and no kill of ours: it was this that ended it.
		oom = state.OOMKilled && code == exitKilled && !a.sentKill
		switch {
		case oom, a.sentKill && code == exitKilled:
			exit.Signal = "SIGKILL"
		case a.sentStop && code == 128+a.plan.number:
			exit.Signal = a.plan.signal
		default:
			exit.Code = &code
		}
	}
	if r := a.receipt; r != nil && (r.Reason != executor.StopTimeout || !r.SignalledAt.IsZero() || failure != nil) {
		receipt := *r
		if failure == nil {
			receipt.ExitedAt = exit.FinishedAt
		}
		if left == nil {
			receipt.GoneAt = now
		}
		exit.Stop = &receipt
		exit.TimedOut = r.Reason == executor.StopTimeout
	}
	exit.TimedOut = exit.TimedOut || failure == nil && a.past != nil && a.past.late
	switch {
	case exit.TimedOut:
		reasons = append(reasons, fmt.Sprintf("ran longer than its timeout of %v", a.plan.spec.Timeout))
	case oom:
		exit.OOMKilled = true
		reasons = append(reasons, fmt.Sprintf("killed by its memory limit of %d MiB", a.plan.spec.MemoryMB))
	case failure == nil && state.OOMKilled && !a.sentKill:
		reasons = append(reasons, fmt.Sprintf("its memory limit of %d MiB killed some of its processes", a.plan.spec.MemoryMB))
	}
	if left != nil {
		reasons = append(reasons, "its container could not be removed: "+oneLine(left.Error()))
	}
	exit.Reason = strings.Join(reasons, "; ")
	return exit
}

// began is when the command began, by the engine's clock where the engine knows.
func (a *attempt) began(state *container.State, fallback time.Time) time.Time {
	started := engineTime(state.StartedAt, time.Time{})
	if started.IsZero() {
		return fallback
	}
	return started.Add(a.waited)
}

// engineTime reads a time of the engine; one that it does not say is fallback.
func engineTime(s string, fallback time.Time) time.Time {
	t, err := time.Parse(time.RFC3339Nano, s)
	if err != nil || t.Year() < 2000 {
		return fallback
	}
	return t
}

// waitRefusal ends an attempt whose program could not be started.
func (a *attempt) waitRefusal() executor.Exit {
	if a.stderr != nil {
		_, _ = io.WriteString(a.stderr, a.refusalText+"\n")
	}
	close(a.ended)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.phase = finished
	code := a.refusal
	exit := executor.Exit{
		Code: &code, Reason: a.refusalText, ImageDigest: a.image.digest, StartedAt: a.startedAt, FinishedAt: a.startedAt,
	}
	if a.receipt != nil {
		receipt := *a.receipt
		receipt.ExitedAt, receipt.GoneAt = a.startedAt, a.startedAt
		exit.Stop = &receipt
	}
	return exit
}

// removeWithin removes the container, and tries again until bound is over.
func (a *attempt) removeWithin(bound time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), bound)
	defer cancel()
	for {
		err := a.remove(ctx)
		if err == nil || !sleep(ctx, 250*time.Millisecond) {
			return err
		}
	}
}

func (a *attempt) remove(ctx context.Context) error {
	a.mu.Lock()
	done := a.removed
	a.mu.Unlock()
	if done {
		return nil
	}
	if a.delivery != nil {
		if err := a.delivery.end(ctx); err != nil {
			return err
		}
	}
	if err := a.x.engine.remove(ctx, a.id); err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.removed = true
	return nil
}

// Close removes the container with everything that was made for it. What it
// cannot remove is left to Reap.
func (a *attempt) Close() error {
	a.mu.Lock()
	if a.closed {
		a.mu.Unlock()
		return nil
	}
	a.phase = finished
	a.mu.Unlock()
	a.settle()
	ctx, cancel := a.x.engine.longCall(context.Background())
	defer cancel()
	if a.warm != nil {
		_ = a.warm.stream.Close()
	}
	err := a.remove(ctx)
	a.x.release(a.plan.name)
	if a.warm != nil {
		// Reap may have seen the container when it was called this.
		a.x.release(a.warm.name)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.closed = err == nil
	return err
}
