package edge

import (
	"errors"
	"fmt"
	"time"

	"github.com/cmdexec/cmdexec/libs/kit/config"
)

// Config is the edge's settings. The zero value serves no listener and limits
// nothing by rate; other zero fields get the defaults of the tags.
type Config struct {
	ListenAddr       string          `envconfig:"LISTEN_ADDR" default:":3001" desc:"where workers connect; empty for none"`
	TLSCertFile      string          `envconfig:"TLS_CERT_FILE" desc:"PEM file; with TLS_KEY_FILE the listener speaks TLS"`
	TLSKeyFile       string          `envconfig:"TLS_KEY_FILE" desc:"PEM file"`
	TrustedProxies   config.Prefixes `envconfig:"TRUSTED_PROXIES" desc:"proxies whose X-Forwarded-For is believed"`
	RateLimitWorker  config.Rate     `envconfig:"RATE_LIMIT_WORKER" default:"off" desc:"connects, and messages or requests other than output, per worker"`
	RateLimitIP      config.Rate     `envconfig:"RATE_LIMIT_IP" default:"50/s" desc:"connects, registrations and wrong tokens per address"`
	LeaseSeconds     int             `envconfig:"LEASE_SECONDS" default:"60" desc:"how long a lease lasts without a confirmed heartbeat"`
	HeartbeatSeconds int             `envconfig:"HEARTBEAT_SECONDS" default:"5" desc:"how often workers send a heartbeat"`
	MaxSessions      int             `envconfig:"MAX_SESSIONS" default:"20000" desc:"most workers"`
	MaxPendingPerIP  int             `envconfig:"MAX_PENDING_PER_IP" default:"20" desc:"most sockets of one address that have not said hello"`
	MaxConnections   int             `envconfig:"MAX_CONNECTIONS" desc:"connections at once, further clients wait; default MAX_SESSIONS and 1000, so that those who are too many are told so"`
	MaxHeader        config.Bytes    `envconfig:"MAX_HEADER" default:"80Ki" desc:"bytes of a request's header"`
	MaxInflight      config.Bytes    `envconfig:"MAX_INFLIGHT" default:"512Mi" desc:"most memory for output that the bus has not stored"`
}

// Bounds of settings, in bytes. A token has to fit in a header, which is memory
// before anybody is known.
const (
	minInflight = 16 << 20
	minHeader   = 4 << 10
	maxHeader   = 1 << 20
)

func (c Config) withDefaults() Config {
	set(&c.LeaseSeconds, 60)
	set(&c.HeartbeatSeconds, 5)
	set(&c.MaxSessions, 20_000)
	set(&c.MaxPendingPerIP, 20)
	set(&c.MaxConnections, c.MaxSessions+refusable)
	set(&c.MaxHeader, 80<<10)
	set(&c.MaxInflight, 512<<20)
	return c
}

func set[T int | config.Bytes](v *T, def T) {
	if *v == 0 {
		*v = def
	}
}

// Check refuses settings that contradict each other.
func (c Config) Check() error { return c.withDefaults().check() }

// check is Check where c has its defaults.
func (c Config) check() error {
	switch {
	case c.HeartbeatSeconds < 1:
		return errors.New("HEARTBEAT_SECONDS must be at least 1")
	case c.LeaseSeconds < 4*c.HeartbeatSeconds:
		return fmt.Errorf("LEASE_SECONDS must be at least four times HEARTBEAT_SECONDS (%d)", c.HeartbeatSeconds)
	case c.MaxSessions < 1 || c.MaxPendingPerIP < 1:
		return errors.New("MAX_SESSIONS and MAX_PENDING_PER_IP must be at least 1")
	case c.MaxConnections < 1:
		return errors.New("MAX_CONNECTIONS must be at least 1")
	case c.MaxHeader < minHeader || c.MaxHeader > maxHeader:
		return fmt.Errorf("MAX_HEADER must be from %s to %s", config.Bytes(minHeader), config.Bytes(maxHeader))
	case c.MaxInflight < minInflight:
		return fmt.Errorf("MAX_INFLIGHT must be at least %d bytes", minInflight)
	}
	return nil
}

func (c Config) lease() time.Duration     { return time.Duration(c.LeaseSeconds) * time.Second }
func (c Config) heartbeat() time.Duration { return time.Duration(c.HeartbeatSeconds) * time.Second }
