package socket_test

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/natsd"
	"github.com/cmdexec/cmdexec/services/worker-edge/internal/workertest"
)

// TestMatrix is the index of everything bad that a socket may bring. A row is
// shown here, or by the test that it names.
func TestMatrix(t *testing.T) {
	for _, row := range []struct {
		name string
		show func(t *testing.T)
	}{
		// Frames.
		{"frame over the limit", elsewhere("TestBadFrames, too big, and TestRawFrames")},
		{"message over the limit by fragments", elsewhere("TestRawFrames")},
		{"empty fragments without end", emptyFragments},
		{"small fragments without end", smallFragments},
		{"control frame that is too long, or in pieces", elsewhere("TestRawFrames")},
		{"frame without a mask", elsewhere("TestRawFrames")},
		{"reserved bits and opcodes", elsewhere("TestRawFrames")},
		{"text that is not UTF-8", elsewhere("TestRawFrames and TestBadFrames")},
		{"impossible close codes", elsewhere("TestRawFrames")},
		{"text instead of binary, and the reverse", elsewhere("TestRawFrames")},
		{"pings are answered", pings},
		{"who is heard is not pinged, who is silent is", silence},
		{"ping flood", pingFlood},
		{"no pong", elsewhere("TestNoPong")},
		{"half a frame and then nothing", halfFrame},
		{"half closed", halfClosed},
		{"data after the close", dataAfterClose},
		{"no end of a close", stalledClose},
		{"a worker that does not read", elsewhere("TestSlowConsumer")},
		// Hello.
		{"messages before hello", beforeHello},
		{"hello twice", elsewhere("TestHelloTwice")},
		{"hello late, of another version, of another worker", elsewhere("TestBadHello")},
		{"a wrong token", elsewhere("TestTokens")},
		// Reports.
		{"output under another's lease, of another job or attempt", elsewhere("TestOutputUnderAnotherLease")},
		{"progress under another's lease, of another job or attempt", foreignProgress},
		{"result under another's lease", elsewhere("TestStaleResultsChangeNothing of services/result-collector, whose state table judges results")},
		{"reports without a legal lease", badLeases},
		{"reports after the end", afterTheEnd},
		{"as many reports as there can be", manyReports},
		{"messages without end", elsewhere("TestRateLimits")},
		// Output.
		{"output: gap, no seq, offset, stream, more than the job keeps", elsewhere("TestBadOutput")},
		{"output: repeat", elsewhere("TestOutputIsAckedWhenStored")},
		{"output: the year 9999 and the one after", lastYear},
		{"output: a chunk of 1 MiB", hugeChunk},
		{"output: control sequences of terminals", terminalBytes},
		{"output: more than is acknowledged", elsewhere("TestTooMuchUnacknowledged")},
		// Claims.
		{"registration: absurd claims", absurdHello},
		{"heartbeat: absurd claims", absurdHeartbeat},
		// Many.
		{"a hundred connections with one token", takeovers},
		{"sockets without hello from one address", withoutHello},
		{"connections past what the edge holds", elsewhere("TestRefusedBeforeUpgrade, and TestMaxConnsMakesFurtherClientsWait of libs/kit/httpkit")},
		// Decoders.
		{"what a decoder may meet", elsewhere("FuzzFrame, and FuzzFrame and FuzzChunkFrame of libs/core/workerproto")},
	} {
		t.Run(row.name, row.show)
	}
}

func elsewhere(name string) func(*testing.T) {
	return func(t *testing.T) { t.Log("shown by " + name) }
}

// The first byte of a frame.
const (
	fin        = 0x80
	opContinue = 0x0
	opText     = 0x1
	opBinary   = 0x2
	opClose    = 0x8
	opPing     = 0x9
	opPong     = 0xa
)

// raw is a socket on which a test writes what bytes it likes.
type raw struct {
	net.Conn
	t *testing.T
	r *bufio.Reader
}

// dialRaw connects up to the upgrade; the status is that of the answer.
func dialRaw(t *testing.T, h *harness, workerID string) (*raw, int) {
	t.Helper()
	c, err := net.Dial("tcp", strings.TrimPrefix(h.url, "http://"))
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close() })
	require.NoError(t, c.SetDeadline(time.Now().Add(3*workertest.Wait)))
	_, err = fmt.Fprintf(c, "GET /api/workers/connect HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"+
		"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: %s\r\n%s: %s\r\n\r\n",
		workerproto.Subprotocol, workerproto.TokenHeader, workertest.Token(t, workerID, time.Hour))
	require.NoError(t, err)
	r := &raw{Conn: c, t: t, r: bufio.NewReader(c)}
	resp, err := http.ReadResponse(r.r, nil)
	require.NoError(t, err)
	return r, resp.StatusCode
}

// openRaw connects up to the welcome.
func openRaw(t *testing.T, h *harness, workerID string) *raw {
	t.Helper()
	r, code := dialRaw(t, h, workerID)
	require.Equal(t, http.StatusSwitchingProtocols, code)
	hello, err := workerproto.Encode(workerproto.TypeHello, workertest.Hello(workerID))
	require.NoError(t, err)
	r.send(frame(fin|opText, hello))
	require.Contains(t, string(r.message()), `"welcome"`)
	return r
}

