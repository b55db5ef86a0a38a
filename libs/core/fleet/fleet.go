// Package fleet describes workers: what they registered, what they offer, and
// whether a job could ever run on one of them. It is pure.
package fleet

import (
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/cmdexec/cmdexec/libs/core/job"
)

// Worker is what the bus keeps of one registered worker.
type Worker struct {
	ID          string            `json:"workerId"`
	Hostname    string            `json:"hostname,omitempty"`
	OS          string            `json:"os"`
	Arch        string            `json:"arch"`
	CPUCores    float64           `json:"cpuCores"`    // offered to jobs, all together
	TotalMemory int64             `json:"totalMemory"` // bytes offered to jobs, all together
	Labels      map[string]string `json:"labels,omitempty"`
	Executors   []string          `json:"executors"`
	Slots       int               `json:"slots"`
	Backlog     int               `json:"backlog,omitempty"` // assignments that it lets wait for a free slot, a moment at most
	Version     string            `json:"version,omitempty"`
	Protocol    int               `json:"protocol"`
	Transport   string            `json:"transport"`       // websocket or http
	SessionID   string            `json:"sessionId"`       // of the newest session
	EdgeID      string            `json:"edgeId"`          // that holds it
	Online      bool              `json:"online"`          // false once that session ended
	ConnectedAt time.Time         `json:"connectedAt"`     // of the newest session
	LastSeenAt  time.Time         `json:"lastSeenAt"`      // at the last write of this record
	Drain       bool              `json:"drain,omitempty"` // asked for by an operator: kept over sessions
}

// Limits of what a worker may register.
const (
	MaxSlots       = 4096
	MaxCPUCores    = 4096
	MaxTotalMemory = 64 << 40
	MaxTextLen     = 255
)

// Validate reports the first thing in a registration that cannot be accepted.
func (w *Worker) Validate() error {
	switch {
	case w.Slots < 1 || w.Slots > MaxSlots:
		return fmt.Errorf("slots must be from 1 to %d", MaxSlots)
	case w.Backlog < 0 || w.Backlog > MaxSlots:
		return fmt.Errorf("backlog must be from 0 to %d", MaxSlots)
	case !(w.CPUCores > 0 && w.CPUCores <= MaxCPUCores):
		return fmt.Errorf("cpuCores must be above 0 and at most %d", MaxCPUCores)
	case w.TotalMemory < 1<<20 || w.TotalMemory > MaxTotalMemory:
		return fmt.Errorf("totalMemory must be from 1 MiB to %d bytes", int64(MaxTotalMemory))
	case !job.ValidQueue(w.OS) || !job.ValidQueue(w.Arch):
		return fmt.Errorf("os and arch must be lower-case words, as Go names them")
	case len(w.Labels) > job.MaxLabels:
		return fmt.Errorf("at most %d labels", job.MaxLabels)
	case !plain(w.Hostname) || !plain(w.Version):
		return fmt.Errorf("hostname and version have at most %d bytes of text without control characters", MaxTextLen)
	case len(w.Executors) > 8:
		return fmt.Errorf("at most 8 executors")
	}
	for k, v := range w.Labels {
		if !job.ValidLabelKey(k) || !plain(v) {
			return fmt.Errorf("a label name or value is not allowed")
		}
	}
	for _, e := range w.Executors {
		if !job.ValidQueue(e) {
			return fmt.Errorf("executors must be lower-case words")
		}
	}
	return nil
}

// plain reports whether s can be shown to people as it is.
func plain(s string) bool {
	return len(s) <= MaxTextLen && utf8.ValidString(s) && !strings.ContainsFunc(s, unicode.IsControl)
}

// Block is a reason why a worker does not get a job. The words are stable:
// users see them in explain.
type Block string

// The reasons that last as long as worker and job are what they are, and then
// those that pass.
const (
	BlockExecutor Block = "no_executor"    // the worker does not run this kind of job
	BlockOS       Block = "os_differs"     // constraints.os
	BlockArch     Block = "arch_differs"   // constraints.arch
	BlockLabels   Block = "labels_differ"  // constraints.labels
	BlockTooBig   Block = "too_big"        // asks for more cpu or memory than the worker offers in all
	BlockOffline  Block = "offline"        // not connected, or its heartbeat is late
	BlockDraining Block = "draining"       // takes no new work
	BlockSetAside Block = "set_aside"      // failed lately, waits
	BlockSlots    Block = "no_free_slot"   // all slots taken
	BlockCPU      Block = "no_free_cpu"    // cpu is reserved by other jobs
	BlockMemory   Block = "no_free_memory" // memory is reserved by other jobs
	BlockOwner    Block = "user_at_limit"  // as many of the user's jobs run as may
)

// CanEverRun reports whether worker w, empty and online, could run a job of
// this spec; if not, why. The spec must be normalised.
func (w *Worker) CanEverRun(s *job.Spec) (Block, bool) {
	c := &s.Constraints
	switch {
	case !slices.Contains(w.Executors, s.Executor()):
		return BlockExecutor, false
	case c.OS != "" && c.OS != w.OS:
		return BlockOS, false
	case c.Arch != "" && c.Arch != w.Arch:
		return BlockArch, false
	case !hasAll(w.Labels, c.Labels):
		return BlockLabels, false
	case s.Resources.CPU > w.CPUCores || s.Resources.MemoryMB<<20 > w.TotalMemory:
		return BlockTooBig, false
	}
	return "", true
}

func hasAll(have, want map[string]string) bool {
	for k, v := range want {
		if got, ok := have[k]; !ok || got != v {
			return false
		}
	}
	return true
}

// Status is what the workers' list says of a worker.
type Status string

// The statuses of a worker.
const (
	StatusIdle     Status = "idle"
	StatusBusy     Status = "busy"
	StatusDraining Status = "draining"
	StatusUnknown  Status = "unknown" // its heartbeat is late
	StatusOffline  Status = "offline"
)
