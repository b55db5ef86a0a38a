package scheduler

import (
	"errors"
	"fmt"
	"time"
)

// Config is the scheduler's settings. Zero fields get the defaults of the tags.
type Config struct {
	LeaseSeconds      int `envconfig:"LEASE_SECONDS" default:"60" desc:"how long a lease lasts without a confirmed heartbeat"`
	HeartbeatSeconds  int `envconfig:"HEARTBEAT_SECONDS" default:"5" desc:"how often workers send a heartbeat"`
	MaxRunningPerUser int `envconfig:"MAX_RUNNING_PER_USER" default:"0" desc:"jobs of one user that workers may have at once; 0 is no limit"`
}

// SelfStopSeconds is when a worker stops its own jobs for want of a confirmed
// heartbeat: three quarters of the lease, 45 s of 60.
func (c Config) SelfStopSeconds() int { return c.LeaseSeconds * 3 / 4 }

func (c Config) withDefaults() Config {
	if c.LeaseSeconds == 0 {
		c.LeaseSeconds = 60
	}
	if c.HeartbeatSeconds == 0 {
		c.HeartbeatSeconds = 5
	}
	return c
}

// Check refuses settings under which healthy workers would lose leases.
func (c Config) Check() error { return c.withDefaults().check() }

// check is Check where c has its defaults.
func (c Config) check() error {
	switch stop := c.SelfStopSeconds(); {
	case c.MaxRunningPerUser < 0:
		return errors.New("MAX_RUNNING_PER_USER must not be negative")
	case c.HeartbeatSeconds < 1:
		return errors.New("HEARTBEAT_SECONDS must be at least 1")
	case 3*c.HeartbeatSeconds > stop || stop >= c.LeaseSeconds:
		return fmt.Errorf("LEASE_SECONDS must be at least four times HEARTBEAT_SECONDS (%d): workers stop their jobs after three quarters of a lease and may miss two heartbeats before",
			c.HeartbeatSeconds)
	}
	return nil
}

func (c Config) lease() time.Duration     { return time.Duration(c.LeaseSeconds) * time.Second }
func (c Config) heartbeat() time.Duration { return time.Duration(c.HeartbeatSeconds) * time.Second }
