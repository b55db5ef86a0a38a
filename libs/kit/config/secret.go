package config

import (
	"fmt"
	"io"
	"log/slog"
	"strings"
)

// Secret is a string that does not show itself: whatever prints, logs or encodes it gets [redacted]. Two places are
// beyond the reach of its methods: %v of a struct that has a Secret in an unexported field, and the keys of a map in JSON.
type Secret string

const redacted = "[redacted]"

// Reveal returns the value. Call it only where the value is used.
func (s Secret) Reveal() string { return string(s) }

// String returns [redacted].
func (s Secret) String() string { return redacted }

// GoString returns [redacted].
func (s Secret) GoString() string { return redacted }

// Format writes [redacted] for every verb, also for those (%d) where fmt would print the value as a mistake.
func (s Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// LogValue implements slog.LogValuer.
func (s Secret) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText keeps the value out of text encodings.
func (s Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// MarshalJSON keeps the value out of JSON.
func (s Secret) MarshalJSON() ([]byte, error) { return []byte(`"` + redacted + `"`), nil }

// MinSecretBytes is the shortest signing secret that is accepted: the size of the HS256 output.
const MinSecretBytes = 32

// ValidateSecret refuses a signing secret that can be guessed: under 32 bytes, a placeholder out of an example, or a pattern. The
// error names the variable and says how to make a good one; it never contains the value.
func ValidateSecret(name string, s Secret) error {
	problem := ""
	switch value := s.Reveal(); {
	case value == "":
		problem = "is not set"
	case len(value) < MinSecretBytes:
		problem = fmt.Sprintf("is %d bytes long and must be at least %d", len(value), MinSecretBytes)
	case isPlaceholder(value):
		problem = "is a placeholder that everybody knows"
	case isPattern(value):
		problem = "is a pattern and can be guessed"
	default:
		return nil
	}
	return fmt.Errorf(`%s %s; make one with "openssl rand -hex 32"`, name, problem)
}

// isPlaceholder matches what examples, tutorials and compose files contain. A random hex or base64 value does not start with or
// contain one of these words.
func isPlaceholder(value string) bool {
	// "Change_Me", "change-me" and "CHANGEME" are one word.
	word := strings.Map(func(r rune) rune {
		if strings.ContainsRune("-_. ", r) {
			return -1
		}
		return r
	}, strings.ToLower(value))
	for _, start := range []string{
		"secret", "password", "passw0rd", "default", "your", "example", "insecure", "placeholder", "replace", "supersecret",
		"mysecret", "jwtsecret", "workersecret", "workertokensecret", "letmein", "admin", "qwerty", "topsecret",
	} {
		if strings.HasPrefix(word, start) {
			return true
		}
	}
	return strings.Contains(word, "changeme") || strings.Contains(word, "changethis")
}

// isPattern finds repetition ("aaaa", "abcabc") and runs ("0123456789abcdef").
func isPattern(value string) bool {
	for period := 1; period <= len(value)/2; period++ {
		if value[period:] == value[:len(value)-period] {
			return true
		}
	}
	distinct := map[byte]bool{}
	steps := 0
	for i := range len(value) {
		distinct[value[i]] = true
		if i > 0 {
			if d := int(value[i]) - int(value[i-1]); d >= -1 && d <= 1 {
				steps++
			}
		}
	}
	// In 64 random hex digits about 15 are distinct and an eighth to a fifth of the neighbours differ by at most one.
	return len(distinct) < 8 || steps > len(value)*2/3
}
