package auth_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/kit/auth"
)

var (
	userSecret   = []byte("u-9f86d081884c7d659a2feaa0c55ad0")
	workerSecret = []byte("w-15a3bf4f1b2b0b822cd15d6c15b0f0")
	now          = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
)

type m = map[string]any

func b64(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }

// forge signs any header and payload, as a holder of the secret could with any tool.
func forge(secret []byte, header, payload string) string {
	text := b64([]byte(header)) + "." + b64([]byte(payload))
	mac := hmac.New(sha256.New, secret)
	mac.Write([]byte(text))
	return text + "." + b64(mac.Sum(nil))
}

const plainHeader = `{"alg":"HS256","typ":"JWT"}`

// goodClaims returns a valid payload with changes; a nil value removes a claim.
func goodClaims(changes m) string {
	c := m{"iss": "cmdexec", "aud": "cmdexec-api", "sub": "ann", "role": "user", "iat": now.Unix(), "exp": now.Add(time.Hour).Unix()}
	maps.Copy(c, changes)
	maps.DeleteFunc(c, func(_ string, v any) bool { return v == nil })
	out, err := json.Marshal(c)
	if err != nil {
		panic(err)
	}
	return string(out)
}

func TestMintedTokensVerify(t *testing.T) {
	token, err := auth.MintUser(userSecret, "ann", auth.RoleAdmin, time.Hour, now)
	require.NoError(t, err)
	user, err := auth.NewUserVerifier(userSecret).Verify(token, now)
	require.NoError(t, err)
	require.Equal(t, auth.UserClaims{Subject: "ann", Role: "admin", IssuedAt: now, ExpiresAt: now.Add(time.Hour)}, user)

	token, err = auth.MintWorker(workerSecret, "worker-1", 24*time.Hour, now)
	require.NoError(t, err)
	worker, err := auth.NewWorkerVerifier(workerSecret).Verify(token, now)
	require.NoError(t, err)
	require.Equal(t, auth.WorkerClaims{Subject: "worker-1", IssuedAt: now, ExpiresAt: now.Add(24 * time.Hour)}, worker)
}

func TestMintRefusesWhatVerifyWould(t *testing.T) {
	for name, mint := range map[string]func() (string, error){
		"short secret": func() (string, error) { return auth.MintUser(userSecret[1:], "ann", "user", time.Hour, now) },
		"no subject":   func() (string, error) { return auth.MintUser(userSecret, "", "user", time.Hour, now) },
		"long subject": func() (string, error) {
			return auth.MintUser(userSecret, strings.Repeat("a", auth.MaxSubjectBytes+1), "user", time.Hour, now)
		},
		"control":     func() (string, error) { return auth.MintWorker(workerSecret, "a\nb", time.Hour, now) },
		"bad UTF-8":   func() (string, error) { return auth.MintWorker(workerSecret, "a\xff", time.Hour, now) },
		"role":        func() (string, error) { return auth.MintUser(userSecret, "ann", "root", time.Hour, now) },
		"no lifetime": func() (string, error) { return auth.MintUser(userSecret, "ann", "user", 0, now) },
		"too long":    func() (string, error) { return auth.MintWorker(workerSecret, "w", 24*time.Hour+1, now) },
	} {
		token, err := mint()
		require.Error(t, err, name)
		require.Empty(t, token, name)
	}
}

