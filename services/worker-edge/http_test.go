package edge_test

import (
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/config"
	"github.com/cmdexec/cmdexec/libs/natsd/natsdtest"
	edge "github.com/cmdexec/cmdexec/services/worker-edge"
	"github.com/cmdexec/cmdexec/services/worker-edge/internal/workertest"
)

// polling polls until the test says what to do with the answer.
func polling(c *workertest.HTTP) <-chan workertest.Answer {
	got := make(chan workertest.Answer, 1)
	go func() {
		a, err := c.Try(http.MethodGet, workerproto.PathGetJob+"?waitSeconds=20", nil, nil)
		if err != nil {
			a = workertest.Answer{Body: []byte(err.Error())}
		}
		got <- a
	}()
	return got
}

func taken(t *testing.T, a workertest.Answer) workerproto.Assignment {
	t.Helper()
	return workertest.Body[workerproto.Assignment](t, a)
}

func result(l workerproto.Lease) workerproto.Result {
	zero := 0
	return workerproto.Result{Lease: l, Outcome: job.OutcomeSucceeded, ExitCode: &zero, FinishedAt: time.Now().UTC()}
}

func short(c *edge.Config) { c.HeartbeatSeconds, c.LeaseSeconds = 1, 60 }

// One attempt over plain HTTP from register to the acknowledged result.
func TestHTTPAttempt(t *testing.T) {
	o := inProcess(natsdtest.Start(t))
	w := newWorld(t, o)
	url, stop, metrics := w.edge(o, short)
	w.lead()
	c := workertest.NewHTTP(t, url, "worker-a")
	welcome := c.Register()
	require.Equal(t, 60, welcome.LeaseSeconds)
	require.Equal(t, 1, welcome.HeartbeatSeconds)
	stored, err := w.conn.Workers().Get(t.Context(), "worker-a")
	require.NoError(t, err)
	require.True(t, stored.Online)
	require.Equal(t, "http", stored.Transport)
	require.Zero(t, stored.Backlog, "nothing waits for a worker that has to ask")
	require.Equal(t, c.Session, stored.SessionID)

	poll := polling(c)
	l := w.assign("worker-a")
	asg := taken(t, <-poll)
	require.Equal(t, l, asg.Lease)
	require.Equal(t, "true", asg.Job.Command.Shell)
	require.InDelta(t, 60, asg.LeaseSeconds, 20, "counted from what the scheduler has answered")
	require.Equal(t, []string{l.LeaseID}, c.Beat(3, l).Confirmed)
	require.Equal(t, http.StatusNoContent, c.Poll(0).Status, "the heartbeat has listed it")
	require.Equal(t, workerproto.CancelReply{}, c.CheckCancel(l))

	output := w.output(l.JobID)
	out := func(chunks ...workerproto.Chunk) workerproto.OutputReply {
		return workertest.Body[workerproto.OutputReply](t, c.Post(workerproto.PathOutput, workerproto.Output{WorkerID: c.ID, Lease: l, Chunks: chunks}))
	}
	one, two := workertest.Chunk(1, 0, []byte("one\n")), workertest.Chunk(2, 4, []byte("two\n"))
	require.Equal(t, workerproto.OutputReply{AckedSeq: 1}, out(one))
	require.Equal(t, workerproto.OutputReply{AckedSeq: 2}, out(one, two), "a repeat is acknowledged, not stored")
	require.Equal(t, workerproto.OutputReply{AckedSeq: 2}, out(), "without chunks it asks how far the bus is")
	w.eventually("the output is stored once", func() bool { return len(output()) == 2 })

	results := w.results()
	accepted := workerproto.ResultReply{Accepted: true}
	require.Equal(t, accepted, workertest.Body[workerproto.ResultReply](t, c.Post(workerproto.PathResult, result(l))))
	require.Equal(t, accepted, workertest.Body[workerproto.ResultReply](t, c.Post(workerproto.PathResult, result(l))), "its repeat is harmless")
	w.eventually("the result is stored", func() bool { return len(results()) >= 1 })
	require.Equal(t, "worker-a", results()[0].WorkerID)
	require.Equal(t, workerproto.OutputReply{Stale: true}, out(workertest.Chunk(3, 8, []byte("late"))))
	require.Equal(t, workerproto.CancelReply{Stale: true}, c.CheckCancel(l))

	// A worker that is not heard any more has no session, and the scheduler knows.
	w.eventually("offline", func() bool {
		stored, err := w.conn.Workers().Get(t.Context(), "worker-a")
		return err == nil && !stored.Online
	})
	w.eventually("the scheduler knows", func() bool { return w.seen(func(b busmsg.WorkerBeat) bool { return b.Closed }) })
	a := c.Post(workerproto.PathHeartbeat, workerproto.Heartbeat{Status: workerproto.StatusIdle})
	require.Equal(t, http.StatusConflict, a.Status)
	require.Equal(t, workerproto.CodeRegisterAgain, a.Problem(t))
	require.Equal(t, float64(0), value(t, metrics, "cmdexec_edge_sessions"))
	require.Equal(t, float64(0), value(t, metrics, "cmdexec_edge_inflight_bytes"))
	require.NoError(t, stop())
}

