package httpkit

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

const patience = 20 * time.Second

func within[T any](t *testing.T, ch <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(patience):
		t.Fatalf("waited too long for %s", what)
		panic("unreachable")
	}
}

// serve runs a server and returns its base URL, a client, and a function that stops it and returns Run's error.
func serve(t *testing.T, h http.Handler, opts ServerOptions) (url string, client *http.Client, stop func() error) {
	t.Helper()
	ln, err := Listen("127.0.0.1:0")
	require.NoError(t, err)
	s, err := NewServer(ln, h, discard(), opts)
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	stopped := false
	stop = func() error {
		if stopped {
			return nil
		}
		stopped = true
		cancel()
		return within(t, done, "Run to return")
	}
	client = &http.Client{Transport: &http.Transport{}, Timeout: patience}
	t.Cleanup(func() {
		client.CloseIdleConnections()
		require.NoError(t, stop())
	})
	return "http://" + s.Addr().String(), client, stop
}

func TestListenErrorIsOneClearLine(t *testing.T) {
	ln, err := Listen("127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	_, err = Listen(ln.Addr().String())
	require.EqualError(t, err, "cannot listen on "+ln.Addr().String()+
		": the address is in use by another program; stop that program or choose another address")
	for _, addr := range []string{"127.0.0.1:99999", "nonsense", "203.0.113.7:0"} {
		_, err = Listen(addr)
		require.ErrorContains(t, err, "cannot listen on "+addr+": ")
		require.NotContains(t, err.Error(), "\n")
	}
}

func TestServerLetsRunningRequestsFinish(t *testing.T) {
	started, release := make(chan struct{}), make(chan struct{})
	url, client, stop := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		close(started)
		<-Stopping(r.Context())
		<-release
		require.NoError(t, r.Context().Err(), "the request's context lives on while it may finish")
		_, _ = io.WriteString(w, "done")
	}), ServerOptions{})

	body := make(chan string, 1)
	go func() {
		resp, err := client.Get(url)
		if err != nil {
			body <- err.Error()
			return
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		body <- string(b)
	}()
	within(t, started, "the request")
	stopped := make(chan error, 1)
	go func() { stopped <- stop() }()
	require.Eventually(t, func() bool {
		c, err := net.Dial("tcp", strings.TrimPrefix(url, "http://"))
		if err == nil {
			c.Close()
		}
		return err != nil
	}, patience, time.Millisecond, "no new connections")
	close(release)
	require.Equal(t, "done", within(t, body, "the response"))
	require.NoError(t, within(t, stopped, "the stop"))
}

func TestServerCutsOffWhatDoesNotFinish(t *testing.T) {
	started, ended := make(chan struct{}), make(chan error, 1)
	url, client, stop := serve(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		close(started)
		<-r.Context().Done()
		ended <- context.Cause(r.Context())
	}), ServerOptions{ShutdownTimeout: 50 * time.Millisecond})
	failed := make(chan error, 1)
	go func() {
		resp, err := client.Get(url)
		if err == nil {
			resp.Body.Close()
		}
		failed <- err
	}()
	within(t, started, "the request")
	require.NoError(t, stop())
	require.Error(t, within(t, ended, "the handler's context"))
	require.Error(t, within(t, failed, "the client"), "never a false 200")
}

// The timeouts end a handler's context, which is why LongLived exists.
func TestLongLivedOutlivesTheTimeouts(t *testing.T) {
	const short = 100 * time.Millisecond
	url, client, _ := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/long" {
			require.NoError(t, LongLived(w))
		}
		timer := time.NewTimer(5 * short)
		defer timer.Stop()
		select {
		case <-timer.C:
			_, _ = io.WriteString(w, "late")
		case <-r.Context().Done():
		}
	}), ServerOptions{ReadTimeout: short, WriteTimeout: short})

	for path, want := range map[string]string{"/long": "late", "/short": ""} {
		got := ""
		if resp, err := client.Get(url + path); err == nil {
			b, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			got = string(b)
		}
		require.Equal(t, want, got, path)
	}
}

func TestLongLivedReachesThroughTheMiddlewares(t *testing.T) {
	logger := discard()
	h := RequestID(AccessLog(logger)(Recover(logger, nil)(SecurityHeaders(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		require.NoError(t, LongLived(w))
		_, _ = io.WriteString(w, "first")
		require.NoError(t, http.NewResponseController(w).Flush())
		w.(http.Flusher).Flush()
	})))))
	url, client, _ := serve(t, h, ServerOptions{})
	resp, err := client.Get(url)
	require.NoError(t, err)
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	require.Equal(t, "first", string(b))
}

func TestSlowBodyIs408(t *testing.T) {
	url, _, _ := serve(t, StrictJSON(100)(http.NotFoundHandler()), ServerOptions{ReadTimeout: 100 * time.Millisecond})
	conn, err := net.Dial("tcp", strings.TrimPrefix(url, "http://"))
	require.NoError(t, err)
	defer conn.Close()
	_, err = io.WriteString(conn, "POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{")
	require.NoError(t, err)
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	require.NoError(t, err)
	defer resp.Body.Close()
	require.Equal(t, http.StatusRequestTimeout, resp.StatusCode)
}

