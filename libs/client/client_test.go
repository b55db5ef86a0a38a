package client

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/job"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const jobID = "job-01jd2xw8q3v5k7m9n1p3r5t7v9"

// serve runs a scripted server and returns a client of it.
func serve(t *testing.T, h http.HandlerFunc) *Client {
	t.Helper()
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	c, err := New(srv.URL, "token-1", Options{UserAgent: "test"})
	require.NoError(t, err)
	t.Cleanup(c.Close)
	return c
}

func reply(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	if status >= 400 {
		w.Header().Set("Content-Type", "application/problem+json")
	}
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v)
}

func away() api.Problem {
	return api.Problem{Status: 503, Code: "bus_unavailable", Detail: "the message bus cannot be reached"}
}

func TestNewRefusesWhatIsNoServer(t *testing.T) {
	for _, server := range []string{"", "127.0.0.1:3000", "ftp://host", "http://", "http://user:pw@host", "http://host?x=1"} {
		_, err := New(server, "", Options{})
		require.Error(t, err, server)
		require.NotContains(t, err.Error(), "pw")
	}
	_, err := New("https://host/base/", "", Options{})
	require.NoError(t, err)
}

func TestCreate(t *testing.T) {
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		switch {
		case r.Method != "POST" || r.URL.Path != "/api/jobs/create",
			r.Header.Get("Authorization") != "Bearer token-1",
			r.Header.Get("User-Agent") != "test",
			r.Header.Get("Content-Type") != "application/json",
			string(body) != `{"command":"true"}`:
			reply(w, 500, api.Problem{Code: "test", Detail: string(body)})
		case r.Header.Get("Idempotency-Key") == "again":
			reply(w, 200, api.Job{JobID: jobID})
		default:
			reply(w, 201, api.Job{JobID: jobID})
		}
	})
	spec := job.Spec{Command: job.Command{Shell: "true"}}
	got, err := c.Create(t.Context(), spec, CreateOptions{})
	require.NoError(t, err)
	require.Equal(t, jobID, got.Job.JobID)
	require.False(t, got.Replayed)
	got, err = c.Create(t.Context(), spec, CreateOptions{IdempotencyKey: "again"})
	require.NoError(t, err)
	require.True(t, got.Replayed)
}

func TestOnlyHarmlessCallsAreRepeated(t *testing.T) {
	var calls atomic.Int32
	c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		if calls.Add(1) < 3 {
			reply(w, 503, away())
			return
		}
		reply(w, 200, api.Job{JobID: jobID})
	})
	ctx := t.Context()
	calls.Store(0)
	_, err := c.Create(ctx, job.Spec{}, CreateOptions{})
	require.Equal(t, "bus_unavailable", Code(err))
	require.EqualValues(t, 1, calls.Load(), "a create without a key is sent once")
	calls.Store(0)
	_, err = c.Execute(ctx, job.Spec{}, ExecuteOptions{})
	require.Equal(t, "bus_unavailable", Code(err))
	require.EqualValues(t, 1, calls.Load(), "an execute without a key is sent once")

	for name, call := range map[string]func() error{
		"create with key":  func() error { _, err := c.Create(ctx, job.Spec{}, CreateOptions{IdempotencyKey: "k"}); return err },
		"execute with key": func() error { _, err := c.Execute(ctx, job.Spec{}, ExecuteOptions{IdempotencyKey: "k"}); return err },
		"job":              func() error { _, err := c.Job(ctx, jobID); return err },
		"status":           func() error { _, err := c.Status(ctx, jobID); return err },
		"cancel":           func() error { _, err := c.Cancel(ctx, jobID); return err },
		"drain":            func() error { return c.Drain(ctx, "worker-1", true) },
	} {
		calls.Store(0)
		require.NoError(t, call(), name)
		require.EqualValues(t, 3, calls.Load(), name)
	}
}

