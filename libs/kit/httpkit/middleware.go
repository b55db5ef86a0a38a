package httpkit

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"runtime/debug"
	"strings"
	"time"
)

// Middleware wraps a handler.
type Middleware = func(http.Handler) http.Handler

const requestIDHeader = "X-Request-Id"

type requestIDKey struct{}

// RequestID takes over the client's X-Request-Id if it is 1 to 128 letters, digits, dots, dashes and underscores, makes one otherwise, puts it
// in the context and echoes it in the response.
func RequestID(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id := r.Header.Get(requestIDHeader)
		if !isSaneID(id) {
			id = strings.ToLower(rand.Text())
		}
		w.Header().Set(requestIDHeader, id)
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), requestIDKey{}, id)))
	})
}

// RequestIDFrom returns the request's id, or "" outside of RequestID.
func RequestIDFrom(ctx context.Context) string {
	id, _ := ctx.Value(requestIDKey{}).(string)
	return id
}

func isSaneID(id string) bool {
	if id == "" || len(id) > 128 {
		return false
	}
	for i := range len(id) {
		c := id[i]
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-', c == '_', c == '.':
		default:
			return false
		}
	}
	return true
}

// Recover turns a panic of the handler into a 500 problem and logs it with its stack. If the response has already begun, the connection is
// cut, so that the client does not take half an answer for a whole one. onPanic, if not nil, is called for each (to count them).
func Recover(logger *slog.Logger, onPanic func()) Middleware {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			rec := &recorder{ResponseWriter: w}
			defer func() {
				v := recover()
				if v == nil {
					return
				}
				if err, ok := v.(error); ok && errors.Is(err, http.ErrAbortHandler) {
					panic(v) // the handler asked for it
				}
				logger.ErrorContext(r.Context(), "handler panicked",
					"panic", fmt.Sprint(v), "stack", string(debug.Stack()), "requestId", RequestIDFrom(r.Context()))
				if onPanic != nil {
					onPanic()
				}
				if rec.status != 0 {
					panic(http.ErrAbortHandler)
				}
				Write(w, r, Problem{
					Status: http.StatusInternalServerError, Code: "internal_error", Detail: "the server made a mistake",
					Hint: "report it with the request id",
				})
			}()
			next.ServeHTTP(rec, r)
		})
	}
}

// SecurityHeaders forbids content sniffing and caching. It allows no other origin: there are no CORS headers.
func SecurityHeaders(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Cache-Control", "no-store")
		next.ServeHTTP(w, r)
	})
}

// AccessLog logs each request at debug level when it is done; it costs nothing when that level is off. Queries and headers are left out.
func AccessLog(logger *slog.Logger) Middleware {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if !logger.Enabled(r.Context(), slog.LevelDebug) {
				next.ServeHTTP(w, r)
				return
			}
			start := time.Now()
			rec := &recorder{ResponseWriter: w}
			defer func() {
				// Without a status the handler wrote nothing, which net/http answers with 200, or took over the connection.
				logger.DebugContext(r.Context(), "request served",
					"method", r.Method, "path", r.URL.Path, "status", rec.status, "bytes", rec.bytes,
					"durationMs", time.Since(start).Milliseconds(), "requestId", w.Header().Get(requestIDHeader))
			}()
			next.ServeHTTP(rec, r)
		})
	}
}

// MaxBody refuses a request whose declared length is over n bytes with 413, and makes reading more than n bytes of a body fail with
// *http.MaxBytesError.
func MaxBody(n int64) Middleware {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.ContentLength > n {
				w.Header().Set("Connection", "close") // the body is not read
				Write(w, r, tooLarge(n))
				return
			}
			r.Body = http.MaxBytesReader(w, r.Body, n)
			next.ServeHTTP(w, r)
		})
	}
}

func tooLarge(n int64) Problem {
	return Problem{
		Status: http.StatusRequestEntityTooLarge, Code: "body_too_large",
		Detail: fmt.Sprintf("the body must be at most %d bytes", n),
	}
}

// recorder remembers what was sent. Unwrap lets http.ResponseController and websocket libraries reach the connection.
type recorder struct {
	http.ResponseWriter
	status int // 0 until the header was written
	bytes  int64
}

func (r *recorder) WriteHeader(status int) {
	// 1xx are only announcements, except that 101 gives the connection away.
	if r.status == 0 && (status >= 200 || status == http.StatusSwitchingProtocols) {
		r.status = status
	}
	r.ResponseWriter.WriteHeader(status)
}

func (r *recorder) Write(p []byte) (int, error) {
	if r.status == 0 {
		r.status = http.StatusOK
	}
	n, err := r.ResponseWriter.Write(p)
	r.bytes += int64(n)
	return n, err
}

// Flush implements http.Flusher for code that asks for it directly.
func (r *recorder) Flush() {
	if r.status == 0 {
		r.status = http.StatusOK
	}
	_ = http.NewResponseController(r.ResponseWriter).Flush()
}

func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }
