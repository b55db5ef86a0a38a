package gateway

import (
	"bufio"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
)

func newGauge() prometheus.Gauge { return prometheus.NewGauge(prometheus.GaugeOpts{Name: "streams"}) }

func TestStreamsAreLimitedByUser(t *testing.T) {
	s := newStreams(2, newGauge())
	first, p := s.enter("ann")
	require.Nil(t, p)
	second, p := s.enter("ann")
	require.Nil(t, p)
	_, p = s.enter("ann")
	require.NotNil(t, p)
	require.Equal(t, http.StatusTooManyRequests, p.Status)
	require.Positive(t, p.RetryAfter)
	_, p = s.enter("bob")
	require.Nil(t, p, "everybody has a limit of their own")
	first()
	first()
	third, p := s.enter("ann")
	require.Nil(t, p)
	_, p = s.enter("ann")
	require.NotNil(t, p, "leaving twice counts once")
	second()
	third()
	require.Len(t, s.open, 1, "who has none is forgotten")
}

func TestStreamsWithoutALimit(t *testing.T) {
	s := newStreams(0, newGauge())
	for range 1000 {
		_, p := s.enter("ann")
		require.Nil(t, p)
	}
}

func TestStreamsFromManyGoroutines(t *testing.T) {
	const most = 10
	s := newStreams(most, newGauge())
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			for range 100 {
				leave, p := s.enter("ann")
				if p != nil {
					continue
				}
				s.mu.Lock()
				n := s.open["ann"]
				s.mu.Unlock()
				if n > most {
					t.Errorf("%d streams are open", n)
				}
				leave()
			}
		})
	}
	wg.Wait()
	require.Empty(t, s.open)
}

// A stream over HTTP counts while it is open, and a waiting call that is refused
// makes no job.
func TestStreamLimitOfTheAPI(t *testing.T) {
	e := start(t, func(c *Config) { c.MaxStreamsPerUser = 1 })
	ann := token(t, "ann", auth.RoleUser)
	jobID := e.create("ann")
	req, err := http.NewRequestWithContext(t.Context(), "GET", e.base+"/api/jobs/"+jobID+"/events", nil)
	require.NoError(t, err)
	req.Header.Set("Authorization", "Bearer "+ann)
	resp, err := e.http.Do(req)
	require.NoError(t, err)
	defer func() { _ = resp.Body.Close() }()
	require.Equal(t, 200, resp.StatusCode)
	_, err = bufio.NewReader(resp.Body).ReadString('\n')
	require.NoError(t, err)

	for _, c := range [][3]string{
		{"GET", "/api/jobs/" + jobID + "/events", ""},
		{"GET", "/api/jobs/" + jobID + "/logs?follow=true", ""},
		{"GET", "/api/jobs/events", ""},
		{"POST", "/api/execute", `{"command":"true","labels":{"who":"refused"}}`},
	} {
		a := e.do(c[0], c[1], ann, c[2])
		require.Equal(t, 429, a.status, c[1])
		require.Equal(t, "too_many_streams", a.problem(t).Code)
		require.NotEmpty(t, a.header.Get("Retry-After"))
	}
	require.Equal(t, 200, e.do("GET", "/api/jobs/"+jobID, ann, "").status, "calls that do not wait are served")
	_ = resp.Body.Close()
	eventually(t, "the stream has ended", func() bool {
		e.svc.streams.mu.Lock()
		defer e.svc.streams.mu.Unlock()
		return len(e.svc.streams.open) == 0
	})
	found := false
	require.NoError(t, e.conn.Registry().Scan(t.Context(), func(entry bus.Entry) error {
		found = found || strings.Contains(entry.Record.Spec.Labels["who"], "refused")
		return nil
	}))
	require.False(t, found, "no job was made for a call that was refused")
}
