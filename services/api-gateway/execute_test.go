package gateway

import (
	"context"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/client"
	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
)

// next waits for a job that is queued, and returns its id.
func (e *env) next() string {
	e.Helper()
	found := ""
	eventually(e, "a queued job", func() bool {
		err := e.conn.Registry().Scan(e.Context(), func(entry bus.Entry) error {
			if entry.Record.State == job.Queued {
				found = entry.Record.ID
			}
			return nil
		})
		require.NoError(e, err)
		return found != ""
	})
	return found
}

var trueSpec = job.Spec{Command: job.Command{Shell: "true"}}

func TestExecute(t *testing.T) {
	e := start(t, nil)
	results := make(chan api.ExecuteResult, 1)
	go func() {
		r, err := e.sdk("ann").Execute(t.Context(), trueSpec, client.ExecuteOptions{})
		if err != nil {
			t.Error(err)
		}
		results <- r
	}()
	jobID := e.next()
	e.runs(jobID, 1)
	big := strings.Repeat("y", 60<<10)
	chunks := int64(20)
	for i := range chunks - 1 {
		e.store.archive(jobID, 1, chunk(i+1, stdout, big))
	}
	e.move(jobID, ended(1, job.OutcomeFailed, 7, &job.Manifest{Chunks: chunks}))
	time.AfterFunc(30*time.Millisecond, func() { e.store.archive(jobID, 1, chunk(chunks, stderr, "oops")) })
	r := <-results
	require.Equal(t, jobID, r.JobID)
	require.Equal(t, job.Failed, r.Status)
	require.Equal(t, 7, *r.ExitCode)
	require.Equal(t, job.ReasonExitCode, r.Reason)
	require.Len(t, r.Stdout, maxExecuteOutput)
	require.True(t, r.StdoutTruncated)
	require.Equal(t, "oops", r.Stderr, "waits for what is still being stored")
	require.False(t, r.StderrTruncated)
	require.Positive(t, r.DurationMs)
}

func TestExecuteStream(t *testing.T) {
	e := start(t, nil)
	type outcome struct {
		j   api.Job
		err error
	}
	done := make(chan outcome, 1)
	var text strings.Builder
	go func() {
		j, err := e.sdk("ann").ExecuteStream(t.Context(), trueSpec, client.ExecuteOptions{}, func(i client.Item) { text.Write(i.Bytes()) })
		done <- outcome{j, err}
	}()
	jobID := e.next()
	e.runs(jobID, 1)
	e.publish(jobID, 1, chunk(1, stdout, "hello"))
	e.store.archive(jobID, 1, chunk(1, stdout, "hello"))
	e.move(jobID, ended(1, job.OutcomeSucceeded, 0, &job.Manifest{Chunks: 1}))
	o := <-done
	require.NoError(t, o.err)
	require.Equal(t, job.Succeeded, o.j.Status)
	require.Equal(t, "hello", text.String())
}

func TestExecuteDisconnect(t *testing.T) {
	e := start(t, nil)
	for _, c := range []struct {
		query, accept string
		want          job.State
	}{
		{"", "", job.Canceled},
		{"?onDisconnect=cancel", "text/event-stream", job.Canceled},
		{"?onDisconnect=leave", "", job.Queued},
		{"?onDisconnect=leave", "text/event-stream", job.Queued},
	} {
		ctx, cancel := context.WithCancel(t.Context())
		req, err := http.NewRequestWithContext(ctx, "POST", e.base+"/api/execute"+c.query, strings.NewReader(`{"command":"true"}`))
		require.NoError(t, err)
		req.Header.Set("Authorization", "Bearer "+token(t, "ann", auth.RoleUser))
		req.Header.Set("Content-Type", "application/json")
		req.Header.Set("Accept", c.accept)
		gone := make(chan struct{})
		go func() {
			defer close(gone)
			if resp, err := e.http.Do(req); err == nil {
				buf := make([]byte, 1)
				_, _ = resp.Body.Read(buf)
				_ = resp.Body.Close()
			}
		}()
		jobID := e.next()
		eventually(t, "the call waits", func() bool { return !e.svc.hub.idle() })
		cancel()
		<-gone
		eventually(t, "the call is over", e.svc.hub.idle)
		eventually(t, "the job is as asked", func() bool {
			entry, err := e.conn.Registry().GetLatest(t.Context(), jobID)
			return err == nil && entry.Record.State == c.want
		})
		if c.want == job.Queued {
			e.move(jobID, job.CancelRequest{})
		}
	}
	bad := e.do("POST", "/api/execute?onDisconnect=x", token(t, "ann", auth.RoleUser), `{"command":"true"}`)
	require.Equal(t, "bad_parameter", bad.problem(t).Code)
}

func TestPatience(t *testing.T) {
	grace := 10
	spec := job.Spec{Timeout: 60, Stop: job.Stop{GraceSeconds: &grace}}
	require.Equal(t, executeQueueWait+70*time.Second+executeSlack, patience(&spec))
	spec.Timeouts.Queue = 5
	require.Equal(t, 75*time.Second+executeSlack, patience(&spec))
}

func BenchmarkCreate(b *testing.B) {
	e := start(b, func(c *Config) { c.MaxQueuedPerUser = 100_000_000 })
	tok := token(b, "ann", auth.RoleUser)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if a := e.do("POST", "/api/jobs/create", tok, `{"command":"echo hello","labels":{"a":"b"},"env":{"A":"B"}}`); a.status != 201 {
				b.Fatalf("%d %s", a.status, a.body)
			}
		}
	})
}
