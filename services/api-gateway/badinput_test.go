package gateway

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
)

// raw sends bytes over a connection of its own and reads one answer. send may
// write more, slowly or for ever; it ends when the connection does.
func (e *env) raw(method string, send func(c net.Conn)) answer {
	e.Helper()
	c, err := net.Dial("tcp", e.svc.Addr().String())
	require.NoError(e, err)
	require.NoError(e, c.SetDeadline(time.Now().Add(40*time.Second)))
	var writing sync.WaitGroup
	writing.Go(func() { send(c) })
	defer func() {
		_ = c.Close()
		writing.Wait()
	}()
	resp, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: method})
	require.NoError(e, err)
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	require.NoError(e, err)
	return answer{status: resp.StatusCode, header: resp.Header, body: body}
}

func say(text string) func(net.Conn) {
	return func(c net.Conn) { _, _ = io.WriteString(c, text) }
}

// TestBadHTTP: what is not a request, or is one in an unusual way, over raw TCP.
func TestBadHTTP(t *testing.T) {
	e := start(t, nil)
	tok := token(t, "ann", auth.RoleUser)
	authorized := "Host: x\r\nAuthorization: Bearer " + tok + "\r\n"
	post := "POST /api/jobs/create HTTP/1.1\r\n" + authorized + "Content-Type: application/json\r\n"
	const body = `{"command":"true"}`
	whole := fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(body), body)
	get := "GET /api/jobs HTTP/1.1\r\n" + authorized
	var zipped bytes.Buffer
	z := gzip.NewWriter(&zipped)
	_, err := z.Write(bytes.Repeat([]byte{' '}, 64<<20))
	require.NoError(t, err)
	require.NoError(t, z.Close())
	manyHeaders := &strings.Builder{}
	for i := range 10_000 {
		fmt.Fprintf(manyHeaders, "X-%d: y\r\n", i)
	}
	// foreign: the answer comes from net/http, before there is a request to handle.
	for name, c := range map[string]struct {
		send    string
		status  int
		code    string // "" where there is no problem
		foreign bool
	}{
		"good":                        {post + whole, 201, "", false},
		"good, chunked":               {post + "Transfer-Encoding: chunked\r\n\r\n12\r\n" + body + "\r\n0\r\n\r\n", 201, "", false},
		"HTTP/1.0":                    {"GET /api/jobs HTTP/1.0\r\n" + authorized + "\r\n", 200, "", false},
		"HTTP/1.0 create":             {"POST /api/jobs/create HTTP/1.0\r\n" + authorized + "Content-Type: application/json\r\n" + whole, 201, "", false},
		"absolute form":               {"GET http://x/api/jobs HTTP/1.1\r\n" + authorized + "\r\n", 200, "", false},
		"expects 100":                 {post + "Expect: 100-continue\r\n" + whole, 100, "", true},
		"expects something else":      {post + "Expect: 200-ok\r\n" + whole, 417, "", true},
		"no host":                     {"GET /api/jobs HTTP/1.1\r\nAuthorization: Bearer " + tok + "\r\n\r\n", 400, "", true},
		"two hosts":                   {get + "Host: y\r\n\r\n", 400, "", true},
		"HTTP/3.7":                    {"GET /api/jobs HTTP/3.7\r\n" + authorized + "\r\n", 505, "", true},
		"no version":                  {"GET /api/jobs\r\n\r\n", 400, "", true},
		"nonsense":                    {"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, "", true},
		"space in a header name":      {get + "X Y: z\r\n\r\n", 400, "", true},
		"space before the colon":      {get + "Content-Length : 5\r\n\r\n", 400, "", true},
		"NUL in a header":             {get + "X: \x00\r\n\r\n", 400, "", true},
		"folded header":               {get + "X: y\r\n z\r\n\r\n", 200, "", false},
		"two lengths":                 {post + "Content-Length: 18\r\nContent-Length: 19\r\n\r\n" + body, 400, "", true},
		"length negative":             {post + "Content-Length: -1\r\n\r\n" + body, 400, "", true},
		"length plus":                 {post + "Content-Length: +18\r\n\r\n" + body, 400, "", true},
		"length huge":                 {post + "Content-Length: 99999999999999999999\r\n\r\n" + body, 400, "", true},
		"length 1 TB":                 {post + "Content-Length: 1099511627776\r\n\r\n" + body, 413, "body_too_large", false},
		"chunked twice":               {post + "Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", 501, "", true},
		"identity coding":             {post + "Transfer-Encoding: identity\r\n\r\n" + body, 501, "", true},
		"gzip coding":                 {post + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501, "", true},
		"chunk size no number":        {post + "Transfer-Encoding: chunked\r\n\r\nzz\r\n" + body + "\r\n0\r\n\r\n", 400, "body_incomplete", false},
		"chunk size huge":             {post + "Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n" + body, 400, "body_incomplete", false},
		"no body":                     {post + "\r\n", 400, "bad_json", false},
		"no body, length 0":           {post + "Content-Length: 0\r\n\r\n", 400, "bad_json", false},
		"no content type":             {"POST /api/jobs/create HTTP/1.1\r\n" + authorized + whole, 415, "unsupported_media_type", false},
		"two content types":           {post + "Content-Type: application/json\r\n" + whole, 415, "unsupported_media_type", false},
		"gzip bomb":                   {post + fmt.Sprintf("Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%s", zipped.Len(), zipped.String()), 415, "unsupported_content_encoding", false},
		"two keys":                    {post + "Idempotency-Key: a\r\nIdempotency-Key: b\r\n" + whole, 400, "bad_idempotency_key", false},
		"empty key":                   {post + "Idempotency-Key: \r\n" + whole, 400, "bad_idempotency_key", false},
		"1 MB header":                 {get + "X: " + strings.Repeat("x", 1<<20) + "\r\n\r\n", 431, "", true},
		"10,000 headers":              {get + manyHeaders.String() + "\r\n", 431, "", true},
		"1 MB path":                   {"GET /" + strings.Repeat("x", 1<<20) + " HTTP/1.1\r\n" + authorized + "\r\n", 431, "", true},
		"HEAD":                        {"HEAD /api/jobs HTTP/1.1\r\n" + authorized + "\r\n", 405, "", false},
		"OPTIONS *":                   {"OPTIONS * HTTP/1.1\r\n" + authorized + "\r\n", 200, "", true},
		"OPTIONS":                     {"OPTIONS /api/jobs HTTP/1.1\r\n" + authorized + "\r\n", 405, "method_not_allowed", false},
		"TRACE":                       {"TRACE /api/jobs HTTP/1.1\r\n" + authorized + "\r\n", 405, "method_not_allowed", false},
		"CONNECT":                     {"CONNECT x:443 HTTP/1.1\r\n" + authorized + "\r\n", 404, "not_found", false},
		"PUT":                         {"PUT /api/jobs HTTP/1.1\r\n" + authorized + "\r\n", 405, "method_not_allowed", false},
		"a method of nobody":          {"BREW /api/jobs HTTP/1.1\r\n" + authorized + "\r\n", 405, "method_not_allowed", false},
		"lower-case method":           {"get /api/jobs HTTP/1.1\r\n" + authorized + "\r\n", 405, "method_not_allowed", false},
		"upgrade to WebSocket":        {get + "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n", 200, "", false},
		"upgrade to HTTP/2":           {get + "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n", 200, "", false},
		"method by header":            {get + "X-HTTP-Method-Override: DELETE\r\n\r\n", 200, "", false},
		"request id of another party": {get + "X-Request-Id: a\x7fb\r\n\r\n", 400, "", true},
	} {
		t.Run(name, func(t *testing.T) {
			method, _, _ := strings.Cut(c.send, " ")
			a := e.raw(method, say(c.send))
			require.Equal(t, c.status, a.status, "%s", a.body)
			require.Empty(t, a.header.Get("Access-Control-Allow-Origin"))
			if c.code != "" {
				require.Equal(t, c.code, a.problem(t).Code)
			}
			if a.status >= 400 && !c.foreign && method != "HEAD" {
				a.problem(t)
			}
		})
	}
	t.Run("length and chunks", func(t *testing.T) {
		// As RFC 9112 has it, the chunks count: the length is dropped, and the body is
		// the job, not its first four bytes.
		a := e.raw("POST", say(post+"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n12\r\n"+body+"\r\n0\r\n\r\n"))
		require.Equal(t, 201, a.status, "%s", a.body)
	})
	t.Run("preflight", func(t *testing.T) {
		a := e.do("OPTIONS", "/api/jobs/create", "", "", "Origin", "http://evil.example", "Access-Control-Request-Method", "POST", "Access-Control-Request-Headers", "authorization")
		require.Equal(t, 405, a.status)
		for name := range a.header {
			require.NotContains(t, name, "Access-Control")
		}
		require.Empty(t, e.do("GET", "/api/jobs", tok, "", "Origin", "http://evil.example").header.Get("Access-Control-Allow-Origin"))
	})
}

