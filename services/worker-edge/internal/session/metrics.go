package session

import "github.com/prometheus/client_golang/prometheus"

// Metrics counts what sessions do.
type Metrics struct {
	Sessions      prometheus.Gauge
	Closed        *prometheus.CounterVec // code
	Beats         *prometheus.CounterVec // outcome
	Assignments   *prometheus.CounterVec // outcome
	OutputBytes   prometheus.Counter
	Results       prometheus.Counter
	Stale         prometheus.Counter
	PublishErrors *prometheus.CounterVec // kind
	InflightBytes prometheus.Gauge
}

// NewMetrics makes the metrics and registers them; reg may be nil.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	const ns, sub = "cmdexec", "edge"
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Namespace: ns, Subsystem: sub, Name: name, Help: help})
	}
	vec := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: ns, Subsystem: sub, Name: name, Help: help}, labels)
	}
	gauge := func(name, help string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{Namespace: ns, Subsystem: sub, Name: name, Help: help})
	}
	m := &Metrics{
		Sessions:      gauge("sessions", "Worker sessions that are open."),
		Closed:        vec("sessions_closed_total", "Sessions that ended, by close code.", "code"),
		Beats:         vec("beats_total", "Beat requests to the leading scheduler.", "outcome"),
		Assignments:   vec("assignments_total", "Assignments from the scheduler.", "outcome"),
		OutputBytes:   counter("output_bytes_total", "Bytes of output that the bus has stored."),
		Results:       counter("results_total", "Results that the bus has stored."),
		Stale:         counter("stale_total", "Output and progress that came under a lease which is not the session's."),
		PublishErrors: vec("publish_errors_total", "Publishes that failed and are tried again.", "kind"),
		InflightBytes: gauge("inflight_bytes", "Output and results that the bus does not have yet."),
	}
	if reg != nil {
		reg.MustRegister(m.Sessions, m.Closed, m.Beats, m.Assignments, m.OutputBytes, m.Results, m.Stale, m.PublishErrors, m.InflightBytes)
	}
	return m
}