func TestErrors(t *testing.T) {
	var calls atomic.Int32
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		calls.Add(1)
		switch r.URL.Query().Get("jobId") {
		case "text":
			http.Error(w, "boom", 500)
		case "away":
			http.Redirect(w, r, "http://192.0.2.1/", http.StatusFound)
		case "slow":
			w.Header().Set("Retry-After", "7")
			reply(w, 429, api.Problem{Status: 429, Code: "rate_limited"})
		default:
			reply(w, 422, api.Problem{Status: 422, Code: "invalid_job", Detail: "no", Errors: []job.FieldError{{Field: "timeout", Code: "out_of_range", Detail: "from 1 to 5"}}})
		}
	})
	ctx := t.Context()
	_, err := c.Status(ctx, "bad")
	var e *Error
	require.ErrorAs(t, err, &e)
	require.Equal(t, "no; timeout: from 1 to 5 (invalid_job)", e.Error())
	require.Equal(t, "invalid_job", Code(err))
	_, err = c.Status(ctx, "text")
	require.ErrorAs(t, err, &e)
	require.Equal(t, 500, e.Problem.Status)
	require.Equal(t, "the server answered 500: Internal Server Error", e.Error())
	_, err = c.Status(ctx, "away")
	require.ErrorAs(t, err, &e)
	require.Equal(t, 302, e.Problem.Status, "redirects are not followed")
	calls.Store(0)
	short, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
	defer cancel()
	_, err = c.Status(short, "slow")
	require.ErrorAs(t, err, &e)
	require.Equal(t, 7*time.Second, e.RetryAfter)
	require.EqualValues(t, 1, calls.Load(), "Retry-After is obeyed")
}

func TestTokenIsAskedForEachRequest(t *testing.T) {
	var got []string
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got = append(got, r.Header.Get("Authorization"))
		reply(w, 200, api.Info{})
	}))
	defer srv.Close()
	n := 0
	c, err := New(srv.URL, "", Options{Token: func() string { n++; return fmt.Sprint(n) }})
	require.NoError(t, err)
	defer c.Close()
	for range 2 {
		_, err := c.Info(t.Context())
		require.NoError(t, err)
	}
	require.Equal(t, []string{"Bearer 1", "Bearer 2"}, got)
}

func TestJobsReadsAllPages(t *testing.T) {
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		if q.Get("label") != "team:a b" || q.Get("limit") != "2" || len(q["status"]) != 2 || q.Get("since") == "" {
			reply(w, 400, api.Problem{Code: "test", Detail: r.URL.RawQuery})
			return
		}
		switch q.Get("cursor") {
		case "":
			reply(w, 200, api.JobList{Items: []api.Job{{JobID: "1"}, {JobID: "2"}}, NextCursor: "c"})
		case "c":
			reply(w, 200, api.JobList{Items: []api.Job{{JobID: "3"}}})
		}
	})
	var ids []string
	for j, err := range c.Jobs(t.Context(), ListOptions{
		Labels: map[string]string{"team": "a b"}, Limit: 2, Status: []job.State{job.Queued, job.Running}, Since: time.Unix(0, 0),
	}) {
		require.NoError(t, err)
		ids = append(ids, j.JobID)
	}
	require.Equal(t, []string{"1", "2", "3"}, ids)
}

// sse writes one event and flushes.
func sse(w http.ResponseWriter, id, name, data string) {
	if id != "" {
		_, _ = fmt.Fprintf(w, "id: %s\n", id)
	}
	_, _ = fmt.Fprintf(w, "event: %s\ndata: %s\n\n", name, data)
	w.(http.Flusher).Flush()
}

func TestFollowResumes(t *testing.T) {
	var mu sync.Mutex
	var resumed []string
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		resumed = append(resumed, r.Header.Get("Last-Event-ID"))
		n := len(resumed)
		mu.Unlock()
		if n == 3 {
			reply(w, 503, away())
			return
		}
		w.Header().Set("Content-Type", "text/event-stream")
		switch n {
		case 1:
			sse(w, "1-1", "output", `{"seq":1,"stream":"stdout","data":"a"}`)
			sse(w, "1-2", "output", `{"seq":2,"stream":"stdout","dataBase64":"/w=="}`)
			panic(http.ErrAbortHandler)
		case 2:
			_, _ = io.WriteString(w, ":\n\n")
			sse(w, "2-1", "output", `{"seq":1,"stream":"stderr","data":"b"}`)
			panic(http.ErrAbortHandler)
		default:
			sse(w, "", "end", `{"jobId":"`+jobID+`","status":"failed","exitCode":7}`)
		}
	})
	var got []string
	j, err := c.Follow(t.Context(), jobID, Position{}, func(i Item) {
		got = append(got, fmt.Sprintf("%d-%d %s %q", i.Attempt, i.Seq, i.Stream, i.Bytes()))
	})
	require.NoError(t, err)
	require.Equal(t, job.Failed, j.Status)
	require.Equal(t, 7, *j.ExitCode)
	require.Equal(t, []string{`1-1 stdout "a"`, `1-2 stdout "\xff"`, `2-1 stderr "b"`}, got)
	require.Equal(t, []string{"", "1-2", "2-1", "2-1"}, resumed)
}

