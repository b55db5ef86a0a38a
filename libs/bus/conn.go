package bus

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// InProcessConnProvider gives connections that do not go through the network: the
// embedded server is one.
type InProcessConnProvider interface {
	InProcessConn() (net.Conn, error)
}

// Options says how to reach the bus.
type Options struct {
	URL       string                // one or several, with commas; ignored when InProcess is set
	InProcess InProcessConnProvider // the embedded server
	CredsFile string                // of NATS decentralised authentication; may be empty
	Name      string                // shown by the server
	Logger    *slog.Logger          // nil discards
}

const (
	closeTimeout   = 5 * time.Second
	recheckEvery   = 30 * time.Second
	usageEvery     = time.Second
	bindRetryAfter = 250 * time.Millisecond
	waitQuietly    = 2 * time.Second // for a server that is about to come
	waitAgain      = 30 * time.Second
)

// Conn is a connection to the bus.
type Conn struct {
	nc        *nats.Conn
	js        jetstream.JetStream
	mux       *mux
	commands  *commands
	log       *slog.Logger
	inProcess bool
	promised  Durability // set by Dial before it returns

	life   context.Context // ends with Close
	end    context.CancelFunc
	closed chan struct{} // closed when the connection is

	watchOnce sync.Once
	closeOnce sync.Once
	count     counters
	usage     usage
	trimmed   trimmed

	mu          sync.Mutex
	closing     bool
	background  sync.WaitGroup // grows under mu and only while not closing
	serverID    string
	bound       bool
	problems    map[string]string // what is wrong, by where
	onReconnect []func()
	reconnected chan struct{} // closed and replaced at each reconnect
}

// Stats counts what happened on a connection since it was made.
type Stats struct {
	Writes      uint64 // acknowledged registry writes
	Conflicts   uint64 // compare-and-swaps that lost a race
	Spurious    uint64 // compare-and-swaps refused although nobody else had written
	Refused     uint64 // events that the state table refused
	Ambiguous   uint64 // registry writes without an answer
	QueueFull   uint64 // creates refused because the registry is full
	DeadLetters uint64
	Redelivered uint64 // messages that reached a consumer here not for the first time
	Panics      uint64 // recovered in handlers
	Malformed   uint64 // stored messages that could not be read, and were skipped
	Restarts    uint64 // of followers
	Reconnects  uint64
}

type counters struct {
	writes, conflicts, spurious, refused, ambiguous, queueFull atomic.Uint64
	deadLetters, redelivered, panics, malformed                atomic.Uint64
	restarts, reconnects                                       atomic.Uint64
}

