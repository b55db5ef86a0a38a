package fleet

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/cmdexec/cmdexec/libs/core/job"
)

func worker() Worker {
	return Worker{
		ID: "w1", OS: "linux", Arch: "amd64", CPUCores: 4, TotalMemory: 8 << 30, Slots: 4,
		Labels: map[string]string{"zone": "a", "gpu": "no"}, Executors: []string{job.ExecutorDocker, job.ExecutorProcess},
	}
}

func labels(n int) map[string]string {
	m := map[string]string{}
	for i := range n {
		m[fmt.Sprintf("l%d", i)] = ""
	}
	return m
}

func TestValidate(t *testing.T) {
	text := func(n int) string { return strings.Repeat("a", n) }
	if w := worker(); w.Validate() != nil {
		t.Fatal(w.Validate())
	}
	for _, c := range []struct {
		name     string
		at, past func(*Worker)
	}{
		{"least slots", func(w *Worker) { w.Slots = 1 }, func(w *Worker) { w.Slots = 0 }},
		{"negative slots", func(w *Worker) { w.Slots = 1 }, func(w *Worker) { w.Slots = -1 }},
		{"MaxSlots", func(w *Worker) { w.Slots = MaxSlots }, func(w *Worker) { w.Slots = MaxSlots + 1 }},
		{"least cpu", func(w *Worker) { w.CPUCores = math.SmallestNonzeroFloat64 }, func(w *Worker) { w.CPUCores = 0 }},
		{"MaxCPUCores", func(w *Worker) { w.CPUCores = MaxCPUCores }, func(w *Worker) { w.CPUCores = math.Nextafter(MaxCPUCores, math.Inf(1)) }},
		{"cpu is a number", func(w *Worker) { w.CPUCores = 1 }, func(w *Worker) { w.CPUCores = math.NaN() }},
		{"cpu is finite", func(w *Worker) { w.CPUCores = 1 }, func(w *Worker) { w.CPUCores = math.Inf(1) }},
		{"least memory", func(w *Worker) { w.TotalMemory = 1 << 20 }, func(w *Worker) { w.TotalMemory = 1<<20 - 1 }},
		{"MaxTotalMemory", func(w *Worker) { w.TotalMemory = MaxTotalMemory }, func(w *Worker) { w.TotalMemory = MaxTotalMemory + 1 }},
		{"os", func(w *Worker) { w.OS = text(job.MaxQueueLen) }, func(w *Worker) { w.OS = text(job.MaxQueueLen + 1) }},
		{"os is needed", func(w *Worker) { w.OS = "x" }, func(w *Worker) { w.OS = "" }},
		{"arch", func(w *Worker) { w.Arch = text(job.MaxQueueLen) }, func(w *Worker) { w.Arch = text(job.MaxQueueLen + 1) }},
		{"arch in capitals", func(w *Worker) { w.Arch = "arm64" }, func(w *Worker) { w.Arch = "ARM64" }},
		{"MaxLabels", func(w *Worker) { w.Labels = labels(job.MaxLabels) }, func(w *Worker) { w.Labels = labels(job.MaxLabels + 1) }},
		{"MaxLabelKeyLen", func(w *Worker) { w.Labels = map[string]string{text(job.MaxLabelKeyLen): ""} }, func(w *Worker) { w.Labels = map[string]string{text(job.MaxLabelKeyLen + 1): ""} }},
		{"MaxLabelValueLen", func(w *Worker) { w.Labels = map[string]string{"a": text(job.MaxLabelValueLen)} }, func(w *Worker) { w.Labels = map[string]string{"a": text(job.MaxLabelValueLen + 1)} }},
		{"label name", func(w *Worker) { w.Labels = map[string]string{"a/b": ""} }, func(w *Worker) { w.Labels = map[string]string{"a b": ""} }},
		{"hostname", func(w *Worker) { w.Hostname = text(MaxTextLen) }, func(w *Worker) { w.Hostname = text(MaxTextLen + 1) }},
		{"version", func(w *Worker) { w.Version = text(MaxTextLen) }, func(w *Worker) { w.Version = text(MaxTextLen + 1) }},
		{"executors", func(w *Worker) { w.Executors = slices.Repeat([]string{"a"}, 8) }, func(w *Worker) { w.Executors = slices.Repeat([]string{"a"}, 9) }},
		{"executor", func(w *Worker) { w.Executors = []string{"docker"} }, func(w *Worker) { w.Executors = []string{"Docker!"} }},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := worker()
			if c.at(&w); w.Validate() != nil {
				t.Errorf("at the limit: %v", w.Validate())
			}
			if c.past(&w); w.Validate() == nil {
				t.Error("past the limit it is accepted")
			}
		})
	}
}

