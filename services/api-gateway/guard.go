package gateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humachi"

	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
	"github.com/cmdexec/cmdexec/libs/kit/httpkit"
	"github.com/cmdexec/cmdexec/services/api-gateway/internal/yamljson"
)

// access says who may use a route.
type access int

const (
	accessUser  access = iota // any valid token
	accessAdmin               // a valid token with the role admin
	accessOpen                // everybody
)

// maxBody bounds a request's body. A spec may have 512 KiB as normalised JSON;
// the same may be longer as it is sent, by escapes.
const maxBody = 1 << 20

// maxBatchBody is the same for POST /api/jobs/batch: a thousand jobs of 8 KiB.
const maxBatchBody = 8 << 20

// maxYAMLBody is the same for YAML, and maxYAMLs how many are read at once: as a
// tree in memory it is two hundred times as large as it is sent.
const (
	maxYAMLBody = 512 << 10
	maxYAMLs    = 2
)

// call is what the guard found out about a request.
type call struct {
	user    string
	admin   bool
	expires time.Time // of the token
	body    []byte    // checked as bodyRules says
}

// sees reports whether the caller may know of an owner's job.
func (c *call) sees(owner string) bool { return c.admin || c.user == owner }

type callKey struct{}

func callFrom(ctx context.Context) *call {
	c, _ := ctx.Value(callKey{}).(*call)
	return c
}

// guard is what every request passes before its handler: limits, token, query
// and body. It answers by itself whatever it refuses.
type guard struct {
	s      *Service
	access access
	body   *bodyRules      // nil: the route takes none
	params map[string]bool // query parameters; true: may be repeated
}

// middleware runs inside huma, where the route is known.
func (g *guard) middleware(hctx huma.Context, next func(huma.Context)) {
	r, w := humachi.Unwrap(hctx)
	c, problem := g.check(w, r)
	if problem != nil {
		httpkit.Write(w, r, *problem)
		return
	}
	next(huma.WithValue(hctx, callKey{}, c))
}

func (g *guard) check(w http.ResponseWriter, r *http.Request) (*call, *httpkit.Problem) {
	c := &call{}
	known := g.access != accessOpen && g.s.identify(r, c)
	if p := g.s.admit(w, r, c); p != nil {
		return nil, p
	}
	if g.access != accessOpen {
		if !known {
			return nil, unauthorized()
		}
		if g.access == accessAdmin && !c.admin {
			return nil, adminOnly()
		}
	}
	if p := g.checkQuery(r); p != nil {
		return nil, p
	}
	if g.body == nil {
		return c, nil
	}
	if keys := r.Header["Idempotency-Key"]; len(keys) > 1 || len(keys) == 1 && keys[0] == "" {
		return nil, badKey() // none would be a request that may be done twice
	}
	body, p := g.s.readBody(w, r, g.body)
	c.body = body
	return c, p
}

// identify fills in who calls, and reports false where the token is not good.
func (s *Service) identify(r *http.Request, c *call) bool {
	token, ok := httpkit.BearerToken(r)
	if !ok {
		return false
	}
	claims, err := s.verifier.Verify(token, time.Now())
	if err != nil {
		return false
	}
	c.user, c.admin, c.expires = claims.Subject, claims.Role == auth.RoleAdmin, claims.ExpiresAt
	return true
}

// checkQuery refuses parameters that the route does not have: a misspelt
// filter must not silently list everything.
func (g *guard) checkQuery(r *http.Request) *httpkit.Problem {
	if r.URL.RawQuery == "" {
		return nil
	}
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return &httpkit.Problem{Status: http.StatusBadRequest, Code: codeBadParameter, Detail: "the query is not well-formed"}
	}
	for name, values := range query {
		repeats, known := g.params[name]
		if !known {
			return &httpkit.Problem{
				Status: http.StatusBadRequest, Code: codeUnknownParameter, Detail: "the query has a parameter that this route does not know",
				Hint: "see /openapi.json for the parameters of each route",
			}
		}
		if len(values) > 1 && !repeats {
			return badParameter(name, "may be given once")
		}
	}
	return nil
}

// bodyRules say what a route's body may be.
type bodyRules struct {
	limit int64 // bytes
	yaml  bool  // may be YAML, too, which the handler gets as JSON
	// parts: the handler takes the body apart and checks each part by itself. Else
	// what it gets was checked by httpkit.CheckJSONObject.
	parts bool
}

// read reads and checks a body.
func (s *Service) readBody(w http.ResponseWriter, r *http.Request, b *bodyRules) ([]byte, *httpkit.Problem) {
	if enc := r.Header.Get("Content-Encoding"); enc != "" && !strings.EqualFold(enc, "identity") {
		return nil, &httpkit.Problem{
			Status: http.StatusUnsupportedMediaType, Code: "unsupported_content_encoding", Detail: "the body must not be compressed",
			Hint: "send it without Content-Encoding",
		}
	}
	media := mediaType(r.Header.Values("Content-Type"))
	isYAML := b.yaml && yamlTypes[media]
	if media != jsonType && !isYAML {
		return nil, unsupportedMedia(b.yaml)
	}
	limit := b.limit
	if isYAML {
		limit = maxYAMLBody
	}
	if r.ContentLength > limit {
		w.Header().Set("Connection", "close") // the body is not read
		return nil, tooLarge(limit)
	}
	body, err := readAll(http.MaxBytesReader(w, r.Body, limit), r.ContentLength)
	if err != nil {
		if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
			return nil, tooLarge(limit)
		}
		if ne, ok := errors.AsType[net.Error](err); ok && ne.Timeout() {
			return nil, &httpkit.Problem{Status: http.StatusRequestTimeout, Code: "body_timeout", Detail: "the body did not arrive in time"}
		}
		return nil, &httpkit.Problem{Status: http.StatusBadRequest, Code: "body_incomplete", Detail: "the body ended too early or was malformed"}
	}
	if b.parts {
		return body, nil
	}
	if isYAML {
		var p *httpkit.Problem
		if body, p = s.fromYAML(r.Context(), body); p != nil {
			return nil, p
		}
	}
	if err := httpkit.CheckJSONObject(body); err != nil {
		return nil, badJSON(err)
	}
	return body, nil
}

