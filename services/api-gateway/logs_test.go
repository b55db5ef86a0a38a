package gateway

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/cmdexec/cmdexec/libs/client"
	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
)

const (
	stdout = workerproto.Stdout
	stderr = workerproto.Stderr
)

func (e *env) page(jobID, query string) api.Logs {
	e.Helper()
	a := e.do("GET", "/api/jobs/"+jobID+"/logs"+query, token(e, "ann", auth.RoleUser), "")
	require.Equal(e, 200, a.status, "%s", a.body)
	var l api.Logs
	require.NoError(e, json.Unmarshal(a.body, &l))
	return l
}

func TestLogPages(t *testing.T) {
	e := start(t, nil)
	jobID := e.create("ann")
	l := e.page(jobID, "")
	require.Empty(t, l.Items)
	require.False(t, l.EOF, "a job that waits may still print")

	e.runs(jobID, 1)
	e.store.archive(jobID, 1, chunk(1, stdout, "one\n"), chunk(2, stderr, "two\n"), chunk(3, stdout, "\xff\xfe"))
	l = e.page(jobID, "?limit=2")
	require.Len(t, l.Items, 2)
	require.Equal(t, "one\n", l.Items[0].Data)
	require.EqualValues(t, 2, l.NextAfter)
	require.False(t, l.EOF)
	l = e.page(jobID, "?limit=2&after=2")
	require.Len(t, l.Items, 1)
	require.Empty(t, l.Items[0].Data)
	require.Equal(t, []byte("\xff\xfe"), l.Items[0].DataBase64)
	require.False(t, l.EOF, "the job runs")
	require.False(t, l.Complete)
	require.EqualValues(t, 3, e.page(jobID, "?after=3").NextAfter)
	l = e.page(jobID, "?stream=stderr")
	require.Len(t, l.Items, 1)
	require.EqualValues(t, 2, l.Items[0].Seq)

	// The end rides in the result and is archived a moment later.
	e.move(jobID, ended(1, job.OutcomeSucceeded, 0, &job.Manifest{Chunks: 5, Bytes: 16}))
	l = e.page(jobID, "?after=3")
	require.False(t, l.EOF, "two chunks are not stored yet")
	e.store.archive(jobID, 1, chunk(5, stdout, "five"))
	l = e.page(jobID, "?after=3")
	require.Empty(t, l.Items, "a page stops before a gap that will close")
	require.False(t, l.EOF)
	e.store.archive(jobID, 1, chunk(4, stdout, "four"))
	l = e.page(jobID, "?after=3")
	require.Len(t, l.Items, 2)
	require.True(t, l.EOF)
	require.True(t, l.Complete)
	require.EqualValues(t, 5, l.NextAfter)
	require.True(t, e.page(jobID, "?after=5").EOF)
	require.False(t, e.page(jobID, "?limit=1").EOF, "there is another page")

	ann := token(t, "ann", auth.RoleUser)
	for query, code := range map[string]string{
		"?attempt=2": "attempt_not_found", "?attempt=0": "bad_parameter", "?attempt=x": "bad_parameter", "?after=-1": "bad_parameter",
		"?limit=0": "bad_parameter", "?limit=1001": "bad_parameter", "?stream=out": "bad_parameter", "?follow=1": "bad_parameter",
		"?format=xml": "bad_parameter", "?tail=5": "unknown_parameter",
	} {
		require.Equal(t, code, e.do("GET", "/api/jobs/"+jobID+"/logs"+query, ann, "").problem(t).Code, query)
	}
	bad := e.do("GET", "/api/jobs/"+jobID+"/logs?follow=true", ann, "", "Last-Event-ID", "7")
	require.Equal(t, "bad_parameter", bad.problem(t).Code)
	e.store.setAway(true)
	require.Equal(t, 503, e.do("GET", "/api/jobs/"+jobID+"/logs", ann, "").status)
	require.Equal(t, 503, e.do("GET", "/api/jobs/"+jobID+"/logs?follow=true", ann, "").status)
	require.Equal(t, 503, e.do("GET", "/api/jobs/"+jobID+"/logs?format=text", ann, "").status)
}

