package up

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cmdexec/cmdexec/libs/kit/config"
	"github.com/cmdexec/cmdexec/services/cmdexec/internal/context"
)

// secrets sign the tokens of this instance. Those that the operator does not
// give are made once and kept in the data folder, for its owner's eyes only.
type secrets struct {
	JWT    string `json:"jwtSecret"`
	Worker string `json:"workerTokenSecret"`
}

func loadSecrets(dir string, given secrets) (secrets, error) {
	file := filepath.Join(dir, "secrets.json")
	kept, err := readSecrets(file)
	if err != nil {
		return secrets{}, err
	}
	fresh := false
	for _, s := range []struct{ kept, given *string }{{&kept.JWT, &given.JWT}, {&kept.Worker, &given.Worker}} {
		if *s.kept == "" {
			*s.kept, fresh = newSecret(), true
		}
		if *s.given == "" {
			*s.given = *s.kept
		}
	}
	if fresh {
		data, err := json.Marshal(kept)
		if err != nil {
			return secrets{}, fmt.Errorf("encode the secrets: %w", err)
		}
		if err := context.WriteFile(file, data); err != nil {
			return secrets{}, err
		}
	}
	return given, errors.Join(
		config.ValidateSecret("JWT_SECRET", config.Secret(given.JWT)),
		config.ValidateSecret("WORKER_TOKEN_SECRET", config.Secret(given.Worker)),
	)
}

func readSecrets(file string) (secrets, error) {
	data, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return secrets{}, nil
	}
	if err != nil {
		return secrets{}, fmt.Errorf("read the secrets: %w", err)
	}
	var s secrets
	if err := json.Unmarshal(data, &s); err != nil {
		return secrets{}, fmt.Errorf("%s is damaged: remove it to get new secrets (tokens made before stop working)", file)
	}
	return s, nil
}

func newSecret() string {
	var b [32]byte
	_, _ = rand.Read(b[:]) // never fails: crypto/rand ends the program instead
	return hex.EncodeToString(b[:])
}
