package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// project writes a module of four packages: one with every kind of result, one
// that panics, one that does not compile and one without tests.
func project(t *testing.T) {
	t.Helper()
	root := t.TempDir()
	for name, text := range map[string]string{
		"go.mod":        "module example.test/p\n\ngo 1.26.0\n",
		"no/no.go":      "package no\n",
		"bad/b.go":      "package bad\n\nfunc f() int { return \"text\" }\n",
		"bad/b_test.go": "package bad\n\nimport \"testing\"\n\nfunc TestB(t *testing.T) {}\n",
		"boom/boom_test.go": "package boom\n\nimport \"testing\"\n\nfunc TestFine(t *testing.T) {}\n\n" +
			"func TestBoom(t *testing.T) { t.Log(\"before the panic\"); panic(\"boom\") }\n",
		"mix/mix_test.go": `package mix

import "testing"

func TestPass(t *testing.T) { t.Log("a passing test is quiet") }

func TestFail(t *testing.T) { t.Error("two is not three") }

func TestSub(t *testing.T) {
	t.Run("a", func(t *testing.T) {})
	t.Run("b", func(t *testing.T) { t.Skip("requires docker: no engine answers") })
}

func TestDocker(t *testing.T) {
	t.Log("looked at the socket")
	t.Skip("requires docker: no engine answers")
}

func TestSilent(t *testing.T) { t.SkipNow() }
`,
	} {
		path := filepath.Join(root, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	t.Chdir(root)
	t.Setenv("GOWORK", "off")
}

func testsum(require string, args ...string) (int, string) {
	var out, errs bytes.Buffer
	code := run(args, require, strings.NewReader(""), &out, &errs)
	return code, errs.String() + out.String()
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimRight(s, "\n"), "\n")
	return lines[len(lines)-1]
}

func TestEveryKindOfResult(t *testing.T) {
	project(t)
	code, out := testsum("", "./mix", "./no", "--", "./boom", "./bad")

	if code != 1 {
		t.Errorf("exit code %d, want 1", code)
	}
	// Passed: TestPass, TestSub, TestSub/a, TestFine. Failed: TestFail,
	// TestSilent, TestBoom, the package bad. Skipped: TestSub/b, TestDocker.
	if got, want := lastLine(out), "4 passed, 4 failed, 2 skipped"; got != want {
		t.Errorf("last line %q, want %q", got, want)
	}
	for _, want := range []string{
		"two is not three",
		"skipped without a reason",
		"before the panic",
		"cannot use \"text\"",
		"2  requires docker: no engine answers",
		"FAIL  example.test/p/mix  3 passed, 2 failed, 2 skipped",
		"FAIL  example.test/p/boom",
		"FAIL  example.test/p/bad",
		"\nfailed:\n  example.test/p/mix TestFail\n      mix_test.go:",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("output lacks %q", want)
		}
	}
	for _, not := range []string{"a passing test is quiet", "example.test/p/no", "looked at the socket"} {
		if strings.Contains(out, not) {
			t.Errorf("output has %q", not)
		}
	}
	if t.Failed() {
		t.Log(out)
	}
}

func TestRequireTurnsASkipIntoAFailure(t *testing.T) {
	project(t)
	code, out := testsum("redis,docker", "-run=TestDocker|TestPass", "./mix")
	if got, want := lastLine(out), "1 passed, 1 failed, 0 skipped"; code != 1 || got != want {
		t.Errorf("exit code %d, last line %q, want 1 and %q\n%s", code, got, want, out)
	}
	if !strings.Contains(out, "REQUIRE=redis,docker") {
		t.Errorf("the failure does not say why:\n%s", out)
	}
	code, out = testsum("redis", "-run=TestDocker|TestPass", "./mix")
	if got, want := lastLine(out), "1 passed, 0 failed, 1 skipped"; code != 0 || got != want {
		t.Errorf("exit code %d, last line %q, want 0 and %q\n%s", code, got, want, out)
	}
}

func TestARunThatCannotStartFails(t *testing.T) {
	project(t)
	code, out := testsum("", "-no-such-flag", "./mix")
	if got, want := lastLine(out), "0 passed, 1 failed, 0 skipped"; code != 1 || got != want {
		t.Errorf("exit code %d, last line %q, want 1 and %q\n%s", code, got, want, out)
	}
}

func TestEventsThatStopAreAFailure(t *testing.T) {
	var out bytes.Buffer
	events := `{"Action":"run","Package":"p","Test":"TestLong"}
{"Action":"output","Package":"p","Test":"TestLong","Output":"halfway\n"}
`
	code := run([]string{"-"}, "", strings.NewReader(events), &out, &out)
	if got, want := lastLine(out.String()), "0 passed, 1 failed, 0 skipped"; code != 1 || got != want {
		t.Errorf("exit code %d, last line %q, want 1 and %q\n%s", code, got, want, out.String())
	}
	if !strings.Contains(out.String(), "p TestLong (did not finish)\nhalfway") {
		t.Errorf("the cut test is not shown:\n%s", out.String())
	}
}

func TestSkipReason(t *testing.T) {
	for output, want := range map[string]string{
		"=== RUN   TestX\n    x_test.go:7: requires redis: no server\n--- SKIP: TestX (0.00s)\n": "requires redis: no server",
		"=== RUN   TestX\n--- SKIP: TestX (0.00s)\n":                                             "",
		"=== RUN   TestX\n    x_test.go:5: looked\n    x_test.go:7: late\n--- SKIP: TestX\n":     "late",
	} {
		if got := skipReason(output); got != want {
			t.Errorf("skipReason(%q) = %q, want %q", output, got, want)
		}
	}
}