// TestVerdictOnOutput: however output is read, a verdict goes before the count of
// chunks.
func TestVerdictOnOutput(t *testing.T) {
	e := start(t, nil)
	jobID := e.create("ann")
	e.runs(jobID, 1)
	e.store.archive(jobID, 1, chunk(1, stdout, "one\n"), chunk(2, stdout, "two\n"))
	e.move(jobID, ended(1, job.OutcomeSucceeded, 0, &job.Manifest{Chunks: 2, Bytes: 8}))
	for verdict, complete := range map[busmsg.LogVerdict]bool{
		"": true, busmsg.LogComplete: true, busmsg.LogIncomplete: false, busmsg.LogDiffers: false,
	} {
		e.store.judge(jobID, 1, verdict)
		l := e.page(jobID, "")
		require.True(t, l.EOF)
		require.Equal(t, complete, l.Complete, verdict)
		path := "/api/jobs/" + jobID + "/logs?format=text"
		for _, headers := range [][]string{nil, {"Range", "bytes=0-3"}} {
			_, said := e.text(path, headers...)
			require.Equal(t, strconv.FormatBool(complete), said, verdict)
		}
		_, said := e.text(path+"&stream=stdout", "Range", "bytes=0-3")
		require.Equal(t, strconv.FormatBool(complete), said, verdict)
		var last api.Job
		require.NoError(t, e.events("/api/jobs/"+jobID+"/logs?follow=true", nil, func(_, name, data string) bool {
			if name == "end" {
				require.NoError(t, json.Unmarshal([]byte(data), &last))
			}
			return false
		}))
		require.Equal(t, complete, last.Logs.Complete, verdict)
	}
}

func TestLogText(t *testing.T) {
	e := start(t, nil)
	jobID := e.create("ann")
	e.runs(jobID, 1)
	var want, wantOut strings.Builder
	for i := range int64(1000) {
		stream, text := stdout, fmt.Sprintf("line %d %s\n", i, strings.Repeat("x", 2000))
		if i%3 == 0 {
			stream = stderr
		} else {
			wantOut.WriteString(text)
		}
		want.WriteString(text)
		e.store.archive(jobID, 1, chunk(i+1, stream, text))
	}
	ann := token(t, "ann", auth.RoleUser)
	got := e.do("GET", "/api/jobs/"+jobID+"/logs", ann, "", "Accept", "text/plain")
	require.Equal(t, "text/plain; charset=utf-8", got.header.Get("Content-Type"))
	require.Equal(t, want.String(), string(got.body))
	require.Equal(t, wantOut.String(), string(e.do("GET", "/api/jobs/"+jobID+"/logs?format=text&stream=stdout", ann, "").body))

	// Of an attempt that ended, the text waits for what is still being stored.
	e.move(jobID, ended(1, job.OutcomeSucceeded, 0, &job.Manifest{Chunks: 1001}))
	time.AfterFunc(50*time.Millisecond, func() { e.store.archive(jobID, 1, chunk(1001, stdout, "end")) })
	got = e.do("GET", "/api/jobs/"+jobID+"/logs?format=text", ann, "")
	require.Equal(t, want.String()+"end", string(got.body))
}

// events reads a stream of events until it ends; stop, if not nil, breaks the connection.
func (e *env) events(path string, headers map[string]string, each func(id, name, data string) (stop bool)) error {
	ctx, cancel := context.WithCancel(e.Context())
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "GET", e.base+path, nil)
	require.NoError(e, err)
	req.Header.Set("Authorization", "Bearer "+token(e, "ann", auth.RoleUser))
	for k, v := range headers {
		req.Header.Set(k, v)
	}
	resp, err := e.http.Do(req)
	require.NoError(e, err)
	defer func() { _ = resp.Body.Close() }()
	require.Equal(e, 200, resp.StatusCode)
	require.Equal(e, "text/event-stream", resp.Header.Get("Content-Type"))
	r := bufio.NewReader(resp.Body)
	var id, name, data string
	for {
		line, err := r.ReadString('\n')
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		line = strings.TrimSuffix(line, "\n")
		switch {
		case line == "":
			if data != "" && each(id, name, data) {
				return nil
			}
			id, name, data = "", "", ""
		case strings.HasPrefix(line, "id: "):
			id = line[4:]
		case strings.HasPrefix(line, "event: "):
			name = line[7:]
		case strings.HasPrefix(line, "data: "):
			data = line[6:]
		}
	}
}

