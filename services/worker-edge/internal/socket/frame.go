package socket

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/coder/websocket"

	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/services/worker-edge/internal/session"
)

// sink is what a worker's messages are fed into: a *session.Session.
type sink interface {
	Heartbeat(h workerproto.Heartbeat) error
	Progress(step workerproto.Type, l workerproto.Lease, at time.Time, reason string) (stale bool, err error)
	Output(l workerproto.Lease, c *workerproto.Chunk, frame []byte) (stale bool, err error)
	Result(r workerproto.Result, size int) error
}

// take handles one message of an open session. The error is a
// *session.Violation or the end of the session.
func (c *conn) take(typ websocket.MessageType, data []byte) error {
	if bytes.HasPrefix(data, heartbeatPrefix) {
		return c.aside(func() error { return c.handle(typ, data) })
	}
	return c.handle(typ, data)
}

// heartbeatPrefix is how the heartbeats of our own workers begin. Those of others are
// handled as well, only in place.
var heartbeatPrefix = []byte(`{"type":"` + workerproto.TypeHeartbeat + `"`)

func (c *conn) handle(typ websocket.MessageType, data []byte) error {
	binary := typ == websocket.MessageBinary
	t, stale, err := dispatch(c.sess, binary, data)
	c.h.metrics.frame(t)
	if err != nil {
		return err
	}
	if stale != nil {
		c.Send(workerproto.TypeStale, workerproto.Stale{Leases: []workerproto.Lease{*stale}})
	}
	if t == workerproto.TypeOutput || binary { // bounded by acknowledgements
		return nil
	}
	return c.limit()
}

// limit counts a message of the worker.
func (c *conn) limit() error {
	if c.h.o.RateWorker.Off() {
		return nil
	}
	d, err := c.h.o.Limiter.Allow(c.sess.Context(), "edge:worker:"+c.claims.Subject, c.h.o.RateWorker)
	if err == nil && !d.Allowed {
		return &session.Violation{Code: workerproto.CloseSlowDown, Reason: "too many messages"}
	}
	return nil // who is in stays in while the limiter is away
}

// dispatch decodes one message and feeds it into s. It returns the message's
// type ("" where it has none), and a lease that the worker must be told is stale. It keeps
// nothing of data.
func dispatch(s sink, binary bool, data []byte) (workerproto.Type, *workerproto.Lease, error) {
	if binary {
		stale, err := dispatchChunk(s, data)
		return typeChunk, stale, err
	}
	if !utf8.Valid(data) {
		return "", nil, notUTF8()
	}
	t, err := workerproto.TypeOf(data)
	if err != nil {
		return "", nil, frameError(err)
	}
	switch t {
	case workerproto.TypeHello:
		return t, nil, protocolError("hello comes only once")
	case workerproto.TypeHeartbeat:
		var h workerproto.Heartbeat
		if err := workerproto.Decode(data, &h); err != nil {
			return t, nil, frameError(err)
		}
		return t, nil, s.Heartbeat(h)
	case workerproto.TypeAccepted, workerproto.TypePreparing, workerproto.TypeStarted:
		var p workerproto.Progress
		if err := workerproto.Decode(data, &p); err != nil {
			return t, nil, frameError(err)
		}
		stale, err := s.Progress(t, p.Lease, p.At, "")
		return t, staleLease(stale, p.Lease), err
	case workerproto.TypeRejected:
		var r workerproto.Rejected
		if err := workerproto.Decode(data, &r); err != nil {
			return t, nil, frameError(err)
		}
		stale, err := s.Progress(t, r.Lease, time.Now().UTC(), r.Reason)
		return t, staleLease(stale, r.Lease), err
	case workerproto.TypeOutput:
		stale, err := dispatchOutput(s, data)
		return t, stale, err
	case workerproto.TypeResult:
		var r workerproto.Result
		if err := workerproto.Decode(data, &r); err != nil {
			return t, nil, frameError(err)
		}
		return t, nil, s.Result(r, len(data))
	default: // of a newer worker
		return t, nil, nil
	}
}

func dispatchChunk(s sink, data []byte) (*workerproto.Lease, error) {
	frame := append(make([]byte, 0, len(data)), data...) // the session keeps it
	l, c, err := workerproto.DecodeChunk(frame)
	if err != nil {
		return nil, frameError(err)
	}
	stale, err := s.Output(l, &c, frame)
	return staleLease(stale, l), err
}

func staleLease(stale bool, l workerproto.Lease) *workerproto.Lease {
	if !stale {
		return nil
	}
	return &l
}

func dispatchOutput(s sink, data []byte) (*workerproto.Lease, error) {
	var o workerproto.Output
	if err := workerproto.Decode(data, &o); err != nil {
		return nil, frameError(err)
	}
	for i := range o.Chunks {
		frame, err := workerproto.EncodeChunk(o.Lease, o.Chunks[i])
		if err != nil {
			return nil, protocolError("output cannot be read")
		}
		stale, err := s.Output(o.Lease, &o.Chunks[i], frame)
		if err != nil {
			return nil, err
		}
		if stale {
			return &o.Lease, nil
		}
	}
	return nil, nil
}

// frameError makes an error about a frame's form a violation. The texts of
// workerproto contain nothing that was sent but field names, which are cut.
func frameError(err error) error {
	if err == nil {
		return nil
	}
	return protocolError(strings.ToValidUTF8(err.Error(), ""))
}

// notUTF8 is the one violation of a text's form that WebSockets have a code for.
func notUTF8() error {
	return &session.Violation{Code: int(websocket.StatusInvalidFramePayloadData), Reason: "a text frame must be UTF-8"}
}

func protocolError(reason string) error {
	return &session.Violation{Code: workerproto.CloseProtocol, Reason: reason}
}

// encodeAssign puts as many assignments as fit into one frame and returns how
// many it took, at least one. On an error it took one, which cannot be sent.
func encodeAssign(as []workerproto.Assignment) (frame []byte, n int, err error) {
	const head, tail = `{"type":"assign","assignments":[`, `]}`
	frame = append(frame, head...)
	for i := range as {
		data, err := json.Marshal(&as[i])
		if err != nil {
			if i == 0 {
				return nil, 1, fmt.Errorf("encode assignment: %w", err)
			}
			break // it is told so on its own turn
		}
		if len(frame)+len(data)+len(tail)+1 > workerproto.MaxFrameBytes {
			if i == 0 {
				return nil, 1, session.ErrTooLarge
			}
			break
		}
		if i > 0 {
			frame = append(frame, ',')
		}
		frame = append(frame, data...)
		n++
	}
	return append(frame, tail...), n, nil
}
