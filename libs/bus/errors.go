package bus

import (
	"errors"
	"fmt"
)

// The errors that callers decide by, with errors.Is.
var (
	// ErrExists: the job was created before, by this or another caller.
	ErrExists = errors.New("the job exists already")
	// ErrNotFound: there is no such key. For a job: it never was, or it left the registry.
	ErrNotFound = errors.New("not found")
	// ErrQueueFull: the registry takes no new jobs; updates still go through.
	ErrQueueFull = errors.New("the registry is full")
	// ErrFull: a stream is at its byte limit. Nothing was written.
	ErrFull = errors.New("the stream is full")
	// ErrUnavailable: the bus is away or refuses. Nothing was written.
	ErrUnavailable = errors.New("the bus is unavailable")
	// ErrAmbiguous: the write was sent and not answered. It may have been written.
	ErrAmbiguous = errors.New("the bus did not answer: the write may have happened")
	// ErrNoResponder: nobody listens. The request was definitively not delivered.
	ErrNoResponder = errors.New("nobody answers this request")
	// ErrTooLarge: the message is larger than the bus takes. Nothing was written.
	ErrTooLarge = errors.New("the message is too large")
	// ErrMalformed: what is stored cannot be read by this version.
	ErrMalformed = errors.New("malformed message")
)

// Poison marks a message that can never be handled: Consume keeps it as a dead
// letter with err's text as the reason, and acknowledges it.
func Poison(err error) error { return &poisonError{err: err} }

type poisonError struct{ err error }

func (e *poisonError) Error() string { return e.err.Error() }
func (e *poisonError) Unwrap() error { return e.err }

// BatchError is how a handler of ConsumeBatch says that some messages of the
// batch can never be handled, by their index. The rest count as handled.
type BatchError struct{ Poison map[int]error }

// Error counts the poison.
func (e *BatchError) Error() string {
	return fmt.Sprintf("%d messages of the batch are poison", len(e.Poison))
}
