package persister

import (
	"cmp"
	"errors"
	"time"

	"github.com/cmdexec/cmdexec/services/registry-persister/internal/purge"
)

// Config is the persister's settings. Zero graces get the defaults of the tags.
type Config struct {
	PurgeGraceSeconds       int `envconfig:"PURGE_GRACE_SECONDS" default:"5" desc:"seconds that an ended job stays in the registry"`
	IdempotencyGraceSeconds int `envconfig:"IDEMPOTENCY_GRACE_SECONDS" default:"600" desc:"the same for a job with an idempotency key: for so long the key holds even without the database"`
	JobRetentionDays        int `envconfig:"JOB_RETENTION_DAYS" default:"30" desc:"days that ended jobs and their output are kept; 0 for ever"`
}

const maxRetentionDays = 36_500

// Check refuses settings that cannot be meant.
func (c Config) Check() error {
	if c.PurgeGraceSeconds < 0 || c.IdempotencyGraceSeconds < 0 {
		return errors.New("PURGE_GRACE_SECONDS and IDEMPOTENCY_GRACE_SECONDS must not be negative")
	}
	if c.JobRetentionDays < 0 || c.JobRetentionDays > maxRetentionDays {
		return errors.New("JOB_RETENTION_DAYS must be from 0 to 36500")
	}
	return nil
}

func (c Config) graces() purge.Graces {
	return purge.Graces{
		Plain: time.Duration(cmp.Or(c.PurgeGraceSeconds, 5)) * time.Second,
		Keyed: time.Duration(cmp.Or(c.IdempotencyGraceSeconds, 600)) * time.Second,
	}
}

// The times of the persister.
const (
	batchWait      = 100 * time.Millisecond // coalesces most jobs into their last version
	upkeepEvery    = time.Second
	sweepEvery     = 5 * time.Minute
	sweepAfter     = 15 * time.Second // a failure: what is on its way comes before
	retentionEvery = time.Hour
	upkeepTimeout  = 30 * time.Second // of one step; a sweep may take longer
	statsFresh     = time.Second
)
