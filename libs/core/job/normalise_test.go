package job

import (
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"reflect"
	"slices"
	"strings"
	"testing"
)

func ptr[T any](v T) *T { return &v }

// text returns n bytes that every text field accepts.
func text(n int) string { return strings.Repeat("a", n) }

// process and container are the smallest specs of the two executors.
func process() Spec   { return Spec{Command: Command{Shell: "true"}} }
func container() Spec { return Spec{Command: Command{Shell: "true"}, ContainerImage: "alpine:3"} }

func manyLabels(n int) map[string]string {
	m := map[string]string{}
	for i := range n {
		m[fmt.Sprintf("label-%d", i)] = ""
	}
	return m
}

func manyFiles(n int) []File {
	fs := make([]File, n)
	for i := range fs {
		fs[i].Path = fmt.Sprintf("file-%d", i)
	}
	return fs
}

// envOf makes n variables whose names and values have total bytes together.
func envOf(n, total int) map[string]string {
	m := map[string]string{}
	for i := range n {
		m[fmt.Sprintf("V%03d", i)] = ""
	}
	if total > 4*n {
		m["V000"] = text(total - 4*n)
	}
	return m
}

// imageOf makes a reference of n bytes: a name, a slash and a tag of fitting length.
func imageOf(n int) string {
	s := "registry.example/" + strings.Repeat("abcdefg/", n/8)
	return s[:n-1-(n%2)] + "a" + text(n%2)
}

// limit is one bound of one field: set puts a value into a spec, at is the last
// one that is accepted and past the first that is refused.
type limit struct {
	name     string // of the constant
	spec     Spec
	at, past func(*Spec)
	field    string
	code     string
}

func row[T int | int64 | float64](name string, base Spec, field, code string, at, past T, set func(*Spec, T)) limit {
	return limit{
		name: name, spec: base, field: field, code: code,
		at: func(s *Spec) { set(s, at) }, past: func(s *Spec) { set(s, past) },
	}
}

