package ratelimit_test

import (
	"testing"

	"github.com/cmdexec/cmdexec/libs/kit/ratelimit"
	"github.com/cmdexec/cmdexec/libs/kit/ratelimit/ratelimittest"
)

func TestLocalConforms(t *testing.T) {
	ratelimittest.Run(t, func(*testing.T) ratelimit.Limiter { return ratelimit.NewLocal(0) })
}
