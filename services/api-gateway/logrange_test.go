package gateway

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
)

// text reads plain output; complete is what its header or trailer says.
func (e *env) text(path string, headers ...string) (a answer, complete string) {
	e.Helper()
	req, err := http.NewRequestWithContext(e.Context(), "GET", e.base+path, nil)
	require.NoError(e, err)
	req.Header.Set("Authorization", "Bearer "+token(e, "ann", auth.RoleUser))
	for i := 0; i+1 < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	resp, err := e.http.Do(req)
	require.NoError(e, err)
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	require.NoError(e, err)
	complete = resp.Header.Get(headerComplete) + resp.Trailer.Get(headerComplete)
	return answer{status: resp.StatusCode, header: resp.Header, body: body}, complete
}

func TestTextByRange(t *testing.T) {
	e := start(t, nil)
	jobID := e.create("ann")
	path := "/api/jobs/" + jobID + "/logs?format=text"
	_, complete := e.text(path)
	require.Equal(t, "false", complete, "it has not ended")
	e.runs(jobID, 1)
	var all, out strings.Builder
	const n = 600 // more than a page
	for i := range int64(n) {
		stream, text := stderr, fmt.Sprintf("line %d\n", i)
		if i%3 > 0 {
			stream = stdout
			out.WriteString(text)
		}
		all.WriteString(text)
		e.store.archive(jobID, 1, chunk(i+1, stream, text))
	}
	running, complete := e.text(path, "Range", "bytes=0-3")
	require.Equal(t, 200, running.status, "nobody knows the whole yet")
	require.Equal(t, "false", complete)
	e.move(jobID, ended(1, job.OutcomeSucceeded, 0, &job.Manifest{Chunks: n, Bytes: int64(all.Len())}))

	whole, complete := e.text(path)
	require.Equal(t, all.String(), string(whole.body))
	require.Equal(t, "bytes", whole.header.Get("Accept-Ranges"))
	require.Equal(t, "0", whole.header.Get(headerTruncated))
	require.Equal(t, "true", complete)

	for query, text := range map[string]string{"": all.String(), "&stream=stdout": out.String()} {
		size := len(text)
		for asked, want := range map[string][2]int{
			"bytes=0-0": {0, 1}, "bytes=0-": {0, size}, "bytes=5-20": {5, 21}, "bytes=-7": {size - 7, size}, "bytes=-999999": {0, size},
			"bytes=3000-4000": {3000, min(4001, size)}, fmt.Sprintf("bytes=%d-999999", size-1): {size - 1, size},
		} {
			a, complete := e.text(path+query, "Range", asked)
			require.Equal(t, 206, a.status, "%s %s", query, asked)
			require.Equal(t, text[want[0]:want[1]], string(a.body), "%s %s", query, asked)
			require.Equal(t, fmt.Sprintf("bytes %d-%d/%d", want[0], want[1]-1, size), a.header.Get("Content-Range"))
			require.Equal(t, "true", complete)
		}
		for _, asked := range []string{fmt.Sprintf("bytes=%d-", size), "bytes=-0", "bytes=999999-9999999"} {
			a, _ := e.text(path+query, "Range", asked)
			require.Equal(t, 416, a.status, asked)
			require.Equal(t, "range_not_satisfiable", a.problem(t).Code)
			require.Equal(t, fmt.Sprintf("bytes */%d", size), a.header.Get("Content-Range"))
		}
		for _, asked := range []string{"bytes=", "bytes=-", "bytes=5", "bytes=9-5", "bytes=0-1,3-4", "bytes=a-b", "bytes=+1-2", "bytes=1--2", "lines=1-2", "bytes=99999999999999999999-"} {
			a, _ := e.text(path+query, "Range", asked)
			require.Equal(t, 200, a.status, "%s is ignored", asked)
			require.Len(t, a.body, size)
		}
	}
	conditional, _ := e.text(path, "Range", "bytes=0-3", "If-Range", `"x"`)
	require.Equal(t, 200, conditional.status)
	e.store.setAway(true)
	away, _ := e.text(path, "Range", "bytes=0-3")
	require.Equal(t, 503, away.status)
	e.store.setAway(false)

	cut := e.create("ann")
	e.runs(cut, 1)
	e.store.archive(cut, 1, chunk(1, stdout, "head"))
	e.move(cut, ended(1, job.OutcomeSucceeded, 0, &job.Manifest{Chunks: 1, Bytes: 4, TruncatedBytes: 99}))
	for _, span := range []string{"", "bytes=0-"} {
		a, complete := e.text("/api/jobs/"+cut+"/logs?format=text", "Range", span)
		require.Equal(t, "false", complete, "what was not kept is not there")
		require.Equal(t, "99", a.header.Get(headerTruncated))
	}
}

// TestByteRange: a range is inside of its text, and never what was not asked for.
func TestByteRange(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.Int64Range(0, 1000).Draw(t, "size")
		a, b := rapid.Int64Range(0, 1200).Draw(t, "a"), rapid.Int64Range(0, 1200).Draw(t, "b")
		header := rapid.SampledFrom([]string{fmt.Sprintf("bytes=%d-%d", a, b), fmt.Sprintf("bytes=%d-", a), fmt.Sprintf("bytes=-%d", a)}).Draw(t, "header")
		r, ok := parseRange(header)
		if !ok {
			require.Less(t, b, a)
			return
		}
		from, to, ok := r.within(size)
		if !ok {
			require.True(t, size == 0 || a >= size || strings.HasSuffix(header, "=-0"))
			return
		}
		require.True(t, 0 <= from && from < to && to <= size)
		require.True(t, r.first < 0 || from == a)
	})
}
