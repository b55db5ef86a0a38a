package scheduler

import (
	"context"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/fleet"
)

// busPort is what a term needs, from a connection.
type busPort struct {
	*bus.Registry
	*bus.Conn
}

func newBusPort(c *bus.Conn) busPort { return busPort{c.Registry(), c} }

// WatchWorkers watches the workers bucket.
func (b busPort) WatchWorkers(ctx context.Context, handle func(fleet.Worker)) error {
	return b.Workers().Watch(ctx, handle)
}

// ResultsPending is how many results have not become states yet.
func (b busPort) ResultsPending(ctx context.Context) (uint64, error) {
	return b.Pending(ctx, bus.ResultsState)
}
