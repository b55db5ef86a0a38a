// Package edgetest has an edge for tests of the worker: a WebSocket server that
// sends what it is told and keeps every frame that it gets, and the routes of
// plain HTTP. A failed expectation ends the test.
package edgetest

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
)

// patience is how long the edge waits for what must happen, on a busy machine.
const patience = 20 * time.Second

// Edge is a server whose answers are the test's.
type Edge struct {
	t      *testing.T
	Server *httptest.Server
	Plain  *Plain
	conns  chan *Link // each new connection
	// refuse is the status that connections get instead of an upgrade; 0: none.
	mu     sync.Mutex
	refuse int
	proto  string
	tokens []string // of every try
}

// Link is one connection, as the edge sees it.
type Link struct {
	t      *testing.T
	WS     *websocket.Conn
	frames chan Frame
	closed chan error // how reading ended
	done   context.CancelFunc
	once   sync.Once
	read   chan struct{} // closed: the edge begins to read
}

// Frame is one message of the worker.
type Frame struct {
	Kind  workerproto.Type
	Data  []byte
	Lease workerproto.Lease // of output
	Chunk workerproto.Chunk // of output
}

// New starts an edge that ends with the test.
func New(t *testing.T) *Edge {
	e := &Edge{t: t, conns: make(chan *Link, 64), proto: workerproto.Subprotocol, Plain: newPlain(t)}
	ctx, cancel := context.WithCancel(context.Background())
	var serving sync.WaitGroup
	e.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		serving.Add(1)
		defer serving.Done()
		if r.URL.Path != workerproto.PathConnect {
			e.Plain.serve(w, r)
			return
		}
		e.serve(ctx, w, r)
	}))
	t.Cleanup(func() {
		e.Server.Close()
		cancel() // connections that no test has taken
		serving.Wait()
	})
	return e
}

// Set makes later connections fail with an HTTP status, unless refuse is 0, and
// sets the subprotocol of those that do not.
func (e *Edge) Set(refuse int, proto string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.refuse, e.proto = refuse, proto
}

// Tries are the tokens of all connections so far, refused or not.
func (e *Edge) Tries() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return append([]string(nil), e.tokens...)
}

func (e *Edge) serve(ctx context.Context, w http.ResponseWriter, r *http.Request) {
	e.mu.Lock()
	refuse, proto := e.refuse, e.proto
	e.tokens = append(e.tokens, r.Header.Get(workerproto.TokenHeader))
	e.mu.Unlock()
	if refuse != 0 {
		w.WriteHeader(refuse)
		return
	}
	ws, err := websocket.Accept(w, r, &websocket.AcceptOptions{Subprotocols: []string{proto}})
	if err != nil {
		return
	}
	ws.SetReadLimit(workerproto.MaxFrameBytes)
	ctx, cancel := context.WithCancel(ctx)
	l := &Link{t: e.t, WS: ws, frames: make(chan Frame, 4096), closed: make(chan error, 1), done: cancel, read: make(chan struct{})}
	e.conns <- l
	select {
	case <-l.read:
	case <-ctx.Done():
	}
	for {
		kind, data, err := ws.Read(ctx)
		if err != nil {
			_ = ws.CloseNow()
			l.closed <- err
			return
		}
		f := Frame{Data: data}
		if kind == websocket.MessageBinary {
			f.Kind = workerproto.TypeOutput
			f.Lease, f.Chunk, err = workerproto.DecodeChunk(data)
		} else {
			f.Kind, err = workerproto.TypeOf(data)
		}
		if err != nil {
			e.t.Error(err)
		}
		select {
		case l.frames <- f:
		case <-ctx.Done():
		}
	}
}

// Accept waits for the next connection, whose frames the edge does not read yet.
func (e *Edge) Accept() *Link {
	e.t.Helper()
	select {
	case l := <-e.conns:
		e.t.Cleanup(l.Cut)
		return l
	case <-time.After(patience):
		e.t.Fatal("the worker does not connect")
		return nil
	}
}

// Hello waits for the next connection and its hello.
func (e *Edge) Hello() (*Link, workerproto.Register) {
	e.t.Helper()
	l := e.Accept()
	close(l.read)
	var reg workerproto.Register
	l.Decode(l.Next(), workerproto.TypeHello, &reg)
	return l, reg
}

// Connected waits for the next session and welcomes it.
func (e *Edge) Connected() *Link {
	e.t.Helper()
	l, _ := e.Hello()
	l.Welcome()
	return l
}