// Free slots are passed on only while the worker asks for work.
func TestHTTPFreeSlots(t *testing.T) {
	o := inProcess(natsdtest.Start(t))
	w := newWorld(t, o)
	w.lead()
	url, _, _ := w.edge(o)
	c := workertest.NewHTTP(t, url, "worker-a")
	c.Register()
	l := w.assign("worker-a") // it is about to poll
	w.eventually("what is not fetched is given back", func() bool {
		return w.seen(func(b busmsg.WorkerBeat) bool {
			return len(b.Progress) > 0 && b.Progress[0].Step == workerproto.TypeRejected && b.Progress[0].Lease == l
		})
	})
	reply, err := w.conn.SendCommand(t.Context(), "worker-a", busmsg.WorkerCommand{Assign: []workerproto.Assignment{{Lease: workertest.Lease(), LeaseSeconds: 60}}})
	require.NoError(t, err)
	require.False(t, reply.Assign[0].Delivered, "refused while no poll is open")
	require.Equal(t, http.StatusNoContent, c.Poll(0).Status, "it is never handed over after that")

	free := func(n int) bool {
		return w.seen(func(b busmsg.WorkerBeat) bool { return b.Heartbeat != nil && b.Heartbeat.FreeSlots == n })
	}
	w.eventually("none are free without a poll", func() bool { c.Beat(4); return free(0) })
	w.mu.Lock()
	w.beats = nil // a beat right after the last poll still had four
	w.mu.Unlock()
	poll := polling(c)
	w.eventually("four are free with one", func() bool { return free(4) })
	l = w.assign("worker-a")
	require.Equal(t, l, taken(t, <-poll).Lease)
}

// Answers that are lost are repeated until the worker lists the lease.
func TestHTTPHandedOverAgain(t *testing.T) {
	o := inProcess(natsdtest.Start(t))
	w := newWorld(t, o)
	w.lead()
	url, _, metrics := w.edge(o)
	c := workertest.NewHTTP(t, url, "worker-a")
	c.Register()
	first := w.assign("worker-a")
	second := w.assign("worker-a")
	require.Equal(t, first, taken(t, c.Poll(20*time.Second)).Lease)
	require.Equal(t, second, taken(t, c.Poll(20*time.Second)).Lease)
	require.Equal(t, http.StatusNoContent, c.Poll(0).Status, "no repeat before a heartbeat shows that it is missing")
	c.Beat(2, second)
	again := taken(t, c.Poll(20*time.Second))
	require.Equal(t, first, again.Lease)
	require.LessOrEqual(t, again.LeaseSeconds, 60)
	require.Equal(t, http.StatusNoContent, c.Poll(0).Status)
	c.Beat(2, first, second)
	require.Equal(t, http.StatusNoContent, c.Poll(0).Status)
	require.Equal(t, float64(1), value(t, metrics, "cmdexec_edge_repeated_assignments_total"))

	// A connection that breaks under the answer needs no heartbeat, or one.
	broken := workertest.NewHTTP(t, url, "worker-a")
	broken.Client.Timeout = 100 * time.Millisecond
	_, err := broken.Try(http.MethodGet, workerproto.PathGetJob+"?waitSeconds=20", nil, nil)
	require.Error(t, err)
	third := w.assign("worker-a")
	c.Beat(1, first, second)
	require.Equal(t, third, taken(t, c.Poll(20*time.Second)).Lease)
	// A result shows as well as a heartbeat that the worker has an assignment.
	require.Equal(t, http.StatusOK, c.Post(workerproto.PathResult, result(third)).Status)
	c.Beat(1, first, second)
	require.Equal(t, http.StatusNoContent, c.Poll(0).Status)
}

