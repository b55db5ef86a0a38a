//go:build !unix

package process

import (
	"context"
	"errors"

	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
)

var errUnsupported = errors.New("the process executor needs Linux or another Unix; this system has no way to end a whole process tree")

// Executor refuses everything on this system.
type Executor struct{}

var _ executor.Executor = (*Executor)(nil)

// New returns an executor whose Probe says that this system is not supported.
func New(Options) (*Executor, error) { return &Executor{}, nil }

// Name returns "process".
func (*Executor) Name() string { return "process" }

// Describe says that this system is not supported.
func (*Executor) Describe() string { return errUnsupported.Error() }

// Limits returns none.
func (*Executor) Limits() Limits { return Limits{} }

// Probe says that this system is not supported.
func (*Executor) Probe(context.Context) error { return errUnsupported }

// Prepare refuses every spec.
func (*Executor) Prepare(context.Context, executor.Spec) (executor.Attempt, error) {
	return nil, executor.InfraError("this worker cannot run host processes", errUnsupported)
}

// Recover has nothing to remove.
func (*Executor) Recover(context.Context) error { return nil }

// Close has nothing to give back.
func (*Executor) Close() error { return nil }