// Welcome opens the session: heartbeats each second, leases of a minute.
func (l *Link) Welcome() {
	l.Send(workerproto.TypeWelcome, workerproto.Welcome{HeartbeatSeconds: 1, LeaseSeconds: 60, Protocol: workerproto.Version})
}

// Next is the next frame. It waits for it.
func (l *Link) Next() Frame {
	l.t.Helper()
	return l.before(time.After(patience))
}

func (l *Link) before(deadline <-chan time.Time) Frame {
	l.t.Helper()
	select {
	case f := <-l.frames:
		return f
	case err := <-l.closed:
		l.t.Fatalf("the worker closed the connection: %v", err)
	case <-deadline:
		l.t.Fatal("the worker does not send what is awaited")
	}
	return Frame{}
}

// NextOf is the next frame that is of one of the kinds. What comes before it is
// dropped.
func (l *Link) NextOf(kinds ...workerproto.Type) Frame {
	l.t.Helper()
	deadline := time.After(patience)
	for {
		f := l.before(deadline)
		if slices.Contains(kinds, f.Kind) {
			return f
		}
		if f.Kind == workerproto.TypeResult || f.Kind == workerproto.TypeRejected {
			l.t.Logf("dropped: %s", f.Data)
		}
	}
}

// Decode reads the body of a text frame, which must be of this type.
func (l *Link) Decode(f Frame, kind workerproto.Type, into any) {
	l.t.Helper()
	if f.Kind != kind {
		l.t.Fatalf("the worker sent %s, want %s", f.Kind, kind)
	}
	if err := workerproto.Decode(f.Data, into); err != nil {
		l.t.Fatal(err)
	}
}

// Send sends a text frame.
func (l *Link) Send(kind workerproto.Type, body any) {
	l.t.Helper()
	data, err := workerproto.Encode(kind, body)
	if err != nil {
		l.t.Fatal(err)
	}
	l.Write(data)
}

// Write sends bytes as a text frame.
func (l *Link) Write(data []byte) {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := l.WS.Write(ctx, websocket.MessageText, data); err != nil {
		l.t.Fatal(err)
	}
}

// Assign assigns jobs that do nothing.
func (l *Link) Assign(ls ...workerproto.Lease) {
	l.t.Helper()
	var as []workerproto.Assignment
	for _, x := range ls {
		as = append(as, workerproto.Assignment{Lease: x, LeaseSeconds: 60, Job: Shell("true")})
	}
	l.Send(workerproto.TypeAssign, workerproto.Assign{Assignments: as})
}

// Run assigns a job that runs a shell command.
func (l *Link) Run(x workerproto.Lease, command string) {
	l.t.Helper()
	l.Send(workerproto.TypeAssign, workerproto.Assign{Assignments: []workerproto.Assignment{
		{Lease: x, LeaseSeconds: 60, Job: Shell(command)},
	}})
}

// Result is the next result. What comes before it is dropped.
func (l *Link) Result() workerproto.Result {
	l.t.Helper()
	var r workerproto.Result
	l.Decode(l.NextOf(workerproto.TypeResult), workerproto.TypeResult, &r)
	return r
}

// AckResults says that the bus has results.
func (l *Link) AckResults(ls ...workerproto.Lease) {
	l.t.Helper()
	l.Send(workerproto.TypeAck, workerproto.Ack{Results: ls})
}

// Cut breaks the connection without a word.
func (l *Link) Cut() {
	l.once.Do(func() {
		l.done()
		_ = l.WS.CloseNow()
	})
}

// End is how the worker closed the connection.
func (l *Link) End() error {
	l.t.Helper()
	for {
		select {
		case <-l.frames:
		case err := <-l.closed:
			return err
		case <-time.After(patience):
			l.t.Fatal("the worker does not close the connection")
		}
	}
}

// Shell is a job that runs a shell command.
func Shell(command string) job.Spec {
	s, problems := job.Normalise(job.Spec{Command: job.Command{Shell: command}})
	if len(problems) > 0 {
		panic(problems)
	}
	return s
}

// Lease is the lease of the test's job number n.
func Lease(n int) workerproto.Lease {
	return workerproto.Lease{JobID: fmt.Sprintf("job-%d", n), Attempt: 1, LeaseID: fmt.Sprintf("lease-%d", n)}
}