// TestFollow: history from the persister, then live output, then the end out of
// the archive; each piece once.
func TestFollow(t *testing.T) {
	e := start(t, nil)
	jobID := e.create("ann")
	e.runs(jobID, 1)
	e.store.archive(jobID, 1, chunk(1, stdout, "a"), chunk(2, stderr, "b"))
	e.publish(jobID, 1, chunk(2, stderr, "b"), chunk(3, stdout, "c"))

	var mu sync.Mutex
	var got []string
	var end api.Job
	done := make(chan error, 1)
	go func() {
		var err error
		end, err = e.sdk("ann").Follow(t.Context(), jobID, client.Position{}, func(i client.Item) {
			mu.Lock()
			defer mu.Unlock()
			got = append(got, fmt.Sprintf("%d-%d%s", i.Attempt, i.Seq, i.Bytes()))
		})
		done <- err
	}()
	have := func(n int) func() bool {
		return func() bool { mu.Lock(); defer mu.Unlock(); return len(got) == n }
	}
	eventually(t, "history and what is live", have(3))
	e.publish(jobID, 1, chunk(4, stdout, "d"))
	eventually(t, "new output", have(4))
	// 5 is only in the archive: a gap that the persister closes.
	e.store.archive(jobID, 1, chunk(5, stdout, "e"))
	e.publish(jobID, 1, chunk(6, stdout, "f"))
	eventually(t, "the gap is closed", have(6))
	e.move(jobID, ended(1, job.OutcomeFailed, 3, &job.Manifest{Chunks: 7}))
	time.AfterFunc(30*time.Millisecond, func() { e.store.archive(jobID, 1, chunk(7, stdout, "g")) })
	require.NoError(t, <-done)
	require.Equal(t, []string{"1-1a", "1-2b", "1-3c", "1-4d", "1-5e", "1-6f", "1-7g"}, got)
	require.Equal(t, job.Failed, end.Status)
	require.Equal(t, 3, *end.ExitCode)
	require.True(t, end.Logs.Complete)
}

// TestFollowCutAndResumed: a follower is cut at every piece and misses none.
func TestFollowCutAndResumed(t *testing.T) {
	e := start(t, nil)
	jobID := e.create("ann")
	e.runs(jobID, 1)
	for i := range int64(20) {
		c := chunk(i+1, stdout, fmt.Sprint(i))
		if i < 10 {
			e.store.archive(jobID, 1, c)
		} else {
			e.publish(jobID, 1, c)
		}
	}
	last, seen := "", []string(nil)
	for len(seen) < 20 {
		headers := map[string]string{}
		if last != "" {
			headers["Last-Event-ID"] = last
		}
		n := 0
		require.NoError(t, e.events("/api/jobs/"+jobID+"/logs?follow=true", headers, func(id, name, data string) bool {
			require.Equal(t, "output", name)
			var item api.LogItem
			require.NoError(t, json.Unmarshal([]byte(data), &item))
			last, seen = id, append(seen, item.Data)
			n++
			return n == 3 || len(seen) == 20
		}))
	}
	for i := range 20 {
		require.Equal(t, fmt.Sprint(i), seen[i])
	}
	require.Equal(t, "1-20", last)
}

// TestFollowAcrossAttempts: a retry goes on in the same stream.
func TestFollowAcrossAttempts(t *testing.T) {
	e := start(t, nil)
	a := e.do("POST", "/api/jobs/create", token(t, "ann", auth.RoleUser), `{"command":"false","retry":{"maxAttempts":2,"backoffSeconds":0}}`)
	jobID := a.job(t).JobID
	var mu sync.Mutex
	var got []string
	done := make(chan api.Job, 1)
	go func() {
		j, err := e.sdk("ann").Follow(t.Context(), jobID, client.Position{}, func(i client.Item) {
			mu.Lock()
			defer mu.Unlock()
			got = append(got, fmt.Sprintf("%d-%d%s", i.Attempt, i.Seq, i.Bytes()))
		})
		if err != nil {
			t.Error(err)
		}
		done <- j
	}()
	// The first dispatch never reaches its worker: an attempt without output.
	e.move(jobID, job.Assign{WorkerID: "w1", LeaseID: lease(1).LeaseID}, job.Return{Fence: lease(1), Outcome: job.OutcomeReturned})
	e.runs(jobID, 2)
	e.publish(jobID, 2, chunk(1, stdout, "x"))
	e.move(jobID, ended(2, job.OutcomeFailed, 1, &job.Manifest{Chunks: 2}), job.Requeue{})
	e.runs(jobID, 3)
	e.publish(jobID, 3, chunk(1, stdout, "z")) // before the end of attempt 2 is stored
	e.store.archive(jobID, 2, chunk(1, stdout, "x"), chunk(2, stdout, "y"))
	e.move(jobID, ended(3, job.OutcomeSucceeded, 0, &job.Manifest{Chunks: 1}))
	e.store.archive(jobID, 3, chunk(1, stdout, "z"))
	require.Equal(t, job.Succeeded, (<-done).Status)
	require.Equal(t, []string{"2-1x", "2-2y", "3-1z"}, got)
}

// TestFollowSaysWhatIsMissing: output that never comes does not hold up a follower
// for ever, and the end says that something is missing.
func TestFollowSaysWhatIsMissing(t *testing.T) {
	e := start(t, nil)
	e.svc.archiveWait = 100 * time.Millisecond
	jobID := e.create("ann")
	e.runs(jobID, 1)
	var mu sync.Mutex
	var got []int64
	done := make(chan api.Job, 1)
	go func() {
		j, err := e.sdk("ann").Follow(t.Context(), jobID, client.Position{}, func(i client.Item) {
			mu.Lock()
			defer mu.Unlock()
			got = append(got, i.Seq)
		})
		if err != nil {
			t.Error(err)
		}
		done <- j
	}()
	e.publish(jobID, 1, chunk(1, stdout, "a"), chunk(3, stdout, "c"), chunk(4, stdout, "d"))
	eventually(t, "what comes after the gap", func() bool { mu.Lock(); defer mu.Unlock(); return len(got) == 3 })
	e.move(jobID, ended(1, job.OutcomeSucceeded, 0, &job.Manifest{Chunks: 6}))
	j := <-done
	require.Equal(t, []int64{1, 3, 4}, got)
	require.Equal(t, job.Succeeded, j.Status)
	require.False(t, j.Logs.Complete)

	ann := token(t, "ann", auth.RoleUser)
	l := e.page(jobID, "")
	require.False(t, l.Complete)
	eventually(t, "pages end as well", func() bool { return e.page(jobID, "").EOF })
	require.Equal(t, 200, e.do("GET", "/api/jobs/"+jobID+"/logs?format=text", ann, "").status)
}

// TestFollowerOrder: however the two sources deliver, each piece is handed on
// once and in order.
func TestFollowerOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(1, 30).Draw(t, "chunks")
		var got []int64
		f := &follower{s: &Service{archiveWait: time.Hour}, rec: &job.Record{Attempt: 2}, attempt: 1, emit: func(attempt int, c *workerproto.Chunk) error {
			got = append(got, int64(attempt)*1000+c.Seq)
			return nil
		}}
		deliver := func(attempt int, label string) {
			order := rapid.Permutation(seqs(n)).Draw(t, label)
			repeats := rapid.SliceOf(rapid.SampledFrom(seqs(n))).Draw(t, label+" repeated")
			for _, seq := range append(order, repeats...) {
				if _, err := f.offer(attempt, workerproto.Chunk{Seq: seq, Stream: stdout, Data: []byte("x")}); err != nil {
					t.Fatal(err)
				}
				if rapid.Bool().Draw(t, "early") { // the next attempt's output comes before its time
					if _, err := f.offer(2, workerproto.Chunk{Seq: seq, Stream: stdout, Data: []byte("x")}); err != nil {
						t.Fatal(err)
					}
				}
			}
		}
		deliver(1, "first")
		f.enter(2)
		if err := f.closeGap(time.Now()); err != nil {
			t.Fatal(err)
		}
		deliver(2, "second")
		var want []int64
		for attempt := range int64(2) {
			for _, s := range seqs(n) {
				want = append(want, (attempt+1)*1000+s)
			}
		}
		if !slices.Equal(want, got) {
			t.Fatalf("want %v, got %v", want, got)
		}
		if len(f.held) != 0 || f.heldSize != 0 {
			t.Fatalf("%d chunks and %d bytes are still held", len(f.held), f.heldSize)
		}
	})
}

