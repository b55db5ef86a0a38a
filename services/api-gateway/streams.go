package gateway

import (
	"context"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cmdexec/cmdexec/libs/kit/httpkit"
)

// enterStream begins a stream of a user, whose context ends when the token
// expires. Where the user has too many it has answered, and ok is false.
func (s *Service) enterStream(w http.ResponseWriter, r *http.Request, c *call) (ctx context.Context, done func(), ok bool) {
	leave, p := s.streams.enter(c.user)
	if p != nil {
		httpkit.Write(w, r, *p)
		return nil, nil, false
	}
	ctx, cancel := context.WithDeadline(r.Context(), c.expires)
	return ctx, func() { cancel(); leave() }, true
}

// streams limits how many streams and waiting calls one user has open in this
// gateway: each holds a connection, and some a consumer of their own. It keeps
// nothing of users who have none. Safe for concurrent use.
type streams struct {
	most  int // 0: no limit
	gauge prometheus.Gauge

	mu   sync.Mutex
	open map[string]int
}

func newStreams(most int, gauge prometheus.Gauge) *streams {
	return &streams{most: most, gauge: gauge, open: map[string]int{}}
}

// enter counts a stream of user until leave is called, which may be called more
// than once; or it returns the problem of a user who has too many.
func (s *streams) enter(user string) (leave func(), problem *httpkit.Problem) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.most > 0 && s.open[user] >= s.most {
		return nil, &httpkit.Problem{
			Status: http.StatusTooManyRequests, Code: codeTooManyStreams, Detail: "too many of your streams and waiting calls are open",
			Hint: "close some; one stream of /api/jobs/events follows all of your jobs", RetryAfter: 5 * time.Second,
		}
	}
	s.open[user]++
	s.gauge.Inc()
	return sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.gauge.Dec()
		if s.open[user]--; s.open[user] == 0 {
			delete(s.open, user)
		}
	}), nil
}