// send writes as much as the edge takes: one that has closed takes no more.
func (r *raw) send(data []byte) { _, _ = r.Write(data) }

// message reads the next text of the edge, which may ping before it.
func (r *raw) message() []byte {
	r.t.Helper()
	for {
		op, payload, err := r.next()
		require.NoError(r.t, err)
		if op == opPing {
			r.send(frame(fin|opPong, payload))
			continue
		}
		require.Equal(r.t, opText, op)
		return payload
	}
}

// next reads one frame of the edge.
func (r *raw) next() (op int, payload []byte, err error) {
	var head [2]byte
	if _, err := io.ReadFull(r.r, head[:]); err != nil {
		return 0, nil, err
	}
	n := uint64(head[1]) // never masked
	switch n {
	case 126:
		var long [2]byte
		_, err = io.ReadFull(r.r, long[:])
		n = uint64(binary.BigEndian.Uint16(long[:]))
	case 127:
		var long [8]byte
		_, err = io.ReadFull(r.r, long[:])
		n = binary.BigEndian.Uint64(long[:])
	}
	if err != nil {
		return 0, nil, err
	}
	payload = make([]byte, min(n, workerproto.MaxFrameBytes))
	_, err = io.ReadFull(r.r, payload)
	return int(head[0] & 0xf), payload, err
}

// No close frame came, or one without a code.
const (
	noClose = -1
	noCode  = int(websocket.StatusNoStatusRcvd)
)

// closeCode reads up to the edge's close frame.
func (r *raw) closeCode() int {
	r.t.Helper()
	for {
		op, payload, err := r.next()
		var timeout net.Error
		switch {
		case errors.As(err, &timeout) && timeout.Timeout():
			require.Fail(r.t, "the edge does not close")
		case err != nil:
			return noClose
		case op == opClose && len(payload) < 2:
			return noCode
		case op == opClose:
			return int(binary.BigEndian.Uint16(payload))
		}
	}
}

// ended reads up to the end of the connection. The edge must not need the
// worker's help for that.
func (r *raw) ended() (code int) {
	r.t.Helper()
	code = r.closeCode()
	for code != noClose {
		if _, _, err := r.next(); err != nil {
			require.NotErrorIs(r.t, err, errTimeout(err), "the edge keeps the connection open")
			break
		}
	}
	return code
}

// errTimeout is err if it is a timeout.
func errTimeout(err error) error {
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		return err
	}
	return errNever
}

var errNever = errors.New("never")

// frame makes a masked frame; the mask is zeros.
func frame(first byte, payload []byte) []byte {
	return append(header(first, uint64(len(payload))), payload...)
}

func header(first byte, n uint64) []byte {
	h := []byte{first}
	switch {
	case n < 126:
		h = append(h, 0x80|byte(n))
	case n <= math.MaxUint16:
		h = binary.BigEndian.AppendUint16(append(h, 0x80|126), uint16(n))
	default:
		h = binary.BigEndian.AppendUint64(append(h, 0x80|127), n)
	}
	return append(h, 0, 0, 0, 0)
}

func join(frames ...[]byte) []byte { return bytes.Join(frames, nil) }

func closing(code uint16) []byte {
	return frame(fin|opClose, binary.BigEndian.AppendUint16(nil, code))
}

