// Package executor is the port between the worker and whatever runs commands
// on this machine: host processes (package process) or containers.
//
// One attempt of one job goes through an executor in this order:
//
//	attempt, err := ex.Prepare(ctx, spec)    // working folder, image, limits
//	err = attempt.Start(stdout, stderr)      // the command runs from here
//	exit := attempt.Wait()                   // nothing of it is left after this
//	err = attempt.Close()                    // its files are removed
//
// and [Attempt.Stop] may come from any goroutine at any moment of it. The
// package holds only the types; it knows nothing of sessions, leases' rules,
// spools or the wire.
package executor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"time"
)

// Spec is everything an executor needs to run one attempt. An executor that
// cannot honour a field refuses the spec in Prepare; it never ignores one
// silently, except the fields whose comment says so, and CPU, MemoryMB and PIDs
// on a machine where nothing can enforce them, which the executor declares.
type Spec struct {
	JobID   string // one path-safe token, as every id of this system
	Attempt int    // from 1
	LeaseID string // names this dispatch; marks everything that is started
	// WorkerID names the worker whose leftovers Recover may remove.
	WorkerID string

	Shell string   // run by /bin/sh -c where Argv is empty
	Argv  []string // run as it is, without a shell

	Image string // container image; empty for host processes
	// WorkingDir is where the command starts. Relative means inside the
	// attempt's own working folder, and is made there. Empty means that folder.
	WorkingDir string
	// Env is added to a clean environment and wins over it. Nothing of the
	// worker's own environment reaches a command.
	Env   map[string]string
	User  string // user name or id, optionally with ":group"; empty: the executor's default
	Stdin []byte // empty: reads end of file at once
	Files []File // written into the working folder before the start

	CPU      float64 // cores; 0: no limit
	MemoryMB int64   // MiB, swap not counted extra; 0: no limit
	PIDs     int64   // processes and threads; 0: no limit
	// TmpfsMB sizes the scratch file systems of a container (MiB). Host
	// processes have none, so the process executor ignores it.
	TmpfsMB int64
	// NetworkBridge gives a container a network. Host processes always have the
	// host's, so the process executor ignores it.
	NetworkBridge bool
	PullPolicy    string // "missing", "always" or "never"; containers only

	Timeout        time.Duration // from the start of the command; 0: none
	PrepareTimeout time.Duration // bound of Prepare beside its context; 0: none

	StopSignal string        // "SIGTERM" where empty; see ParseSignal of the executor
	Grace      time.Duration // between that signal and the kill; 0: kill at once after the signal
}

// WholeShares is the share of CPU time of a process outside of every control group,
// in the kernel's units; see CPUShares.
const WholeShares = 1024

// CPUShares is the share of CPU time that an attempt has of a machine on which more
// is wanted than there is: for each of its cores a fifth of what a process has that
// is no job. So the owner's programs and the worker's own heartbeats go on beside
// however many jobs. Where nobody else wants the time, attempts have all of it.
func (s *Spec) CPUShares() int64 {
	const least, most = 2, 1 << 18 // the kernel's
	cores := s.CPU
	if cores <= 0 {
		cores = 1
	}
	return int64(math.Round(min(max(cores*WholeShares/5, least), most)))
}

// File is one input file of an attempt.
type File struct {
	Path    string // relative, slash-separated, stays inside the working folder
	Content []byte
	Mode    uint32 // permission bits; 0: 0644
}

// Executor prepares attempts. All methods are safe for concurrent use, except
// that Recover must return before the first Prepare.
type Executor interface {
	// Name is the word used in configuration and in a worker's facts, such as
	// "process" or "docker".
	Name() string

	// Probe says whether the executor can take work now: nil, or an error whose
	// text is meant for the worker's owner. It is cheap enough to be asked every
	// few seconds and blocks no longer than its context allows.
	Probe(ctx context.Context) error

	// Prepare makes everything ready that is not the command itself: the
	// working folder, input files, the image. Its error is always a
	// *PrepareError (see [AsPrepareError]), and then nothing is left behind. Each
	// attempt that Prepare returns must be closed, also when it never started.
	Prepare(ctx context.Context, spec Spec) (Attempt, error)

	// Recover kills and removes all that an earlier life of the same worker left
	// on this machine, but what was claimed by Adopt, and touches nothing of any other worker. Call it once,
	// before the first Prepare. An error names what could not be removed; the
	// executor then refuses nothing by itself, the caller decides.
	Recover(ctx context.Context) error
}

