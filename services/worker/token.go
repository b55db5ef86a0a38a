package worker

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
	"github.com/cmdexec/cmdexec/libs/kit/config"
)

const tokenLife = 24 * time.Hour

// tokenSource gives a token for each connection: one minted from the secret
// where the owner gave that, else the newest that the edge sent, which is kept
// in the data folder since the configured one lives for a day only. Safe for
// concurrent use.
type tokenSource struct {
	workerID string
	secret   []byte // nil: not given
	file     string // where a renewed token is kept
	log      *slog.Logger

	mu    sync.Mutex
	token string
}

// newTokenSource decides who this worker is: the subject of its token, or with
// a secret the configured or kept id.
func newTokenSource(cfg *Config, dir string, log *slog.Logger) (*tokenSource, error) {
	if cfg.WorkerToken != "" {
		given, ok := readToken(cfg.WorkerToken.Reveal())
		switch {
		case !ok:
			return nil, errors.New("WORKER_TOKEN is not a worker token: make one with `cmdexec token worker`")
		case cfg.WorkerID != "" && cfg.WorkerID != given.Sub:
			return nil, errors.New("WORKER_ID is not the worker that WORKER_TOKEN is for: leave WORKER_ID out")
		}
		t := &tokenSource{workerID: given.Sub, token: cfg.WorkerToken.Reveal(), file: filepath.Join(dir, "worker-token"), log: log}
		data, err := os.ReadFile(t.file)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("read the worker's renewed token: %w", err)
		}
		// The one that lives longer was made later.
		if kept, ok := readToken(string(data)); ok && kept.Sub == given.Sub && kept.Exp > given.Exp {
			t.token = string(data)
		}
		return t, nil
	}
	if cfg.WorkerTokenSecret == "" {
		return nil, errors.New("WORKER_TOKEN is needed: make one with `cmdexec token worker` (or give WORKER_TOKEN_SECRET)")
	}
	if err := config.ValidateSecret("WORKER_TOKEN_SECRET", cfg.WorkerTokenSecret); err != nil {
		return nil, err
	}
	workerID, err := cfg.workerID(dir, func() string { return id.New(id.Worker, time.Now()) })
	if err != nil {
		return nil, err
	}
	return &tokenSource{workerID: workerID, secret: []byte(cfg.WorkerTokenSecret.Reveal())}, nil
}

func (t *tokenSource) get() (string, error) {
	if t.secret != nil {
		return auth.MintWorker(t.secret, t.workerID, tokenLife, time.Now())
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.token, nil
}

func (t *tokenSource) set(token string) {
	if t.secret != nil {
		return
	}
	if c, ok := readToken(token); !ok || c.Sub != t.workerID {
		t.log.Warn("server sent a token that is not for this worker")
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.token = token
	if err := writeFile(t.file, []byte(token)); err != nil {
		t.log.Warn("renewed token not kept, this worker may need another one after a restart", "error", err)
	}
}

type tokenClaims struct {
	Sub string `json:"sub"`
	Exp int64  `json:"exp"`
}

// readToken reads a token's claims without verifying them, which is the edge's
// business: the worker only wants to know who it is meant to be.
func readToken(token string) (tokenClaims, bool) {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return tokenClaims{}, false
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return tokenClaims{}, false
	}
	var c tokenClaims
	if json.Unmarshal(payload, &c) != nil || id.CheckWorker(c.Sub) != nil {
		return tokenClaims{}, false
	}
	return c, true
}
