package edge_test

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/natsd/natsdtest"
	"github.com/cmdexec/cmdexec/services/worker-edge/internal/workertest"
)

// A result goes to a collector that answers, and by RESULTS where none does, or
// where it does not answer in time; then it is not asked again for a while.
func TestResultsGoToACollector(t *testing.T) {
	o := inProcess(natsdtest.Start(t))
	w := newWorld(t, o)
	w.lead()
	url, _, _ := w.edge(o)
	c := open(t, url, "worker-a")
	byStream := w.results()
	var asked atomic.Int64
	frozen := make(chan struct{})
	serve := func(handle func(context.Context, busmsg.Result) (busmsg.Settled, error)) (stop func()) {
		sub, err := bus.Serve(w.conn, bus.SettleResult, func(ctx context.Context, r busmsg.Result) (busmsg.Settled, error) {
			asked.Add(1)
			return handle(ctx, r)
		})
		require.NoError(t, err)
		return func() { require.NoError(t, sub.Unsubscribe()) }
	}
	report := func() {
		l := w.assign("worker-a")
		c.NextOf(workerproto.TypeAssign)
		res := result(l)
		c.Send(workerproto.TypeResult, res)
		require.Equal(t, []workerproto.Lease{l}, workertest.Decode[workerproto.Ack](t, c.NextOf(workerproto.TypeAck)).Results)
	}

	stop := serve(func(_ context.Context, r busmsg.Result) (busmsg.Settled, error) {
		if r.WorkerID != "worker-a" || r.EdgeID == "" || r.ReceivedAt.IsZero() {
			t.Errorf("the collector got %+v", r)
		}
		return busmsg.Settled{}, nil
	})
	report()
	report()
	require.EqualValues(t, 2, asked.Load())
	require.Empty(t, byStream())
	stop()

	stop = serve(func(ctx context.Context, _ busmsg.Result) (busmsg.Settled, error) {
		select {
		case <-frozen:
		case <-ctx.Done():
		}
		return busmsg.Settled{}, ctx.Err()
	})
	defer stop()
	began := time.Now()
	report()
	report()
	require.Less(t, time.Since(began), 4*time.Second)
	require.EqualValues(t, 3, asked.Load(), "not asked again at once")
	w.eventually("both are on the bus", func() bool { return len(byStream()) == 2 })
}