func TestRawFrames(t *testing.T) {
	b := newMemBus()
	h := start(t, b)
	const (
		protocol = int(websocket.StatusProtocolError)
		badText  = int(websocket.StatusInvalidFramePayloadData)
		tooBig   = int(websocket.StatusMessageTooBig)
	)
	piece := bytes.Repeat([]byte("x"), 64<<10)
	fragments := frame(opText, piece)
	for range workerproto.MaxFrameBytes / len(piece) {
		fragments = append(fragments, frame(opContinue, piece)...)
	}
	unmasked := []byte{fin | opText, 2, '{', '}'}
	rows := map[string]struct {
		data []byte
		code int
	}{
		"frame over the limit":               {frame(fin|opText, make([]byte, workerproto.MaxFrameBytes+1)), tooBig},
		"fragments over the limit":           {fragments, tooBig},
		"length with the highest bit":        {header(fin|opBinary, 1<<63), protocol},
		"ping that is too long":              {frame(fin|opPing, make([]byte, 126)), protocol},
		"pong that is too long":              {frame(fin|opPong, make([]byte, 70_000)), protocol},
		"close that is too long":             {frame(fin|opClose, make([]byte, 126)), protocol},
		"ping in pieces":                     {frame(opPing, []byte("x")), protocol},
		"no mask":                            {unmasked, protocol},
		"ping without a mask":                {[]byte{fin | opPing, 0}, protocol},
		"RSV1":                               {frame(fin|opText|0x40, []byte("{}")), protocol},
		"RSV2":                               {frame(fin|opText|0x20, []byte("{}")), protocol},
		"RSV3":                               {frame(fin|opBinary|0x10, []byte("{}")), protocol},
		"RSV1 of a ping":                     {frame(fin|opPing|0x40, nil), protocol},
		"continuation of nothing":            {frame(fin|opContinue, []byte("{}")), protocol},
		"a message within another":           {join(frame(opText, []byte("{")), frame(fin|opText, []byte("{}"))), protocol},
		"UTF-8: a lone byte":                 {frame(fin|opText, []byte("{\"type\":\"\xff\"}")), badText},
		"UTF-8: a surrogate":                 {frame(fin|opText, []byte("{\"type\":\"\xed\xa0\x80\"}")), badText},
		"UTF-8: overlong":                    {frame(fin|opText, []byte("{\"type\":\"\xc0\xaf\"}")), badText},
		"UTF-8: cut":                         {join(frame(opText, []byte("{\"type\":\"\xe2\x82")), frame(fin|opContinue, []byte("\"}"))), badText},
		"close 0":                            {closing(0), protocol},
		"close 999":                          {closing(999), protocol},
		"close 1005":                         {closing(1005), protocol},
		"close 1006":                         {closing(1006), protocol},
		"close 1015":                         {closing(1015), protocol},
		"close 2999":                         {closing(2999), protocol},
		"close 5000":                         {closing(5000), protocol},
		"close 65535":                        {closing(65535), protocol},
		"close of one byte":                  {frame(fin|opClose, []byte{3}), protocol},
		"close 1000, which is fine":          {closing(1000), 1000},
		"close 4999, which is fine":          {closing(4999), 4999},
		"close without a code, also fine":    {frame(fin|opClose, nil), noCode},
		"text where binary is meant":         {frame(fin|opText, []byte("\x00\x00\x00\x02{}x")), workerproto.CloseProtocol},
		"binary where text is meant":         {frame(fin|opBinary, []byte(`{"type":"heartbeat","status":"idle"}`)), workerproto.CloseProtocol},
		"a legal message in pieces, then no": {join(frame(opText, []byte(`{"type":"heartbeat",`)), frame(opContinue, nil), frame(fin|opPing, nil), frame(fin|opContinue, []byte(`"status":"idle"}`)), unmasked), protocol},
	}
	for _, op := range []byte{3, 4, 5, 6, 7, 0xb, 0xc, 0xd, 0xe, 0xf} {
		rows[fmt.Sprintf("opcode %x", op)] = struct {
			data []byte
			code int
		}{frame(fin|op, nil), protocol}
	}
	for name, row := range rows {
		t.Run(name, func(t *testing.T) {
			r := openRaw(t, h, "worker-raw")
			r.send(row.data)
			require.Equal(t, row.code, r.closeCode())
		})
		t.Run(name+" before hello", func(t *testing.T) {
			r, status := dialRaw(t, h, "worker-early")
			require.Equal(t, http.StatusSwitchingProtocols, status)
			r.send(row.data)
			code := row.code
			if strings.HasPrefix(name, "a legal message") {
				code = workerproto.CloseProtocol // not a hello
			}
			require.Equal(t, code, r.closeCode())
		})
	}
	require.Empty(t, b.worker("worker-early").ID, "nothing was registered")
}

// bounded runs f and expects that little memory is left after it.
func bounded(t *testing.T, f func()) {
	t.Helper()
	before := heap()
	f()
	require.Less(t, int64(heap())-int64(before), int64(16<<20))
}

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// alive: the edge serves a worker.
func alive(t *testing.T, h *harness, workerID string) {
	t.Helper()
	c := h.open(workerID)
	c.Send(workerproto.TypeHeartbeat, workerproto.Heartbeat{ID: 1, Status: workerproto.StatusIdle})
	c.NextOf(workerproto.TypeBeat)
	c.Close()
}

// flood sends the same bytes over and over, at most so often, until the edge
// ends that with a code.
func flood(r *raw, times int, data []byte, want int) {
	r.t.Helper()
	block := bytes.Repeat(data, 512)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range (times + 511) / 512 {
			if _, err := r.Write(block); err != nil {
				return
			}
		}
	}()
	code := r.closeCode()
	_ = r.Close()
	<-done
	require.Contains(r.t, []int{want, noClose}, code, "closed; the code may be lost where more was still coming")
}

func emptyFragments(t *testing.T) {
	h := start(t, newMemBus(), func(o *tuning) { o.socket.HelloTimeout = time.Minute })
	for _, r := range []*raw{openRaw(t, h, "worker-raw"), early(t, h)} {
		bounded(t, func() {
			r.send(frame(opText, []byte("{")))
			flood(r, 1<<20, frame(opContinue, nil), workerproto.CloseSlowDown)
		})
	}
	alive(t, h, "worker-a")
}

// early is a socket before its hello.
func early(t *testing.T, h *harness) *raw {
	t.Helper()
	r, code := dialRaw(t, h, "worker-early")
	require.Equal(t, http.StatusSwitchingProtocols, code)
	return r
}

func smallFragments(t *testing.T) {
	h := start(t, newMemBus())
	r := openRaw(t, h, "worker-raw")
	bounded(t, func() {
		r.send(frame(opText, []byte("{")))
		flood(r, 1<<20, frame(opContinue, []byte("sixteen bytes...")), int(websocket.StatusMessageTooBig)) // all of which would be 16 MiB
	})
	alive(t, h, "worker-a")
}