// Attempt is one prepared command. Start, Wait and Close are called by one
// goroutine in this order, each at most once except Close; Stop may be called
// by any goroutine, any number of times, before, during and after all of them.
type Attempt interface {
	// Start starts the command and returns at once. Its output is written to
	// the two writers, each from one goroutine; both may be the same value only
	// if its Write is safe for concurrent use. A writer may block: that slows the
	// command down (back-pressure) but never delays Stop or a timeout. After a
	// write error the rest of that stream is read and thrown away.
	//
	// An error is a *PrepareError (a bad working folder, an unknown program
	// interpreter, the machine out of processes) and means that nothing runs and
	// Wait must not be called. After a Stop it wraps [ErrStopped]. A program
	// that is not found or not executable is not an error but exit code 127 or
	// 126 with a line on stderr, as a shell does it.
	Start(stdout, stderr io.Writer) error

	// Wait blocks until the command has ended, nothing of its process tree is
	// left, and its output has been handed to the writers to the last byte. It
	// gives up waiting for a process that cannot be killed after a bound, and
	// then says so in Exit.Survivors. When a writer still blocks then, Wait
	// blocks with it.
	Wait() Exit

	// Stop ends the attempt: the stop signal, the grace, then a kill of all that
	// is left (StopLeaseLost: the kill at once). It does not block, and the
	// effect shows in Wait. Repeating it changes nothing, except that a
	// StopLeaseLost shortens a grace that is running. Before Start it makes Start
	// fail with ErrStopped.
	Stop(reason StopReason)

	// Close removes the working folder and everything else that the attempt
	// left on this machine. It may be called after Wait, or instead of Start. It
	// is idempotent. An error says what is still there; Recover of a later life
	// tries again.
	Close() error
}

// Survivor is an attempt whose command goes on when the worker's process dies,
// so that a later process of the same worker can take it up.
type Survivor interface {
	Attempt

	// Handle names the command for Adopter.Adopt, as JSON. It is valid after
	// Prepare; nil: this one does not survive.
	Handle() []byte

	// Fed is closed once nothing that the command is still to read is in this
	// process. One that dies before leaves a command with half of its input,
	// which must not be taken up. It may never be closed.
	Fed() <-chan struct{}
}

// Adopter is an executor that takes up commands of an earlier process of the
// same worker.
type Adopter interface {
	Executor

	// Adopt claims the command that the handle names: from its return on Recover
	// and whatever else removes leftovers spare it, until the attempt is closed.
	// It does not block and asks nobody; whether the command is still there shows
	// in Resume. Of the spec only ids, limits, Timeout, StopSignal and Grace are
	// looked at. It must be called before Recover.
	Adopt(spec Spec, handle []byte, past Past) (Adopted, error)
}

// Past is what the earlier process knew of a command.
type Past struct {
	StartedAt time.Time     // about, by the wall clock
	Ran       time.Duration // since then, by a clock that counts sleep
	Stop      StopReason    // 0: it was not stopped
	StopAt    time.Time     // when that was asked for
}

// Adopted is an attempt of an earlier process. Resume takes the place of Start;
// all else is as with any attempt.
type Adopted interface {
	Attempt

	// Resume goes on with the command, however far it is by now: it may run, or
	// have ended while nobody was there, which Wait tells then. It blocks while
	// the engine does not answer, for a bounded time. An error is a *PrepareError,
	// and means that nothing is known of how the command ended, or that it never
	// began; Wait must not be called then. A Stop that came before does not keep
	// it from anything: it is what stops the command.
	Resume(Continuation) error
}

// Continuation says where the output goes on.
type Continuation struct {
	Stdout, Stderr io.Writer
	// How many bytes of each stream the earlier process has kept. What follows
	// them is written here.
	HasStdout, HasStderr int64
	// Since is when the last of these were written, about.
	Since time.Time
	// Missing is called where output is missing: before any other is written, or
	// before Wait returns. Bytes is 0 where nobody knows how many.
	Missing func(bytes int64, why string)
}

// ErrStopped is what Start returns after Stop.
var ErrStopped = errors.New("attempt was stopped before it started")

// StopReason says why an attempt is stopped.
type StopReason int