func limits() []limit {
	return []limit{
		row("MaxCommandBytes (shell)", process(), "command", CodeTooLong, MaxCommandBytes, MaxCommandBytes+1, func(s *Spec, v int) { s.Command = Command{Shell: text(v)} }),
		row("MaxCommandBytes (argv)", process(), "command", CodeTooLong, MaxCommandBytes, MaxCommandBytes+1, func(s *Spec, v int) { s.Command = Command{Argv: []string{"x", text(v - 1)}} }),
		row("MaxArgs", process(), "command", CodeTooMany, MaxArgs, MaxArgs+1, func(s *Spec, v int) { s.Command = Command{Argv: slices.Repeat([]string{"x"}, v)} }),
		row("MaxNameLen", process(), "name", CodeTooLong, MaxNameLen, MaxNameLen+1, func(s *Spec, v int) { s.Name = text(v) }),
		row("MaxImageLen", process(), "containerImage", CodeTooLong, MaxImageLen, MaxImageLen+1, func(s *Spec, v int) { s.ContainerImage = imageOf(v) }),
		row("MaxLabels", process(), "labels", CodeTooMany, MaxLabels, MaxLabels+1, func(s *Spec, v int) { s.Labels = manyLabels(v) }),
		row("MaxLabelKeyLen", process(), "labels", CodeInvalid, MaxLabelKeyLen, MaxLabelKeyLen+1, func(s *Spec, v int) { s.Labels = map[string]string{text(v): ""} }),
		row("MaxLabelValueLen", process(), "labels", CodeInvalid, MaxLabelValueLen, MaxLabelValueLen+1, func(s *Spec, v int) { s.Labels = map[string]string{"k": text(v)} }),
		row("MaxLabels (constraints)", process(), "constraints.labels", CodeTooMany, MaxLabels, MaxLabels+1, func(s *Spec, v int) { s.Constraints.Labels = manyLabels(v) }),
		row("MaxLabelKeyLen (constraints)", process(), "constraints.labels", CodeInvalid, MaxLabelKeyLen, MaxLabelKeyLen+1, func(s *Spec, v int) { s.Constraints.Labels = map[string]string{text(v): ""} }),
		row("MaxLabelValueLen (constraints)", process(), "constraints.labels", CodeInvalid, MaxLabelValueLen, MaxLabelValueLen+1, func(s *Spec, v int) { s.Constraints.Labels = map[string]string{"k": text(v)} }),
		row("MaxQueueLen (constraints.os)", process(), "constraints.os", CodeInvalid, MaxQueueLen, MaxQueueLen+1, func(s *Spec, v int) { s.Constraints.OS = text(v) }),
		row("MaxQueueLen (constraints.arch)", process(), "constraints.arch", CodeInvalid, MaxQueueLen, MaxQueueLen+1, func(s *Spec, v int) { s.Constraints.Arch = text(v) }),
		row("MaxEnvVars", process(), "env", CodeTooMany, MaxEnvVars, MaxEnvVars+1, func(s *Spec, v int) { s.Env = envOf(v, 0) }),
		row("MaxEnvBytes", process(), "env", CodeTooLong, MaxEnvBytes, MaxEnvBytes+1, func(s *Spec, v int) { s.Env = envOf(3, v) }),
		row("MaxEnvNameLen", process(), "env", CodeInvalid, MaxEnvNameLen, MaxEnvNameLen+1, func(s *Spec, v int) { s.Env = map[string]string{text(v): ""} }),
		row("MaxPathLen (workingDir)", process(), "workingDir", CodeTooLong, MaxPathLen, MaxPathLen+1, func(s *Spec, v int) { s.WorkingDir = text(v) }),
		row("MaxPathLen (files)", process(), "files[0].path", CodeTooLong, MaxPathLen, MaxPathLen+1, func(s *Spec, v int) { s.Files = []File{{Path: text(v)}} }),
		row("MaxUserLen", process(), "user", CodeInvalid, MaxUserLen, MaxUserLen+1, func(s *Spec, v int) { s.User = text(v) }),
		row("MaxFiles", process(), "files", CodeTooMany, MaxFiles, MaxFiles+1, func(s *Spec, v int) { s.Files = manyFiles(v) }),
		row("MaxInputBytes (stdin)", process(), "files", CodeTooLong, MaxInputBytes, MaxInputBytes+1, func(s *Spec, v int) { s.Stdin = text(v) }),
		row("MaxInputBytes (stdin and files)", process(), "files", CodeTooLong, MaxInputBytes, MaxInputBytes+1, func(s *Spec, v int) {
			s.Stdin, s.Files = text(100), []File{{Path: "a", Content: text(100)}, {Path: "b", Content: text(v - 200)}}
		}),
		row("file mode", process(), "files[0].mode", CodeInvalid, 0o777, 0o1000, func(s *Spec, v int) {
			s.Files = []File{{Path: "a", Mode: fmt.Sprintf("%04o", v)}}
		}),
		row("MaxQueueLen", process(), "queue", CodeInvalid, MaxQueueLen, MaxQueueLen+1, func(s *Spec, v int) { s.Queue = text(v) }),
		row("least timeout", process(), "timeout", CodeOutOfRange, 1, -1, func(s *Spec, v int) { s.Timeout = v }),
		row("MaxTimeoutSeconds", process(), "timeout", CodeOutOfRange, MaxTimeoutSeconds, MaxTimeoutSeconds+1, func(s *Spec, v int) { s.Timeout = v }),
		row("least timeouts.queue", process(), "timeouts.queue", CodeOutOfRange, 1, -1, func(s *Spec, v int) { s.Timeouts.Queue = v }),
		row("MaxWaitSeconds (queue)", process(), "timeouts.queue", CodeOutOfRange, MaxWaitSeconds, MaxWaitSeconds+1, func(s *Spec, v int) { s.Timeouts.Queue = v }),
		row("least timeouts.total", process(), "timeouts.total", CodeOutOfRange, 1, -1, func(s *Spec, v int) { s.Timeouts.Total = v }),
		row("MaxWaitSeconds (total)", process(), "timeouts.total", CodeOutOfRange, MaxWaitSeconds, MaxWaitSeconds+1, func(s *Spec, v int) { s.Timeouts.Total = v }),
		row("least timeouts.prepare", process(), "timeouts.prepare", CodeOutOfRange, 1, -1, func(s *Spec, v int) { s.Timeouts.Prepare = v }),
		row("MaxPrepareSeconds", process(), "timeouts.prepare", CodeOutOfRange, MaxPrepareSeconds, MaxPrepareSeconds+1, func(s *Spec, v int) { s.Timeouts.Prepare = v }),
		row("MinCPU", process(), "resources.cpu", CodeOutOfRange, MinCPU, MinCPU-1e-9, func(s *Spec, v float64) { s.Resources.CPU = v }),
		row("MaxCPU", process(), "resources.cpu", CodeOutOfRange, MaxCPU, MaxCPU+1e-9, func(s *Spec, v float64) { s.Resources.CPU = v }),
		row("cpu is a number", process(), "resources.cpu", CodeOutOfRange, MaxCPU, math.NaN(), func(s *Spec, v float64) { s.Resources.CPU = v }),
		row("cpu is finite", process(), "resources.cpu", CodeOutOfRange, MaxCPU, math.Inf(1), func(s *Spec, v float64) { s.Resources.CPU = v }),
		row("MinMemoryMB", process(), "resources.memoryMb", CodeOutOfRange, MinMemoryMB, MinMemoryMB-1, func(s *Spec, v int64) { s.Resources.MemoryMB = v }),
		row("MaxMemoryMB", process(), "resources.memoryMb", CodeOutOfRange, MaxMemoryMB, MaxMemoryMB+1, func(s *Spec, v int64) { s.Resources.MemoryMB = v }),
		row("memory does not overflow", process(), "resources.memoryMb", CodeOutOfRange, MaxMemoryMB, math.MaxInt64, func(s *Spec, v int64) { s.Resources.MemoryMB = v }),
		row("least pids", process(), "resources.pids", CodeOutOfRange, 1, -1, func(s *Spec, v int64) { s.Resources.PIDs = v }),
		row("MaxPIDs", process(), "resources.pids", CodeOutOfRange, MaxPIDs, MaxPIDs+1, func(s *Spec, v int64) { s.Resources.PIDs = v }),
		row("least tmpfsMb", container(), "resources.tmpfsMb", CodeOutOfRange, 1, -1, func(s *Spec, v int64) { s.Resources.TmpfsMB = v }),
		row("MaxTmpfsMB", container(), "resources.tmpfsMb", CodeOutOfRange, MaxTmpfsMB, MaxTmpfsMB+1, func(s *Spec, v int64) { s.Resources.TmpfsMB = v }),
		row("least priority", process(), "priority", CodeOutOfRange, 0, -1, func(s *Spec, v int) { s.Priority = &v }),
		row("MaxPriority", process(), "priority", CodeOutOfRange, MaxPriority, MaxPriority+1, func(s *Spec, v int) { s.Priority = &v }),
		row("least maxAttempts", process(), "retry.maxAttempts", CodeOutOfRange, 1, -1, func(s *Spec, v int) { s.Retry.MaxAttempts = v }),
		row("MaxAttemptsLimit", process(), "retry.maxAttempts", CodeOutOfRange, MaxAttemptsLimit, MaxAttemptsLimit+1, func(s *Spec, v int) { s.Retry.MaxAttempts = v }),
		row("least backoffSeconds", process(), "retry.backoffSeconds", CodeOutOfRange, 0, -1, func(s *Spec, v int) { s.Retry.BackoffSeconds = &v }),
		row("MaxBackoffLimit", process(), "retry.backoffSeconds", CodeOutOfRange, MaxBackoffLimit, MaxBackoffLimit+1, func(s *Spec, v int) { s.Retry.BackoffSeconds = &v }),
		row("least maxBackoffSeconds", process(), "retry.maxBackoffSeconds", CodeOutOfRange, 1, -1, func(s *Spec, v int) { s.Retry.MaxBackoffSeconds = v }),
		row("MaxBackoffLimit (max)", process(), "retry.maxBackoffSeconds", CodeOutOfRange, MaxBackoffLimit, MaxBackoffLimit+1, func(s *Spec, v int) { s.Retry.MaxBackoffSeconds = v }),
		row("MaxRetryExitCodes", process(), "retry.onExitCodes", CodeTooMany, MaxRetryExitCodes, MaxRetryExitCodes+1, func(s *Spec, v int) { s.Retry.OnExitCodes = slices.Repeat([]int{1}, v) }),
		row("least exit code", process(), "retry.onExitCodes", CodeOutOfRange, 1, 0, func(s *Spec, v int) { s.Retry.OnExitCodes = []int{v} }),
		row("greatest exit code", process(), "retry.onExitCodes", CodeOutOfRange, 255, 256, func(s *Spec, v int) { s.Retry.OnExitCodes = []int{v} }),
		row("least graceSeconds", process(), "stop.graceSeconds", CodeOutOfRange, 0, -1, func(s *Spec, v int) { s.Stop.GraceSeconds = &v }),
		row("MaxGraceSeconds", process(), "stop.graceSeconds", CodeOutOfRange, MaxGraceSeconds, MaxGraceSeconds+1, func(s *Spec, v int) { s.Stop.GraceSeconds = &v }),
		row("MinLogBytes", process(), "logMaxBytes", CodeOutOfRange, MinLogBytes, MinLogBytes-1, func(s *Spec, v int64) { s.LogMaxBytes = v }),
		row("MaxLogBytes", process(), "logMaxBytes", CodeOutOfRange, MaxLogBytes, MaxLogBytes+1, func(s *Spec, v int64) { s.LogMaxBytes = v }),
	}
}