// An assignment may reach the edge long after it was made. The lease that the worker
// is told counts from what the scheduler has answered, and not from the poll.
func TestHTTPAssignmentThatComesLate(t *testing.T) {
	o := inProcess(natsdtest.Start(t))
	w := newWorld(t, o)
	w.lead()
	url, _, _ := w.edge(o, short)
	c := workertest.NewHTTP(t, url, "worker-a")
	c.Register()
	send := func() bool {
		spec, errs := job.Normalise(job.Spec{Command: job.Command{Shell: "true"}})
		require.Empty(t, errs)
		reply, err := w.conn.SendCommand(t.Context(), "worker-a", busmsg.WorkerCommand{
			Assign: []workerproto.Assignment{{Lease: workertest.Lease(), LeaseSeconds: 4, Job: spec}},
		})
		require.NoError(t, err)
		return reply.Assign[0].Delivered
	}
	w.eventually("refused when nothing was answered for three quarters of its lease", func() bool {
		if !send() {
			return true
		}
		require.Equal(t, http.StatusOK, c.Poll(time.Second).Status)
		c.Poll(time.Second) // the worker asks on, and sends no heartbeat
		return false
	})
	w.eventually("taken after a heartbeat", func() bool {
		c.Poll(0)
		c.Beat(1)
		return send()
	})
	asg := taken(t, c.Poll(time.Second))
	require.LessOrEqual(t, asg.LeaseSeconds, 4)
	require.Positive(t, asg.LeaseSeconds, "none would be the default")
}

// A cancel wakes the poll, which asks for the heartbeat that tells it.
func TestHTTPCancel(t *testing.T) {
	o := inProcess(natsdtest.Start(t))
	w := newWorld(t, o)
	w.lead()
	url, _, _ := w.edge(o)
	c := workertest.NewHTTP(t, url, "worker-a")
	c.Register()
	l := w.assign("worker-a")
	require.Equal(t, l, taken(t, c.Poll(20*time.Second)).Lease)
	c.Beat(3, l)
	poll := polling(c)
	w.mu.Lock()
	w.reply = func(b busmsg.WorkerBeat) busmsg.WorkerReply {
		r := confirm(b)
		r.Cancel = []workerproto.Lease{l}
		return r
	}
	w.mu.Unlock()
	_, err := w.conn.SendCommand(t.Context(), "worker-a", busmsg.WorkerCommand{Cancel: []workerproto.Lease{l}})
	require.NoError(t, err)
	a := <-poll
	require.Equal(t, http.StatusNoContent, a.Status)
	require.Equal(t, workerproto.HeartbeatNow, a.Header.Get(workerproto.HeartbeatHeader))
	require.Equal(t, workerproto.CancelReply{Cancel: true}, c.CheckCancel(l))
	require.Equal(t, []workerproto.Lease{l}, c.Beat(3, l).Cancel)
	require.Empty(t, c.Poll(0).Header.Get(workerproto.HeartbeatHeader), "it was told")
}

