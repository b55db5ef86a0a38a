package main

import (
	"cmp"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
)

// event is one line of `go test -json` (see `go doc test2json`).
type event struct {
	Action      string
	Package     string
	Test        string
	Elapsed     float64 // seconds
	Output      string
	ImportPath  string // of build-output and build-fail
	FailedBuild string // of a package's fail: the ImportPath that did not build
}

// result is what is known of one test, or of a package where the name is empty.
type result struct {
	output strings.Builder
	done   bool
}

// counts are the ended tests of one package.
type counts struct {
	passed, failed, skipped int
}

// failure is a failed test with the first lines that it logged.
type failure struct {
	name string
	said []string
}

type slow struct {
	name    string
	seconds float64
}

// summary adds up test events. Tests and subtests count alike; a package that
// fails without a failed test (a panic, a timeout, no build) counts as one.
// Not safe for concurrent use.
type summary struct {
	out      io.Writer
	require  []string
	running  map[string]map[string]*result // package -> test -> result
	packages map[string]*counts
	builds   map[string]*strings.Builder // import path -> compiler output

	passed, failed, skipped int
	failures                []failure
	skips                   map[string]int // reason -> count
	slowest                 []slow
}

func newSummary(out io.Writer, require []string) *summary {
	return &summary{
		out:      out,
		require:  require,
		running:  map[string]map[string]*result{},
		packages: map[string]*counts{},
		builds:   map[string]*strings.Builder{},
		skips:    map[string]int{},
	}
}

func (s *summary) add(e event) {
	switch e.Action {
	case "build-output":
		b := s.builds[e.ImportPath]
		if b == nil {
			b = &strings.Builder{}
			s.builds[e.ImportPath] = b
		}
		b.WriteString(e.Output)
	case "run":
		s.result(e)
	case "output":
		s.result(e).output.WriteString(e.Output)
	case "pass", "fail", "skip":
		if e.Test == "" {
			s.endPackage(e)
		} else {
			s.endTest(e)
		}
	}
}

func (s *summary) result(e event) *result {
	tests := s.running[e.Package]
	if tests == nil {
		tests = map[string]*result{}
		s.running[e.Package] = tests
	}
	r := tests[e.Test]
	if r == nil {
		r = &result{}
		tests[e.Test] = r
	}
	return r
}

func (s *summary) counts(pkg string) *counts {
	c := s.packages[pkg]
	if c == nil {
		c = &counts{}
		s.packages[pkg] = c
	}
	return c
}

func (s *summary) endTest(e event) {
	r, c := s.result(e), s.counts(e.Package)
	name := short(e.Package) + " " + e.Test
	switch e.Action {
	case "pass":
		s.passed++
		c.passed++
	case "fail":
		s.fail(c, name, r.output.String())
	case "skip":
		reason := skipReason(r.output.String())
		switch {
		case reason == "":
			s.fail(c, name, r.output.String()+"    skipped without a reason\n")
		case s.required(reason):
			s.fail(c, name, fmt.Sprintf("%s    skipped, but REQUIRE=%s says that this machine has it\n",
				r.output.String(), strings.Join(s.require, ",")))
		default:
			s.skipped++
			c.skipped++
			s.skips[reason]++
		}
	}
	if e.Elapsed >= 2 && !strings.Contains(e.Test, "/") {
		s.slowest = append(s.slowest, slow{name, e.Elapsed})
	}
	r.done = true
	r.output.Reset()
}

func (s *summary) endPackage(e event) {
	c := s.counts(e.Package)
	if e.Action == "fail" {
		// A test that began and never ended is the one that was running when the
		// process died.
		for _, name := range unfinished(s.running[e.Package]) {
			s.fail(c, short(e.Package)+" "+name+" (did not finish)", s.running[e.Package][name].output.String())
		}
		if c.failed == 0 || e.FailedBuild != "" {
			text := ""
			if b := s.builds[e.FailedBuild]; b != nil {
				text = b.String()
			}
			if r := s.running[e.Package][""]; r != nil {
				text += r.output.String()
			}
			s.fail(c, short(e.Package), text)
		}
	}
	delete(s.running, e.Package)

	word := "ok  "
	switch {
	case c.failed > 0 || e.Action == "fail":
		word = "FAIL"
	case c.passed == 0 && c.skipped == 0:
		return // no tests in it
	}
	line := fmt.Sprintf("%s  %s  %d passed", word, short(e.Package), c.passed)
	if c.failed > 0 {
		line += fmt.Sprintf(", %d failed", c.failed)
	}
	if c.skipped > 0 {
		line += fmt.Sprintf(", %d skipped", c.skipped)
	}
	fmt.Fprintf(s.out, "%s  %.1fs\n", line, e.Elapsed)
}

