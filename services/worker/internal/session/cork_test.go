package session

import (
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/services/worker/internal/clock"
)

// counted is a connection that counts the calls of the system.
type counted struct {
	net.Conn
	writes *atomic.Int64
}

func (c counted) Write(p []byte) (int, error) {
	c.writes.Add(1)
	return c.Conn.Write(p)
}

// dialed is a socket whose writes are counted, to a server that passes on what comes.
func dialed(t *testing.T, secure bool) (ws *socket, writes *atomic.Int64, got chan []byte) {
	t.Helper()
	got, writes = make(chan []byte, 10), &atomic.Int64{}
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		server, err := websocket.Accept(w, r, &websocket.AcceptOptions{Subprotocols: []string{workerproto.Subprotocol}})
		if err != nil {
			t.Error(err)
			return
		}
		server.SetReadLimit(workerproto.MaxFrameBytes)
		for {
			_, data, err := server.Read(r.Context())
			if err != nil {
				return
			}
			got <- data
		}
	})
	server := httptest.NewUnstartedServer(handler)
	server.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	if secure {
		server.StartTLS()
	} else {
		server.Start()
	}
	t.Cleanup(server.Close)
	s := New(Config{URL: server.URL, Token: func() (string, error) { return "the-token", nil }, Clock: clock.NewSystem()})
	tr := s.socket.Transport.(*http.Transport)
	tr.TLSClientConfig = &tls.Config{InsecureSkipVerify: true} //nolint:gosec // the test's own server
	dial := tr.DialContext
	tr.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := dial(ctx, network, address)
		if below, ok := c.(*cork); ok {
			below.Conn = counted{below.Conn, writes}
		}
		return c, err
	}
	ws, err := s.dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ws.CloseNow() })
	return ws, writes, got
}

// A large message is one write, a small one after it is not held back, and both
// come as they were sent.
func TestLargeMessagesAreWrittenAtOnce(t *testing.T) {
	for name, secure := range map[string]bool{"plain": false, "TLS": true} {
		t.Run(name, func(t *testing.T) {
			ws, writes, got := dialed(t, secure)
			for _, size := range []int{workerproto.MaxChunkBytes + 300, 10, corkLeast, 3 * corkMost} {
				sent := bytes.Repeat([]byte{'a', 'b', 0}, size/3+1)[:size]
				before := writes.Load()
				if err := ws.Write(t.Context(), websocket.MessageBinary, sent); err != nil {
					t.Fatal(err)
				}
				most := int64(size/corkMost + 1)
				if n := writes.Load() - before; n > most {
					t.Errorf("%d bytes: %d writes, %d at most", size, n, most)
				}
				select {
				case data := <-got:
					if !bytes.Equal(data, sent) {
						t.Errorf("%d bytes did not come as they were sent", size)
					}
				case <-time.After(10 * time.Second):
					t.Fatalf("%d bytes did not come", size)
				}
			}
		})
	}
}

// What is written to somebody who does not read ends when the connection is closed.
func TestGatheredWriteEndsWithItsConnection(t *testing.T) {
	client, server := net.Pipe()
	defer server.Close()
	below := &cork{Conn: client}
	below.gather()
	if _, err := below.Write(make([]byte, 100)); err != nil {
		t.Fatal("it was not gathered:", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- below.release() }()
	_ = client.Close()
	select {
	case err := <-ended:
		if err == nil {
			t.Fatal("nothing was written, and it says so of nothing")
		}
	case <-time.After(10 * time.Second):
		t.Fatal("it waits for ever")
	}
	if _, err := below.Write([]byte("x")); err != io.ErrClosedPipe {
		t.Fatalf("a write to what is closed: %v", err)
	}
}
