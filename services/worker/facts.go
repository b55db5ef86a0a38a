package worker

import (
	"fmt"
	"math"
	"os"
	"runtime"

	"github.com/shirou/gopsutil/v3/cpu"
	"github.com/shirou/gopsutil/v3/mem"

	"github.com/cmdexec/cmdexec/services/worker/internal/runner"
)

// ramShare is the part of the machine's memory that is offered by default.
const ramShare = 0.8

// Facts is what the machine is and what its owner offers of it.
type Facts struct {
	Hostname    string
	OS, Arch    string
	CPUCores    float64 // offered
	TotalMemory int64   // bytes offered
}

func gatherFacts(cfg *Config) (Facts, error) {
	vm, err := mem.VirtualMemory()
	if err != nil {
		return Facts{}, fmt.Errorf("read this machine's memory: %w", err)
	}
	host, err := os.Hostname()
	if err != nil {
		host = "" // a fact for people only
	}
	limit := ownLimits()
	f := Facts{Hostname: host, OS: runtime.GOOS, Arch: runtime.GOARCH, CPUCores: float64(runtime.NumCPU())}
	if limit.cpu > 0 {
		f.CPUCores = min(f.CPUCores, limit.cpu)
	}
	total := int64(min(vm.Total, math.MaxInt64))
	if limit.memory > 0 {
		total = min(total, limit.memory)
	}
	f.TotalMemory = int64(float64(total) * ramShare)
	if cfg.CPULimit > 0 {
		f.CPUCores = cfg.CPULimit
	}
	if cfg.RAMLimit > 0 {
		f.TotalMemory = int64(cfg.RAMLimit)
	}
	return f, nil
}

// limits is what the control groups of this process allow it; 0: all.
type limits struct {
	cpu    float64 // cores
	memory int64   // bytes
}

// machineUsage reads the load of the whole machine since the last call. What
// cannot be read counts as zero: it is shown to people and decides nothing.
func machineUsage() runner.Usage {
	var u runner.Usage
	if p, err := cpu.Percent(0, false); err == nil && len(p) > 0 {
		u.CPU = p[0]
	}
	if vm, err := mem.VirtualMemory(); err == nil {
		u.RAM = float64(vm.Used >> 20)
	}
	return u
}