func TestLimits(t *testing.T) {
	for _, l := range limits() {
		t.Run(l.name, func(t *testing.T) {
			at := l.spec
			l.at(&at)
			if _, errs := Normalise(at); len(errs) > 0 {
				t.Errorf("at the limit: %v", errs)
			}
			past := l.spec
			l.past(&past)
			_, errs := Normalise(past)
			if len(errs) != 1 || errs[0].Field != l.field || errs[0].Code != l.code || errs[0].Detail == "" {
				t.Errorf("past the limit: %+v, want one %s of %s", errs, l.code, l.field)
			}
		})
	}
}

func TestValues(t *testing.T) {
	for _, c := range []struct {
		name  string
		set   func(*Spec)
		field string // empty: accepted
		code  string
	}{
		{"no command", func(s *Spec) { s.Command = Command{} }, "command", CodeRequired},
		{"blank command", func(s *Spec) { s.Command.Shell = " \n\t" }, "command", CodeRequired},
		{"empty argv", func(s *Spec) { s.Command = Command{Argv: []string{}} }, "command", CodeRequired},
		{"no program", func(s *Spec) { s.Command = Command{Argv: []string{"", "x"}} }, "command", CodeRequired},
		{"empty argument", func(s *Spec) { s.Command = Command{Argv: []string{"x", ""}} }, "", ""},
		{"NUL in command", func(s *Spec) { s.Command.Shell = "a\x00b" }, "command", CodeInvalid},
		{"NUL in argv", func(s *Spec) { s.Command = Command{Argv: []string{"a", "\x00"}} }, "command", CodeInvalid},
		{"invalid UTF-8 in argv", func(s *Spec) { s.Command = Command{Argv: []string{"a", "\xff"}} }, "command", CodeInvalid},
		{"newlines in command", func(s *Spec) { s.Command.Shell = "a\nb" }, "", ""},
		{"newline in name", func(s *Spec) { s.Name = "a\nb" }, "name", CodeInvalid},
		{"escape in name", func(s *Spec) { s.Name = "\x1b[31m" }, "name", CodeInvalid},
		{"words in name", func(s *Spec) { s.Name = "größe 2 ✓" }, "", ""},
		{"space in label name", func(s *Spec) { s.Labels = map[string]string{"a b": ""} }, "labels", CodeInvalid},
		{"operator as label name", func(s *Spec) { s.Labels = map[string]string{"$gt": ""} }, "labels", CodeInvalid},
		{"operator as label value", func(s *Spec) { s.Labels = map[string]string{"a": "$gt"} }, "", ""},
		{"empty label name", func(s *Spec) { s.Labels = map[string]string{"": ""} }, "labels", CodeInvalid},
		{"control in label value", func(s *Spec) { s.Labels = map[string]string{"a": "\x07"} }, "labels", CodeInvalid},
		{"= in env name", func(s *Spec) { s.Env = map[string]string{"A=B": ""} }, "env", CodeInvalid},
		{"digit first in env name", func(s *Spec) { s.Env = map[string]string{"1A": ""} }, "env", CodeInvalid},
		{"empty env name", func(s *Spec) { s.Env = map[string]string{"": ""} }, "env", CodeInvalid},
		{"NUL in env value", func(s *Spec) { s.Env = map[string]string{"A": "\x00"} }, "env", CodeInvalid},
		{"the worker's env", func(s *Spec) { s.Env = map[string]string{"CMDEXEC_JOB_ID": "x"} }, "env", CodeInvalid},
		{"lines in env value", func(s *Spec) { s.Env = map[string]string{"A": "1\n2"} }, "", ""},
		{"secretEnv", func(s *Spec) { s.SecretEnv = map[string]string{} }, "secretEnv", CodeUnsupportedField},
		{"webhook", func(s *Spec) { s.Webhook = &Webhook{} }, "webhook", CodeUnsupportedField},
		{"workingDir upwards", func(s *Spec) { s.WorkingDir = "a/../../b" }, "workingDir", CodeInvalid},
		{"workingDir with dots in a name", func(s *Spec) { s.WorkingDir = "/a..b/..." }, "", ""},
		{"NUL in workingDir", func(s *Spec) { s.WorkingDir = "\x00" }, "workingDir", CodeInvalid},
		{"user as option", func(s *Spec) { s.User = "-u" }, "user", CodeInvalid},
		{"uid and gid", func(s *Spec) { s.User = "1000:1000" }, "", ""},
		{"space in user", func(s *Spec) { s.User = "a b" }, "user", CodeInvalid},
		{"NUL in stdin", func(s *Spec) { s.Stdin = "\x00" }, "stdin", CodeInvalid},
		{"file without path", func(s *Spec) { s.Files = []File{{}} }, "files[0].path", CodeInvalid},
		{"absolute file", func(s *Spec) { s.Files = []File{{Path: "a"}, {Path: "/etc/passwd"}} }, "files[1].path", CodeInvalid},
		{"file above", func(s *Spec) { s.Files = []File{{Path: "../a"}} }, "files[0].path", CodeInvalid},
		{"folder as file", func(s *Spec) { s.Files = []File{{Path: "a/"}} }, "files[0].path", CodeInvalid},
		{"the folder itself as file", func(s *Spec) { s.Files = []File{{Path: "./"}} }, "files[0].path", CodeInvalid},
		{"a file twice", func(s *Spec) { s.Files = []File{{Path: "a/b"}, {Path: "./a//b"}} }, "files[1].path", CodeInvalid},
		{"NUL in a file", func(s *Spec) { s.Files = []File{{Path: "a", Content: "\x00"}} }, "files[0].content", CodeInvalid},
		{"mode in words", func(s *Spec) { s.Files = []File{{Path: "a", Mode: "rwx"}} }, "files[0].mode", CodeInvalid},
		{"decimal mode", func(s *Spec) { s.Files = []File{{Path: "a", Mode: "0689"}} }, "files[0].mode", CodeInvalid},
		{"mode of many zeros", func(s *Spec) { s.Files = []File{{Path: "a", Mode: strings.Repeat("0", 4096) + "644"}} }, "files[0].mode", CodeInvalid},
		{"unknown network", func(s *Spec) { s.ContainerImage, s.Network = "a", "host" }, "network", CodeInvalid},
		{"bridge", func(s *Spec) { s.ContainerImage, s.Network = "a", NetworkBridge }, "", ""},
		{"unknown pullPolicy", func(s *Spec) { s.ContainerImage, s.PullPolicy = "a", "Always" }, "pullPolicy", CodeInvalid},
		{"unknown onWorkerLost", func(s *Spec) { s.OnWorkerLost = "restart" }, "onWorkerLost", CodeInvalid},
		{"unknown signal", func(s *Spec) { s.Stop.Signal = "SIGSTOP" }, "stop.signal", CodeInvalid},
		{"wildcard in queue", func(s *Spec) { s.Queue = ">" }, "queue", CodeInvalid},
		{"dot in queue", func(s *Spec) { s.Queue = "a.b" }, "queue", CodeInvalid},
		{"upper case queue", func(s *Spec) { s.Queue = "A" }, "queue", CodeInvalid},
		{"os in capitals", func(s *Spec) { s.Constraints.OS = "Linux" }, "constraints.os", CodeInvalid},
		{"bad image", func(s *Spec) { s.ContainerImage = "UPPER" }, "containerImage", CodeInvalid},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := process()
			c.set(&s)
			_, errs := Normalise(s)
			switch {
			case c.field == "" && len(errs) > 0:
				t.Errorf("refused: %v", errs)
			case c.field != "" && (len(errs) != 1 || errs[0].Field != c.field || errs[0].Code != c.code):
				t.Errorf("got %+v, want one %s of %s", errs, c.code, c.field)
			}
		})
	}
}

