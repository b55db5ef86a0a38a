// Package auth mints and verifies the JSON web tokens of users and workers: HS256 and nothing else.
//
// A token carries iss "cmdexec", an audience (user and worker tokens are never interchangeable, even under one secret), a subject, and an
// expiry at most 24 hours ahead. Keys come from configuration only: whatever a token's header says about keys (kid, jku, jwk, x5u) is
// ignored, and a header that demands understanding (crit) is refused. Verification needs no network and caches nothing.
//
// Every failure is ErrInvalidToken with the same text, so that a response cannot tell a forger what was wrong. errors.Unwrap gives the
// reason for a log line; no part of the token is in it.
package auth

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/golang-jwt/jwt/v5"
)

// The rules every token is held to.
const (
	Issuer         = "cmdexec"
	UserAudience   = "cmdexec-api"
	WorkerAudience = "cmdexec-worker"

	MaxLifetime     = 24 * time.Hour
	Leeway          = 60 * time.Second // clock skew that is forgiven for exp, iat and nbf
	MaxTokenBytes   = 8 << 10          // longer ones are refused unparsed
	MaxSubjectBytes = 256
	MinSecretBytes  = 32
)

// Role is what a user may do.
type Role string

// The two roles. An admin sees and cancels everybody's jobs and drains workers.
const (
	RoleUser  Role = "user"
	RoleAdmin Role = "admin"
)

// ErrInvalidToken is what errors.Is finds in every error of Verify.
var ErrInvalidToken = errors.New("invalid token")

// tokenError is ErrInvalidToken to the caller and carries the reason for the log.
type tokenError struct{ reason error }

func (e *tokenError) Error() string        { return ErrInvalidToken.Error() }
func (e *tokenError) Is(target error) bool { return target == ErrInvalidToken }
func (e *tokenError) Unwrap() error        { return e.reason }

// UserClaims is what a user token says.
type UserClaims struct {
	Subject   string // the user
	Role      Role
	IssuedAt  time.Time // zero if the token does not say
	ExpiresAt time.Time
}

// WorkerClaims is what a worker token says.
type WorkerClaims struct {
	Subject   string    // the worker id
	IssuedAt  time.Time // zero if the token does not say
	ExpiresAt time.Time
}

// MintUser returns a token for the user sub, valid from now for ttl (above zero, at most 24 h, in whole seconds).
func MintUser(secret []byte, sub string, role Role, ttl time.Duration, now time.Time) (string, error) {
	if role != RoleUser && role != RoleAdmin {
		return "", errors.New("mint token: role must be user or admin")
	}
	return mint(secret, claims{Subject: sub, Role: role, Audience: audience{UserAudience}}, ttl, now)
}

// MintWorker returns a token for the worker with the id sub, valid from now for ttl (above zero, at most 24 h, in whole seconds).
func MintWorker(secret []byte, sub string, ttl time.Duration, now time.Time) (string, error) {
	return mint(secret, claims{Subject: sub, Audience: audience{WorkerAudience}}, ttl, now)
}

func mint(secret []byte, c claims, ttl time.Duration, now time.Time) (string, error) {
	switch {
	case len(secret) < MinSecretBytes:
		return "", fmt.Errorf("mint token: the secret must be at least %d bytes long", MinSecretBytes)
	case ttl < time.Second || ttl > MaxLifetime:
		return "", fmt.Errorf("mint token: the lifetime must be between 1s and %s", MaxLifetime)
	}
	if err := checkSubject(c.Subject); err != nil {
		return "", fmt.Errorf("mint token: %w", err)
	}
	c.Issuer = Issuer
	issued, expires := now.Unix(), now.Add(ttl).Unix()
	c.IssuedAt, c.ExpiresAt = &issued, &expires
	token, err := jwt.NewWithClaims(jwt.SigningMethodHS256, c).SignedString(secret)
	if err != nil {
		return "", fmt.Errorf("mint token: %w", err)
	}
	return token, nil
}

// UserVerifier checks user tokens. Safe for concurrent use.
type UserVerifier struct{ verifier }

