package e2e

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/job"
)

// printer writes 5 MB of numbered lines to each stream, with pauses, so that a
// follower is really following.
const printer = `i=0; while [ $i -lt 50 ]; do
  seq $((i*1000)) $((i*1000+999)) | awk '{printf "out %08d %s\n", $1, "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"}' | tee -a $DIR/stdout
  seq $((i*1000)) $((i*1000+999)) | awk '{printf "err %08d %s\n", $1, "yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy"}' | tee -a $DIR/stderr >&2
  sleep 0.02; i=$((i+1)); done`

// TestOutputOfTenMegabytes compares each stream with what the job itself wrote
// to a file, by SHA-256, for a follower that is cut twice and resumes, for the
// text form, and for the JSON pages.
func TestOutputOfTenMegabytes(t *testing.T) {
	s := startSystem(t, upOptions{executor: "process", slots: 2})
	ann := s.user("ann")
	dir := t.TempDir()
	j := ann.submit(map[string]any{"command": printer, "env": map[string]string{"DIR": dir}, "timeout": 120})

	f := follower{u: ann, id: j.JobID, sums: map[string]hash.Hash{"stdout": sha256.New(), "stderr": sha256.New()}}
	for cut := 0; f.end == nil; cut++ {
		after := int64(2<<20) * int64(cut+1) // bytes after which the connection is cut, twice
		if cut >= 2 {
			after = 1 << 40
		}
		f.follow(t, after)
	}
	if f.cuts != 2 {
		t.Errorf("the follower was cut %d times, want 2", f.cuts)
	}
	if f.end.Status != job.Succeeded {
		t.Fatalf("ended %s %s %s", f.end.Status, f.end.Reason, f.end.Message)
	}
	for stream, sum := range f.sums {
		want := sha256.Sum256([]byte(read(t, dir+"/"+stream)))
		if got := hex.EncodeToString(sum.Sum(nil)); got != hex.EncodeToString(want[:]) {
			t.Errorf("%s as followed differs from what was printed", stream)
		}
		if got := sha256.Sum256([]byte(ann.output(j.JobID, stream))); got != want {
			t.Errorf("%s as pages differs from what was printed", stream)
		}
		resp, err := ann.request(context.Background(), http.MethodGet, "/api/jobs/"+j.JobID+"/logs?stream="+stream, nil, http.Header{"Accept": {"text/plain"}})
		if err != nil {
			t.Fatal(err)
		}
		text := sha256.New()
		if _, err := io.Copy(text, resp.Body); err != nil {
			t.Error(err)
		}
		resp.Body.Close()
		if hex.EncodeToString(text.Sum(nil)) != hex.EncodeToString(want[:]) {
			t.Errorf("%s as text differs from what was printed", stream)
		}
	}
	if done := ann.job(j.JobID); done.Logs == nil || !done.Logs.Complete || done.Logs.TruncatedBytes != 0 {
		t.Errorf("declared %+v", done.Logs)
	}
}

// follower reads a job's output live, and can lose its connection.
type follower struct {
	u    *user
	id   string
	last string // Last-Event-ID
	seq  int64
	seen int64
	cuts int
	sums map[string]hash.Hash
	end  *api.Job
}

// follow reads until the job has ended or until so many bytes have been seen.
func (f *follower) follow(t *testing.T, until int64) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	header := http.Header{"Accept": {"text/event-stream"}}
	if f.last != "" {
		header.Set("Last-Event-ID", f.last)
	}
	resp, err := f.u.request(ctx, http.MethodGet, "/api/jobs/"+f.id+"/logs?follow=true", nil, header)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("follow: %s", resp.Status)
	}
	lines := bufio.NewReaderSize(resp.Body, 1<<20)
	var event, id, data string
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			t.Fatalf("the stream broke by itself: %v", err)
		}
		switch name, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ":"); name {
		case "event":
			event = strings.TrimSpace(value)
		case "id":
			id = strings.TrimSpace(value)
		case "data":
			data = strings.TrimSpace(value)
		case "":
			if line != "\n" {
				continue // a comment
			}
			f.take(t, event, id, data)
			if f.end != nil {
				return
			}
			if f.seen >= until {
				f.cuts++
				return
			}
			event, id, data = "", "", ""
		}
	}
}

