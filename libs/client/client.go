package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"mime"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/api"
)

// Defaults of Options.
const (
	DefaultTimeout   = 30 * time.Second
	DefaultTries     = 4
	DefaultResumeFor = 5 * time.Minute
)

// Options tunes a Client. The zero value is good.
type Options struct {
	// HTTP makes the requests; nil is a client of its own. It must have no overall
	// timeout: followed output and waiting calls last as long as their jobs.
	// Redirects are never followed, so that the token goes nowhere else.
	HTTP *http.Client
	// Token, if not nil, is asked for the token before each request, in place of
	// the one given to New: tokens are renewed while a program runs.
	Token func() string
	// Timeout bounds each try of a call that neither waits nor streams. DefaultTimeout if zero.
	Timeout time.Duration
	// Tries is how often a call that may be repeated is tried in all. DefaultTries if zero.
	Tries int
	// ResumeFor is how long a broken stream is tried to be resumed before that is
	// given up. DefaultResumeFor if zero.
	ResumeFor time.Duration
	UserAgent string // "cmdexec-client" if empty
}

// Client speaks to one server as one user.
type Client struct {
	base  *url.URL
	token string
	o     Options
	http  *http.Client
}

// New returns a client of the server at an http or https URL.
func New(server, token string, o Options) (*Client, error) {
	base, err := url.Parse(server)
	if err != nil || base.Host == "" || base.Scheme != "http" && base.Scheme != "https" {
		return nil, errors.New("the server must be a URL such as http://127.0.0.1:3000")
	}
	if base.User != nil || base.RawQuery != "" || base.Fragment != "" {
		return nil, errors.New("the server's URL must have no user, query or fragment")
	}
	base.Path = strings.TrimRight(base.Path, "/")
	c := &Client{base: base, token: token, o: o, http: o.HTTP}
	if c.http == nil {
		t := http.DefaultTransport.(*http.Transport).Clone()
		t.MaxIdleConnsPerHost = 64
		c.http = &http.Client{Transport: t}
	}
	plain := *c.http
	plain.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	c.http = &plain
	setDefault(&c.o.Timeout, DefaultTimeout)
	setDefault(&c.o.Tries, DefaultTries)
	setDefault(&c.o.ResumeFor, DefaultResumeFor)
	if c.o.UserAgent == "" {
		c.o.UserAgent = "cmdexec-client"
	}
	return c, nil
}

func setDefault[T ~int | ~int64](v *T, def T) {
	if *v <= 0 {
		*v = def
	}
}

// Close drops idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Error is an answer that is not a success.
type Error struct {
	Problem    api.Problem
	RetryAfter time.Duration // what the server asked to wait; zero if it did not say
}

// Error is one line for a person.
func (e *Error) Error() string {
	text := e.Problem.Detail
	if text == "" {
		text = e.Problem.Title
	}
	for _, f := range e.Problem.Errors {
		if f.Field != "" || f.Detail != "" {
			text += "; " + strings.TrimPrefix(f.Field+": "+f.Detail, ": ")
		}
	}
	if e.Problem.Code == "" {
		return fmt.Sprintf("the server answered %d: %s", e.Problem.Status, text)
	}
	return fmt.Sprintf("%s (%s)", text, e.Problem.Code)
}

// Code returns the problem's code of an error of this package, "" for others.
func Code(err error) string {
	var e *Error
	if errors.As(err, &e) {
		return e.Problem.Code
	}
	return ""
}

// passing reports whether the same request may succeed later.
func (e *Error) passing() bool {
	switch e.Problem.Status {
	case http.StatusTooManyRequests, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return true
	default:
		return false
	}
}

// request describes one call.
type request struct {
	method, path string
	query        url.Values
	header       http.Header
	body         any    // sent as JSON; raw if media is set
	media        string // of a body that is bytes already
	repeat       bool   // harmless to send again
	waits        bool   // may take long
}

