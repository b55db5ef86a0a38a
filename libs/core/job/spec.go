package job

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
)

// Spec is a job as a user sends it. After Normalise every default is filled
// in, and a field that does not apply to the executor is empty.
type Spec struct {
	Name           string            `json:"name,omitempty" doc:"A name for people; need not be unique."`
	Command        Command           `json:"command" doc:"A string is run by /bin/sh -c; an array is run as it is, without a shell."`
	ContainerImage string            `json:"containerImage,omitempty" doc:"Image to run the command in. Absent: the command runs as a process on a worker whose owner allows that."`
	Timeout        int               `json:"timeout,omitempty" doc:"Seconds that the command may run, from 1 to 86400. Default 300." minimum:"1" maximum:"86400"`
	Labels         map[string]string `json:"labels,omitempty" doc:"Labels to find the job by."`
	Env            map[string]string `json:"env,omitempty" doc:"Environment of the command. Not secret: stored and returned."`
	SecretEnv      map[string]string `json:"secretEnv,omitempty" doc:"Reserved; refused until it exists."`
	WorkingDir     string            `json:"workingDir,omitempty" doc:"Working folder of the command. Relative paths are inside the attempt's own folder."`
	User           string            `json:"user,omitempty" doc:"User (name or uid) to run as."`
	Stdin          string            `json:"stdin,omitempty" doc:"Text given to the command on standard input."`
	Files          []File            `json:"files,omitempty" doc:"Files written before the command starts."`
	Resources      Resources         `json:"resources,omitzero" doc:"Limits, which are also what placement reserves."`
	Network        string            `json:"network,omitempty" doc:"none (default) or bridge. Containers only." enum:"none,bridge"`
	PullPolicy     string            `json:"pullPolicy,omitempty" doc:"When to pull the image. Containers only." enum:"missing,always,never"`
	Queue          string            `json:"queue,omitempty" doc:"A named line of jobs. Default: default."`
	Priority       *int              `json:"priority,omitempty" doc:"0 to 100; higher goes first. Default 50." minimum:"0" maximum:"100"`
	Constraints    Constraints       `json:"constraints,omitzero" doc:"What a worker must be."`
	Retry          Retry             `json:"retry,omitzero" doc:"When to try again."`
	OnWorkerLost   string            `json:"onWorkerLost,omitempty" doc:"requeue (default) or fail. With fail a job is never started again after an attempt whose end is not known." enum:"requeue,fail"`
	Timeouts       Timeouts          `json:"timeouts,omitzero" doc:"Further deadlines, in seconds."`
	Stop           Stop              `json:"stop,omitzero" doc:"How the command is stopped."`
	LogMaxBytes    int64             `json:"logMaxBytes,omitempty" doc:"Output kept, in bytes. Beyond it head and tail are kept. Default 16 MiB." minimum:"1024" maximum:"268435456"`
	Webhook        *Webhook          `json:"webhook,omitempty" doc:"Reserved; refused until it exists."`
}

// File is written into the attempt's working folder before the command starts.
type File struct {
	Path    string `json:"path" doc:"Relative to the working folder."`
	Content string `json:"content" doc:"The file's text."`
	Mode    string `json:"mode,omitempty" doc:"Octal permissions, for example 0755. Default 0644."`
}

// Resources are limits of one attempt; placement reserves cpu and memory.
type Resources struct {
	CPU      float64 `json:"cpu,omitempty" doc:"Cores. Default 1." minimum:"0.01" maximum:"1024"`
	MemoryMB int64   `json:"memoryMb,omitempty" doc:"MiB. Default 512." minimum:"4" maximum:"16777216"`
	PIDs     int64   `json:"pids,omitempty" doc:"Processes and threads. Default 128." minimum:"1" maximum:"1048576"`
	TmpfsMB  int64   `json:"tmpfsMb,omitempty" doc:"MiB of /tmp. Default 64. Containers only." minimum:"1" maximum:"1048576"`
}

// Constraints say what a worker must be to get the job.
type Constraints struct {
	OS     string            `json:"os,omitempty" doc:"Operating system, for example linux."`
	Arch   string            `json:"arch,omitempty" doc:"Architecture, for example amd64."`
	Labels map[string]string `json:"labels,omitempty" doc:"Labels that the worker must have."`
}

