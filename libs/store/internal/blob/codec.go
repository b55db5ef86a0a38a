// Package blob is the form in which databases keep a record: deflated JSON in
// two parts, what lists show and the rest.
package blob

import (
	"bytes"
	"compress/flate"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/cmdexec/cmdexec/libs/core/job"
)

// A blob is formatDeflate1 and JSON deflated with dictionary1: the JSON is mostly
// field names and defaults, so that a job that ran `true` shrinks from 1.1 KB to
// under 200 bytes for 15 microseconds.
const formatDeflate1 = 1

// dictionary1 is a typical record, the most frequent parts last. It is part of
// the format: never change it, add another format.
const dictionary1 = `{"files":[{"path":"","content":"","mode":"0644"}],"stdin":"","rerunOf":"job-","requestedAt":"deliveredAt":"signalledAt":"exitedAt":"goneAt":"stopUnconfirmed":true,"containerImage":"docker.io/library/","labels":{"env":{"workingDir":"user":"tmpfsMb":64},"network":"none","pullPolicy":"missing","constraints":{"os":"linux","arch":"amd64"},"onExitCodes":[],"queue":0,"total":0,"retryAt":"the worker did not confirm the stop in time","state":"canceled","canceling","expired","retrying","worker_lost","worker_stopped","execution_timeout","queue_timeout","total_timeout","image_pull_failed","engine_error","registry_reset","oom_killed","signaled","start_failed","rejected","outcome":"lost","truncatedBytes":0,"state":"timed_out","userFailures":1,"infraFailures":1,"message":"","signal":"SIGKILL","oomKilled":true,"cancel":{"keyed":true,"specHash":"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","imageDigest":"sha256:","warm":true,"state":"failed","reason":"exit_code","exitCode":1,"outcome":"failed","reason":"exit_code","exitCode":1,` +
	`{"attempts":[{"number":1,"leaseId":"lease-01","workerId":"worker-01","assignedAt":"2026-11-24T08:15:09.6Z","acceptedAt":"2026-11-24T08:15:09.6Z","preparedAt":"2026-11-24T08:15:09.6Z","startedAt":"2026-11-24T08:15:09.6Z","finishedAt":"2026-11-24T08:15:09.6Z","durationMs":1,"outcome":"succeeded","exitCode":0,"peakMemoryMb":1,"cpuMs":1,"manifest":{"chunks":0,"bytes":0,"sha256":"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}}]}` +
	`{"schema":1,"id":"job-01","owner":"local","version":4,"state":"succeeded","spec":{"name":"","command":["/bin/sh","-c","true"],"timeout":300,"resources":{"cpu":1,"memoryMb":512,"pids":128},"queue":"default","priority":50,"retry":{"maxAttempts":1,"backoffSeconds":2,"maxBackoffSeconds":300},"onWorkerLost":"requeue","timeouts":{"prepare":300},"stop":{"signal":"SIGTERM","graceSeconds":10},"logMaxBytes":16777216},"createdAt":"2026-11-24T08:15:09.6Z","stateAt":"2026-11-24T08:15:09.6Z","startedAt":"2026-11-24T08:15:09.6Z","finishedAt":"2026-11-24T08:15:09.6Z","attempt":1,"leaseId":"lease-01","workerId":"worker-01","exitCode":0,"attempts":[{"number":1,"leaseId":"lease-01`

// deflateLevel is the lowest that reaches the size: higher ones cost three times the time for 5 %.
const deflateLevel = 4

// rest is what lists leave out of a record, where it is worth a blob of its own.
type rest struct {
	Attempts []job.Attempt `json:"attempts,omitempty"`
	Files    []job.File    `json:"files,omitempty"`
	Stdin    string        `json:"stdin,omitempty"`
}

// fewAttempts stay in the summary: reading them is cheaper than another blob.
const fewAttempts = 3

func (r *rest) small() bool {
	return len(r.Attempts) <= fewAttempts && len(r.Files) == 0 && r.Stdin == ""
}

