package up

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cmdexec/cmdexec/libs/kit/config"
)

// Config is the settings of the all-in-one. Each flag of `cmdexec up` sets the
// field whose variable it is named after.
type Config struct {
	Listen            string        `envconfig:"LISTEN_ADDR" default:"127.0.0.1:3000" desc:"address of the API and of the workers' connections"`
	DataDir           string        `envconfig:"DATA_DIR" desc:"folder of everything that is kept; default: a folder of the user's own"`
	Executor          string        `envconfig:"EXECUTOR" default:"auto" desc:"what the local worker runs: auto, process, docker or none"`
	Slots             int           `envconfig:"SLOTS" desc:"most jobs at once on the local worker; default 4 for each core"`
	Sample            bool          `envconfig:"SAMPLE" default:"false" desc:"run one job at the start and show its output"`
	DockerHost        string        `envconfig:"DOCKER_HOST" desc:"where the container engine listens; default: the user's Docker context"`
	DockerCertPath    string        `envconfig:"DOCKER_CERT_PATH" desc:"folder with ca.pem, cert.pem and key.pem for a tcp:// engine"`
	DockerConfig      string        `envconfig:"DOCKER_CONFIG" desc:"folder of the user's Docker configuration; default ~/.docker"`
	ContainerRuntime  string        `envconfig:"CONTAINER_RUNTIME" desc:"OCI runtime of containers, for example runsc"`
	AllowNetwork      bool          `envconfig:"ALLOW_NETWORK" desc:"let container jobs that ask for a network have one"`
	WarmContainers    int           `envconfig:"WARM_CONTAINERS" default:"2" desc:"containers that the local worker keeps started for jobs of the kinds that came lately; 0 for none"`
	WarmMemory        config.Bytes  `envconfig:"WARM_MEMORY" default:"1Gi" desc:"what the memory limits of these may come to in all"`
	WarmSeconds       int           `envconfig:"WARM_SECONDS" default:"300" desc:"seconds that a kind of job has containers waiting after it came last"`
	JWTSecret         config.Secret `envconfig:"JWT_SECRET" desc:"signs user tokens; made and kept in the data folder when absent"`
	WorkerTokenSecret config.Secret `envconfig:"WORKER_TOKEN_SECRET" desc:"signs worker tokens; made and kept in the data folder when absent"`
	CPULimit          float64       `envconfig:"CPU_LIMIT" desc:"cores that the local worker offers in all"`
	RAMLimit          config.Bytes  `envconfig:"RAM_LIMIT" desc:"memory that the local worker offers in all"`
	LeaseSeconds      int           `envconfig:"LEASE_SECONDS" default:"60" desc:"seconds without word from a worker after which its jobs go elsewhere"`
	HeartbeatSeconds  int           `envconfig:"HEARTBEAT_SECONDS" default:"5" desc:"seconds between two heartbeats of a worker"`
	PurgeGrace        int           `envconfig:"PURGE_GRACE_SECONDS" default:"5" desc:"seconds that an ended job stays in the registry"`
	IdempotencyGrace  int           `envconfig:"IDEMPOTENCY_GRACE_SECONDS" default:"600" desc:"the same for a job with an idempotency key"`
	JobRetentionDays  int           `envconfig:"JOB_RETENTION_DAYS" default:"30" desc:"days that ended jobs and their output are kept; 0 for ever"`
	RateLimitUser     config.Rate   `envconfig:"RATE_LIMIT_USER" default:"off" desc:"requests of one user: N/s, N/m or off"`
	RateLimitIP       config.Rate   `envconfig:"RATE_LIMIT_IP" default:"off" desc:"requests, and connects of workers, from one address"`
	RateLimitWorker   config.Rate   `envconfig:"RATE_LIMIT_WORKER" default:"off" desc:"connects of a worker and its messages other than output"`
	RedisURL          config.Secret `envconfig:"REDIS_URL" desc:"address of Redis, where others share these limits"`
	MaxQueuedPerUser  int           `envconfig:"MAX_QUEUED_PER_USER" default:"0" desc:"jobs of one user that may wait; 0 is no limit"`
	MaxRunningPerUser int           `envconfig:"MAX_RUNNING_PER_USER" default:"0" desc:"jobs of one user that workers may have at once; 0 is no limit"`
	MaxStreamsPerUser int           `envconfig:"MAX_STREAMS_PER_USER" default:"0" desc:"streams and waiting calls of one user; 0 is no limit"`
	MaxConnections    int           `envconfig:"MAX_CONNECTIONS" default:"20000" desc:"connections at once; further clients wait"`
	AdminAddr         string        `envconfig:"ADMIN_ADDR" desc:"address of /livez, /readyz and /metrics; none when absent"`
	LogLevel          string        `envconfig:"LOG_LEVEL" default:"warn" desc:"debug, info, warn or error"`
	LogFormat         string        `envconfig:"LOG_FORMAT" default:"auto" desc:"auto, text or json"`
}

var executors = []string{"auto", "process", "docker", "none"}

func (c *Config) check() error {
	switch {
	case !slices.Contains(executors, c.Executor):
		return fmt.Errorf("--executor must be one of %s", strings.Join(executors, ", "))
	case c.Slots < 0:
		return errors.New("--slots must not be negative")
	}
	return nil
}

// executors is what the local worker's EXECUTORS would be: auto runs processes,
// and containers where an engine answers.
func (c *Config) executors() string {
	if c.Executor == "auto" {
		return "process,auto"
	}
	return c.Executor
}

// dataDir makes the data folder and checks that it can be written to.
func (c *Config) dataDir() (string, error) {
	dir := c.DataDir
	if dir == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", errors.New("no home folder to keep data in: name a folder with --data-dir")
		}
		dir = filepath.Join(home, ".local", "share", "cmdexec")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", fmt.Errorf("--data-dir: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", cannotWrite(dir, err)
	}
	probe, err := os.CreateTemp(dir, ".probe-*")
	if err != nil {
		return "", cannotWrite(dir, err)
	}
	return dir, errors.Join(probe.Close(), os.Remove(probe.Name()))
}

func cannotWrite(dir string, err error) error {
	var pathErr *os.PathError
	if errors.As(err, &pathErr) {
		err = pathErr.Err
	}
	return fmt.Errorf("the data folder %s cannot be written to (%w): name another with --data-dir", dir, err)
}
