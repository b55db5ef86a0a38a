package main

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/tests/chaos/history"
	"github.com/cmdexec/cmdexec/tests/chaos/rig"
)

func readDatabase(ctx context.Context, path string) ([]history.Stored, error) {
	db, err := sql.Open("sqlite", "file:"+path+"?mode=ro&_pragma=busy_timeout(10000)")
	if err != nil {
		return nil, err
	}
	defer db.Close()
	rows, err := db.QueryContext(ctx, "SELECT id, version, state FROM jobs")
	if err != nil {
		return nil, fmt.Errorf("read the database: %w", err)
	}
	defer rows.Close()
	var all []history.Stored
	for rows.Next() {
		x := history.Stored{Where: history.Database}
		if err := rows.Scan(&x.JobID, &x.Version, &x.State); err != nil {
			return nil, fmt.Errorf("read the database: %w", err)
		}
		all = append(all, x)
	}
	return all, rows.Err()
}

// collect notes everything that the checker needs from a quiet system, stops it,
// and notes what is left.
func (s *scene) collect(ctx context.Context, before []history.Resource) error {
	for id, user := range s.load.owners() {
		j, code := s.final(ctx, user, id)
		s.w.Add(history.Event{Final: &history.Final{JobID: id, Code: code, Job: j}})
		if j != nil && (j.Logs != nil && j.Logs.Bytes > 0 || j.Name == "printing") {
			o, err := s.output(ctx, user, j)
			if err != nil {
				return fmt.Errorf("read the output of %s: %w", id, err)
			}
			s.w.Add(history.Event{Output: o})
		}
	}
	stored, err := s.stored(ctx)
	if err != nil {
		return err
	}
	for _, x := range stored {
		s.w.Add(history.Event{Stored: &x})
	}
	if err := s.consumers(ctx); err != nil {
		return err
	}
	for _, after := range measure(ctx, s.rig) {
		for _, b := range before {
			if b.Service == after.Service && b.What == after.What && b.Before > 0 && after.Before > 0 {
				s.w.Add(history.Event{Resource: &history.Resource{Service: b.Service, What: b.What, Before: b.Before, After: after.Before}})
			}
		}
	}
	// Commands and folders must be gone before the workers are stopped, which would
	// clean up as well. The last attempt's folder goes a moment after its result.
	patience := 10 * time.Second
	if s.rig.Engine != nil {
		patience = 30 * time.Second // an engine that was killed is slow to answer
	}
	grace, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var left []string
	_ = until(grace, func() error {
		left = s.left(ctx)
		if len(left) > 0 {
			return errors.New(strings.Join(left, "; "))
		}
		return nil
	})
	for _, what := range left {
		s.w.Add(history.Event{Left: &history.Left{What: what}})
	}
	if err := s.rig.Stop(); err != nil {
		s.w.Add(history.Event{Left: &history.Left{What: err.Error()}})
	}
	return readJournals(s.rig.JournalDir(), s.w)
}

// final asks for a job until there is a definite answer.
func (s *scene) final(ctx context.Context, user, id string) (j *api.Job, code int) {
	limit, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	_ = until(limit, func() error {
		j, code = s.load.read(limit, user, id)
		if code == 200 || code == 404 {
			return nil
		}
		return fmt.Errorf("answered %d", code)
	})
	return j, code
}

// output reads all output of a job, and waits a while for it to be complete: it
// is archived behind the result.
func (s *scene) output(ctx context.Context, user string, j *api.Job) (*history.Output, error) {
	// What was on its way to a collector that was killed is delivered again after half a minute.
	limit, cancel := context.WithTimeout(ctx, 45*time.Second)
	defer cancel()
	var last *history.Output // that was read to its end
	err := until(limit, func() error {
		o := &history.Output{JobID: j.JobID, Seqs: []int64{}}
		var text strings.Builder
		for after := int64(0); ; {
			a := s.load.call(limit, user, "GET", fmt.Sprintf("/api/jobs/%s/logs?after=%d", j.JobID, after), nil, "", 5*time.Second)
			var page api.Logs
			if a.code != 200 {
				return fmt.Errorf("logs are answered %d (%v)", a.code, a.err)
			}
			if err := json.Unmarshal(a.body, &page); err != nil {
				return err
			}
			for _, item := range page.Items {
				o.Seqs = append(o.Seqs, item.Seq)
				o.Bytes += int64(len(item.Data) + len(item.DataBase64))
				if item.Stream == "stdout" {
					text.WriteString(item.Data)
					text.Write(item.DataBase64)
				}
			}
			o.Complete, o.EOF = page.Complete, page.EOF
			if page.EOF || page.NextAfter == after {
				break
			}
			after = page.NextAfter
		}
		o.Stdout = text.String()
		last = o
		if j.Status == job.Succeeded && !o.Complete && j.Logs != nil && j.Logs.Complete {
			return errors.New("it is not complete yet")
		}
		return nil
	})
	if last != nil && last.EOF {
		return last, nil // said to be incomplete: that is a figure, and no error
	}
	return last, err
}

