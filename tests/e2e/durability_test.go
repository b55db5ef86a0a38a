package e2e

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/job"
)

// TestIdempotentCreate sends the same job under the same key before and after
// a restart, and after it has left the registry.
func TestIdempotentCreate(t *testing.T) {
	s := startSystem(t, upOptions{executor: "process", slots: 2, env: []string{"IDEMPOTENCY_GRACE_SECONDS=20"}})
	ann := s.user("ann")
	key := http.Header{"Idempotency-Key": {"order-42"}}
	log := newJournal(t)
	fields := shell(log.command("echo once"))
	create := func(u *user, fields map[string]any) (api.Job, int, error) {
		var j api.Job
		code, err := u.call(http.MethodPost, "/api/jobs/create", fields, &j, key)
		return j, code, err
	}

	var first api.Job
	var mu sync.Mutex
	var wg sync.WaitGroup
	created := 0
	for range 20 {
		wg.Go(func() {
			j, code, err := create(ann, fields)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				t.Errorf("create: %v", err)
				return
			}
			if code == http.StatusCreated {
				created++
			}
			if first.JobID != "" && first.JobID != j.JobID {
				t.Errorf("two jobs for one key: %s and %s", first.JobID, j.JobID)
			}
			first = j
		})
	}
	wg.Wait()
	if created != 1 {
		t.Errorf("%d of 20 answers say that the job is new", created)
	}
	ann.ended(first.JobID)

	again := func(when string) {
		t.Helper()
		j, code, err := create(ann, fields)
		if err != nil || code != http.StatusOK || j.JobID != first.JobID || j.Status != job.Succeeded {
			t.Errorf("%s: %d %v, job %s %s", when, code, err, j.JobID, j.Status)
		}
		if _, code, err := create(ann, shell("echo another")); code != http.StatusUnprocessableEntity || problemOf(err).Code != "idempotency_key_reused" {
			t.Errorf("%s, with another body: %d %v", when, code, err)
		}
	}
	again("at once")
	s.crash()
	s.start()
	again("after a restart")
	eventually(t, "the job has left the registry", func() error {
		purged, err := s.metric("registry-persister", "cmdexec_persister_purged_jobs_total")
		if err != nil {
			return err
		}
		if purged < 1 {
			return errors.New("not purged yet")
		}
		return nil
	})
	again("after it has left the registry")
	if other, code, err := create(s.user("bob"), fields); err != nil || code != http.StatusCreated || other.JobID == first.JobID {
		t.Errorf("another owner with the same key: %d %v", code, err)
	}
	if n := log.starts(t, first.JobID); n != 1 {
		t.Errorf("started %d times", n)
	}
}

// TestKilledAtAnyMoment kills the whole system with kill -9 at seeded moments
// while many jobs have not ended, and starts it again: every acknowledged job
// ends exactly once, and starts no more often than its budget allows.
func TestKilledAtAnyMoment(t *testing.T) {
	const seed, rounds, perRound = 20261124, 4, 60
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	s := startSystem(t, upOptions{executor: "process", slots: 8})
	ann := s.user("ann")
	log := newJournal(t)
	type acked struct {
		id     string
		atMost int
	}
	var jobs []acked
	for round := range rounds {
		unfinished := 0
		for i := range perRound {
			fields := with(shell(log.command(fmt.Sprintf("sleep %.1f", 0.6+rng.Float64()))), map[string]any{"retry": map[string]any{"backoffSeconds": 0}})
			atMost := 1 + job.InfraBudget
			if i%3 == 0 {
				fields["onWorkerLost"], atMost = "fail", 1
			}
			var j api.Job
			if _, err := ann.call(http.MethodPost, "/api/jobs/create", fields, &j, nil); err != nil {
				t.Fatalf("round %d: create: %v", round, err)
			}
			jobs = append(jobs, acked{j.JobID, atMost})
		}
		<-time.After(time.Duration(rng.IntN(400)) * time.Millisecond) // the seeded moment, not a wait for anything
		for _, j := range jobs[len(jobs)-perRound:] {
			if !ann.job(j.id).Status.Terminal() {
				unfinished++
			}
		}
		s.crash()
		if unfinished < 20 {
			t.Fatalf("round %d: only %d jobs had not ended: the test shows too little", round, unfinished)
		}
		s.start()
	}
	outcomes := map[job.State]int{}
	for _, j := range jobs {
		done := ann.ended(j.id)
		outcomes[done.Status]++
		n := log.starts(t, j.id)
		switch {
		case done.Status != job.Succeeded && done.Reason != job.ReasonWorkerLost:
			t.Errorf("%s ended %s %s", j.id, done.Status, done.Reason)
		case n > j.atMost:
			t.Errorf("%s started %d times, allowed are %d", j.id, n, j.atMost)
		case done.Status == job.Succeeded && n == 0:
			t.Errorf("%s succeeded without a start", j.id)
		}
	}
	t.Logf("outcomes %v", outcomes)
	versions := map[string]uint64{}
	for _, j := range jobs {
		versions[j.id] = ann.job(j.id).Version
	}
	s.stop()
	s.start()
	for _, j := range jobs {
		if now := ann.job(j.id); now.Version != versions[j.id] || !now.Status.Terminal() {
			t.Errorf("%s changed after its end", j.id)
		}
		if left := alive(t, j.id); len(left) > 0 {
			t.Errorf("processes %v of %s are left", left, j.id)
		}
	}
}
