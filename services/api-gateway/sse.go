package gateway

import (
	"encoding/json"
	"net/http"
	"time"

	"github.com/cmdexec/cmdexec/libs/kit/httpkit"
)

const (
	// keepAlive is how often a silent stream says that it lives.
	keepAlive = 15 * time.Second
	// slowClient is how long one write may take before its client is given up.
	slowClient = 15 * time.Second
)

// stream is a response that is written piece by piece. Pieces are collected
// until flush, or until they are many; each write has a deadline of its own.
type stream struct {
	w   http.ResponseWriter
	rc  *http.ResponseController
	buf []byte
}

// sendAt is how much a stream collects.
const sendAt = 32 << 10

// openStream sends the headers.
func openStream(w http.ResponseWriter, contentType string) *stream {
	return openStatus(w, contentType, http.StatusOK)
}

func openStatus(w http.ResponseWriter, contentType string, status int) *stream {
	_ = httpkit.LongLived(w) // a writer without deadlines has none to lift
	w.Header().Set("Content-Type", contentType)
	w.Header().Set("X-Accel-Buffering", "no") // proxies must not collect it
	s := &stream{w: w, rc: http.NewResponseController(w)}
	w.WriteHeader(status)
	_ = s.rc.SetWriteDeadline(time.Now().Add(slowClient))
	_ = s.rc.Flush() // a client that is gone shows at the next write
	return s
}

// flush sends what was collected.
func (s *stream) flush() error {
	if len(s.buf) == 0 {
		return nil
	}
	_ = s.rc.SetWriteDeadline(time.Now().Add(slowClient))
	_, err := s.w.Write(s.buf)
	s.buf = s.buf[:0]
	if err != nil {
		return err
	}
	return s.rc.Flush()
}

func (s *stream) write(p []byte) error {
	s.buf = append(s.buf, p...)
	if len(s.buf) < sendAt {
		return nil
	}
	return s.flush()
}

// event adds one server-sent event; id may be empty.
func (s *stream) event(id, name string, v any) error {
	data, err := json.Marshal(v) // on one line: JSON escapes line breaks
	if err != nil {
		return err
	}
	b := s.buf
	if id != "" {
		b = append(append(append(b, "id: "...), id...), '\n')
	}
	b = append(append(append(b, "event: "...), name...), "\ndata: "...)
	s.buf = append(b, data...)
	return s.write([]byte("\n\n"))
}

// comment sends a line that clients ignore.
func (s *stream) comment() error {
	s.buf = append(s.buf, ":\n\n"...)
	return s.flush()
}