func TestDefaults(t *testing.T) {
	want := Spec{
		Command: Command{Shell: "true"}, ContainerImage: "alpine:3", Timeout: 300,
		Resources: Resources{CPU: 1, MemoryMB: 512, PIDs: 128, TmpfsMB: 64},
		Network:   "none", PullPolicy: "missing", Queue: "default", Priority: ptr(50),
		Retry:        Retry{MaxAttempts: 1, BackoffSeconds: ptr(2), MaxBackoffSeconds: 300},
		OnWorkerLost: "requeue", Timeouts: Timeouts{Prepare: 300},
		Stop: Stop{Signal: "SIGTERM", GraceSeconds: ptr(10)}, LogMaxBytes: 16 << 20,
	}
	got, errs := Normalise(container())
	if len(errs) > 0 || !reflect.DeepEqual(got, want) {
		t.Errorf("container: %v\n got %+v\nwant %+v", errs, got, want)
	}
	if got.Executor() != ExecutorDocker {
		t.Errorf("executor is %s", got.Executor())
	}
	want.ContainerImage, want.Network, want.PullPolicy, want.Resources.TmpfsMB = "", "", "", 0
	got, errs = Normalise(process())
	if len(errs) > 0 || !reflect.DeepEqual(got, want) {
		t.Errorf("process: %v\n got %+v\nwant %+v", errs, got, want)
	}
	if got.Executor() != ExecutorProcess {
		t.Errorf("executor is %s", got.Executor())
	}
	s := process()
	s.Files = []File{{Path: "a"}}
	if got, _ := Normalise(s); got.Files[0].Mode != "0644" {
		t.Errorf("file mode is %q", got.Files[0].Mode)
	}
	zero := process()
	zero.Priority, zero.Stop.GraceSeconds, zero.Retry.BackoffSeconds = ptr(0), ptr(0), ptr(0)
	if got, _ := Normalise(zero); got.PriorityValue() != 0 || got.GraceSeconds() != 0 || *got.Retry.BackoffSeconds != 0 {
		t.Error("an explicit zero was replaced by a default")
	}
}

