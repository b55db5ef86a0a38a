package socket

import (
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/services/worker-edge/internal/session"
)

// Bounds of bytes that carry no message: empty fragments, and control frames,
// each of which makes the edge write an answer. The WebSocket takes them without
// end, and tells nobody.
const (
	overheadBurst = 64 << 10
	overheadRate  = 4 << 10  // bytes a second
	frameHeader   = 14       // bytes, at most
	maxPiece      = 16 << 10 // of a message, read at once
)

// wire is the connection below a WebSocket. It knows what the WebSocket does
// not tell: whether it was the network that failed, and how much comes that is
// no message. It is safe for concurrent use.
type wire struct {
	net.Conn
	lost  atomic.Bool // reading or writing has failed
	ended atomic.Bool // what still comes is read for the close handshake only, which is bounded by time

	mu       sync.Mutex
	overhead int64 // bytes read that were not part of a message so far
	at       time.Time
}

// Read implements net.Conn. When too much has come that is no message its error
// is a *session.Violation.
func (w *wire) Read(p []byte) (int, error) {
	if !w.ended.Load() && w.over(time.Now()) {
		return 0, &session.Violation{Code: workerproto.CloseSlowDown, Reason: "too many empty fragments or control frames"}
	}
	n, err := w.Conn.Read(p)
	if n > 0 {
		w.spend(int64(n))
		return n, nil // an error comes again
	}
	if err != nil {
		w.lost.Store(true)
	}
	return n, err
}

// Write implements net.Conn.
func (w *wire) Write(p []byte) (int, error) {
	n, err := w.Conn.Write(p)
	if err != nil {
		w.lost.Store(true)
	}
	return n, err
}

// spend counts bytes that have come. What is read ahead of a message counts
// until earn is called.
func (w *wire) spend(n int64) {
	w.mu.Lock()
	w.overhead += n
	w.mu.Unlock()
}

// over reports whether too much has come.
func (w *wire) over(now time.Time) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.at.IsZero() {
		w.overhead = max(w.overhead-int64(now.Sub(w.at)*overheadRate/time.Second), 0)
	}
	w.at = now
	return w.overhead > overheadBurst
}

// earn takes back what was part of a message, with a header.
func (w *wire) earn(n int64) {
	w.mu.Lock()
	w.overhead = max(w.overhead-n-frameHeader, 0)
	w.mu.Unlock()
}
