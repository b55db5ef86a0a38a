package gateway

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/core/fleet"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
)

// TestAccess walks the router: each route, as each kind of caller. What is
// expected is written by hand; a route that is not in the table fails.
func TestAccess(t *testing.T) {
	e := start(t, nil)
	require.NoError(t, e.conn.Workers().Put(t.Context(), fleet.Worker{ID: "worker-1", OS: "linux", Arch: "amd64", Slots: 1}))
	jobID := e.create("ann")
	e.runs(jobID, 1) // on w1
	e.store.put(e.move(jobID, ended(1, job.OutcomeSucceeded, 0, &job.Manifest{})))

	type caller struct{ name, header, value string }
	workerToken := func(name string) string {
		// Signed with the users' secret even: the audience keeps the two apart.
		tok, err := auth.MintWorker([]byte(testSecret), name, time.Hour, time.Now())
		require.NoError(t, err)
		return tok
	}
	bearer := func(name, tok string) caller { return caller{name, "Authorization", "Bearer " + tok} }
	callers := []caller{
		bearer("owner", token(t, "ann", auth.RoleUser)),
		bearer("other", token(t, "bob", auth.RoleUser)),
		bearer("admin", token(t, "root", auth.RoleAdmin)),
		{"holder", "X-Worker-Token", workerToken("w1")},
		bearer("holder", workerToken("w1")),
		{"worker", "X-Worker-Token", workerToken("worker-1")},
		bearer("worker", workerToken("worker-1")),
		{"nobody", "", ""},
	}
	// holder is the worker that holds the job's lease, worker is another one.
	type expect struct{ owner, other, admin, holder, worker, nobody int }
	everybody := expect{200, 200, 200, 200, 200, 200}
	users := func(status int) expect { return expect{status, status, status, 401, 401, 401} }
	owners := expect{200, 404, 200, 401, 401, 401}
	named := `{"jobId":"` + jobID + `"}`
	table := map[string]struct {
		path, body string
		want       expect
	}{
		"POST /api/jobs/create":         {"", `{"command":"true"}`, users(201)},
		"POST /api/jobs/rerun":          {"", named, expect{201, 404, 201, 401, 401, 401}},
		"POST /api/jobs/batch":          {"", `{"jobs":[{"command":"true"}]}`, users(200)},
		"POST /api/jobs/cancel":         {"", named, owners},
		"POST /api/jobs/cancel-batch":   {"", `{"owner":"ann"}`, expect{200, 403, 200, 401, 401, 401}},
		"GET /api/jobs":                 {"", "", users(200)},
		"GET /api/jobs/status":          {"/api/jobs/status?jobId=" + jobID, "", owners},
		"GET /api/jobs/{jobId}":         {"/api/jobs/" + jobID, "", owners},
		"GET /api/jobs/{jobId}/logs":    {"/api/jobs/" + jobID + "/logs", "", owners},
		"GET /api/jobs/{jobId}/events":  {"/api/jobs/" + jobID + "/events", "", owners},
		"GET /api/jobs/{jobId}/explain": {"/api/jobs/" + jobID + "/explain", "", owners},
		// A stream that does not end by itself: that it is not begun is what counts
		// here. Whose jobs it tells of is tested with it.
		"GET /api/jobs/events": {"/api/jobs/events?queue=A", "", users(400)},
		// A job that cannot be: the access is what counts here.
		"POST /api/execute":       {"", `{}`, users(422)},
		"GET /api/workers/list":   {"", "", users(200)},
		"POST /api/workers/drain": {"", `{"workerId":"worker-1","drain":true}`, expect{403, 403, 200, 401, 401, 401}},
		"GET /api/health":         {"", "", everybody},
		"GET /api/info":           {"", "", everybody},
		"GET /openapi.json":       {"", "", everybody},
		"GET /docs":               {"", "", everybody},
	}
	seen := map[string]bool{}
	require.NoError(t, chi.Walk(e.svc.handler.(chi.Routes), func(method, route string, _ http.Handler, _ ...func(http.Handler) http.Handler) error {
		name := method + " " + route
		seen[name] = true
		c, ok := table[name]
		if !ok {
			t.Errorf("%s has no line in this table: say who may use it", name)
			return nil
		}
		if c.path == "" {
			c.path = route
		}
		for _, who := range callers {
			want := map[string]int{
				"owner": c.want.owner, "other": c.want.other, "admin": c.want.admin,
				"holder": c.want.holder, "worker": c.want.worker, "nobody": c.want.nobody,
			}[who.name]
			var headers []string
			if who.header != "" {
				headers = []string{who.header, who.value}
			}
			a := e.do(method, c.path, "", c.body, headers...)
			require.Equal(t, want, a.status, "%s as %s: %s", name, who.name, a.body)
			if want == 404 {
				another := newID()
				missing := e.do(method, strings.ReplaceAll(c.path, jobID, another), "", strings.ReplaceAll(c.body, jobID, another), headers...)
				p, q := a.problem(t), missing.problem(t)
				p.RequestID, q.RequestID, p.Instance, q.Instance = "", "", "", ""
				require.Equal(t, q, p, "somebody else's job looks like one that does not exist")
			}
		}
		return nil
	}))
	for name := range table {
		require.True(t, seen[name], "%s is not served", name)
	}
}

