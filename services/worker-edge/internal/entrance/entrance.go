// Package entrance decides which requests of workers come in: by token, and by
// rate limits of addresses and of workers. It answers the others.
package entrance

import (
	"log/slog"
	"net/http"
	"net/netip"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
	"github.com/cmdexec/cmdexec/libs/kit/httpkit"
	"github.com/cmdexec/cmdexec/libs/kit/ratelimit"
)

// Gate checks requests. Its methods are safe for concurrent use; those that
// return false have answered the request.
type Gate struct {
	Verifier       *auth.WorkerVerifier
	TrustedProxies []netip.Prefix
	Limiter        ratelimit.Limiter
	RateIP         ratelimit.Rate
	RateWorker     ratelimit.Rate
	Logger         *slog.Logger
	Refused        *prometheus.CounterVec // code
}

// Refuse answers with a problem and counts it.
func (g *Gate) Refuse(w http.ResponseWriter, r *http.Request, p httpkit.Problem) {
	g.Refused.WithLabelValues(p.Code).Inc()
	httpkit.Write(w, r, p)
}

// Client is what counts as one client: an IPv4 address, or the /64 that an IPv6
// host has to itself.
func (g *Gate) Client(r *http.Request) netip.Prefix {
	a := httpkit.ClientIP(r, g.TrustedProxies)
	bits := 32
	if a.Is6() {
		bits = 64
	}
	p, err := a.Prefix(bits)
	if err != nil { // not an IP connection
		return netip.Prefix{}
	}
	return p
}

// Connect lets a worker in that begins a session: its address is counted, and the
// worker where its token is good, by one question to the limiter. What the token
// was is not told to who is over a limit. A limiter that cannot decide lets
// nobody in: this is where tokens are checked.
func (g *Gate) Connect(w http.ResponseWriter, r *http.Request) (auth.WorkerClaims, bool) {
	claims, ok := g.authenticate(r)
	if !ok {
		if g.allow(w, r, false, g.address(r)) {
			g.unauthorized(w, r)
		}
		return claims, false
	}
	return claims, g.allow(w, r, false, g.address(r), g.worker(claims))
}

// Report lets in a request of a worker that has a session. Its address is
// counted only where the token is wrong, since many workers may share one; the
// worker only if counted is true. Who is in stays in while the limiter is away.
func (g *Gate) Report(w http.ResponseWriter, r *http.Request, counted bool) (auth.WorkerClaims, bool) {
	claims, ok := g.authenticate(r)
	if !ok {
		if g.allow(w, r, false, g.address(r)) {
			g.unauthorized(w, r)
		}
		return claims, false
	}
	return claims, !counted || g.allow(w, r, true, g.worker(claims))
}

func (g *Gate) address(r *http.Request) ratelimit.Event {
	return ratelimit.Event{Policy: "ip", Key: "edge:ip:" + g.Client(r).String(), Rate: g.RateIP}
}

func (g *Gate) worker(c auth.WorkerClaims) ratelimit.Event {
	return ratelimit.Event{Policy: "worker", Key: "edge:worker:" + c.Subject, Rate: g.RateWorker}
}

// unauthorized is the one answer for everything that can be wrong with a token.
func (g *Gate) unauthorized(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("WWW-Authenticate", workerproto.TokenHeader)
	g.Refuse(w, r, httpkit.Problem{
		Status: http.StatusUnauthorized, Code: "unauthorized", Detail: "a valid worker token is needed",
		Hint: "send it in the " + workerproto.TokenHeader + " header",
	})
}

// allow counts events. lenient: who is in stays in while the limiter is away.
func (g *Gate) allow(w http.ResponseWriter, r *http.Request, lenient bool, events ...ratelimit.Event) bool {
	d, err := g.Limiter.AllowAll(r.Context(), events...)
	if err != nil {
		if lenient {
			return true
		}
		g.Logger.Error("rate limiter failed", "err", err)
		g.Refuse(w, r, httpkit.Problem{Status: http.StatusServiceUnavailable, Code: "unavailable", RetryAfter: time.Second})
		return false
	}
	ratelimit.SetHeaders(w.Header(), d)
	if !d.Allowed {
		g.Refuse(w, r, httpkit.Problem{Status: http.StatusTooManyRequests, Code: "rate_limited", Detail: "too many requests"})
	}
	return d.Allowed
}

func (g *Gate) authenticate(r *http.Request) (auth.WorkerClaims, bool) {
	values := r.Header.Values(workerproto.TokenHeader)
	if len(values) != 1 {
		return auth.WorkerClaims{}, false
	}
	claims, err := g.Verifier.Verify(values[0], time.Now())
	if err != nil || id.CheckWorker(claims.Subject) != nil {
		return auth.WorkerClaims{}, false
	}
	return claims, true
}
