package gateway

import (
	"net/http"
	"net/netip"
	"time"

	"github.com/cmdexec/cmdexec/libs/kit/httpkit"
	"github.com/cmdexec/cmdexec/libs/kit/ratelimit"
)

// The names of the limits, as answers show them, and the keys that are counted.
// A store of limits may be shared with other services: the keys say whose they are.
const (
	policyIP   = "ip"
	policyUser = "user"
	keyIP      = "api:ip:"
	keyUser    = "api:user:"
)

// admit counts a request under its address and, where the token is good, its
// user. The token is looked at first, which takes microseconds and no I/O, so
// that both are counted by one question to a shared store; what it was is not
// told before the limits have been passed. A flood without tokens does not get
// further by that: its address is counted like every other, and by the limiter
// in this process before any store is asked.
//
// A limiter that cannot decide is replaced by the local one for this request.
func (s *Service) admit(w http.ResponseWriter, r *http.Request, c *call) *httpkit.Problem {
	if s.cfg.RateLimitIP.Off() && s.cfg.RateLimitUser.Off() {
		return nil
	}
	events := make([]ratelimit.Event, 0, 2)
	if !s.cfg.RateLimitIP.Off() {
		client := clientNetwork(httpkit.ClientIP(r, s.cfg.TrustedProxies))
		events = append(events, ratelimit.Event{Policy: policyIP, Key: keyIP + client, Rate: s.cfg.RateLimitIP})
	}
	if c.user != "" && !s.cfg.RateLimitUser.Off() {
		events = append(events, ratelimit.Event{Policy: policyUser, Key: keyUser + c.user, Rate: s.cfg.RateLimitUser})
	}
	d, err := s.limiter.AllowAll(r.Context(), events...)
	if err != nil {
		d, _ = s.local.AllowAll(r.Context(), events...) // never fails
	}
	ratelimit.SetHeaders(w.Header(), d)
	if d.Allowed {
		return nil
	}
	return &httpkit.Problem{
		Status: http.StatusTooManyRequests, Code: codeRateLimited, Detail: "too many requests",
		Hint: "wait as long as Retry-After says", RetryAfter: max(d.RetryAfter, time.Second),
	}
}

// limited counts requests that pass no guard: those without a handler, and the
// documents that everybody may read.
func (s *Service) limited(h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if p := s.admit(w, r, &call{}); p != nil {
			httpkit.Write(w, r, *p)
			return
		}
		h(w, r)
	}
}

// clientNetwork is what counts as one address: an IPv4 address, or the /64 that an
// IPv6 host has to itself and could change its address in with every request.
func clientNetwork(a netip.Addr) string {
	if !a.Is6() || a.Is4In6() {
		return a.Unmap().String()
	}
	p, err := a.WithZone("").Prefix(64)
	if err != nil {
		return a.String()
	}
	return p.String()
}
