// Package natsd runs a NATS server with JetStream inside the process: the bus of
// the all-in-one and of tests.
//
// Every write is synced to disk before it is acknowledged (durability level
// "committed"), so an acknowledged write survives a power cut. One data folder
// belongs to one server at a time; a second Start on it fails with ErrInUse.
package natsd

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats-server/v2/server"
)

// Limits and times of the embedded server.
const (
	// MaxPayload bounds one message in bytes. A registry record has at most 768 KiB.
	MaxPayload = 2 << 20
	// ServerName never changes: JetStream state belongs to a name.
	ServerName = "cmdexec"

	lockName     = "lock"
	readyTimeout = 2 * time.Minute // recovery of large streams happens before the server is ready
)

// ErrInUse is wrapped by Start when another server runs on the data folder.
var ErrInUse = errors.New("the data folder is in use by another instance")

// Options says where the server keeps its data and how it is reached.
type Options struct {
	// StoreDir is created when it is missing. It must not be on a network file system.
	StoreDir string
	// MaxStore bounds what all streams together may reserve, in bytes. Zero means
	// a quarter of the disk; more than that is cut to it.
	MaxStore int64
	// Logger gets the server's notices (as debug), warnings and errors. Nil discards them.
	Logger *slog.Logger
	// Listen is a host:port to accept clients on, port 0 for any. Empty: in-process
	// connections only. There is no authentication: use a loopback address.
	Listen string
}

// Server is a running NATS server. It is safe for concurrent use.
type Server struct {
	ns       *server.Server
	lock     *os.File
	maxStore int64
	shutdown sync.Once
}

// Start starts a server and returns once it accepts connections and has
// recovered its streams. It installs no signal handlers and prints nothing.
func Start(o Options) (*Server, error) {
	if o.StoreDir == "" {
		return nil, errors.New("start embedded nats: no data folder given")
	}
	if err := os.MkdirAll(o.StoreDir, 0o700); err != nil {
		return nil, fmt.Errorf("start embedded nats: create data folder: %w", err)
	}
	lock, err := lockFile(filepath.Join(o.StoreDir, lockName))
	if err != nil {
		return nil, fmt.Errorf("start embedded nats in %s: %w", o.StoreDir, err)
	}
	s, err := start(o, lock)
	if err != nil {
		_ = lock.Close()
		return nil, fmt.Errorf("start embedded nats in %s: %w", o.StoreDir, err)
	}
	return s, nil
}

func start(o Options, lock *os.File) (*Server, error) {
	maxStore, err := storeLimit(o.StoreDir, o.MaxStore)
	if err != nil {
		return nil, err
	}
	opts := &server.Options{
		ServerName: ServerName,
		JetStream:  true,
		StoreDir:   o.StoreDir,
		// The interval only matters for what SyncAlways does not cover; both are set
		// as "sync_interval: always" in a configuration file sets them.
		SyncAlways:            true,
		SyncInterval:          2 * time.Minute,
		JetStreamMaxStore:     maxStore,
		MaxPayload:            MaxPayload,
		WriteDeadline:         10 * time.Second,
		NoSigs:                true,
		NoLog:                 true,
		NoSystemAccount:       false,
		DisableShortFirstPing: true,
		DontListen:            o.Listen == "",
	}
	if o.Listen != "" {
		host, portText, err := net.SplitHostPort(o.Listen)
		if err != nil {
			return nil, fmt.Errorf("listen address: %w", err)
		}
		port, err := strconv.ParseUint(portText, 10, 16)
		if err != nil {
			return nil, fmt.Errorf("listen address: port %q is not a number", portText)
		}
		opts.Host, opts.Port = host, int(port)
		if port == 0 {
			opts.Port = server.RANDOM_PORT
		}
	}
	ns, err := server.NewServer(opts)
	if err != nil {
		return nil, err
	}
	log := &logAdapter{log: o.Logger}
	if log.log == nil {
		log.log = slog.New(slog.DiscardHandler)
	}
	ns.SetLoggerV2(log, false, false, false)
	s := &Server{ns: ns, lock: lock, maxStore: maxStore}

	ns.Start() // returns when streams are recovered or something fatal was logged
	for deadline := time.Now().Add(readyTimeout); ; {
		if text := log.fatalText(); text != "" {
			err = errors.New(text)
			break
		}
		if ns.ReadyForConnections(100 * time.Millisecond) {
			break
		}
		if !ns.Running() || time.Now().After(deadline) {
			err = errors.New("the server did not become ready")
			break
		}
	}
	if err == nil && !ns.JetStreamEnabled() {
		err = errors.New("the server came up without JetStream")
	}
	if err != nil {
		ns.Shutdown()
		ns.WaitForShutdown()
		return nil, err
	}
	return s, nil
}

// InProcessConn opens a connection that does not go through the network. A NATS
// client takes the server itself as its connection provider.
func (s *Server) InProcessConn() (net.Conn, error) { return s.ns.InProcessConn() }

// ClientURL is where other processes reach the server; empty when it does not listen.
func (s *Server) ClientURL() string {
	if s.ns.Addr() == nil {
		return ""
	}
	return s.ns.ClientURL()
}

// ID identifies this life of the server: it is another one after every start.
func (s *Server) ID() string { return s.ns.ID() }

// Version is the version of the NATS server.
func (s *Server) Version() string { return server.VERSION }

// MaxStore is what all streams together may reserve, in bytes.
func (s *Server) MaxStore() int64 { return s.maxStore }

// Durability is the level that the running server gives: "committed" when every
// write is synced before it is acknowledged, else "none".
func (s *Server) Durability() string {
	if c := s.ns.JetStreamConfig(); c != nil && c.SyncAlways {
		return "committed"
	}
	return "none"
}

// Shutdown stops the server and returns when it is down and its data folder is
// free. Further calls do nothing.
func (s *Server) Shutdown() {
	s.shutdown.Do(func() {
		s.ns.Shutdown()
		s.ns.WaitForShutdown()
		_ = s.lock.Close() // releases the lock
	})
}

// storeLimit is a quarter of what the disk has free for us, at most what was asked
// for. What the server already occupies counts as free, so that the limit does not
// shrink from start to start.
func storeLimit(dir string, asked int64) (int64, error) {
	free, err := diskFree(dir)
	if err != nil {
		return 0, fmt.Errorf("free disk space: %w", err)
	}
	used, err := treeSize(dir)
	if err != nil {
		return 0, fmt.Errorf("size of the data folder: %w", err)
	}
	quarter := (free + used) / 4
	if asked > 0 && asked < quarter {
		return asked, nil
	}
	return quarter, nil
}

func treeSize(dir string) (int64, error) {
	var total int64
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		total += info.Size()
		return nil
	})
	return total, err
}