// durable is how many durable consumers a stream has.
var durable = map[string]int{"RESULTS": 2, "LOGS": 1, "KV_jobs": 1}

// consumers notes those that should be gone. Followers of a registry or of output
// leave an ephemeral one behind when they die, which the server removes soon.
func (s *scene) consumers(ctx context.Context) error {
	nc, err := nats.Connect(s.rig.NATSURL())
	if err != nil {
		return err
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	// What was on its way to a process that was killed is delivered again after half a minute.
	limit, cancel := context.WithTimeout(ctx, 45*time.Second)
	defer cancel()
	err = until(limit, func() error { return waiting(limit, js) })
	if err != nil {
		s.w.Add(history.Event{Left: &history.Left{What: err.Error()}})
	}
	return nil
}

// mostFollowers is two schedulers, two gateways, two edges, and room.
const mostFollowers = 8

// mostWarm is what a worker keeps by default.
const mostWarm = 2

// waiting says which streams have too many consumers, or consumers that have not
// acknowledged what was delivered to them.
func waiting(ctx context.Context, js jetstream.JetStream) error {
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(durable)) {
		stream, err := js.Stream(ctx, name)
		if err != nil {
			return fmt.Errorf("stream %s: %w", name, err)
		}
		if n := stream.CachedInfo().State.Consumers; n > durable[name]+mostFollowers {
			errs = append(errs, fmt.Errorf("%d consumers of %s", n, name))
		}
		for consumer := range stream.ListConsumers(ctx).Info() {
			if slices.Contains([]string{"state", "archive", "logs", "database"}, consumer.Name) && consumer.NumAckPending > 0 {
				errs = append(errs, fmt.Errorf("%d unacknowledged messages of %s", consumer.NumAckPending, consumer.Name))
			}
		}
	}
	return errors.Join(errs...)
}

// left lists processes of commands, containers, and folders of attempts.
func (s *scene) left(ctx context.Context) []string {
	found := rig.Marked(s.rig.JournalDir(), s.rig.PIDs()...)
	if e := s.rig.Engine; e != nil {
		found = append(found, rig.Marked(e.Mount, s.rig.PIDs()...)...)
		ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
		containers, err := e.Containers(ctx)
		cancel()
		if err != nil {
			found = append(found, err.Error())
		}
		waiting := 0
		for _, c := range containers {
			if c.Waits() {
				waiting++
				continue
			}
			found = append(found, fmt.Sprintf("container %s (%s) %s", c.ID, c.State, strings.Join(c.Names, " ")))
		}
		if most := mostWarm * len(s.rig.Workers()); waiting > most {
			found = append(found, fmt.Sprintf("%d containers that wait, %d at most may", waiting, most))
		}
	}
	for _, w := range s.rig.Workers() {
		folders, err := os.ReadDir(filepath.Join(w.Dir, "attempts"))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			found = append(found, err.Error())
		}
		for _, f := range folders {
			if strings.HasPrefix(f.Name(), ".spare-") { // made ahead for the next attempt
				continue
			}
			found = append(found, "folder of an attempt "+filepath.Join(w.ID, f.Name()))
		}
	}
	return found
}

// measure notes what the processes of the server use now, in Before.
func measure(ctx context.Context, r *rig.Rig) []history.Resource {
	var all []history.Resource
	add := func(p *rig.Process, what string, n int64) {
		all = append(all, history.Resource{Service: p.Name, What: what, Before: n})
	}
	for _, sv := range r.Services {
		if n, err := sv.Metric(ctx, "go_goroutines"); err == nil {
			add(sv.Process, "goroutines", int64(n))
		}
	}
	for _, p := range r.Processes() {
		add(p, "fds", p.Files())
		add(p, "rss", p.Memory())
	}
	return all
}
