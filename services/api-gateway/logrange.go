package gateway

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/httpkit"
)

// The headers by which output as plain bytes says what it is. Where the whole is
// not known at its beginning, Log-Complete is a trailer.
const (
	headerComplete  = "Log-Complete"        // true: everything that was printed is here
	headerTruncated = "Log-Truncated-Bytes" // printed and not kept; the log says where
)

// announce sets what is known of a text before its first byte.
func announce(h http.Header, rec *job.Record, attempt int) {
	h.Set("Trailer", headerComplete)
	if m := endOf(rec, attempt).manifest; m != nil {
		h.Set(headerTruncated, strconv.FormatInt(m.TruncatedBytes, 10))
	}
}

// conclude sets the trailer.
func conclude(h http.Header, complete bool) { h.Set(headerComplete, strconv.FormatBool(complete)) }

// byteRange is what a Range header asks for. Last is -1 for the end; First is -1
// where Last is how many of the last bytes are wanted.
type byteRange struct{ first, last int64 }

// parseRange reads a header that asks for one range of bytes. Others are to be
// ignored, as RFC 9110 allows: the answer is the whole then.
func parseRange(header string) (byteRange, bool) {
	spec, ok := strings.CutPrefix(header, "bytes=")
	from, to, dash := strings.Cut(spec, "-")
	if !ok || !dash {
		return byteRange{}, false
	}
	number := func(text string) (int64, bool) {
		if text == "" {
			return -1, true
		}
		n, err := strconv.ParseUint(text, 10, 63)
		return int64(n), err == nil && text[0] != '+'
	}
	r := byteRange{}
	okFirst, okLast := false, false
	r.first, okFirst = number(from)
	r.last, okLast = number(to)
	switch {
	case !okFirst || !okLast, r.first < 0 && r.last < 0, r.first >= 0 && r.last >= 0 && r.last < r.first:
		return byteRange{}, false
	}
	return r, true
}

// within places a range in a text of size bytes, from inclusive, to exclusive. It
// is not ok where none of its bytes are in there.
func (r byteRange) within(size int64) (from, to int64, ok bool) {
	switch {
	case r.first < 0:
		from, to = max(0, size-r.last), size
	case r.last < 0:
		from, to = r.first, size
	default:
		from, to = r.first, min(size, r.last+1)
	}
	return from, to, from < to
}

// rangeOf answers a request for a part of the text, or nil where the whole is to be
// sent: of an attempt that has not ended, or whose output is still being stored,
// nobody knows the bytes.
func (s *Service) rangeOf(ctx context.Context, c *call, rec *job.Record, q logQuery) (*raw, error) {
	end := endOf(rec, q.attempt)
	if q.span == nil || q.after > 0 || !end.ended {
		return nil, nil
	}
	size := int64(0)
	var stored busmsg.Logs
	var err error
	if q.stream == "" {
		stored, err = s.storedLogs(ctx, busmsg.GetLogs{JobID: rec.ID, Attempt: q.attempt, Limit: 1, MaxBytes: 1})
		size = stored.StoredBytes
	} else {
		stored, err = s.eachChunk(ctx, rec.ID, q, func(c *workerproto.Chunk) error { size += int64(len(c.Data)); return nil })
	}
	if err != nil {
		s.logger.DebugContext(ctx, "database not asked", "err", err)
		return nil, databaseAway()
	}
	settledNow := end.silent || end.manifest != nil && stored.StoredChunks >= end.manifest.Chunks || time.Since(end.at) > s.archiveWait
	if !settledNow {
		return nil, nil
	}
	complete := end.complete(stored.StoredChunks) && !stored.Verdict.Bad()
	from, to, ok := q.span.within(size)
	return respond(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Accept-Ranges", "bytes")
		if !ok {
			h.Set("Content-Range", fmt.Sprintf("bytes */%d", size))
			httpkit.Write(w, r, httpkit.Problem{
				Status: http.StatusRequestedRangeNotSatisfiable, Code: codeBadRange, Detail: "the output has no such bytes",
				Hint: "see Content-Range for how many there are",
			})
			return
		}
		ctx, done, ok := s.enterStream(w, r, c)
		if !ok {
			return
		}
		defer done()
		announce(h, rec, q.attempt)
		h.Del("Trailer") // the length of the part is known, and so is the rest
		conclude(h, complete)
		h.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to-1, size))
		h.Set("Content-Length", strconv.FormatInt(to-from, 10))
		out := openStatus(w, textType, http.StatusPartialContent)
		at := int64(0)
		_, err := s.eachChunk(ctx, rec.ID, q, func(c *workerproto.Chunk) error {
			begin, end := max(from-at, 0), min(to-at, int64(len(c.Data)))
			at += int64(len(c.Data))
			if begin < end {
				if err := out.write(c.Data[begin:end]); err != nil {
					return err
				}
			}
			if at >= to {
				return errEnough
			}
			return nil
		})
		if errors.Is(err, errEnough) {
			err = nil
		}
		s.cut(ctx, cmp.Or(err, out.flush()))
	}), nil
}

// eachChunk hands on what is stored of one attempt, in order, and returns the last
// answer, for what it says of the whole attempt.
func (s *Service) eachChunk(ctx context.Context, jobID string, q logQuery, handle func(*workerproto.Chunk) error) (busmsg.Logs, error) {
	after := int64(0)
	for {
		page, err := s.storedLogs(ctx, busmsg.GetLogs{
			JobID: jobID, Attempt: q.attempt, Stream: q.stream, After: after, Limit: historyChunks, MaxBytes: historyBytes,
		})
		if err != nil {
			return page, err
		}
		for i := range page.Chunks {
			if err := handle(&page.Chunks[i]); err != nil {
				return page, err
			}
			after = page.Chunks[i].Seq
		}
		if !page.More || len(page.Chunks) == 0 {
			return page, nil
		}
	}
}
