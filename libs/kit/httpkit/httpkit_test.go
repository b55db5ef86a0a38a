package httpkit

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }

func decodeProblem(t *testing.T, w *httptest.ResponseRecorder) Problem {
	t.Helper()
	require.Equal(t, "application/problem+json", w.Header().Get("Content-Type"))
	var p Problem
	require.NoError(t, json.Unmarshal(w.Body.Bytes(), &p))
	require.Equal(t, w.Code, p.Status)
	return p
}

func TestWriteProblem(t *testing.T) {
	w := httptest.NewRecorder()
	w.Header().Set("Etag", "x")
	r := httptest.NewRequest(http.MethodGet, "/canary?q=canary", nil)
	r.Header.Set("X-Request-Id", "req-1")
	RequestID(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		Write(w, r, Problem{
			Status: 503, Code: "queue_full", Detail: "d", Hint: "h", JobID: "job-1", RetryAfter: 1500 * time.Millisecond,
			Errors: []FieldError{{Field: "timeout", Code: "out_of_range", Detail: "e"}},
		})
	})).ServeHTTP(w, r)
	require.JSONEq(t, `{"type":"about:blank","title":"Service Unavailable","status":503,"code":"queue_full","detail":"d","hint":"h",
		"instance":"urn:request:req-1","requestId":"req-1","errors":[{"field":"timeout","code":"out_of_range","detail":"e"}],
		"jobId":"job-1"}`, w.Body.String())
	require.Equal(t, "2", w.Header().Get("Retry-After"))
	require.Empty(t, w.Header().Get("Etag"))
	require.NotContains(t, w.Body.String(), "canary")

	w = httptest.NewRecorder()
	Write(w, httptest.NewRequest(http.MethodGet, "/", nil), Problem{Status: 401, Code: "unauthorized"})
	require.JSONEq(t, `{"type":"about:blank","title":"Unauthorized","status":401,"code":"unauthorized"}`, w.Body.String())
	require.Equal(t, "Bearer", w.Header().Get("WWW-Authenticate"))

	w = httptest.NewRecorder()
	Write(w, httptest.NewRequest(http.MethodGet, "/", nil), Problem{})
	require.Equal(t, 500, decodeProblem(t, w).Status)
	require.EqualError(t, &Problem{Code: "c", Detail: "d"}, "c: d")
}

func TestRequestID(t *testing.T) {
	for in, kept := range map[string]bool{
		"abc-1_2.3": true, strings.Repeat("a", 128): true, "": false, strings.Repeat("a", 129): false, "a b": false, "a\nb": false, "ä": false,
		"<script>": false,
	} {
		var seen string
		w := httptest.NewRecorder()
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		r.Header.Set("X-Request-Id", in)
		RequestID(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { seen = RequestIDFrom(r.Context()) })).ServeHTTP(w, r)
		require.Equal(t, seen, w.Header().Get("X-Request-Id"))
		require.True(t, isSaneID(seen))
		require.Equal(t, kept, seen == in, in)
	}
	require.Empty(t, RequestIDFrom(t.Context()))
}

func TestRecover(t *testing.T) {
	var logs bytes.Buffer
	panics := 0
	wrap := func(h http.HandlerFunc) http.Handler {
		return RequestID(Recover(slog.New(slog.NewJSONHandler(&logs, nil)), func() { panics++ })(h))
	}
	w := httptest.NewRecorder()
	wrap(func(http.ResponseWriter, *http.Request) { panic("canary") }).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/", nil))
	p := decodeProblem(t, w)
	require.Equal(t, "internal_error", p.Code)
	require.NotEmpty(t, p.RequestID)
	require.NotContains(t, w.Body.String(), "canary")
	require.Equal(t, 1, panics)
	require.Contains(t, logs.String(), "canary")
	require.Contains(t, logs.String(), "TestRecover")
	require.Contains(t, logs.String(), p.RequestID)

	require.PanicsWithValue(t, http.ErrAbortHandler, func() {
		wrap(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "half"); panic("x") }).
			ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, "/", nil))
	}, "half an answer is cut")
	require.Equal(t, 2, panics)
	require.PanicsWithValue(t, http.ErrAbortHandler, func() {
		wrap(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }).
			ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, "/", nil))
	})
	require.Equal(t, 2, panics, "an abort is not a mistake")
}

