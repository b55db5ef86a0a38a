package main

import (
	"context"
	"time"

	"github.com/cmdexec/cmdexec/tests/chaos/history"
)

// sampleEvery is how often a soak looks at what every process uses.
const sampleEvery = 30 * time.Second

// steady is no fault: the load goes on, and what every process uses is noted. The
// checker finds what grows.
type steady struct{}

func (steady) inject(ctx context.Context, s *scene) error {
	for _, x := range measure(ctx, s.rig) {
		s.w.Add(history.Event{Sample: &history.Sample{Service: x.Service, What: x.What, Value: x.Before}})
	}
	wait(ctx, sampleEvery)
	return ctx.Err()
}

func (steady) heal(context.Context, *scene) error { return nil }
