package job_test

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/job"
)

var benchStart = time.Unix(1_800_000_000, 0).UTC()

// life is what happens to a job that is quick.
func life(b *testing.B, spec job.Spec) job.Record {
	b.Helper()
	r := job.New("job-01kp8s6q9v7h3m5d2c4x6z8b0n", "local", spec, benchStart)
	r, err := job.Apply(r, job.Assign{WorkerID: "worker-01kp8s6q9v7h3m5d2c4x6z8b0n", LeaseID: "lease-01kp8s6q9v7h3m5d2c4x6z8b0n"}, benchStart)
	if err != nil {
		b.Fatal(err)
	}
	zero := 0
	r, err = job.Apply(r, job.Result{
		Fence: r.Fence(), WorkerID: r.WorkerID, Outcome: job.OutcomeSucceeded, ExitCode: &zero,
		AcceptedAt: benchStart, PreparedAt: benchStart, StartedAt: benchStart, FinishedAt: benchStart,
	}, benchStart)
	if err != nil {
		b.Fatal(err)
	}
	return r
}

func benchSpec(b *testing.B) job.Spec {
	b.Helper()
	spec, problems := job.Normalise(job.Spec{Command: job.Command{Shell: "true"}, Labels: map[string]string{"team": "a"}})
	if len(problems) > 0 {
		b.Fatal(problems)
	}
	return spec
}

// BenchmarkLife is the state machine: created, assigned, ended.
func BenchmarkLife(b *testing.B) {
	spec := benchSpec(b)
	b.ReportAllocs()
	for b.Loop() {
		life(b, spec)
	}
}

// BenchmarkNormalise is what a submit does with a spec.
func BenchmarkNormalise(b *testing.B) {
	in := job.Spec{Command: job.Command{Shell: "true"}, Labels: map[string]string{"team": "a"}}
	b.ReportAllocs()
	for b.Loop() {
		if _, problems := job.Normalise(in); len(problems) > 0 {
			b.Fatal(problems)
		}
	}
}

// BenchmarkRecord is the record of an ended job as the registry keeps it.
func BenchmarkRecord(b *testing.B) {
	r := life(b, benchSpec(b))
	data, err := json.Marshal(r)
	if err != nil {
		b.Fatal(err)
	}
	b.Run("encode", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := json.Marshal(&r); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("decode", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			var got job.Record
			if err := json.Unmarshal(data, &got); err != nil {
				b.Fatal(err)
			}
		}
	})
}