// badJSON reports what CheckJSONObject found.
func badJSON(err error) *httpkit.Problem {
	p := &httpkit.Problem{
		Status: http.StatusBadRequest, Code: codeBadJSON, Detail: err.Error(),
		Hint: "send one JSON object, UTF-8, no key twice",
	}
	if je, ok := errors.AsType[*httpkit.JSONError](err); ok {
		p.Errors = []httpkit.FieldError{{Code: je.Code, Detail: err.Error()}}
	}
	return p
}

// trusted is how long a body may claim to be and have its memory at once. More
// is taken as it comes: a client could claim much and send nothing.
const trusted = 64 << 10

// readAll is io.ReadAll with the buffer made at once where the length is known.
func readAll(r io.Reader, length int64) ([]byte, error) {
	if length < 0 || length > trusted {
		return io.ReadAll(r)
	}
	body := make([]byte, length)
	n, err := io.ReadFull(r, body)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, err
	}
	if int64(n) < length {
		return nil, io.ErrUnexpectedEOF
	}
	// net/http watches for a client that goes away only after the end of the body was seen.
	_, _ = r.Read(make([]byte, 1))
	return body, nil
}

const jsonType = "application/json"

// yamlTypes are the names that YAML goes by (RFC 9512 and what was used before).
var yamlTypes = map[string]bool{"application/yaml": true, "application/x-yaml": true, "text/yaml": true, "text/x-yaml": true}

// mediaType returns the only Content-Type, without its charset; empty where there
// is none, more than one, or a charset that is not UTF-8.
func mediaType(values []string) string {
	if len(values) != 1 {
		return ""
	}
	if values[0] == jsonType {
		return jsonType
	}
	media, params, err := mime.ParseMediaType(values[0])
	if err != nil {
		return ""
	}
	if charset, ok := params["charset"]; ok && !strings.EqualFold(charset, "utf-8") {
		return ""
	}
	return media
}

// fromYAML turns a body into JSON. Few at once: it takes much more memory than
// the body has.
func (s *Service) fromYAML(ctx context.Context, body []byte) ([]byte, *httpkit.Problem) {
	wait := time.NewTimer(batchWait)
	defer wait.Stop()
	select {
	case s.yamls <- struct{}{}:
		defer func() { <-s.yamls }()
	case <-ctx.Done():
		return nil, s.problemOf(ctx, ctx.Err())
	case <-wait.C:
		return nil, &httpkit.Problem{
			Status: http.StatusServiceUnavailable, Code: codeBusy, Detail: "too many YAML documents are being read",
			Hint: "try again, or send JSON; nothing was changed", RetryAfter: batchWait,
		}
	}
	data, err := yamljson.Convert(body)
	if err == nil {
		return data, nil
	}
	p := &httpkit.Problem{
		Status: http.StatusBadRequest, Code: codeBadYAML, Detail: err.Error(),
		Hint: "send one YAML mapping without anchors and tags; quote what is to be a string",
	}
	if ye, ok := errors.AsType[*yamljson.Error](err); ok {
		p.Errors = []httpkit.FieldError{{Code: ye.Code, Detail: err.Error()}}
	}
	return nil, p
}

func badKey() *httpkit.Problem {
	return &httpkit.Problem{
		Status: http.StatusBadRequest, Code: codeBadKey, Detail: "Idempotency-Key must be 1 to 255 visible ASCII characters, once",
	}
}

func unauthorized() *httpkit.Problem {
	return &httpkit.Problem{
		Status: http.StatusUnauthorized, Code: codeUnauthorized, Detail: "a valid token is needed",
		Hint: "send Authorization: Bearer with a token from: cmdexec token user",
	}
}

func unsupportedMedia(yaml bool) *httpkit.Problem {
	p := &httpkit.Problem{
		Status: http.StatusUnsupportedMediaType, Code: "unsupported_media_type", Detail: "the body must be JSON",
		Hint: "send Content-Type: application/json",
	}
	if yaml {
		p.Detail, p.Hint = "the body must be JSON or YAML", "send Content-Type: application/json or application/yaml"
	}
	return p
}

func tooLarge(limit int64) *httpkit.Problem {
	return &httpkit.Problem{
		Status: http.StatusRequestEntityTooLarge, Code: "body_too_large", Detail: fmt.Sprintf("the body has more than %d KiB", limit>>10),
		Errors: []httpkit.FieldError{{Code: job.CodeTooLong}},
	}
}
