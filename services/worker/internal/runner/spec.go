package runner

import (
	"strconv"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
)

// specFor translates a normalised job into what an executor is asked to do.
func specFor(workerID string, l workerproto.Lease, s *job.Spec) executor.Spec {
	out := executor.Spec{
		JobID: l.JobID, Attempt: l.Attempt, LeaseID: l.LeaseID, WorkerID: workerID,
		Shell: s.Command.Shell, Argv: s.Command.Argv, Image: s.ContainerImage,
		WorkingDir: s.WorkingDir, Env: s.Env, User: s.User, Stdin: []byte(s.Stdin),
		CPU: s.Resources.CPU, MemoryMB: s.Resources.MemoryMB, PIDs: s.Resources.PIDs, TmpfsMB: s.Resources.TmpfsMB,
		NetworkBridge: s.Network == job.NetworkBridge, PullPolicy: s.PullPolicy,
		Timeout:        time.Duration(s.Timeout) * time.Second,
		PrepareTimeout: time.Duration(s.Timeouts.Prepare) * time.Second,
		StopSignal:     s.Stop.Signal,
		Grace:          time.Duration(s.GraceSeconds()) * time.Second,
	}
	for _, f := range s.Files {
		mode, err := strconv.ParseUint(f.Mode, 8, 32)
		if err != nil {
			mode = 0o644 // the gateway checked it; a spec of an older record may lack it
		}
		out.Files = append(out.Files, executor.File{Path: f.Path, Content: []byte(f.Content), Mode: uint32(mode)})
	}
	return out
}
