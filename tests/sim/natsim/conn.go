package natsim

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"
)

// link keeps what is sent over it in order.
type link struct{ last time.Time }

func (l *link) arrival(d time.Duration) time.Time {
	at := time.Now().Add(d)
	if !at.After(l.last) {
		at = l.last.Add(time.Nanosecond)
	}
	l.last = at
	return at
}

// conn is the client's end of a connection. Writes never block.
type conn struct {
	s  *Server
	d  *Dialer
	id int

	mu     sync.Mutex
	cond   sync.Cond
	in     []byte // for the client to read
	out    []byte // written, and not a whole operation yet
	closed bool
	// known: the greetings are over. They take no time, since the client holds a
	// mutex over them, and a bubble's clock stands still while anybody waits for one.
	known bool

	// The server's, under its mu.
	up, down link
	subs     map[string]*sub
	gone     bool
}

// Read blocks until something has arrived or the connection has ended.
func (c *conn) Read(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.in) == 0 {
		if c.closed {
			return 0, io.EOF
		}
		c.cond.Wait()
	}
	n := copy(b, c.in)
	if c.in = c.in[n:]; len(c.in) == 0 {
		c.in = nil
	}
	return n, nil
}

// Write sends what is written, operation by operation.
func (c *conn) Write(b []byte) (int, error) {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return 0, net.ErrClosed
	}
	c.out = append(c.out, b...)
	var ops []func()
	for {
		op, n, err := c.parse(c.out)
		if err != nil {
			c.mu.Unlock()
			return 0, err
		}
		if n == 0 {
			break
		}
		c.out = c.out[n:]
		ops = append(ops, op)
	}
	c.mu.Unlock()
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	for _, op := range ops {
		c.s.at(c.up.arrival(c.s.o.Delay(c.d.name, Up)), c.s.life, func() {
			if !c.gone || c.s.o.Arrives != nil && c.s.o.Arrives() {
				op()
			}
		})
	}
	return len(b), nil
}

var crlf = []byte("\r\n")

// parse takes one operation from the front of b and returns how long it is, 0
// where it is not whole.
func (c *conn) parse(b []byte) (op func(), n int, err error) {
	i := bytes.Index(b, crlf)
	if i < 0 {
		return nil, 0, nil
	}
	line := string(b[:i])
	verb, rest, _ := strings.Cut(line, " ")
	args := strings.Fields(rest)
	n = i + 2
	s := c.s
	switch strings.ToUpper(verb) {
	case "CONNECT", "PONG":
		return func() {}, n, nil
	case "PING":
		if !c.known {
			c.known = true
			c.in = append(c.in, "PONG\r\n"...)
			c.cond.Signal()
			return func() {}, n, nil
		}
		return func() {
			if !c.gone {
				s.send(c, []byte("PONG\r\n"))
			}
		}, n, nil
	case "SUB":
		sb := &sub{c: c, subject: args[0], sid: args[len(args)-1]}
		if len(args) == 3 {
			sb.queue = args[1]
		}
		return func() {
			if !c.gone {
				s.subscribe(sb)
			}
		}, n, nil
	case "UNSUB":
		most := 0
		if len(args) == 2 {
			if most, err = strconv.Atoi(args[1]); err != nil {
				return nil, 0, err
			}
		}
		return func() {
			switch sb := c.subs[args[0]]; {
			case sb == nil:
			case most > 0:
				sb.left = most
			default:
				s.unsubscribe(sb)
			}
		}, n, nil
	case "PUB", "HPUB":
		size, err := strconv.Atoi(args[len(args)-1])
		if err != nil {
			return nil, 0, err
		}
		head := 0
		fixed := 2
		if len(verb) == 4 {
			fixed = 3
			if head, err = strconv.Atoi(args[len(args)-2]); err != nil {
				return nil, 0, err
			}
		}
		if len(b) < n+size+2 {
			return nil, 0, nil
		}
		payload := bytes.Clone(b[n : n+size])
		var header []byte
		if head > 0 {
			header = payload[:head:head]
		}
		reply := ""
		if len(args) > fixed {
			reply = args[1]
		}
		return func() { s.publish(c, args[0], reply, header, payload[head:]) }, n + size + 2, nil
	default:
		return nil, 0, fmt.Errorf("natsim does not know %q", verb)
	}
}

// Close ends the client's side; the server learns of it after what was written.
func (c *conn) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return net.ErrClosed
	}
	c.closed = true
	c.mu.Unlock()
	c.cond.Broadcast()
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	c.s.at(c.up.arrival(c.s.o.Delay(c.d.name, Up)), c.s.life, func() { c.s.forget(c) })
	return nil
}

// address is no address.
type address struct{}

func (address) Network() string { return "natsim" }
func (address) String() string  { return "natsim" }

func (c *conn) LocalAddr() net.Addr  { return address{} }
func (c *conn) RemoteAddr() net.Addr { return address{} }

// Deadlines are not kept: writes do not block, and a read ends with its connection,
// which the client watches by pings.
func (c *conn) SetDeadline(time.Time) error      { return nil }
func (c *conn) SetReadDeadline(time.Time) error  { return nil }
func (c *conn) SetWriteDeadline(time.Time) error { return nil }

// header returns a value of a NATS header block.
func header(block []byte, name string) string {
	for line := range strings.SplitSeq(string(block), "\r\n") {
		if k, v, ok := strings.Cut(line, ":"); ok && k == name {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

var errShape = errors.New("natsim: malformed subject")
