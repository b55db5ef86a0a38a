package lead

import (
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/job"
)

// A worker's backoff ends while the registry fails and nothing may be decided. The
// loop must wait for the latter: in a bubble, whose clock moves only when everybody
// waits, a loop that turns without rest never ends.
func TestTheLoopRestsWhileItMayNotDecide(t *testing.T) {
	inBubble(t, func(w *world) {
		deaf := w.machine("deaf", 1)
		deaf.hello()
		w.bus.mu.Lock()
		w.bus.command = func(workerID string, cmd busmsg.WorkerCommand) (busmsg.WorkerCommandReply, error) {
			if workerID == "deaf" {
				return busmsg.WorkerCommandReply{}, bus.ErrNoResponder
			}
			return delivered(w.bus.sessions[workerID], cmd), nil
		}
		w.bus.mu.Unlock()
		first := w.submit()
		require.Equal(t, job.Queued, w.job(first).State, "given back; the worker is left alone for a tenth of a second")

		w.after(60 * time.Millisecond)
		w.bus.mu.Lock()
		w.bus.failing = errors.Join(bus.ErrUnavailable)
		w.bus.mu.Unlock()
		other := w.machine("other", 2)
		other.hello() // and writes fail for a tenth of a second from now on
		w.after(time.Second)
		w.bus.mu.Lock()
		w.bus.failing = nil
		w.bus.mu.Unlock()
		w.after(5 * time.Second)
		require.Equal(t, job.Assigned, w.job(first).State)
	})
}