func pings(t *testing.T) {
	h := start(t, newMemBus())
	r := openRaw(t, h, "worker-raw")
	for i := range 100 {
		text := fmt.Sprintf("ping %d", i)
		r.send(frame(fin|opPing, []byte(text)))
		op, payload, err := r.next()
		require.NoError(t, err)
		require.Equal(t, opPong, op)
		require.Equal(t, text, string(payload))
	}
	r.send(closing(1000))
	require.Equal(t, 1000, r.ended())
}

func silence(t *testing.T) {
	const interval = time.Second
	h := start(t, newMemBus(), func(o *tuning) { o.socket.PingInterval, o.socket.PongTimeout = interval, time.Minute })
	beat, err := workerproto.Encode(workerproto.TypeHeartbeat, workerproto.Heartbeat{ID: 1, Status: workerproto.StatusIdle})
	require.NoError(t, err)
	tick := time.NewTicker(interval / 10)
	defer tick.Stop()
	r := openRaw(t, h, "worker-raw")
	for began, heard := time.Now(), time.Now(); time.Since(began) < 2*interval; heard = time.Now() {
		r.send(frame(fin|opText, beat))
		op, payload, err := r.next()
		require.NoError(t, err)
		if op == opPing && time.Since(heard) > interval/2 {
			op, payload = opText, r.message() // this machine stood still for so long that the worker was silent
		}
		require.Equal(t, opText, op, "a ping %v after a heartbeat", time.Since(heard))
		require.Contains(t, string(payload), `"beat"`)
		<-tick.C
	}
	op, _, err := r.next()
	require.NoError(t, err)
	require.Equal(t, opPing, op)
}

func pingFlood(t *testing.T) {
	h := start(t, newMemBus(), func(o *tuning) { o.socket.HelloTimeout = time.Minute })
	for _, first := range []byte{opPing, opPong} {
		for _, size := range []int{0, 125} {
			for _, r := range []*raw{openRaw(t, h, "worker-raw"), early(t, h)} {
				bounded(t, func() {
					flood(r, 100_000, frame(fin|first, make([]byte, size)), workerproto.CloseSlowDown)
				})
			}
		}
	}
	alive(t, h, "worker-a")
}

func halfFrame(t *testing.T) {
	h := start(t, newMemBus(), func(o *tuning) {
		o.socket.PingInterval, o.socket.PongTimeout, o.socket.HelloTimeout = 100*time.Millisecond, 500*time.Millisecond, time.Second
	})
	for _, half := range [][]byte{{fin | opText}, header(fin|opText, 1000), append(header(opBinary, 100_000), make([]byte, 70_000)...), frame(opText, []byte("{"))} {
		r := openRaw(t, h, "worker-raw")
		r.send(half)
		require.Equal(t, noClose, r.ended())
		r = early(t, h)
		r.send(half)
		require.Equal(t, workerproto.CloseProtocol, r.ended())
	}
}

func halfClosed(t *testing.T) {
	b := newMemBus()
	h := start(t, b)
	for size := range 3 {
		// A chunk that is cut where the edge begins another read is no shorter chunk.
		r := openRaw(t, h, "worker-raw")
		l := h.assign("worker-raw")
		chunk, err := workerproto.EncodeChunk(l, workertest.Chunk(1, 0, make([]byte, 40_000)))
		require.NoError(t, err)
		r.send(append(header(fin|opBinary, uint64(len(chunk))), chunk[:[]int{0, 512, 16 << 10}[size]]...))
		require.NoError(t, r.Conn.(*net.TCPConn).CloseWrite())
		require.Equal(t, noClose, r.ended())
		eventually(t, "the worker is offline", func() bool { return !b.worker("worker-raw").Online })
		require.Empty(t, b.stored(l.JobID))
	}
	r := openRaw(t, h, "worker-raw")
	l := h.assign("worker-raw")
	chunk, err := workerproto.EncodeChunk(l, workertest.Chunk(1, 0, []byte("half")))
	require.NoError(t, err)
	r.send(frame(opBinary, chunk)) // and no further fragment
	require.NoError(t, r.Conn.(*net.TCPConn).CloseWrite())
	require.Equal(t, noClose, r.ended())
	require.Empty(t, b.stored(l.JobID))
}

func dataAfterClose(t *testing.T) {
	b := newMemBus()
	h := start(t, b)
	r := openRaw(t, h, "worker-raw")
	l := h.assign("worker-raw")
	chunk, err := workerproto.EncodeChunk(l, workertest.Chunk(1, 0, []byte("x")))
	require.NoError(t, err)
	result, err := workerproto.Encode(workerproto.TypeResult, workerproto.Result{Lease: l, Outcome: job.OutcomeFailed, FinishedAt: time.Now()})
	require.NoError(t, err)
	r.send(join(closing(1000), frame(fin|opBinary, chunk), frame(fin|opText, result)))
	require.Equal(t, 1000, r.closeCode())
	eventually(t, "the worker is offline", func() bool { return !b.worker("worker-raw").Online })
	require.Empty(t, b.stored(l.JobID))
	require.Empty(t, b.results)
}