// Connect returns once a connection stands, and keeps trying until ctx ends.
// Afterwards the connection reconnects for ever.
func Connect(ctx context.Context, o Options) (*Conn, error) {
	c := &Conn{
		log: o.Logger, inProcess: o.InProcess != nil,
		closed: make(chan struct{}), reconnected: make(chan struct{}), problems: map[string]string{},
	}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	c.life, c.end = context.WithCancel(context.Background())
	c.commands = newCommands(c)
	first := make(chan struct{})
	var firstOnce sync.Once
	arrived := func(nc *nats.Conn) {
		c.mu.Lock()
		c.serverID = life(nc.ConnectedServerId(), nc.ConnectedClusterName())
		c.mu.Unlock()
		firstOnce.Do(func() { close(first) })
	}
	opts := []nats.Option{
		nats.Name(o.Name),
		nats.RetryOnFailedConnect(true),
		nats.MaxReconnects(-1),
		nats.ReconnectWait(500 * time.Millisecond),
		nats.ReconnectJitter(200*time.Millisecond, time.Second),
		// Publishing while disconnected fails at once: nothing is written later that
		// a caller was told had failed.
		nats.ReconnectBufSize(-1),
		nats.PingInterval(10 * time.Second),
		nats.MaxPingsOutstanding(2),
		nats.Timeout(5 * time.Second),
		nats.FlusherTimeout(5 * time.Second), // of one write to the socket
		nats.DrainTimeout(closeTimeout),
		nats.ConnectHandler(arrived),
		nats.ReconnectHandler(func(nc *nats.Conn) {
			arrived(nc)
			c.afterReconnect()
		}),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) {
			c.mux.disconnected()
			if c.life.Err() == nil {
				c.log.Warn("bus connection lost", "err", err)
			}
		}),
		nats.ErrorHandler(func(_ *nats.Conn, sub *nats.Subscription, err error) {
			subject := ""
			if sub != nil {
				subject = sub.Subject
			}
			c.log.Warn("bus reports an error", "subject", subject, "err", err)
		}),
		nats.ClosedHandler(func(*nats.Conn) {
			c.mux.disconnected()
			close(c.closed)
		}),
	}
	if o.CredsFile != "" {
		opts = append(opts, nats.UserCredentials(o.CredsFile))
	}
	address, servers := o.URL, "in this process"
	if o.InProcess != nil {
		opts = append(opts, nats.InProcessServer(o.InProcess))
		address = ""
	} else {
		var err error
		if servers, err = hosts(o.URL); err != nil {
			c.end()
			return nil, err
		}
	}
	// The handlers above use the mux, so it is there before anything can happen.
	c.mux = newMux()
	nc, err := nats.Connect(address, opts...)
	if err != nil {
		c.end()
		return nil, fmt.Errorf("connect to the bus: %w", err)
	}
	c.nc = nc
	if err := c.mux.attach(nc); err != nil {
		c.Close()
		return nil, fmt.Errorf("connect to the bus: %w", err)
	}
	if c.js, err = jetstream.New(nc); err != nil {
		c.Close()
		return nil, fmt.Errorf("connect to the bus: %w", err)
	}
	for wait := waitQuietly; ; wait = waitAgain {
		timer := time.NewTimer(wait)
		select {
		case <-first:
			timer.Stop()
			return c, nil
		case <-timer.C:
			c.log.Warn("waiting for NATS", "servers", servers, "err", nc.LastError())
		case <-ctx.Done():
			timer.Stop()
			last := nc.LastError()
			c.Close()
			return nil, fmt.Errorf("connect to NATS at %s: %w", servers, errors.Join(context.Cause(ctx), last))
		}
	}
}

// hosts lists the servers of an address for people, without what may be secret in
// it. It refuses what the client would try for ever, or would repeat in its errors.
func hosts(addresses string) (string, error) {
	var out []string
	for address := range strings.SplitSeq(addresses, ",") {
		address = strings.TrimSpace(address)
		if !strings.Contains(address, "://") {
			address = "nats://" + address
		}
		u, err := url.Parse(address)
		if err != nil || u.Hostname() == "" || !slices.Contains([]string{"nats", "tls", "ws", "wss"}, u.Scheme) || u.Path != "" && u.Path != "/" && !strings.HasPrefix(u.Scheme, "ws") {
			return "", errors.New("NATS_URL must be an address such as nats://user:password@host:4222, or several with commas between them")
		}
		out = append(out, u.Host)
	}
	return strings.Join(out, ", "), nil
}

func (c *Conn) afterReconnect() {
	c.count.reconnects.Add(1)
	c.log.Info("bus connection is back")
	c.mu.Lock()
	close(c.reconnected)
	c.reconnected = make(chan struct{})
	calls := slices.Clone(c.onReconnect)
	c.mu.Unlock()
	for _, f := range calls {
		c.spawn(f)
	}
}

// spawn runs f on a goroutine that Close waits for. After Close it does nothing.
func (c *Conn) spawn(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closing {
		return
	}
	c.background.Go(f)
}

// nextReconnect returns a channel that is closed at the next reconnect.
func (c *Conn) nextReconnect() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.reconnected
}

// within returns a context that ends with ctx and with the connection's life.
func (c *Conn) within(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(c.life, cancel)
	return ctx, func() { stop(); cancel() }
}

// Close lets running handlers and sent requests finish, at most some seconds,
// and closes the connection. What blocks on the connection returns.
func (c *Conn) Close() {
	c.closeOnce.Do(func() {
		c.mu.Lock()
		c.closing = true
		c.mu.Unlock()
		c.mux.drain(2 * time.Second)
		c.end()
		if err := c.nc.Drain(); err != nil {
			c.nc.Close()
		}
		timer := time.NewTimer(closeTimeout + time.Second)
		defer timer.Stop()
		select {
		case <-c.closed:
		case <-timer.C:
			c.nc.Close()
			<-c.closed
		}
		c.background.Wait()
	})
}