func TestTokenMatrix(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	require.NoError(t, err)
	der, err := x509.MarshalPKIXPublicKey(&rsaKey.PublicKey)
	require.NoError(t, err)
	rsaPublic := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
	ecKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)

	good := forge(userSecret, plainHeader, goodClaims(nil))
	segments := strings.Split(good, ".")
	mapClaims := jwt.MapClaims{}
	require.NoError(t, json.Unmarshal([]byte(goodClaims(nil)), &mapClaims))
	signed := func(method jwt.SigningMethod, key any) string {
		s, err := jwt.NewWithClaims(method, mapClaims).SignedString(key)
		require.NoError(t, err)
		return s
	}
	payload := func(changes m) string { return forge(userSecret, plainHeader, goodClaims(changes)) }
	header := func(h string) string { return forge(userSecret, h, goodClaims(nil)) }
	raw := func(p string) string { return forge(userSecret, plainHeader, p) }
	at := func(d time.Duration) int64 { return now.Add(d).Unix() }
	unsigned := func(alg string) string {
		return b64([]byte(`{"alg":"`+alg+`"}`)) + "." + segments[1] + "."
	}
	workerToken, err := auth.MintWorker(userSecret, "worker-1", time.Hour, now) // even under the same secret
	require.NoError(t, err)

	for name, token := range map[string]string{
		"good":                           good,
		"header about keys is ignored":   header(`{"alg":"HS256","kid":"../../dev/null","jku":"http://127.0.0.1:1/k","x5u":"http://127.0.0.1:1/x","jwk":{"kty":"oct","k":"AA"}}`),
		"kid with SQL":                   header(`{"alg":"HS256","kid":"' OR 1=1 --"}`),
		"audience list":                  payload(m{"aud": []string{"other", "cmdexec-api"}}),
		"no iat":                         payload(m{"iat": nil}),
		"nbf now":                        payload(m{"nbf": at(0)}),
		"nbf within the leeway":          payload(m{"nbf": at(60 * time.Second)}),
		"iat within the leeway":          payload(m{"iat": at(60 * time.Second)}),
		"exp within the leeway":          payload(m{"exp": at(-59 * time.Second)}),
		"exp a day and the leeway ahead": payload(m{"exp": at(24*time.Hour + 60*time.Second)}),
		"unknown claims":                 payload(m{"jti": "x", "scope": "everything"}),
		"admin":                          payload(m{"role": "admin"}),
		"longest subject":                payload(m{"sub": strings.Repeat("a", 256)}),
	} {
		t.Run("accepts "+name, func(t *testing.T) {
			c, err := auth.NewUserVerifier(userSecret).Verify(token, now)
			require.NoError(t, err, "%v", errors.Unwrap(err))
			require.NotEmpty(t, c.Subject)
		})
	}

	for name, token := range map[string]string{
		"empty":                  "",
		"dots":                   "..",
		"one segment":            segments[0],
		"two segments":           segments[0] + "." + segments[1],
		"four segments":          good + ".x",
		"JWE":                    good + ".x.y",
		"no signature":           segments[0] + "." + segments[1] + ".",
		"alg none":               unsigned("none"),
		"alg None":               unsigned("None"),
		"alg nOnE":               unsigned("nOnE"),
		"alg none signed":        header(`{"alg":"none"}`),
		"alg empty":              header(`{"alg":""}`),
		"alg missing":            header(`{}`),
		"alg number":             header(`{"alg":256}`),
		"alg hs256":              header(`{"alg":"hs256"}`),
		"header null":            header(`null`),
		"header list":            header(`[]`),
		"header not JSON":        header(`{`),
		"HS384":                  signed(jwt.SigningMethodHS384, userSecret),
		"HS512":                  signed(jwt.SigningMethodHS512, userSecret),
		"RS256":                  signed(jwt.SigningMethodRS256, rsaKey),
		"ES256":                  signed(jwt.SigningMethodES256, ecKey),
		"ES256 with r,s = 0":     b64([]byte(`{"alg":"ES256"}`)) + "." + segments[1] + "." + b64(make([]byte, 64)),
		"HS256 with RSA key":     signed(jwt.SigningMethodHS256, rsaPublic),
		"HS256 with empty key":   signed(jwt.SigningMethodHS256, []byte{}),
		"other secret":           forge(workerSecret, plainHeader, goodClaims(nil)),
		"crit":                   header(`{"alg":"HS256","crit":["exp"]}`),
		"crit empty":             header(`{"alg":"HS256","crit":[]}`),
		"crit b64":               header(`{"alg":"HS256","crit":["b64"],"b64":false}`),
		"key in the header":      forge([]byte{0}, `{"alg":"HS256","jwk":{"kty":"oct","k":"AA"}}`, goodClaims(nil)),
		"padding":                good + "=",
		"signature with newline": segments[0] + "." + segments[1] + "." + segments[2][:10] + "\n" + segments[2][10:],
		"payload with CR":        segments[0] + "." + segments[1][:10] + "\r" + segments[1][10:] + "." + segments[2],
		"signature loose bits":   looseBits(good),
		"standard base64":        strings.NewReplacer("-", "+", "_", "/").Replace(good) + "+",
		"space before":           " " + good,
		"space after":            good + " ",
		"NUL":                    good + "\x00",
		"signature cut":          good[:len(good)-2],
		"payload changed":        segments[0] + "." + b64([]byte(goodClaims(m{"role": "admin"}))) + "." + segments[2],
		"exp missing":            payload(m{"exp": nil}),
		"exp null":               raw(`{"iss":"cmdexec","aud":"cmdexec-api","sub":"a","role":"user","exp":null}`),
		"exp string":             payload(m{"exp": fmt.Sprint(at(time.Hour))}),
		"exp float":              payload(m{"exp": float64(at(time.Hour)) + 0.5}),
		"exp exponent":           raw(`{"iss":"cmdexec","aud":"cmdexec-api","sub":"a","role":"user","exp":1.7e9}`),
		"exp negative":           payload(m{"exp": -1}),
		"exp zero":               payload(m{"exp": 0}),
		"exp smallest":           payload(m{"exp": int64(-1 << 63)}),
		"exp largest":            payload(m{"exp": int64(1<<63 - 1)}),
		"exp over int64":         raw(`{"iss":"cmdexec","aud":"cmdexec-api","sub":"a","role":"user","exp":99999999999999999999}`),
		"exp true":               payload(m{"exp": true}),
		"exp past":               payload(m{"exp": at(-60 * time.Second)}),
		"exp too far":            payload(m{"exp": at(24*time.Hour + 61*time.Second)}),
		"nbf future":             payload(m{"nbf": at(61 * time.Second)}),
		"nbf string":             payload(m{"nbf": "0"}),
		"nbf huge":               payload(m{"nbf": int64(1<<63 - 1)}),
		"iat future":             payload(m{"iat": at(61 * time.Second)}),
		"iat string":             payload(m{"iat": "0"}),
		"iss missing":            payload(m{"iss": nil}),
		"iss wrong":              payload(m{"iss": "Cmdexec"}),
		"iss list":               payload(m{"iss": []string{"cmdexec"}}),
		"aud missing":            payload(m{"aud": nil}),
		"aud empty":              payload(m{"aud": ""}),
		"aud empty list":         payload(m{"aud": []string{}}),
		"aud wrong":              payload(m{"aud": "cmdexec"}),
		"aud of workers":         payload(m{"aud": "cmdexec-worker"}),
		"aud number in list":     payload(m{"aud": []any{"cmdexec-api", 1}}),
		"aud object":             payload(m{"aud": m{"cmdexec-api": true}}),
		"worker token":           workerToken,
		"sub missing":            payload(m{"sub": nil}),
		"sub empty":              payload(m{"sub": ""}),
		"sub number":             payload(m{"sub": 7}),
		"sub with a line break":  payload(m{"sub": "a\nb"}),
		"sub too long":           payload(m{"sub": strings.Repeat("a", 257)}),
		"role missing":           payload(m{"role": nil}),
		"role unknown":           payload(m{"role": "root"}),
		"role upper case":        payload(m{"role": "Admin"}),
		"role list":              payload(m{"role": []string{"admin"}}),
		"payload null":           raw(`null`),
		"payload list":           raw(`[]`),
		"payload string":         raw(`"x"`),
		"payload not JSON":       raw(`{"iss"`),
		"payload twice":          raw(goodClaims(nil) + goodClaims(nil)),
		"over 8 KiB":             payload(m{"junk": strings.Repeat("x", 8<<10)}),
		"64 KiB of garbage":      strings.Repeat("a", 64<<10),
		"deep":                   raw(strings.Repeat(`{"a":`, 900) + "1" + strings.Repeat("}", 900)),
	} {
		t.Run("refuses "+name, func(t *testing.T) {
			c, err := auth.NewUserVerifier(userSecret).Verify(token, now)
			require.ErrorIs(t, err, auth.ErrInvalidToken)
			require.Equal(t, auth.ErrInvalidToken.Error(), err.Error(), "one text for all")
			require.Zero(t, c)
			reason := errors.Unwrap(err)
			require.Error(t, reason, "the log can say why")
			for part := range strings.SplitSeq(token, ".") {
				if len(part) > 4 {
					require.NotContains(t, reason.Error(), part)
				}
			}
		})
	}
}