// A worker cannot hold a socket that the edge has closed, by not ending what it
// sends: neither a frame over the limit, nor one that begins after the close.
func stalledClose(t *testing.T) {
	h := start(t, newMemBus(), func(o *tuning) { o.socket.MaxSessions = 1 })
	over := openRaw(t, h, "worker-raw")
	over.send(append(header(fin|opText, 1<<62), make([]byte, workerproto.MaxFrameBytes+2)...))
	require.Equal(t, int(websocket.StatusMessageTooBig), over.ended())

	var after *raw
	eventually(t, "there is room again", func() bool {
		r, code := dialRaw(t, h, "worker-raw")
		after = r
		return code == http.StatusSwitchingProtocols
	})
	after.send(frame(fin|opText, []byte(`{"type":"heartbeat"}`)))
	require.Equal(t, workerproto.CloseProtocol, after.closeCode())
	after.send(header(fin|opBinary, 1<<62))
	_, _, err := after.next()
	require.NotErrorIs(t, err, errTimeout(err), "the edge keeps the connection open")
	eventually(t, "there is room again", func() bool {
		_, code := dialRaw(t, h, "worker-raw")
		return code == http.StatusSwitchingProtocols
	})
}

func beforeHello(t *testing.T) {
	b := newMemBus()
	h := start(t, b)
	l := workertest.Lease()
	for _, typ := range []struct {
		name workerproto.Type
		body any
	}{
		{workerproto.TypeHeartbeat, workerproto.Heartbeat{Status: workerproto.StatusIdle}},
		{workerproto.TypeAccepted, workerproto.Progress{Lease: l, At: time.Now()}},
		{workerproto.TypeRejected, workerproto.Rejected{Lease: l}},
		{workerproto.TypeOutput, workerproto.Output{Lease: l, Chunks: []workerproto.Chunk{workertest.Chunk(1, 0, []byte("x"))}}},
		{workerproto.TypeResult, workerproto.Result{Lease: l, Outcome: job.OutcomeFailed, FinishedAt: time.Now()}},
		{workerproto.TypeWelcome, workerproto.Welcome{}},
		{"from the future", struct{}{}},
	} {
		c := workertest.Dial(t, h.url, "worker-early")
		c.Send(typ.name, typ.body)
		c.Send(workerproto.TypeHello, workertest.Hello("worker-early"))
		code, reason := c.Ended()
		require.Equal(t, workerproto.CloseProtocol, code, typ.name)
		require.Contains(t, reason, "hello must come first")
	}
	c := workertest.Dial(t, h.url, "worker-early")
	c.Chunk(l, workertest.Chunk(1, 0, []byte("x")))
	code, _ := c.Ended()
	require.Equal(t, workerproto.CloseProtocol, code)
	require.Empty(t, b.worker("worker-early").ID)
	require.Empty(t, b.stored(l.JobID))
	require.Empty(t, b.results)
	require.Empty(t, b.beats)
}

// progressOf lists what the scheduler was told about a lease's job.
func (b *memBus) progressOf(jobID string) (steps []workerproto.Type) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, r := range b.beats {
		for _, w := range r.Workers {
			for _, p := range w.Progress {
				if p.JobID == jobID {
					steps = append(steps, p.Step)
				}
			}
		}
	}
	return steps
}

func foreignProgress(t *testing.T) {
	b := newMemBus()
	h := start(t, b)
	owner, c := h.open("worker-owner"), h.open("worker-a")
	own, foreign := h.assign("worker-a"), h.assign("worker-owner")
	mixed, later := own, own
	mixed.JobID, later.Attempt = foreign.JobID, 2
	for _, l := range []workerproto.Lease{foreign, mixed, later, workertest.Lease()} {
		for _, step := range []workerproto.Type{workerproto.TypeAccepted, workerproto.TypePreparing, workerproto.TypeStarted} {
			c.Send(step, workerproto.Progress{Lease: l, At: time.Now()})
			require.Equal(t, []workerproto.Lease{l}, workertest.Decode[workerproto.Stale](t, c.NextOf(workerproto.TypeStale)).Leases)
		}
		c.Send(workerproto.TypeRejected, workerproto.Rejected{Lease: l, Reason: "no"})
		require.Equal(t, []workerproto.Lease{l}, workertest.Decode[workerproto.Stale](t, c.NextOf(workerproto.TypeStale)).Leases)
	}
	// The owners' own go on.
	c.Send(workerproto.TypeStarted, workerproto.Progress{Lease: own, At: time.Now()})
	owner.Send(workerproto.TypeRejected, workerproto.Rejected{Lease: foreign, Reason: "no"})
	eventually(t, "their progress is reported", func() bool { return len(b.progressOf(own.JobID)) > 0 && len(b.progressOf(foreign.JobID)) > 0 })
	require.Equal(t, []workerproto.Type{workerproto.TypeStarted}, b.progressOf(own.JobID))
	require.Equal(t, []workerproto.Type{workerproto.TypeRejected}, b.progressOf(foreign.JobID))
}

