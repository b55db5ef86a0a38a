package docker

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"math"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/distribution/reference"
	"github.com/docker/docker/api/types/container"
	"github.com/docker/go-units"

	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
)

// Labels of everything that is made; workers know their own by them.
const (
	labelWorker  = "cmdexec.worker"
	labelMark    = "cmdexec.mark"
	labelJob     = "cmdexec.job"
	labelAttempt = "cmdexec.attempt"
	labelLease   = "cmdexec.lease"
)

const (
	workFolder = "/work"
	tmpFolder  = "/tmp"

	// nobody runs what neither job nor image give a user to.
	nobody   = "65534:65534"
	nobodyID = 65534

	defaultTmpfsMB = 64
	tmpfsInodes    = 16 << 10
	minMemoryMB    = 6 // the engine's own
	maxOpenFiles   = 1024
	maxFileSize    = 1 << 30
	oomScore       = 500
	maxVolumes     = 16 // of an image

	// hostname is the same for all: never this machine's name, and not the job's
	// id, since a warm container is named before its job is known.
	hostname = "job"
)

const (
	pullMissing = "missing"
	pullAlways  = "always"
	pullNever   = "never"
)

// plan is a checked spec.
type plan struct {
	spec    executor.Spec
	name    string // of the container
	image   reference.Named
	signal  string
	number  int    // of the signal
	workDir string // absolute
	files   []executor.File
	folders []string // below /work, parents first; made for the job's user
}

// signals that a job may name as its stop signal.
func signalNumber(name string) (string, int, bool) {
	switch name {
	case "", "SIGTERM":
		return "SIGTERM", 15, true
	case "SIGINT":
		return name, 2, true
	case "SIGKILL":
		return name, 9, true
	case "SIGHUP":
		return name, 1, true
	case "SIGQUIT":
		return name, 3, true
	case "SIGUSR1":
		return name, 10, true
	case "SIGUSR2":
		return name, 12, true
	}
	return "", 0, false
}

var (
	safeID   = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_-]{0,127}$`)
	safeUser = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,63})?$`)
)

// makePlan checks a spec against what this worker allows. Its error is always
// a *executor.PrepareError.
func makePlan(spec executor.Spec, worker string, allowBridge bool) (*plan, error) {
	p := &plan{spec: spec}
	switch {
	case !safeID.MatchString(spec.JobID) || spec.Attempt < 0 || spec.LeaseID == "" || len(spec.LeaseID) > 256:
		return nil, executor.InfraError("the assignment has no usable job id, attempt and lease", nil)
	case spec.WorkerID != "" && spec.WorkerID != worker:
		return nil, executor.InfraError("the assignment is for another worker", nil)
	case spec.Image == "":
		return nil, executor.InfraError("the docker executor runs containers only, and the job names no image", nil)
	case spec.NetworkBridge && !allowBridge:
		return nil, executor.InfraError("the job asks for a network, which the owner of this worker does not give to containers", nil)
	case spec.User != "" && !safeUser.MatchString(spec.User):
		return nil, executor.UserError("the user is not of the form name or id, with an optional :group", nil)
	}
	if err := p.checkCommand(); err != nil {
		return nil, err
	}
	if err := p.checkLimits(); err != nil {
		return nil, err
	}
	named, err := reference.ParseNormalizedNamed(spec.Image)
	if err != nil {
		return nil, executor.UserError("the image name is not valid", err)
	}
	p.image = reference.TagNameOnly(named)
	switch spec.PullPolicy {
	case "":
		p.spec.PullPolicy = pullMissing
	case pullMissing, pullAlways, pullNever:
	default:
		return nil, executor.UserError("the pull policy is none of missing, always and never", nil)
	}
	var ok bool
	if p.signal, p.number, ok = signalNumber(spec.StopSignal); !ok {
		return nil, executor.UserError(fmt.Sprintf("stop signal %q is not known", spec.StopSignal), nil)
	}
	if err := p.planFiles(); err != nil {
		return nil, err
	}
	p.name = containerName(worker, &spec)
	return p, nil
}

// containerName makes a second container for one lease impossible.
func containerName(worker string, s *executor.Spec) string {
	sum := sha256.Sum256([]byte(worker + "\x00" + s.LeaseID))
	return "cmdexec-" + s.JobID + "-" + strconv.Itoa(s.Attempt) + "-" + hex.EncodeToString(sum[:5])
}

