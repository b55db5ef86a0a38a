package docker

import (
	"bufio"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/docker/docker/client"
	"github.com/docker/go-connections/sockets"
)

// Bounds of what is read from the engine, which is trusted to isolate but not
// to be sane.
const (
	maxHeader = 64 << 10
	maxAnswer = 16 << 20
	maxPull   = 256 << 20 // the progress of one pull, which is thrown away
	maxConfig = 1 << 20   // a file of the owner's Docker configuration
)

// wire is the way to one engine: typed calls through api, and raw connections
// where the client library can neither bound nor time out what it does.
type wire struct {
	host string
	api  *client.Client
	http *http.Transport
	dial func(context.Context) (net.Conn, error)
}

func newWire(opts *Options) (*wire, error) {
	host := opts.Host
	if host == "" {
		var err error
		if host, err = contextHost(opts.ConfigDir); err != nil {
			return nil, err
		}
	}
	if host == "" {
		host = DefaultHost
	}
	where, err := client.ParseHostURL(host)
	if err != nil {
		return nil, fmt.Errorf("engine address %q is not of the form unix:///path or tcp://host:port", host)
	}
	secure, err := clientTLS(opts.CertDir, where)
	if err != nil {
		return nil, err
	}
	w := &wire{host: host, http: &http.Transport{
		DisableCompression:     true,
		MaxIdleConns:           64,
		MaxIdleConnsPerHost:    64,
		IdleConnTimeout:        30 * time.Second,
		MaxResponseHeaderBytes: maxHeader,
	}}
	if w.dial, err = dialer(where, secure); err != nil {
		return nil, err
	}
	w.http.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) { return w.dial(ctx) }
	// TLS, where there is any, is in dial; hence always plain HTTP above it.
	w.api, err = client.NewClientWithOpts(
		client.WithHost(host),
		client.WithHTTPClient(&http.Client{Transport: bounded{w.http}, CheckRedirect: client.CheckRedirect}),
		client.WithScheme("http"),
		client.WithAPIVersionNegotiation(),
	)
	if err != nil {
		return nil, fmt.Errorf("engine address %q: %w", host, err)
	}
	return w, nil
}

func dialer(where *url.URL, secure *tls.Config) (func(context.Context) (net.Conn, error), error) {
	d := &net.Dialer{Timeout: 10 * time.Second}
	switch where.Scheme {
	case "unix":
		return func(ctx context.Context) (net.Conn, error) { return d.DialContext(ctx, "unix", where.Host) }, nil
	case "tcp":
		if secure == nil {
			return func(ctx context.Context) (net.Conn, error) { return d.DialContext(ctx, "tcp", where.Host) }, nil
		}
		s := &tls.Dialer{NetDialer: d, Config: secure}
		return func(ctx context.Context) (net.Conn, error) { return s.DialContext(ctx, "tcp", where.Host) }, nil
	case "npipe":
		var t http.Transport
		if err := sockets.ConfigureTransport(&t, where.Scheme, where.Host); err != nil {
			return nil, fmt.Errorf("engine address: %w", err)
		}
		return func(ctx context.Context) (net.Conn, error) { return t.DialContext(ctx, "", "") }, nil
	}
	return nil, fmt.Errorf("engine address %s://...: only unix://, tcp:// and npipe:// are supported", where.Scheme)
}

func clientTLS(dir string, where *url.URL) (*tls.Config, error) {
	if dir == "" || where.Scheme != "tcp" {
		return nil, nil
	}
	ca, err := readConfig(filepath.Join(dir, "ca.pem"))
	if err != nil {
		return nil, fmt.Errorf("engine certificates: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		return nil, errors.New("engine certificates: ca.pem holds no certificate")
	}
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem"))
	if err != nil {
		return nil, fmt.Errorf("engine certificates: %w", err)
	}
	name, _, err := net.SplitHostPort(where.Host)
	if err != nil {
		return nil, fmt.Errorf("engine address: %w", err)
	}
	return &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}, ServerName: name, MinVersion: tls.VersionTLS12}, nil
}

// contextHost is the engine of the owner's current Docker context: this is how
// Docker Desktop says where its engine is.
func contextHost(dir string) (string, error) {
	if dir == "" {
		return "", nil
	}
	var config struct {
		CurrentContext string `json:"currentContext"`
	}
	if err := readConfigJSON(filepath.Join(dir, "config.json"), &config); err != nil {
		return "", err
	}
	if config.CurrentContext == "" || config.CurrentContext == "default" {
		return "", nil
	}
	sum := sha256.Sum256([]byte(config.CurrentContext))
	var meta struct {
		Endpoints struct {
			Docker struct{ Host string } `json:"docker"`
		}
	}
	file := filepath.Join(dir, "contexts", "meta", hex.EncodeToString(sum[:]), "meta.json")
	if err := readConfigJSON(file, &meta); err != nil {
		return "", err
	}
	return meta.Endpoints.Docker.Host, nil
}