// Bind waits until the topology is as Apply makes it, or ctx ends; the error then
// names what is missing or differs.
func (c *Conn) Bind(ctx context.Context) error {
	for {
		wrong := c.check(ctx)
		if len(wrong) == 0 {
			c.mu.Lock()
			c.bound = true
			c.mu.Unlock()
			c.refreshUsage(ctx)
			c.startWatching()
			return nil
		}
		if !pause(ctx, bindRetryAfter) || c.life.Err() != nil {
			return fmt.Errorf("bind to the bus: %s", strings.Join(wrong, "; "))
		}
	}
}

// startWatching keeps Usage and Ready fresh until Close.
func (c *Conn) startWatching() {
	c.watchOnce.Do(func() {
		c.spawn(func() {
			usage := time.NewTicker(usageEvery)
			defer usage.Stop()
			recheck := time.NewTicker(recheckEvery)
			defer recheck.Stop()
			again := c.nextReconnect()
			for {
				select {
				case <-c.life.Done():
					return
				case <-usage.C:
					c.refreshUsage(c.life)
				case <-again:
					again = c.nextReconnect()
					c.recheck()
				case <-recheck.C:
					c.recheck()
				}
			}
		})
	})
}

func (c *Conn) recheck() {
	ctx, cancel := context.WithTimeout(c.life, answerTimeout)
	defer cancel()
	wrong := c.check(ctx)
	if ctx.Err() != nil {
		return
	}
	c.setProblem("topology", strings.Join(wrong, "; "))
}

// setProblem notes what is wrong somewhere, or that nothing is any more ("").
// It logs changes only.
func (c *Conn) setProblem(where, what string) {
	c.mu.Lock()
	before := c.problems[where]
	if what == "" {
		delete(c.problems, where)
	} else {
		c.problems[where] = what
	}
	c.mu.Unlock()
	switch {
	case what == before:
	case what == "":
		c.log.Info("bus problem is over", "where", where)
	default:
		c.log.Error("bus problem", "where", where, "problem", what)
	}
}

// Ready returns nil when connected and bound, else what is missing.
func (c *Conn) Ready() error {
	if s := c.nc.Status(); s != nats.CONNECTED {
		return fmt.Errorf("%w: %s", ErrUnavailable, strings.ToLower(s.String()))
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.bound {
		return fmt.Errorf("%w: not bound yet", ErrUnavailable)
	}
	if len(c.problems) == 0 {
		return nil
	}
	all := make([]string, 0, len(c.problems))
	for where, what := range c.problems {
		all = append(all, where+": "+what)
	}
	slices.Sort(all)
	return fmt.Errorf("%w: %s", ErrUnavailable, strings.Join(all, "; "))
}

// life names what restarts as a whole. Services are connected to different servers
// of a cluster and must agree on it. A cluster keeps what was committed while any
// of its servers restarts, and a purge is in the log of most of them, so that it
// has one life.
func life(serverID, cluster string) string {
	if cluster != "" {
		return "cluster:" + cluster
	}
	return serverID
}

// ServerID identifies the life of the server that the connection is to, or was
// to when it is not: it changes when the server restarts. The servers of a
// cluster share one that stays.
func (c *Conn) ServerID() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.serverID
}

// ServerVersion is the version of the NATS server; empty while disconnected.
func (c *Conn) ServerVersion() string { return c.nc.ConnectedServerVersion() }

// OnReconnect has f called, on a goroutine of its own, after each reconnect.
// Close waits for it.
func (c *Conn) OnReconnect(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.onReconnect = append(c.onReconnect, f)
}

// Stats returns the counters.
func (c *Conn) Stats() Stats {
	n := &c.count
	return Stats{
		Writes: n.writes.Load(), Conflicts: n.conflicts.Load(), Spurious: n.spurious.Load(),
		Refused: n.refused.Load(), Ambiguous: n.ambiguous.Load(), QueueFull: n.queueFull.Load(),
		DeadLetters: n.deadLetters.Load(), Redelivered: n.redelivered.Load(), Panics: n.panics.Load(),
		Malformed: n.malformed.Load(), Restarts: n.restarts.Load(), Reconnects: n.reconnects.Load(),
	}
}

// pause waits and reports whether ctx is still on.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

// backoff doubles from least to most with each further try (from 1).
func backoff(try int, least, most time.Duration) time.Duration {
	d := least
	for i := 1; i < try && d < most; i++ {
		d *= 2
	}
	return min(d, most)
}