// TestBodies: sizes at the limits, bodies that never end, that lie, that crawl.
func TestBodies(t *testing.T) {
	e := start(t, nil)
	tok := token(t, "ann", auth.RoleUser)
	head := func(path, more string) string {
		return "POST " + path + " HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + tok + "\r\nContent-Type: application/json\r\n" + more + "\r\n"
	}
	pad := func(doc string, n int) string { return doc + strings.Repeat(" ", n-len(doc)) }
	for path, c := range map[string]struct {
		doc   string
		limit int
		good  int
	}{
		"/api/jobs/create": {`{"command":"true"}`, maxBody, 201},
		"/api/jobs/batch":  {`{"jobs":[{"command":"true"}]}`, maxBatchBody, 200},
		"/api/jobs/cancel": {`{"jobId":"` + newID() + `"}`, maxBody, 404},
	} {
		require.Equal(t, c.good, e.do("POST", path, tok, pad(c.doc, c.limit)).status, path)
		over := e.do("POST", path, tok, pad(c.doc, c.limit+1))
		require.Equal(t, 413, over.status, path)
		require.Equal(t, "body_too_large", over.problem(t).Code)
		chunked := e.raw("POST", say(head(path, "Transfer-Encoding: chunked\r\n")+fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", c.limit+1, pad(c.doc, c.limit+1))))
		require.Equal(t, 413, chunked.status, path)
	}
	t.Run("at once", func(t *testing.T) {
		t.Run("endless", func(t *testing.T) {
			t.Parallel()
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			a := e.raw("POST", func(c net.Conn) {
				say(head("/api/jobs/create", "Transfer-Encoding: chunked\r\n"))(c)
				part := fmt.Sprintf("%x\r\n%s\r\n", 64<<10, strings.Repeat(" ", 64<<10))
				for {
					if _, err := io.WriteString(c, part); err != nil {
						return
					}
				}
			})
			runtime.ReadMemStats(&after)
			require.Equal(t, 413, a.status)
			require.Less(t, int64(after.HeapAlloc)-int64(before.HeapAlloc), int64(256<<20))
		})
		t.Run("crawling", func(t *testing.T) {
			t.Parallel()
			a := e.raw("POST", func(c net.Conn) {
				say(head("/api/jobs/create", "Content-Length: 1000\r\n"))(c)
				tick := time.NewTicker(time.Second)
				defer tick.Stop()
				for range tick.C {
					if _, err := io.WriteString(c, " "); err != nil {
						return
					}
				}
			})
			require.Equal(t, 408, a.status)
			require.Equal(t, "body_timeout", a.problem(t).Code)
		})
		t.Run("shorter than it says", func(t *testing.T) {
			t.Parallel()
			a := e.raw("POST", func(c net.Conn) {
				say(head("/api/jobs/create", "Content-Length: 1000\r\n") + `{"command":"true"}`)(c)
				_ = c.(*net.TCPConn).CloseWrite()
			})
			require.Equal(t, 400, a.status)
			require.Equal(t, "body_incomplete", a.problem(t).Code)
		})
		t.Run("longer than it says", func(t *testing.T) {
			t.Parallel()
			// The rest is another request to the server, and none.
			a := e.raw("POST", say(head("/api/jobs/create", "Content-Length: 10\r\n")+`{"command":"true"}`))
			require.Equal(t, 400, a.status)
			require.Equal(t, "bad_json", a.problem(t).Code)
		})
		t.Run("many large ones that are claimed", func(t *testing.T) {
			t.Parallel()
			var open []net.Conn
			defer func() {
				for _, c := range open {
					_ = c.Close()
				}
			}()
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			for range 500 {
				c, err := net.Dial("tcp", e.svc.Addr().String())
				require.NoError(t, err)
				open = append(open, c)
				say(head("/api/jobs/batch", fmt.Sprintf("Content-Length: %d\r\n", maxBatchBody)) + "{")(c)
			}
			require.Equal(t, 200, e.do("GET", "/api/health", "", "").status)
			runtime.ReadMemStats(&after)
			require.Less(t, int64(after.HeapAlloc)-int64(before.HeapAlloc), int64(512<<20), "claims cost nothing")
		})
	})
	keys := &strings.Builder{}
	for i := range 100_000 {
		fmt.Fprintf(keys, `,"%s":1`, strconv.FormatInt(int64(i), 36))
	}
	for name, doc := range map[string]string{
		"100,000 keys": `{"command":"true"` + keys.String() + `}`,
		"deep arrays":  `{"command":` + strings.Repeat("[", 100_000) + strings.Repeat("]", 100_000) + `}`,
	} {
		a := e.do("POST", "/api/jobs/create", tok, doc)
		require.Equal(t, "bad_json", a.problem(t).Code, name)
	}
}

// TestBadPathsAndQueries: nothing that is not an id gets near a subject, a key or
// a query, however it is written.
func TestBadPathsAndQueries(t *testing.T) {
	e := start(t, nil)
	tok := token(t, "ann", auth.RoleUser)
	good := e.create("ann")
	get := func(target string) answer {
		return e.raw("GET", say("GET "+target+" HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer "+tok+"\r\nConnection: close\r\n\r\n"))
	}
	require.Equal(t, 200, get("/api/jobs/"+good).status)
	for _, bad := range []string{
		"..", ".", "%2e%2e", "%2e", "%00", good + "%00", "%0a", good + "%0a", good + "%20", "%20" + good, good + ".", good + "/", good + "//logs", "/" + good,
		good + "%2f", "%2e%2e%2f" + good, "..%5c", "*", ">", "job-*", "job-%3e", "$KV.jobs.%3e", good + ".%3e", good[:len(good)-1] + "*",
		strings.ToUpper(good), "JOB" + good[3:], good + "0", good[:len(good)-1], "job-" + strings.Repeat("a", 10<<10), "job%2d" + strings.Repeat("é", 26),
		"job-" + strings.Repeat("%ef%bc%90", 26), "j%d0%be" + good[2:], "job-01jd2xw8q3v5k7m9n1p3r5t7vI", "job-01jd2xw8q3v5k7m9n1p3r5t7vu", "worker-" + good[4:], "lease-" + good[4:],
		"%ff", "%c0%ae", "null", "undefined", "[object%20Object]", "{jobId}", "%7bjobId%7d", "1", "-1", "0x1", ";", good + ";x=y", good + "'", "%27%20or%201=1--", "%22%7b%22$gt%22:%22%22%7d",
	} {
		for _, below := range []string{"", "/logs", "/events", "/explain"} {
			a := get("/api/jobs/" + bad + below)
			require.Contains(t, []int{400, 404}, a.status, "%q%s: %s", bad, below, a.body)
			p := a.problem(t)
			require.Contains(t, []string{"bad_job_id", "not_found"}, p.Code, "%q%s", bad, below)
		}
	}
	for _, bad := range []string{"//api/jobs", "/api//jobs", "/api/jobs/", "/./api/jobs", "/api/../api/jobs", "/%61pi/jobs/x", "/api/jobs%2f" + good, "/API/jobs", "/api/jobs.json", "/.git/config", "/debug/pprof/", "/metrics", "/livez"} {
		a := get(bad)
		require.Contains(t, []int{400, 404}, a.status, bad)
		a.problem(t)
	}
	long := strings.Repeat("x", 10<<10)
	for query, code := range map[string]string{
		"limit=-1": "bad_parameter", "limit=0": "bad_parameter", "limit=1e9": "bad_parameter", "limit=abc": "bad_parameter", "limit=501": "bad_parameter",
		"limit=99999999999999999999": "bad_parameter", "limit=%2b5": "", "limit=5&limit=6": "bad_parameter", "limit=": "", "limit=0x5": "bad_parameter", "limit=5.0": "bad_parameter", "limit=%D9%A5": "bad_parameter",
		"cursor=x": "bad_cursor", "cursor=" + long: "bad_cursor", "cursor=%00": "bad_cursor", "cursor=..%2f": "bad_cursor",
		"status=%00": "bad_parameter", "status=" + long: "bad_parameter", "status=queued%20": "bad_parameter", "status=Queued": "bad_parameter",
		"queue=%3e": "bad_parameter", "queue=" + long: "bad_parameter", "queue[$gt]=": "unknown_parameter", "label=a": "bad_parameter", "label=:": "bad_parameter", "label=$where:1": "bad_parameter",
		"label=a:" + long: "bad_parameter", "since=0": "bad_parameter", "since=now": "bad_parameter", "since=2026-13-01T00:00:00Z": "bad_parameter", "until=-1": "bad_parameter",
		"since=2026-11-24T08:00:00Z;until=x": "bad_parameter", "owner=bob": "unknown_parameter", "%00=x": "unknown_parameter", "LIMIT=5": "unknown_parameter", "x%5b%5d=1": "unknown_parameter",
	} {
		a := get("/api/jobs?" + query)
		if code == "" {
			continue // as good as absent, or refused: not a matter of safety
		}
		require.Equal(t, 400, a.status, "%s: %s", query, a.body)
		require.Equal(t, code, a.problem(t).Code, query)
	}
	many := strings.Repeat("status=queued&", 200)
	require.Equal(t, "bad_parameter", get("/api/jobs?"+many).problem(t).Code)
	for _, bad := range []string{"attempt=0", "attempt=-1", "attempt=x", "attempt=99999999999999999999", "stream=stdin", "after=-1", "limit=0", "limit=1001", "follow=yes", "follow=1", "format=xml", "x=y"} {
		a := get("/api/jobs/" + good + "/logs?" + bad)
		require.Equal(t, 400, a.status, "%s: %s", bad, a.body)
		a.problem(t)
	}
}

// TestBadJobs: jobs that must not be accepted, field by field.
func TestBadJobs(t *testing.T) {
	e := start(t, nil)
	tok := token(t, "ann", auth.RoleUser)
	quote := func(s string) string { b, _ := json.Marshal(s); return string(b) }
	list := func(n int) string { return strings.TrimSuffix(strings.Repeat(`"x",`, n), ",") }
	vars := &strings.Builder{}
	for i := range 10_000 {
		fmt.Fprintf(vars, `,"A%d":"1"`, i)
	}
	for name, c := range map[string]struct {
		fields string // beside or in place of the command
		code   string
		field  string
	}{
		"argv empty":           {`"command":[]`, "invalid_job", "command"},
		"argv of nothing":      {`"command":[""]`, "invalid_job", "command"},
		"argv null":            {`"command":["x",null]`, "invalid_field", "command"},
		"argv numbers":         {`"command":["x",1]`, "invalid_field", "command"},
		"argv nested":          {`"command":[["x"]]`, "invalid_field", "command"},
		"command number":       {`"command":1`, "invalid_field", "command"},
		"command $gt":          {`"command":{"$gt":""}`, "invalid_field", "command"},
		"command blank":        {`"command":" \n\t "`, "invalid_job", "command"},
		"10,000 arguments":     {`"command":[` + list(10_000) + `]`, "invalid_job", "command"},
		"an argument of 512 K": {`"command":["x",` + quote(strings.Repeat("x", 512<<10)) + `]`, "invalid_job", "command"},
		"env name =":           {`"command":"x","env":{"A=B":"1"}`, "invalid_job", "env"},
		"env name empty":       {`"command":"x","env":{"":"1"}`, "invalid_job", "env"},
		"env name newline":     {`"command":"x","env":{"A\nB":"1"}`, "invalid_job", "env"},
		"env name reserved":    {`"command":"x","env":{"CMDEXEC_JOB_ID":"1"}`, "invalid_job", "env"},
		"env 10,000":           {`"command":"x","env":{"A":"1"` + vars.String() + `}`, "invalid_job", "env"},
		"env 100 K":            {`"command":"x","env":{"A":` + quote(strings.Repeat("x", 100<<10)) + `}`, "invalid_job", "env"},
		"env array":            {`"command":"x","env":["A=1"]`, "invalid_field", "env"},
		"env null value":       {`"command":"x","env":{"A":["1"]}`, "invalid_field", ""},
		"timeout 0.5":          {`"command":"x","timeout":0.5`, "invalid_field", "timeout"},
		"timeout -1":           {`"command":"x","timeout":-1`, "invalid_job", "timeout"},
		"timeout too much":     {`"command":"x","timeout":86401`, "invalid_job", "timeout"},
		"timeout MaxInt64":     {`"command":"x","timeout":9223372036854775807`, "invalid_job", "timeout"},
		"timeout past int64":   {`"command":"x","timeout":9223372036854775808`, "invalid_field", "timeout"},
		"timeout 1e309":        {`"command":"x","timeout":1e309`, "invalid_field", "timeout"},
		"timeout text":         {`"command":"x","timeout":"5m"`, "invalid_field", "timeout"},
		"cpu -1":               {`"command":"x","resources":{"cpu":-1}`, "invalid_job", "resources.cpu"},
		"cpu 1e309":            {`"command":"x","resources":{"cpu":1e309}`, "invalid_field", "resources.cpu"},
		"cpu tiny":             {`"command":"x","resources":{"cpu":1e-300}`, "invalid_job", "resources.cpu"},
		"cpu text":             {`"command":"x","resources":{"cpu":"500m"}`, "invalid_field", "resources.cpu"},
		"memory -1":            {`"command":"x","resources":{"memoryMb":-1}`, "invalid_job", "resources.memoryMb"},
		"memory MaxInt64":      {`"command":"x","resources":{"memoryMb":9223372036854775807}`, "invalid_job", "resources.memoryMb"},
		"memory 1Gi":           {`"command":"x","resources":{"memoryMb":"1Gi"}`, "invalid_field", "resources.memoryMb"},
		"memory arabic":        {`"command":"x","resources":{"memoryMb":"١GB"}`, "invalid_field", "resources.memoryMb"},
		"pids too many":        {`"command":"x","resources":{"pids":9999999}`, "invalid_job", "resources.pids"},
		"privileged":           {`"command":"x","privileged":true`, "unknown_field", "privileged"},
		"volumes":              {`"command":"x","volumes":["/:/host"]`, "unknown_field", "volumes"},
		"network host":         {`"command":"x","containerImage":"a","network":"host"`, "invalid_job", "network"},
		"image upper case":     {`"command":"x","containerImage":"Alpine"`, "invalid_job", "containerImage"},
		"image host only":      {`"command":"x","containerImage":"host:5000/"`, "invalid_job", "containerImage"},
		"image short digest":   {`"command":"x","containerImage":"a@sha256:short"`, "invalid_job", "containerImage"},
		"image ..":             {`"command":"x","containerImage":"../a"`, "invalid_job", "containerImage"},
		"image URL":            {`"command":"x","containerImage":"http://a/b"`, "invalid_job", "containerImage"},
		"image unicode":        {`"command":"x","containerImage":"аlpine"`, "invalid_job", "containerImage"},
		"image option":         {`"command":"x","containerImage":"--privileged"`, "invalid_job", "containerImage"},
		"image space":          {`"command":"x","containerImage":"a b"`, "invalid_job", "containerImage"},
		"file outside":         {`"command":"x","files":[{"path":"../x","content":""}]`, "invalid_job", "files[0].path"},
		"file absolute":        {`"command":"x","files":[{"path":"/etc/passwd","content":""}]`, "invalid_job", "files[0].path"},
		"file setuid":          {`"command":"x","files":[{"path":"x","content":"","mode":"4755"}]`, "invalid_job", "files[0].mode"},
		"folder outside":       {`"command":"x","workingDir":"a/../../b"`, "invalid_job", "workingDir"},
		"user injection":       {`"command":"x","user":"root\nx"`, "invalid_job", "user"},
		"label name":           {`"command":"x","labels":{"$where":"1"}`, "invalid_job", "labels"},
		"label newline":        {`"command":"x","labels":{"a":"b\nc"}`, "invalid_job", "labels"},
		"priority":             {`"command":"x","priority":101`, "invalid_job", "priority"},
		"queue":                {`"command":"x","queue":"a.*"`, "invalid_job", "queue"},
		"stop signal":          {`"command":"x","stop":{"signal":"SIGSTOP"}`, "invalid_job", "stop.signal"},
		"exit codes":           {`"command":"x","retry":{"onExitCodes":[0]}`, "invalid_job", "retry.onExitCodes"},
		"attempts":             {`"command":"x","retry":{"maxAttempts":1000000}`, "invalid_job", "retry.maxAttempts"},
		"log of 1 GB":          {`"command":"x","logMaxBytes":1073741824`, "invalid_job", "logMaxBytes"},
		"attempt":              {`"command":"x","attempt":5`, "unknown_field", "attempt"},
		"role":                 {`"command":"x","role":"admin"`, "unknown_field", "role"},
		"rerunOf":              {`"command":"x","rerunOf":"x"`, "unknown_field", "rerunOf"},
		"__proto__":            {`"command":"x","__proto__":{"admin":true}`, "unknown_field", "__proto__"},
	} {
		a := e.do("POST", "/api/jobs/create", tok, "{"+c.fields+"}")
		require.Equal(t, 422, a.status, "%s: %s", name, a.body)
		p := a.problem(t)
		require.Equal(t, c.code, p.Code, name)
		if c.field != "" {
			require.Equal(t, c.field, p.Errors[0].Field, name)
		}
	}
	for _, webhook := range []string{
		"http://127.1", "http://0x7f000001", "http://[::ffff:127.0.0.1]", "http://a@127.0.0.1", "http://169.254.169.254/", "file:///etc/passwd", "gopher://x", "http://x:22", "http://xn--80ak6aa92e.com",
	} {
		a := e.do("POST", "/api/jobs/create", tok, `{"command":"x","webhook":{"url":`+quote(webhook)+`}}`)
		require.Equal(t, "unsupported_field", a.problem(t).Code, webhook)
	}
	// And what looks dangerous and is not: it is the user's own command, and text.
	for _, good := range []string{
		`"command":["echo","$(id)","` + "`id`" + `","a\nb","; rm -rf /"]`, `"command":"echo $(id)"`, `"command":["/bin/../bin/echo"]`,
		`"command":"x","env":{"LD_PRELOAD":"/x.so","PATH":"/tmp"}`, `"command":"x","labels":{"a":"$gt","b":"{\"$ne\":1}"}`, `"command":"\u001b]0;x\u0007"`,
	} {
		a := e.do("POST", "/api/jobs/create", tok, "{"+good+"}")
		require.Equal(t, 201, a.status, "%s: %s", good, a.body)
		j := a.job(t)
		again := e.do("GET", "/api/jobs/"+j.JobID, tok, "").job(t)
		require.Equal(t, j.Spec, again.Spec)
	}
}

// FuzzSubmitJSON: no panic; a spec that is accepted means the same to
// encoding/json, and is stable when it is normalised, written and read again.
func FuzzSubmitJSON(f *testing.F) {
	for _, s := range []string{
		`{"command":"true"}`, `{"command":["a","b"],"timeout":5,"labels":{"a":"b"},"env":{"A":"1"}}`, `{"command":"x","priority":0,"retry":{"maxAttempts":3,"onExitCodes":[75]}}`,
		`{"command":"x","containerImage":"alpine:3","network":"bridge","resources":{"cpu":0.5,"memoryMb":64}}`, `{"command":"x","files":[{"path":"a","content":"b","mode":"0755"}]}`,
		`{"Command":"x"}`, `{"command":"x","command":"y"}`, `{"command":null}`, `{"command":"\ud800"}`, `{"command":"x","timeout":1e309}`, `[]`, `{"command":{"$gt":""}}`, "",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		spec, problem := acceptSpec(body)
		if problem != nil {
			if problem.Status < 400 || problem.Status >= 500 || problem.Code == "" {
				t.Fatalf("%q: %+v", body, problem)
			}
			return
		}
		var plain job.Spec
		if err := json.Unmarshal(body, &plain); err != nil {
			t.Fatalf("%q is accepted, and no spec to encoding/json: %v", body, err)
		}
		if want, errs := job.Normalise(plain); len(errs) > 0 || want.Hash() != spec.Hash() {
			t.Fatalf("%q means something else to encoding/json", body)
		}
		written, err := json.Marshal(spec)
		if err != nil {
			t.Fatal(err)
		}
		again, problem := acceptSpec(written)
		if problem != nil || again.Hash() != spec.Hash() {
			t.Fatalf("%q became %q, which is not the same: %+v", body, written, problem)
		}
	})
}

// FuzzBatch: no panic; the parts are those that encoding/json sees.
func FuzzBatch(f *testing.F) {
	for _, s := range []string{
		`{"jobs":[{"command":"true"},{"command":"false"}]}`, ` { "jobs" : [ 1 , "x" , null , [ ] ] } `, `{"jobs":[]}`, `{"jobs":[{}],"jobs":[]}`, `{"j\u006fbs":[{}]}`, `{"jobs":[{}]}x`, `{"x":1}`, `{"jobs":{}}`, `[`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		parts, err := splitBatch(body)
		if err != nil {
			return
		}
		var plain struct{ Jobs []json.RawMessage }
		if err := json.Unmarshal(body, &plain); err != nil || len(plain.Jobs) != len(parts) {
			t.Fatalf("%q has %d parts, and %d to encoding/json: %v", body, len(parts), len(plain.Jobs), err)
		}
		for i := range parts {
			if !bytes.Equal(parts[i], plain.Jobs[i]) {
				t.Fatalf("%q: part %d is %q, and %q to encoding/json", body, i, parts[i], plain.Jobs[i])
			}
		}
	})
}

// FuzzStreamID: what is taken as the id of an event is written back as it was.
func FuzzStreamID(f *testing.F) {
	for _, s := range []string{"", "5f70bf18-42", "5f70bf18-0", "5f70bf18-18446744073709551615", "x-1", "5f70bf18--1", "5f70bf18-01"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		at, err := parseStreamID(text)
		if err != nil || text == "" {
			return
		}
		if got := fmt.Sprintf("%s-%d", at.life, at.revision); got != text || !at.set {
			t.Fatalf("%q was read as %q", text, got)
		}
	})
}