// A lease that the scheduler calls stale takes no output and no result.
func TestHTTPStale(t *testing.T) {
	o := inProcess(natsdtest.Start(t))
	w := newWorld(t, o)
	w.lead()
	url, _, _ := w.edge(o)
	c := workertest.NewHTTP(t, url, "worker-a")
	old := workertest.Lease()
	w.mu.Lock()
	w.reply = func(b busmsg.WorkerBeat) busmsg.WorkerReply {
		return busmsg.WorkerReply{WorkerID: b.WorkerID, SessionID: b.SessionID, Stale: []workerproto.Lease{old}}
	}
	w.mu.Unlock()
	require.Equal(t, []workerproto.Lease{old}, c.Register(old).Stale)
	require.Equal(t, []string{old.LeaseID}, c.Beat(3, old).Stale)
	results := w.results()
	for _, l := range []workerproto.Lease{old, workertest.Lease()} {
		a := c.Post(workerproto.PathOutput, workerproto.Output{Lease: l, Chunks: []workerproto.Chunk{workertest.Chunk(1, 0, []byte("x"))}})
		require.Equal(t, workerproto.OutputReply{Stale: true}, workertest.Body[workerproto.OutputReply](t, a))
		require.Equal(t, workerproto.CancelReply{Stale: true}, c.CheckCancel(l))
	}
	require.Equal(t, workerproto.ResultReply{Stale: true}, workertest.Body[workerproto.ResultReply](t, c.Post(workerproto.PathResult, result(old))))
	require.Empty(t, results())
	// One that the session has never heard of is for the registry to judge.
	require.Equal(t, workerproto.ResultReply{Accepted: true}, workertest.Body[workerproto.ResultReply](t, c.Post(workerproto.PathResult, result(workertest.Lease()))))
}

// A worker goes from a socket to HTTP, to another edge and back, with a lease.
func TestHTTPTakeover(t *testing.T) {
	o := inProcess(natsdtest.Start(t))
	w := newWorld(t, o)
	w.lead()
	first, _, _ := w.edge(o)
	second, stopSecond, _ := w.edge(o)
	socket := open(t, first, "worker-a")
	l := w.assign("worker-a")
	socket.Chunk(l, workertest.Chunk(1, 0, []byte("1")))
	socket.NextOf(workerproto.TypeAck)

	c := workertest.NewHTTP(t, first, "worker-a")
	c.Register(l)
	socket.NextOf(workerproto.TypeGoaway)
	code, _ := socket.Ended()
	require.Equal(t, workerproto.CloseReplaced, code)
	out := func(c *workertest.HTTP, seq int64) workertest.Answer {
		return c.Post(workerproto.PathOutput, workerproto.Output{Lease: l, Chunks: []workerproto.Chunk{workertest.Chunk(seq, seq-1, []byte("x"))}})
	}
	require.Equal(t, workerproto.OutputReply{AckedSeq: 2}, workertest.Body[workerproto.OutputReply](t, out(c, 2)))

	// The other edge says that it is the wrong one, whatever is asked.
	elsewhere := *c
	elsewhere.URL = second
	for _, session := range []string{c.Session, ""} {
		elsewhere.Session = session
		a := elsewhere.Poll(0)
		require.Equal(t, http.StatusMisdirectedRequest, a.Status)
		require.Equal(t, workerproto.CodeWrongEdge, a.Problem(t))
	}
	moved := workertest.NewHTTP(t, second, "worker-a")
	poll := polling(c)
	moved.Register(l)
	a := <-poll
	require.Equal(t, http.StatusConflict, a.Status, "the open poll is told")
	require.Equal(t, workerproto.CodeReplaced, a.Problem(t))
	require.Equal(t, workerproto.CodeReplaced, c.Poll(0).Problem(t), "and so is what comes later")
	require.Equal(t, workerproto.OutputReply{AckedSeq: 3}, workertest.Body[workerproto.OutputReply](t, out(moved, 3)))
	for range 3 {
		next := w.assign("worker-a")
		require.Equal(t, next, taken(t, moved.Poll(20*time.Second)).Lease, "the newer one has the commands to itself")
	}

	// That edge stops: the worker begins anew at the other, with its lease.
	poll = polling(moved)
	w.eventually("the poll is open", func() bool { return w.assign("worker-a").JobID != "" })
	<-poll
	require.NoError(t, stopSecond())
	c.Session = moved.Session
	a = c.Poll(0)
	require.Equal(t, workerproto.CodeRegisterAgain, a.Problem(t))
	c.Session = ""
	c.Register(l)
	require.Equal(t, workerproto.OutputReply{AckedSeq: 4}, workertest.Body[workerproto.OutputReply](t, out(c, 4)))

	// And back to a socket.
	socket = open(t, first, "worker-a", l)
	require.Equal(t, workerproto.CodeReplaced, c.Poll(0).Problem(t))
	socket.Chunk(l, workertest.Chunk(5, 4, []byte("x")))
	require.Equal(t, int64(5), workertest.Decode[workerproto.Ack](t, socket.NextOf(workerproto.TypeAck)).AckedSeq)
}

