package docker

import (
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// eventsOf is an attempt whose engine only tells these events, and then is silent
// until nobody asks any more.
func eventsOf(t *testing.T, lines ...string) *attempt {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/events") {
			for _, line := range lines {
				fmt.Fprintln(w, line)
			}
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		}
	})}
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	t.Cleanup(func() { _ = s.Close(); <-done })
	x, err := New(Options{Host: "unix://" + socket, WorkerID: "worker-events", CallTimeout: 20 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = x.Close() })
	return &attempt{x: x, id: "c1"}
}

// What the engine has stopped counts as that although the command ended before
// the engine noted its signal; and whoever asks does not wait for more.
func TestKilledBefore(t *testing.T) {
	end := time.Now()
	event := func(action, id string, after time.Duration) string {
		return fmt.Sprintf(`{"Type":"container","Action":%q,"Actor":{"ID":%q},"timeNano":%d}`, action, id, end.Add(after).UnixNano())
	}
	for _, c := range []struct {
		name string
		told []string
		want bool
	}{
		{"ended by itself", []string{event("die", "c1", 0)}, false},
		{"killed before", []string{event("kill", "c1", -time.Second), event("die", "c1", 0)}, true},
		{"killed, and noted behind the end", []string{event("kill", "c1", time.Second), event("die", "c1", 2*time.Second)}, true},
		{"killed when it had ended", []string{event("die", "c1", 0), event("kill", "c1", time.Second)}, false},
		{"another one was", []string{event("kill", "c2", -time.Second), event("die", "c1", 0)}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			began := time.Now()
			killed, err := eventsOf(t, c.told...).killedBefore(end.Add(-time.Minute), end)
			if err != nil || killed != c.want {
				t.Errorf("killed is %v (%v)", killed, err)
			}
			if took := time.Since(began); took > 10*time.Second {
				t.Errorf("it took %v", took)
			}
		})
	}
}