func badLeases(t *testing.T) {
	b := newMemBus()
	h := start(t, b)
	good := workertest.Lease()
	edit := func(f func(*workerproto.Lease)) workerproto.Lease {
		l := good
		f(&l)
		return l
	}
	for name, l := range map[string]workerproto.Lease{
		"attempt -1":      edit(func(l *workerproto.Lease) { l.Attempt = -1 }),
		"attempt 0":       edit(func(l *workerproto.Lease) { l.Attempt = 0 }),
		"lowest attempt":  edit(func(l *workerproto.Lease) { l.Attempt = math.MinInt }),
		"no job":          edit(func(l *workerproto.Lease) { l.JobID = "" }),
		"a subject":       edit(func(l *workerproto.Lease) { l.JobID = "job-*.>" }),
		"a path":          edit(func(l *workerproto.Lease) { l.JobID = "../../etc" }),
		"no lease":        edit(func(l *workerproto.Lease) { l.LeaseID = "" }),
		"a job for lease": edit(func(l *workerproto.Lease) { l.LeaseID = l.JobID }),
		"a long lease":    edit(func(l *workerproto.Lease) { l.LeaseID += strings.Repeat("0", 500) }),
	} {
		for typ, body := range map[workerproto.Type]any{
			workerproto.TypeHeartbeat: workerproto.Heartbeat{Status: workerproto.StatusBusy, Running: []workerproto.PhaseLease{{Lease: l}}},
			workerproto.TypeStarted:   workerproto.Progress{Lease: l, At: time.Now()},
			workerproto.TypeRejected:  workerproto.Rejected{Lease: l},
			workerproto.TypeOutput:    workerproto.Output{Lease: l, Chunks: []workerproto.Chunk{workertest.Chunk(1, 0, []byte("x"))}},
			workerproto.TypeResult:    workerproto.Result{Lease: l, Outcome: job.OutcomeFailed, FinishedAt: time.Now()},
		} {
			c := h.open("worker-a")
			c.Send(typ, body)
			code, reason := c.Ended()
			require.Equal(t, workerproto.CloseProtocol, code, "%s in %s: %s", name, typ, reason)
		}
	}
	require.Empty(t, b.results)
	require.Empty(t, b.chunks)
	require.Empty(t, b.progressOf(good.JobID))
}

func afterTheEnd(t *testing.T) {
	b := newMemBus()
	h := start(t, b)
	c := h.open("worker-a")
	l := h.assign("worker-a")
	c.Chunk(l, workertest.Chunk(1, 0, []byte("x")))
	c.NextOf(workerproto.TypeAck)
	c.Send(workerproto.TypeResult, workerproto.Result{Lease: l, Outcome: job.OutcomeSucceeded, FinishedAt: time.Now()})
	require.Equal(t, []workerproto.Lease{l}, workertest.Decode[workerproto.Ack](t, c.NextOf(workerproto.TypeAck)).Results)
	c.Chunk(l, workertest.Chunk(2, 1, []byte("y")))
	c.NextOf(workerproto.TypeStale)
	c.Send(workerproto.TypeStarted, workerproto.Progress{Lease: l, At: time.Now()})
	c.NextOf(workerproto.TypeStale)
	require.Len(t, b.stored(l.JobID), 1)
	require.Empty(t, b.progressOf(l.JobID))
}

// All that one worker can report at once, and the longest that it can be, goes
// to the scheduler in messages that the bus takes, and keeps up no other worker.
func manyReports(t *testing.T) {
	b := newMemBus()
	h := start(t, b)
	leases := make([]workerproto.Lease, workerproto.MaxRunning)
	running := make([]workerproto.PhaseLease, len(leases))
	for i := range leases {
		leases[i] = workertest.Lease()
		running[i] = workerproto.PhaseLease{Lease: leases[i], Phase: workerproto.PhasePreparing}
	}
	c, other := h.open("worker-a", leases...), h.open("worker-other")
	b.set(func() { b.scheduler = nil })
	text := strings.Repeat("<", job.MaxReasonBytes) // JSON makes six bytes of each
	c.Send(workerproto.TypeHeartbeat, workerproto.Heartbeat{ID: 1, Status: workerproto.StatusBusy, Running: running, Reason: text})
	rejected := leases[:1000]
	for i := range rejected {
		c.Send(workerproto.TypeRejected, workerproto.Rejected{Lease: leases[i], Reason: text})
	}
	c.Chunk(leases[0], workertest.Chunk(1, 0, []byte("x"))) // its answer comes when all before it were taken
	c.NextOf(workerproto.TypeStale)
	var largest atomic.Int64
	b.set(func() {
		b.scheduler = func(r busmsg.BeatRequest) (busmsg.BeatReply, error) {
			data, err := json.Marshal(r)
			if err != nil {
				return busmsg.BeatReply{}, err
			}
			largest.Store(max(largest.Load(), int64(len(data))))
			if len(data) > natsd.MaxPayload-4096 {
				return busmsg.BeatReply{}, errors.New("too large for the bus")
			}
			return confirmAll(r)
		}
	})
	other.Send(workerproto.TypeHeartbeat, workerproto.Heartbeat{ID: 1, Status: workerproto.StatusIdle})
	other.NextOf(workerproto.TypeBeat)
	c.NextOf(workerproto.TypeBeat)
	reported := func() map[string]bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		got := map[string]bool{}
		for _, r := range b.beats {
			for _, w := range r.Workers {
				for _, p := range w.Progress {
					got[p.LeaseID] = true
				}
			}
		}
		return got
	}
	eventually(t, "all is reported", func() bool { return len(reported()) == len(rejected) })
	c.Close()
	eventually(t, "the end is reported", func() bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		for _, w := range b.beats[len(b.beats)-1].Workers {
			if w.WorkerID == "worker-a" && w.Closed {
				return true
			}
		}
		return false
	})
	t.Logf("the largest request had %d bytes", largest.Load())
}

