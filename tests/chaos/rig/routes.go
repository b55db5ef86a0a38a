package rig

import (
	"context"
	"fmt"
	"net"
)

// route is the way by which one NATS server connects to another one.
type route struct{ from, to int }

// nowhere is an address at which nothing listens.
const nowhere = "127.0.0.1:1"

// routesOf makes the proxies by which a server reaches the others, and returns
// their addresses.
func (r *Rig) routesOf(from int, clusters []string) ([]string, error) {
	var urls []string
	for to, addr := range clusters {
		if to == from {
			continue
		}
		p, err := NewProxy(func(ctx context.Context) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", addr)
		})
		if err != nil {
			return nil, fmt.Errorf("between two NATS servers: %w", err)
		}
		if r.routes == nil {
			r.routes = map[route]*Proxy{}
		}
		r.routes[route{from, to}] = p
		urls = append(urls, "nats-route://"+p.Addr())
	}
	return urls, nil
}

// Isolate sets the network between one NATS server and the others. Clients
// reach it as before.
func (r *Rig) Isolate(server int, m Mode) {
	for way, p := range r.routes {
		if way.from == server || way.to == server {
			p.Set(m)
		}
	}
}

// ServerURL names one NATS server.
func (r *Rig) ServerURL(server int) string { return r.urls[server] }
