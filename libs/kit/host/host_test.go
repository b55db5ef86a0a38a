package host

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type settings struct {
	Settings
	Colour string `envconfig:"COLOUR" default:"green" desc:"of the test"`
}

type service struct{ missing error }

func (s service) Ready() error { return s.missing }

func (s service) Run(ctx context.Context) error {
	<-ctx.Done()
	return nil
}

func freeAddr(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer func() { require.NoError(t, ln.Close()) }()
	return ln.Addr().String()
}

func get(t *testing.T, addr, path string) (int, string) {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get("http://" + addr + path)
	if err != nil {
		return 0, ""
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return resp.StatusCode, string(text)
}

// Readiness says what is missing from the first moment on, and the process stops
// cleanly while it waits.
// nobody is a store of rate limits that is away.
type nobody struct{}

func (nobody) Spend(context.Context, []string, []time.Duration, []time.Duration) ([]time.Duration, time.Duration, error) {
	return nil, 0, errors.New("nobody is there")
}

func TestReadinessFromTheFirstMoment(t *testing.T) {
	addr := freeAddr(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	arrived := make(chan struct{})
	closed := make(chan string, 2)
	build := func(ctx context.Context, _ settings, env *Env) (Service, error) {
		env.Waiting("the moon")
		env.Defer(func() { closed <- "first" })
		env.Inform(func() string { return "" })
		if _, err := env.ShareLimits(nobody{}); err != nil {
			return nil, err
		}
		env.Defer(func() { closed <- "second" })
		select {
		case <-arrived:
			return service{}, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	done := make(chan error, 1)
	go func() {
		done <- serve(ctx, "test", settings{}, &Settings{AdminAddr: addr, LogLevel: "error", LogFormat: "json"}, build)
	}()
	status := func(want int, text string) {
		t.Helper()
		require.Eventually(t, func() bool {
			code, body := get(t, addr, "/readyz")
			return code == want && strings.Contains(body, text)
		}, 10*time.Second, 5*time.Millisecond)
	}
	status(http.StatusServiceUnavailable, "waiting for the moon")
	status(http.StatusServiceUnavailable, "note: rate limits: the shared store does not answer")
	require.ErrorContains(t, healthcheck(addr), "the moon")
	if code, _ := get(t, addr, "/livez"); code != http.StatusOK {
		t.Errorf("/livez answers %d while the process waits", code)
	}
	close(arrived)
	status(http.StatusOK, "note: rate limits")
	require.NoError(t, healthcheck(addr))
	cancel()
	require.NoError(t, <-done)
	require.Equal(t, []string{"second", "first"}, []string{<-closed, <-closed})
	require.ErrorContains(t, healthcheck(addr), "not running")
}

func TestStopsWhileItWaits(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	build := func(ctx context.Context, _ settings, _ *Env) (Service, error) {
		cancel()
		<-ctx.Done()
		return nil, ctx.Err()
	}
	require.NoError(t, serve(ctx, "test", settings{}, &Settings{AdminAddr: off}, build))
}

func TestErrorsAreNamed(t *testing.T) {
	build := func(context.Context, settings, *Env) (Service, error) { return nil, errors.New("no such database") }
	err := serve(t.Context(), "test", settings{}, &Settings{AdminAddr: off}, build)
	require.ErrorContains(t, err, "no such database")
	err = serve(t.Context(), "test", settings{}, &Settings{AdminAddr: "300.1.1.1:1"}, build)
	require.ErrorContains(t, err, "ADMIN_ADDR")
}

func TestWords(t *testing.T) {
	never := func(context.Context, settings, *Env) (Service, error) { return nil, errors.New("built") }
	exit := func(int) { t.Error("exit was called") }
	var out bytes.Buffer
	require.NoError(t, run("test", "127.0.0.1:9", []string{"help"}, &out, exit, never))
	for _, want := range []string{"COLOUR", "green", "of the test", "ADMIN_ADDR", "127.0.0.1:9"} {
		require.Contains(t, out.String(), want)
	}
	require.ErrorContains(t, run("test", "off", []string{"healthcheck"}, &out, exit, never), "ADMIN_ADDR is off")
	require.ErrorContains(t, run("test", freeAddr(t), []string{"healthcheck"}, &out, exit, never), "not running")
	require.ErrorContains(t, run("test", "off", []string{"dance"}, &out, exit, never), "unknown word")
}
