// Package httpkit is what the project's HTTP servers share: problem documents, middlewares, strict JSON, credentials from headers, the server
// with its timeouts, and the admin endpoints. It knows no route and no domain.
//
// Order of the middlewares, outermost first: RequestID, AccessLog, Recover, SecurityHeaders, then what a route needs.
package httpkit

import (
	"encoding/json"
	"net/http"
	"strconv"
	"time"
)

// Problem is an error response (RFC 9457). It never contains what the client has sent. A *Problem is also an error with a status, which is
// what huma asks of one.
type Problem struct {
	Type      string       `json:"type"`
	Title     string       `json:"title"`
	Status    int          `json:"status"`
	Code      string       `json:"code"`             // stable, snake case; programs decide by it
	Detail    string       `json:"detail,omitempty"` // what is wrong, for a person
	Hint      string       `json:"hint,omitempty"`   // what to do about it
	Instance  string       `json:"instance,omitempty"`
	RequestID string       `json:"requestId,omitempty"`
	Errors    []FieldError `json:"errors,omitempty"`
	JobID     string       `json:"jobId,omitempty"`

	RetryAfter time.Duration `json:"-"` // sent as the Retry-After header, in seconds rounded up
}

// FieldError says what is wrong with one field of the request.
type FieldError struct {
	Field  string `json:"field"`
	Code   string `json:"code"`
	Detail string `json:"detail,omitempty"`
}

// ProblemContentType is the media type of a Problem.
const ProblemContentType = "application/problem+json"

// Error returns the code and the detail.
func (p *Problem) Error() string {
	if p.Detail == "" {
		return p.Code
	}
	return p.Code + ": " + p.Detail
}

// GetStatus returns the HTTP status.
func (p *Problem) GetStatus() int { return p.Status }

// ContentType returns ProblemContentType, whatever was negotiated.
func (p *Problem) ContentType(string) string { return ProblemContentType }

// Fill completes what can be derived: type, title, request id and instance. The instance is made of the request id, not of the path, which
// the client has sent. It returns p.
func (p *Problem) Fill(requestID string) *Problem {
	if p.Status == 0 {
		p.Status = http.StatusInternalServerError
	}
	if p.Type == "" {
		p.Type = "about:blank"
	}
	if p.Title == "" {
		p.Title = http.StatusText(p.Status)
	}
	if p.Code == "" {
		p.Code = "error"
	}
	if p.RequestID == "" {
		p.RequestID = requestID
	}
	if p.Instance == "" && p.RequestID != "" {
		p.Instance = "urn:request:" + p.RequestID
	}
	return p
}

// Write sends p, after completing it with Fill. It also sets WWW-Authenticate for a 401 and Retry-After where p has one.
func Write(w http.ResponseWriter, r *http.Request, p Problem) {
	id := RequestIDFrom(r.Context())
	if id == "" {
		id = w.Header().Get(requestIDHeader) // the middleware ran inside the caller
	}
	p.Fill(id)
	body, err := json.Marshal(&p)
	if err != nil { // only strings and ints in there
		panic(err)
	}
	h := w.Header()
	h.Set("Content-Type", ProblemContentType)
	h.Set("Content-Length", strconv.Itoa(len(body)+1))
	h.Del("Content-Encoding")
	h.Del("Etag")
	if p.Status == http.StatusUnauthorized && h.Get("WWW-Authenticate") == "" {
		h.Set("WWW-Authenticate", "Bearer")
	}
	if p.RetryAfter > 0 {
		h.Set("Retry-After", strconv.FormatInt(int64((p.RetryAfter+time.Second-1)/time.Second), 10))
	}
	w.WriteHeader(p.Status)
	_, _ = w.Write(append(body, '\n')) // the client may be gone
}
