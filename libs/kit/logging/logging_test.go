package logging_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/kit/logging"
)

func TestFormats(t *testing.T) {
	for _, c := range []struct {
		format string
		json   bool
	}{{"", true}, {"auto", true}, {"AUTO", true}, {"json", true}, {"text", false}} {
		var out bytes.Buffer
		log, err := logging.New(&out, "info", c.format)
		require.NoError(t, err)
		log.Info("job done", "jobId", "job-1")
		require.Equal(t, c.json, json.Valid(out.Bytes()), "%q: %s", c.format, out.String())
		require.Contains(t, out.String(), "job done")
		require.NotContains(t, out.String(), "\x1b", "no colour off a terminal")
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "log"))
	require.NoError(t, err)
	defer f.Close()
	log, err := logging.New(f, "", "")
	require.NoError(t, err)
	log.Info("m")
	written, err := os.ReadFile(f.Name())
	require.NoError(t, err)
	require.True(t, json.Valid(written), "a file is not a terminal")
}

func TestLevels(t *testing.T) {
	for level, want := range map[string]slog.Level{
		"": slog.LevelInfo, "info": slog.LevelInfo, "DEBUG": slog.LevelDebug, "warn": slog.LevelWarn, "error": slog.LevelError,
	} {
		log, err := logging.New(&bytes.Buffer{}, level, "json")
		require.NoError(t, err)
		require.True(t, log.Enabled(t.Context(), want))
		require.False(t, log.Enabled(t.Context(), want-1))
	}
}

func TestMistakes(t *testing.T) {
	_, err := logging.New(&bytes.Buffer{}, "loud", "json")
	require.EqualError(t, err, `log level must be debug, info, warn or error, not "loud"`)
	_, err = logging.New(&bytes.Buffer{}, "info", "xml")
	require.EqualError(t, err, `log format must be auto, text or json, not "xml"`)
}

func TestNoSecretIsWritten(t *testing.T) {
	const canary = "sk_canary_1"
	const jwt = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJzayJ9.c2tfY2FuYXJ5"
	u, err := url.Parse("nats://user:" + canary + "@host:4222")
	require.NoError(t, err)
	for _, format := range []string{"json", "text"} {
		var out bytes.Buffer
		log, err := logging.New(&out, "info", format)
		require.NoError(t, err)
		for _, key := range []string{
			"token", "workerToken", "x-worker-token", "JWT_SECRET", "jwtSecret", "password", "dbPasswd", "Authorization", "cookie", "apiKey",
			"api_key", "privateKey", "nats_creds",
		} {
			log.Info("m", key, canary)
			log.With(key, canary).Info("m")
			log.Info("m", slog.Group("g", slog.Any(key, []string{canary})))
			log.WithGroup(key).Info("m", "value", canary)
		}
		log.Info("dial mongodb://root:"+canary+"@db/x", "uri", "redis://:"+canary+"@host:6379/0")
		log.Info("m", "err", errors.New("dial nats://a:"+canary+"@h: refused"), "url", u)
		log.Info("m", "err", errors.New("bad header: Bearer "+jwt), "line", "x-worker-token: "+jwt)
		require.NotContains(t, out.String(), canary, format)
		require.NotContains(t, out.String(), jwt[20:], format)
		require.Contains(t, out.String(), "[redacted]")
	}
}

func TestHarmlessAttributesAreKept(t *testing.T) {
	var out bytes.Buffer
	log, err := logging.New(&out, "info", "json")
	require.NoError(t, err)
	log.Info("m", "tokenCount", 3, "url", "http://127.0.0.1:3000/x", "mail", "a@b.c", "err", errors.New("plain"), "", "x", "at", "ssh://git@host/x")
	for _, want := range []string{`"tokenCount":3`, `"http://127.0.0.1:3000/x"`, `"a@b.c"`, `"plain"`, `"ssh://git@host/x"`} {
		require.Contains(t, out.String(), want)
	}
	require.False(t, strings.Contains(out.String(), "redacted"))
}
