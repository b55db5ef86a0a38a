package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
	"github.com/cmdexec/cmdexec/tests/chaos/history"
	"github.com/cmdexec/cmdexec/tests/chaos/rig"
)

// tokensExpire ends tokens in the middle of jobs: a user's, whose job must go on and
// whose stream must close; and a worker's, which the edge renews in time, and which
// is refused when it has ended for good.
type tokensExpire struct {
	worker *rig.Worker
	label  map[string]string
}

const expiring = "expiring" // the user

func (f *tokensExpire) inject(ctx context.Context, s *scene) error {
	if err := f.user(ctx, s); err != nil {
		return err
	}
	return f.workers(ctx, s)
}

// user has a token for some seconds, and a job that runs for longer.
func (f *tokensExpire) user(ctx context.Context, s *scene) error {
	const life = 5 * time.Second
	token, err := auth.MintUser([]byte(rig.JWTSecret), expiring, auth.RoleUser, life, time.Now())
	if err != nil {
		return err
	}
	ends := time.Now().Add(life)
	s.load.setToken(expiring, token)
	p := history.Plan{Kind: "expiring", MaxAttempts: 1, Lines: 40}
	spec := s.load.spec(p, "-run", "12s", "-lines", "40")
	spec["priority"] = 100
	id, err := s.load.submit(ctx, expiring, fmt.Sprintf("expiring-%d", s.rng.Uint64()), p, spec)
	if err != nil {
		return err
	}
	closed, err := s.load.stream(ctx, expiring, "/api/jobs/"+id+"/logs?follow=true")
	s.load.setToken(expiring, "") // a new one is minted
	if err != nil {
		return err
	}
	// Tokens count whole seconds; a busy machine adds to that.
	if late := closed.Sub(ends); late < -time.Second || late > 5*time.Second {
		s.broken("a stream of output closed %v after the token of its user had ended", late)
	}
	return s.within(ctx, time.Minute, func() error {
		j, code := s.load.read(ctx, expiring, id)
		switch {
		case j == nil:
			return fmt.Errorf("the job is answered %d", code)
		case !j.Status.Terminal():
			return fmt.Errorf("the job is %s", j.Status)
		case j.Status != job.Succeeded || j.Attempt != 1:
			s.broken("job %s ended %s at attempt %d when the token of its user had ended", id, j.Status, j.Attempt)
		}
		return nil
	})
}

// stream reads until the server ends it, and returns when that was.
func (l *load) stream(ctx context.Context, user, path string) (time.Time, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	token, err := l.token(user)
	if err != nil {
		return time.Time{}, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://cmdexec"+path, nil)
	if err != nil {
		return time.Time{}, err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	req.Header.Set("Accept", "text/event-stream")
	resp, err := l.http.Do(req)
	if err != nil {
		return time.Time{}, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return time.Time{}, fmt.Errorf("%s is answered %s", path, resp.Status)
	}
	_, err = io.Copy(io.Discard, resp.Body) // however it ends
	if ctx.Err() != nil {
		return time.Time{}, errors.Join(ctx.Err(), err)
	}
	return time.Now(), nil
}

// workers: one has a token that is good for ten seconds more.
func (f *tokensExpire) workers(ctx context.Context, s *scene) error {
	only := fmt.Sprintf("token-%d", s.rng.Uint32())
	f.label = map[string]string{"only": only}
	const left = 10 * time.Second
	const life = time.Minute
	w, err := s.rig.AddWorkerOf(rig.WorkerOptions{Only: only, TokenFor: life, TokenAge: life + auth.Leeway - left})
	if err != nil {
		return err
	}
	f.worker = w
	ends := time.Now().Add(left)
	// While it is connected the edge renews it.
	id, err := f.submit(ctx, s, "-run", "14s")
	if err != nil {
		return err
	}
	j, err := s.ended(ctx, time.Minute, id)
	if err != nil {
		return fmt.Errorf("a job of a worker whose token was renewed: %w", err)
	}
	if j.Status != job.Succeeded || j.Attempt != 1 || time.Now().Before(ends) {
		s.broken("job %s ended %s at attempt %d when the token of its worker was to be renewed", id, j.Status, j.Attempt)
	}
	// What it was started with has ended; it has kept what it was sent.
	if err := w.Kill(); err != nil {
		return err
	}
	if err := w.Start(); err != nil {
		return err
	}
	if id, err = f.submit(ctx, s, "-run", "20ms"); err != nil {
		return err
	}
	if _, err := s.ended(ctx, time.Minute, id); err != nil {
		return fmt.Errorf("a job of a worker with a renewed token: %w", err)
	}
	// Without that one it is nobody, until it is given another one.
	if err := w.Kill(); err != nil {
		return err
	}
	if err := w.ForgetToken(); err != nil {
		return err
	}
	if err := w.Start(); err != nil {
		return err
	}
	if id, err = f.submit(ctx, s, "-run", "20ms"); err != nil {
		return err
	}
	wait(ctx, 3*time.Second)
	if j, _ := s.load.read(ctx, "canary", id); j != nil && j.Status.Terminal() {
		s.broken("job %s is %s: its worker has a token that ended long ago", id, j.Status)
	}
	if err := w.Stop(30 * time.Second); err != nil {
		return err
	}
	if err := w.GiveToken(); err != nil {
		return err
	}
	if err := w.Start(); err != nil {
		return err
	}
	if _, err := s.ended(ctx, time.Minute, id); err != nil {
		return fmt.Errorf("a job of a worker with a new token: %w", err)
	}
	return nil
}

// submit makes a job for the one worker.
func (f *tokensExpire) submit(ctx context.Context, s *scene, args ...string) (string, error) {
	p := history.Plan{Kind: "labelled", MaxAttempts: 1}
	spec := s.load.spec(p, args...)
	spec["constraints"], spec["priority"] = map[string]any{"labels": f.label}, 100
	return s.load.submit(ctx, "canary", fmt.Sprintf("labelled-%d", s.rng.Uint64()), p, spec)
}

// heal takes the worker away again, which other jobs may have reached.
func (f *tokensExpire) heal(_ context.Context, s *scene) error {
	if f.worker == nil {
		return nil
	}
	err := f.worker.Stop(70 * time.Second)
	s.rig.Forget(f.worker)
	return err
}
