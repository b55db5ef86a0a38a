package poll

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	requests *prometheus.CounterVec // route
	refused  *prometheus.CounterVec // code
	repeats  prometheus.Counter
}

func newMetrics(reg prometheus.Registerer) *metrics {
	opts := func(name, help string) prometheus.CounterOpts {
		return prometheus.CounterOpts{Namespace: "cmdexec", Subsystem: "edge", Name: name, Help: help}
	}
	m := &metrics{
		requests: prometheus.NewCounterVec(opts("requests_total", "Requests of workers over plain HTTP, by route."), []string{"route"}),
		refused:  prometheus.NewCounterVec(opts("requests_refused_total", "Requests of workers that were answered with a problem, by code."), []string{"code"}),
		repeats:  prometheus.NewCounter(opts("repeated_assignments_total", "Assignments handed over again because the worker did not list them.")),
	}
	if reg != nil {
		reg.MustRegister(m.requests, m.refused, m.repeats)
	}
	return m
}
