package config_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/kit/config"
)

func TestParseBytes(t *testing.T) {
	for in, want := range map[string]config.Bytes{
		"0": 0, "1": 1, "007": 7, "1024": 1024, "512Mi": 512 << 20, "8Gi": 8 << 30, "8GiB": 8 << 30, "1G": 1e9, "1GB": 1e9,
		"10B": 10, "3k": 3000, "3K": 3000, "1Pi": 1 << 50, "2T": 2e12, "8191Pi": 8191 << 50,
		"9223372036854775807": math.MaxInt64,
	} {
		got, err := config.ParseBytes(in)
		require.NoError(t, err, in)
		require.Equal(t, want, got, in)
	}
	for _, in := range []string{
		"", " ", "Gi", "B", "-1", "+1", "1.5Gi", "1e3", "1e309", "NaN", "Inf", "0x10", "1_000", " 1", "1 ", "1 Gi", "1g", "1gi", "1GI", "1Ei",
		"1BB", "1iB", "١GB", "1GiBB", "9223372036854775808", "8192Pi", "99999999999999999999999", "1Gi\n", "1\x00",
	} {
		_, err := config.ParseBytes(in)
		require.Error(t, err, "%q", in)
	}
}

func TestBytesString(t *testing.T) {
	for in, want := range map[config.Bytes]string{
		0: "0", 1: "1", 1000: "1k", 1024: "1Ki", 8 << 30: "8Gi", 1e9: "1G", 1536 << 20: "1536Mi", 1001: "1001", -5: "-5",
	} {
		require.Equal(t, want, in.String())
	}
}

func FuzzParseBytes(f *testing.F) {
	for _, s := range []string{"8Gi", "512Mi", "1G", "42", "9223372036854775807", "8192Pi", "-1", "1e9", "١GB", "NaN", "1GiB", "0k"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		b, err := config.ParseBytes(s)
		if err != nil {
			require.Zero(t, b)
			return
		}
		require.GreaterOrEqual(t, int64(b), int64(0))
		again, err := config.ParseBytes(b.String())
		require.NoError(t, err)
		require.Equal(t, b, again)
	})
}

func TestParseRate(t *testing.T) {
	for in, want := range map[string]config.Rate{
		"off": {}, "1/s": {Count: 1, Per: time.Second}, "600/m": {Count: 600, Per: time.Minute},
		"1000000/s": {Count: 1_000_000, Per: time.Second},
	} {
		got, err := config.ParseRate(in)
		require.NoError(t, err, in)
		require.Equal(t, want, got, in)
		require.Equal(t, in, got.String())
		require.Equal(t, in == "off", got.Off())
	}
	for _, in := range []string{
		"", "OFF", "0/s", "-1/s", "+1/s", "1", "1/", "/s", "1/h", "1/S", "1 /s", "1/s ", "1.5/s", "1000001/s", "99999999999999999999/s",
		"١/s", "1/s/s", "1e3/s", "0x1/s",
	} {
		_, err := config.ParseRate(in)
		require.Error(t, err, "%q", in)
	}
}

func FuzzParseRate(f *testing.F) {
	for _, s := range []string{"off", "1/s", "600/m", "0/s", "-1/s", "1/h", "007/m", "1000001/s"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := config.ParseRate(s)
		if err != nil {
			require.Zero(t, r)
			return
		}
		require.True(t, r.Off() || r.Count >= 1 && r.Count <= config.MaxRateCount)
		again, err := config.ParseRate(r.String())
		require.NoError(t, err)
		require.Equal(t, r, again)
	})
}

func TestSecretDoesNotShowItself(t *testing.T) {
	const canary = "sk_canary_4711"
	s := config.Secret(canary)
	type holder struct{ S config.Secret }
	var out bytes.Buffer
	for _, verb := range []string{"%s", "%v", "%+v", "%#v", "%q", "%x", "%X", "%d", "%t", "%10.3s"} {
		fmt.Fprintf(&out, verb+"\n", s)
		fmt.Fprintf(&out, verb+"\n", &s)
		fmt.Fprintf(&out, verb+"\n", holder{s})
		fmt.Fprintf(&out, verb+"\n", []config.Secret{s})
	}
	for _, v := range []any{s, holder{s}, map[string]config.Secret{"k": s}} {
		require.NoError(t, json.NewEncoder(&out).Encode(v))
	}
	for _, h := range []slog.Handler{slog.NewJSONHandler(&out, nil), slog.NewTextHandler(&out, nil)} {
		slog.New(h).Info("m", "v", s, "h", holder{s}, "l", []config.Secret{s})
	}
	require.NotContains(t, out.String(), canary)
	require.NotContains(t, strings.ToLower(out.String()), fmt.Sprintf("%x", canary))
	require.Contains(t, out.String(), "[redacted]")
	require.Equal(t, canary, s.Reveal())
}

func TestValidateSecret(t *testing.T) {
	for _, good := range []string{
		"9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08", // hex
		"K7gNU3sdo-OL0wNhqoVWhr3g6s1xYv72ol_pe_Unols",                      // base64url
		"xK2#vQ9!mZ4$wL7@pR3%tB8^nF5&yD1*",
	} {
		require.NoError(t, config.ValidateSecret("JWT_SECRET", config.Secret(good)))
	}
	for _, bad := range []string{
		"", "short", strings.Repeat("x", 31), strings.Repeat("a", 64), strings.Repeat("ab", 32), strings.Repeat("0123456789", 4),
		"0123456789abcdef0123456789abcdef", "abcdefghijklmnopqrstuvwxyz012345", "changeme-changeme-changeme-changeme",
		"Change_Me_please_this_is_long_enough_now", "secret-key-that-is-long-enough-for-32", "SECRET1234567890qwertyuiopasdfghjkl",
		"your-256-bit-secret-your-256-bit", "password1234567890-and-some-more-of-it", "please-changeme-0f8e7d6c5b4a39281706",
		"supersecretsupersecretsupersecret!", "aaaaaaaaaaaaaaaabbbbbbbbbbbbbbbbcccccccc",
	} {
		err := config.ValidateSecret("JWT_SECRET", config.Secret(bad))
		require.Error(t, err, bad)
		require.True(t, strings.HasPrefix(err.Error(), "JWT_SECRET "), err)
		require.Contains(t, err.Error(), "openssl rand -hex 32")
		if bad != "" {
			require.NotContains(t, err.Error(), bad)
		}
	}
}
