package edge

import (
	"context"
	"errors"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/fleet"
	"github.com/cmdexec/cmdexec/services/worker-edge/internal/session"
)

// busPort is the bus as sessions want it.
type busPort struct{ *bus.Conn }

func (b busPort) PutWorker(ctx context.Context, w fleet.Worker) error { return b.Workers().Put(ctx, w) }

func (b busPort) Worker(ctx context.Context, workerID string) (fleet.Worker, error) {
	w, err := b.Workers().Get(ctx, workerID)
	if errors.Is(err, bus.ErrNotFound) {
		return fleet.Worker{}, nil
	}
	return w, err
}

func (b busPort) UpdateWorker(ctx context.Context, workerID string, change func(*fleet.Worker) bool) error {
	return b.Workers().Update(ctx, workerID, change)
}

func (b busPort) WatchWorkers(ctx context.Context, handle func(fleet.Worker)) error {
	return b.Workers().Watch(ctx, handle)
}

func (b busPort) ServeCommands(workerID string, handle func(context.Context, busmsg.WorkerCommand) busmsg.WorkerCommandReply) (session.Subscription, error) {
	return b.Conn.ServeCommands(workerID, handle)
}

// CommandsServed sends a command that asks for nothing.
func (b busPort) CommandsServed(ctx context.Context, workerID string) (bool, error) {
	_, err := b.SendCommand(ctx, workerID, busmsg.WorkerCommand{})
	if errors.Is(err, bus.ErrNoResponder) {
		return false, nil
	}
	return err == nil, err
}
