// Command cmdexec runs commands on machines that you have.
package main

import (
	"os"

	"github.com/cmdexec/cmdexec/services/cmdexec"
)

func main() {
	os.Exit(cmdexec.Main(os.Args[1:], os.Exit))
}