// While nobody leads nothing is confirmed; what is stored is.
func TestHTTPWithoutAScheduler(t *testing.T) {
	o := inProcess(natsdtest.Start(t))
	w := newWorld(t, o)
	url, _, _ := w.edge(o, func(c *edge.Config) { c.LeaseSeconds, c.HeartbeatSeconds = 12, 1 })
	c := workertest.NewHTTP(t, url, "worker-a")
	a := c.Post(workerproto.PathRegister, workertest.Hello("worker-a"))
	require.Equal(t, http.StatusServiceUnavailable, a.Status)
	require.Equal(t, "unavailable", a.Problem(t))
	require.NotEmpty(t, a.Header.Get("Retry-After"))
	w.eventually("that session is over", func() bool {
		stored, err := w.conn.Workers().Get(t.Context(), "worker-a")
		return err == nil && !stored.Online
	})
	w.lead()
	c.Register()
}

// Nothing that a worker can send is worth more than a problem to the edge.
func TestHTTPBadInput(t *testing.T) {
	o := inProcess(natsdtest.Start(t))
	w := newWorld(t, o)
	w.lead()
	url, _, _ := w.edge(o)
	c := workertest.NewHTTP(t, url, "worker-a")
	c.Register()
	l := w.assign("worker-a")
	taken(t, c.Poll(20*time.Second))
	lease := strings.Trim(workertest.JSON(t, l), "{}")
	big := strings.Repeat("x", workerproto.MaxFrameBytes)
	many := make([]string, workerproto.MaxRunning+1)
	for i := range many {
		many[i] = "{" + lease + `,"phase":"started"}`
	}
	chunk := func(fields string) string { return "{" + lease + `,"chunks":[{` + fields + "}]}" }
	for name, tc := range map[string]struct {
		path, body string
		status     int
		code       string
	}{
		"register: other worker":         {workerproto.PathRegister, workertest.JSON(t, workertest.Hello("worker-b")), 403, "other_worker"},
		"register: no worker":            {workerproto.PathRegister, workertest.JSON(t, workertest.Hello("")), 403, "other_worker"},
		"register: protocol":             {workerproto.PathRegister, strings.Replace(workertest.JSON(t, workertest.Hello("worker-a")), `"protocol":1`, `"protocol":99`, 1), 422, "unsupported_protocol"},
		"register: negative slots":       {workerproto.PathRegister, strings.Replace(workertest.JSON(t, workertest.Hello("worker-a")), `"slots":4`, `"slots":-4`, 1), 422, "invalid_report"},
		"register: huge number":          {workerproto.PathRegister, strings.Replace(workertest.JSON(t, workertest.Hello("worker-a")), `"slots":4`, `"slots":1e999`, 1), 422, "invalid_report"},
		"register: a lease of nothing":   {workerproto.PathRegister, strings.Replace(workertest.JSON(t, workertest.Hello("worker-a")), `"running":[]`, `"running":[{}]`, 1), 422, "invalid_report"},
		"heartbeat: other worker":        {workerproto.PathHeartbeat, `{"workerId":"worker-b","status":"idle"}`, 403, "other_worker"},
		"heartbeat: no status":           {workerproto.PathHeartbeat, `{"freeSlots":1}`, 422, "invalid_report"},
		"heartbeat: negative slots":      {workerproto.PathHeartbeat, `{"status":"idle","freeSlots":-1}`, 422, "invalid_report"},
		"heartbeat: too many leases":     {workerproto.PathHeartbeat, `{"status":"busy","running":[` + strings.Join(many, ",") + `]}`, 422, "invalid_report"},
		"heartbeat: wrong type":          {workerproto.PathHeartbeat, `{"status":7}`, 422, "invalid_report"},
		"heartbeat: subject in a job id": {workerproto.PathHeartbeat, `{"status":"idle","running":[{"jobId":"job.>","attempt":1,"leaseId":"*"}]}`, 422, "invalid_report"},
		"heartbeat: no JSON":             {workerproto.PathHeartbeat, `nonsense`, 400, "invalid_json"},
		"heartbeat: two documents":       {workerproto.PathHeartbeat, `{"status":"idle"}{}`, 400, "trailing_data"},
		"heartbeat: same key twice":      {workerproto.PathHeartbeat, `{"status":"idle","status":"busy"}`, 400, "duplicate_key"},
		"heartbeat: an array":            {workerproto.PathHeartbeat, `[]`, 400, "not_an_object"},
		"heartbeat: nothing":             {workerproto.PathHeartbeat, ``, 400, "empty_body"},
		"heartbeat: too deep":            {workerproto.PathHeartbeat, strings.Repeat(`{"a":`, 100) + "1" + strings.Repeat("}", 100), 400, "too_deep"},
		"heartbeat: not UTF-8":           {workerproto.PathHeartbeat, "{\"status\":\"\xff\"}", 400, "invalid_utf8"},
		"heartbeat: too large":           {workerproto.PathHeartbeat, `{"status":"` + big + `"}`, 413, "body_too_large"},
		"output: other worker":           {workerproto.PathOutput, `{"workerId":"worker-b",` + lease + `}`, 403, "other_worker"},
		"output: seq 0":                  {workerproto.PathOutput, chunk(`"seq":0,"offset":0,"stream":"stdout","time":"2026-01-01T00:00:00Z","data":"eA=="`), 422, "invalid_report"},
		"output: negative offset":        {workerproto.PathOutput, chunk(`"seq":1,"offset":-1,"stream":"stdout","time":"2026-01-01T00:00:00Z","data":"eA=="`), 422, "invalid_report"},
		"output: a gap":                  {workerproto.PathOutput, chunk(`"seq":9,"offset":0,"stream":"stdout","time":"2026-01-01T00:00:00Z","data":"eA=="`), 422, "invalid_report"},
		"output: no stream":              {workerproto.PathOutput, chunk(`"seq":1,"offset":0,"stream":"stdin","time":"2026-01-01T00:00:00Z","data":"eA=="`), 422, "invalid_report"},
		"output: no base64":              {workerproto.PathOutput, chunk(`"seq":1,"offset":0,"stream":"stdout","time":"2026-01-01T00:00:00Z","data":"%"`), 422, "invalid_report"},
		"output: no data":                {workerproto.PathOutput, chunk(`"seq":1,"offset":0,"stream":"stdout","time":"2026-01-01T00:00:00Z"`), 422, "invalid_report"},
		"output: too much data":          {workerproto.PathOutput, chunk(`"seq":1,"offset":0,"stream":"stdout","time":"2026-01-01T00:00:00Z","data":"` + strings.Repeat("AAAA", 30<<10) + `"`), 422, "invalid_report"},
		"output: too large":              {workerproto.PathOutput, chunk(`"data":"` + big + `"`), 413, "body_too_large"},
		"result: other worker":           {workerproto.PathResult, `{"workerId":"worker-b",` + lease + `,"outcome":"succeeded"}`, 403, "other_worker"},
		"result: no outcome":             {workerproto.PathResult, "{" + lease + "}", 422, "invalid_report"},
		"result: an outcome of ours":     {workerproto.PathResult, "{" + lease + `,"outcome":"lost"}`, 422, "invalid_report"},
		"result: negative usage":         {workerproto.PathResult, "{" + lease + `,"outcome":"failed","cpuMs":-1}`, 422, "invalid_report"},
		"result: negative manifest":      {workerproto.PathResult, "{" + lease + `,"outcome":"failed","manifest":{"chunks":-1}}`, 422, "invalid_report"},
		"result: no lease":               {workerproto.PathResult, `{"outcome":"failed"}`, 422, "invalid_report"},
		"result: too large":              {workerproto.PathResult, "{" + lease + `,"outcome":"failed","message":"` + big + `"}`, 413, "body_too_large"},
	} {
		t.Run(name, func(t *testing.T) {
			a := c.Post(tc.path, tc.body)
			require.Equal(t, tc.status, a.Status, "%s", a.Body)
			require.Equal(t, tc.code, a.Problem(t))
			require.NotContains(t, string(a.Body), "worker-b")
		})
	}
	for name, tc := range map[string]struct {
		path   string
		status int
		code   string
	}{
		"poll: other worker":   {workerproto.PathGetJob + "?workerId=worker-b", 403, "other_worker"},
		"poll: negative":       {workerproto.PathGetJob + "?waitSeconds=-1", 422, "invalid_parameter"},
		"poll: too long":       {workerproto.PathGetJob + "?waitSeconds=31", 422, "invalid_parameter"},
		"poll: no number":      {workerproto.PathGetJob + "?waitSeconds=1.5", 422, "invalid_parameter"},
		"poll: overflow":       {workerproto.PathGetJob + "?waitSeconds=99999999999999999999", 422, "invalid_parameter"},
		"poll: broken query":   {workerproto.PathGetJob + "?waitSeconds=%zz", 422, "invalid_parameter"},
		"cancel: no job":       {workerproto.PathCheckCancel, 422, "invalid_parameter"},
		"cancel: no attempt":   {workerproto.PathCheckCancel + "?jobId=" + l.JobID + "&attempt=0", 422, "invalid_parameter"},
		"cancel: other worker": {workerproto.PathCheckCancel + "?workerId=worker-b&attempt=1&jobId=" + l.JobID, 403, "other_worker"},
	} {
		t.Run(name, func(t *testing.T) {
			a, err := c.Try(http.MethodGet, tc.path, nil, nil)
			require.NoError(t, err)
			require.Equal(t, tc.status, a.Status, "%s", a.Body)
			require.Equal(t, tc.code, a.Problem(t))
		})
	}
	for _, path := range []string{workerproto.PathRegister, workerproto.PathHeartbeat, workerproto.PathOutput, workerproto.PathResult} {
		a, err := c.Try(http.MethodGet, path, nil, nil)
		require.NoError(t, err)
		require.Equal(t, http.StatusMethodNotAllowed, a.Status)
		require.Equal(t, http.MethodPost, a.Header.Get("Allow"))
		for header, code := range map[string]string{"Content-Type": "unsupported_media_type", "Content-Encoding": "unsupported_content_encoding"} {
			a, err := c.Try(http.MethodPost, path, http.Header{header: {"text/plain"}}, []byte(`{}`))
			require.NoError(t, err)
			require.Equal(t, http.StatusUnsupportedMediaType, a.Status)
			require.Equal(t, code, a.Problem(t))
		}
	}
	// The session has come through all of it, and what is not known is ignored.
	a := c.Post(workerproto.PathHeartbeat, `{"status":"busy","freeSlots":1,"colour":"red","running":[{`+lease+`,"phase":"started","mood":1}]}`)
	require.Equal(t, []string{l.LeaseID}, workertest.Body[workerproto.Beat](t, a).Confirmed)
}

