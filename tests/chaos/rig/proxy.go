package rig

import (
	"context"
	"fmt"
	"net"
	"sync"
	"time"
)

// Mode is how a Proxy treats bytes.
type Mode int

// The modes.
const (
	Pass  Mode = iota // both ways at once
	Cut               // connections are reset, new ones too
	Hole              // connections stay open, nothing passes: no FIN, no RST
	Drip              // from the server about 1 KB/s
	Delay             // each read waits 200 ms
)

// Proxy is the network between a worker and the edges. It is safe for concurrent
// use.
type Proxy struct {
	ln   net.Listener
	dial func(ctx context.Context) (net.Conn, error)
	life context.Context
	end  context.CancelFunc
	work sync.WaitGroup

	mu      sync.Mutex
	mode    Mode
	changed chan struct{} // closed and replaced with each change of the mode
	conns   map[net.Conn]bool
}

// NewProxy listens on a loopback address of its own.
func NewProxy(dial func(ctx context.Context) (net.Conn, error)) (*Proxy, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("proxy: %w", err)
	}
	life, end := context.WithCancel(context.Background())
	p := &Proxy{ln: ln, dial: dial, life: life, end: end, changed: make(chan struct{}), conns: map[net.Conn]bool{}}
	p.work.Go(p.accept)
	return p, nil
}

// Addr is where it listens.
func (p *Proxy) Addr() string { return p.ln.Addr().String() }

// Set changes the mode, also of the connections that stand.
func (p *Proxy) Set(m Mode) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if m == p.mode {
		return
	}
	p.mode = m
	close(p.changed)
	p.changed = make(chan struct{})
	if m == Cut {
		for c := range p.conns {
			reset(c)
		}
	}
}

func (p *Proxy) state() (Mode, <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.mode, p.changed
}

// Close ends everything and waits for it.
func (p *Proxy) Close() {
	p.end()
	_ = p.ln.Close()
	p.mu.Lock()
	for c := range p.conns {
		_ = c.Close()
	}
	p.mu.Unlock()
	p.work.Wait()
}

func reset(c net.Conn) {
	if t, ok := c.(*net.TCPConn); ok {
		_ = t.SetLinger(0) // the close sends RST
	}
	_ = c.Close()
}

func (p *Proxy) track(c net.Conn, on bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if on {
		p.conns[c] = true
	} else {
		delete(p.conns, c)
	}
}

func (p *Proxy) accept() {
	for {
		c, err := p.ln.Accept()
		if err != nil {
			return
		}
		if mode, _ := p.state(); mode == Cut {
			reset(c)
			continue
		}
		p.work.Go(func() { p.serve(c) })
	}
}

func (p *Proxy) serve(client net.Conn) {
	defer client.Close()
	p.track(client, true)
	defer p.track(client, false)
	if !p.passable() {
		return
	}
	ctx, cancel := context.WithTimeout(p.life, 5*time.Second)
	server, err := p.dial(ctx)
	cancel()
	if err != nil {
		reset(client)
		return
	}
	defer server.Close()
	p.track(server, true)
	defer p.track(server, false)
	var both sync.WaitGroup
	both.Go(func() { p.copy(server, client, false) })
	both.Go(func() { p.copy(client, server, true) })
	both.Wait()
}

// passable waits while nothing passes; false when the proxy was closed.
func (p *Proxy) passable() bool {
	for {
		mode, changed := p.state()
		if mode != Hole {
			return p.life.Err() == nil
		}
		select {
		case <-changed:
		case <-p.life.Done():
			return false
		}
	}
}

func (p *Proxy) copy(to, from net.Conn, fromServer bool) {
	defer to.Close()
	defer from.Close()
	buf := make([]byte, 32<<10)
	for {
		if !p.passable() {
			return
		}
		mode, changed := p.state()
		most := len(buf)
		if mode == Drip && fromServer {
			most = 100
		}
		n, err := from.Read(buf[:most])
		if n > 0 {
			// What was read before the hole opened falls into it too.
			if !p.passable() {
				return
			}
			if mode == Drip && fromServer {
				p.pause(changed, 100*time.Millisecond)
			}
			if mode == Delay {
				p.pause(changed, 200*time.Millisecond)
			}
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

func (p *Proxy) pause(changed <-chan struct{}, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-changed:
	case <-p.life.Done():
	}
}
