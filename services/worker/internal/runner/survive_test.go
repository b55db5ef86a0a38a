package runner

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
	"github.com/cmdexec/cmdexec/services/worker/internal/journal"
	"github.com/cmdexec/cmdexec/services/worker/internal/output"
	"github.com/cmdexec/cmdexec/services/worker/internal/spool"
)

// adopter is an executor that has one command left, which writes the rest of
// text to its standard output and ends.
type adopter struct {
	instantly
	text  string
	past  *executor.Past
	stops []executor.StopReason
}

type instantly struct{}

func (instantly) Name() string                  { return job.ExecutorDocker }
func (instantly) Probe(context.Context) error   { return nil }
func (instantly) Recover(context.Context) error { return nil }
func (instantly) Prepare(context.Context, executor.Spec) (executor.Attempt, error) {
	return nil, executor.InfraError("not here", nil)
}

func (x *adopter) Adopt(_ executor.Spec, _ []byte, past executor.Past) (executor.Adopted, error) {
	x.past = &past
	return x, nil
}
func (x *adopter) Start(io.Writer, io.Writer) error { return executor.ErrStopped }
func (x *adopter) Stop(why executor.StopReason)     { x.stops = append(x.stops, why) }
func (x *adopter) Close() error                     { return nil }
func (x *adopter) Resume(c executor.Continuation) error {
	_, err := io.WriteString(c.Stdout, x.text[c.HasStdout:])
	return err
}

func (x *adopter) Wait() executor.Exit {
	now, code := time.Now(), 0
	return executor.Exit{Code: &code, StartedAt: now, FinishedAt: now}
}

