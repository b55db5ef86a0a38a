package docker

import (
	"bufio"
	"context"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/docker/docker/api/types/container"
)

// The engine keeps the output of containers that may outlive the worker, in
// files that take turns. Its driver "local" keeps it byte by byte, which
// "json-file" does not: that one replaces what is not UTF-8.
//
// While the worker is there it reads the output from the streams that it is
// attached to, which come at once; the log has lines only when they end. Both have
// the same bytes in the same order, so a number of bytes names the same place
// in both, as long as the log's first file has not been thrown away. That the log
// does not tell. But when it has been, the other files are full: with less in all
// of them together, the log is whole.
//
// The log is read from its beginning, again and again, and not followed: a
// follower gets records twice and misses others when the files take turns (seen
// with 20.10), and one that is too slow is not told what it misses.
const (
	logDriver = "local"
	logFiles  = 5
	logFile   = 8_000_000 // bytes; the engine's "8m"
	// logWhole is how much the log may hold and certainly be whole.
	logWhole = (logFiles - 1) * logFile
)

func logConfig() container.LogConfig {
	return container.LogConfig{Type: logDriver, Config: map[string]string{
		"max-size": strconv.Itoa(logFile/1_000_000) + "m", "max-file": strconv.Itoa(logFiles),
		"compress": "false", "mode": "blocking",
	}}
}

// meter counts output as it comes from the log.
type meter struct {
	size int64   // that the log takes, at most
	part [3]bool // the last frame may be a piece of a line
}

// What a record takes beside its text, and more where the text is a piece of a
// line (daemon/logger/local, api/types/plugins/logdriver).
const (
	recordSize  = 32
	pieceSize   = 100
	longestLine = 16 << 10
)

// frame counts one frame, which is one record of the log.
func (m *meter) frame(stream byte, n int64) {
	if m == nil || int(stream) >= len(m.part) {
		return
	}
	m.size += n + recordSize
	if m.part[stream] || n >= longestLine {
		m.size += pieceSize
	}
	m.part[stream] = n >= longestLine
}

// atMost is how much the log takes at most: the last line of each stream may be
// a piece as well.
func (m *meter) atMost() int64 { return m.size + 2*pieceSize }

// lines puts the records of one stream together again. Engines before 23.0 leave
// out the end of a line that is longer than a record.
type lines struct {
	w     io.Writer
	skip  int64 // bytes that are known already
	seen  int64
	piece bool // the last record was a full one, without an end of line
	owed  bool // the last record was the rest of such a line, without its end
}

// record begins a record of n bytes.
func (l *lines) record() {
	if l.owed { // there is more after it, hence there was an end of line
		l.put([]byte{'\n'})
	}
	l.owed = false
}

// end ends a record of n bytes.
func (l *lines) end(n int64, newline bool) {
	l.owed = l.piece && n < longestLine && !newline
	l.piece = !newline && n >= longestLine
}

func (l *lines) put(p []byte) {
	n := min(max(l.skip-l.seen, 0), int64(len(p)))
	l.seen += int64(len(p))
	if p = p[n:]; len(p) > 0 {
		_, _ = l.w.Write(p)
	}
}

// unpack copies a log to the two streams until it ends, and counts it.
func unpack(r io.Reader, stdout, stderr *lines, m *meter) error {
	streams := [3]*lines{1: stdout, 2: stderr}
	return frames(r, m, func(number byte, n int64, data []byte, left int64) {
		l := streams[number]
		if l == nil {
			return
		}
		if left+int64(len(data)) == n {
			l.record()
		}
		l.put(data)
		if left == 0 {
			l.end(n, len(data) > 0 && data[len(data)-1] == '\n')
		}
	})
}

// logs opens the log of a container, as it is now, from its beginning or from a
// time on.
func (w *wire) logs(ctx context.Context, id string, since time.Time) (*stream, error) {
	q := url.Values{"stdout": {"1"}, "stderr": {"1"}}
	if !since.IsZero() {
		q.Set("since", unixTime(since))
	}
	s, resp, err := w.open(ctx, http.MethodGet, "/containers/"+id+"/logs", q, nil)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, refusal(s, resp)
	}
	return &stream{s.Conn, bufio.NewReader(resp.Body)}, nil
}

// unpackLog reads the log as it is now.
func (a *attempt) unpackLog(since time.Time, stdout, stderr *lines) (*meter, error) {
	ctx, cancel := a.x.engine.call(context.Background())
	s, err := a.x.engine.logs(ctx, a.id, since)
	cancel()
	if err != nil {
		return nil, err
	}
	defer s.Close()
	m := &meter{}
	return m, unpack(pacedReader{s, a.x.opts.CallTimeout}, stdout, stderr, m)
}

// measure reads the whole log as it is now and counts it.
func (a *attempt) measure() (*meter, error) {
	return a.unpackLog(time.Time{}, &lines{w: io.Discard}, &lines{w: io.Discard})
}

// pacedReader gives up on a stream that has nothing to say for a while.
type pacedReader struct {
	s    *stream
	most time.Duration
}

func (r pacedReader) Read(p []byte) (int, error) {
	if err := r.s.SetReadDeadline(time.Now().Add(r.most)); err != nil {
		return 0, err
	}
	return r.s.Read(p)
}
