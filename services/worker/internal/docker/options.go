package docker

import (
	"io/fs"
	"log/slog"
	"time"
)

// Defaults of Options.
const (
	DefaultCallTimeout = 15 * time.Second
	DefaultPatience    = 60 * time.Second
	DefaultKillBound   = 15 * time.Second
)

// DefaultHost is where an engine is looked for when nothing else is said.
const DefaultHost = "unix:///var/run/docker.sock"

// Options are the settings of an Executor.
type Options struct {
	// Host is where the engine listens, as in DOCKER_HOST: unix://, tcp:// or (on
	// Windows) npipe://. Empty: the current context of the owner's Docker
	// configuration, else DefaultHost. The environment is not read here.
	Host string
	// CertDir holds ca.pem, cert.pem and key.pem for a tcp:// host, as in
	// DOCKER_CERT_PATH; empty: no TLS.
	CertDir string
	// ConfigDir is the owner's Docker configuration (~/.docker): config.json with
	// registry credentials, and contexts. Empty: neither.
	ConfigDir string

	// WorkerID labels everything that is made, for people.
	WorkerID string
	// Mark is a label too: Recover and Reap remove what has it, so that no other worker
	// that uses the engine may have the same. Empty: WorkerID.
	Mark string
	// Runtime is the OCI runtime, such as "runsc"; empty: the engine's default.
	Runtime string
	// AllowBridge lets jobs that ask for a network have the engine's bridge.
	AllowBridge bool

	// Survive has the engine keep the output of containers, so that a later
	// process of this worker can take them up: up to 40 MB of the engine's disk for each,
	// until it is removed.
	Survive bool

	// Warm bounds the containers that are kept started for jobs to come.
	Warm Warm

	// CallTimeout bounds one call of the engine (creating and starting a
	// container get twice as long); 0: DefaultCallTimeout.
	CallTimeout time.Duration
	// Patience is how long a command may run on while the engine does not
	// answer before it is given up as an engine error; 0: DefaultPatience.
	Patience time.Duration
	// KillBound is how long a killed container may take to be gone before it is
	// reported as a survivor; 0: DefaultKillBound.
	KillBound time.Duration

	Log *slog.Logger // nil: nothing is logged
}

// Warm are the bounds of the warm containers. The zero value keeps none.
type Warm struct {
	Containers int   // that wait at once
	MemoryMB   int64 // MiB that the limits of all that wait come to
	// Age is how long a shape of container is kept after it was asked for. One is
	// kept when it has been asked for twice in that time.
	Age time.Duration
	// Init holds warm-init-amd64 and the like; nil: what is built in.
	Init fs.FS
}

func (o *Options) setDefaults() {
	for _, d := range []struct {
		value    *time.Duration
		standard time.Duration
	}{{&o.CallTimeout, DefaultCallTimeout}, {&o.Patience, DefaultPatience}, {&o.KillBound, DefaultKillBound}} {
		if *d.value <= 0 {
			*d.value = d.standard
		}
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
}
