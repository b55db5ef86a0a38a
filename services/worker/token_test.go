package worker

import (
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/cmdexec/cmdexec/libs/kit/auth"
	"github.com/cmdexec/cmdexec/libs/kit/config"
)

const testSecret = "0b4f5c1d7e8a92636d7f1c2b3a495867-worker"

func mint(t *testing.T, subject string, life time.Duration) string {
	t.Helper()
	token, err := auth.MintWorker([]byte(testSecret), subject, life, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func source(t *testing.T, dir string, cfg Config) *tokenSource {
	t.Helper()
	s, err := newTokenSource(&cfg, dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (t *tokenSource) want(tt *testing.T, token, what string) {
	tt.Helper()
	if got, err := t.get(); err != nil || got != token {
		tt.Errorf("%s: another token, %v", what, err)
	}
}

func TestTokenNamesTheWorker(t *testing.T) {
	token := mint(t, "worker-a", time.Hour)
	s := source(t, t.TempDir(), Config{WorkerToken: config.Secret(token)})
	if s.workerID != "worker-a" {
		t.Errorf("the worker is %q", s.workerID)
	}
	s.want(t, token, "given")
	for name, cfg := range map[string]Config{
		"another id":   {WorkerToken: config.Secret(token), WorkerID: "worker-b"},
		"no token":     {},
		"not a token":  {WorkerToken: "abc"},
		"not a JWT":    {WorkerToken: "a.b.c"},
		"weak secret":  {WorkerTokenSecret: "secret"},
		"a bad own id": {WorkerTokenSecret: testSecret, WorkerID: "NO"},
	} {
		_, err := newTokenSource(&cfg, t.TempDir(), slog.New(slog.DiscardHandler))
		if err == nil || !strings.Contains(err.Error(), "WORKER_") || strings.Contains(err.Error(), token) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSecretMintsForEachConnection(t *testing.T) {
	s := source(t, t.TempDir(), Config{WorkerTokenSecret: testSecret})
	s.set(mint(t, s.workerID, time.Minute)) // is not needed
	token, err := s.get()
	if err != nil {
		t.Fatal(err)
	}
	claims, err := auth.NewWorkerVerifier([]byte(testSecret)).Verify(token, time.Now())
	if err != nil || claims.Subject != s.workerID || time.Until(claims.ExpiresAt) < tokenLife-time.Minute {
		t.Errorf("claims are %+v, %v", claims, err)
	}
}

func TestRenewedTokenOutlivesTheWorker(t *testing.T) {
	dir := t.TempDir()
	given, renewed := mint(t, "worker-a", time.Hour), mint(t, "worker-a", 2*time.Hour)
	s := source(t, dir, Config{WorkerToken: config.Secret(given)})
	s.set("nonsense")
	s.set(mint(t, "worker-b", 3*time.Hour))
	s.want(t, given, "a token that is not for this worker")
	s.set(renewed)
	s.want(t, renewed, "renewed")
	source(t, dir, Config{WorkerToken: config.Secret(given)}).want(t, renewed, "after a restart")
	newest := mint(t, "worker-a", 5*time.Hour)
	source(t, dir, Config{WorkerToken: config.Secret(newest)}).want(t, newest, "a newer one is given")
	other := mint(t, "worker-b", time.Minute)
	source(t, dir, Config{WorkerToken: config.Secret(other)}).want(t, other, "another worker")
}
