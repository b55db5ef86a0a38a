package socket_test

import (
	"context"
	"errors"
	"slices"
	"sync"

	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/fleet"
	"github.com/cmdexec/cmdexec/services/worker-edge/internal/session"
)

// memBus is a bus whose faults a test chooses. The tests of the edge with the
// real one are in the root package.
type memBus struct {
	mu       sync.Mutex
	workers  map[string]fleet.Worker
	watchers map[int]func(fleet.Worker)
	next     int
	commands map[string][]*memSub
	beats    []busmsg.BeatRequest
	chunks   map[string][][]byte // by job
	results  []busmsg.Result

	scheduler func(busmsg.BeatRequest) (busmsg.BeatReply, error) // nil: nobody leads
	onChunks  func(jobID string, frames [][]byte) (int, error)   // nil: stores all
	onResult  func(busmsg.Result) error                          // nil: stores
	onPut     func(context.Context) error                        // before a registration is stored; nil: nothing
}

var errAway = errors.New("away")

func newMemBus() *memBus {
	b := &memBus{
		workers: map[string]fleet.Worker{}, watchers: map[int]func(fleet.Worker){}, commands: map[string][]*memSub{}, chunks: map[string][][]byte{},
	}
	b.scheduler = confirmAll
	return b
}

// confirmAll is a scheduler to whom every lease is current.
func confirmAll(r busmsg.BeatRequest) (busmsg.BeatReply, error) {
	reply := busmsg.BeatReply{SchedulerID: "scheduler-test"}
	for _, w := range r.Workers {
		wr := busmsg.WorkerReply{WorkerID: w.WorkerID, SessionID: w.SessionID}
		for _, l := range w.Holding {
			wr.Confirmed = append(wr.Confirmed, l.LeaseID)
		}
		if w.Heartbeat != nil {
			for _, l := range w.Heartbeat.Running {
				wr.Confirmed = append(wr.Confirmed, l.LeaseID)
			}
		}
		if w.Hello != nil || w.Heartbeat != nil {
			reply.Workers = append(reply.Workers, wr)
		}
	}
	return reply, nil
}

func (b *memBus) set(f func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f()
}

func (b *memBus) PutWorker(ctx context.Context, w fleet.Worker) error {
	b.mu.Lock()
	before := b.onPut
	b.mu.Unlock()
	if before != nil {
		if err := before(ctx); err != nil {
			return err
		}
	}
	b.mu.Lock()
	b.workers[w.ID] = w
	watchers := b.watching()
	b.mu.Unlock()
	for _, f := range watchers {
		f(w)
	}
	return nil
}

func (b *memBus) watching() []func(fleet.Worker) {
	var fs []func(fleet.Worker)
	for _, f := range b.watchers {
		fs = append(fs, f)
	}
	return fs
}

func (b *memBus) worker(id string) fleet.Worker {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.workers[id]
}

func (b *memBus) Worker(_ context.Context, workerID string) (fleet.Worker, error) {
	return b.worker(workerID), nil
}

func (b *memBus) UpdateWorker(_ context.Context, workerID string, change func(*fleet.Worker) bool) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	w := b.workers[workerID]
	if change(&w) {
		b.workers[workerID] = w
	}
	return nil
}

func (b *memBus) WatchWorkers(ctx context.Context, handle func(fleet.Worker)) error {
	b.mu.Lock()
	n := b.next
	b.next++
	b.watchers[n] = handle
	b.mu.Unlock()
	<-ctx.Done()
	b.set(func() { delete(b.watchers, n) })
	return ctx.Err()
}

func (b *memBus) RequestBeat(_ context.Context, r busmsg.BeatRequest) (busmsg.BeatReply, error) {
	r.Workers = slices.Clone(r.Workers) // they are the caller's
	b.mu.Lock()
	f := b.scheduler
	if f != nil {
		b.beats = append(b.beats, r)
	}
	b.mu.Unlock()
	if f == nil {
		return busmsg.BeatReply{}, errAway
	}
	return f(r)
}

type memSub struct {
	b        *memBus
	workerID string
	handle   func(context.Context, busmsg.WorkerCommand) busmsg.WorkerCommandReply
}

func (s *memSub) Unsubscribe() error {
	s.b.mu.Lock()
	defer s.b.mu.Unlock()
	var left []*memSub
	for _, o := range s.b.commands[s.workerID] {
		if o != s {
			left = append(left, o)
		}
	}
	s.b.commands[s.workerID] = left
	return nil
}

func (b *memBus) ServeCommands(workerID string, handle func(context.Context, busmsg.WorkerCommand) busmsg.WorkerCommandReply) (session.Subscription, error) {
	s := &memSub{b: b, workerID: workerID, handle: handle}
	b.set(func() { b.commands[workerID] = append(b.commands[workerID], s) })
	return s, nil
}

func (b *memBus) serving(workerID string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.commands[workerID])
}

func (b *memBus) CommandsServed(_ context.Context, workerID string) (bool, error) {
	return b.serving(workerID) > 0, nil
}

// command sends to whoever takes the worker's commands; false: nobody.
func (b *memBus) command(workerID string, c busmsg.WorkerCommand) (busmsg.WorkerCommandReply, bool) {
	b.mu.Lock()
	subs := b.commands[workerID]
	b.mu.Unlock()
	if len(subs) == 0 {
		return busmsg.WorkerCommandReply{}, false
	}
	return subs[0].handle(context.Background(), c), true
}

func (b *memBus) PublishChunks(_ context.Context, jobID string, frames [][]byte) (int, error) {
	b.mu.Lock()
	f := b.onChunks
	b.mu.Unlock()
	n, err := len(frames), error(nil)
	if f != nil {
		n, err = f(jobID, frames)
	}
	b.set(func() { b.chunks[jobID] = append(b.chunks[jobID], frames[:n]...) })
	return n, err
}

func (b *memBus) stored(jobID string) [][]byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.chunks[jobID]
}

func (b *memBus) PublishResult(_ context.Context, r busmsg.Result) error {
	b.mu.Lock()
	f := b.onResult
	b.mu.Unlock()
	if f != nil {
		if err := f(r); err != nil {
			return err
		}
	}
	b.set(func() { b.results = append(b.results, r) })
	return nil
}
