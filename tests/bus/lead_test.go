package bus_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/natsd/natsdtest"
)

// reign notes who leads.
type reign struct {
	mu     sync.Mutex
	leader string
	most   int
	at     map[string]time.Time
	now    int
}

func (r *reign) lead(name string) func(context.Context) error {
	return func(ctx context.Context) error {
		r.mu.Lock()
		if r.at == nil {
			r.at = map[string]time.Time{}
		}
		r.leader, r.at[name] = name, time.Now()
		r.now++
		r.most = max(r.most, r.now)
		r.mu.Unlock()
		<-ctx.Done()
		r.mu.Lock()
		r.now--
		r.mu.Unlock()
		return ctx.Err()
	}
}

func (r *reign) is(name string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.leader == name
}

func TestLeadHandover(t *testing.T) {
	c := start(t)
	var r reign
	run := func(name string) (stop func()) {
		ctx, cancel := context.WithCancel(testContext(t))
		done := make(chan error, 1)
		go func() { done <- c.Lead(ctx, name, r.lead(name)) }()
		return func() {
			cancel()
			require.ErrorIs(t, <-done, context.Canceled)
		}
	}
	stopA := run("scheduler-a")
	eventually(t, func() bool { return r.is("scheduler-a") }, "the first one leads")
	stopB := run("scheduler-b")
	began := time.Now()
	stopA()
	eventually(t, func() bool { return r.is("scheduler-b") }, "the other one takes over")
	require.Less(t, time.Since(began), 5*time.Second, "leadership was given up, so nobody waits for it to run out")
	stopB()
	require.Equal(t, 1, r.most, "one at a time")

	// What lead returns by itself ends it.
	broken := errors.New("broken")
	require.ErrorIs(t, c.Lead(testContext(t), "scheduler-c", func(context.Context) error { return broken }), broken)
	require.NoError(t, c.Lead(testContext(t), "scheduler-c", func(context.Context) error { return nil }))
}

// A leader that is gone without a word is followed after its lease, unless the
// server itself has restarted with everything in the process.
func TestLeadAfterALoss(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := natsdtest.StartIn(t, dir)
	var r reign

	first, err := bus.Connect(testContext(t), bus.Options{InProcess: s})
	require.NoError(t, err)
	require.NoError(t, bus.Apply(testContext(t), first, smallSizes()))
	lost := make(chan error, 1)
	go func() { lost <- first.Lead(context.Background(), "scheduler-a", r.lead("scheduler-a")) }()
	eventually(t, func() bool { return r.is("scheduler-a") }, "the first one leads")

	// Its process is gone: in this one, its server.
	s.Shutdown()
	s = natsdtest.StartIn(t, dir)
	second := connect(t, s)
	began := time.Now()
	inBackground(t, func(ctx context.Context) error { return second.Lead(ctx, "scheduler-b", r.lead("scheduler-b")) })
	eventually(t, func() bool { return r.is("scheduler-b") }, "taken over")
	require.Less(t, time.Since(began), 5*time.Second, "the restart of an all-in-one does not wait")
	first.Close()
	require.ErrorIs(t, <-lost, context.Canceled)

	// The same over the network: candidates know nothing of each other's servers.
	p := newProcess(t)
	third := connectTo(t, p.url())
	bind(t, third, smallSizes())
	go func() { lost <- third.Lead(context.Background(), "scheduler-c", r.lead("scheduler-c")) }()
	eventually(t, func() bool { return r.is("scheduler-c") }, "the first one leads")
	began = time.Now()
	fourth := connectTo(t, p.url())
	p.restart()
	third.Close() // while it cannot give up anything
	require.ErrorIs(t, <-lost, context.Canceled)
	inBackground(t, func(ctx context.Context) error { return fourth.Lead(ctx, "scheduler-d", r.lead("scheduler-d")) })
	eventually(t, func() bool { return r.is("scheduler-d") }, "taken over")
	require.Less(t, time.Since(began), 20*time.Second)
}
