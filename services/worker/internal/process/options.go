package process

import (
	"log/slog"
	"time"
)

// DefaultKillBound is how long the executor waits for killed processes to go.
const DefaultKillBound = 10 * time.Second

// Options are the settings of an Executor.
type Options struct {
	// DataDir is the worker's data folder, which one live worker owns alone.
	// Attempts work in DataDir/attempts. It is made where it is missing.
	DataDir string
	// WorkerID is the worker of the specs that may be run.
	WorkerID string
	// Mark is on everything that is started, and Recover ends what has it; letters,
	// digits, '-' and '_', and no other worker's of this machine. Empty: WorkerID.
	Mark string
	// KillBound is how long a killed process may take to go before it is
	// reported as a survivor; 0: DefaultKillBound. The main process and what is
	// left after it each have this long.
	KillBound time.Duration
	Log       *slog.Logger // nil: nothing is logged
}

// Limits says which limits of a spec this machine enforces.
type Limits struct {
	CPU, Memory, PIDs bool
}