func (p *plan) checkCommand() error {
	s := &p.spec
	switch {
	case len(s.Argv) == 0 && s.Shell == "":
		return executor.UserError("there is no command", nil)
	case strings.ContainsRune(s.Shell, 0):
		return executor.UserError("the command contains a NUL byte", nil)
	case len(s.Argv) > 0 && s.Argv[0] == "":
		return executor.UserError("the program has no name", nil)
	}
	for _, arg := range s.Argv {
		if strings.ContainsRune(arg, 0) {
			return executor.UserError("an argument contains a NUL byte", nil)
		}
	}
	for name, value := range s.Env {
		switch {
		case name == "" || strings.ContainsAny(name, "=\x00"):
			return executor.UserError("an environment variable has an impossible name", nil)
		case strings.ContainsRune(value, 0):
			return executor.UserError("an environment variable contains a NUL byte", nil)
		case name == "CMDEXEC_JOB_ID" || name == "CMDEXEC_ATTEMPT":
			return executor.UserError("the environment variable "+name+" is set by the worker", nil)
		}
	}
	return nil
}

func (p *plan) checkLimits() error {
	s := &p.spec
	switch {
	case s.CPU < 0 || math.IsNaN(s.CPU) || s.CPU > 1<<20 || (s.CPU > 0 && s.CPU < 0.01):
		return executor.UserError("a container needs at least 0.01 CPU", nil)
	case s.MemoryMB < 0 || s.MemoryMB > 1<<40 || (s.MemoryMB > 0 && s.MemoryMB < minMemoryMB):
		return executor.UserError(fmt.Sprintf("a container needs at least %d MiB of memory", minMemoryMB), nil)
	case s.PIDs < 0 || s.TmpfsMB < 0 || s.TmpfsMB > 1<<40:
		return executor.UserError("a limit is negative or absurd", nil)
	}
	if s.TmpfsMB == 0 {
		s.TmpfsMB = defaultTmpfsMB
	}
	return nil
}

// planFiles resolves the working folder and the files below /work.
func (p *plan) planFiles() error {
	s := &p.spec
	folders := map[string]bool{}
	addFolder := func(rel string) {
		for ; rel != "."; rel = path.Dir(rel) {
			folders[rel] = true
		}
	}
	p.workDir = workFolder
	if s.WorkingDir != "" {
		if strings.ContainsRune(s.WorkingDir, 0) || len(s.WorkingDir) > 4096 {
			return executor.UserError("the working directory is not a usable path", nil)
		}
		p.workDir = path.Join(workFolder, s.WorkingDir)
		if path.IsAbs(s.WorkingDir) {
			p.workDir = path.Clean(s.WorkingDir)
		} else if p.workDir != workFolder && !strings.HasPrefix(p.workDir, workFolder+"/") {
			return executor.UserError("the working directory leads out of the working folder", nil)
		}
		if rel, below := strings.CutPrefix(p.workDir, workFolder+"/"); below {
			addFolder(rel)
		}
	}
	size := int64(0)
	seen := map[string]bool{}
	for _, f := range s.Files {
		if f.Path == "" || len(f.Path) > 4096 || strings.ContainsRune(f.Path, 0) || path.IsAbs(f.Path) || path.Clean(f.Path) != f.Path ||
			f.Path == "." || f.Path == ".." || strings.HasPrefix(f.Path, "../") || seen[f.Path] {
			return executor.UserError(fmt.Sprintf("the file path %q is not a plain relative path, or is there twice", f.Path), nil)
		}
		seen[f.Path] = true
		addFolder(path.Dir(f.Path))
		size += (int64(len(f.Content)) + 4095) &^ 4095
		p.files = append(p.files, f)
	}
	for file := range seen {
		if folders[file] {
			return executor.UserError(fmt.Sprintf("the path %q is a file and a folder", file), nil)
		}
	}
	p.folders = slices.Sorted(maps.Keys(folders))
	if size > s.TmpfsMB<<20 || len(p.folders)+len(p.files) > tmpfsInodes/2 {
		return executor.UserError("the files do not fit into the working folder", nil)
	}
	return nil
}

// deliver says whether something must be in /work before the start.
func (p *plan) deliver() bool { return len(p.files)+len(p.folders) > 0 }

// tmpfsOptions are those of every writable file system of a container. It
// belongs to the job's user, since runc before 1.2 replaces the mode by that of
// the folder in the image.
func (p *plan) tmpfsOptions(o owner) string {
	return fmt.Sprintf("rw,nosuid,nodev,size=%dm,nr_inodes=%d,mode=1777,uid=%d,gid=%d", p.spec.TmpfsMB, tmpfsInodes, o.uid, o.gid)
}

