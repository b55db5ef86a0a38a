package edge

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/fleet"
	"github.com/cmdexec/cmdexec/services/worker-edge/internal/session"
)

// A collector that does not answer in time is not asked again for a while.
const (
	settleTimeout = time.Second
	settlePause   = 5 * time.Second
)

// busPort is the bus as sessions want it.
type busPort struct {
	*bus.Conn
	askAgain atomic.Int64 // when collectors are asked again, in nanoseconds
}

// PublishResult has a collector settle a result, and leaves it on the bus where
// none can. It returns when the result is a state, or on disk.
func (b *busPort) PublishResult(ctx context.Context, r busmsg.Result) error {
	if now := time.Now(); now.UnixNano() >= b.askAgain.Load() {
		bounded, cancel := context.WithTimeout(ctx, settleTimeout)
		_, err := bus.Query(bounded, b.Conn, bus.SettleResult, r)
		cancel()
		if err == nil {
			return nil
		}
		b.askAgain.Store(now.Add(settlePause).UnixNano())
	}
	return b.Conn.PublishResult(ctx, r)
}

func (b *busPort) PutWorker(ctx context.Context, w fleet.Worker) error {
	return b.Workers().Put(ctx, w)
}

func (b *busPort) Worker(ctx context.Context, workerID string) (fleet.Worker, error) {
	w, err := b.Workers().Get(ctx, workerID)
	if errors.Is(err, bus.ErrNotFound) {
		return fleet.Worker{}, nil
	}
	return w, err
}

func (b *busPort) UpdateWorker(ctx context.Context, workerID string, change func(*fleet.Worker) bool) error {
	return b.Workers().Update(ctx, workerID, change)
}

func (b *busPort) WatchWorkers(ctx context.Context, handle func(fleet.Worker)) error {
	return b.Workers().Watch(ctx, handle)
}

func (b *busPort) ServeCommands(workerID string, handle func(context.Context, busmsg.WorkerCommand) busmsg.WorkerCommandReply) (session.Subscription, error) {
	return b.Conn.ServeCommands(workerID, handle)
}

// CommandsServed sends a command that asks for nothing.
func (b *busPort) CommandsServed(ctx context.Context, workerID string) (bool, error) {
	_, err := b.SendCommand(ctx, workerID, busmsg.WorkerCommand{})
	if errors.Is(err, bus.ErrNoResponder) {
		return false, nil
	}
	return err == nil, err
}