// NewUserVerifier returns a verifier for tokens signed with secret. With a secret under 32 bytes it refuses every token.
func NewUserVerifier(secret []byte) *UserVerifier {
	return &UserVerifier{newVerifier(secret, UserAudience)}
}

// Verify returns the token's claims if it was signed with the secret, is meant for the user API and is valid at now; else an error
// that is ErrInvalidToken.
func (v *UserVerifier) Verify(token string, now time.Time) (UserClaims, error) {
	c, err := v.verify(token, now)
	if err != nil {
		return UserClaims{}, err
	}
	if c.Role != RoleUser && c.Role != RoleAdmin {
		return UserClaims{}, &tokenError{errRole}
	}
	return UserClaims{Subject: c.Subject, Role: c.Role, IssuedAt: c.issuedAt(), ExpiresAt: c.expiresAt()}, nil
}

// WorkerVerifier checks worker tokens. Safe for concurrent use. Revocation is the caller's business.
type WorkerVerifier struct{ verifier }

// NewWorkerVerifier returns a verifier for tokens signed with secret. With a secret under 32 bytes it refuses every token.
func NewWorkerVerifier(secret []byte) *WorkerVerifier {
	return &WorkerVerifier{newVerifier(secret, WorkerAudience)}
}

// Verify returns the token's claims if it was signed with the secret, is meant for the worker API and is valid at now; else an error
// that is ErrInvalidToken.
func (v *WorkerVerifier) Verify(token string, now time.Time) (WorkerClaims, error) {
	c, err := v.verify(token, now)
	if err != nil {
		return WorkerClaims{}, err
	}
	return WorkerClaims{Subject: c.Subject, IssuedAt: c.issuedAt(), ExpiresAt: c.expiresAt()}, nil
}

// The reasons inside a tokenError. They are constant: a reason built from the token would carry pieces of it into the logs.
var (
	errSecret    = errors.New("the verifier's secret is too short")
	errTooLong   = errors.New("token is longer than 8 KiB")
	errMalformed = errors.New("token is malformed")
	errCritical  = errors.New("token has a crit header")
	errSignature = errors.New("signature or algorithm is wrong")
	errIssuer    = errors.New("issuer is wrong")
	errAudience  = errors.New("audience is wrong")
	errNoExpiry  = errors.New("expiry is missing")
	errExpired   = errors.New("token has expired")
	errTooFar    = errors.New("expiry is more than 24 h ahead")
	errNotYet    = errors.New("token is not valid yet")
	errRole      = errors.New("role is neither user nor admin")
)

type verifier struct {
	secret   []byte
	audience string
	parser   *jwt.Parser
}

func newVerifier(secret []byte, aud string) verifier {
	return verifier{
		secret:   slices.Clone(secret),
		audience: aud,
		parser: jwt.NewParser(
			jwt.WithValidMethods([]string{jwt.SigningMethodHS256.Alg()}),
			jwt.WithStrictDecoding(),
			// claims.check is stricter (types, upper bound of exp) and takes the time as a value.
			jwt.WithoutClaimsValidation(),
		),
	}
}

func (v *verifier) verify(token string, now time.Time) (*claims, error) {
	switch {
	case len(v.secret) < MinSecretBytes:
		return nil, &tokenError{errSecret}
	case len(token) > MaxTokenBytes:
		return nil, &tokenError{errTooLong}
	case !isCompact(token):
		return nil, &tokenError{errMalformed}
	}
	var c claims
	_, err := v.parser.ParseWithClaims(token, &c, v.key)
	switch {
	case err == nil:
	case errors.Is(err, errCritical):
		return nil, &tokenError{errCritical}
	case errors.Is(err, jwt.ErrTokenMalformed):
		return nil, &tokenError{errMalformed}
	default:
		return nil, &tokenError{errSignature}
	}
	if err := c.check(v.audience, now.Unix()); err != nil {
		return nil, &tokenError{err}
	}
	return &c, nil
}