func TestValidateNeverEchoes(t *testing.T) {
	const canary = "sk_canary\n"
	for _, set := range []func(*Worker){
		func(w *Worker) { w.OS = canary }, func(w *Worker) { w.Arch = canary }, func(w *Worker) { w.Labels = map[string]string{canary: canary} },
		func(w *Worker) { w.Executors = []string{canary} }, func(w *Worker) { w.Hostname = strings.Repeat(canary, 100) },
	} {
		w := worker()
		set(&w)
		if err := w.Validate(); err == nil || strings.Contains(err.Error(), "canary") {
			t.Errorf("got %v", err)
		}
	}
}

func TestCanEverRun(t *testing.T) {
	process, container := job.Spec{}, job.Spec{ContainerImage: "alpine"}
	for _, c := range []struct {
		name   string
		worker func(*Worker)
		spec   job.Spec
		change func(*job.Spec)
		want   Block // empty: can
	}{
		{"anything goes", nil, process, nil, ""},
		{"a container", nil, container, nil, ""},
		{"all of the cpu", nil, process, func(s *job.Spec) { s.Resources.CPU = 4 }, ""},
		{"more than all of the cpu", nil, process, func(s *job.Spec) { s.Resources.CPU = 4.001 }, BlockTooBig},
		{"all of the memory", nil, process, func(s *job.Spec) { s.Resources.MemoryMB = 8192 }, ""},
		{"more than all of the memory", nil, process, func(s *job.Spec) { s.Resources.MemoryMB = 8193 }, BlockTooBig},
		{"the greatest job does not overflow", nil, process, func(s *job.Spec) { s.Resources.MemoryMB = job.MaxMemoryMB }, BlockTooBig},
		{"no docker", func(w *Worker) { w.Executors = []string{job.ExecutorProcess} }, container, nil, BlockExecutor},
		{"no processes", func(w *Worker) { w.Executors = []string{job.ExecutorDocker} }, process, nil, BlockExecutor},
		{"no executor", func(w *Worker) { w.Executors = nil }, process, nil, BlockExecutor},
		{"os", nil, process, func(s *job.Spec) { s.Constraints.OS = "linux" }, ""},
		{"another os", nil, process, func(s *job.Spec) { s.Constraints.OS = "windows" }, BlockOS},
		{"arch", nil, process, func(s *job.Spec) { s.Constraints.Arch = "amd64" }, ""},
		{"another arch", nil, process, func(s *job.Spec) { s.Constraints.Arch = "arm64" }, BlockArch},
		{"labels", nil, process, func(s *job.Spec) { s.Constraints.Labels = map[string]string{"zone": "a", "gpu": "no"} }, ""},
		{"another label", nil, process, func(s *job.Spec) { s.Constraints.Labels = map[string]string{"zone": "b"} }, BlockLabels},
		{"an unknown label", nil, process, func(s *job.Spec) { s.Constraints.Labels = map[string]string{"disk": ""} }, BlockLabels},
		{"an empty label is one", func(w *Worker) { w.Labels["disk"] = "" }, process, func(s *job.Spec) { s.Constraints.Labels = map[string]string{"disk": ""} }, ""},
		{"a worker without labels", func(w *Worker) { w.Labels = nil }, process, func(s *job.Spec) { s.Constraints.Labels = map[string]string{"zone": "a"} }, BlockLabels},
		{"what passes does not count", func(w *Worker) { w.Online, w.Drain = false, true }, process, nil, ""},
		{"the executor is named first", func(w *Worker) { w.Executors = nil }, process, func(s *job.Spec) { s.Constraints.OS, s.Resources.CPU = "windows", 99 }, BlockExecutor},
	} {
		t.Run(c.name, func(t *testing.T) {
			w, s := worker(), c.spec
			s.Command = job.Command{Shell: "true"}
			if c.change != nil {
				c.change(&s)
			}
			if c.worker != nil {
				c.worker(&w)
			}
			s, errs := job.Normalise(s)
			if len(errs) > 0 {
				t.Fatal(errs)
			}
			if why, can := w.CanEverRun(&s); why != c.want || can != (c.want == "") {
				t.Errorf("got %q, %v, want %q", why, can, c.want)
			}
		})
	}
}