// signed makes a token of any header and claims.
func signed(header, claims string, sign func(text []byte) []byte) string {
	text := base64.RawURLEncoding.EncodeToString([]byte(header)) + "." + base64.RawURLEncoding.EncodeToString([]byte(claims))
	return text + "." + base64.RawURLEncoding.EncodeToString(sign([]byte(text)))
}

func hs256(secret []byte) func([]byte) []byte {
	return func(text []byte) []byte {
		m := hmac.New(sha256.New, secret)
		m.Write(text)
		return m.Sum(nil)
	}
}

// TestTokens: whatever is not a token of this API is answered alike.
func TestTokens(t *testing.T) {
	e := start(t, nil)
	now := time.Now().Unix()
	const hs = `{"alg":"HS256","typ":"JWT"}`
	ours := hs256([]byte(testSecret))
	claims := func(format string, args ...any) string {
		return `{"sub":"ann","role":"user","iss":"cmdexec","aud":"cmdexec-api",` + fmt.Sprintf(format, args...) + `}`
	}
	fresh := claims(`"exp":%d,"iat":%d`, now+3600, now)
	with := func(old, new string) string { return strings.Replace(fresh, old, new, 1) }
	good := signed(hs, fresh, ours)
	ok := e.do("GET", "/api/jobs", good, "")
	require.Equal(t, 200, ok.status, "what the other tokens are one change away from is good: %s", ok.body)

	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	require.NoError(t, err)
	der, err := x509.MarshalPKIXPublicKey(&rsaKey.PublicKey)
	require.NoError(t, err)
	publicPEM := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
	rs256 := func(text []byte) []byte {
		sum := sha256.Sum256(text)
		sig, err := rsa.SignPKCS1v15(rand.Reader, rsaKey, crypto.SHA256, sum[:])
		require.NoError(t, err)
		return sig
	}
	ecKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	es256 := func(text []byte) []byte {
		sum := sha256.Sum256(text)
		r, s, err := ecdsa.Sign(rand.Reader, ecKey, sum[:])
		require.NoError(t, err)
		return append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...)
	}
	hs512 := func(text []byte) []byte {
		m := hmac.New(sha512.New, []byte(testSecret))
		m.Write(text)
		return m.Sum(nil)
	}
	none := func([]byte) []byte { return nil }
	zeros := func([]byte) []byte { return make([]byte, 64) }
	worker, err := auth.MintWorker([]byte(testSecret), "worker-1", time.Hour, time.Now())
	require.NoError(t, err)
	parts := strings.Split(good, ".")

	bad := map[string]string{
		"empty":                 "",
		"word":                  "x",
		"dots":                  "..",
		"two parts":             parts[0] + "." + parts[1],
		"four parts":            good + ".x",
		"five parts (JWE)":      `eyJhbGciOiJkaXIiLCJlbmMiOiJBMjU2R0NNIn0..AAAAAAAAAAAAAAAA.AAAA.AAAAAAAAAAAAAAAAAAAAAA`,
		"header no JSON":        signed(`x`, fresh, ours),
		"header twice":          signed(`{"alg":"none","alg":"none"}`, fresh, ours),
		"claims no JSON":        signed(hs, `x`, ours),
		"claims null":           signed(hs, `null`, ours),
		"claims array":          signed(hs, `[]`, ours),
		"padding":               good + "=",
		"padded parts":          parts[0] + "==." + parts[1] + "." + parts[2],
		"signature cut":         good[:len(good)-1],
		"signature longer":      good + "A",
		"signature empty":       parts[0] + "." + parts[1] + ".",
		"signature of another":  signed(hs, fresh, hs256([]byte(strings.Repeat("another secret ", 3)))),
		"signature of nothing":  signed(hs, fresh, hs256(nil)),
		"other claims":          parts[0] + "." + base64.RawURLEncoding.EncodeToString([]byte(with(`"user"`, `"admin"`))) + "." + parts[2],
		"alg none":              signed(`{"alg":"none"}`, fresh, none),
		"alg None":              signed(`{"alg":"None"}`, fresh, none),
		"alg nOnE":              signed(`{"alg":"nOnE"}`, fresh, none),
		"alg none, signed":      signed(`{"alg":"none"}`, fresh, ours),
		"alg empty":             signed(`{"alg":""}`, fresh, ours),
		"alg missing":           signed(`{"typ":"JWT"}`, fresh, ours),
		"alg number":            signed(`{"alg":256}`, fresh, ours),
		"alg hs256":             signed(`{"alg":"hs256"}`, fresh, ours),
		"alg HS512":             signed(`{"alg":"HS512"}`, fresh, hs512),
		"alg HS384":             signed(`{"alg":"HS384"}`, fresh, ours),
		"RS256":                 signed(`{"alg":"RS256"}`, fresh, rs256),
		"HS256 by a public key": signed(hs, fresh, hs256(publicPEM)),
		"RS256 by our secret":   signed(`{"alg":"RS256"}`, fresh, ours),
		"ES256":                 signed(`{"alg":"ES256"}`, fresh, es256),
		"ES256 r=s=0":           signed(`{"alg":"ES256"}`, fresh, zeros),
		"kid path":              signed(`{"alg":"HS256","kid":"../../../dev/null"}`, fresh, hs256(nil)),
		"kid SQL":               signed(`{"alg":"HS256","kid":"x' UNION SELECT 'secret'--"}`, fresh, hs256([]byte("secret"))),
		"kid URL":               signed(`{"alg":"HS256","kid":"http://127.0.0.1/key"}`, fresh, hs256(nil)),
		"jwk":                   signed(`{"alg":"HS256","jwk":{"kty":"oct","k":"c2VjcmV0"}}`, fresh, hs256([]byte("secret"))),
		"jku":                   signed(`{"alg":"RS256","jku":"http://127.0.0.1:1/keys"}`, fresh, rs256),
		"x5u":                   signed(`{"alg":"RS256","x5u":"http://127.0.0.1:1/cert"}`, fresh, rs256),
		"x5c":                   signed(`{"alg":"RS256","x5c":["`+base64.StdEncoding.EncodeToString(der)+`"]}`, fresh, rs256),
		"crit":                  signed(`{"alg":"HS256","crit":["exp"]}`, fresh, ours),
		"crit empty":            signed(`{"alg":"HS256","crit":[]}`, fresh, ours),
		"issuer wrong":          signed(hs, with(`"iss":"cmdexec"`, `"iss":"other"`), ours),
		"issuer missing":        signed(hs, with(`"iss":"cmdexec",`, ``), ours),
		"issuer array":          signed(hs, with(`"iss":"cmdexec"`, `"iss":["cmdexec"]`), ours),
		"audience wrong":        signed(hs, with(`cmdexec-api`, `cmdexec`), ours),
		"audience missing":      signed(hs, with(`"aud":"cmdexec-api",`, ``), ours),
		"audience of workers":   signed(hs, with(`cmdexec-api`, `cmdexec-worker`), ours),
		"a worker's":            worker,
		"role missing":          signed(hs, with(`"role":"user",`, ``), ours),
		"role worker":           signed(hs, with(`"role":"user"`, `"role":"worker"`), ours),
		"role Admin":            signed(hs, with(`"role":"user"`, `"role":"Admin"`), ours),
		"role array":            signed(hs, with(`"role":"user"`, `"role":["admin"]`), ours),
		"subject missing":       signed(hs, with(`"sub":"ann",`, ``), ours),
		"subject empty":         signed(hs, with(`"sub":"ann"`, `"sub":""`), ours),
		"subject number":        signed(hs, with(`"sub":"ann"`, `"sub":1`), ours),
		"subject NUL":           signed(hs, with(`"sub":"ann"`, `"sub":"ann\u0000"`), ours),
		"expired":               signed(hs, claims(`"exp":%d`, now-3600), ours),
		"exp missing":           signed(hs, claims(`"iat":%d`, now), ours),
		"exp null":              signed(hs, claims(`"exp":null`), ours),
		"exp string":            signed(hs, claims(`"exp":"%d"`, now+3600), ours),
		"exp fraction":          signed(hs, claims(`"exp":%d.5`, now+3600), ours),
		"exp exponent":          signed(hs, claims(`"exp":9e18`), ours),
		"exp negative":          signed(hs, claims(`"exp":-1`), ours),
		"exp zero":              signed(hs, claims(`"exp":0`), ours),
		"exp huge":              signed(hs, claims(`"exp":9223372036854775807`), ours),
		"exp past 24 h":         signed(hs, claims(`"exp":%d`, now+90_000), ours),
		"nbf ahead":             signed(hs, claims(`"exp":%d,"nbf":%d`, now+3600, now+1800), ours),
		"iat ahead":             signed(hs, claims(`"exp":%d,"iat":%d`, now+3600, now+1800), ours),
		"8 KB":                  signed(hs, with(`"sub":"ann"`, `"sub":"ann","x":"`+strings.Repeat("x", 8<<10)+`"`), ours),
		"20 KB":                 strings.Repeat("x", 20<<10),
	}
	headers := map[string][]string{
		"no header":        nil,
		"scheme alone":     {"Bearer"},
		"no scheme":        {good},
		"basic":            {"Basic YW5uOmFubg=="},
		"two spaces":       {"bearer  " + good},
		"a tab":            {"Bearer\t" + good},
		"a second token":   {"Bearer " + good + " " + good},
		"a comma":          {"Bearer " + good + ",Bearer " + good},
		"two headers":      {"Bearer " + good, "Bearer " + good},
		"a bad and a good": {"Bearer x", "Bearer " + good},
		"not ASCII":        {"Bearer " + good + "é"},
		"64 KB":            {"Bearer " + strings.Repeat("x", 64<<10)},
	}
	for name, tok := range bad {
		headers["token "+name] = []string{"Bearer " + tok}
	}
	var first []byte
	ask := func(name string, method, path string, values []string) (status int, body []byte) {
		req, err := http.NewRequestWithContext(t.Context(), method, e.base+path, nil)
		require.NoError(t, err)
		req.Header["Authorization"] = values
		req.Header.Set("X-Request-Id", "same")
		resp, err := e.http.Do(req)
		require.NoError(t, err, name)
		defer func() { _ = resp.Body.Close() }()
		body, err = io.ReadAll(resp.Body)
		require.NoError(t, err)
		if resp.StatusCode == 401 {
			require.Equal(t, "Bearer", resp.Header.Get("WWW-Authenticate"), name)
			require.Equal(t, "application/problem+json", resp.Header.Get("Content-Type"), name)
		}
		return resp.StatusCode, body
	}
	for name, values := range headers {
		for _, route := range [][2]string{{"GET", "/api/jobs"}, {"POST", "/api/jobs/create"}, {"POST", "/api/workers/drain"}, {"GET", "/api/jobs/events"}} {
			status, body := ask(name, route[0], route[1], values)
			require.Equal(t, 401, status, "%s: %s %s", name, route[0], body)
			if first == nil {
				first = body
				require.Contains(t, string(body), `"code":"unauthorized"`)
			}
			require.True(t, bytes.Equal(first, body), "%s: the answer says nothing about what was wrong: %s", name, body)
		}
	}
	// Beyond what a token could be, the server stops reading.
	status, _ := ask("1 MB", "GET", "/api/jobs", []string{"Bearer " + strings.Repeat("x", 1<<20)})
	require.Equal(t, 431, status)
	for _, spelling := range []string{"bearer ", "BEARER ", "Bearer "} {
		status, body := ask(spelling, "GET", "/api/jobs", []string{spelling + good})
		require.Equal(t, 200, status, "%s", body)
	}
	// A token is taken from the header only.
	for _, query := range []string{"access_token", "token", "jwt"} {
		status, _ := ask(query, "GET", "/api/jobs?"+query+"="+good, nil)
		require.Equal(t, 401, status)
	}
}
