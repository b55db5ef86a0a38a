package gateway

import (
	"encoding/base64"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/job"
)

func TestCursor(t *testing.T) {
	key := newCursorKey("a secret of at least thirty-two bytes")
	q := busmsg.ListJobs{Owner: "ann", Queue: "q", Labels: map[string]string{"b": "2", "a": "1"}, Limit: 50}
	at := time.UnixMilli(1_764_000_000_123).UTC()
	const jobID = "job-01jd2xw8q3v5k7m9n1p3r5t7v9"
	sealed := key.seal(at, jobID, q)

	gotAt, gotID, ok := key.open(sealed, q)
	require.True(t, ok)
	require.Equal(t, at, gotAt)
	require.Equal(t, jobID, gotID)
	q.Limit = 7
	_, _, ok = key.open(sealed, q)
	require.True(t, ok, "pages may change their length")

	for name, change := range map[string]func(*busmsg.ListJobs){
		"another owner": func(q *busmsg.ListJobs) { q.Owner = "bob" },
		"all owners":    func(q *busmsg.ListJobs) { q.Owner = "" },
		"queue":         func(q *busmsg.ListJobs) { q.Queue = "other" },
		"label":         func(q *busmsg.ListJobs) { q.Labels = map[string]string{"a": "1"} },
		"status":        func(q *busmsg.ListJobs) { q.States = []job.State{job.Failed} },
		"since":         func(q *busmsg.ListJobs) { q.Since = at },
		"until":         func(q *busmsg.ListJobs) { q.Until = at },
	} {
		other := q
		change(&other)
		_, _, ok := key.open(sealed, other)
		require.False(t, ok, name)
	}
	otherKey := newCursorKey("another secret of at least thirty-two bytes")
	_, _, ok = otherKey.open(sealed, q)
	require.False(t, ok, "another deployment")

	raw, err := base64.RawURLEncoding.DecodeString(sealed)
	require.NoError(t, err)
	for i := range raw {
		tampered := append([]byte(nil), raw...)
		tampered[i] ^= 1
		_, _, ok := key.open(base64.RawURLEncoding.EncodeToString(tampered), q)
		require.False(t, ok, "byte %d", i)
	}
	for _, bad := range []string{"", "x", sealed + "A", sealed[:len(sealed)-1], sealed + "=", " " + sealed, sealed + "\n"} {
		_, _, ok := key.open(bad, q)
		require.False(t, ok, "%q", bad)
	}
}

func FuzzCursor(f *testing.F) {
	key := newCursorKey("a secret of at least thirty-two bytes")
	f.Add(key.seal(time.UnixMilli(0), "job-01jd2xw8q3v5k7m9n1p3r5t7v9", busmsg.ListJobs{Owner: "other"}))
	f.Add("AAAA")
	f.Fuzz(func(t *testing.T, cursor string) {
		if _, _, ok := key.open(cursor, busmsg.ListJobs{Owner: "ann"}); ok {
			t.Fatal("accepted a cursor that was never sealed for this list")
		}
	})
}