// Every token that is not this worker's is 401, on every route.
func TestHTTPTokens(t *testing.T) {
	o := inProcess(natsdtest.Start(t))
	w := newWorld(t, o)
	w.lead()
	url, _, _ := w.edge(o)
	good := workertest.NewHTTP(t, url, "worker-a")
	good.Register()
	for name, token := range map[string]string{
		"none": "", "nonsense": "abc", "unsigned": "eyJhbGciOiJub25lIn0.eyJzdWIiOiJ3b3JrZXItYSJ9.", "cut": good.Token[:len(good.Token)-4],
	} {
		c := *good
		c.Token = token
		for _, route := range [][2]string{
			{"POST", workerproto.PathRegister},
			{"POST", workerproto.PathHeartbeat},
			{"GET", workerproto.PathGetJob},
			{"POST", workerproto.PathOutput},
			{"GET", workerproto.PathCheckCancel},
			{"POST", workerproto.PathResult},
		} {
			a, err := c.Try(route[0], route[1], nil, []byte(`{}`))
			require.NoError(t, err)
			require.Equal(t, http.StatusUnauthorized, a.Status, "%s %s", name, route[1])
			require.Equal(t, "unauthorized", a.Problem(t))
			require.Equal(t, workerproto.TokenHeader, a.Header.Get("WWW-Authenticate"))
		}
	}
	// Another worker has no part in this one's session.
	other := workertest.NewHTTP(t, url, "worker-b")
	other.Session = good.Session
	require.Equal(t, workerproto.CodeRegisterAgain, other.Poll(0).Problem(t))
}

