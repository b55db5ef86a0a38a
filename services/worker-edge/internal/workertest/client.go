// Package workertest has a worker for tests of the edge: a raw WebSocket client
// that sends what it is told and keeps every frame that it gets.
package workertest

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
)

// Secret signs the tokens of test workers.
const Secret = "Jd83nfPq02mXz7Rb5Lw9Tc41Vh6Kg8Ys"

// Wait is how long a test waits for what must come.
const Wait = 10 * time.Second

// Frame is a message from the edge.
type Frame struct {
	Type workerproto.Type
	Data []byte
}

// Decode reads the frame's body.
func Decode[T any](t testing.TB, f Frame) T {
	t.Helper()
	var v T
	require.NoError(t, workerproto.Decode(f.Data, &v))
	return v
}

// Client is one socket.
type Client struct {
	t    testing.TB
	conn *websocket.Conn
	done chan struct{}

	mu     sync.Mutex
	frames []Frame
	err    error
	news   chan struct{} // replaced at each change
}

// Token mints a token for a worker.
func Token(t testing.TB, workerID string, ttl time.Duration) string {
	t.Helper()
	token, err := auth.MintWorker([]byte(Secret), workerID, ttl, time.Now())
	require.NoError(t, err)
	return token
}

// Try dials; the response is that of a refusal.
func Try(t testing.TB, url string, header http.Header) (*Client, *http.Response, error) {
	t.Helper()
	c, resp, err := dial(t, url, header)
	if err == nil {
		go c.read()
	}
	return c, resp, err
}

func dial(t testing.TB, url string, header http.Header) (*Client, *http.Response, error) {
	ctx, cancel := context.WithTimeout(t.Context(), Wait)
	defer cancel()
	conn, resp, err := websocket.Dial(ctx, url+"/api/workers/connect", &websocket.DialOptions{
		HTTPHeader: header, Subprotocols: []string{workerproto.Subprotocol},
	})
	if err != nil {
		return nil, resp, err
	}
	conn.SetReadLimit(workerproto.MaxFrameBytes)
	c := &Client{t: t, conn: conn, done: make(chan struct{}), news: make(chan struct{})}
	t.Cleanup(func() { _ = conn.CloseNow() })
	return c, resp, nil
}

// Dial connects as a worker and starts to read.
func Dial(t testing.TB, url, workerID string) *Client {
	t.Helper()
	c, _, err := Try(t, url, http.Header{workerproto.TokenHeader: {Token(t, workerID, time.Hour)}})
	require.NoError(t, err)
	return c
}

// DialDeaf connects and does not read.
func DialDeaf(t testing.TB, url, workerID string) *Client {
	t.Helper()
	c, _, err := dial(t, url, http.Header{workerproto.TokenHeader: {Token(t, workerID, time.Hour)}})
	require.NoError(t, err)
	return c
}

func (c *Client) read() {
	defer close(c.done)
	for {
		_, data, err := c.conn.Read(context.Background())
		c.mu.Lock()
		if err != nil {
			c.err = err
		} else {
			t, _ := workerproto.TypeOf(data)
			c.frames = append(c.frames, Frame{Type: t, Data: data})
		}
		close(c.news)
		c.news = make(chan struct{})
		c.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// Send sends a frame.
func (c *Client) Send(t workerproto.Type, body any) {
	c.t.Helper()
	data, err := workerproto.Encode(t, body)
	require.NoError(c.t, err)
	c.Write(websocket.MessageText, data)
}

// Write sends a message as it is. A connection that the edge has closed is no
// failure: tests look at the close code.
func (c *Client) Write(typ websocket.MessageType, data []byte) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), Wait)
	defer cancel()
	_ = c.conn.Write(ctx, typ, data) // see above
}

// WriteFor is Write that gives up after d and reports whether it went through.
func (c *Client) WriteFor(d time.Duration, typ websocket.MessageType, data []byte) bool {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	return c.conn.Write(ctx, typ, data) == nil
}