// The reasons to stop an attempt.
const (
	StopCancel    StopReason = iota + 1 // its user asked for it: signal, grace, kill
	StopTimeout                         // its time is over: signal, grace, kill
	StopShutdown                        // the worker goes away: signal, grace, kill
	StopLeaseLost                       // another worker may start it any moment: kill now
)

// String gives the reason as it appears in logs and reasons.
func (r StopReason) String() string {
	switch r {
	case StopCancel:
		return "canceled"
	case StopTimeout:
		return "timed_out"
	case StopShutdown:
		return "worker_shutdown"
	case StopLeaseLost:
		return "lease_lost"
	}
	return fmt.Sprintf("stop_reason_%d", int(r))
}

// Exit is how an attempt ended.
type Exit struct {
	// Code is the exit code, nil where a signal ended the command or where it is
	// not known.
	Code *int
	// Signal is the name of the signal that ended the command, such as "SIGKILL".
	Signal string
	// OOMKilled says that the memory limit killed the command itself or a process of
	// its tree.
	OOMKilled bool
	// TimedOut says that Spec.Timeout ran out (or StopTimeout was asked) before the command had ended.
	TimedOut bool
	// Reason is empty or one line for a person, such as "killed by its memory limit".
	Reason string

	// Failure is empty where the command came to an end of its own (or by a
	// stop), else what of this machine failed under it: then nothing is known of
	// how the command ended, and Reason says what happened.
	Failure Code

	// ImageDigest names the image that the attempt ran in; empty for host
	// processes.
	ImageDigest string
	// Warm says that the container had been started before the attempt came.
	Warm bool

	StartedAt  time.Time
	FinishedAt time.Time // when the main process had ended

	PeakMemoryMB int64 // MiB, of the whole tree where a control group counts it
	CPUms        int64 // milliseconds of CPU time, user and system

	// Stop is nil where the attempt was never asked to stop.
	Stop *StopReceipt
	// Survivors says that something of the attempt could not be killed within
	// the bound (for example in uninterruptible sleep) and may still run.
	Survivors bool
}

// StopReceipt proves a stop, step by step. A zero time is a step that did not
// happen: SignalledAt where the command had ended by itself before any signal
// was sent, GoneAt where something survived.
type StopReceipt struct {
	Reason      StopReason // of the first Stop, or of the timeout
	DeliveredAt time.Time  // Stop reached the attempt
	SignalledAt time.Time  // the first signal was sent
	ExitedAt    time.Time  // the main process ended
	GoneAt      time.Time  // nothing of the tree was left
}

// Class says who has to act on a failure.
type Class string

// The classes of a PrepareError.
const (
	ClassInfra Class = "infra" // this machine: another one may do better
	ClassUser  Class = "user"  // the job: it would fail everywhere
)

// Code is a stable word for a failure that has one; the words are those of
// job.Reason. Empty: the class says all.
type Code string

// The codes.
const (
	CodeImagePull      Code = "image_pull_failed"
	CodeEngine         Code = "engine_error"
	CodePrepareTimeout Code = "prepare_timeout" // Spec.PrepareTimeout ran out
)

// PrepareError says why an attempt cannot run. Reason is one line for the
// job's user; it holds no values of the job's environment.
type PrepareError struct {
	Reason string
	Class  Class
	Code   Code
	Err    error // the cause, may be nil
}

// Error gives the reason, with the cause where there is one.
func (e *PrepareError) Error() string {
	if e.Err == nil {
		return e.Reason
	}
	return e.Reason + ": " + e.Err.Error()
}

// Unwrap gives the cause.
func (e *PrepareError) Unwrap() error { return e.Err }

// UserError is a PrepareError that the job is to blame for.
func UserError(reason string, cause error) *PrepareError {
	return &PrepareError{Reason: reason, Class: ClassUser, Err: cause}
}

// InfraError is a PrepareError that this machine is to blame for.
func InfraError(reason string, cause error) *PrepareError {
	return &PrepareError{Reason: reason, Class: ClassInfra, Err: cause}
}

// AsPrepareError finds the PrepareError in err. Where there is none it makes
// one of class infra, so that a caller has always a reason and a class. It
// returns nil for nil.
func AsPrepareError(err error) *PrepareError {
	if err == nil {
		return nil
	}
	if pe, ok := errors.AsType[*PrepareError](err); ok {
		return pe
	}
	return InfraError("the executor failed", err)
}