func TestHTTPRateLimits(t *testing.T) {
	o := inProcess(natsdtest.Start(t))
	w := newWorld(t, o)
	w.lead()
	url, _, _ := w.edge(o, func(c *edge.Config) {
		c.RateLimitWorker = config.Rate{Count: 5, Per: time.Minute}
		c.RateLimitIP = config.Rate{Count: 3, Per: time.Minute}
	})
	c := workertest.NewHTTP(t, url, "worker-a")
	c.Register()
	var a workertest.Answer
	for range 5 {
		a = c.Poll(0)
	}
	require.Equal(t, http.StatusTooManyRequests, a.Status)
	require.Equal(t, "rate_limited", a.Problem(t))
	require.Equal(t, "5", a.Header.Get("RateLimit-Limit"))
	require.NotEmpty(t, a.Header.Get("Retry-After"))
	// Output is bounded by acknowledgements instead.
	out := c.Post(workerproto.PathOutput, workerproto.Output{Lease: workertest.Lease(), Chunks: []workerproto.Chunk{workertest.Chunk(1, 0, []byte("x"))}})
	require.Equal(t, http.StatusOK, out.Status)
	// Wrong tokens count for their address.
	c.Token = "guess"
	for range 3 {
		a = c.Poll(0)
	}
	require.Equal(t, http.StatusTooManyRequests, a.Status)
}

