package workertest

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/core/workerproto"
)

// HTTP is a worker over plain HTTP.
type HTTP struct {
	t       testing.TB
	URL     string
	ID      string
	Token   string
	Session string // sent along unless it is empty
	Client  *http.Client
}

// Answer is what the edge has answered.
type Answer struct {
	Status int
	Header http.Header
	Body   []byte
}

// Problem is the code of a problem document; an answer that is none has "".
func (a Answer) Problem(t testing.TB) string {
	t.Helper()
	if a.Header.Get("Content-Type") != "application/problem+json" {
		return ""
	}
	var p struct{ Code, Type, Title, RequestID string }
	require.NoError(t, json.Unmarshal(a.Body, &p))
	require.NotEmpty(t, p.Code)
	require.NotEmpty(t, p.Title)
	require.NotEmpty(t, p.RequestID)
	return p.Code
}

// Body reads an answer that must be 200.
func Body[T any](t testing.TB, a Answer) T {
	t.Helper()
	require.Equal(t, http.StatusOK, a.Status, "%s", a.Body)
	var v T
	require.NoError(t, json.Unmarshal(a.Body, &v))
	return v
}

// NewHTTP makes a worker with a token and without a session.
func NewHTTP(t testing.TB, url, workerID string) *HTTP {
	t.Helper()
	transport := &http.Transport{}
	t.Cleanup(transport.CloseIdleConnections)
	return &HTTP{
		t: t, URL: url, ID: workerID, Token: Token(t, workerID, time.Hour),
		Client: &http.Client{Transport: transport, Timeout: 2 * Wait},
	}
}

// Try sends a request; the error is the network's.
func (c *HTTP) Try(method, path string, header http.Header, body []byte) (Answer, error) {
	req, err := http.NewRequestWithContext(c.t.Context(), method, c.URL+path, bytes.NewReader(body))
	require.NoError(c.t, err)
	if c.Token != "" {
		req.Header.Set(workerproto.TokenHeader, c.Token)
	}
	if c.Session != "" {
		req.Header.Set(workerproto.SessionHeader, c.Session)
	}
	if len(body) > 0 {
		req.Header.Set("Content-Type", "application/json")
	}
	for k, v := range header {
		req.Header[k] = v
	}
	resp, err := c.Client.Do(req)
	if err != nil {
		return Answer{}, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	return Answer{resp.StatusCode, resp.Header, data}, err
}

// Post sends a body, a string as it is and anything else as JSON.
func (c *HTTP) Post(path string, body any) Answer {
	c.t.Helper()
	data, ok := body.(string)
	if !ok {
		data = JSON(c.t, body)
	}
	a, err := c.Try(http.MethodPost, path, nil, []byte(data))
	require.NoError(c.t, err)
	return a
}

// Get sends a query.
func (c *HTTP) Get(path string, query url.Values) Answer {
	c.t.Helper()
	a, err := c.Try(http.MethodGet, path+"?"+query.Encode(), nil, nil)
	require.NoError(c.t, err)
	return a
}

// Register begins a session, which the requests that follow name.
func (c *HTTP) Register(running ...workerproto.Lease) workerproto.Welcome {
	c.t.Helper()
	a := c.Post(workerproto.PathRegister, Hello(c.ID, running...))
	w := Body[workerproto.Welcome](c.t, a)
	c.Session = a.Header.Get(workerproto.SessionHeader)
	require.True(c.t, strings.HasPrefix(c.Session, "session-"), c.Session)
	return w
}

// Poll asks for a job.
func (c *HTTP) Poll(wait time.Duration) Answer {
	c.t.Helper()
	return c.Get(workerproto.PathGetJob, url.Values{"workerId": {c.ID}, "waitSeconds": {strconv.Itoa(int(wait / time.Second))}})
}

// Beat sends a heartbeat that lists these leases as started.
func (c *HTTP) Beat(freeSlots int, leases ...workerproto.Lease) workerproto.Beat {
	c.t.Helper()
	h := workerproto.Heartbeat{WorkerID: c.ID, Status: workerproto.StatusBusy, FreeSlots: freeSlots, Running: []workerproto.PhaseLease{}}
	for _, l := range leases {
		h.Running = append(h.Running, workerproto.PhaseLease{Lease: l, Phase: workerproto.PhaseStarted})
	}
	return Body[workerproto.Beat](c.t, c.Post(workerproto.PathHeartbeat, h))
}

// CheckCancel asks about one attempt.
func (c *HTTP) CheckCancel(l workerproto.Lease) workerproto.CancelReply {
	c.t.Helper()
	return Body[workerproto.CancelReply](c.t, c.Get(workerproto.PathCheckCancel, url.Values{
		"workerId": {c.ID}, "jobId": {l.JobID}, "attempt": {strconv.Itoa(l.Attempt)},
	}))
}