// looseBits changes bits of the last character that a lenient decoder drops: 32 bytes end in a character with two of them.
func looseBits(token string) string {
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	last := strings.IndexByte(alphabet, token[len(token)-1])
	return token[:len(token)-1] + string(alphabet[last^1])
}

func TestUserAndWorkerTokensAreNotInterchangeable(t *testing.T) {
	user, err := auth.MintUser(userSecret, "ann", auth.RoleAdmin, time.Hour, now)
	require.NoError(t, err)
	_, err = auth.NewWorkerVerifier(userSecret).Verify(user, now)
	require.ErrorIs(t, err, auth.ErrInvalidToken)
	worker, err := auth.MintWorker(userSecret, "worker-1", time.Hour, now)
	require.NoError(t, err)
	_, err = auth.NewUserVerifier(userSecret).Verify(worker, now)
	require.ErrorIs(t, err, auth.ErrInvalidToken)
	_, err = auth.NewWorkerVerifier(workerSecret).Verify(worker, now)
	require.ErrorIs(t, err, auth.ErrInvalidToken, "other secret")
}

func TestAVerifierWithoutASecretRefusesEverything(t *testing.T) {
	for _, secret := range [][]byte{nil, {}, userSecret[:31]} {
		_, err := auth.NewUserVerifier(secret).Verify(forge(secret, plainHeader, goodClaims(nil)), now)
		require.ErrorIs(t, err, auth.ErrInvalidToken)
	}
}

