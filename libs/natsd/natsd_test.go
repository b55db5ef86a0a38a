package natsd_test

import (
	"bufio"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/cmdexec/cmdexec/libs/natsd"
	"github.com/cmdexec/cmdexec/libs/natsd/natsdtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestServer(t *testing.T) {
	dir := t.TempDir()
	s := natsdtest.StartIn(t, dir)
	require.Equal(t, "committed", s.Durability())
	require.Empty(t, s.ClientURL(), "no port is open")
	require.NotEmpty(t, s.Version())
	require.Positive(t, s.MaxStore())
	first := s.ID()

	conn, err := s.InProcessConn()
	require.NoError(t, err)
	line, err := bufio.NewReader(conn).ReadString('\n')
	require.NoError(t, err)
	require.True(t, strings.HasPrefix(line, "INFO "), line)
	require.Contains(t, line, `"server_name":"cmdexec"`)
	require.Contains(t, line, `"max_payload":2097152`)
	require.Contains(t, line, `"jetstream":true`)
	require.NoError(t, conn.Close())

	s.Shutdown()
	s.Shutdown()
	s = natsdtest.StartIn(t, dir)
	require.NotEqual(t, first, s.ID(), "every life of the server has its own id")
}

func TestFolderInUse(t *testing.T) {
	dir := t.TempDir()
	s := natsdtest.StartIn(t, dir)
	_, err := natsd.Start(natsd.Options{StoreDir: dir})
	require.ErrorIs(t, err, natsd.ErrInUse)
	require.ErrorContains(t, err, dir)
	s.Shutdown()
	natsdtest.StartIn(t, dir)
}

func TestListen(t *testing.T) {
	s, err := natsd.Start(natsd.Options{StoreDir: t.TempDir(), Listen: "127.0.0.1:0"})
	require.NoError(t, err)
	t.Cleanup(s.Shutdown)
	address := strings.TrimPrefix(s.ClientURL(), "nats://")
	conn, err := net.Dial("tcp", address)
	require.NoError(t, err)
	require.NoError(t, conn.Close())

	_, err = natsd.Start(natsd.Options{StoreDir: t.TempDir(), Listen: address})
	require.ErrorContains(t, err, "address already in use")
	for _, bad := range []string{"127.0.0.1", "127.0.0.1:x", "127.0.0.1:70000"} {
		_, err = natsd.Start(natsd.Options{StoreDir: t.TempDir(), Listen: bad})
		require.ErrorContains(t, err, "listen address")
	}
}

func TestStoreFolder(t *testing.T) {
	_, err := natsd.Start(natsd.Options{})
	require.ErrorContains(t, err, "no data folder")
	file := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	_, err = natsd.Start(natsd.Options{StoreDir: filepath.Join(file, "below")})
	require.ErrorContains(t, err, "create data folder")
}

func TestStoreLimit(t *testing.T) {
	s, err := natsd.Start(natsd.Options{StoreDir: t.TempDir(), MaxStore: 64 << 20})
	require.NoError(t, err)
	t.Cleanup(s.Shutdown)
	require.Equal(t, int64(64<<20), s.MaxStore())
	most, err := natsd.Start(natsd.Options{StoreDir: t.TempDir(), MaxStore: 1 << 60})
	require.NoError(t, err)
	t.Cleanup(most.Shutdown)
	require.Less(t, most.MaxStore(), int64(1<<60), "never more than a quarter of the disk")
}
