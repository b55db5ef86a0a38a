package httpkit

import (
	"io"
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Admin serves /livez (200 while the process can answer), /readyz (200, or 503 with the text of ready's error) and /metrics. It is meant for a
// port that only operators reach. ready is called for each request and must be safe for concurrent use, as must notes: what they return, where
// it is not empty, is a line of /readyz for a person and changes no status.
func Admin(ready func() error, metrics prometheus.Gatherer, notes ...func() string) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) {
		plain(w, http.StatusOK, "ok")
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		status, text := http.StatusOK, "ok"
		if err := ready(); err != nil {
			status, text = http.StatusServiceUnavailable, "not ready: "+err.Error()
		}
		for _, note := range notes {
			if n := note(); n != "" {
				text += "\nnote: " + n
			}
		}
		plain(w, status, text)
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(metrics, promhttp.HandlerOpts{}))
	return SecurityHeaders(mux)
}

func plain(w http.ResponseWriter, status int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(status)
	_, _ = io.WriteString(w, text+"\n") // the client may be gone
}
