// Command chaosjob is what the jobs of a chaos run execute. It notes in the run's
// journal, synced to disk, when it really started and stopped, and finds out by a
// lock that the kernel gives back when the last process of an attempt is gone
// whether another attempt of the same job still lives.
//
//	chaosjob -dir FOLDER [-run 300ms] [-lines 20] [-code 3 -until 2] [-deaf] [-escape] [-murder PROGRAM]
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// note is a line of the journal.
type note struct {
	Event   string `json:"event"` // start, stop, overlap, alone
	Job     string `json:"job"`
	Attempt int    `json:"attempt"`
	PID     int    `json:"pid"`
	At      int64  `json:"at"` // Unix nanoseconds
	Code    int    `json:"code,omitempty"`
	Why     string `json:"why,omitempty"`
}

// journal appends notes to the file of one worker.
type journal struct {
	mu   sync.Mutex
	file *os.File
	base note
}

func (j *journal) write(event string, code int, why string) {
	n := j.base
	n.Event, n.Code, n.Why, n.At = event, code, why, time.Now().UnixNano()
	data, err := json.Marshal(n)
	if err != nil {
		panic(err) // numbers and strings always marshal
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	// One write of a line to a file that is only appended to is not torn by others.
	if _, err := j.file.Write(append(data, '\n')); err != nil {
		fmt.Fprintln(os.Stderr, "journal:", err)
		return
	}
	_ = j.file.Sync()
}

func main() {
	dir := flag.String("dir", "", "folder of the journal")
	run := flag.Duration("run", 0, "how long to run")
	lines := flag.Int("lines", 0, "lines to print, spread over the run")
	code := flag.Int("code", 0, "exit code of the attempts up to -until")
	until := flag.Int("until", 0, "last attempt that ends with -code")
	deaf := flag.Bool("deaf", false, "ignore SIGTERM")
	escape := flag.Bool("escape", false, "leave a child behind that left the session")
	murder := flag.String("murder", "", "kill the parent process when it runs this program")
	linger := flag.Bool("linger", false, "be the child that -escape leaves behind")
	flag.Parse()
	if *linger {
		signal.Ignore(syscall.SIGTERM, syscall.SIGHUP, syscall.SIGINT)
		<-time.After(*run)
		return
	}
	os.Exit(work(*dir, *run, *lines, *code, *until, *deaf, *escape, *murder))
}

func work(dir string, run time.Duration, lines, code, until int, deaf, escape bool, murder string) int {
	signals := make(chan os.Signal, 1)
	if deaf {
		signal.Ignore(syscall.SIGTERM)
	} else {
		signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	}
	job := os.Getenv("CMDEXEC_JOB_ID")
	attempt, _ := strconv.Atoi(os.Getenv("CMDEXEC_ATTEMPT")) // 0 is found by the checker
	file, err := os.OpenFile(filepath.Join(dir, "journal-"+worker()+".jsonl"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 99
	}
	j := &journal{file: file, base: note{Job: job, Attempt: attempt, PID: os.Getpid()}}
	alone, err := lock(filepath.Join(dir, "locks", job), j)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 99
	}
	j.write("start", 0, "")
	if alone != nil {
		go alone()
	}
	if escape {
		leaveChild(dir)
	}
	if murder != "" {
		killParent(murder)
	}
	pause := run / time.Duration(lines+1)
	for i := range lines + 1 {
		select {
		case s := <-signals:
			j.write("stop", 143, s.String())
			return 143
		case <-time.After(pause):
		}
		if i < lines {
			fmt.Printf("line %d of attempt %d\n", i+1, attempt)
		}
	}
	if attempt > until {
		code = 0
	}
	j.write("stop", code, "")
	return code
}

// worker names the worker by its data folder, above the attempt's own folder.
func worker() string {
	wd, err := os.Getwd()
	if err != nil {
		return "unknown"
	}
	for dir := wd; dir != "/" && dir != "."; dir = filepath.Dir(dir) {
		if name := filepath.Base(dir); strings.HasPrefix(name, "worker-") {
			return name
		}
	}
	return "unknown"
}

// lock takes the job's lock, which every process of the attempt inherits. Where
// another attempt has it, that is noted, and the returned function waits until it
// is gone and notes that too.
func lock(path string, j *journal) (wait func(), err error) {
	fd, err := syscall.Open(path, syscall.O_CREAT|syscall.O_RDWR, 0o600) // without close-on-exec: children keep it
	if err != nil {
		return nil, fmt.Errorf("open the lock: %w", err)
	}
	err = syscall.Flock(fd, syscall.LOCK_EX|syscall.LOCK_NB)
	if err == nil {
		return nil, nil
	}
	j.write("overlap", 0, err.Error())
	return func() {
		for {
			err := syscall.Flock(fd, syscall.LOCK_EX)
			if err == syscall.EINTR {
				continue
			}
			j.write("alone", 0, "")
			return
		}
	}, nil
}

// leaveChild starts a process that leaves the session and ignores signals.
func leaveChild(dir string) {
	self, err := os.Executable()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return
	}
	child := exec.Command(self, "-linger", "-run", "10m", "-dir", dir) // by the folder it is found
	child.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := child.Start(); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
}

// killParent kills the worker that runs this command, and nothing else: only a
// parent that runs the given program.
func killParent(program string) {
	parent := os.Getppid()
	exe, err := os.Readlink("/proc/" + strconv.Itoa(parent) + "/exe")
	if err != nil || exe != program || parent <= 1 {
		fmt.Fprintf(os.Stderr, "the parent %d runs %q and not %q\n", parent, exe, program)
		return
	}
	_ = syscall.Kill(parent, syscall.SIGKILL)
}