// Retry says how often a failed command is tried again, and when.
type Retry struct {
	MaxAttempts       int   `json:"maxAttempts,omitempty" doc:"Attempts that may end for a reason of the command's own. Default 1." minimum:"1" maximum:"100"`
	BackoffSeconds    *int  `json:"backoffSeconds,omitempty" doc:"Seconds before the second attempt; doubles each time. Default 2." minimum:"0" maximum:"86400"`
	MaxBackoffSeconds int   `json:"maxBackoffSeconds,omitempty" doc:"Most seconds between two attempts. Default 300." minimum:"1" maximum:"86400"`
	OnExitCodes       []int `json:"onExitCodes,omitempty" doc:"Retry only on these exit codes. Empty: on any failure or timeout."`
}

// Timeouts are the deadlines beside the execution timeout, in seconds. Queue
// and total are off when zero.
type Timeouts struct {
	Queue   int `json:"queue,omitempty" doc:"Seconds that the job may wait." minimum:"1" maximum:"2592000"`
	Prepare int `json:"prepare,omitempty" doc:"Seconds for pulling the image and writing inputs. Default 300." minimum:"1" maximum:"86400"`
	Total   int `json:"total,omitempty" doc:"Seconds from creation to the end, all attempts together." minimum:"1" maximum:"2592000"`
}

// Stop says how a command is asked to end before it is killed.
type Stop struct {
	Signal       string `json:"signal,omitempty" doc:"Signal sent first. Default SIGTERM."`
	GraceSeconds *int   `json:"graceSeconds,omitempty" doc:"Seconds between the signal and the kill. Default 10." minimum:"0" maximum:"300"`
}

// Webhook is reserved.
type Webhook struct {
	URL    string   `json:"url"`
	Events []string `json:"events,omitempty"`
}

// Values of the enumerated fields.
const (
	NetworkNone, NetworkBridge            = "none", "bridge"
	PullMissing, PullAlways, PullNever    = "missing", "always", "never"
	OnWorkerLostRequeue, OnWorkerLostFail = "requeue", "fail"
	ExecutorDocker, ExecutorProcess       = "docker", "process"
	defaultFileMode                       = "0644"
)

// Executor names the executor that the job needs, derived from its image.
func (s *Spec) Executor() string {
	if s.ContainerImage != "" {
		return ExecutorDocker
	}
	return ExecutorProcess
}

// PriorityValue is the priority with its default.
func (s *Spec) PriorityValue() int { return valueOr(s.Priority, DefaultPriority) }

// GraceSeconds is the stop grace with its default.
func (s *Spec) GraceSeconds() int { return valueOr(s.Stop.GraceSeconds, DefaultGraceSeconds) }

// Hash is the hash of the spec's JSON, for telling whether two submits under
// one idempotency key are the same job. Take it of a normalised spec.
func (s *Spec) Hash() string {
	data, err := json.Marshal(s)
	if err != nil {
		panic("job: a spec always marshals: " + err.Error()) // only strings, numbers, maps and slices
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// Command is a shell text or an argument vector; never both.
type Command struct {
	Shell string   // run by /bin/sh -c
	Argv  []string // run as it is
}

var errCommandJSON = errors.New("command must be a string or an array of strings")

// MarshalJSON writes a string for the shell form and an array for argv.
func (c Command) MarshalJSON() ([]byte, error) {
	if c.Argv != nil {
		return json.Marshal(c.Argv)
	}
	return json.Marshal(c.Shell)
}

// UnmarshalJSON reads a string or an array of strings. Null is refused.
func (c *Command) UnmarshalJSON(data []byte) error {
	var shell string
	switch {
	case len(data) > 0 && data[0] == '"':
		if err := json.Unmarshal(data, &shell); err != nil {
			return errCommandJSON
		}
		*c = Command{Shell: shell}
	case len(data) > 0 && data[0] == '[':
		var elements []*string // a null would silently become an empty string
		if err := json.Unmarshal(data, &elements); err != nil {
			return errCommandJSON
		}
		argv := make([]string, len(elements))
		for i, e := range elements {
			if e == nil {
				return errCommandJSON
			}
			argv[i] = *e
		}
		*c = Command{Argv: argv}
	default:
		return errCommandJSON
	}
	return nil
}

func valueOr[T any](p *T, def T) T {
	if p == nil {
		return def
	}
	return *p
}