func TestProcessJobsRefuseWhatOnlyContainersHave(t *testing.T) {
	for field, set := range map[string]func(*Spec){
		"network":           func(s *Spec) { s.Network = NetworkNone },
		"pullPolicy":        func(s *Spec) { s.PullPolicy = PullMissing },
		"resources.tmpfsMb": func(s *Spec) { s.Resources.TmpfsMB = 64 },
	} {
		s := process()
		set(&s)
		if _, errs := Normalise(s); len(errs) != 1 || errs[0].Field != field || errs[0].Code != CodeNeedsContainer {
			t.Errorf("%s: %+v", field, errs)
		}
		s.ContainerImage = "alpine"
		if _, errs := Normalise(s); len(errs) > 0 {
			t.Errorf("%s in a container: %v", field, errs)
		}
	}
}

func TestAllErrorsAreReportedInOrder(t *testing.T) {
	_, errs := Normalise(Spec{Name: "\n", Timeout: -1, Queue: "*", LogMaxBytes: 1, SecretEnv: map[string]string{}})
	var fields []string
	for _, e := range errs {
		fields = append(fields, e.Field)
	}
	want := []string{"command", "name", "timeout", "secretEnv", "queue", "logMaxBytes"}
	if !slices.Equal(fields, want) {
		t.Errorf("got %v, want %v", fields, want)
	}
}