// Text sends a text message as it is.
func (c *Client) Text(s string) { c.Write(websocket.MessageText, []byte(s)) }

// Chunk sends a binary chunk frame.
func (c *Client) Chunk(l workerproto.Lease, chunk workerproto.Chunk) {
	c.t.Helper()
	frame, err := workerproto.EncodeChunk(l, chunk)
	require.NoError(c.t, err)
	c.Write(websocket.MessageBinary, frame)
}

// Next waits for the first frame for which want is true and removes it.
func (c *Client) Next(want func(Frame) bool) Frame {
	c.t.Helper()
	deadline := time.After(Wait)
	for {
		c.mu.Lock()
		i := slices.IndexFunc(c.frames, want)
		if i >= 0 {
			f := c.frames[i]
			c.frames = slices.Delete(c.frames, i, i+1)
			c.mu.Unlock()
			return f
		}
		err, news := c.err, c.news
		c.mu.Unlock()
		if err != nil {
			require.Fail(c.t, "the connection ended before the frame came", "%v", err)
		}
		select {
		case <-news:
		case <-deadline:
			require.Fail(c.t, "the frame did not come", "there were: %s", c.Types())
		}
	}
}

// NextOf waits for a frame of a type.
func (c *Client) NextOf(t workerproto.Type) Frame {
	c.t.Helper()
	return c.Next(func(f Frame) bool { return f.Type == t })
}

// Types lists the frames that were not taken yet.
func (c *Client) Types() []workerproto.Type {
	c.mu.Lock()
	defer c.mu.Unlock()
	types := make([]workerproto.Type, len(c.frames))
	for i := range c.frames {
		types[i] = c.frames[i].Type
	}
	return types
}

// HasEnded reports whether the connection has ended.
func (c *Client) HasEnded() bool {
	select {
	case <-c.done:
		return true
	default:
		return false
	}
}

// Ended waits for the end of the connection and returns its close code and
// reason; -1 when there was no close frame.
func (c *Client) Ended() (int, string) {
	c.t.Helper()
	select {
	case <-c.done:
	case <-time.After(2 * Wait):
		require.Fail(c.t, "the connection did not end")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	var ce websocket.CloseError
	if errors.As(c.err, &ce) {
		return int(ce.Code), ce.Reason
	}
	return -1, ""
}

// Close closes the connection as a worker does that goes.
func (c *Client) Close() { _ = c.conn.Close(websocket.StatusNormalClosure, "") }

// Cut drops the connection without a close frame.
func (c *Client) Cut() { _ = c.conn.CloseNow() }

// Hello is a registration that the edge accepts.
func Hello(workerID string, running ...workerproto.Lease) workerproto.Register {
	r := workerproto.Register{
		WorkerID: workerID, Hostname: "host", OS: "linux", Arch: "amd64", CPUCores: 4, TotalMemory: 8 << 30,
		Executors: []string{"process"}, Slots: 4, Backlog: 8, Version: "test", Protocol: workerproto.Version, Running: []workerproto.RunningLease{},
	}
	for _, l := range running {
		r.Running = append(r.Running, workerproto.RunningLease{Lease: l})
	}
	return r
}

// Lease makes a lease of a fresh job.
func Lease() workerproto.Lease {
	now := time.Now()
	return workerproto.Lease{JobID: id.New(id.Job, now), Attempt: 1, LeaseID: id.New(id.Lease, now)}
}

// Chunk makes a chunk of stdout.
func Chunk(seq, offset int64, data []byte) workerproto.Chunk {
	return workerproto.Chunk{Seq: seq, Offset: offset, Stream: workerproto.Stdout, Time: time.Now().UTC(), Data: data}
}

// JSON marshals v.
func JSON(t testing.TB, v any) string {
	t.Helper()
	data, err := json.Marshal(v)
	require.NoError(t, err)
	return string(data)
}
