package session

import (
	"context"

	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/fleet"
)

// Bus is what sessions need of the bus. Every error of a publish means: not
// known to be stored, try again; both kinds of publish are safe to repeat.
type Bus interface {
	// PutWorker stores a whole registration, except for the operator's drain flag.
	PutWorker(ctx context.Context, w fleet.Worker) error
	// Worker returns the newest registration; the zero Worker where there is none.
	Worker(ctx context.Context, workerID string) (fleet.Worker, error)
	// UpdateWorker changes a stored registration by compare-and-swap. change may
	// run several times, and returns false to leave it.
	UpdateWorker(ctx context.Context, workerID string, change func(*fleet.Worker) bool) error
	// WatchWorkers blocks until ctx ends or the watch fails, and reports every
	// registration now and each change.
	WatchWorkers(ctx context.Context, handle func(fleet.Worker)) error

	// RequestBeat asks the leading scheduler. It fails when nobody leads. The
	// request's Workers are the caller's again when it returns.
	RequestBeat(ctx context.Context, r busmsg.BeatRequest) (busmsg.BeatReply, error)
	// ServeCommands takes the worker's commands. handle must not block.
	ServeCommands(workerID string, handle func(context.Context, busmsg.WorkerCommand) busmsg.WorkerCommandReply) (Subscription, error)
	// CommandsServed reports whether anybody takes the worker's commands. False
	// is definitive; an error is not.
	CommandsServed(ctx context.Context, workerID string) (bool, error)

	// PublishResult returns when the bus has the result.
	PublishResult(ctx context.Context, r busmsg.Result) error
	// PublishChunks publishes binary chunk frames of one job in order and returns
	// how many of them, from the first, the bus has.
	PublishChunks(ctx context.Context, jobID string, frames [][]byte) (stored int, err error)
}

// Subscription ends with Unsubscribe: after it returned no new call starts.
type Subscription interface{ Unsubscribe() error }