// What a killed worker has left decides whether its next process goes on with
// the command, and from where.
func TestWhatIsGoneOnWith(t *testing.T) {
	const text = "one two three four"
	piece := func(seq, from, to int64) workerproto.Chunk {
		return workerproto.Chunk{Seq: seq, Offset: from, Stream: workerproto.Stdout, Data: []byte(text[from:to])}
	}
	one, two, three := piece(1, 0, 4), piece(2, 4, 8), piece(3, 8, 14)
	for name, c := range map[string]struct {
		change func(h *head, m *mark)
		marked []workerproto.Chunk // that the mark knows of
		kept   []workerproto.Chunk // that the spool has
		result bool
		held   int64 // the last number; -1: it is not gone on with
		has    int64 // bytes
	}{
		"nothing was written":             {held: 0, has: 0},
		"all is acknowledged":             {marked: []workerproto.Chunk{one, two}, held: 2, has: 8},
		"nothing is acknowledged":         {marked: []workerproto.Chunk{one, two}, kept: []workerproto.Chunk{one, two}, held: 2, has: 8},
		"a chunk that the mark lacks":     {marked: []workerproto.Chunk{one, two}, kept: []workerproto.Chunk{two, three}, held: 3, has: 14},
		"a chunk that nobody has":         {marked: []workerproto.Chunk{one}, kept: []workerproto.Chunk{three}, held: -1},
		"another boot":                    {change: func(h *head, _ *mark) { h.Boot = "yesterday" }, held: -1},
		"a clock that went back":          {change: func(_ *head, m *mark) { m.Renewed = 2 * time.Hour }, held: -1},
		"another worker's":                {change: func(h *head, _ *mark) { h.WorkerID = "worker-2" }, held: -1},
		"an executor that is not here":    {change: func(h *head, _ *mark) { h.Executor = "process" }, held: -1},
		"the lease is just not over":      {change: func(h *head, m *mark) { m.Renewed = time.Hour - h.Life }, held: 0},
		"the lease is over":               {change: func(h *head, m *mark) { m.Renewed = time.Hour - h.Life - 1 }, held: -1},
		"the lease was given up":          {change: func(_ *head, m *mark) { m.Stop = executor.StopLeaseLost }, held: -1},
		"only a part of its input":        {change: func(_ *head, m *mark) { m.Fed = false }, held: -1},
		"it was being stopped":            {change: func(_ *head, m *mark) { m.Stop = executor.StopCancel }, held: 0},
		"a hash that cannot be continued": {marked: []workerproto.Chunk{one}, change: func(_ *head, m *mark) { m.Output.Sum = []byte("x") }, held: -1},
		"its result is in the spool":      {marked: []workerproto.Chunk{one}, result: true, held: 0},
	} {
		t.Run(name, func(t *testing.T) {
			dir, l := t.TempDir(), lease(1)
			sp, err := spool.Open(filepath.Join(dir, "spool"), spool.Options{SyncAfter: time.Hour})
			if err != nil {
				t.Fatal(err)
			}
			m := mark{Renewed: time.Hour - time.Second, Started: time.Hour - time.Minute, Fed: true, Output: output.First(1 << 20)}
			for _, c := range c.marked {
				if err := m.Output.Add(c); err != nil {
					t.Fatal(err)
				}
			}
			for _, k := range c.kept {
				if err := sp.Append(keyOf(l), spool.Chunk{Seq: k.Seq, Offset: k.Offset, Stream: string(k.Stream), Data: k.Data}); err != nil {
					t.Fatal(err)
				}
			}
			if c.result {
				frame, err := workerproto.Encode(workerproto.TypeResult, workerproto.Result{WorkerID: me, Lease: l, Outcome: job.OutcomeSucceeded})
				if err == nil {
					err = sp.PutResult(keyOf(l), frame)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			h := head{WorkerID: me, Boot: "today", Executor: job.ExecutorDocker, Lease: l, Life: 45 * time.Second, Spec: spec(), Handle: json.RawMessage(`{}`)}
			h.Spec.LogMaxBytes = 1 << 20
			if c.change != nil {
				c.change(&h, &m)
			}
			j, err := journal.Open(filepath.Join(dir, "attempts"))
			if err != nil {
				t.Fatal(err)
			}
			e, err := j.Create("x", h, m)
			if err != nil {
				t.Fatal(err)
			}
			_, _ = e.Close(), sp.Close()

			if sp, err = spool.Open(filepath.Join(dir, "spool"), spool.Options{SyncAfter: time.Hour}); err != nil {
				t.Fatal(err)
			}
			defer sp.Close()
			x := &adopter{text: text}
			r, err := New(Config{
				WorkerID: me, Offer: Offer{Slots: 1}, Executors: map[string]executor.Executor{x.Name(): x}, Spool: sp, Clock: &fakeClock{now: time.Hour},
				Usage: func() Usage { return Usage{} }, Logger: slog.New(slog.DiscardHandler), Journal: j, Boot: "today",
			})
			if err != nil {
				t.Fatal(err)
			}
			held := r.Holding()
			if c.held < 0 {
				if len(held) != 0 || x.past != nil || !j.Empty() || sp.Usage().Live != 0 {
					t.Fatalf("holds %+v, adopted %+v", held, x.past)
				}
				return
			}
			if len(held) != 1 || held[0].Lease != l || held[0].LastSeq != c.held {
				t.Fatalf("holds %+v", held)
			}
			if c.result {
				if x.past != nil || !j.Empty() {
					t.Error("was adopted, although there is a result")
				}
				return
			}
			if x.past.Ran != time.Minute || x.past.Stop != m.Stop || r.Busy() != 1 {
				t.Errorf("the past is %+v", x.past)
			}
			r.Begin()
			r.done.Wait()
			if !j.Empty() {
				t.Error("the journal has an entry of a command that has ended")
			}
			blob, err := sp.Result(keyOf(l))
			if err != nil {
				t.Fatal(err)
			}
			var res workerproto.Result
			if err := workerproto.Decode(blob, &res); err != nil {
				t.Fatal(err)
			}
			all := append([]workerproto.Chunk{}, c.marked...)
			if c.has == 14 {
				all = append(all, three)
			}
			var rest strings.Builder
			for _, tail := range res.Tail {
				rest.Write(tail.Data)
			}
			if rest.String() != text[c.has:] {
				t.Errorf("went on with %q", rest.String())
			}
			checkManifest(t, append(all, res.Tail...), res.Manifest)
			r.Ack(workerproto.Ack{Results: []workerproto.Lease{l}})
		})
	}
}
