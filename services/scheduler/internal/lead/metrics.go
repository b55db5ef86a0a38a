package lead

import "github.com/prometheus/client_golang/prometheus"

// Metrics are shared by all terms of a scheduler.
type Metrics struct {
	decisions prometheus.Counter
	delivered prometheus.Counter
	returned  *prometheus.CounterVec
	lost      *prometheus.CounterVec
	deadlines *prometheus.CounterVec
	stale     prometheus.Counter
	missed    prometheus.Counter
	failures  prometheus.Counter
	waiting   prometheus.Gauge
	jobs      prometheus.Gauge
	leases    prometheus.Gauge
	workers   prometheus.Gauge
	inFlight  prometheus.Gauge
	loopLag   prometheus.Histogram
}

// NewMetrics registers the metrics of a scheduler.
func NewMetrics(r prometheus.Registerer) (*Metrics, error) {
	const ns, sub = "cmdexec", "scheduler"
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Namespace: ns, Subsystem: sub, Name: name, Help: help})
	}
	counters := func(name, help, label string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: ns, Subsystem: sub, Name: name, Help: help}, []string{label})
	}
	gauge := func(name, help string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{Namespace: ns, Subsystem: sub, Name: name, Help: help})
	}
	m := &Metrics{
		decisions: counter("decisions_total", "Placements decided."),
		delivered: counter("assignments_delivered_total", "Assignments handed to a worker's session."),
		returned:  counters("assignments_returned_total", "Assignments that did not take effect.", "outcome"),
		lost:      counters("leases_lost_total", "Leases that ended without a result.", "cause"),
		deadlines: counters("deadlines_total", "Deadlines of jobs that passed.", "which"),
		stale:     counter("stale_leases_total", "Leases that workers were told to let go."),
		missed:    counter("missed_changes_total", "Changes that a sweep found and the follower had not reported."),
		failures:  counter("write_failures_total", "Registry writes that failed for a reason of the bus."),
		waiting:   gauge("queued_jobs", "Jobs that wait for a worker."),
		jobs:      gauge("live_jobs", "Jobs that have not ended."),
		leases:    gauge("leases", "Leases that workers may hold."),
		workers:   gauge("workers", "Workers that are known."),
		inFlight:  gauge("requests_in_flight", "Registry writes and commands under way."),
		loopLag: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: ns, Subsystem: sub, Name: "loop_lag_seconds", Help: "How late the loop notices a tick of one second.",
			Buckets: []float64{.0005, .001, .005, .01, .05, .1, .5, 1, 5},
		}),
	}
	for _, c := range []prometheus.Collector{
		m.decisions, m.delivered, m.returned, m.lost, m.deadlines, m.stale, m.missed, m.failures,
		m.waiting, m.jobs, m.leases, m.workers, m.inFlight, m.loopLag,
	} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// reset clears what only a leader has.
func (m *Metrics) reset() {
	for _, g := range []prometheus.Gauge{m.waiting, m.jobs, m.leases, m.workers, m.inFlight} {
		g.Set(0)
	}
}

func (t *Term) gauges() {
	t.metrics.waiting.Set(float64(t.plan.Waiting() + len(t.gated)))
	t.metrics.jobs.Set(float64(len(t.jobs)))
	t.metrics.leases.Set(float64(t.leases))
	t.metrics.workers.Set(float64(len(t.workers)))
	t.metrics.inFlight.Set(float64(t.inFlight))
}