// Codec turns records into the two blobs of a row and back. It is safe for
// concurrent use.
type Codec struct {
	deflaters sync.Pool // of *flate.Writer
	inflaters sync.Pool // of io.ReadCloser, which is a flate.Resetter
}

// Split encodes a record. restBlob is nil where the summary is the whole record.
func (c *Codec) Split(r job.Record) (summary, restBlob []byte, err error) {
	tail := rest{Attempts: r.Attempts, Files: r.Spec.Files, Stdin: r.Spec.Stdin}
	if tail.small() {
		summary, err = c.encode(r)
		return summary, nil, err
	}
	r.Attempts, r.Spec.Files, r.Spec.Stdin = ran(r.Attempts), nil, ""
	if summary, err = c.encode(r); err != nil {
		return nil, nil, err
	}
	restBlob, err = c.encode(tail)
	return summary, restBlob, err
}

func (c *Codec) encode(v any) ([]byte, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	out := bytes.NewBuffer(make([]byte, 0, 256))
	out.WriteByte(formatDeflate1)
	w, ok := c.deflaters.Get().(*flate.Writer)
	if ok {
		w.Reset(out)
	} else if w, err = flate.NewWriterDict(out, deflateLevel, []byte(dictionary1)); err != nil {
		return nil, err
	}
	if _, err := w.Write(data); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	c.deflaters.Put(w)
	return out.Bytes(), nil
}

// Summary decodes a list item and says how long its JSON is, at most.
func (c *Codec) Summary(blob []byte) (job.Record, int, error) {
	r, n, err := c.decode(blob)
	r.Attempts = ran(r.Attempts)
	return r, n, err
}

// ran is what lists show of attempts: how long the command of the last one ran. It is
// nil where none did.
func ran(attempts []job.Attempt) []job.Attempt {
	if len(attempts) == 0 || attempts[len(attempts)-1].DurationMs == 0 {
		return nil
	}
	last := &attempts[len(attempts)-1]
	return []job.Attempt{{Number: last.Number, DurationMs: last.DurationMs}}
}

func (c *Codec) decode(blob []byte) (job.Record, int, error) {
	var r job.Record
	data, err := c.plain(blob)
	if err != nil {
		return r, 0, err
	}
	if err := json.Unmarshal(data, &r); err != nil {
		return r, 0, fmt.Errorf("decode a stored job: %w", err)
	}
	return r, len(data), nil
}

// Join decodes a whole record.
func (c *Codec) Join(summary, restBlob []byte) (job.Record, error) {
	r, _, err := c.decode(summary)
	if err != nil || restBlob == nil {
		return r, err
	}
	data, err := c.plain(restBlob)
	if err != nil {
		return r, err
	}
	var tail rest
	if err := json.Unmarshal(data, &tail); err != nil {
		return r, fmt.Errorf("decode a stored job: %w", err)
	}
	r.Attempts, r.Spec.Files, r.Spec.Stdin = tail.Attempts, tail.Files, tail.Stdin
	return r, nil
}

var errFormat = errors.New("decode a stored job: unknown format")

func (c *Codec) plain(blob []byte) ([]byte, error) {
	if len(blob) == 0 || blob[0] != formatDeflate1 {
		return nil, errFormat
	}
	src := bytes.NewReader(blob[1:])
	r, ok := c.inflaters.Get().(io.ReadCloser)
	if !ok {
		r = flate.NewReaderDict(src, []byte(dictionary1))
	} else if err := r.(flate.Resetter).Reset(src, []byte(dictionary1)); err != nil {
		return nil, err
	}
	out := bytes.NewBuffer(make([]byte, 0, 2<<10))
	if _, err := out.ReadFrom(r); err != nil {
		return nil, fmt.Errorf("decode a stored job: %w", err)
	}
	c.inflaters.Put(r)
	return out.Bytes(), nil
}
