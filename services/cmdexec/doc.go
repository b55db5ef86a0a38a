// Package cmdexec is the program that people run: the CLI, and with `cmdexec
// up` the whole system in one process.
//
//	Consumes   the public API, as any client; with `up` it runs every service in this process.
//	Owns       the context file (address and token of the local instance) and, with `up`, the data folder.
//	On restart `up` finds everything in its data folder; a second one on the same folder is refused.
//	Metrics    with `up` those of all services, where ADMIN_ADDR is set.
package cmdexec

import (
	"github.com/cmdexec/cmdexec/services/cmdexec/internal/cli"
)

// Main runs the program with its arguments (without the program's name) and
// returns the exit code: for `run` the job's own, 124 timed out, 125 could not
// run or no server, 130 canceled, 2 wrong usage, 1 anything else. hardExit ends
// the process at once; it is called at a second interrupt of `up`.
func Main(args []string, hardExit func(code int)) int { return cli.Main(args, hardExit) }