// TestErrorsNeverEchoValues plants a canary in every string of a spec, in a way
// that is refused wherever anything can be.
func TestErrorsNeverEchoValues(t *testing.T) {
	const word = "sk_canary_7"
	bad := word + "\x00\n\x80"
	s := Spec{
		Command: Command{Argv: []string{bad}}, Name: bad + text(MaxNameLen), ContainerImage: bad,
		Labels: map[string]string{bad: bad}, Env: map[string]string{bad: bad}, SecretEnv: map[string]string{bad: bad},
		WorkingDir: "../" + bad, User: bad, Stdin: bad, Files: []File{{Path: "/" + bad, Content: bad, Mode: bad}},
		Network: bad, PullPolicy: bad, Queue: bad, Constraints: Constraints{OS: bad, Arch: bad, Labels: map[string]string{bad: bad}},
		OnWorkerLost: bad, Stop: Stop{Signal: bad}, Webhook: &Webhook{URL: bad, Events: []string{bad}},
		Timeout: -987654321, Priority: ptr(-987654321), LogMaxBytes: -987654321,
		Resources: Resources{CPU: -987654321, MemoryMB: -987654321, PIDs: -987654321, TmpfsMB: -987654321},
		Retry: Retry{
			MaxAttempts: -987654321, BackoffSeconds: ptr(-987654321), MaxBackoffSeconds: -987654321, OnExitCodes: []int{-987654321},
		},
		Timeouts: Timeouts{Queue: -987654321, Prepare: -987654321, Total: -987654321},
	}
	s.Stop.GraceSeconds = ptr(-987654321)
	variants := []Spec{s}
	valued := s // label and variable names that are fine, with bad values
	valued.Labels, valued.Env = map[string]string{"a": bad}, map[string]string{"A": bad}
	valued.Command = Command{Shell: bad}
	valued.Constraints.Labels = map[string]string{"a": bad}
	long := s
	long.ContainerImage, long.User, long.Env = word+text(MaxImageLen), word+text(MaxUserLen), map[string]string{"CMDEXEC_" + word: word}
	long.Files = slices.Repeat([]File{{Path: word, Content: text(MaxInputBytes)}}, 2)
	variants = append(variants, valued, long)
	// Every field of Spec, by its JSON name, must be among those refused, so that
	// a field added later cannot be forgotten here.
	seen := map[string]bool{}
	for _, v := range variants {
		_, errs := Normalise(v)
		for _, e := range errs {
			name, _, _ := strings.Cut(e.Field, ".")
			name, _, _ = strings.Cut(name, "[")
			seen[name] = true
			if s := fmt.Sprintf("%+v %v", e, e.Error()); strings.Contains(s, "canary") || strings.Contains(s, "987654321") {
				t.Errorf("a submitted value is in %s", s)
			}
		}
	}
	typ := reflect.TypeFor[Spec]()
	for i := range typ.NumField() {
		name, _, _ := strings.Cut(typ.Field(i).Tag.Get("json"), ",")
		if !seen[name] {
			t.Errorf("nothing was refused in %s: this test does not cover it", name)
		}
	}
}

