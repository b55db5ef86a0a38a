package bus

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"sync"

	"github.com/nats-io/nats.go"

	"github.com/cmdexec/cmdexec/libs/core/busmsg"
)

const (
	commandLanes = 8
	lanePending  = 1024 // commands of all workers of a lane, before further ones are dropped
)

// CommandHandler answers a command of one worker.
type CommandHandler func(context.Context, busmsg.WorkerCommand) busmsg.WorkerCommandReply

// commands takes the commands of all workers that are served over a connection. An
// edge has ten thousand of them, and nearly all are idle, so none has a goroutine
// to itself: they share a few lanes.
type commands struct {
	c     *Conn
	seed  maphash.Seed
	start sync.Once
	lanes [commandLanes]lane
}

// lane handles the commands of some workers, one after the other in the order in
// which they came.
type lane struct {
	in chan *nats.Msg

	turn   sync.Mutex // held while a handler runs
	served map[*nats.Subscription]served
}

// served is one worker.
type served struct {
	workerID string
	handle   CommandHandler
}

func newCommands(c *Conn) *commands {
	return &commands{c: c, seed: maphash.MakeSeed()}
}

// lane is where a worker's commands go.
func (m *commands) lane(workerID string) *lane {
	m.start.Do(func() {
		for i := range m.lanes {
			m.lanes[i].in, m.lanes[i].served = make(chan *nats.Msg, lanePending), map[*nats.Subscription]served{}
			m.c.spawn(func() { m.run(&m.lanes[i]) })
		}
	})
	return &m.lanes[maphash.String(m.seed, workerID)%commandLanes]
}

// run handles what comes in a lane for as long as it could be answered.
func (m *commands) run(l *lane) {
	for {
		select {
		case msg := <-l.in:
			m.take(l, msg)
		case <-m.c.closed:
			return
		}
	}
}

func (m *commands) take(l *lane, msg *nats.Msg) {
	l.turn.Lock()
	defer l.turn.Unlock()
	s, ok := l.served[msg.Sub]
	if !ok {
		return // not served any more
	}
	var reply busmsg.WorkerCommandReply
	err := m.c.guarded("commands", func() error {
		var cmd busmsg.WorkerCommand
		if err := json.Unmarshal(msg.Data, &cmd); err != nil {
			return fmt.Errorf("%w: command: %w", ErrMalformed, err)
		}
		reply = s.handle(m.c.life, cmd)
		return nil
	})
	if err != nil {
		m.c.log.Warn("command was not answered", "worker", s.workerID, "err", err)
		return
	}
	m.c.respond(msg, reply)
}

// laneSubscription is a worker's place in a lane.
type laneSubscription struct {
	lane *lane
	sub  *nats.Subscription
}

// Unsubscribe implements Subscription.
func (s laneSubscription) Unsubscribe() error {
	err := s.sub.Unsubscribe()
	s.lane.turn.Lock()
	delete(s.lane.served, s.sub)
	s.lane.turn.Unlock()
	if ended(err) {
		return nil
	}
	return err
}

// SendCommand reaches the edge that holds a worker's session. ErrNoResponder,
// ErrUnavailable and ErrTooLarge are definitive: not delivered. After any other
// error it may have been. It waits for ctx, and at most five seconds.
func (c *Conn) SendCommand(ctx context.Context, workerID string, cmd busmsg.WorkerCommand) (busmsg.WorkerCommandReply, error) {
	subject, err := commandSubject(workerID)
	if err != nil {
		return busmsg.WorkerCommandReply{}, fmt.Errorf("command: %w", errors.Join(ErrNoResponder, err))
	}
	reply, _, err := ask[busmsg.WorkerCommandReply](ctx, c, subject, cmd)
	if err != nil {
		return reply, fmt.Errorf("command: %w", err)
	}
	return reply, nil
}

// ServeCommands answers the commands of one worker, one after the other in the
// order of their sending, until Unsubscribe. handle must not block: commands of other
// workers wait for it. Its context ends with the connection. Where two edges serve
// one worker both get its commands, and the first reply counts.
func (c *Conn) ServeCommands(workerID string, handle CommandHandler) (Subscription, error) {
	subject, err := commandSubject(workerID)
	if err != nil {
		return nil, fmt.Errorf("serve commands: %w", err)
	}
	l := c.commands.lane(workerID)
	l.turn.Lock() // nothing of it is taken before it is known
	sub, err := c.nc.ChanSubscribe(subject, l.in)
	if err == nil {
		l.served[sub] = served{workerID, handle}
	}
	l.turn.Unlock()
	if err != nil {
		return nil, fmt.Errorf("serve commands: %w", err)
	}
	return c.settled(laneSubscription{l, sub})
}