// configure gives the whole configuration of a container. user is final.
func (p *plan) configure(img *imageFacts, f facts, opts *Options, user string, o owner) (*container.Config, *container.HostConfig) {
	s := &p.spec
	cfg := &container.Config{
		Hostname:     hostname,
		User:         user,
		AttachStdout: true, AttachStderr: true,
		Image:           img.id, // not its name, which may be moved
		Env:             p.environment(img),
		WorkingDir:      p.workDir,
		NetworkDisabled: !s.NetworkBridge,
		StopSignal:      p.signal,
		Healthcheck:     &container.HealthConfig{Test: []string{"NONE"}},
		Labels: map[string]string{
			labelWorker: opts.WorkerID, labelMark: opts.Mark, labelJob: s.JobID, labelAttempt: strconv.Itoa(s.Attempt), labelLease: s.LeaseID,
		},
	}
	if len(s.Stdin) > 0 {
		cfg.OpenStdin, cfg.StdinOnce, cfg.AttachStdin = true, true, true
	}
	cfg.Entrypoint, cfg.Cmd = p.command()
	return cfg, p.hardening(img, f, opts.Runtime, o)
}

// command is what runs. The entry point of the image is not what the job asked for.
func (p *plan) command() (entry, cmd []string) {
	if argv := p.spec.Argv; len(argv) > 0 {
		return argv[:1], argv[1:]
	}
	return []string{"/bin/sh"}, []string{"-c", p.spec.Shell}
}

// hardening is what holds for every container. Changing a line here changes
// what the project promises; design.md section 5 has the list.
func (p *plan) hardening(img *imageFacts, f facts, runtime string, o owner) *container.HostConfig {
	s := &p.spec
	host := &container.HostConfig{
		Runtime:     runtime,
		Privileged:  false,
		CapDrop:     []string{"ALL"},
		SecurityOpt: []string{"no-new-privileges:true"}, // seccomp: the engine's default, see judge
		IpcMode:     "private",
		// On version 1 too: the job must not see its place in the host's tree.
		CgroupnsMode:   "private",
		ReadonlyRootfs: true,
		Tmpfs: map[string]string{
			tmpFolder:  p.tmpfsOptions(o),
			workFolder: p.tmpfsOptions(o) + ",exec", // files may be scripts
		},
		LogConfig:     container.LogConfig{Type: "none"}, // but see logConfig
		RestartPolicy: container.RestartPolicy{Name: container.RestartPolicyDisabled},
		AutoRemove:    false, // removed when its exit code is known
		Resources: container.Resources{
			Memory:     s.MemoryMB << 20,
			MemorySwap: s.MemoryMB << 20, // memory and swap together, hence no swap
			NanoCPUs:   int64(math.Round(s.CPU * 1e9)),
			CPUShares:  s.CPUShares(),
			Ulimits: []*units.Ulimit{
				{Name: "nofile", Soft: maxOpenFiles, Hard: maxOpenFiles},
				{Name: "core", Soft: 0, Hard: 0},
				{Name: "fsize", Soft: maxFileSize, Hard: maxFileSize},
			},
		},
	}
	if s.NetworkBridge {
		host.NetworkMode = "bridge"
	}
	// Init forwards signals to a command that would ignore them as process 1, and
	// reaps what it leaves. Without one on the engine's side a stop takes the whole
	// grace for such commands; that is slower, not less safe.
	if f.init {
		yes := true
		host.Init = &yes
	}
	if s.PIDs > 0 {
		limit := s.PIDs
		if f.init {
			limit++ // the init process is ours, not the job's
		}
		host.PidsLimit = &limit
	}
	if f.cgroupV1 && s.MemoryMB > 0 {
		never := int64(0)
		host.MemorySwappiness = &never
	}
	if !f.rootless { // only root may raise or lower it
		host.OomScoreAdj = oomScore
	}
	// What an image declares as volumes would be folders on the host's disk
	// without any bound.
	for _, dir := range img.volumes {
		if dir = path.Clean("/" + dir); dir != workFolder && dir != tmpFolder && dir != "/" {
			host.Tmpfs[dir] = p.tmpfsOptions(o)
		}
	}
	return host
}

// environment is what the job says, over what the worker says, over the
// image's own; the engine adds the last.
func (p *plan) environment(img *imageFacts) []string {
	s := &p.spec
	var env []string
	for _, base := range [...][2]string{{"HOME", workFolder}, {"TMPDIR", tmpFolder}, {"LANG", "C.UTF-8"}} {
		if _, given := s.Env[base[0]]; !given && (base[0] == "HOME" || !img.hasEnv(base[0])) {
			env = append(env, base[0]+"="+base[1])
		}
	}
	env = append(env, "CMDEXEC_JOB_ID="+s.JobID, "CMDEXEC_ATTEMPT="+strconv.Itoa(s.Attempt))
	for _, name := range slices.Sorted(maps.Keys(s.Env)) {
		env = append(env, name+"="+s.Env[name])
	}
	return env
}

// isRoot reports whether the user part of "user[:group]" certainly is root.
func isRoot(user string) bool {
	name, _, _ := strings.Cut(user, ":")
	if name == "" || name == "root" {
		return true
	}
	n, err := strconv.ParseInt(name, 10, 64)
	return err == nil && n == 0
}
