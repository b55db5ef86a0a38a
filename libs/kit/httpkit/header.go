package httpkit

import (
	"net/http"
	"net/netip"
	"strings"
)

// BearerToken returns the token of the request's only Authorization header. It is strict: another scheme, a second header, more than one
// space, or anything but visible ASCII in the token is no token at all.
func BearerToken(r *http.Request) (string, bool) {
	values := r.Header["Authorization"]
	if len(values) != 1 {
		return "", false
	}
	scheme, token, ok := strings.Cut(values[0], " ")
	if !ok || !strings.EqualFold(scheme, "bearer") || token == "" {
		return "", false
	}
	for i := range len(token) {
		if token[i] <= ' ' || token[i] >= 0x7f {
			return "", false
		}
	}
	return token, true
}

// ClientIP returns the address of the client. The X-Forwarded-For header is believed only as far as trusted proxies wrote it: starting from the
// connection's own address, it goes back through the header while the address at hand is trusted. IPv4 in IPv6 is unmapped and zones
// are dropped, so that one client has one spelling. The result is the zero Addr if the connection has no IP address (a unix socket).
func ClientIP(r *http.Request, trusted []netip.Prefix) netip.Addr {
	client, ok := parseHost(r.RemoteAddr)
	if !ok {
		return netip.Addr{}
	}
	values := r.Header["X-Forwarded-For"]
	for i := len(values) - 1; i >= 0; i-- {
		rest := values[i]
		for more := true; more; {
			if !contains(trusted, client) {
				return client
			}
			var entry string
			if cut := strings.LastIndexByte(rest, ','); cut >= 0 {
				rest, entry = rest[:cut], rest[cut+1:]
			} else {
				entry, more = rest, false
			}
			next, ok := parseHost(strings.TrimSpace(entry))
			if !ok {
				return client // a proxy that we trust wrote nonsense: what is before it cannot be trusted
			}
			client = next
		}
	}
	return client
}

func contains(prefixes []netip.Prefix, addr netip.Addr) bool {
	for _, p := range prefixes {
		if p.Contains(addr) {
			return true
		}
	}
	return false
}

// parseHost reads an address with or without a port.
func parseHost(s string) (netip.Addr, bool) {
	addr, err := netip.ParseAddr(strings.Trim(s, "[]"))
	if err != nil {
		ap, err := netip.ParseAddrPort(s)
		if err != nil {
			return netip.Addr{}, false
		}
		addr = ap.Addr()
	}
	return addr.Unmap().WithZone(""), true
}
