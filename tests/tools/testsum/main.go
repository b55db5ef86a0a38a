// Command testsum runs `go test -json` and says in words what happened: one
// line per package, the whole output of what failed, the skips counted by their
// reason, and as the last line
//
//	N passed, N failed, N skipped
//
// Its arguments are those of go test; `--` begins a further run, which starts
// when the one before it is over:
//
//	testsum -race ./libs/core/... -- -count=1 ./tests/e2e/...
//
// A single `-` reads the events of a run from standard input instead.
//
// REQUIRE (for example `docker,redis`) names what this machine is supposed to
// have: a test that skips with the reason `requires docker: ...` then counts as
// failed. A skip that gives no reason always does.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strings"
)

func main() {
	os.Exit(run(os.Args[1:], os.Getenv("REQUIRE"), os.Stdin, os.Stdout, os.Stderr))
}

func run(args []string, require string, stdin io.Reader, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		fmt.Fprintln(stderr, "usage: testsum [go test arguments] [-- go test arguments]...  |  testsum -")
		return 2
	}
	sum := newSummary(stdout, splitList(require))
	broken := false
	if len(args) == 1 && args[0] == "-" {
		if err := sum.read(stdin); err != nil {
			fmt.Fprintln(stderr, "testsum:", err)
			broken = true
		}
	} else {
		// Ctrl-C reaches go test too; we wait for it and still say what happened.
		interrupted := make(chan os.Signal, 1)
		signal.Notify(interrupted, os.Interrupt)
		defer signal.Stop(interrupted)
		for _, step := range splitSteps(args) {
			failedBefore := sum.failed
			err := goTest(step, sum, stderr)
			// go test exits with 1 when tests failed, which is counted already; any
			// other failure would otherwise look like a run without tests.
			if err != nil && sum.failed == failedBefore {
				fmt.Fprintf(stderr, "testsum: go test %s: %v\n", strings.Join(step, " "), err)
				broken = true
			}
			if len(interrupted) > 0 {
				broken = true
				break
			}
		}
	}
	if broken {
		sum.failed++
		sum.failures = append(sum.failures, failure{name: "the run itself (see above)"})
	}
	sum.report()
	if sum.failed > 0 {
		return 1
	}
	return 0
}

func goTest(args []string, sum *summary, stderr io.Writer) error {
	cmd := exec.Command("go", append([]string{"test", "-json"}, args...)...)
	cmd.Stderr = stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	readErr := sum.read(out)
	if readErr != nil {
		_, _ = io.Copy(io.Discard, out) // a reader that stops would block go test for ever
	}
	if err := cmd.Wait(); err != nil {
		return err
	}
	return readErr
}

// read takes the events of one run up to the end of r.
func (s *summary) read(r io.Reader) error {
	in := bufio.NewReader(r)
	for {
		line, err := in.ReadBytes('\n')
		if len(line) > 0 {
			var e event
			if json.Unmarshal(line, &e) == nil && e.Action != "" {
				s.add(e)
			} else {
				_, _ = s.out.Write(line)
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("reading test events: %w", err)
		}
	}
}

// splitSteps cuts the arguments at each `--`.
func splitSteps(args []string) [][]string {
	steps := [][]string{nil}
	for _, a := range args {
		if a == "--" {
			steps = append(steps, nil)
			continue
		}
		steps[len(steps)-1] = append(steps[len(steps)-1], a)
	}
	var out [][]string
	for _, s := range steps {
		if len(s) > 0 {
			out = append(out, s)
		}
	}
	return out
}

func splitList(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return r == ',' || r == ' ' })
}