func TestSecurityHeaders(t *testing.T) {
	w := httptest.NewRecorder()
	r := httptest.NewRequest(http.MethodOptions, "/", nil)
	r.Header.Set("Origin", "https://evil.example")
	SecurityHeaders(http.NotFoundHandler()).ServeHTTP(w, r)
	require.Equal(t, "nosniff", w.Header().Get("X-Content-Type-Options"))
	require.Equal(t, "no-store", w.Header().Get("Cache-Control"))
	for name := range w.Header() {
		require.False(t, strings.HasPrefix(name, "Access-Control-"), name)
	}
}

func TestAccessLog(t *testing.T) {
	var logs bytes.Buffer
	for level, want := range map[slog.Level]bool{slog.LevelDebug: true, slog.LevelInfo: false} {
		logs.Reset()
		logger := slog.New(slog.NewJSONHandler(&logs, &slog.HandlerOptions{Level: level}))
		h := RequestID(AccessLog(logger)(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusTeapot)
			_, _ = io.WriteString(w, "short")
		})))
		h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, "/a?token=canary", nil))
		require.Equal(t, want, logs.Len() > 0)
		require.NotContains(t, logs.String(), "canary")
		if want {
			var line map[string]any
			require.NoError(t, json.Unmarshal(logs.Bytes(), &line))
			require.Equal(t, "/a", line["path"])
			require.EqualValues(t, 418, line["status"])
			require.EqualValues(t, 5, line["bytes"])
			require.NotEmpty(t, line["requestId"])
		}
	}
}

func TestMaxBody(t *testing.T) {
	h := MaxBody(4)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.ReadAll(r.Body); err != nil {
			_, ok := errors.AsType[*http.MaxBytesError](err)
			require.True(t, ok)
			w.WriteHeader(http.StatusRequestEntityTooLarge)
		}
	}))
	for body, status := range map[string]int{"": 200, "1234": 200, "12345": 413} {
		for _, chunked := range []bool{false, true} {
			r := httptest.NewRequest(http.MethodPost, "/", strings.NewReader(body))
			if chunked {
				r.ContentLength = -1
			}
			w := httptest.NewRecorder()
			h.ServeHTTP(w, r)
			require.Equal(t, status, w.Code, "%q chunked=%v", body, chunked)
		}
	}
}

func TestBearerToken(t *testing.T) {
	for in, want := range map[string]string{
		"Bearer abc.def": "abc.def", "bearer x": "x", "BEARER x": "x", "": "", "Bearer": "", "Bearer ": "", "bearer  x": "", "Bearer a b": "",
		"Basic abc": "", "Bearerabc": "", " Bearer x": "", "Bearer x ": "", "Bearer\tx": "", "Bearer a\tb": "", "Bearer ä": "", "Bearer a\x7f": "",
		"x": "",
	} {
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		r.Header.Set("Authorization", in)
		got, ok := BearerToken(r)
		require.Equal(t, want, got, "%q", in)
		require.Equal(t, want != "", ok, "%q", in)
	}
	r := httptest.NewRequest(http.MethodGet, "/", nil)
	_, ok := BearerToken(r)
	require.False(t, ok)
	r.Header["Authorization"] = []string{"Bearer x", "Bearer x"}
	_, ok = BearerToken(r)
	require.False(t, ok, "two headers")
}