// Requests of one worker at once: everything is stored once and acknowledged.
func TestHTTPAtOnce(t *testing.T) {
	o := inProcess(natsdtest.Start(t))
	w := newWorld(t, o)
	w.lead()
	url, _, metrics := w.edge(o)
	c := workertest.NewHTTP(t, url, "worker-a")
	c.Register()
	l := w.assign("worker-a")
	taken(t, c.Poll(20*time.Second))
	output, results := w.output(l.JobID), w.results()
	var chunks []workerproto.Chunk
	for i := range int64(20) {
		chunks = append(chunks, workertest.Chunk(i+1, i*1024, make([]byte, 1024)))
	}
	var wg sync.WaitGroup
	answers := make(chan workertest.Answer, 16)
	body := []byte(workertest.JSON(t, workerproto.Output{Lease: l, Chunks: chunks}))
	for range cap(answers) { // a worker whose answers are late sends again
		wg.Go(func() {
			a, err := c.Try(http.MethodPost, workerproto.PathOutput, nil, body)
			if err != nil {
				a.Body = fmt.Append(nil, err)
			}
			answers <- a
		})
	}
	wg.Wait()
	for range cap(answers) {
		require.Equal(t, workerproto.OutputReply{AckedSeq: 20}, workertest.Body[workerproto.OutputReply](t, <-answers))
	}
	w.eventually("stored once", func() bool { return len(output()) == 20 })
	body = []byte(workertest.JSON(t, result(l)))
	for range cap(answers) {
		wg.Go(func() {
			a, err := c.Try(http.MethodPost, workerproto.PathResult, nil, body)
			if err != nil {
				a.Body = fmt.Append(nil, err)
			}
			answers <- a
		})
	}
	wg.Wait()
	for range cap(answers) {
		require.Equal(t, workerproto.ResultReply{Accepted: true}, workertest.Body[workerproto.ResultReply](t, <-answers))
	}
	w.eventually("stored", func() bool { return len(results()) >= 1 })
	require.Len(t, output(), 20)
	require.Equal(t, float64(0), value(t, metrics, "cmdexec_edge_inflight_bytes"))
}

// Run's end leaves no request waiting.
func TestHTTPStop(t *testing.T) {
	o := inProcess(natsdtest.Start(t))
	w := newWorld(t, o)
	w.lead()
	url, stop, _ := w.edge(o)
	c := workertest.NewHTTP(t, url, "worker-a")
	c.Register()
	poll := polling(c)
	w.eventually("the poll is open", func() bool { c.Beat(4); return w.seen(func(b busmsg.WorkerBeat) bool { return b.Heartbeat != nil }) })
	require.NoError(t, stop())
	a := <-poll
	require.Equal(t, http.StatusConflict, a.Status, "%s", a.Body)
	require.Equal(t, workerproto.CodeRegisterAgain, a.Problem(t))
	stored, err := w.conn.Workers().Get(t.Context(), "worker-a")
	require.NoError(t, err)
	require.False(t, stored.Online)
}
