package persister

import (
	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	records  *prometheus.CounterVec // by result: written, stale, poison, coalesced
	batch    prometheus.Histogram
	purged   *prometheus.CounterVec // by how: single, group
	ghosts   prometheus.Counter
	repaired prometheus.Counter
	reset    prometheus.Counter
	expired  prometheus.Counter
	failures *prometheus.CounterVec // by what
}

// newMetrics makes and registers the metrics; waiting is read when they are collected.
func newMetrics(r prometheus.Registerer, waiting func() float64) (*metrics, error) {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Namespace: "cmdexec", Subsystem: "persister", Name: name, Help: help})
	}
	vec := func(name, label, help string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: "cmdexec", Subsystem: "persister", Name: name, Help: help}, []string{label})
	}
	m := &metrics{
		records: vec("records_total", "result", "Records taken from the registry's stream."),
		batch: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: "cmdexec", Subsystem: "persister", Name: "batch_seconds", Help: "How long bulk upserts take.",
			Buckets: prometheus.ExponentialBuckets(0.001, 2, 14),
		}),
		purged:   vec("purged_jobs_total", "how", "Ended jobs that were taken out of the registry."),
		ghosts:   counter("ghosts_total", "Jobs that a crash of the NATS server brought back, and that were purged."),
		repaired: counter("repaired_jobs_total", "Ended jobs that a sweep found in the registry and not in the database."),
		reset:    counter("reset_jobs_total", "Jobs that ended because their registry was lost."),
		expired:  counter("expired_jobs_total", "Jobs deleted by retention."),
		failures: vec("upkeep_failures_total", "what", "Steps of upkeep that failed and are tried again."),
	}
	waitingGauge := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Namespace: "cmdexec", Subsystem: "persister", Name: "waiting_jobs", Help: "Stored jobs that wait for their purge.",
	}, waiting)
	for _, c := range []prometheus.Collector{m.records, m.batch, m.purged, m.ghosts, m.repaired, m.reset, m.expired, m.failures, waitingGauge} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}
