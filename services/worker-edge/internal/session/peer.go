package session

import (
	"errors"

	"github.com/cmdexec/cmdexec/libs/core/workerproto"
)

// Peer is the worker's end of a session. Its methods never block, are safe for
// concurrent use, and are called without any lock of a session held. A peer
// that cannot take a frame that it must not lose ends the session itself.
type Peer interface {
	// Welcome lets out what was queued so far, after the welcome itself.
	Welcome(w workerproto.Welcome)
	// Assign queues assignments. The result has an entry for each: nil means that
	// it will be written or the connection ends, an error that the worker will
	// never see it.
	Assign(as []workerproto.Assignment) []error
	// Send queues one frame.
	Send(t workerproto.Type, body any)
	// AcksReady says that Session.TakeAcks has something new.
	AcksReady()
	// Close ends the connection with a code and a reason. With a goaway the peer
	// first writes what is queued and then that frame. Only the first call counts.
	Close(code int, reason string, goaway *workerproto.Goaway)
}

// Why an assignment was not taken.
var (
	ErrClosing  = errors.New("the session is closing")
	ErrBusy     = errors.New("the worker is slow to read; its queue is full")
	ErrTooLarge = errors.New("the assignment does not fit into a frame")
	ErrNoPoll   = errors.New("the worker does not ask for work now")
	ErrLate     = errors.New("the assignment came too late")
)

// Violation ends a session because of something that its worker did. Reason is
// for the worker's log and contains nothing that the worker sent.
type Violation struct {
	Code   int
	Reason string
}

// Error makes a Violation an error.
func (v *Violation) Error() string { return v.Reason }

func protocolError(reason string) *Violation {
	return &Violation{Code: workerproto.CloseProtocol, Reason: reason}
}