func TestTooLargeBodyGetsItsAnswer(t *testing.T) {
	url, client, _ := serve(t, StrictJSON(100)(http.NotFoundHandler()), ServerOptions{})
	for _, body := range []io.Reader{
		strings.NewReader(strings.Repeat("x", 8<<20)), struct{ io.Reader }{strings.NewReader(strings.Repeat("x", 8<<20))},
	} {
		resp, err := client.Post(url, "application/json", body)
		require.NoError(t, err, "the answer must not be lost to a reset")
		resp.Body.Close()
		require.Equal(t, http.StatusRequestEntityTooLarge, resp.StatusCode)
	}
}

func TestHeaderLimits(t *testing.T) {
	url, client, _ := serve(t, http.NotFoundHandler(), ServerOptions{})
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	require.NoError(t, err)
	req.Header.Set("X-Big", strings.Repeat("x", 100<<10))
	resp, err := client.Do(req)
	require.NoError(t, err)
	resp.Body.Close()
	require.Equal(t, http.StatusRequestHeaderFieldsTooLarge, resp.StatusCode)
}

func TestMaxConnsMakesFurtherClientsWait(t *testing.T) {
	release := make(chan struct{})
	var running atomic.Int32
	url, client, _ := serve(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		running.Add(1)
		<-release
	}), ServerOptions{MaxConns: 2})
	client.Transport.(*http.Transport).DisableKeepAlives = true
	const clients = 5
	done := make(chan error, clients)
	for range clients {
		go func() {
			resp, err := client.Get(url)
			if err == nil {
				resp.Body.Close()
			}
			done <- err
		}()
	}
	require.Eventually(t, func() bool { return running.Load() == 2 }, patience, time.Millisecond)
	require.Never(t, func() bool { return running.Load() > 2 }, 50*time.Millisecond, 5*time.Millisecond)
	close(release)
	for range clients {
		require.NoError(t, within(t, done, "a client"))
	}
}

func TestRunFailsWhenTheListenerBreaks(t *testing.T) {
	ln, err := Listen("127.0.0.1:0")
	require.NoError(t, err)
	s, err := NewServer(ln, http.NotFoundHandler(), discard(), ServerOptions{})
	require.NoError(t, err)
	require.NoError(t, ln.Close())
	require.ErrorContains(t, s.Run(t.Context()), "serve on "+ln.Addr().String())
}

func TestCloseReleasesTheAddress(t *testing.T) {
	ln, err := Listen("127.0.0.1:0")
	require.NoError(t, err)
	s, err := NewServer(ln, http.NotFoundHandler(), discard(), ServerOptions{})
	require.NoError(t, err)
	require.NoError(t, s.Close())
	again, err := Listen(ln.Addr().String())
	require.NoError(t, err)
	require.NoError(t, again.Close())
}

func TestRunAfterTheContextEnded(t *testing.T) {
	ln, err := Listen("127.0.0.1:0")
	require.NoError(t, err)
	s, err := NewServer(ln, http.NotFoundHandler(), discard(), ServerOptions{})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	require.NoError(t, s.Run(ctx))
	_, err = ln.Accept()
	require.ErrorIs(t, err, net.ErrClosed)
}

func TestTLS(t *testing.T) {
	dir := t.TempDir()
	certFile, keyFile, pool := certificate(t, dir)
	ln, err := Listen("127.0.0.1:0")
	require.NoError(t, err)
	for _, opts := range []ServerOptions{
		{CertFile: certFile}, {KeyFile: keyFile}, {CertFile: certFile, KeyFile: filepath.Join(dir, "none")}, {CertFile: keyFile, KeyFile: certFile},
	} {
		_, err := NewServer(ln, http.NotFoundHandler(), discard(), opts)
		require.Error(t, err)
	}
	require.NoError(t, ln.Close())

	url, _, _ := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, r.Proto)
	}), ServerOptions{CertFile: certFile, KeyFile: keyFile})
	url = strings.Replace(url, "http:", "https:", 1)
	get := func(h2 bool, maxVersion uint16) (string, error) {
		transport := &http.Transport{ForceAttemptHTTP2: h2, TLSClientConfig: &tls.Config{RootCAs: pool, MaxVersion: maxVersion}}
		defer transport.CloseIdleConnections()
		resp, err := (&http.Client{Transport: transport, Timeout: patience}).Get(url)
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		return string(b), err
	}
	for h2, want := range map[bool]string{true: "HTTP/2.0", false: "HTTP/1.1"} {
		got, err := get(h2, 0)
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	_, err = get(false, tls.VersionTLS11)
	require.Error(t, err, "TLS 1.1 is refused")
}

func certificate(t *testing.T, dir string) (certFile, keyFile string, pool *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	require.NoError(t, err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(t, err)
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	certFile, keyFile = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	require.NoError(t, os.WriteFile(certFile, certPEM, 0o600))
	require.NoError(t, os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600))
	pool = x509.NewCertPool()
	require.True(t, pool.AppendCertsFromPEM(certPEM))
	return certFile, keyFile, pool
}