func seqs(n int) []int64 {
	out := make([]int64, n)
	for i := range out {
		out[i] = int64(i) + 1
	}
	return out
}

// TestFollowEndsWithoutOutput: jobs that never ran.
func TestFollowEndsWithoutOutput(t *testing.T) {
	e := start(t, nil)
	jobID := e.create("ann")
	done := make(chan api.Job, 1)
	go func() {
		j, err := e.sdk("ann").Follow(t.Context(), jobID, client.Position{}, func(client.Item) { t.Error("no output was printed") })
		if err != nil {
			t.Error(err)
		}
		done <- j
	}()
	_, err := e.sdk("ann").Cancel(t.Context(), jobID)
	require.NoError(t, err)
	require.Equal(t, job.Canceled, (<-done).Status)
}

func TestFollowText(t *testing.T) {
	e := start(t, nil)
	jobID := e.create("ann")
	e.runs(jobID, 1)
	e.publish(jobID, 1, chunk(1, stdout, "a"), chunk(2, stderr, "b"), chunk(3, stdout, "c"))
	e.store.archive(jobID, 1, chunk(1, stdout, "a"), chunk(2, stderr, "b"), chunk(3, stdout, "c"))
	e.move(jobID, ended(1, job.OutcomeSucceeded, 0, &job.Manifest{Chunks: 3}))
	a := e.do("GET", "/api/jobs/"+jobID+"/logs?follow=true&format=text&stream=stdout", token(t, "ann", auth.RoleUser), "")
	require.Equal(t, "ac", string(a.body))
}

func TestEvents(t *testing.T) {
	e := start(t, nil)
	jobID := e.create("ann")
	var mu sync.Mutex
	var got []job.State
	done := make(chan error, 1)
	go func() {
		done <- e.sdk("ann").Events(t.Context(), jobID, func(s api.StateEvent) {
			mu.Lock()
			defer mu.Unlock()
			got = append(got, s.Status)
		})
	}()
	have := func(n int) func() bool {
		return func() bool { mu.Lock(); defer mu.Unlock(); return len(got) == n }
	}
	eventually(t, "the present state", have(1))
	e.runs(jobID, 1)
	eventually(t, "assigned and running", have(3))
	e.move(jobID, ended(1, job.OutcomeSucceeded, 0, nil))
	require.NoError(t, <-done)
	require.Equal(t, []job.State{job.Queued, job.Assigned, job.Running, job.Succeeded}, got)
}

func TestStreamsEndAtStop(t *testing.T) {
	e := start(t, nil)
	jobID := e.create("ann")
	errs := make(chan error, 3)
	for _, path := range []string{"/events", "/logs?follow=true"} {
		go func() {
			errs <- e.events("/api/jobs/"+jobID+path, nil, func(string, string, string) bool { return false })
		}()
	}
	executed := make(chan answer, 1)
	go func() {
		executed <- e.do("POST", "/api/execute", token(e, "ann", auth.RoleUser), `{"command":"true"}`)
	}()
	eventually(t, "three calls wait", func() bool {
		e.svc.hub.mu.Lock()
		defer e.svc.hub.mu.Unlock()
		return e.svc.hub.count == 3
	})
	began := time.Now()
	e.stop()
	require.Less(t, time.Since(began), 5*time.Second, "waiting calls do not hold up the stop")
	for range 2 {
		require.Error(t, <-errs, "a stream that did not reach its end is cut")
	}
	a := <-executed
	p := a.problem(t)
	require.Equal(t, "stopping", p.Code)
	rec, err := e.conn.Registry().Get(t.Context(), p.JobID)
	require.NoError(t, err)
	require.Equal(t, job.Queued, rec.Record.State, "a stop cancels no job")
}
