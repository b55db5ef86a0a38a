package dial

import (
	"context"
	"log/slog"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestOpen(t *testing.T) {
	_, err := Open(t.Context(), Settings{}, slog.New(slog.DiscardHandler))
	require.ErrorContains(t, err, "SQLITE_PATH")
	_, err = Open(t.Context(), Settings{MongoURI: "mongodb://u:canary@127.0.0.1/x", SQLitePath: "x"}, slog.New(slog.DiscardHandler))
	require.ErrorContains(t, err, "both")
	require.NotContains(t, err.Error(), "canary")
	_, err = Open(t.Context(), Settings{MongoURI: "canary"}, slog.New(slog.DiscardHandler))
	require.Error(t, err)
	require.NotContains(t, err.Error(), "canary")
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	_, err = Open(ctx, Settings{MongoURI: "mongodb://u:canary@127.0.0.1:1/x"}, slog.New(slog.DiscardHandler))
	require.Error(t, err, "nobody listens there, and the wait has an end")
	require.NotContains(t, err.Error(), "canary")
	s, err := Open(t.Context(), Settings{SQLitePath: filepath.Join(t.TempDir(), "jobs.db")}, slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	require.NoError(t, s.Close())
}