// key is called with the parsed but unverified token. Only its crit header is looked at.
func (v *verifier) key(t *jwt.Token) (any, error) {
	if _, ok := t.Header["crit"]; ok {
		return nil, errCritical
	}
	return v.secret, nil
}

// isCompact lets through only the characters of a compact token. Go's base64 decoders skip line breaks, even strict ones, which would
// give every signature endless spellings.
func isCompact(token string) bool {
	for i := range len(token) {
		c := token[i]
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-', c == '_', c == '.':
		default:
			return false
		}
	}
	return true
}

// claims is the payload of both kinds of token. Times are pointers to tell zero from missing, and integers: fractions, strings and
// exponents are refused by the decoder.
type claims struct {
	Issuer    string   `json:"iss"`
	Subject   string   `json:"sub"`
	Audience  audience `json:"aud"`
	Role      Role     `json:"role,omitempty"`
	ExpiresAt *int64   `json:"exp"`
	IssuedAt  *int64   `json:"iat,omitempty"`
	NotBefore *int64   `json:"nbf,omitempty"`
}

// check holds the claims against the rules at now (Unix seconds). Pure.
func (c *claims) check(wantAudience string, now int64) error {
	const leeway = int64(Leeway / time.Second)
	switch {
	case c.Issuer != Issuer:
		return errIssuer
	case !slices.Contains(c.Audience, wantAudience):
		return errAudience
	case c.ExpiresAt == nil:
		return errNoExpiry
	case *c.ExpiresAt > now+int64(MaxLifetime/time.Second)+leeway: // before adding to it: it may be huge
		return errTooFar
	case now >= *c.ExpiresAt+leeway:
		return errExpired
	case c.IssuedAt != nil && *c.IssuedAt > now+leeway, c.NotBefore != nil && *c.NotBefore > now+leeway:
		return errNotYet
	}
	return checkSubject(c.Subject)
}

func (c *claims) expiresAt() time.Time { return time.Unix(*c.ExpiresAt, 0).UTC() }

func (c *claims) issuedAt() time.Time {
	if c.IssuedAt == nil {
		return time.Time{}
	}
	return time.Unix(*c.IssuedAt, 0).UTC()
}

// checkSubject keeps subjects fit to be logged, stored and compared.
func checkSubject(sub string) error {
	switch {
	case sub == "":
		return errors.New("subject is missing")
	case len(sub) > MaxSubjectBytes:
		return fmt.Errorf("subject is longer than %d bytes", MaxSubjectBytes)
	case !utf8.ValidString(sub):
		return errors.New("subject is not valid UTF-8")
	}
	for _, r := range sub {
		if unicode.IsControl(r) {
			return errors.New("subject has a control character")
		}
	}
	return nil
}

// audience is one string or a list of strings (RFC 7519, section 4.1.3).
type audience []string

func (a audience) MarshalJSON() ([]byte, error) {
	if len(a) == 1 {
		return json.Marshal(a[0])
	}
	return json.Marshal([]string(a))
}

func (a *audience) UnmarshalJSON(data []byte) error {
	if len(data) > 0 && data[0] == '"' {
		*a = audience{""}
		return json.Unmarshal(data, &(*a)[0])
	}
	return json.Unmarshal(data, (*[]string)(a))
}

// The methods of jwt.Claims. The library calls none of them here, because claims.check does the validation.

func date(t *int64) (*jwt.NumericDate, error) {
	if t == nil {
		return nil, nil
	}
	return jwt.NewNumericDate(time.Unix(*t, 0)), nil
}

func (c claims) GetExpirationTime() (*jwt.NumericDate, error) { return date(c.ExpiresAt) }
func (c claims) GetIssuedAt() (*jwt.NumericDate, error)       { return date(c.IssuedAt) }
func (c claims) GetNotBefore() (*jwt.NumericDate, error)      { return date(c.NotBefore) }
func (c claims) GetIssuer() (string, error)                   { return c.Issuer, nil }
func (c claims) GetSubject() (string, error)                  { return c.Subject, nil }
func (c claims) GetAudience() (jwt.ClaimStrings, error)       { return jwt.ClaimStrings(c.Audience), nil }