// call makes a request and reads the JSON answer into out. It returns the
// answer's status and header.
func (c *Client) call(ctx context.Context, rq request, out any) (int, http.Header, error) {
	payload, err := encode(rq.body)
	if err != nil {
		return 0, nil, err
	}
	tries := 1
	if rq.repeat {
		tries = c.o.Tries
	}
	for try := 1; ; try++ {
		status, header, err := c.once(ctx, rq, payload, out)
		if err == nil || try >= tries || !passing(err) || ctx.Err() != nil {
			return status, header, err
		}
		if sleep(ctx, pause(try, err)) != nil {
			return status, header, err
		}
	}
}

func (c *Client) once(ctx context.Context, rq request, payload []byte, out any) (int, http.Header, error) {
	if !rq.waits {
		bound, cancel := context.WithTimeout(ctx, c.o.Timeout)
		defer cancel()
		ctx = bound
	}
	resp, err := c.send(ctx, rq, payload)
	if err != nil {
		return 0, nil, err
	}
	defer drain(resp.Body)
	if err := json.NewDecoder(resp.Body).Decode(out); err != nil {
		return resp.StatusCode, resp.Header, &transportError{fmt.Errorf("read the answer: %w", err)}
	}
	return resp.StatusCode, resp.Header, nil
}

// transportError is a failure between client and server.
type transportError struct{ err error }

func (e *transportError) Error() string { return e.err.Error() }
func (e *transportError) Unwrap() error { return e.err }

// send returns the response of a success; the caller closes its body.
func (c *Client) send(ctx context.Context, rq request, payload []byte) (*http.Response, error) {
	u := *c.base
	u.Path += rq.path
	u.RawQuery = rq.query.Encode()
	var body io.Reader
	if payload != nil {
		body = bytes.NewReader(payload)
	}
	r, err := http.NewRequestWithContext(ctx, rq.method, u.String(), body)
	if err != nil {
		return nil, fmt.Errorf("make request: %w", err)
	}
	for k, v := range rq.header {
		r.Header[k] = v
	}
	switch {
	case rq.media != "":
		r.Header.Set("Content-Type", rq.media)
	case payload != nil:
		r.Header.Set("Content-Type", "application/json")
	}
	token := c.token
	if c.o.Token != nil {
		token = c.o.Token()
	}
	if token != "" {
		r.Header.Set("Authorization", "Bearer "+token)
	}
	r.Header.Set("User-Agent", c.o.UserAgent)
	resp, err := c.http.Do(r)
	if err != nil {
		return nil, &transportError{fmt.Errorf("reach %s: %w", c.base.Host, unwrapURL(err))}
	}
	if resp.StatusCode/100 == 2 {
		return resp, nil
	}
	defer drain(resp.Body)
	return nil, failure(resp)
}

// unwrapURL drops the method and URL that net/http puts in front of its errors.
func unwrapURL(err error) error {
	var ue *url.Error
	if errors.As(err, &ue) {
		return ue.Err
	}
	return err
}

func failure(resp *http.Response) *Error {
	e := &Error{}
	if media, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type")); media == "application/problem+json" {
		_ = json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&e.Problem) // what cannot be read stays empty
	}
	e.Problem.Status = resp.StatusCode
	if e.Problem.Title == "" {
		e.Problem.Title = http.StatusText(resp.StatusCode)
	}
	if s, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && s > 0 {
		e.RetryAfter = time.Duration(min(s, 3600)) * time.Second
	}
	return e
}

func drain(body io.ReadCloser) {
	_, _ = io.CopyN(io.Discard, body, 64<<10) // so that the connection can be used again
	_ = body.Close()
}

func encode(body any) ([]byte, error) {
	switch body := body.(type) {
	case nil:
		return nil, nil
	case []byte:
		return body, nil
	}
	data, err := json.Marshal(body)
	if err != nil {
		return nil, fmt.Errorf("encode request: %w", err)
	}
	return data, nil
}

func passing(err error) bool {
	var e *Error
	if errors.As(err, &e) {
		return e.passing()
	}
	var t *transportError
	return errors.As(err, &t)
}

// pause grows with the number of tries, with jitter, and is never shorter than
// what the server asked for.
func pause(try int, err error) time.Duration {
	ceiling := 100 * time.Millisecond << min(try-1, 6)
	d := ceiling/2 + rand.N(ceiling/2)
	var e *Error
	if errors.As(err, &e) {
		d = max(d, min(e.RetryAfter, 30*time.Second))
	}
	return d
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