func TestFollowGivesUp(t *testing.T) {
	c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		reply(w, 404, api.Problem{Status: 404, Code: "job_not_found"})
	})
	_, err := c.Follow(t.Context(), jobID, Position{}, func(Item) {})
	require.Equal(t, "job_not_found", Code(err))

	dead, err := New("http://127.0.0.1:1", "", Options{Tries: 2})
	require.NoError(t, err)
	_, err = dead.Follow(t.Context(), jobID, Position{}, func(Item) {})
	require.ErrorContains(t, err, "reach 127.0.0.1:1")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = dead.Follow(ctx, jobID, Position{}, func(Item) {})
	require.ErrorIs(t, err, context.Canceled)
}

func TestEventsDoNotRepeat(t *testing.T) {
	n := 0
	c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		n++
		sse(w, "", "state", `{"status":"queued","version":1}`)
		if n == 1 {
			panic(http.ErrAbortHandler)
		}
		sse(w, "", "state", `{"status":"running","version":2}`)
		sse(w, "", "state", `{"status":"succeeded","version":3}`)
	})
	var got []job.State
	require.NoError(t, c.Events(t.Context(), jobID, func(s api.StateEvent) { got = append(got, s.Status) }))
	require.Equal(t, []job.State{job.Queued, job.Running, job.Succeeded}, got)
}

func TestExecuteStream(t *testing.T) {
	var paths []string
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		paths = append(paths, r.Method+" "+r.URL.RequestURI()+" "+r.Header.Get("Last-Event-ID"))
		w.Header().Set("Location", "/api/jobs/"+jobID)
		if r.Method == "POST" {
			sse(w, "1-1", "output", `{"seq":1,"stream":"stdout","data":"a"}`)
			panic(http.ErrAbortHandler)
		}
		sse(w, "", "end", `{"status":"succeeded"}`)
	})
	spec := job.Spec{Command: job.Command{Argv: []string{"true"}}}
	_, err := c.ExecuteStream(t.Context(), spec, ExecuteOptions{}, func(Item) {})
	require.ErrorContains(t, err, "the stream broke")
	require.Len(t, paths, 1, "the broken connection has canceled the job: there is nothing to resume")
	paths = nil
	j, err := c.ExecuteStream(t.Context(), spec, ExecuteOptions{Leave: true}, func(Item) {})
	require.NoError(t, err)
	require.Equal(t, job.Succeeded, j.Status)
	require.Equal(t, []string{
		"POST /api/execute?onDisconnect=leave ",
		"GET /api/jobs/" + jobID + "/logs?follow=true 1-1",
	}, paths)
}

func TestLogText(t *testing.T) {
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, r.URL.Query().Encode())
	})
	var b strings.Builder
	require.NoError(t, c.LogText(t.Context(), jobID, LogOptions{Stream: "stdout", Attempt: 2, After: 3, Limit: 5}, &b))
	require.Equal(t, "after=3&attempt=2&format=text&stream=stdout", b.String())
}

func TestEventReader(t *testing.T) {
	read := func(text string) (events []event, err error) {
		r := eventReader{r: bufio.NewReaderSize(strings.NewReader(text), 16), heard: func() {}}
		for {
			e, err := r.next()
			if err != nil {
				return events, err
			}
			events = append(events, e)
		}
	}
	got, err := read(": comment\n\nid: 7\nevent: x\ndata: one\ndata:two\r\n\r\nretry: 5\n\nevent: lost\n\ndata: " + strings.Repeat("y", 100) + "\n\ndata: cut")
	require.ErrorIs(t, err, io.ErrUnexpectedEOF)
	require.Equal(t, []event{
		{id: "7", name: "x", data: []byte("one\ntwo")},
		{data: []byte(strings.Repeat("y", 100))},
	}, got)
}

