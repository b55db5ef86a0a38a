package e2e

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/workerproto"
)

// split runs nats-server and every service as processes of their own, with an
// ingress that sends the workers' routes to the edge and the rest to the gateway.
type split struct {
	s       *system
	natsURL string
	nats    *program
	mongo   string // address of a database server that outlives crashes; empty: SQLite
	// services, in the order of their start. Each keeps its ports over restarts.
	services []*service
	ingress  *http.Server
}

// service is one process of the server.
type service struct {
	name          string
	listen, admin string
	process       *program // nil while it is not there
}

// The services with those that others depend on first. They may start in any
// order; this one is the quickest.
var serviceNames = []string{"registry-persister", "result-collector", "scheduler", "worker-edge", "api-gateway"}

const natsConfig = `
listen: %q
jetstream { store_dir: %q, sync_interval: always, max_file_store: 10GB }
max_payload: 2MB
accounts {
  SYS: { exports: [ { service: "$SYS.REQ.SERVER.PING.JSZ", response: stream } ] }
  CMDEXEC: {
    jetstream: enabled
    users: [ { user: cmdexec, password: %q } ]
    imports: [ { service: { account: SYS, subject: "$SYS.REQ.SERVER.PING.JSZ" } } ]
  }
}
system_account: SYS
`

func newSplit(s *system) *split {
	f := &split{s: s}
	addr := freeAddr(s.t)
	f.natsURL = "nats://cmdexec:" + natsPassword + "@" + addr
	config := fmt.Sprintf(natsConfig, addr, filepath.Join(s.dir, "nats"), natsPassword)
	if err := os.WriteFile(filepath.Join(s.dir, "nats.conf"), []byte(config), 0o600); err != nil {
		s.t.Fatal(err)
	}
	for _, name := range serviceNames {
		for range s.opts.copies {
			f.services = append(f.services, &service{name: name, listen: freeAddr(s.t), admin: freeAddr(s.t)})
		}
	}
	f.serveIngress()
	return f
}

func (f *split) env(sv *service) []string {
	env := append(f.s.env(), "NATS_URL="+f.natsURL, "ADMIN_ADDR="+sv.admin, "LISTEN_ADDR="+sv.listen,
		"RATE_LIMIT_USER=off", "RATE_LIMIT_IP=off")
	if f.mongo != "" {
		env = append(env, "MONGODB_URI=mongodb://"+f.mongo+"/cmdexec")
	} else {
		env = append(env, "SQLITE_PATH="+filepath.Join(f.s.dir, "cmdexec.db"))
	}
	return append(env, f.s.opts.env...)
}

func (f *split) start() {
	f.s.t.Helper()
	f.startNATS()
	apply := startProgram(f.s.t, "cmdexec", []string{"NATS_URL=" + f.natsURL}, "bus", "apply")
	<-apply.done
	if apply.err != nil {
		f.s.t.Fatalf("bus apply: %v\n%s", apply.err, apply.out)
	}
	for _, sv := range f.services {
		f.startService(sv)
	}
	f.s.await()
	f.ready()
	f.s.saveContext()
	f.s.addLocal()
}

// serveMongo puts FerretDB in the place of SQLite.
func (f *split) serveMongo() {
	f.s.t.Helper()
	f.mongo = freeAddr(f.s.t)
	dir := filepath.Join(f.s.dir, "mongo")
	if err := os.Mkdir(dir, 0o700); err != nil {
		f.s.t.Fatal(err)
	}
	startProgram(f.s.t, "ferret", nil, f.mongo, dir)
}

func (f *split) startNATS() {
	f.s.t.Helper()
	f.nats = startProgram(f.s.t, "nats-server", nil, "-c", filepath.Join(f.s.dir, "nats.conf"))
}

func (f *split) startService(sv *service) {
	f.s.t.Helper()
	sv.process = startProgram(f.s.t, sv.name, f.env(sv))
}

// ready waits until every service that runs says that it is.
func (f *split) ready() {
	f.s.t.Helper()
	for _, sv := range f.services {
		if sv.process == nil {
			continue
		}
		eventually(f.s.t, sv.name+" is ready", func() error {
			resp, err := http.Get("http://" + sv.admin + "/readyz")
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			if resp.StatusCode != http.StatusOK {
				return errors.New(resp.Status)
			}
			return nil
		})
	}
}

func (f *split) stop() {
	f.s.t.Helper()
	f.s.stopLocal()
	for _, sv := range slices.Backward(f.services) {
		if sv.process != nil {
			sv.process.stop()
		}
	}
	f.nats.stop()
}

func (f *split) crash() {
	f.s.killLocal()
	for _, sv := range f.services {
		if sv.process != nil {
			sv.process.kill()
		}
	}
	f.nats.kill()
}

func (f *split) ended() string {
	for _, p := range f.processes() {
		select {
		case <-p.done:
			return fmt.Sprintf("%s ended: %v\n%s", p.name, p.err, p.out)
		default:
		}
	}
	return ""
}

func (f *split) processes() []*program {
	out := []*program{f.nats}
	for _, sv := range f.services {
		if sv.process != nil {
			out = append(out, sv.process)
		}
	}
	return out
}

func (f *split) admin(service string) string { return f.named(service)[0].admin }

// named lists the copies of a service.
func (f *split) named(name string) []*service {
	var out []*service
	for _, sv := range f.services {
		if sv.name == name {
			out = append(out, sv)
		}
	}
	return out
}

func (f *split) serveIngress() {
	ln, err := net.Listen("tcp", f.s.addr)
	if err != nil {
		f.s.t.Fatal(err)
	}
	var turn atomic.Uint64
	proxy := &httputil.ReverseProxy{
		FlushInterval: -1, // events pass at once
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(&url.URL{Scheme: "http", Host: "service"}) // chosen at the dial
			r.Out.Host = r.In.Host
		},
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) },
	}
	toService := func(name string) http.RoundTripper {
		return &http.Transport{
			MaxIdleConnsPerHost: 64,
			DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
				copies := f.named(name)
				var dialer net.Dialer
				var lastErr error
				for range copies {
					sv := copies[turn.Add(1)%uint64(len(copies))]
					conn, err := dialer.DialContext(ctx, network, sv.listen)
					if err == nil {
						return conn, nil
					}
					lastErr = err
				}
				return nil, lastErr
			},
		}
	}
	edges, gateways := toService("worker-edge"), toService("api-gateway")
	proxy.Transport = roundTripper(func(r *http.Request) (*http.Response, error) {
		if slices.Contains(workerproto.Paths(), r.URL.Path) {
			return edges.RoundTrip(r)
		}
		return gateways.RoundTrip(r)
	})
	f.ingress = &http.Server{Handler: proxy, ReadHeaderTimeout: 10 * time.Second}
	go func() { _ = f.ingress.Serve(ln) }() // ends with Close
	f.s.t.Cleanup(func() { _ = f.ingress.Close() })
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }
