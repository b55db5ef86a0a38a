package gateway

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humachi"

	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/httpkit"
)

// Limits of a page of output.
const (
	defaultChunks = 200
	maxChunks     = 1000
)

type logsInput struct {
	JobID       string   `path:"jobId" doc:"The job's id."`
	Attempt     intText  `query:"attempt" doc:"Number of the attempt; the newest if absent."`
	Stream      string   `query:"stream" enum:"stdout,stderr,system" doc:"Only this stream; all in order if absent."`
	After       intText  `query:"after" doc:"Only what comes after this seq."`
	Limit       intText  `query:"limit" doc:"Items per page, 200 if absent, at most 1000."`
	Follow      boolText `query:"follow" doc:"Stay and send output as it comes, until the job has ended."`
	Format      string   `query:"format" enum:"json,text" doc:"text: plain bytes. Default by Accept, else json."`
	Accept      string   `header:"Accept" hidden:"true"`
	Range       string   `header:"Range" doc:"For text/plain: bytes=first-last, bytes=first- or bytes=-count. Holds once the attempt's output is stored; the whole is sent else."`
	IfRange     string   `header:"If-Range" hidden:"true"`
	LastEventID string   `header:"Last-Event-ID" doc:"attempt-seq of the last event that was seen: go on after it."`
}

const textType = "text/plain; charset=utf-8"

// raw is the output of handlers that write by themselves.
type raw struct{ Body func(huma.Context) }

// respond makes raw of an ordinary handler.
func respond(h func(w http.ResponseWriter, r *http.Request)) *raw {
	return &raw{Body: func(hctx huma.Context) {
		r, w := humachi.Unwrap(hctx)
		h(w, r)
	}}
}

// logQuery is what a caller wants of a job's output.
type logQuery struct {
	attempt  int // 0: the newest
	stream   workerproto.Stream
	after    int64
	limit    int
	follow   bool
	text     bool
	resuming bool // by Last-Event-ID
	span     *byteRange
}

func parseLogs(in *logsInput) (logQuery, error) {
	q := logQuery{limit: defaultChunks, stream: workerproto.Stream(in.Stream)}
	if in.Stream != "" && !q.stream.Valid() {
		return q, badParameter("stream", "stdout, stderr or system")
	}
	n, err := in.Attempt.int("attempt")
	if err != nil || in.Attempt != "" && (n < 1 || n > 1<<30) {
		return q, badParameter("attempt", "a whole number from 1")
	}
	q.attempt = int(n)
	if q.after, err = in.After.int("after"); err != nil {
		return q, err
	}
	if in.Limit != "" {
		n, err := in.Limit.int("limit")
		if err != nil || n < 1 || n > maxChunks {
			return q, badParameter("limit", "from 1 to "+strconv.Itoa(maxChunks))
		}
		q.limit = int(n)
	}
	if q.follow, err = in.Follow.bool("follow"); err != nil {
		return q, err
	}
	switch in.Format {
	case "text":
		q.text = true
	case "":
		q.text = accepts(in.Accept, "text/plain")
	case "json":
	default:
		return q, badParameter("format", "json or text")
	}
	if q.follow && in.LastEventID != "" {
		attempt, seq, ok := parseEventID(in.LastEventID)
		if !ok {
			return q, badParameter("Last-Event-ID", "attempt-seq, as the id of the last event was")
		}
		q.attempt, q.after, q.resuming = attempt, seq, true
	}
	return q, nil
}

func eventID(attempt int, seq int64) string {
	return strconv.Itoa(attempt) + "-" + strconv.FormatInt(seq, 10)
}

func parseEventID(s string) (attempt int, seq int64, ok bool) {
	a, b, ok := strings.Cut(s, "-")
	if !ok {
		return 0, 0, false
	}
	attempt, err := strconv.Atoi(a)
	if err != nil || attempt < 1 || attempt > 1<<30 {
		return 0, 0, false
	}
	seq, err = strconv.ParseInt(b, 10, 64)
	return attempt, seq, err == nil && seq >= 0
}

func (s *Service) jobLogs(ctx context.Context, c *call, in *logsInput) (*raw, error) {
	rec, err := s.visible(ctx, c, in.JobID)
	if err != nil {
		return nil, err
	}
	q, err := parseLogs(in)
	if err != nil {
		return nil, err
	}
	if q.attempt > rec.Attempt {
		return nil, &httpkit.Problem{
			Status: http.StatusNotFound, Code: codeAttemptNotFound, Detail: "the job has no such attempt", JobID: rec.ID,
		}
	}
	if span, ok := parseRange(in.Range); ok && in.IfRange == "" { // there are no validators that could match
		q.span = &span
	}
	switch {
	case q.follow:
		if rec.State.Terminal() && rec.Attempt > 0 { // all there is is in the database
			if err := s.logsAnswer(ctx, rec.ID); err != nil {
				return nil, err
			}
		}
		return respond(func(w http.ResponseWriter, r *http.Request) { s.followLogs(w, r, c, rec, q) }), nil
	case q.text:
		return s.textLogs(ctx, c, rec, q)
	}
	page, err := s.logPage(ctx, rec, q)
	if err != nil {
		return nil, err
	}
	return respond(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_ = writeJSON(w, page) // these types always marshal
	}), nil
}

// logPage is one page of what is stored.
func (s *Service) logPage(ctx context.Context, rec *job.Record, q logQuery) (api.Logs, error) {
	if q.attempt == 0 {
		q.attempt = rec.Attempt
	}
	out := api.Logs{Items: []api.LogItem{}, NextAfter: q.after}
	if q.attempt == 0 { // nothing ran yet, or ever
		out.EOF = rec.State.Terminal()
		out.Complete = out.EOF
		return out, nil
	}
	stored, err := s.storedLogs(ctx, busmsg.GetLogs{
		JobID: rec.ID, Attempt: q.attempt, Stream: q.stream, After: q.after, Limit: q.limit, MaxBytes: historyBytes,
	})
	if err != nil {
		s.logger.DebugContext(ctx, "database not asked", "err", err)
		return out, databaseAway()
	}
	end := endOf(rec, q.attempt)
	late := end.ended && time.Since(end.at) > s.archiveWait // nothing more will be stored
	chunks, more := stored.Chunks, stored.More
	if q.stream == "" && !late {
		// What is missing in the middle will be stored in a moment: stop before it.
		for i := range chunks {
			if chunks[i].Seq != q.after+int64(i)+1 {
				chunks, more = chunks[:i], true
				break
			}
		}
	}
	for i := range chunks {
		out.Items = append(out.Items, logItem(&chunks[i]))
		out.NextAfter = chunks[i].Seq
	}
	if m := end.manifest; m != nil {
		out.TruncatedBytes = m.TruncatedBytes
		out.Complete = stored.StoredChunks >= m.Chunks && m.TruncatedBytes == 0
	}
	if end.silent {
		out.Complete = true
	}
	if stored.Verdict.Bad() {
		out.Complete = false
	}
	switch {
	case !end.ended || more:
	case end.silent, late:
		out.EOF = true
	case end.manifest != nil:
		out.EOF = stored.StoredChunks >= end.manifest.Chunks
	}
	return out, nil
}

func logItem(c *workerproto.Chunk) api.LogItem {
	item := api.LogItem{Seq: c.Seq, Offset: c.Offset, Stream: c.Stream, Time: c.Time}
	if utf8.Valid(c.Data) {
		item.Data = string(c.Data)
	} else {
		item.DataBase64 = c.Data
	}
	return item
}

// begin makes a follower of what a caller asked for.
func (s *Service) begin(rec *job.Record, q logQuery) *follower {
	f := &follower{s: s, rec: rec, attempt: q.attempt, last: q.after}
	if f.attempt == 0 {
		f.attempt = rec.Attempt
	}
	return f
}