// richSpec has something in every field that can be set.
func richSpec() Spec {
	return Spec{
		Name: "nightly", Command: Command{Argv: []string{"sh", "-c", "echo <&>"}}, ContainerImage: "ghcr.io/a/b:1",
		Timeout: 60, Labels: map[string]string{"team": "x", "app": "y"}, Env: map[string]string{"A": "1", "B": "2"},
		WorkingDir: "/work", User: "1000:1000", Stdin: "in\n", Files: []File{{Path: "a/b", Content: "c"}, {Path: "d", Mode: "0755"}},
		Resources: Resources{CPU: 0.5, MemoryMB: 64, PIDs: 10, TmpfsMB: 8}, Network: NetworkBridge, PullPolicy: PullNever,
		Queue: "slow", Priority: ptr(7), Constraints: Constraints{OS: "linux", Arch: "amd64", Labels: map[string]string{"gpu": "no"}},
		Retry:        Retry{MaxAttempts: 3, BackoffSeconds: ptr(0), MaxBackoffSeconds: 9, OnExitCodes: []int{75, 1}},
		OnWorkerLost: OnWorkerLostFail, Timeouts: Timeouts{Queue: 5, Prepare: 6, Total: 7},
		Stop: Stop{Signal: "SIGINT", GraceSeconds: ptr(1)}, LogMaxBytes: 4096,
	}
}

func TestNormaliseTwiceIsOnce(t *testing.T) {
	empty := process() // collections that are there but empty mean the same as absent ones
	empty.Labels, empty.Env, empty.Constraints.Labels = map[string]string{}, map[string]string{}, map[string]string{}
	empty.Files, empty.Retry.OnExitCodes = []File{}, []int{}
	specs := map[string]Spec{"process": process(), "container": container(), "rich": richSpec(), "empty collections": empty}
	for name, s := range specs {
		once, errs := Normalise(s)
		if len(errs) > 0 {
			t.Fatalf("%s: %v", name, errs)
		}
		twice, errs := Normalise(once)
		if len(errs) > 0 || !reflect.DeepEqual(once, twice) {
			t.Errorf("%s: %v\n once %+v\ntwice %+v", name, errs, once, twice)
		}
		back := roundTrip(t, once)
		if !reflect.DeepEqual(back, once) || back.Hash() != once.Hash() {
			t.Errorf("%s: JSON changes it\nbefore %+v\n after %+v", name, once, back)
		}
	}
}

func roundTrip[T any](t *testing.T, v T) T {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	var back T
	if err := json.Unmarshal(data, &back); err != nil {
		t.Fatal(err)
	}
	return back
}

func TestNormaliseLeavesItsArgument(t *testing.T) {
	for _, s := range []Spec{process(), container(), richSpec()} {
		before := deepCopy(s)
		got, _ := Normalise(s)
		if !reflect.DeepEqual(s, before) {
			t.Errorf("the argument changed\nbefore %+v\n after %+v", before, s)
		}
		if s.Priority != nil {
			*got.Priority = 99
			*got.Stop.GraceSeconds = 99
			got.Files[0].Mode = "0000"
			if !reflect.DeepEqual(s, before) {
				t.Error("the result shares what a caller may change")
			}
		}
	}
}

func deepCopy(s Spec) Spec {
	cp := func(p *int) *int {
		if p == nil {
			return nil
		}
		return ptr(*p)
	}
	s.Command.Argv, s.Files, s.Retry.OnExitCodes = slices.Clone(s.Command.Argv), slices.Clone(s.Files), slices.Clone(s.Retry.OnExitCodes)
	s.Labels, s.Env, s.Constraints.Labels = maps.Clone(s.Labels), maps.Clone(s.Env), maps.Clone(s.Constraints.Labels)
	s.Priority, s.Retry.BackoffSeconds, s.Stop.GraceSeconds = cp(s.Priority), cp(s.Retry.BackoffSeconds), cp(s.Stop.GraceSeconds)
	return s
}

// TestWholeSpecIsLimited: parts that are each within their limit can still be
// too much together, also because JSON writes some bytes as six.
func TestWholeSpecIsLimited(t *testing.T) {
	full := func(fill string) Spec {
		s := richSpec()
		s.Command = Command{Shell: strings.Repeat(fill, MaxCommandBytes/len(fill))}
		s.Env = map[string]string{"A": strings.Repeat(fill, (MaxEnvBytes-1)/len(fill))}
		s.Stdin, s.Files = strings.Repeat(fill, MaxInputBytes/len(fill)), nil
		return s
	}
	got, errs := Normalise(full("a"))
	if len(errs) > 0 {
		t.Fatalf("command, env and stdin at their limits: %v", errs)
	}
	if data, _ := json.Marshal(got); len(data) > MaxSpecBytes {
		t.Errorf("accepted with %d bytes", len(data))
	}
	for _, fill := range []string{"<", "\x01", "a\u2028"} {
		if _, errs := Normalise(full(fill)); len(errs) != 1 || errs[0].Field != "" || errs[0].Code != CodeTooLong ||
			!strings.Contains(errs[0].Detail, fmt.Sprint(MaxSpecBytes)) {
			t.Errorf("filled with %q: %+v", fill, errs)
		}
	}

	// One byte at the edge of MaxSpecBytes itself: quotation marks take two.
	s := process()
	s.Stdin = strings.Repeat(`"`, 200<<10)
	base, _ := Normalise(s)
	data, _ := json.Marshal(base)
	s.Command.Shell += text(MaxSpecBytes - len(data))
	edge, errs := Normalise(s)
	if len(errs) > 0 {
		t.Fatalf("at the limit: %v", errs)
	}
	if data, _ := json.Marshal(edge); len(data) != MaxSpecBytes {
		t.Fatalf("the spec meant to be at the limit has %d bytes", len(data))
	}
	s.Command.Shell += "a"
	if _, errs := Normalise(s); len(errs) != 1 || errs[0].Code != CodeTooLong {
		t.Errorf("one past the limit: %+v", errs)
	}
}

