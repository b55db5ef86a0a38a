package bus_test

import (
	"net/url"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/bus"
)

// clustered starts a server that joins the cluster of another one.
func clustered(t *testing.T, name string, to *server.Server) *server.Server {
	t.Helper()
	o := &server.Options{
		ServerName: name, Host: "127.0.0.1", Port: -1, NoSigs: true,
		Cluster: server.ClusterOpts{Name: "test", Host: "127.0.0.1", Port: -1},
	}
	if to != nil {
		o.Routes = []*url.URL{{Scheme: "nats-route", Host: to.ClusterAddr().String()}}
	}
	s, err := server.NewServer(o)
	require.NoError(t, err)
	s.Start()
	t.Cleanup(func() {
		s.Shutdown()
		s.WaitForShutdown()
	})
	require.True(t, s.ReadyForConnections(10*time.Second))
	return s
}

// Services of one deployment are connected to different servers of a cluster. What
// one of them notes about this life of the server must be true for the others, or
// schedulers wait for ever for a sweep that was made.
func TestServersOfAClusterShareALife(t *testing.T) {
	a := clustered(t, "a", nil)
	b := clustered(t, "b", a)
	var ids []string
	for _, s := range []*server.Server{a, b} {
		c, err := bus.Connect(t.Context(), bus.Options{URL: s.ClientURL(), Name: "test"})
		require.NoError(t, err)
		t.Cleanup(c.Close)
		ids = append(ids, c.ServerID())
	}
	require.NotEmpty(t, ids[0])
	require.Equal(t, ids[0], ids[1])
}
