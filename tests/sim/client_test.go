package sim

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"sync"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
)

// client submits jobs, looks after them and cancels some.
type client struct {
	w     *world
	name  string
	token string
	r     *rand.Rand
}

// shown is the part of a job that a client looks at.
type shown struct {
	JobID   string    `json:"jobId"`
	Status  job.State `json:"status"`
	Version uint64    `json:"version"`
	Attempt int       `json:"attempt"`
}

func (c *client) run() {
	var err error
	if c.token, err = auth.MintUser([]byte(userSecret), c.name, auth.RoleUser, 24*time.Hour, time.Now()); err != nil {
		c.w.oracle.wrong("mint: %v", err)
		return
	}
	n, pause := 2+c.r.IntN(4), 2*time.Second
	if c.w.seed%50 == 0 { // so many that groups of them are purged
		n, pause = 30, 200*time.Millisecond
	}
	var looking sync.WaitGroup
	for i := range n {
		pass(between(c.r, 0, pause))
		r := source(c.w.seed, fmt.Sprintf("%s job %d", c.name, i))
		looking.Go(func() { c.one(r, i) })
	}
	looking.Wait()
}

// one submits a job until that is answered, and watches it.
func (c *client) one(r *rand.Rand, i int) {
	spec, err := json.Marshal(c.spec(r))
	if err != nil {
		c.w.oracle.wrong("spec: %v", err)
		return
	}
	header := http.Header{}
	if chance(r, 0.5) {
		header.Set("Idempotency-Key", fmt.Sprintf("%s-%d", c.name, i))
	}
	var have shown
	for {
		a, err := c.call(r, http.MethodPost, "/api/jobs/create", header, spec)
		if err == nil && (a.status == http.StatusCreated || a.status == http.StatusOK) {
			if err := json.Unmarshal(a.body, &have); err != nil {
				c.w.oracle.wrong("answer to a submit: %v", err)
				return
			}
			break
		}
		if err == nil && a.status != http.StatusServiceUnavailable && a.status != http.StatusTooManyRequests {
			c.w.oracle.wrong("a submit was answered %d: %s", a.status, a.body)
			return
		}
		if !c.again(between(r, 100*time.Millisecond, time.Second)) {
			return
		}
	}
	c.w.oracle.acknowledged(have.JobID)
	c.watch(r, have, chance(r, 0.35))
}

func (c *client) spec(r *rand.Rand) job.Spec {
	code := 0
	if chance(r, 0.25) {
		code = 1 + r.IntN(3)
	}
	d := between(r, 0, 3*time.Second)
	if chance(r, 0.2) {
		d = between(r, 0, 10*time.Second)
	}
	grace, backoff := r.IntN(3), 1
	s := job.Spec{
		Command: job.Command{Shell: fmt.Sprintf("%d %d", d.Milliseconds(), code)},
		Stop:    job.Stop{GraceSeconds: &grace},
		Retry:   job.Retry{MaxAttempts: 1 + r.IntN(3), BackoffSeconds: &backoff},
	}
	switch r.IntN(8) {
	case 0:
		s.OnWorkerLost = job.OnWorkerLostFail
		s.Retry.MaxAttempts = 1
	case 1:
		s.Timeout = 1 + r.IntN(4)
	case 2:
		s.Timeouts.Total = 4 + r.IntN(20)
	case 3:
		s.Timeouts.Queue = 2 + r.IntN(10)
	}
	return s
}

func (c *client) call(r *rand.Rand, method, path string, header http.Header, body []byte) (answer, error) {
	h := http.Header{"Authorization": {"Bearer " + c.token}}
	for name := range header {
		h.Set(name, header.Get(name))
	}
	return c.w.call(context.Background(), r, c.w.names["gateway"], method, path, h, body, 12*time.Second)
}

// watch reads a job until it has ended, and a few times after that: versions never
// go back, and an end stays what it is.
func (c *client) watch(r *rand.Rand, have shown, cancel bool) {
	cancelAt := time.Now().Add(between(r, 0, 6*time.Second))
	if chance(r, 0.3) {
		cancelAt = time.Now()
	}
	path := "/api/jobs/status?jobId=" + have.JobID
	body, err := json.Marshal(map[string]string{"jobId": have.JobID})
	if err != nil {
		c.w.oracle.wrong("cancel: %v", err)
		return
	}
	canceled := 0
	for ended := 0; ended < 2; {
		var a answer
		var err error
		asked := time.Now()
		if cancel && canceled < 2 && !time.Now().Before(cancelAt) {
			if a, err = c.call(r, http.MethodPost, "/api/jobs/cancel", nil, body); err == nil && a.status == http.StatusOK {
				if canceled++; chance(r, 0.5) {
					canceled++
				}
			}
		} else {
			a, err = c.call(r, http.MethodGet, path, nil, nil)
		}
		switch {
		case err != nil || a.status == http.StatusServiceUnavailable || a.status == http.StatusTooManyRequests:
		case a.status != http.StatusOK:
			c.w.oracle.wrong("%s was acknowledged, and reading it is answered %d: %s", have.JobID, a.status, a.body)
			return
		default:
			var now shown
			if err := json.Unmarshal(a.body, &now); err != nil {
				c.w.oracle.wrong("answer to a read: %v", err)
				return
			}
			if c.w.oracle.haunted(have.JobID, asked) {
				break // until it is swept, a ghost is shown as it is
			}
			if now.Version < have.Version || have.Status.Terminal() && now != have {
				c.w.oracle.wrong("a client was shown %+v after %+v", now, have)
				return
			}
			if have = now; have.Status.Terminal() {
				ended++
			}
		}
		if !c.again(between(r, 200*time.Millisecond, 4*time.Second)) {
			return
		}
	}
}

// again waits before the next try; false when the run is over.
func (c *client) again(d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-c.w.over:
		return false
	}
}
