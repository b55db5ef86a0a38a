package bus

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/core/job"
)

// What is read from the registry is either a record under its own key, or refused.
func FuzzDecodeRecord(f *testing.F) {
	rec := job.New(id.New(id.Job, time.Now()), "owner", job.Spec{Command: job.Command{Shell: "true"}}, time.Now())
	key, data, err := encode(rec)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(prefixJobs+key, data)
	f.Add(prefixJobs+key, []byte(`{"schema":2}`))
	f.Add("", []byte(`null`))
	f.Fuzz(func(t *testing.T, subject string, data []byte) {
		e, err := DecodeRecord(Msg{Subject: subject, Data: data, Sequence: 7})
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Fatalf("%v is not ErrMalformed", err)
			}
			return
		}
		key, err := jobKey(e.Record.ID)
		if err != nil || strings.TrimPrefix(subject, prefixJobs) != key || e.Revision != 7 || e.Record.Schema > job.Schema {
			t.Fatalf("accepted %q under %q", e.Record.ID, subject)
		}
	})
}

// No id from outside makes a subject of more or other tokens than meant.
func FuzzSubjects(f *testing.F) {
	for _, s := range []string{"", ">", "*", "job-", id.New(id.Job, time.Now()), "worker-a", "a.b", "0000000"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		tokens := func(subject string, err error, want int) {
			if err == nil && (len(strings.Split(subject, ".")) != want || strings.ContainsAny(strings.TrimSuffix(subject, "*"), "*> \t\r\n")) {
				t.Fatalf("%q became %q", s, subject)
			}
		}
		key, err := jobKey(s)
		tokens(key, err, 2)
		filter, err := groupFilter(s)
		tokens(filter, err, 4)
		subject, err := resultSubject(s)
		tokens(subject, err, 3)
		subject, err = logSubject(s)
		tokens(subject, err, 3)
		subject, err = commandSubject(s)
		tokens(subject, err, 4)
	})
}

// Answers of JetStream are told apart by code, not by guess.
func TestWriteErrors(t *testing.T) {
	for answer, want := range map[string]error{
		`{"error":{"err_code":10071,"description":"wrong last sequence: 3"}}`:      errConflict,
		`{"error":{"err_code":10164,"description":"wrong last sequence"}}`:         errConflict,
		`{"error":{"err_code":10077,"description":"maximum bytes exceeded"}}`:      ErrFull,
		`{"error":{"err_code":10077,"description":"maximum messages exceeded"}}`:   ErrFull,
		`{"error":{"err_code":10047,"description":"insufficient storage"}}`:        ErrFull,
		`{"error":{"err_code":10023,"description":"insufficient resources"}}`:      ErrFull,
		`{"error":{"err_code":10077,"description":"input/output error"}}`:          ErrAmbiguous,
		`{"error":{"err_code":10039,"description":"jetstream not enabled"}}`:       ErrUnavailable,
		`{"error":{"err_code":10060,"description":"expected stream not matched"}}`: ErrUnavailable,
	} {
		var ack pubAck
		if err := json.Unmarshal([]byte(answer), &ack); err != nil {
			t.Fatal(err)
		}
		if err := ack.Error.writeError(); !errors.Is(err, want) {
			t.Errorf("%s: got %v, want %v", answer, err, want)
		}
	}
}
