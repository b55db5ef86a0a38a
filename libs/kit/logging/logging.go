// Package logging makes the slog logger of a process: coloured text for a person at a terminal, JSON lines for everything else, and no
// secrets in either.
package logging

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/lmittmann/tint"
	"github.com/mattn/go-isatty"
)

// New returns a logger that writes to w. level is debug, info, warn or error; format is auto (text on a terminal, JSON otherwise), text
// or json. Both are case-insensitive; empty means info and auto. Text is coloured only on a terminal.
func New(w io.Writer, level, format string) (*slog.Logger, error) {
	lvl, err := parseLevel(level)
	if err != nil {
		return nil, err
	}
	terminal := isTerminal(w)
	switch strings.ToLower(format) {
	case "", "auto":
		if terminal {
			return slog.New(textHandler(w, lvl, false)), nil
		}
		return slog.New(jsonHandler(w, lvl)), nil
	case "text":
		return slog.New(textHandler(w, lvl, !terminal)), nil
	case "json":
		return slog.New(jsonHandler(w, lvl)), nil
	}
	return nil, fmt.Errorf("log format must be auto, text or json, not %.32q", format)
}

func parseLevel(level string) (slog.Level, error) {
	switch strings.ToLower(level) {
	case "debug":
		return slog.LevelDebug, nil
	case "", "info":
		return slog.LevelInfo, nil
	case "warn", "warning":
		return slog.LevelWarn, nil
	case "error":
		return slog.LevelError, nil
	}
	return 0, fmt.Errorf("log level must be debug, info, warn or error, not %.32q", level)
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && isatty.IsTerminal(f.Fd())
}

func jsonHandler(w io.Writer, level slog.Level) slog.Handler {
	return slog.NewJSONHandler(w, &slog.HandlerOptions{Level: level, ReplaceAttr: Redact})
}

func textHandler(w io.Writer, level slog.Level, noColor bool) slog.Handler {
	return tint.NewTextHandler(w, &tint.Options{
		Level: level, ReplaceAttr: Redact, NoColor: noColor, TimeFormat: time.TimeOnly + ".000",
	})
}

const redacted = "[redacted]"

// Redact is the ReplaceAttr function of New. It replaces the value of an attribute whose key, or the name of a group around it, says
// that it is a secret (token, jwtSecret, db_password, Authorization), and it removes passwords in URLs and JSON web tokens from every
// other text, also from errors.
func Redact(groups []string, a slog.Attr) slog.Attr {
	if isSensitive(a.Key) {
		return slog.String(a.Key, redacted)
	}
	for _, g := range groups {
		if isSensitive(g) {
			return slog.String(a.Key, redacted)
		}
	}
	switch a.Value.Kind() {
	case slog.KindString:
		if clean, changed := redactText(a.Value.String()); changed {
			return slog.String(a.Key, clean)
		}
	case slog.KindAny:
		var text string
		switch v := a.Value.Any().(type) {
		case error:
			text = v.Error()
		case fmt.Stringer:
			text = v.String()
		default:
			return a
		}
		if clean, changed := redactText(text); changed {
			return slog.String(a.Key, clean)
		}
	}
	return a
}

// isSensitive compares the end of the key without case and separators, so that "x-worker-token" and "jwtSecret" match and
// "tokenCount" does not.
func isSensitive(key string) bool {
	n := len(key)
	if n == 0 {
		return false
	}
	for _, word := range sensitive {
		if hasSuffixFold(key, word) {
			return true
		}
	}
	return false
}

var sensitive = [...]string{
	"token", "tokens", "secret", "secrets", "password", "passwd", "passphrase", "authorization", "cookie", "credential", "credentials",
	"creds", "apikey", "api_key", "api-key", "privatekey", "private_key", "private-key", "signature",
}

func hasSuffixFold(s, suffix string) bool {
	return len(s) >= len(suffix) && strings.EqualFold(s[len(s)-len(suffix):], suffix)
}

var (
	urlPassword = regexp.MustCompile(`(://[^\s/?#:@"']*):[^\s/?#"']*@`)
	webToken    = regexp.MustCompile(`eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+`)
)

func redactText(s string) (string, bool) {
	clean := s
	if strings.Contains(s, "://") && strings.Contains(s, "@") {
		clean = urlPassword.ReplaceAllString(clean, "$1:"+redacted+"@")
	}
	if strings.Contains(s, "eyJ") {
		clean = webToken.ReplaceAllString(clean, redacted)
	}
	return clean, clean != s
}
