package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
	"github.com/cmdexec/cmdexec/tests/chaos/history"
	"github.com/cmdexec/cmdexec/tests/chaos/rig"
)

// The most jobs that have not ended, so that a run stays within what the machine
// can do: little is queued before the job that shows the end of a fault.
const (
	mostOpen       = 60
	mostContainers = 16 // where each is a container
)

// load is the users: they submit jobs, try again under the same key until they
// are answered, cancel some, and look at them by reads and by events.
type load struct {
	rig  *rig.Rig
	w    *history.Writer
	http *http.Client
	stop context.Context // no new jobs after it; tries go on

	mu     sync.Mutex
	paused chan struct{} // closed while the load runs; nil never
	users  map[string]string
	open   map[string]string // acknowledged and not seen ended: id -> user
	ended  map[string]string
	owner  map[string]string // of every acknowledged job
	target int

	acked atomic.Int64
	made  atomic.Int64
	busy  atomic.Int64 // submits on their way
}

func newLoad(r *rig.Rig, w *history.Writer, target int) *load {
	running := make(chan struct{})
	close(running)
	return &load{
		rig: r, w: w, users: map[string]string{}, open: map[string]string{}, ended: map[string]string{}, owner: map[string]string{},
		paused: running, target: target,
		http: &http.Client{Transport: &http.Transport{
			MaxIdleConnsPerHost: 64,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return r.Dial(ctx, rig.Gateway)
			},
		}},
	}
}

// pause holds new jobs back and returns when no submit is on its way.
func (l *load) pause(ctx context.Context) error {
	l.mu.Lock()
	l.paused = make(chan struct{})
	l.mu.Unlock()
	return until(ctx, func() error {
		if n := l.busy.Load(); n > 0 {
			return fmt.Errorf("%d submits are on their way", n)
		}
		return nil
	})
}

func (l *load) resume() {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-l.paused:
	default:
		close(l.paused)
	}
}

// mayGo waits while the load is paused or too much is open.
func (l *load) mayGo(ctx context.Context) bool {
	most := mostOpen
	if l.rig.Engine != nil {
		most = mostContainers
	}
	for ctx.Err() == nil {
		l.mu.Lock()
		paused, open := l.paused, len(l.open)
		l.mu.Unlock()
		select {
		case <-paused:
		case <-ctx.Done():
			return false
		}
		if open < most {
			return true
		}
		wait(ctx, 100*time.Millisecond)
	}
	return false
}

func (l *load) token(user string) (string, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if t := l.users[user]; t != "" {
		return t, nil
	}
	t, err := auth.MintUser([]byte(rig.JWTSecret), user, auth.RoleUser, 23*time.Hour, time.Now())
	l.users[user] = t
	return t, err
}

// setToken gives a user another token; "" has one minted when it is needed.
func (l *load) setToken(user, token string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.users[user] = token
}

// answer is what came back; code is 0 where nothing did.
type answer struct {
	code int
	body []byte
	err  error
}

func (a answer) problem() api.Problem {
	var p api.Problem
	_ = json.Unmarshal(a.body, &p) // another body is no problem document
	return p
}

func (l *load) call(ctx context.Context, user, method, path string, body any, key string, within time.Duration) answer {
	token, err := l.token(user)
	if err != nil {
		return answer{err: err}
	}
	var data []byte
	if body != nil {
		if data, err = json.Marshal(body); err != nil {
			return answer{err: err}
		}
	}
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "http://cmdexec"+path, bytes.NewReader(data))
	if err != nil {
		return answer{err: err}
	}
	req.Header.Set("Authorization", "Bearer "+token)
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if key != "" {
		req.Header.Set("Idempotency-Key", key)
	}
	resp, err := l.http.Do(req)
	if err != nil {
		return answer{err: err}
	}
	defer resp.Body.Close()
	a := answer{code: resp.StatusCode}
	if a.body, err = io.ReadAll(io.LimitReader(resp.Body, 64<<20)); err != nil {
		return answer{err: err} // the answer did not arrive whole: it was none
	}
	return a
}

