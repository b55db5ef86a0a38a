// Command chaosworkers is many idle workers in one process: each holds a WebSocket
// to one of the edges, sends heartbeats that it drains, so that it is given nothing,
// and connects again as a worker does when the connection is lost. It says when
// each was connected and lost, in Unix nanoseconds.
//
//	chaosworkers -n 1000 -prefix worker-storm -secret FILE EDGE...
package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
	"github.com/cmdexec/cmdexec/libs/kit/lifecycle"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	n := flag.Int("n", 1000, "workers")
	prefix := flag.String("prefix", "worker-storm", "of their ids")
	secret := flag.String("secret", "", "file with the secret of workers' tokens")
	flag.Parse()
	if err := run(ctx, *n, *prefix, *secret, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "chaosworkers:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, n int, prefix, secretFile string, edges []string) error {
	secret, err := os.ReadFile(secretFile)
	if err != nil {
		return err
	}
	if len(edges) == 0 {
		return errors.New("no edge is named")
	}
	told := &told{to: os.Stdout}
	var all sync.WaitGroup
	for i := range n {
		w := &worker{id: fmt.Sprintf("%s-%d", prefix, i), number: i, edges: edges, told: told}
		if w.token, err = auth.MintWorker(secret, w.id, time.Hour, time.Now()); err != nil {
			return err
		}
		all.Go(func() { w.live(ctx) })
	}
	all.Wait()
	return nil
}

// told writes what happens, a line each.
type told struct {
	mu sync.Mutex
	to io.Writer
}

func (t *told) say(event, id, more string) {
	at := time.Now().UnixNano()
	t.mu.Lock()
	defer t.mu.Unlock()
	fmt.Fprintf(t.to, "%s %s %d %s\n", event, id, at, more)
}

// worker is one of them.
type worker struct {
	id, token string
	number    int
	edges     []string
	told      *told
}

// The times of a worker that reconnects are those of services/worker.
const (
	minBackoff = 100 * time.Millisecond
	maxBackoff = 15 * time.Second
	heartbeat  = 5 * time.Second
	patience   = 20 * time.Second // for the answer of a peer that is there
	welcomed   = 90 * time.Second // for the answer to a hello
)

func (w *worker) live(ctx context.Context) {
	backoff := lifecycle.Backoff{Min: minBackoff, Max: maxBackoff}
	for ctx.Err() == nil {
		err := w.session(ctx, &backoff)
		if lifecycle.Sleep(ctx, backoff.Next()) != nil {
			return
		}
		_ = err // told where it was a connection; a try that fails is made again
	}
}

// session connects and keeps the connection until it is lost.
func (w *worker) session(ctx context.Context, backoff *lifecycle.Backoff) error {
	// Each has an address of its own, as machines have.
	dialer := net.Dialer{Timeout: patience, LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 8, byte(w.number/250), byte(w.number%250+1))}}
	c, err := dialer.DialContext(ctx, "tcp", w.edges[rand.IntN(len(w.edges))])
	if err != nil {
		return err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	s := &socket{conn: c, in: bufio.NewReaderSize(c, 512)}
	if err := s.open(w.token); err != nil {
		return err
	}
	if err := s.send(workerproto.TypeHello, workerproto.Register{
		WorkerID: w.id, Hostname: "storm", OS: "linux", Arch: "amd64", CPUCores: 1, TotalMemory: 1 << 30,
		Executors: []string{}, Slots: 1, Version: "storm", Protocol: workerproto.Version, Running: []workerproto.RunningLease{},
	}); err != nil {
		return err
	}
	for welcome, pause := false, welcomed; ; {
		text, err := s.next(pause)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded) && welcome:
			if err := s.send(workerproto.TypeHeartbeat, workerproto.Heartbeat{
				Status: workerproto.StatusDraining, Running: []workerproto.PhaseLease{},
			}); err != nil {
				w.told.say("lost", w.id, err.Error())
				return err
			}
		case err != nil:
			if welcome && ctx.Err() == nil {
				w.told.say("lost", w.id, err.Error())
			}
			return err
		case strings.Contains(text, `"welcome"`):
			welcome, pause = true, heartbeat
			backoff.Reset()
			w.told.say("connected", w.id, "")
		}
	}
}

// socket is the least of a WebSocket client.
type socket struct {
	conn net.Conn
	in   *bufio.Reader
}

func (s *socket) open(token string) error {
	_ = s.conn.SetDeadline(time.Now().Add(patience)) // a closed connection is told by the next read
	if _, err := fmt.Fprintf(s.conn, "GET /api/workers/connect HTTP/1.1\r\nHost: edge\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: %s\r\n%s: %s\r\n\r\n",
		workerproto.Subprotocol, workerproto.TokenHeader, token); err != nil {
		return err
	}
	resp, err := http.ReadResponse(s.in, nil)
	if err != nil {
		return err
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusSwitchingProtocols {
		return fmt.Errorf("refused: %s", resp.Status)
	}
	return nil
}

func (s *socket) send(t workerproto.Type, body any) error {
	data, err := workerproto.Encode(t, body)
	if err != nil {
		return err
	}
	return s.write(0x1, data)
}

// write sends a frame, masked with zeros.
func (s *socket) write(op byte, data []byte) error {
	head := []byte{0x80 | op, 0x80 | byte(len(data)), 0, 0, 0, 0}
	if len(data) > 125 {
		head = []byte{0x80 | op, 0x80 | 126, 0, 0, 0, 0, 0, 0}
		binary.BigEndian.PutUint16(head[2:], uint16(len(data)))
	}
	_ = s.conn.SetWriteDeadline(time.Now().Add(patience))
	_, err := s.conn.Write(append(head, data...))
	return err
}

// errClosed is that the edge has closed the connection in order.
var errClosed = errors.New("the edge closed the connection")

// next waits so long for a message, and answers pings.
func (s *socket) next(wait time.Duration) (string, error) {
	for end := time.Now().Add(wait); ; {
		_ = s.conn.SetReadDeadline(end)
		head, err := s.in.Peek(2) // takes nothing when there is nothing yet
		if err != nil {
			return "", err
		}
		op, length := head[0]&0xf, uint64(head[1]&0x7f)
		_ = s.conn.SetReadDeadline(time.Now().Add(patience))
		skip := 2
		switch length {
		case 126:
			skip = 4
		case 127:
			skip = 10
		}
		if head, err = s.in.Peek(skip); err != nil {
			return "", fmt.Errorf("a frame was cut: %v", err)
		}
		switch skip {
		case 4:
			length = uint64(binary.BigEndian.Uint16(head[2:]))
		case 10:
			length = binary.BigEndian.Uint64(head[2:])
		}
		_, _ = s.in.Discard(skip) // it was peeked
		if length > 1<<20 {
			return "", fmt.Errorf("a frame of %d bytes", length)
		}
		data := make([]byte, length)
		if _, err := io.ReadFull(s.in, data); err != nil {
			return "", fmt.Errorf("a frame was cut: %v", err)
		}
		switch op {
		case 0x8:
			return "", errClosed
		case 0x9:
			if err := s.write(0xa, data); err != nil {
				return "", err
			}
		case 0x1:
			return string(data), nil
		}
	}
}
