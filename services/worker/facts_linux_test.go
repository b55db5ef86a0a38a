package worker

import (
	"os"
	"path/filepath"
	"testing"
)

func TestLimitsOfControlGroups(t *testing.T) {
	root := t.TempDir()
	for name, text := range map[string]string{
		"cpu.max":                            "max 100000",
		"memory.max":                         "max",
		"box/cpu.max":                        "150000 100000",
		"box/memory.max":                     "1073741824",
		"box/inner/cpu.max":                  "400000 100000", // wider than what is around it
		"box/inner/memory.max":               "536870912",
		"cpu,cpuacct/old/cpu.cfs_quota_us":   "50000",
		"cpu,cpuacct/old/cpu.cfs_period_us":  "100000",
		"cpu,cpuacct/free/cpu.cfs_quota_us":  "-1",
		"cpu,cpuacct/free/cpu.cfs_period_us": "100000",
		"memory/old/memory.limit_in_bytes":   "268435456",
		"memory/free/memory.limit_in_bytes":  "9223372036854771712",
		"damaged/cpu.max":                    "lots",
		"damaged/memory.max":                 "",
	} {
		file := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for groups, want := range map[string]limits{
		"0::/\n":                              {},
		"0::/box\n":                           {cpu: 1.5, memory: 1 << 30},
		"0::/box/inner\n":                     {cpu: 1.5, memory: 512 << 20},
		"0::/of/the/host\n":                   {},
		"0::/damaged\n":                       {},
		"2:cpu,cpuacct:/old\n1:memory:/old\n": {cpu: 0.5, memory: 256 << 20},
		"2:cpu,cpuacct:/free\n":               {},
		"nonsense\n\n":                        {},
	} {
		if got := limitsOf(groups, root); got != want {
			t.Errorf("%q: %+v, want %+v", groups, got, want)
		}
	}
}

func TestOfferedFacts(t *testing.T) {
	all, err := gatherFacts(&Config{})
	if err != nil {
		t.Fatal(err)
	}
	if all.CPUCores <= 0 || all.TotalMemory <= 0 || all.OS != "linux" || all.Arch == "" {
		t.Errorf("facts are %+v", all)
	}
	some, err := gatherFacts(&Config{CPULimit: 0.5, RAMLimit: 1 << 30})
	if err != nil || some.CPUCores != 0.5 || some.TotalMemory != 1<<30 {
		t.Errorf("facts are %+v, %v", some, err)
	}
}