func (s *summary) fail(c *counts, name, output string) {
	s.failed++
	c.failed++
	s.failures = append(s.failures, failure{name, firstLogged(output)})
	fmt.Fprintf(s.out, "\n--- failed: %s\n%s", name, output)
	if output != "" && !strings.HasSuffix(output, "\n") {
		fmt.Fprintln(s.out)
	}
}

func (s *summary) required(reason string) bool {
	for _, r := range s.require {
		if strings.HasPrefix(reason, "requires "+r+":") {
			return true
		}
	}
	return false
}

// report prints the slow tests, the skips and the failures, and the closing line.
func (s *summary) report() {
	// A package that was cut off (its run was killed) never reported its end.
	for pkg, tests := range s.running {
		for _, name := range unfinished(tests) {
			s.fail(s.counts(pkg), short(pkg)+" "+name+" (did not finish)", tests[name].output.String())
		}
	}
	if len(s.slowest) > 0 {
		slices.SortStableFunc(s.slowest, func(a, b slow) int { return cmp.Compare(b.seconds, a.seconds) })
		fmt.Fprintln(s.out, "\nslowest tests:")
		for _, t := range s.slowest[:min(10, len(s.slowest))] {
			fmt.Fprintf(s.out, "  %6.1fs  %s\n", t.seconds, t.name)
		}
	}
	if len(s.skips) > 0 {
		fmt.Fprintln(s.out, "\nskipped:")
		reasons := make([]string, 0, len(s.skips))
		for r := range s.skips {
			reasons = append(reasons, r)
		}
		slices.SortFunc(reasons, func(a, b string) int {
			return cmp.Or(cmp.Compare(s.skips[b], s.skips[a]), cmp.Compare(a, b))
		})
		for _, r := range reasons {
			fmt.Fprintf(s.out, "  %5d  %s\n", s.skips[r], r)
		}
	}
	if len(s.failures) > 0 {
		fmt.Fprintln(s.out, "\nfailed:")
		for _, f := range s.failures {
			fmt.Fprintf(s.out, "  %s\n", f.name)
			for _, line := range f.said {
				fmt.Fprintf(s.out, "      %s\n", line)
			}
		}
	}
	fmt.Fprintf(s.out, "\n%d passed, %d failed, %d skipped\n", s.passed, s.failed, s.skipped)
}

func unfinished(tests map[string]*result) []string {
	var names []string
	for name, r := range tests {
		if name != "" && !r.done {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// logLine is a line that t.Log and t.Skip write: indented, with file and line.
var logLine = regexp.MustCompile(`^\s+\S+\.go:\d+: (.*)$`)

// skipReason returns what the test gave to t.Skip, "" if nothing. t.Skip logs
// its reason last, so that it is the last line with a file and line number.
func skipReason(output string) string {
	reason := ""
	for line := range strings.Lines(output) {
		if m := logLine.FindStringSubmatch(strings.TrimRight(line, "\r\n")); m != nil {
			reason = strings.TrimSpace(m[1])
		}
	}
	return reason
}

// firstLogged returns the first lines with a file and line number, shortened: in
// them a test usually says why it failed.
func firstLogged(output string) []string {
	const lines, width = 3, 300
	var said []string
	for line := range strings.Lines(output) {
		line = strings.TrimSpace(line)
		if !logLine.MatchString("    " + line) {
			continue
		}
		if len(line) > width {
			line = strings.ToValidUTF8(line[:width], "") + "..."
		}
		if said = append(said, line); len(said) == lines {
			break
		}
	}
	return said
}

// short drops what all packages of the project have in common.
func short(pkg string) string {
	return strings.TrimPrefix(pkg, "github.com/cmdexec/cmdexec/")
}
