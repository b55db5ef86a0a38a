//go:build unix

package process

import (
	"errors"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	copyBufferSize = 32 << 10
	// lingering is how long a pipe may stay open when nothing of the tree is
	// left: end of file is then a matter of microseconds, except where a process
	// outside of the tree was handed the pipe.
	lingering = 20 * time.Millisecond
	// drainMost bounds what is still read from such a pipe: no pipe holds more
	// by default.
	drainMost = 1 << 20
)

type copyBuffer [copyBufferSize]byte

// outputs hands what a command writes to the caller's writers.
type outputs struct {
	readers [2]*os.File
	open    atomic.Int32
	done    chan struct{} // closed when both streams have ended
}

func copyOutputs(buffers *sync.Pool, readers [2]*os.File, writers [2]io.Writer) *outputs {
	o := &outputs{readers: readers, done: make(chan struct{})}
	o.open.Store(int32(len(readers)))
	for i := range readers {
		go o.copy(buffers, readers[i], writers[i])
	}
	return o
}

func (o *outputs) copy(buffers *sync.Pool, r *os.File, w io.Writer) {
	buf := buffers.Get().(*copyBuffer)
	defer func() {
		buffers.Put(buf)
		// Nobody reads it any more: a writer that is left gets SIGPIPE.
		_ = r.Close()
		if o.open.Add(-1) == 0 {
			close(o.done)
		}
	}()
	deliver := func(p []byte) {
		if w == nil {
			return
		}
		if _, err := w.Write(p); err != nil {
			w = nil // keep reading, or the command would block
		}
	}
	for {
		n, err := r.Read(buf[:])
		if n > 0 {
			deliver(buf[:n])
		}
		if err == nil {
			continue
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			drain(r, buf, deliver)
		}
		return
	}
}

// drain reads what a pipe holds, without waiting for more.
func drain(r *os.File, buf *copyBuffer, deliver func([]byte)) {
	conn, err := r.SyscallConn()
	if err != nil || r.SetReadDeadline(time.Time{}) != nil {
		return
	}
	for total := 0; total < drainMost; {
		n := 0
		err := conn.Read(func(fd uintptr) bool {
			for {
				var err error
				if n, err = syscall.Read(int(fd), buf[:]); err != syscall.EINTR {
					return true
				}
			}
		})
		if err != nil || n <= 0 {
			return
		}
		deliver(buf[:n])
		total += n
	}
}

// finish waits until everything is delivered. The tree is gone when it is
// called, or given up.
func (o *outputs) finish() {
	select {
	case <-o.done:
		return
	default:
	}
	timer := time.NewTimer(lingering)
	defer timer.Stop()
	select {
	case <-o.done:
		return
	case <-timer.C:
	}
	for _, r := range o.readers {
		_ = r.SetReadDeadline(time.Unix(1, 0))
	}
	<-o.done
}
