package bus

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
)

// Durability is what an acknowledged write survives, as the server has it.
type Durability string

// The levels of durability, each more than the one before.
const (
	DurabilityNone       Durability = "none"       // a power cut may lose it: the server does not sync every write
	DurabilityCommitted  Durability = "committed"  // it survives a power cut
	DurabilityReplicated Durability = "replicated" // it survives the loss of one of three servers
)

// parse checks a level that came from outside and fills in the default.
func (d *Durability) parse() error {
	switch *d {
	case DurabilityCommitted, DurabilityReplicated:
		return nil
	case "":
		*d = DurabilityCommitted
		return nil
	default:
		return errors.New("DURABILITY must be committed or replicated")
	}
}

func (d Durability) covers(want Durability) bool {
	return d == want || d == DurabilityReplicated && want == DurabilityCommitted
}

// Settings say where the bus is and what it must promise, as every service takes
// them from the environment.
type Settings struct {
	URL        string `envconfig:"NATS_URL" default:"nats://127.0.0.1:4222" desc:"address of NATS, or several with commas"`
	CredsFile  string `envconfig:"NATS_CREDS" desc:"credentials file of NATS"`
	Durability string `envconfig:"DURABILITY" default:"committed" desc:"what NATS must give, as it says itself: committed or replicated"`
	MonitorURL string `envconfig:"NATS_MONITOR_URL" desc:"monitoring address of NATS, for example http://nats:8222; asked for the durability where this user may not ask over NATS"`
}

// Dial is Connect with the settings of a service, and the check that the server
// gives the durability that is asked for. It keeps trying until ctx ends or the
// server is found to give less; servers of a cluster have a minute to find each other.
func Dial(ctx context.Context, cfg Settings, name string, logger *slog.Logger) (*Conn, error) {
	want := Durability(cfg.Durability)
	if err := want.parse(); err != nil {
		return nil, err
	}
	c, err := Connect(ctx, Options{URL: cfg.URL, CredsFile: cfg.CredsFile, Name: name, Logger: logger})
	if err != nil {
		return nil, err
	}
	together := time.Now().Add(clusterTimeout)
	for try := 1; ; try++ {
		have, err := c.Durability(ctx, cfg.MonitorURL)
		switch {
		case err == nil && have.covers(want):
			c.promised = have
			return c, nil
		case err == nil && have == DurabilityCommitted && c.nc.ConnectedClusterName() != "" && time.Now().Before(together):
			err = errors.New("not all servers of the cluster have answered")
		case err == nil:
			c.Close()
			return nil, fmt.Errorf("the NATS server gives durability %q and %q is asked for: set `sync_interval: always` in its "+
				"jetstream block, and for replicated run three such servers", have, want)
		case errors.Is(err, errCannotAsk):
			c.Close()
			return nil, err
		}
		c.log.Warn("NATS does not give the durability that is asked for yet, tried again", "err", err)
		if !pause(ctx, backoff(try, 100*time.Millisecond, 5*time.Second)) {
			c.Close()
			return nil, fmt.Errorf("read the durability of NATS: %w", err)
		}
	}
}

// Promised is the durability that Dial found; empty for a connection of Connect.
func (c *Conn) Promised() Durability { return c.promised }

const (
	subjectJetStream  = "$SYS.REQ.SERVER.PING.JSZ"
	durabilityTimeout = 2 * time.Second
)

// errCannotAsk: nobody will ever answer the question as things are set up.
var errCannotAsk = errors.New("whether NATS syncs every write cannot be read: let this account import the service " +
	subjectJetStream + " from the system account (see docs/operations.md), or set NATS_MONITOR_URL")

// jetStreamReport is the part of a server's report on JetStream that counts here.
type jetStreamReport struct {
	Config struct {
		SyncAlways bool `json:"sync_always"`
	} `json:"config"`
	Meta *struct {
		Size int `json:"cluster_size"`
	} `json:"meta_cluster"`
}

// Durability asks the server itself: over the connection where this user may, else
// at its monitoring address where one is given. Replicated means that all of at
// least three servers sync every write and that the registry has three copies. It blocks for about two seconds at most.
func (c *Conn) Durability(ctx context.Context, monitorURL string) (Durability, error) {
	ctx, cancel := context.WithTimeout(ctx, durabilityTimeout)
	defer cancel()
	reports, err := c.askServers(ctx)
	if errors.Is(err, ErrNoResponder) {
		if monitorURL == "" {
			return "", errCannotAsk
		}
		reports, err = askMonitor(ctx, monitorURL)
	}
	if err != nil {
		return "", err
	}
	have := level(reports)
	if have == DurabilityReplicated && !c.copies(ctx) {
		return DurabilityCommitted, nil
	}
	return have, nil
}

// copies reports whether the registry is kept by as many servers as replicated
// promises, or is not made yet.
func (c *Conn) copies(ctx context.Context) bool {
	s, err := c.js.Stream(ctx, streamJobs)
	return err != nil || s.CachedInfo().Config.Replicas >= Replicas
}

// Replicas is how many servers keep each stream where replicated is asked for.
const Replicas = 3

func level(reports []jetStreamReport) Durability {
	for _, r := range reports {
		if !r.Config.SyncAlways {
			return DurabilityNone
		}
	}
	if len(reports) >= Replicas {
		return DurabilityReplicated
	}
	return DurabilityCommitted
}

// askServers asks all servers, and waits for as many answers as the first one says
// that there are servers.
func (c *Conn) askServers(ctx context.Context) ([]jetStreamReport, error) {
	inbox := nats.NewInbox()
	sub, err := c.nc.SubscribeSync(inbox)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	defer func() { _ = sub.Unsubscribe() }() // a closed connection has none
	if err := c.nc.PublishRequest(subjectJetStream, inbox, []byte(`{"config":true}`)); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	var reports []jetStreamReport
	for want := 1; len(reports) < want; {
		msg, err := sub.NextMsgWithContext(ctx)
		switch {
		case errors.Is(err, nats.ErrNoResponders):
			return nil, ErrNoResponder
		case err != nil:
			return nil, fmt.Errorf("%w: %d of %d servers said whether they sync: %w", ErrUnavailable, len(reports), want, err)
		}
		var answer struct {
			Data jetStreamReport `json:"data"`
		}
		if err := json.Unmarshal(msg.Data, &answer); err != nil {
			return nil, fmt.Errorf("%w: report of a server: %w", ErrMalformed, err)
		}
		reports = append(reports, answer.Data)
		if answer.Data.Meta != nil {
			want = max(want, answer.Data.Meta.Size)
		}
	}
	return reports, nil
}

// askMonitor reads one server's monitoring address: enough to know that it syncs,
// not to know what the others do.
func askMonitor(ctx context.Context, monitorURL string) ([]jetStreamReport, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimRight(monitorURL, "/")+"/jsz?config=true", nil)
	if err != nil {
		return nil, errors.New("NATS_MONITOR_URL must be an address such as http://nats:8222")
	}
	resp, err := (&http.Client{}).Do(req)
	if err != nil {
		return nil, fmt.Errorf("%w: monitoring address: %w", ErrUnavailable, err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%w: monitoring address: %s", ErrUnavailable, resp.Status)
	}
	var report jetStreamReport
	if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&report); err != nil {
		return nil, fmt.Errorf("%w: report of the monitoring address: %w", ErrMalformed, err)
	}
	return []jetStreamReport{report}, nil
}
