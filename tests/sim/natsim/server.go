package natsim

import (
	"container/heap"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Direction of a link.
type Direction string

// The two links of a connection.
const (
	Up   Direction = "up"   // to the server
	Down Direction = "down" // from it
)

// Options decide what a server does beyond what it is asked for. Functions are
// called by one goroutine at a time and must not call the server.
type Options struct {
	// Delay is how long a message is on its way over a link of a dialer.
	Delay func(dialer string, d Direction) time.Duration
	// Again says that a message is delivered once more, after a while, although it
	// was acknowledged. Nil: never.
	Again func(stream, consumer string) (after time.Duration, again bool)
	// Arrives says whether something that was written before its connection was cut
	// arrives all the same. Nil: never.
	Arrives func() bool
	// Stored is told of every message that a stream takes, Purged of every one that a
	// purge removes (and not of what a rollup replaces). Both may be nil.
	Stored func(stream string, m Message)
	Purged func(stream string, m Message)
}

// Message is a message of a stream.
type Message struct {
	Subject string
	Seq     uint64
	Data    []byte
	header  []byte
	time    time.Time
}

// Server is a server. Make one with New, and call Run. Its methods are safe for
// concurrent use.
type Server struct {
	o Options

	mu      sync.Mutex
	events  events
	count   uint64
	wake    chan struct{}
	life    int // of the server: raised by Restart
	down    bool
	conns   map[*conn]struct{}
	nextID  int
	exact   map[string][]*sub
	tailed  map[string][]*sub // by what is before the last token, which is *
	others  []*sub
	turn    int // of queue groups
	streams map[string]*stream
}

// New makes a server; it starts nothing.
func New(o Options) *Server {
	return &Server{
		o: o, wake: make(chan struct{}, 1), life: 1, conns: map[*conn]struct{}{},
		exact: map[string][]*sub{}, tailed: map[string][]*sub{}, streams: map[string]*stream{},
	}
}

// event is something that happens at a time, in a life of the server.
type event struct {
	at   time.Time
	n    uint64
	life int // 0: in any
	do   func()
}

type events []event

func (h events) Len() int { return len(h) }
func (h events) Less(i, j int) bool {
	if !h[i].at.Equal(h[j].at) {
		return h[i].at.Before(h[j].at)
	}
	return h[i].n < h[j].n
}
func (h events) Swap(i, j int) { h[i], h[j] = h[j], h[i] }
func (h *events) Push(x any)   { *h = append(*h, x.(event)) }
func (h *events) Pop() any {
	old := *h
	x := old[len(old)-1]
	old[len(old)-1] = event{}
	*h = old[:len(old)-1]
	return x
}

// Run does what is due until ctx ends. It blocks.
func (s *Server) Run(ctx context.Context) {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		wait := time.Hour
		s.mu.Lock()
		for len(s.events) > 0 {
			if d := time.Until(s.events[0].at); d > 0 {
				wait = d
				break
			}
			e := heap.Pop(&s.events).(event)
			if e.life == 0 || e.life == s.life && !s.down {
				e.do()
			}
		}
		s.mu.Unlock()
		timer.Reset(wait)
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case <-s.wake:
		}
	}
}

// after has do called by the loop; the caller holds mu.
func (s *Server) after(d time.Duration, do func()) { s.at(time.Now().Add(d), s.life, do) }

func (s *Server) at(t time.Time, life int, do func()) {
	s.count++
	first := len(s.events) == 0 || t.Before(s.events[0].at)
	heap.Push(&s.events, event{t, s.count, life, do})
	if first {
		select {
		case s.wake <- struct{}{}:
		default:
		}
	}
}

// Stop kills the server: what is on its way is lost, connections are cut, and none
// is accepted until Start.
func (s *Server) Stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.down = true
	s.life++
	for c := range s.conns {
		s.drop(c)
	}
	for _, st := range s.streams {
		st.crash()
	}
}