// client submits jobs of mixed kinds, one after the other.
func (l *load) client(ctx context.Context, user string, rng *rand.Rand, rate float64) error {
	for l.mayGo(l.stop) {
		if int(l.made.Add(1)) > l.target {
			return nil
		}
		p, spec := l.mixed(rng)
		cancelAfter := time.Duration(-1)
		if p.Kind == "canceled" || p.Kind == "deaf" {
			cancelAfter = time.Duration(rng.IntN(2500)) * time.Millisecond
		}
		again := rng.IntN(4) == 0
		l.busy.Add(1)
		id, err := l.submit(ctx, user, fmt.Sprintf("%s-%d", user, rng.Uint64()), p, spec)
		l.busy.Add(-1)
		if err != nil {
			return err
		}
		if cancelAfter >= 0 && id != "" {
			wait(ctx, cancelAfter)
			l.cancel(ctx, user, id)
			if again {
				l.cancel(ctx, user, id)
			}
		}
		wait(l.stop, time.Duration((0.5+rng.Float64())/rate*float64(time.Second)))
	}
	return nil
}

// errRefused ends a run: the server says that the request itself is wrong.
var errRefused = errors.New("the server refuses what is right")

// submit creates a job, with the same key until there is an answer. It returns ""
// when ctx ended first.
func (l *load) submit(ctx context.Context, user, key string, p history.Plan, spec map[string]any) (string, error) {
	target, path, within := "create", "/api/jobs/create", 10*time.Second
	if p.Kind == "execute" {
		target, path, within = "execute", "/api/execute", time.Minute
	}
	spec["labels"] = map[string]string{"key": key}
	for ctx.Err() == nil {
		begin := time.Now()
		a := l.call(ctx, user, http.MethodPost, path, spec, key, within)
		s := &history.Submit{Key: key, Plan: p, Begin: begin.UnixNano(), Code: a.code, Target: target}
		if a.err != nil {
			s.Err = a.err.Error()
		}
		var end *history.Observe
		switch {
		case a.err == nil && a.code < 300 && target == "execute":
			var r api.ExecuteResult
			if err := json.Unmarshal(a.body, &r); err != nil {
				return "", fmt.Errorf("execute answers %q: %w", a.body, err)
			}
			s.JobID = r.JobID
			end = &history.Observe{JobID: r.JobID, From: "execute", Status: r.Status, ExitCode: r.ExitCode}
		case a.err == nil && a.code < 300:
			var j api.Job
			if err := json.Unmarshal(a.body, &j); err != nil {
				return "", fmt.Errorf("create answers %q: %w", a.body, err)
			}
			s.JobID = j.JobID
		default:
			problem := a.problem()
			s.JobID = problem.JobID
			if s.Err == "" {
				s.Err = problem.Code
			}
		}
		l.w.Add(history.Event{Submit: s})
		if s.Acked() {
			l.acknowledged(s.JobID, user)
			if end != nil {
				l.w.Add(history.Event{Observe: end})
			}
			return s.JobID, nil
		}
		if a.code >= 400 && a.code < 500 && a.code != http.StatusTooManyRequests {
			return "", fmt.Errorf("%w: %d %s", errRefused, a.code, a.body)
		}
		wait(ctx, 300*time.Millisecond)
	}
	return "", nil
}

func (l *load) acknowledged(id, user string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.owner[id] == "" {
		l.acked.Add(1)
		l.owner[id] = user
		l.open[id] = user
	}
}

// cancel asks until there is an answer.
func (l *load) cancel(ctx context.Context, user, id string) {
	for ctx.Err() == nil {
		begin := time.Now().UnixNano()
		a := l.call(ctx, user, http.MethodPost, "/api/jobs/cancel", api.CancelRequest{JobID: id}, "", 5*time.Second)
		l.w.Add(history.Event{Cancel: &history.Call{JobID: id, Begin: begin, Code: a.code}})
		if a.code >= 200 && a.code < 500 {
			return
		}
		wait(ctx, 300*time.Millisecond)
	}
}