func lastYear(t *testing.T) {
	b := newMemBus()
	h := start(t, b)
	c := h.open("worker-a")
	l := h.assign("worker-a")
	chunk := workertest.Chunk(1, 0, []byte("x"))
	chunk.Time = time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC)
	c.Chunk(l, chunk)
	require.Equal(t, int64(1), workertest.Decode[workerproto.Ack](t, c.NextOf(workerproto.TypeAck)).AckedSeq)
	good, err := workerproto.EncodeChunk(l, workertest.Chunk(2, 1, []byte("x")))
	require.NoError(t, err)
	for _, bad := range []string{"9999-12-31T23:59:59-01:00", "10000-01-01T00:00:00Z", "yesterday"} {
		c := h.open("worker-a", l)
		n := binary.BigEndian.Uint32(good)
		var head map[string]any
		require.NoError(t, json.Unmarshal(good[4:4+n], &head))
		head["time"] = bad
		text := workertest.JSON(t, head)
		c.Write(websocket.MessageBinary, append(binary.BigEndian.AppendUint32(nil, uint32(len(text))), text+"x"...))
		code, reason := c.Ended()
		require.Equal(t, workerproto.CloseProtocol, code, "%s: %s", bad, reason)
	}
	require.Len(t, b.stored(l.JobID), 1)
}

func hugeChunk(t *testing.T) {
	b := newMemBus()
	h := start(t, b)
	for _, row := range []struct{ size, code int }{
		{workerproto.MaxChunkBytes, 0},
		{workerproto.MaxFrameBytes - 1024, workerproto.CloseProtocol},
		{workerproto.MaxFrameBytes, int(websocket.StatusMessageTooBig)},
	} {
		c := h.open("worker-a")
		l := h.assign("worker-a")
		c.Chunk(l, workertest.Chunk(1, 0, make([]byte, row.size)))
		if row.code == 0 {
			c.NextOf(workerproto.TypeAck)
			continue
		}
		code, _ := c.Ended()
		require.Equal(t, row.code, code)
		require.Empty(t, b.stored(l.JobID))
	}
}

// The edge stores what a command prints; showing it safely is up to who shows it.
func terminalBytes(t *testing.T) {
	b := newMemBus()
	h := start(t, b)
	c := h.open("worker-a")
	l := h.assign("worker-a")
	var all []byte
	for i := range 256 {
		all = append(all, byte(i))
	}
	all = append(all, "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x1b]52;c;aGk=\x1b\\ \u009b2J \r\b"...)
	c.Chunk(l, workertest.Chunk(1, 0, all))
	c.Send(workerproto.TypeOutput, workerproto.Output{Lease: l, Chunks: []workerproto.Chunk{workertest.Chunk(2, int64(len(all)), all)}})
	for workertest.Decode[workerproto.Ack](t, c.NextOf(workerproto.TypeAck)).AckedSeq < 2 {
	}
	for _, f := range b.stored(l.JobID) {
		_, chunk, err := workerproto.DecodeChunk(f)
		require.NoError(t, err)
		require.Equal(t, all, chunk.Data)
	}
}

func absurdHello(t *testing.T) {
	b := newMemBus()
	h := start(t, b)
	for name, claim := range map[string]func(*workerproto.Register){
		"slots 10^9":     func(r *workerproto.Register) { r.Slots = 1_000_000_000 },
		"slots below 0":  func(r *workerproto.Register) { r.Slots = math.MinInt },
		"backlog 10^9":   func(r *workerproto.Register) { r.Backlog = 1_000_000_000 },
		"backlog < 0":    func(r *workerproto.Register) { r.Backlog = -1 },
		"no cores":       func(r *workerproto.Register) { r.CPUCores = 0 },
		"10^9 cores":     func(r *workerproto.Register) { r.CPUCores = 1e9 },
		"cores below 0":  func(r *workerproto.Register) { r.CPUCores = -1 },
		"memory":         func(r *workerproto.Register) { r.TotalMemory = math.MaxInt64 },
		"memory below 0": func(r *workerproto.Register) { r.TotalMemory = -1 },
		"10,000 labels": func(r *workerproto.Register) {
			r.Labels = map[string]string{}
			for i := range 10_000 {
				r.Labels[fmt.Sprintf("label-%d", i)] = "x"
			}
		},
		"a long label":      func(r *workerproto.Register) { r.Labels = map[string]string{"a": strings.Repeat("x", 100_000)} },
		"a label's name":    func(r *workerproto.Register) { r.Labels = map[string]string{"$where": "x"} },
		"10,000 executors":  func(r *workerproto.Register) { r.Executors = make([]string, 10_000) },
		"a long host name":  func(r *workerproto.Register) { r.Hostname = strings.Repeat("x", 100_000) },
		"a terminal's host": func(r *workerproto.Register) { r.Hostname = "\x1b]0;x\x07" },
		"5,000 leases":      func(r *workerproto.Register) { r.Running = make([]workerproto.RunningLease, 5_000) },
		"lowest protocol":   func(r *workerproto.Register) { r.Protocol = math.MinInt },
	} {
		t.Run(name, func(t *testing.T) {
			r := workertest.Hello("worker-absurd")
			claim(&r)
			c := workertest.Dial(t, h.url, "worker-absurd")
			c.Send(workerproto.TypeHello, r)
			code, reason := c.Ended()
			require.Equal(t, workerproto.CloseProtocol, code, reason)
			require.NotContains(t, reason, "x\x07")
		})
	}
	for _, number := range []string{"1e400", "1.5", "99999999999999999999", `"4"`, "null "} {
		c := workertest.Dial(t, h.url, "worker-absurd")
		c.Text(`{"type":"hello","workerId":"worker-absurd","os":"linux","arch":"amd64","cpuCores":1,"totalMemory":1073741824,"protocol":1,"slots":` + number + `}`)
		code, reason := c.Ended()
		require.Equal(t, workerproto.CloseProtocol, code, "%s: %s", number, reason)
	}
	require.Empty(t, b.worker("worker-absurd").ID, "nothing was registered")
	require.Empty(t, b.beats)
}