// Start brings the server back, with what it had stored. back returns, for a
// message that was purged from a stream since the last start, whether it is there
// again, as after a crash of a server whose purges were not durable; nil: none is.
func (s *Server) Start(back func(stream string, m Message) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.down = false
	for _, name := range sorted(s.streams) {
		s.streams[name].revive(back)
	}
}

func sorted[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// Messages returns what a stream has, oldest first.
func (s *Server) Messages(streamName string) []Message {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.streams[streamName]
	if st == nil {
		return nil
	}
	return slices.Clone(st.msgs)
}

// Pending is how many messages the durable consumers of a stream have not
// acknowledged.
func (s *Server) Pending(streamName string) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if st := s.streams[streamName]; st != nil {
		for _, c := range st.consumers {
			if c.durable {
				n += c.numPending() + len(c.pending)
			}
		}
	}
	return n
}

// Dialer is where one process connects.
type Dialer struct {
	s    *Server
	name string
	mu   sync.Mutex
	dead bool
}

// Dialer returns a dialer; Options.Delay gets its name.
func (s *Server) Dialer(name string) *Dialer { return &Dialer{s: s, name: name} }

var errRefused = errors.New("connection refused")

// InProcessConn connects.
func (d *Dialer) InProcessConn() (net.Conn, error) {
	d.mu.Lock()
	dead := d.dead
	d.mu.Unlock()
	s := d.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if dead || s.down {
		return nil, errRefused
	}
	s.nextID++
	c := &conn{s: s, d: d, id: s.nextID, subs: map[string]*sub{}}
	c.cond.L = &c.mu
	s.conns[c] = struct{}{}
	info, err := json.Marshal(map[string]any{
		"server_id": "SERVER" + strconv.Itoa(s.life), "server_name": "natsim", "version": "2.15.2", "proto": 1,
		"headers": true, "jetstream": true, "max_payload": 8 << 20, "client_id": c.id, "go": "go",
	})
	if err != nil {
		return nil, err
	}
	c.in = append(append([]byte("INFO "), info...), "\r\n"...)
	return c, nil
}

// Cut cuts the connections of the dialer; it may connect again.
func (d *Dialer) Cut() {
	d.s.mu.Lock()
	defer d.s.mu.Unlock()
	for c := range d.s.conns {
		if c.d == d {
			d.s.drop(c)
		}
	}
}

// Kill cuts the connections and refuses new ones, for ever.
func (d *Dialer) Kill() {
	d.mu.Lock()
	d.dead = true
	d.mu.Unlock()
	d.Cut()
}

// drop ends a connection for both sides at once.
func (s *Server) drop(c *conn) {
	s.forget(c)
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.cond.Broadcast()
}

// forget removes a connection from the server.
func (s *Server) forget(c *conn) {
	if c.gone {
		return
	}
	c.gone = true
	delete(s.conns, c)
	for _, sb := range c.subs {
		s.unsubscribe(sb)
	}
	for _, st := range s.streams {
		for _, cons := range st.consumers {
			cons.waiting = slices.DeleteFunc(cons.waiting, func(p *pull) bool { return p.conn == c })
		}
	}
}

// sub is a subscription.
type sub struct {
	c       *conn
	sid     string
	subject string
	queue   string
	left    int // messages until it ends; 0: no limit
}

func tailOf(subject string) (prefix string, ok bool) {
	prefix, ok = strings.CutSuffix(subject, ".*")
	return prefix, ok && !strings.ContainsAny(prefix, "*>")
}

func (s *Server) subscribe(sb *sub) {
	sb.c.subs[sb.sid] = sb
	switch prefix, ok := tailOf(sb.subject); {
	case ok:
		s.tailed[prefix] = append(s.tailed[prefix], sb)
	case strings.ContainsAny(sb.subject, "*>"):
		s.others = append(s.others, sb)
	default:
		s.exact[sb.subject] = append(s.exact[sb.subject], sb)
	}
}