func FuzzEventReader(f *testing.F) {
	f.Add([]byte("id: 1\nevent: output\ndata: {}\n\n"))
	f.Add([]byte(":\r\n\r\ndata\n\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		r := eventReader{r: bufio.NewReaderSize(strings.NewReader(string(text)), 16), heard: func() {}}
		total := 0
		for {
			e, err := r.next()
			if err != nil {
				if !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, errTooLong) {
					t.Fatal(err)
				}
				break
			}
			total += len(e.data)
		}
		if total > len(text) {
			t.Fatal("more data came out than went in")
		}
	})
}

func TestFurtherCalls(t *testing.T) {
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		switch r.Method + " " + r.URL.Path + " " + r.Header.Get("Content-Type") + " " + string(body) {
		case `POST /api/jobs/rerun application/json {"jobId":"` + jobID + `"}`:
			reply(w, 201, api.Job{RerunOf: jobID})
		case "POST /api/jobs/create application/yaml command: true\n":
			reply(w, 200, api.Job{JobID: jobID})
		case `POST /api/jobs/batch application/json {"jobs":[{"command":"true"}]}`:
			reply(w, 200, api.BatchResult{Created: 1})
		case `POST /api/jobs/cancel-batch application/json {"status":["queued"],"labels":{"a":"b"}}`:
			reply(w, 200, api.CancelBatchResult{Matched: 2})
		default:
			reply(w, 500, api.Problem{Code: "test", Detail: r.URL.Path + " " + string(body)})
		}
	})
	ctx := t.Context()
	rerun, err := c.Rerun(ctx, jobID, CreateOptions{})
	require.NoError(t, err)
	require.Equal(t, jobID, rerun.Job.RerunOf)
	created, err := c.CreateDocument(ctx, MediaYAML, []byte("command: true\n"), CreateOptions{IdempotencyKey: "k"})
	require.NoError(t, err)
	require.True(t, created.Replayed)
	batch, err := c.CreateBatch(ctx, []job.Spec{{Command: job.Command{Shell: "true"}}}, CreateOptions{})
	require.NoError(t, err)
	require.Equal(t, 1, batch.Created)
	canceled, err := c.CancelBatch(ctx, api.CancelBatchRequest{Status: []job.State{job.Queued}, Labels: map[string]string{"a": "b"}})
	require.NoError(t, err)
	require.Equal(t, 2, canceled.Matched)
}

// TestWatchResumes: after a break, and after an overflow, the stream goes on
// after the last event that was seen.
func TestWatchResumes(t *testing.T) {
	var mu sync.Mutex
	var from []string
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		from = append(from, r.Header.Get("Last-Event-Id"))
		n := len(from)
		mu.Unlock()
		w.Header().Set("Content-Type", "text/event-stream")
		switch n {
		case 1:
			sse(w, "g-5", "ready", `{}`)
			sse(w, "g-7", "state", `{"jobId":"a","status":"queued","version":1}`)
			panic(http.ErrAbortHandler)
		case 2:
			sse(w, "g-9", "state", `{"jobId":"a","status":"running","version":3}`)
			sse(w, "g-9", "ready", `{"resumed":true}`)
			sse(w, "", "overflow", `{"gap":true}`)
		default:
			sse(w, "g-12", "ready", `{"resumed":true,"gap":true}`)
			<-r.Context().Done()
		}
	})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var got []string
	err := c.Watch(ctx, WatchOptions{Queue: "q", Labels: map[string]string{"a": "b"}, Ready: func(p api.StreamPoint) {
		got = append(got, fmt.Sprintf("ready %t %t", p.Resumed, p.Gap))
		if p.Gap {
			cancel()
		}
	}}, func(e Event) { got = append(got, e.ID+" "+string(e.Status)) })
	require.ErrorIs(t, err, context.Canceled)
	require.Equal(t, []string{"ready false false", "g-7 queued", "g-9 running", "ready true false", "ready true true"}, got)
	require.Equal(t, []string{"", "g-7", "g-9"}, from)
}