// read looks at a job and notes what it is.
func (l *load) read(ctx context.Context, user, id string) (*api.Job, int) {
	begin := time.Now().UnixNano()
	a := l.call(ctx, user, http.MethodGet, "/api/jobs/"+id, nil, "", 5*time.Second)
	if a.code == http.StatusNotFound {
		l.w.Add(history.Event{Observe: &history.Observe{JobID: id, Begin: begin, From: "get", Missing: true}})
		return nil, a.code
	}
	var j api.Job
	if a.code != http.StatusOK || json.Unmarshal(a.body, &j) != nil {
		return nil, a.code
	}
	l.w.Add(history.Event{Observe: &history.Observe{
		JobID: id, Begin: begin, From: "get", Status: j.Status, Version: j.Version, Attempt: j.Attempt, ExitCode: j.ExitCode,
	}})
	if j.Status.Terminal() {
		l.mu.Lock()
		delete(l.open, id)
		l.ended[id] = user
		l.mu.Unlock()
	}
	return &j, a.code
}

// reader reads jobs that are open, and now and then one that has ended: its end
// must stay what it was.
func (l *load) reader(ctx context.Context) {
	for ctx.Err() == nil {
		id, user := l.pick()
		if id == "" {
			wait(ctx, 50*time.Millisecond)
			continue
		}
		l.read(ctx, user, id)
		wait(ctx, 30*time.Millisecond)
	}
}

func (l *load) pick() (id, user string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	from := l.open
	if len(l.ended) > 0 && (len(from) == 0 || rand.IntN(10) == 0) {
		from = l.ended
	}
	for id, user := range from { // any
		return id, user
	}
	return "", ""
}

func (l *load) openJobs() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	ids := make([]string, 0, len(l.open))
	for id := range l.open {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

func (l *load) owners() map[string]string {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := make(map[string]string, len(l.owner))
	for id, user := range l.owner {
		out[id] = user
	}
	return out
}

// follow notes every state that the event stream of a user tells, and goes on by
// Last-Event-ID wherever it is cut.
func (l *load) follow(ctx context.Context, user string) {
	last := ""
	for ctx.Err() == nil {
		last = l.followOnce(ctx, user, last)
		wait(ctx, 300*time.Millisecond)
	}
}

func (l *load) followOnce(ctx context.Context, user, last string) string {
	token, err := l.token(user)
	if err != nil {
		return last
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://cmdexec/api/jobs/events", nil)
	if err != nil {
		return last
	}
	req.Header.Set("Authorization", "Bearer "+token)
	if last != "" {
		req.Header.Set("Last-Event-ID", last)
	}
	resp, err := l.http.Do(req)
	if err != nil {
		return last
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return last
	}
	event := ""
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		name, value, _ := strings.Cut(lines.Text(), ": ")
		switch name {
		case "id":
			last = value
		case "event":
			event = value
		case "data":
			var s api.StateEvent
			if event != "state" || json.Unmarshal([]byte(value), &s) != nil {
				continue
			}
			l.w.Add(history.Event{Observe: &history.Observe{
				JobID: s.JobID, From: "events", Status: s.Status, Version: s.Version, Attempt: s.Attempt,
			}})
		}
	}
	return last
}

// canary submits a quick job and returns how long it took until one had run.
func (l *load) canary(ctx context.Context) (time.Duration, error) {
	began := time.Now()
	for n := 0; ctx.Err() == nil; n++ {
		p := history.Plan{Kind: "canary", MaxAttempts: 1}
		spec := l.spec(p, "-run", "1ms")
		spec["priority"] = 100
		id, err := l.submit(ctx, "canary", fmt.Sprintf("canary-%d-%d", began.UnixNano(), n), p, spec)
		if err != nil || id == "" {
			return time.Since(began), cmpErr(err, ctx.Err())
		}
		for ctx.Err() == nil {
			if j, _ := l.read(ctx, "canary", id); j != nil && j.Status.Terminal() {
				if j.Status == job.Succeeded {
					return time.Since(began), nil
				}
				break // lost with a worker: another one
			}
			wait(ctx, 50*time.Millisecond)
		}
	}
	return time.Since(began), ctx.Err()
}

func cmpErr(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// wait is a pause of the run's own rhythm; it waits for nothing else.
func wait(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}

// until asks again until there is no error, or ctx ends.
func until(ctx context.Context, check func() error) error {
	for {
		err := check()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return err
		}
		wait(ctx, 50*time.Millisecond)
	}
}
