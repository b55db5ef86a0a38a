package worker

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cmdexec/cmdexec/libs/core/fleet"
)

func TestServerURL(t *testing.T) {
	for _, c := range []struct {
		url      string
		insecure bool
		want     string // "": refused
	}{
		{"http://127.0.0.1:3000", false, "http://127.0.0.1:3000"},
		{"http://localhost:3000/", false, "http://localhost:3000"},
		{"ws://[::1]:3000", false, "http://[::1]:3000"},
		{"http://[::ffff:127.0.0.1]:1", false, "http://[::ffff:127.0.0.1]:1"},
		{"https://jobs.example.com", false, "https://jobs.example.com"},
		{"wss://jobs.example.com/base/", false, "https://jobs.example.com/base"},
		{"https://jobs.example.com/?a=b#c", false, "https://jobs.example.com"},
		{"http://jobs.example.com", true, "http://jobs.example.com"},
		{"http://jobs.example.com", false, ""},
		{"ws://10.0.0.1:3000", false, ""},
		{"http://127.0.0.1.example.com", false, ""},
		{"http://localhost.example.com", false, ""},
		{"http://0.0.0.0:3000", false, ""},
		{"ftp://127.0.0.1", true, ""},
		{"jobs.example.com", true, ""},
		{"127.0.0.1:3000", true, ""},
		{"http://", true, ""},
		{"://", true, ""},
		{"", true, ""},
	} {
		got, err := (&Config{ServerURL: c.url, Insecure: c.insecure}).serverURL()
		if got != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%q, insecure %v: %q, %v; want %q", c.url, c.insecure, got, err, c.want)
		}
		if err != nil && !strings.HasPrefix(err.Error(), "SERVER_URL") {
			t.Errorf("%q: the error does not name the setting: %v", c.url, err)
		}
	}
}

func TestExecutorNames(t *testing.T) {
	for in, want := range map[string]string{
		"process": "[process]", "docker": "[docker]", "auto": "[auto]", "": "[]", " , ": "[]",
		"process, docker": "[docker process]", "process,process": "[process]",
	} {
		got, err := (&Config{Executors: in}).executorNames()
		if err != nil || fmt.Sprint(got) != want {
			t.Errorf("%q is %v, %v; want %s", in, got, err, want)
		}
	}
	for _, in := range []string{"podman", "Process", "process;docker"} {
		if got, err := (&Config{Executors: in}).executorNames(); err == nil || !strings.HasPrefix(err.Error(), "EXECUTORS") {
			t.Errorf("%q is %v, %v; want an error", in, got, err)
		}
	}
}

func TestSlots(t *testing.T) {
	for _, c := range []struct {
		slots int
		cores float64
		want  int
	}{{7, 64, 7}, {0, 2, 8}, {0, 0.1, 1}, {0, 0.5, 2}, {0, 1 << 20, fleet.MaxSlots}} {
		if got := (&Config{Slots: c.slots}).slots(c.cores); got != c.want {
			t.Errorf("SLOTS=%d with %v cores: %d, want %d", c.slots, c.cores, got, c.want)
		}
	}
	for name, c := range map[string]Config{
		"SLOTS": {Slots: -1}, "SLOTS ": {Slots: fleet.MaxSlots + 1}, "CPU_LIMIT": {CPULimit: -1}, "RAM_LIMIT": {RAMLimit: -1},
		"TRANSPORT": {Transport: "carrier pigeon"},
	} {
		if err := c.check(); err == nil || !strings.HasPrefix(err.Error(), strings.TrimSpace(name)) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := (&Config{Slots: fleet.MaxSlots}).check(); err != nil {
		t.Error(err)
	}
}

func TestWorkerIDIsKept(t *testing.T) {
	dir := t.TempDir()
	made := 0
	fresh := func() string { made++; return fmt.Sprintf("worker-%d", made) }
	for range 3 {
		got, err := (&Config{}).workerID(dir, fresh)
		if err != nil || got != "worker-1" {
			t.Errorf("id is %q, %v", got, err)
		}
	}
	if got, err := (&Config{WorkerID: "mine"}).workerID(dir, fresh); err != nil || got != "mine" {
		t.Errorf("the configured id becomes %q, %v", got, err)
	}
	if got, err := (&Config{WorkerID: "Not an id"}).workerID(dir, fresh); err == nil {
		t.Errorf("a bad id becomes %q", got)
	}
	for _, bad := range []string{"", "two words", "a/b"} {
		if err := os.WriteFile(filepath.Join(dir, "worker-id"), []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := (&Config{}).workerID(dir, fresh); err == nil {
			t.Errorf("a damaged file gives %q", got)
		}
	}
}
