package worker

import (
	"crypto/rand"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cmdexec/cmdexec/libs/core/fleet"
	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/kit/config"
	"github.com/cmdexec/cmdexec/services/worker/internal/session"
)

// Config is what a worker's owner decides.
type Config struct {
	ServerURL         string            `envconfig:"SERVER_URL" default:"http://127.0.0.1:3000" desc:"address of the gateway or of the edge"`
	Transport         string            `envconfig:"TRANSPORT" default:"auto" desc:"websocket, http, or auto: a WebSocket where one can be had, else plain HTTP"`
	WorkerID          string            `envconfig:"WORKER_ID" desc:"id of this worker; made and kept in the data folder when absent"`
	WorkerToken       config.Secret     `envconfig:"WORKER_TOKEN" desc:"token of this worker"`
	WorkerTokenSecret config.Secret     `envconfig:"WORKER_TOKEN_SECRET" desc:"mints the token, instead of WORKER_TOKEN; whoever holds it can be any worker"`
	DataDir           string            `envconfig:"DATA_DIR" desc:"folder for the spool and the working folders; default: a folder of the user's own"`
	Executors         string            `envconfig:"EXECUTORS" default:"auto" desc:"process, docker, both with a comma, or auto (docker where an engine answers)"`
	Slots             int               `envconfig:"SLOTS" desc:"most jobs at once; default 4 for each core offered"`
	CPULimit          float64           `envconfig:"CPU_LIMIT" desc:"cores offered to jobs in all; default all"`
	RAMLimit          config.Bytes      `envconfig:"RAM_LIMIT" desc:"memory offered to jobs in all, for example 8Gi; default 80 percent"`
	Labels            map[string]string `envconfig:"WORKER_LABELS" desc:"labels for constraints, for example zone:home,gpu:none"`
	DockerHost        string            `envconfig:"DOCKER_HOST" desc:"where the container engine listens; default: the owner's Docker context, else unix:///var/run/docker.sock"`
	DockerCertPath    string            `envconfig:"DOCKER_CERT_PATH" desc:"folder with ca.pem, cert.pem and key.pem for a tcp:// engine"`
	DockerConfig      string            `envconfig:"DOCKER_CONFIG" desc:"folder of the owner's Docker configuration, with registry credentials; default ~/.docker"`
	ContainerRuntime  string            `envconfig:"CONTAINER_RUNTIME" desc:"OCI runtime of containers, for example runsc; default: the engine's"`
	AllowNetwork      bool              `envconfig:"ALLOW_NETWORK" desc:"let jobs that ask for a network have the engine's bridge"`
	AdoptContainers   bool              `envconfig:"ADOPT_CONTAINERS" default:"true" desc:"containers go on when this worker is killed, and its next start takes them up; the engine keeps up to 40 MB of the output of each for that"`
	WarmContainers    int               `envconfig:"WARM_CONTAINERS" default:"2" desc:"containers that are kept started for jobs of the kinds that came lately, at most SLOTS; 0 for none"`
	WarmMemory        config.Bytes      `envconfig:"WARM_MEMORY" default:"1Gi" desc:"what the memory limits of these may come to in all"`
	WarmSeconds       int               `envconfig:"WARM_SECONDS" default:"300" desc:"seconds that a kind of job has containers waiting after it came last"`
	Insecure          bool              `envconfig:"INSECURE" desc:"allow an unencrypted connection to a server that is not on this machine"`
	AdminAddr         string            `envconfig:"ADMIN_ADDR" default:"127.0.0.1:9105" desc:"address of /livez, /readyz and /metrics; off for none"`
	LogLevel          string            `envconfig:"LOG_LEVEL" default:"info" desc:"debug, info, warn or error"`
	LogFormat         string            `envconfig:"LOG_FORMAT" default:"auto" desc:"auto, text or json"`
	Cores             uint16            `envconfig:"GOMAXPROCS" desc:"how many cores the worker itself uses at a time; default half of the machine's; commands are not concerned"`
}

// serverURL is where the worker connects to: http:// or https://, without a
// slash at its end.
func (c *Config) serverURL() (string, error) {
	u, err := url.Parse(c.ServerURL)
	if err != nil || u.Host == "" {
		return "", errors.New("SERVER_URL must be an address such as https://jobs.example.com")
	}
	switch u.Scheme {
	case "https", "wss":
		u.Scheme = "https"
	case "http", "ws":
		u.Scheme = "http"
		if !c.Insecure && !loopback(u.Hostname()) {
			return "", errors.New("SERVER_URL is not encrypted and not on this machine: use https://, or set INSECURE=true if you must")
		}
	default:
		return "", errors.New("SERVER_URL must begin with https:// or http://")
	}
	u.Path = strings.TrimSuffix(u.Path, "/")
	u.RawPath, u.RawQuery, u.Fragment = "", "", ""
	return u.String(), nil
}

