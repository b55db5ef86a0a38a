package session

import (
	"errors"
	"net"
	"net/http"
	"time"
)

const (
	// doubts is how many tries in a row that may have failed for want of a
	// WebSocket are taken for that.
	doubts = 3
	// While plain HTTP is used a WebSocket is tried again after retryWS, then ever
	// more rarely.
	retryWS    = time.Minute
	maxRetryWS = 15 * time.Minute
)

// choice is which transport comes next. Without auto it stays.
type choice struct {
	auto, http bool
	doubted    int // tries of a WebSocket in a row
}

// noSocket is an error that may mean that there is something on the way to the
// server which does not let WebSockets through.
type noSocket struct {
	err     error
	certain bool
}

func (e *noSocket) Error() string { return e.err.Error() }
func (e *noSocket) Unwrap() error { return e.err }

// noHTTP is a session over plain HTTP that could not be begun.
type noHTTP struct{ err error }

func (e *noHTTP) Error() string { return e.err.Error() }
func (e *noHTTP) Unwrap() error { return e.err }

// socketFound ends a session over plain HTTP: there is a WebSocket.
type socketFound struct{ ws *socket }

func (*socketFound) Error() string { return "a WebSocket can be had" }

// after takes in how a session, or the try to begin one, has ended. It reports
// whether the other transport is to be tried at once.
func (c *choice) after(err error) (changed bool) {
	if !c.auto {
		return false
	}
	if c.http {
		if _, ok := errors.AsType[*noHTTP](err); ok { // then it is not the WebSocket's fault
			c.http, c.doubted = false, 0
		}
		return false // with a pause
	}
	e, ok := errors.AsType[*noSocket](err)
	if !ok {
		return false
	}
	c.doubted++
	c.http = e.certain || c.doubted >= doubts
	return c.http
}

// opened: a session over a WebSocket has begun.
func (c *choice) opened() { c.doubted = 0 }

// found: there is a WebSocket for the next session.
func (c *choice) found() { c.http, c.doubted = false, 0 }

// notUpgraded says what a failed handshake with this status (0: no answer)
// tells about WebSockets. What the edge itself answers to a worker that it does not
// want now, and a server that cannot be reached, tell nothing.
func notUpgraded(status int, err error) error {
	switch status {
	case http.StatusUnauthorized, http.StatusTooManyRequests, http.StatusServiceUnavailable, http.StatusInternalServerError:
		return err
	case http.StatusBadGateway, http.StatusGatewayTimeout:
		return &noSocket{err: err}
	case 0:
		if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "dial" {
			return err
		}
		return &noSocket{err: err}
	}
	return &noSocket{err: err, certain: true}
}

// unopened is the error of a WebSocket that ended before the welcome. told: the
// edge has said why.
func unopened(err error, told bool) error {
	if told {
		return err
	}
	return &noSocket{err: err}
}