func TestHash(t *testing.T) {
	a, errs := Normalise(richSpec())
	if len(errs) > 0 {
		t.Fatal(errs)
	}
	for range 20 { // maps are walked in another order each time
		b, _ := Normalise(deepCopy(richSpec()))
		if a.Hash() != b.Hash() {
			t.Fatal("the same spec has two hashes")
		}
	}
	// The registry keeps hashes over releases: a replay must find the same one.
	minimal, _ := Normalise(process())
	const want = "478dd4ae040e37d04ae9ec76c42398d4"
	if got := minimal.Hash(); len(got) != 64 || got[:32] != want {
		t.Errorf("the hash of the smallest spec is %s, want %s...", got, want)
	}
	seen := map[string]string{a.Hash(): "nothing"}
	for name, set := range map[string]func(*Spec){
		"name": func(s *Spec) { s.Name = "x" }, "command": func(s *Spec) { s.Command = Command{Shell: "sh -c 'echo <&>'"} },
		"env": func(s *Spec) { s.Env["C"] = "" }, "priority": func(s *Spec) { s.Priority = ptr(8) },
		"backoff": func(s *Spec) { s.Retry.BackoffSeconds = ptr(1) }, "files": func(s *Spec) { s.Files[0].Content = "d" },
		"labels": func(s *Spec) { s.Constraints.Labels["gpu"] = "yes" },
	} {
		s := deepCopy(richSpec())
		set(&s)
		n, errs := Normalise(s)
		if len(errs) > 0 {
			t.Fatal(errs)
		}
		if other, dup := seen[n.Hash()]; dup {
			t.Errorf("changing %s gives the hash of changing %s", name, other)
		}
		seen[n.Hash()] = name
	}
}

func TestCommandJSON(t *testing.T) {
	for in, want := range map[string]Command{
		`"echo hi"`:          {Shell: "echo hi"},
		`""`:                 {},
		`["a","b c"]`:        {Argv: []string{"a", "b c"}},
		`[]`:                 {Argv: []string{}},
		` [ "a" , "\u0000"]`: {Argv: []string{"a", "\x00"}},
	} {
		var got Command
		if err := json.Unmarshal([]byte(in), &got); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v, %v", in, got, err)
		}
		if back := roundTrip(t, got); !reflect.DeepEqual(back, want) {
			t.Errorf("%s comes back as %+v", in, back)
		}
	}
	for _, in := range []string{`null`, `1`, `true`, `{}`, `{"$gt":""}`, `[1]`, `["a",null]`, `[["a"]]`, `["a",{}]`} {
		got := Command{Shell: "before"}
		if err := json.Unmarshal([]byte(in), &got); err == nil {
			t.Errorf("%s was read as %+v", in, got)
		}
	}
}

func TestValidNames(t *testing.T) {
	for s, want := range map[string]bool{
		"": false, "a": true, "~!": true, text(MaxIdempotencyKey): true, text(MaxIdempotencyKey + 1): false,
		"a b": false, "a\n": false, "\x7f": false, "ä": false,
	} {
		if ValidIdempotencyKey(s) != want {
			t.Errorf("ValidIdempotencyKey(%.20q) is %v", s, !want)
		}
	}
	for s, want := range map[string]bool{
		"": false, "a/b.c_d-E9": true, text(MaxLabelKeyLen): true, text(MaxLabelKeyLen + 1): false, "a:b": false, "ä": false,
	} {
		if ValidLabelKey(s) != want {
			t.Errorf("ValidLabelKey(%.20q) is %v", s, !want)
		}
	}
	for s, want := range map[string]bool{
		"": false, "a_b-9": true, text(MaxQueueLen): true, text(MaxQueueLen + 1): false, "a.b": false, "A": false, "*": false,
	} {
		if ValidQueue(s) != want {
			t.Errorf("ValidQueue(%.20q) is %v", s, !want)
		}
	}
}