func loopback(host string) bool {
	if host == "localhost" {
		return true
	}
	a, err := netip.ParseAddr(host)
	return err == nil && a.Unmap().IsLoopback()
}

// check reports the first setting that cannot be used.
func (c *Config) check() error {
	switch {
	case c.Transport != "" && !session.Transport(c.Transport).Valid():
		return errors.New("TRANSPORT must be auto, websocket or http")
	case c.Slots < 0 || c.Slots > fleet.MaxSlots:
		return fmt.Errorf("SLOTS must be from 1 to %d", fleet.MaxSlots)
	case c.CPULimit < 0 || math.IsNaN(c.CPULimit) || math.IsInf(c.CPULimit, 0):
		return errors.New("CPU_LIMIT must be a number of cores above 0")
	case c.RAMLimit < 0:
		return errors.New("RAM_LIMIT must be above 0")
	case c.WarmContainers < 0:
		return errors.New("WARM_CONTAINERS must not be negative")
	case c.WarmMemory < 0:
		return errors.New("WARM_MEMORY must not be negative")
	case c.WarmSeconds < 0:
		return errors.New("WARM_SECONDS must not be negative")
	}
	return nil
}

// executorAuto stands for docker where an engine answers at the start.
const executorAuto = "auto"

// executorNames reads EXECUTORS.
func (c *Config) executorNames() ([]string, error) {
	var names []string
	for _, n := range strings.Split(c.Executors, ",") {
		switch n = strings.TrimSpace(n); n {
		case "":
		case job.ExecutorProcess, job.ExecutorDocker, executorAuto:
			names = append(names, n)
		default:
			return nil, errors.New("EXECUTORS: unknown executor; use process, docker or auto")
		}
	}
	slices.Sort(names)
	names = slices.Compact(names)
	if slices.Contains(names, job.ExecutorDocker) { // asked for by name: auto adds nothing
		names = slices.DeleteFunc(names, func(n string) bool { return n == executorAuto })
	}
	return names, nil
}

// slots is how many jobs run at once on so many offered cores.
func (c *Config) slots(cores float64) int {
	if c.Slots > 0 {
		return c.Slots
	}
	return int(min(max(1, math.Round(4*cores)), fleet.MaxSlots))
}

func (c *Config) dockerConfig() string {
	if c.DockerConfig != "" {
		return c.DockerConfig
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "" // no configuration
	}
	return filepath.Join(home, ".docker")
}

func (c *Config) dataDir() (string, error) {
	if c.DataDir != "" {
		return filepath.Abs(c.DataDir)
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", errors.New("DATA_DIR: no home folder to put the data into; name a folder")
	}
	return filepath.Join(home, ".local", "share", "cmdexec", "worker"), nil
}

// workerID returns the configured id, or the one kept in the data folder, which
// it makes on the first start.
func (c *Config) workerID(dir string, fresh func() string) (string, error) {
	if c.WorkerID != "" {
		if err := id.CheckWorker(c.WorkerID); err != nil {
			return "", fmt.Errorf("WORKER_ID: %w", err)
		}
		return c.WorkerID, nil
	}
	file := filepath.Join(dir, "worker-id")
	data, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		made := fresh()
		if err := writeFile(file, []byte(made+"\n")); err != nil {
			return "", fmt.Errorf("keep the worker's id: %w", err)
		}
		return made, nil
	}
	if err != nil {
		return "", fmt.Errorf("read the worker's id: %w", err)
	}
	kept := strings.TrimSpace(string(data))
	if err := id.CheckWorker(kept); err != nil {
		return "", fmt.Errorf("%s does not hold a worker id: remove it to get a new one", file)
	}
	return kept, nil
}

// keptMark returns what marks the processes and containers of the worker with this
// data folder, also after its restart. The worker's id would not do: another server
// may have a worker of the same id on this machine.
func keptMark(dir string) (string, error) {
	file := filepath.Join(dir, "mark")
	data, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) || err == nil && len(data) == 0 { // a power cut may leave it empty
		data = []byte(rand.Text())
		err = writeFile(file, data)
	}
	if err != nil {
		return "", fmt.Errorf("DATA_DIR: %w", err)
	}
	return string(data), nil
}

// writeFile replaces a file whole or not at all.
func writeFile(path string, data []byte) error {
	if err := os.WriteFile(path+".new", data, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}