func TestTheVerifierKeepsItsOwnCopyOfTheSecret(t *testing.T) {
	secret := append([]byte(nil), userSecret...)
	v := auth.NewUserVerifier(secret)
	clear(secret)
	_, err := v.Verify(forge(userSecret, plainHeader, goodClaims(nil)), now)
	require.NoError(t, err)
}

// FuzzJWT: whatever is accepted is, byte for byte, a token that we have minted.
func FuzzJWT(f *testing.F) {
	minted := map[string]bool{}
	for _, sub := range []string{"ann", "worker-1"} {
		for _, ttl := range []time.Duration{time.Hour, 24 * time.Hour} {
			user, err := auth.MintUser(userSecret, sub, auth.RoleUser, ttl, now)
			require.NoError(f, err)
			worker, err := auth.MintWorker(workerSecret, sub, ttl, now)
			require.NoError(f, err)
			minted[user], minted[worker] = true, true
			f.Add(user)
			f.Add(worker)
			f.Add(looseBits(user))
			f.Add(user + "\n")
		}
	}
	f.Add("")
	f.Add("..")
	f.Add(b64([]byte(`{"alg":"none"}`)) + "." + b64([]byte(goodClaims(nil))) + ".")
	users, workers := auth.NewUserVerifier(userSecret), auth.NewWorkerVerifier(workerSecret)
	f.Fuzz(func(t *testing.T, token string) {
		_, userErr := users.Verify(token, now)
		_, workerErr := workers.Verify(token, now)
		if (userErr == nil || workerErr == nil) && !minted[token] {
			t.Fatalf("accepted a token that nobody minted: %q", token)
		}
		for _, err := range []error{userErr, workerErr} {
			if err != nil && !errors.Is(err, auth.ErrInvalidToken) {
				t.Fatalf("another error: %v", err)
			}
		}
	})
}

func BenchmarkVerify(b *testing.B) {
	token, err := auth.MintUser(userSecret, "ann", auth.RoleUser, time.Hour, now)
	require.NoError(b, err)
	v := auth.NewUserVerifier(userSecret)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := v.Verify(token, now); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkVerifyGarbage(b *testing.B) {
	v := auth.NewUserVerifier(userSecret)
	token := strings.Repeat("a", 64<<10)
	for b.Loop() {
		_, _ = v.Verify(token, now)
	}
}