func (s *Server) unsubscribe(sb *sub) {
	delete(sb.c.subs, sb.sid)
	without := func(m map[string][]*sub, key string) {
		if m[key] = slices.DeleteFunc(m[key], func(x *sub) bool { return x == sb }); len(m[key]) == 0 {
			delete(m, key)
		}
	}
	switch prefix, ok := tailOf(sb.subject); {
	case ok:
		without(s.tailed, prefix)
	case strings.ContainsAny(sb.subject, "*>"):
		s.others = slices.DeleteFunc(s.others, func(x *sub) bool { return x == sb })
	default:
		without(s.exact, sb.subject)
	}
}

// matches says whether a subject matches a pattern of NATS.
func matches(pattern, subject string) bool {
	for {
		p, restP, moreP := strings.Cut(pattern, ".")
		x, restX, moreX := strings.Cut(subject, ".")
		switch {
		case p == ">":
			return true
		case p != "*" && p != x, moreP != moreX:
			return false
		case !moreP:
			return true
		}
		pattern, subject = restP, restX
	}
}

// route delivers to the subscribers of a subject, as a message of another subject
// where shown is not empty, and reports how many there were.
func (s *Server) route(subject, shown, reply string, header, data []byte) int {
	to := slices.Clone(s.exact[subject])
	if i := strings.LastIndexByte(subject, '.'); i > 0 {
		to = append(to, s.tailed[subject[:i]]...)
	}
	for _, sb := range s.others {
		if matches(sb.subject, subject) {
			to = append(to, sb)
		}
	}
	groups := map[string][]*sub{}
	var chosen []*sub
	for _, sb := range to {
		if sb.queue == "" {
			chosen = append(chosen, sb)
		} else {
			groups[sb.queue] = append(groups[sb.queue], sb)
		}
	}
	for _, g := range sorted(groups) {
		s.turn++
		chosen = append(chosen, groups[g][s.turn%len(groups[g])])
	}
	if shown == "" {
		shown = subject
	}
	for _, sb := range chosen {
		var b []byte
		if reply != "" {
			reply = " " + strings.TrimPrefix(reply, " ")
		}
		if header == nil {
			b = fmt.Appendf(b, "MSG %s %s%s %d\r\n", shown, sb.sid, reply, len(data))
		} else {
			b = fmt.Appendf(b, "HMSG %s %s%s %d %d\r\n", shown, sb.sid, reply, len(header), len(header)+len(data))
			b = append(b, header...)
		}
		b = append(append(b, data...), "\r\n"...)
		s.send(sb.c, b)
		if sb.left > 0 {
			if sb.left--; sb.left == 0 {
				s.unsubscribe(sb)
			}
		}
	}
	return len(chosen)
}

// send puts bytes on the way to a client.
func (s *Server) send(c *conn, b []byte) {
	s.at(c.down.arrival(s.o.Delay(c.d.name, Down)), s.life, func() {
		c.mu.Lock()
		if !c.closed {
			c.in = append(c.in, b...)
		}
		c.mu.Unlock()
		c.cond.Signal()
	})
}

// publish handles a message of a client.
func (s *Server) publish(c *conn, subject, reply string, header, data []byte) {
	switch {
	case strings.HasPrefix(subject, "$JS.API."):
		s.api(c, strings.TrimPrefix(subject, "$JS.API."), reply, data)
		return
	case strings.HasPrefix(subject, "$JS.ACK."):
		s.ack(subject, data)
		return
	}
	for _, name := range sorted(s.streams) {
		st := s.streams[name]
		if matches(st.subject, subject) {
			st.publish(subject, reply, header, data)
			return
		}
	}
	if s.route(subject, "", reply, header, data) == 0 && reply != "" {
		s.route(reply, "", "", []byte("NATS/1.0 503\r\n\r\n"), nil)
	}
}