// readConfigJSON reads a file of the owner's Docker configuration. One that
// does not exist is like an empty one.
func readConfigJSON(file string, into any) error {
	data, err := readConfig(file)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("docker configuration: %w", err)
	}
	if err := json.Unmarshal(data, into); err != nil {
		// The text of a JSON error could quote a credential.
		return fmt.Errorf("docker configuration: %s is not valid JSON", file)
	}
	return nil
}

func readConfig(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxConfig+1))
	if err == nil && len(data) > maxConfig {
		return nil, fmt.Errorf("%s is too large", file)
	}
	return data, err
}

// bounded limits the size of every answer.
type bounded struct{ next http.RoundTripper }

func (b bounded) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := b.next.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	left := int64(maxAnswer)
	if strings.HasSuffix(req.URL.Path, "/images/create") {
		left = maxPull
	}
	resp.Body = &boundedBody{resp.Body, left}
	return resp, nil
}

var errTooLong = errors.New("the container engine sent more than is sane")

type boundedBody struct {
	io.ReadCloser
	left int64
}

func (b *boundedBody) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, errTooLong
	}
	n, err := b.ReadCloser.Read(p[:min(int64(len(p)), b.left)])
	b.left -= int64(n)
	return n, err
}

// stream is a connection that was taken over from HTTP.
type stream struct {
	net.Conn
	r *bufio.Reader // holds what came together with the HTTP header
}

func (s *stream) Read(p []byte) (int, error) { return s.r.Read(p) }

// CloseWrite tells the other side that nothing more comes.
func (s *stream) CloseWrite() error {
	if c, ok := s.Conn.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite()
	}
	return errors.New("this connection cannot be closed for writing alone")
}

// open sends a request without a body and reads the header of its answer, all
// before ctx ends, and returns the connection. The library's own way to do this
// heeds no context once connected.
func (w *wire) open(ctx context.Context, method, path string, query url.Values, header http.Header) (*stream, *http.Response, error) {
	conn, err := w.dial(ctx)
	if err != nil {
		return nil, nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	fail := func(err error) (*stream, *http.Response, error) {
		stop()
		_ = conn.Close()
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, nil, err
	}
	target := &url.URL{Path: "/v" + w.api.ClientVersion() + path, RawQuery: query.Encode()}
	var head strings.Builder
	fmt.Fprintf(&head, "%s %s HTTP/1.1\r\nHost: %s\r\n", method, target.RequestURI(), client.DummyHost)
	if err := header.Write(&head); err != nil {
		return fail(err)
	}
	head.WriteString("\r\n")
	if _, err := io.WriteString(conn, head.String()); err != nil {
		return fail(err)
	}
	limited := &io.LimitedReader{R: conn, N: maxHeader}
	r := bufio.NewReader(limited)
	// The method matters only for answers to HEAD.
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		return fail(fmt.Errorf("read the engine's answer: %w", err))
	}
	if !stop() {
		return fail(ctx.Err())
	}
	limited.N = 1<<63 - 1
	return &stream{conn, r}, resp, nil
}

// refusal makes an error of an answer that was not what was hoped for, and
// closes the connection.
func refusal(s *stream, resp *http.Response) error {
	_ = s.SetDeadline(time.Now().Add(time.Second))
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
	_ = s.Close()
	var body struct{ Message string }
	if json.Unmarshal(text, &body) != nil {
		body.Message = string(text)
	}
	return fmt.Errorf("the engine answered %d: %s", resp.StatusCode, oneLine(body.Message))
}

// attach connects to the streams of a container that has not been started yet.
func (w *wire) attach(ctx context.Context, id string, stdin bool) (*stream, error) {
	q := url.Values{"stream": {"1"}, "stdout": {"1"}, "stderr": {"1"}}
	if stdin {
		q.Set("stdin", "1")
	}
	s, resp, err := w.open(ctx, http.MethodPost, "/containers/"+id+"/attach", q, http.Header{
		"Connection": {"Upgrade"}, "Upgrade": {"tcp"}, "Content-Length": {"0"}, "Content-Type": {"text/plain"},
	})
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		return nil, refusal(s, resp)
	}
	return s, nil
}

// oneLine makes a text of the engine fit for a reason: one line of at most 300
// bytes, without control characters.
func oneLine(s string) string {
	s = strings.Join(strings.FieldsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f }), " ")
	s = strings.ToValidUTF8(strings.TrimSpace(s), "?")
	const most = 300
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "..."
	}
	return s
}
