package socket_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"net"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
	"github.com/cmdexec/cmdexec/libs/kit/ratelimit"
	"github.com/cmdexec/cmdexec/services/worker-edge/internal/session"
	"github.com/cmdexec/cmdexec/services/worker-edge/internal/socket"
	"github.com/cmdexec/cmdexec/services/worker-edge/internal/workertest"
)

// BenchmarkIdle reports the memory of an idle session (heap and stacks after a
// collection, without the kernel's buffers and the bus client's subscription).
// The clients are bare sockets, so that their part is about 1 KB each.
func BenchmarkIdle(b *testing.B) {
	bus := newMemBus()
	logger := slog.New(slog.DiscardHandler)
	hub := session.NewHub(session.Options{
		Bus: bus, EdgeID: "edge-bench", Lease: time.Minute, Heartbeat: 5 * time.Second, Secret: []byte(workertest.Secret),
		MaxInflightBytes: 64 << 20, Logger: logger, Metrics: session.NewMetrics(nil),
	})
	server := httptest.NewServer(socket.New(socket.Options{
		Hub: hub, Verifier: auth.NewWorkerVerifier([]byte(workertest.Secret)), MaxSessions: 1 << 20, MaxPendingPerIP: 1 << 20,
		Limiter: ratelimit.NewLocal(0), HelloTimeout: time.Minute, PingInterval: time.Hour, PongTimeout: time.Minute, WriteTimeout: time.Minute, CloseTimeout: time.Second, Logger: logger,
	}))
	defer server.Close()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- hub.Run(ctx) }()
	require.Eventually(b, hub.Open, workertest.Wait, time.Millisecond)

	heap, stack := memory()
	conns := make([]net.Conn, 0, b.N)
	buf := make([]byte, 4096)
	for i := range b.N {
		conns = append(conns, bareWorker(b, server.Listener.Addr().String(), fmt.Sprintf("worker-%d", i), buf))
	}
	heapAfter, stackAfter := memory()
	b.ReportMetric(float64(heapAfter-heap)/float64(b.N), "heap-B/session")
	b.ReportMetric(float64(stackAfter-stack)/float64(b.N), "stack-B/session")
	b.ReportMetric(float64(runtime.NumGoroutine())/float64(b.N), "goroutines/session")
	for _, c := range conns {
		_ = c.Close()
	}
	cancel()
	require.NoError(b, <-ended)
}

func memory() (heap, stack uint64) {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc, m.StackInuse
}

// bareWorker does the handshake and the hello by hand and leaves the socket idle.
func bareWorker(b *testing.B, addr, workerID string, buf []byte) net.Conn {
	b.Helper()
	c, err := net.Dial("tcp", addr)
	require.NoError(b, err)
	fmt.Fprintf(c, "GET /api/workers/connect HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"+
		"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: %s\r\n%s: %s\r\n\r\n",
		workerproto.Subprotocol, workerproto.TokenHeader, workertest.Token(b, workerID, time.Hour))
	readUntil(b, c, buf, "\r\n\r\n")
	hello, err := workerproto.Encode(workerproto.TypeHello, workertest.Hello(workerID))
	require.NoError(b, err)
	frame := []byte{0x81, 0x80 | 126, 0, 0, 0, 0, 0, 0} // text, masked with zeros
	binary.BigEndian.PutUint16(frame[2:], uint16(len(hello)))
	_, err = c.Write(append(frame, hello...))
	require.NoError(b, err)
	readUntil(b, c, buf, `"welcome"`)
	return c
}

func readUntil(b *testing.B, c net.Conn, buf []byte, end string) {
	b.Helper()
	require.NoError(b, c.SetReadDeadline(time.Now().Add(workertest.Wait)))
	var got []byte
	for !bytes.Contains(got, []byte(end)) {
		n, err := c.Read(buf)
		require.NoError(b, err, strings.ToValidUTF8(string(got), "?"))
		got = append(got, buf[:n]...)
	}
}
