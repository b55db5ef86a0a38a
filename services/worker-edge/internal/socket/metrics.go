package socket

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/cmdexec/cmdexec/libs/core/workerproto"
)

type metrics struct {
	frames  *prometheus.CounterVec // type
	refused *prometheus.CounterVec // code
}

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{
		frames: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: "cmdexec", Subsystem: "edge", Name: "frames_total", Help: "Frames from workers, by type.",
		}, []string{"type"}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: "cmdexec", Subsystem: "edge", Name: "connections_refused_total", Help: "Connections refused before the upgrade, by code.",
		}, []string{"code"}),
	}
	if reg != nil {
		reg.MustRegister(m.frames, m.refused)
	}
	return m
}

// frame counts a frame; types that nobody knows count together, since workers
// choose them.
func (m *metrics) frame(t workerproto.Type) {
	switch t {
	case workerproto.TypeHello, workerproto.TypeHeartbeat, workerproto.TypeAccepted, workerproto.TypePreparing, workerproto.TypeStarted,
		workerproto.TypeRejected, workerproto.TypeOutput, workerproto.TypeResult, typeChunk:
	default:
		t = "unknown"
	}
	m.frames.WithLabelValues(string(t)).Inc()
}

// typeChunk counts binary frames.
const typeChunk workerproto.Type = "chunk"
