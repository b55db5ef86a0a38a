package edge_test

import (
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
	"github.com/cmdexec/cmdexec/libs/natsd/natsdtest"
	"github.com/cmdexec/cmdexec/services/worker-edge/internal/workertest"
)

// TestWhoMayUseWhichRoute has every route of the edge and what it answers to
// everybody who may come.
func TestWhoMayUseWhichRoute(t *testing.T) {
	o := inProcess(natsdtest.Start(t))
	w := newWorld(t, o)
	w.lead()
	results := w.results()
	url, _, _ := w.edge(o, short)

	holder := workertest.NewHTTP(t, url, "worker-a")
	holder.Register()
	lease := w.assign("worker-a")
	require.Equal(t, lease, taken(t, holder.Poll(0)).Lease)
	other := workertest.NewHTTP(t, url, "worker-b")
	other.Register()
	stranger := workertest.NewHTTP(t, url, "worker-c") // a good token, and no session
	userToken, err := auth.MintUser([]byte(workertest.Secret), "ann", auth.RoleAdmin, time.Hour, time.Now())
	require.NoError(t, err)
	user := workertest.NewHTTP(t, url, "worker-a")
	user.Token = userToken
	nobody := workertest.NewHTTP(t, url, "worker-a")
	nobody.Token = ""

	text := func(v any) string { return string(workertest.JSON(t, v)) }
	beat := func(id string) string {
		return text(workerproto.Heartbeat{WorkerID: id, Status: "busy", Running: []workerproto.PhaseLease{}})
	}
	output := text(workerproto.Output{Lease: lease, Chunks: []workerproto.Chunk{workertest.Chunk(1, 0, []byte("x"))}})
	outcome := text(result(lease))
	query := "?jobId=" + lease.JobID + "&attempt=1"
	own := func(id string) string { return text(workertest.Hello(id)) }

	const (
		ok     = http.StatusOK
		noAuth = http.StatusUnauthorized
		again  = http.StatusConflict  // register_again: nothing is known of this worker
		theirs = http.StatusForbidden // other_worker: the body speaks for somebody else
	)
	type answers struct{ holder, other, stranger, user, nobody int }
	for _, c := range []struct {
		method, path, body string
		want               answers
	}{
		{"GET", workerproto.PathConnect, "", answers{http.StatusUpgradeRequired, http.StatusUpgradeRequired, http.StatusUpgradeRequired, noAuth, noAuth}},
		{"POST", workerproto.PathHeartbeat, beat("worker-a"), answers{ok, theirs, again, noAuth, noAuth}},
		{"GET", workerproto.PathGetJob + "?waitSeconds=0", "", answers{ok, http.StatusNoContent, again, noAuth, noAuth}}, // its heartbeat did not list the job
		{"GET", workerproto.PathGetJob + "?waitSeconds=0&workerId=worker-a", "", answers{http.StatusNoContent, theirs, again, noAuth, noAuth}},
		{"GET", workerproto.PathCheckCancel + query, "", answers{ok, ok, again, noAuth, noAuth}}, // to others it is stale, see below
		{"POST", workerproto.PathOutput, output, answers{ok, ok, again, noAuth, noAuth}},
		{"POST", workerproto.PathResult, outcome, answers{ok, ok, again, noAuth, noAuth}},
		{"POST", workerproto.PathRegister, own("worker-a"), answers{ok, theirs, theirs, noAuth, noAuth}},
		{"GET", "/api/jobs", "", answers{http.StatusNotFound, http.StatusNotFound, http.StatusNotFound, http.StatusNotFound, http.StatusNotFound}},
	} {
		for _, who := range []struct {
			name   string
			client *workertest.HTTP
			want   int
		}{
			{"nobody", nobody, c.want.nobody},
			{"a user", user, c.want.user},
			{"a stranger", stranger, c.want.stranger},
			{"another worker", other, c.want.other},
			{"the holder", holder, c.want.holder},
		} {
			a, err := who.client.Try(c.method, c.path, nil, []byte(c.body))
			require.NoError(t, err)
			require.Equal(t, who.want, a.Status, "%s %s by %s: %s", c.method, c.path, who.name, a.Body)
			if who.client == other && a.Status == ok && c.path == workerproto.PathOutput {
				require.Equal(t, workerproto.OutputReply{Stale: true}, workertest.Body[workerproto.OutputReply](t, a), "nothing of it is stored")
			}
		}
	}
	// A result under somebody else's lease bears the name of who sent it; the registry refuses it.
	for _, r := range results() {
		require.Contains(t, []string{"worker-a", "worker-b"}, r.WorkerID)
	}
}
