// Package lifecycle starts and stops the parts of a process: signals, a group of named components that stop in reverse order, and
// waiting between retries.
package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"sync"
	"syscall"
	"time"
)

// ExitInterrupted is the exit code for a second signal.
const ExitInterrupted = 130

// SignalContext returns a context that ends at the first SIGINT or SIGTERM; context.Cause then names the signal. A second signal
// calls exit with ExitInterrupted, from another goroutine; main passes os.Exit, tests something else. After stop, which may be
// called more than once, signals have their default effect again.
func SignalContext(parent context.Context, exit func(code int)) (ctx context.Context, stop context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(parent)
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	stopped := make(chan struct{})
	go func() {
		select {
		case s := <-signals:
			cancel(fmt.Errorf("stopped by signal: %s", s))
		case <-stopped:
			return
		}
		select {
		case <-signals:
			exit(ExitInterrupted)
		case <-stopped:
		}
	}()
	return ctx, sync.OnceFunc(func() {
		signal.Stop(signals)
		close(stopped)
		cancel(context.Canceled)
	})
}

// Defaults of Group.
const (
	DefaultStopEach = 10 * time.Second
	DefaultStopAll  = 30 * time.Second
)

// Group runs named components together. The zero value is ready to use; Add everything, then Run once. Not safe for concurrent
// use.
type Group struct {
	StopEach time.Duration // how long one component may take to stop; DefaultStopEach if zero
	StopAll  time.Duration // how long all may take together; DefaultStopAll if zero

	components []*component
}

type component struct {
	name   string
	run    func(context.Context) error
	cancel context.CancelFunc
	done   chan struct{}
	err    error // valid once done is closed
}

// Add registers a component. run blocks until its context ends or it fails; returning nil early means that it has nothing more to
// do, and the others go on. Components are started in the order in which they were added and stopped in reverse, each after the
// ones added later have returned, so a component may rely on those before it until its last moment.
func (g *Group) Add(name string, run func(ctx context.Context) error) {
	g.components = append(g.components, &component{name: name, run: run, done: make(chan struct{})})
}

// Run starts all components and blocks until they have returned or been given up on. When one fails or panics, or ctx ends, all are
// stopped. It returns the first error, wrapped with the component's name; nil means that everything stopped cleanly. The error that
// comes from a component's own canceled context is clean. A component that does not stop within its bound is abandoned with its
// goroutine and reported as *StopTimeoutError if nothing failed before.
func (g *Group) Run(ctx context.Context) error {
	each, all := orDefault(g.StopEach, DefaultStopEach), orDefault(g.StopAll, DefaultStopAll)

	ended := make(chan *component, len(g.components))
	for _, c := range g.components {
		// The end of ctx must not reach components directly: they would all stop at once instead of in order.
		own, cancel := context.WithCancel(context.WithoutCancel(ctx))
		c.cancel = cancel
		go func() {
			defer cancel()
			err := runRecovered(own, c.run)
			if own.Err() != nil && errors.Is(err, context.Canceled) {
				err = nil
			}
			c.err = err
			close(c.done)
			ended <- c
		}()
	}

	var first error
	note := func(c *component) {
		if c.err != nil && first == nil {
			first = fmt.Errorf("%s: %w", c.name, c.err)
		}
	}
	running := len(g.components)
	for running > 0 && first == nil && ctx.Err() == nil {
		select {
		case c := <-ended:
			running--
			note(c)
		case <-ctx.Done():
		}
	}

	deadline := time.Now().Add(all)
	for i := len(g.components) - 1; i >= 0; i-- {
		c := g.components[i]
		c.cancel()
		bound := min(each, time.Until(deadline))
		if c.wait(bound) {
			note(c)
		} else if first == nil {
			first = fmt.Errorf("%s: %w", c.name, &StopTimeoutError{After: bound})
		}
	}
	return first
}

// wait reports whether the component ended within d.
func (c *component) wait(d time.Duration) bool {
	select {
	case <-c.done: // also when d is already used up
		return true
	default:
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-c.done:
		return true
	case <-timer.C:
		return false
	}
}

// StopTimeoutError says that a component was abandoned because it did not stop in time.
type StopTimeoutError struct{ After time.Duration }

func (e *StopTimeoutError) Error() string {
	return fmt.Sprintf("did not stop within %s", max(e.After, 0).Round(time.Millisecond))
}

// PanicError is a panic of a component, with the stack of its goroutine.
type PanicError struct {
	Value any
	Stack []byte
}

func (e *PanicError) Error() string { return fmt.Sprintf("panic: %v\n%s", e.Value, e.Stack) }

// Unwrap returns the panic's value if it was an error.
func (e *PanicError) Unwrap() error {
	err, _ := e.Value.(error)
	return err
}

func runRecovered(ctx context.Context, run func(context.Context) error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = &PanicError{Value: v, Stack: debug.Stack()}
		}
	}()
	return run(ctx)
}

func orDefault(d, def time.Duration) time.Duration {
	if d <= 0 {
		return def
	}
	return d
}
