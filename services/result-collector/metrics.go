package collector

import (
	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	results      *prometheus.CounterVec // by result: see verdict, and poison
	seconds      prometheus.Histogram
	chunks       *prometheus.CounterVec // by from: results, logs
	bytes        *prometheus.CounterVec
	poison       *prometheus.CounterVec
	failures     *prometheus.CounterVec // and checks
	checks       *prometheus.CounterVec // by verdict
	trimFailures prometheus.Counter
}

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	opts := func(name, help string) prometheus.CounterOpts {
		return prometheus.CounterOpts{Namespace: "cmdexec", Subsystem: "collector", Name: name, Help: help}
	}
	from := []string{"from"}
	m := &metrics{
		results: prometheus.NewCounterVec(opts("results_total", "Results proposed to the registry, by what became of them."), []string{"result"}),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: "cmdexec", Subsystem: "collector", Name: "result_seconds",
			Help: "From the edge's receipt of a result to the registry's answer.", Buckets: prometheus.ExponentialBuckets(0.001, 2, 14),
		}),
		chunks:   prometheus.NewCounterVec(opts("chunks_total", "Chunks of output stored, repeats included."), from),
		bytes:    prometheus.NewCounterVec(opts("chunk_bytes_total", "Bytes of output stored, repeats included."), from),
		poison:   prometheus.NewCounterVec(opts("poison_total", "Messages kept as dead letters."), from),
		failures: prometheus.NewCounterVec(opts("store_failures_total", "Batches that the database did not take; they are tried again."), from),
		checks: prometheus.NewCounterVec(opts("log_checks_total", "Attempts whose stored output was compared with its manifest, by verdict."),
			[]string{"verdict"}),
		trimFailures: prometheus.NewCounter(opts("trim_failures_total", "Failed purges of what is stored already.")),
	}
	for _, c := range []prometheus.Collector{m.results, m.seconds, m.chunks, m.bytes, m.poison, m.failures, m.checks, m.trimFailures} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}