// textLogs streams what is stored of one attempt as plain bytes. Where the
// attempt has ended it waits, for a bounded time, until all of it is stored.
func (s *Service) textLogs(ctx context.Context, c *call, rec *job.Record, q logQuery) (*raw, error) {
	if q.attempt == 0 {
		q.attempt = rec.Attempt
	}
	if q.attempt > 0 {
		if part, err := s.rangeOf(ctx, c, rec, q); part != nil || err != nil {
			return part, err
		}
		if err := s.logsAnswer(ctx, rec.ID); err != nil {
			return nil, err
		}
	}
	return respond(func(w http.ResponseWriter, r *http.Request) {
		ctx, done, ok := s.enterStream(w, r, c)
		if !ok {
			return
		}
		defer done()
		announce(w.Header(), rec, q.attempt)
		if q.attempt == 0 || endOf(rec, q.attempt).ended {
			w.Header().Set("Accept-Ranges", "bytes")
		}
		out := openStream(w, textType)
		if q.attempt == 0 {
			conclude(w.Header(), rec.State.Terminal()) // nothing ran: nothing was printed
			return
		}
		f := s.begin(rec, q)
		f.only = true
		f.emit, f.flush = textSink(out, q.stream), out.flush
		var err error
		if endOf(rec, q.attempt).ended {
			err = f.run(ctx)
		} else {
			_, err = f.pull(ctx)
		}
		conclude(w.Header(), f.complete)
		s.cut(ctx, cmp.Or(err, out.flush()))
	}), nil
}

// logsAnswer asks whether the database answers, before the headers of a stream
// are sent: afterwards nothing can be refused.
func (s *Service) logsAnswer(ctx context.Context, jobID string) error {
	if _, err := s.storedLogs(ctx, busmsg.GetLogs{JobID: jobID, Attempt: 1, Limit: 1, MaxBytes: 1}); err != nil {
		s.logger.DebugContext(ctx, "database not asked", "err", err)
		return databaseAway()
	}
	return nil
}

func textSink(out *stream, only workerproto.Stream) func(int, *workerproto.Chunk) error {
	return func(_ int, c *workerproto.Chunk) error {
		if only != "" && c.Stream != only {
			return nil
		}
		return out.write(c.Data)
	}
}

// followLogs streams output as it comes.
func (s *Service) followLogs(w http.ResponseWriter, r *http.Request, c *call, rec *job.Record, q logQuery) {
	ctx, done, ok := s.enterStream(w, r, c)
	if !ok {
		return
	}
	defer done()
	f := s.begin(rec, q)
	if q.text {
		announce(w.Header(), rec, f.attempt)
		out := openStream(w, textType)
		f.emit, f.flush = textSink(out, q.stream), out.flush
		err := cmp.Or(f.run(ctx), out.flush())
		conclude(w.Header(), f.complete)
		s.cut(ctx, err)
		return
	}
	s.cut(ctx, s.streamOutput(ctx, w, f, q.stream))
}

// streamOutput sends a job's output as events, and the job at its end.
func (s *Service) streamOutput(ctx context.Context, w http.ResponseWriter, f *follower, only workerproto.Stream) error {
	out := openStream(w, "text/event-stream")
	f.alive, f.flush = out.comment, out.flush
	f.emit = func(attempt int, c *workerproto.Chunk) error {
		if only != "" && c.Stream != only {
			return nil
		}
		return out.event(eventID(attempt, c.Seq), "output", logItem(c))
	}
	if err := f.run(ctx); err != nil {
		return err
	}
	return cmp.Or(out.event("", "end", f.ended()), out.flush())
}

// cut breaks the connection of a stream that did not reach its end, so that the
// client does not take a part for the whole.
func (s *Service) cut(ctx context.Context, err error) {
	if err == nil {
		return
	}
	if !errors.Is(err, context.Canceled) && !errors.Is(err, errStopping) {
		s.logger.DebugContext(ctx, "stream ended early", "err", err)
	}
	panic(http.ErrAbortHandler)
}
