package telemetry_test

import (
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/kit/telemetry"
)

func TestRegistriesAreIndependent(t *testing.T) {
	a, b := telemetry.NewRegistry(), telemetry.NewRegistry()
	opts := prometheus.CounterOpts{Name: "cmdexec_test_things_total"}
	require.NoError(t, a.Register(prometheus.NewCounter(opts)))
	require.NoError(t, b.Register(prometheus.NewCounter(opts)))

	families, err := a.Gather()
	require.NoError(t, err)
	names := map[string]bool{}
	for _, f := range families {
		names[f.GetName()] = true
	}
	require.True(t, names["go_goroutines"])
	require.True(t, names["cmdexec_test_things_total"])
}