func TestClientIP(t *testing.T) {
	trusted := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/8")}
	for name, c := range map[string]struct {
		remote string
		header []string
		want   string
	}{
		"direct":                       {"203.0.113.5:4711", nil, "203.0.113.5"},
		"untrusted peer lies":          {"203.0.113.5:4711", []string{"1.2.3.4"}, "203.0.113.5"},
		"one proxy":                    {"10.0.0.1:1", []string{"1.2.3.4"}, "1.2.3.4"},
		"client lies to the proxy":     {"10.0.0.1:1", []string{"6.6.6.6, 1.2.3.4"}, "1.2.3.4"},
		"client claims a proxy's":      {"10.0.0.1:1", []string{"6.6.6.6,10.9.9.9,1.2.3.4"}, "1.2.3.4"},
		"two proxies":                  {"10.0.0.1:1", []string{"6.6.6.6, 1.2.3.4, 10.0.0.2"}, "1.2.3.4"},
		"two headers":                  {"10.0.0.1:1", []string{"6.6.6.6, 1.2.3.4", "10.0.0.2"}, "1.2.3.4"},
		"all trusted":                  {"10.0.0.1:1", []string{"10.0.0.3, 10.0.0.2"}, "10.0.0.3"},
		"nonsense":                     {"10.0.0.1:1", []string{"1.2.3.4, unknown"}, "10.0.0.1"},
		"nonsense before the client":   {"10.0.0.1:1", []string{"unknown, 1.2.3.4"}, "1.2.3.4"},
		"empty":                        {"10.0.0.1:1", []string{""}, "10.0.0.1"},
		"with a port":                  {"10.0.0.1:1", []string{"1.2.3.4:99"}, "1.2.3.4"},
		"IPv6":                         {"[fd00::1]:1", []string{"2001:db8::7"}, "2001:db8::7"},
		"IPv6 in brackets with a port": {"[fd00::1]:1", []string{"[2001:db8::7]:99"}, "2001:db8::7"},
		"IPv6 in brackets":             {"[fd00::1]:1", []string{"[2001:db8::7]"}, "2001:db8::7"},
		"mapped":                       {"[::ffff:10.0.0.1]:1", []string{"::ffff:1.2.3.4"}, "1.2.3.4"},
		"zone":                         {"[fe80::1%eth0]:1", nil, "fe80::1"},
		"unix socket":                  {"@", []string{"1.2.3.4"}, "invalid IP"},
	} {
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		r.RemoteAddr = c.remote
		r.Header["X-Forwarded-For"] = c.header
		require.Equal(t, c.want, ClientIP(r, trusted).String(), name)
	}
}

func TestAdmin(t *testing.T) {
	reg := prometheus.NewRegistry()
	counter := prometheus.NewCounter(prometheus.CounterOpts{Name: "cmdexec_test_total"})
	reg.MustRegister(counter)
	counter.Inc()
	var missing error
	said := ""
	h := Admin(func() error { return missing }, reg, func() string { return said })
	get := func(method, path string) *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(method, path, nil))
		return w
	}
	require.Equal(t, 200, get("GET", "/livez").Code)
	require.Equal(t, 200, get("GET", "/readyz").Code)
	said = "the cache is cold"
	require.Equal(t, 200, get("GET", "/readyz").Code, "a note is information")
	require.Equal(t, "ok\nnote: the cache is cold\n", get("GET", "/readyz").Body.String())
	said = ""
	missing = errors.New("stream RESULTS is missing")
	w := get("GET", "/readyz")
	require.Equal(t, 503, w.Code)
	require.Equal(t, "not ready: stream RESULTS is missing\n", w.Body.String())
	require.Equal(t, 200, get("GET", "/livez").Code, "alive although not ready")
	require.Contains(t, get("GET", "/metrics").Body.String(), "cmdexec_test_total 1")
	require.Equal(t, 404, get("GET", "/debug/pprof/").Code)
	require.Equal(t, 405, get("POST", "/livez").Code)
}
