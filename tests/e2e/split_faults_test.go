package e2e

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/job"
)

// onlySplit skips what is about separate services.
func onlySplit(t testing.TB) {
	t.Helper()
	if *formFlag != "split" && *formFlag != "http" {
		t.Skip("about separate services: shown with -form=split and -form=http")
	}
}

func (s *system) split() *split { return s.form.(*split) }

// batch submits jobs that note their starts and take a moment.
func batch(u *user, log journal, n int, seconds func(i int) string) []string {
	u.t.Helper()
	ids := make([]string, 0, n)
	for i := range n {
		fields := with(shell(log.command("sleep "+seconds(i))), map[string]any{"retry": map[string]any{"backoffSeconds": 0}})
		ids = append(ids, u.submit(fields).JobID)
	}
	return ids
}

func unfinished(u *user, ids []string) int {
	n := 0
	for _, id := range ids {
		if !u.job(id).Status.Terminal() {
			n++
		}
	}
	return n
}

// endedOnce checks that all jobs succeed and started exactly so often.
func endedOnce(u *user, log journal, ids []string, starts func(j api.Job, n int) bool) {
	u.t.Helper()
	for _, id := range ids {
		j := u.ended(id)
		if n := log.starts(u.t, id); j.Status != job.Succeeded || !starts(j, n) {
			u.t.Errorf("%s ended %s (%s) at attempt %d after %d starts", id, j.Status, j.Reason, j.Attempt, n)
		}
	}
}

func once(_ api.Job, n int) bool { return n == 1 }

// TestServiceKilledInTurn kills each service with kill -9 while many of 200 jobs
// have not ended, and starts it again. Workers live on, so nothing starts twice.
func TestServiceKilledInTurn(t *testing.T) {
	onlySplit(t)
	const seed = 20261124
	for _, name := range append([]string{"nats-server"}, serviceNames...) {
		t.Run(name, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, uint64(len(name))))
			s := startSystem(t, upOptions{executor: "process", slots: 8})
			ann, log := s.user("ann"), newJournal(t)
			ids := batch(ann, log, 200, func(i int) string { return fmt.Sprintf("0.%02d", 30+i%20) })
			<-time.After(time.Duration(rng.IntN(300)) * time.Millisecond) // the seeded moment, not a wait for anything
			if n := unfinished(ann, ids); n < 20 {
				t.Fatalf("only %d jobs had not ended: the test shows too little", n)
			}
			f := s.split()
			if name == "nats-server" {
				f.nats.kill()
				f.startNATS()
			} else {
				sv := f.named(name)[0]
				sv.process.kill()
				f.startService(sv)
			}
			endedOnce(ann, log, ids, once)
			f.ready()
		})
	}
}

// TestLeadingSchedulerStopped stops the leading one of two schedulers past its
// lease, so that the other takes over, and lets it go on afterwards.
func TestLeadingSchedulerStopped(t *testing.T) {
	onlySplit(t)
	s := startSystem(t, upOptions{executor: "process", slots: 8, copies: 2})
	ann, log := s.user("ann"), newJournal(t)
	f := s.split()
	leader := func(among []*service) *service {
		for _, sv := range among {
			if leads, err := metricAt(sv.admin, "cmdexec_scheduler_leading"); err == nil && leads == 1 {
				return sv
			}
		}
		return nil
	}
	var first *service
	eventually(t, "somebody leads", func() error {
		if first = leader(f.named("scheduler")); first == nil {
			return errors.New("nobody")
		}
		return nil
	})
	ids := batch(ann, log, 60, func(i int) string { return fmt.Sprintf("%d.5", i%3) })
	if err := first.process.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	var others []*service
	for _, sv := range f.named("scheduler") {
		if sv != first {
			others = append(others, sv)
		}
	}
	eventually(t, "the other scheduler leads", func() error {
		if leader(others) == nil {
			return errors.New("not yet")
		}
		return nil
	})
	ids = append(ids, batch(ann, log, 60, func(int) string { return "0.1" })...)
	if err := first.process.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	ids = append(ids, batch(ann, log, 60, func(int) string { return "0.1" })...)
	endedOnce(ann, log, ids, once)
}