func (f *follower) take(t *testing.T, event, id, data string) {
	t.Helper()
	switch event {
	case "output":
		var item api.LogItem
		if err := json.Unmarshal([]byte(data), &item); err != nil {
			t.Fatal(err)
		}
		if item.Seq != f.seq+1 {
			t.Fatalf("seq %d follows %d: a gap or a repeat", item.Seq, f.seq)
		}
		f.seq, f.last = item.Seq, id
		text := item.Data + string(item.DataBase64)
		f.seen += int64(len(text))
		f.sums[string(item.Stream)].Write([]byte(text))
	case "end":
		f.end = &api.Job{}
		if err := json.Unmarshal([]byte(data), f.end); err != nil {
			t.Fatal(err)
		}
	}
}

// TestOutputBeyondTheCap keeps head and tail and says what is missing.
func TestOutputBeyondTheCap(t *testing.T) {
	s := startSystem(t, upOptions{executor: "process", slots: 2})
	ann := s.user("ann")
	j := ann.ended(ann.submit(map[string]any{"command": "seq 1 400000", "logMaxBytes": 1 << 20}).JobID)
	out := ann.outputAnyway(j.JobID)
	full := 0
	for i := 1; i <= 400000; i++ {
		full += len(strconv.Itoa(i)) + 1
	}
	if !strings.HasPrefix(out, "1\n2\n3\n") || !strings.HasSuffix(out, "399999\n400000\n") {
		t.Errorf("head or tail is missing: %.20q ... %q", out, out[max(0, len(out)-20):])
	}
	if j.Logs == nil || j.Logs.Complete || j.Logs.TruncatedBytes != int64(full-len(out)) {
		t.Errorf("declared %+v; printed %d bytes, stored %d", j.Logs, full, len(out))
	}
}

// outputAnyway reads stdout of an ended job whose log is not complete.
func (u *user) outputAnyway(id string) string {
	u.t.Helper()
	var text strings.Builder
	eventually(u.t, "the stored log of "+id+" ends", func() error {
		text.Reset()
		after := int64(0)
		for {
			var page api.Logs
			if err := u.get(fmt.Sprintf("/api/jobs/%s/logs?after=%d", id, after), &page); err != nil {
				return err
			}
			for _, item := range page.Items {
				if item.Stream == "stdout" {
					text.WriteString(item.Data)
				}
			}
			if page.EOF {
				return nil
			}
			if page.NextAfter == after {
				return fmt.Errorf("stored up to seq %d", after)
			}
			after = page.NextAfter
		}
	})
	return text.String()
}

// TestFollowerSeesOutputAtOnce measures nothing; it only shows that output
// arrives while the job runs.
func TestFollowerSeesOutputAtOnce(t *testing.T) {
	s := startSystem(t, upOptions{executor: "process", slots: 2})
	ann := s.user("ann")
	gate := t.TempDir() + "/go"
	j := ann.submit(shell("echo first; while ! test -e " + gate + "; do sleep 0.05; done; echo second"))
	f := follower{u: ann, id: j.JobID, sums: map[string]hash.Hash{"stdout": sha256.New(), "stderr": sha256.New()}}
	f.follow(t, 6) // returns once "first\n" has come, while the job waits for the gate
	if err := os.WriteFile(gate, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	f.follow(t, 1<<30)
	if f.seen != int64(len("first\nsecond\n")) || f.end.Status != job.Succeeded {
		t.Errorf("saw %d bytes, ended %s", f.seen, f.end.Status)
	}
}