func absurdHeartbeat(t *testing.T) {
	b := newMemBus()
	h := start(t, b)
	for name, row := range map[string]string{
		"10^9 free slots":     `"freeSlots":1000000000`,
		"free slots below 0":  `"freeSlots":-1`,
		"free slots too long": `"freeSlots":99999999999999999999`,
		"free slots by half":  `"freeSlots":0.5`,
		"usage too large":     `"cpuUsage":1e999`,
		"usage no number":     `"cpuUsage":NaN`,
		"5,000 leases":        `"running":[` + strings.TrimSuffix(strings.Repeat("{},", 5000), ",") + `]`,
		"a long phase":        `"running":[` + strings.TrimSuffix(workertest.JSON(t, workertest.Lease()), "}") + `,"phase":"` + strings.Repeat("<", 900_000) + `"}]`,
		"deep":                `"x":` + strings.Repeat("[", 20_000) + strings.Repeat("]", 20_000),
	} {
		t.Run(name, func(t *testing.T) {
			c := h.open("worker-a")
			c.Text(`{"type":"heartbeat","status":"idle",` + row + `}`)
			code, reason := c.Ended()
			require.Equal(t, workerproto.CloseProtocol, code, reason)
		})
	}
	b.set(func() { b.beats = nil })
	c := h.open("worker-a")
	c.Send(workerproto.TypeHeartbeat, workerproto.Heartbeat{ID: 1, Status: workerproto.StatusIdle, CPUUsage: -1, RAMUsage: 1e300, Reason: strings.Repeat("ä", 100_000)})
	c.NextOf(workerproto.TypeBeat)
	b.mu.Lock()
	defer b.mu.Unlock()
	got := b.beats[len(b.beats)-1].Workers[0].Heartbeat
	require.Zero(t, got.CPUUsage)
	require.Less(t, got.RAMUsage, 1e9, "MiB")
	require.LessOrEqual(t, len(got.Reason), job.MaxReasonBytes)
}

func takeovers(t *testing.T) {
	b := newMemBus()
	h := start(t, b, func(o *tuning) { o.socket.MaxSessions = 1000 })
	const many = 100
	clients := make([]*workertest.Client, many)
	for i := range clients {
		clients[i] = workertest.Dial(t, h.url, "worker-a")
		clients[i].Send(workerproto.TypeHello, workertest.Hello("worker-a"))
	}
	// The edge may read the hellos in another order than they were sent in.
	var live []*workertest.Client
	require.Eventually(t, func() bool {
		live = slices.DeleteFunc(slices.Clone(clients), (*workertest.Client).HasEnded)
		return len(live) == 1
	}, 3*workertest.Wait, 10*time.Millisecond)
	last := live[0]
	for _, c := range clients {
		if c != last {
			code, reason := c.Ended()
			require.Equal(t, workerproto.CloseReplaced, code, reason)
		}
	}
	last.NextOf(workerproto.TypeWelcome)
	require.Equal(t, 1, b.serving("worker-a"))
	require.True(t, b.worker("worker-a").Online)
	l := h.assign("worker-a")
	require.Equal(t, l, workertest.Decode[workerproto.Assign](t, last.NextOf(workerproto.TypeAssign)).Assignments[0].Lease)
}

func withoutHello(t *testing.T) {
	const most = 20
	h := start(t, newMemBus(), func(o *tuning) {
		o.socket.MaxPendingPerIP, o.socket.HelloTimeout = most, 2*time.Second
	})
	goroutines := runtime.NumGoroutine()
	in := 0
	var waiting []*raw
	bounded(t, func() {
		for i := range 300 {
			r, code := dialRaw(t, h, fmt.Sprintf("worker-%d", i))
			if code == http.StatusSwitchingProtocols {
				in++
				waiting = append(waiting, r)
				continue
			}
			require.Equal(t, http.StatusTooManyRequests, code)
			_ = r.Close()
		}
	})
	require.GreaterOrEqual(t, in, most)
	for _, r := range waiting {
		require.Equal(t, workerproto.CloseProtocol, r.closeCode())
		_ = r.Close()
	}
	alive(t, h, "worker-a")
	eventually(t, "nothing is left of them", func() bool { return runtime.NumGoroutine() <= goroutines+10 })
}
