package session

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"sync"

	"github.com/coder/websocket"
)

// socket is a WebSocket with the connection below it.
type socket struct {
	*websocket.Conn
	cork *cork // nil: not known
}

// Write writes one message. It blocks until the system has taken it; when ctx ends
// before, the socket is closed.
func (s *socket) Write(ctx context.Context, kind websocket.MessageType, data []byte) error {
	if s.cork == nil || len(data) < corkLeast {
		return s.Conn.Write(ctx, kind, data)
	}
	s.cork.gather()
	err := s.Conn.Write(ctx, kind, data)
	stop := context.AfterFunc(ctx, func() { _ = s.CloseNow() })
	defer stop()
	return errors.Join(err, s.cork.release())
}

// cork is the connection below a WebSocket, which hands over what is sent in pieces
// of 4 KiB. While it is on, they are gathered: a frame of output is then one call of
// the system and not one for each piece. It is safe for concurrent use.
type cork struct {
	net.Conn

	mu  sync.Mutex
	on  bool
	buf []byte
}

const (
	corkLeast = 4 << 10  // a smaller message is one piece in any case
	corkMost  = 68 << 10 // is gathered, which holds a frame with the largest chunk
)

// Write implements net.Conn. What is gathered may fail later, in release.
func (c *cork) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.on && len(c.buf) == 0 {
		return c.Conn.Write(p)
	}
	c.buf = append(c.buf, p...)
	if c.on && len(c.buf) < corkMost {
		return len(p), nil
	}
	if err := c.flush(); err != nil {
		return 0, err
	}
	return len(p), nil
}

// gather has what is written from now on wait for release.
func (c *cork) gather() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.on = true
}

// release writes what was gathered. It blocks as Write does.
func (c *cork) release() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.on = false
	return c.flush()
}

// flush is called with mu held.
func (c *cork) flush() error {
	if len(c.buf) == 0 {
		return nil
	}
	_, err := c.Conn.Write(c.buf)
	c.buf = c.buf[:0]
	return err
}

// corkOf finds the cork below a connection; nil: there is none.
func corkOf(conn net.Conn) *cork {
	for {
		switch c := conn.(type) {
		case *cork:
			return c
		case *tls.Conn:
			conn = c.NetConn()
		default:
			return nil
		}
	}
}