// TestEdgeKilled kills the edge that holds a worker in the middle of its jobs:
// they go on, their worker continues on the other edge, and nothing restarts.
func TestEdgeKilled(t *testing.T) {
	onlySplit(t)
	s := startSystem(t, upOptions{executor: "none", copies: 2})
	for i := range 4 {
		s.addWorker(fmt.Sprintf("w%d", i), "SLOTS=4")
	}
	ann, log := s.user("ann"), newJournal(t)
	ids := batch(ann, log, 16, func(int) string { return "4; echo done" })
	for _, id := range ids {
		ann.running(id)
	}
	f := s.split()
	edges := f.named("worker-edge")
	victim := edges[0]
	held, err := metricAt(victim.admin, "cmdexec_edge_sessions")
	if err != nil {
		t.Fatal(err)
	}
	if held == 0 {
		victim = edges[1]
	}
	victim.process.kill()
	victim.process = nil
	for _, id := range ids {
		j := ann.ended(id)
		if n := log.starts(t, id); j.Status != job.Succeeded || j.Attempt != 1 || n != 1 {
			t.Errorf("%s ended %s at attempt %d after %d starts", id, j.Status, j.Attempt, n)
		}
		if out := ann.output(id, "stdout"); out != "done\n" {
			t.Errorf("%s printed %q", id, out)
		}
	}
}

// TestServicesStartInAnyOrder starts everything before NATS: each says what it
// waits for, and all become ready once it is there.
func TestServicesStartInAnyOrder(t *testing.T) {
	onlySplit(t)
	s := startSystem(t, upOptions{executor: "none"})
	s.stop()
	f := s.split()
	for _, sv := range f.services {
		f.startService(sv)
	}
	for _, sv := range f.services {
		eventually(t, sv.name+" says what is missing", func() error {
			resp, err := http.Get("http://" + sv.admin + "/readyz")
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			var text [512]byte
			n, _ := resp.Body.Read(text[:])
			if resp.StatusCode != http.StatusServiceUnavailable || !strings.Contains(string(text[:n]), "NATS") {
				return fmt.Errorf("%s: %s", resp.Status, text[:n])
			}
			return nil
		})
	}
	f.startNATS()
	f.ready()
	s.addWorker("late")
	ann := s.user("ann")
	if j := ann.ended(ann.submit(shell("true")).JobID); j.Status != job.Succeeded {
		t.Errorf("ended %s", j.Status)
	}
	// NATS goes away and comes back: everything reconnects by itself.
	f.nats.stop()
	code, err := ann.call(http.MethodPost, "/api/jobs/create", shell("true"), &struct{}{}, nil)
	if code != http.StatusServiceUnavailable {
		t.Errorf("a submit without NATS: %d %v", code, err)
	}
	f.startNATS()
	f.ready()
	if j := ann.ended(ann.submit(shell("true")).JobID); j.Status != job.Succeeded {
		t.Errorf("after the return of NATS: %s", j.Status)
	}
}

// TestServerThatDoesNotSyncIsRefused: the durability is read from the server.
func TestServerThatDoesNotSyncIsRefused(t *testing.T) {
	onlySplit(t)
	s := startSystem(t, upOptions{executor: "none"})
	s.stop()
	f := s.split()
	file := filepath.Join(s.dir, "nats.conf")
	config := strings.Replace(read(t, file), "sync_interval: always", "sync_interval: 2m", 1)
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	f.startNATS()
	for _, name := range append([]string{"cmdexec"}, serviceNames...) {
		var p *program
		if name == "cmdexec" {
			p = startProgram(t, name, []string{"NATS_URL=" + f.natsURL}, "bus", "apply")
		} else {
			p = startProgram(t, name, f.env(f.named(name)[0]))
		}
		select {
		case <-p.done:
		case <-time.After(patience):
			t.Fatalf("%s accepts a server that does not sync", name)
		}
		if p.cmd.ProcessState.ExitCode() == 0 || !strings.Contains(p.out.String(), "sync_interval: always") {
			t.Errorf("%s: exit code %d, %q", name, p.cmd.ProcessState.ExitCode(), p.out)
		}
	}
	for _, sv := range f.services {
		sv.process = nil
	}
}

// TestWorkerRefusesPlainConnections that leave the machine.
func TestWorkerRefusesPlainConnections(t *testing.T) {
	for url, want := range map[string]string{
		"http://192.0.2.1:3001": "INSECURE=true",
		"ws://192.0.2.1":        "INSECURE=true",
		"ftp://127.0.0.1":       "SERVER_URL",
	} {
		p := startProgram(t, "worker", []string{
			"SERVER_URL=" + url, "EXECUTORS=process", "WORKER_TOKEN_SECRET=" + workerSecret, "DATA_DIR=" + t.TempDir(), "ADMIN_ADDR=",
		})
		<-p.done
		if p.cmd.ProcessState.ExitCode() == 0 || !strings.Contains(p.out.String(), want) {
			t.Errorf("%s: exit code %d, %q", url, p.cmd.ProcessState.ExitCode(), p.out)
		}
	}
}
