package job

import (
	"encoding/json"
	"fmt"
	"math"
	"path"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// FieldError says what is wrong with one field of a spec. Detail never
// contains the value that was sent.
type FieldError struct {
	Field  string `json:"field"`
	Code   string `json:"code"`
	Detail string `json:"detail"`
}

// Error makes a FieldError an error.
func (e FieldError) Error() string { return e.Field + ": " + e.Detail }

// Codes of FieldError.
const (
	CodeRequired         = "required"
	CodeInvalid          = "invalid"
	CodeOutOfRange       = "out_of_range"
	CodeTooLong          = "too_long"
	CodeTooMany          = "too_many"
	CodeUnsupportedField = "unsupported_field"
	CodeNeedsContainer   = "needs_container"
)

// Signals that a job may name as its stop signal.
func Signals() []string {
	return []string{"SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGKILL"}
}

// Normalise checks a spec and fills in every default. It returns all errors
// that it finds, in the order of the fields; the spec is usable only when
// there are none. The argument is not changed.
func Normalise(in Spec) (Spec, []FieldError) {
	v := &validator{}
	s := in
	v.command(&s)
	v.text("name", s.Name, MaxNameLen)
	v.image(s.ContainerImage)
	number(v, "timeout", &s.Timeout, DefaultTimeoutSeconds, 1, MaxTimeoutSeconds)
	v.labels("labels", s.Labels)
	v.env(s.Env)
	if s.SecretEnv != nil {
		v.add("secretEnv", CodeUnsupportedField, "secretEnv does not exist yet; env is stored and returned, so put no secret there")
	}
	if s.Webhook != nil {
		v.add("webhook", CodeUnsupportedField, "webhooks do not exist yet; follow GET /api/jobs/{jobId}/events instead")
	}
	v.path("workingDir", s.WorkingDir)
	v.user(s.User)
	v.inputs(&s)
	v.resources(&s)
	v.enum("network", &s.Network, NetworkNone, NetworkNone, NetworkBridge)
	v.enum("pullPolicy", &s.PullPolicy, PullMissing, PullMissing, PullAlways, PullNever)
	v.queue(&s)
	s.Priority = v.optional("priority", s.Priority, DefaultPriority, 0, MaxPriority)
	v.constraints(s.Constraints)
	v.retry(&s)
	v.enum("onWorkerLost", &s.OnWorkerLost, OnWorkerLostRequeue, OnWorkerLostRequeue, OnWorkerLostFail)
	v.timeouts(&s.Timeouts)
	v.enum("stop.signal", &s.Stop.Signal, DefaultStopSignal, Signals()...)
	s.Stop.GraceSeconds = v.optional("stop.graceSeconds", s.Stop.GraceSeconds, DefaultGraceSeconds, 0, MaxGraceSeconds)
	number(v, "logMaxBytes", &s.LogMaxBytes, DefaultLogMaxBytes, MinLogBytes, MaxLogBytes)
	v.containerOnly(in, &s)
	dropEmpty(&s)
	if len(v.errs) == 0 {
		if data, err := json.Marshal(s); err != nil || len(data) > MaxSpecBytes {
			v.add("", CodeTooLong, fmt.Sprintf("the whole job may have at most %d bytes", MaxSpecBytes))
		}
	}
	return s, v.errs
}

// dropEmpty makes an empty collection an absent one, which is what it means: the
// JSON form, and so the hash, is then the same for both.
func dropEmpty(s *Spec) {
	for _, m := range [...]*map[string]string{&s.Labels, &s.Env, &s.Constraints.Labels} {
		if len(*m) == 0 {
			*m = nil
		}
	}
	if len(s.Files) == 0 {
		s.Files = nil
	}
	if len(s.Retry.OnExitCodes) == 0 {
		s.Retry.OnExitCodes = nil
	}
}

type validator struct{ errs []FieldError }

func (v *validator) add(field, code, detail string) {
	v.errs = append(v.errs, FieldError{Field: field, Code: code, Detail: detail})
}

func (v *validator) command(s *Spec) {
	const field = "command"
	switch {
	case s.Command.Argv != nil && (len(s.Command.Argv) == 0 || s.Command.Argv[0] == ""):
		v.add(field, CodeRequired, "the array must name a program first")
	case s.Command.Argv == nil && strings.TrimSpace(s.Command.Shell) == "":
		v.add(field, CodeRequired, "a command is needed: a string for the shell, or an array of strings")
	case len(s.Command.Argv) > MaxArgs:
		v.add(field, CodeTooMany, fmt.Sprintf("at most %d arguments", MaxArgs))
	}
	total := len(s.Command.Shell)
	for _, a := range s.Command.Argv {
		total += len(a)
	}
	if total > MaxCommandBytes {
		v.add(field, CodeTooLong, fmt.Sprintf("at most %d bytes; send longer scripts by files or stdin", MaxCommandBytes))
	}
	if dirty(s.Command.Shell) || slices.ContainsFunc(s.Command.Argv, dirty) {
		v.add(field, CodeInvalid, "must be valid UTF-8 without NUL")
	}
}

// image accepts what a registry reference may look like: lower-case path,
// optional registry host and port, tag and sha256 digest.
func (v *validator) image(ref string) {
	const field = "containerImage"
	if ref == "" {
		return
	}
	if len(ref) > MaxImageLen {
		v.add(field, CodeTooLong, fmt.Sprintf("at most %d characters", MaxImageLen))
		return
	}
	if !ValidImage(ref) {
		v.add(field, CodeInvalid, "not an image reference; write name, name:tag or name@sha256:digest, optionally after registry/")
	}
}

func (v *validator) text(field, s string, most int) {
	if len(s) > most {
		v.add(field, CodeTooLong, fmt.Sprintf("at most %d bytes", most))
	}
	if !utf8.ValidString(s) || strings.ContainsFunc(s, unicode.IsControl) {
		v.add(field, CodeInvalid, "must be valid UTF-8 without control characters")
	}
}

func (v *validator) labels(field string, labels map[string]string) {
	if len(labels) > MaxLabels {
		v.add(field, CodeTooMany, fmt.Sprintf("at most %d labels", MaxLabels))
	}
	for k, val := range labels {
		if !ValidLabelKey(k) {
			v.add(field, CodeInvalid, fmt.Sprintf("a label name is 1 to %d letters, digits, '.', '_', '-' or '/'", MaxLabelKeyLen))
			return
		}
		if len(val) > MaxLabelValueLen || !utf8.ValidString(val) || strings.ContainsFunc(val, unicode.IsControl) {
			v.add(field, CodeInvalid, fmt.Sprintf("a label value is at most %d bytes of text without control characters", MaxLabelValueLen))
			return
		}
	}
}

func (v *validator) env(env map[string]string) {
	const field = "env"
	if len(env) > MaxEnvVars {
		v.add(field, CodeTooMany, fmt.Sprintf("at most %d variables", MaxEnvVars))
	}
	total := 0
	for k, val := range env {
		total += len(k) + len(val)
		if !validEnvName(k) {
			v.add(field, CodeInvalid, fmt.Sprintf("a variable name is 1 to %d letters, digits and '_', not starting with a digit", MaxEnvNameLen))
			return
		}
		if strings.HasPrefix(k, "CMDEXEC_") {
			v.add(field, CodeInvalid, "names that begin with CMDEXEC_ are set by the worker")
			return
		}
		if !clean(val) {
			v.add(field, CodeInvalid, "values must be valid UTF-8 without NUL")
			return
		}
	}
	if total > MaxEnvBytes {
		v.add(field, CodeTooLong, fmt.Sprintf("names and values together have at most %d bytes", MaxEnvBytes))
	}
}

func (v *validator) path(field, p string) {
	switch {
	case len(p) > MaxPathLen:
		v.add(field, CodeTooLong, fmt.Sprintf("at most %d bytes", MaxPathLen))
	case !clean(p):
		v.add(field, CodeInvalid, "must be valid UTF-8 without NUL")
	case slices.Contains(strings.Split(p, "/"), ".."):
		v.add(field, CodeInvalid, "must not contain '..'")
	}
}

func (v *validator) user(u string) {
	ok := len(u) <= MaxUserLen
	for i := 0; ok && i < len(u); i++ {
		c := u[i]
		ok = c == '_' || c == '-' && i > 0 || c == '.' || c == ':' && i > 0 ||
			'0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
	}
	if !ok || strings.Count(u, ":") > 1 || strings.HasSuffix(u, ":") {
		v.add("user", CodeInvalid, fmt.Sprintf("a user name or uid[:gid] of at most %d characters", MaxUserLen))
	}
}

func (v *validator) inputs(s *Spec) {
	if !clean(s.Stdin) {
		v.add("stdin", CodeInvalid, "must be valid UTF-8 without NUL; encode other bytes and decode them in the command")
	}
	if len(s.Files) > MaxFiles {
		v.add("files", CodeTooMany, fmt.Sprintf("at most %d files", MaxFiles))
		return
	}
	total := len(s.Stdin)
	files := slices.Clone(s.Files)
	seen := make(map[string]bool, len(files))
	for i := range files {
		f := &files[i]
		field := fmt.Sprintf("files[%d]", i)
		v.path(field+".path", f.Path)
		p := path.Clean(f.Path)
		switch {
		case f.Path == "" || p == "." || strings.HasPrefix(p, "/") || strings.HasSuffix(f.Path, "/"):
			v.add(field+".path", CodeInvalid, "must name a file relative to the working folder")
		case clashes(seen, p):
			v.add(field+".path", CodeInvalid, "another file has this path, or is where a folder of it would be")
		}
		seen[p] = true
		total += len(f.Content)
		if !clean(f.Content) {
			v.add(field+".content", CodeInvalid, "must be valid UTF-8 without NUL; encode other bytes and decode them in the command")
		}
		if f.Mode == "" {
			f.Mode = defaultFileMode
		}
		if m, err := strconv.ParseUint(f.Mode, 8, 32); err != nil || m > 0o777 || len(f.Mode) > len(defaultFileMode) {
			v.add(field+".mode", CodeInvalid, "must be octal permissions, from 0000 to 0777")
		}
	}
	s.Files = files
	if total > MaxInputBytes {
		v.add("files", CodeTooLong, fmt.Sprintf("stdin and files together have at most %d bytes", MaxInputBytes))
	}
}

// clashes reports whether a file cannot be at p beside those that were seen:
// one is there, one is in place of a folder on the way, or p is such a folder.
func clashes(seen map[string]bool, p string) bool {
	for dir := p; dir != "."; dir = path.Dir(dir) {
		if seen[dir] {
			return true
		}
	}
	for s := range seen {
		if strings.HasPrefix(s, p+"/") {
			return true
		}
	}
	return false
}

func (v *validator) resources(s *Spec) {
	r := &s.Resources
	if r.CPU == 0 {
		r.CPU = DefaultCPU
	}
	if math.IsNaN(r.CPU) || r.CPU < MinCPU || r.CPU > MaxCPU {
		v.add("resources.cpu", CodeOutOfRange, fmt.Sprintf("from %g to %g cores", MinCPU, MaxCPU))
	}
	number(v, "resources.memoryMb", &r.MemoryMB, DefaultMemoryMB, MinMemoryMB, MaxMemoryMB)
	number(v, "resources.pids", &r.PIDs, DefaultPIDs, 1, MaxPIDs)
	number(v, "resources.tmpfsMb", &r.TmpfsMB, DefaultTmpfsMB, 1, MaxTmpfsMB)
}

func (v *validator) queue(s *Spec) {
	if s.Queue == "" {
		s.Queue = DefaultQueue
	}
	if !ValidQueue(s.Queue) {
		v.add("queue", CodeInvalid, fmt.Sprintf("1 to %d lower-case letters, digits, '_' and '-'", MaxQueueLen))
	}
}

func (v *validator) constraints(c Constraints) {
	for _, f := range [...]struct{ field, value string }{{"constraints.os", c.OS}, {"constraints.arch", c.Arch}} {
		if f.value != "" && !ValidQueue(f.value) {
			v.add(f.field, CodeInvalid, "lower-case letters and digits as Go names them, for example linux and amd64")
		}
	}
	v.labels("constraints.labels", c.Labels)
}

func (v *validator) retry(s *Spec) {
	r := &s.Retry
	number(v, "retry.maxAttempts", &r.MaxAttempts, DefaultMaxAttempts, 1, MaxAttemptsLimit)
	r.BackoffSeconds = v.optional("retry.backoffSeconds", r.BackoffSeconds, DefaultBackoffSeconds, 0, MaxBackoffLimit)
	number(v, "retry.maxBackoffSeconds", &r.MaxBackoffSeconds, DefaultMaxBackoffSeconds, 1, MaxBackoffLimit)
	if len(r.OnExitCodes) > MaxRetryExitCodes {
		v.add("retry.onExitCodes", CodeTooMany, fmt.Sprintf("at most %d exit codes", MaxRetryExitCodes))
	}
	for _, c := range r.OnExitCodes {
		if c < 1 || c > 255 {
			v.add("retry.onExitCodes", CodeOutOfRange, "exit codes from 1 to 255")
			break
		}
	}
}

func (v *validator) timeouts(t *Timeouts) {
	number(v, "timeouts.prepare", &t.Prepare, DefaultPrepareSeconds, 1, MaxPrepareSeconds)
	for _, f := range [...]struct {
		field string
		value int
	}{{"timeouts.queue", t.Queue}, {"timeouts.total", t.Total}} {
		if f.value < 0 || f.value > MaxWaitSeconds {
			v.add(f.field, CodeOutOfRange, fmt.Sprintf("from 1 to %d seconds, or absent", MaxWaitSeconds))
		}
	}
}

// containerOnly refuses what a process job cannot have, so that nothing that
// was accepted is silently not honoured, and clears the defaults of it.
func (v *validator) containerOnly(in Spec, s *Spec) {
	if s.ContainerImage != "" {
		return
	}
	for _, f := range [...]struct {
		field string
		set   bool
	}{
		{"network", in.Network != ""},
		{"pullPolicy", in.PullPolicy != ""},
		{"resources.tmpfsMb", in.Resources.TmpfsMB != 0},
	} {
		if f.set {
			v.add(f.field, CodeNeedsContainer, "only a job with a containerImage can have this")
		}
	}
	s.Network, s.PullPolicy, s.Resources.TmpfsMB = "", "", 0
}

func (v *validator) enum(field string, p *string, def string, allowed ...string) {
	if *p == "" {
		*p = def
	}
	if !slices.Contains(allowed, *p) {
		v.add(field, CodeInvalid, "one of "+strings.Join(allowed, ", "))
	}
}

func (v *validator) optional(field string, p *int, def, least, most int) *int {
	n := valueOr(p, def)
	if n < least || n > most {
		v.add(field, CodeOutOfRange, fmt.Sprintf("from %d to %d", least, most))
	}
	return &n
}

func number[T int | int64](v *validator, field string, p *T, def, least, most T) {
	if *p == 0 {
		*p = def
	}
	if *p < least || *p > most {
		v.add(field, CodeOutOfRange, fmt.Sprintf("from %d to %d", least, most))
	}
}

// ValidLabelKey reports whether s may be the name of a label.
func ValidLabelKey(s string) bool {
	ok := s != "" && len(s) <= MaxLabelKeyLen
	for i := 0; ok && i < len(s); i++ {
		c := s[i]
		ok = c == '.' || c == '_' || c == '-' || c == '/' ||
			'0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
	}
	return ok
}

// ValidQueue reports whether s may name a queue.
func ValidQueue(s string) bool {
	ok := s != "" && len(s) <= MaxQueueLen
	for i := 0; ok && i < len(s); i++ {
		c := s[i]
		ok = c == '_' || c == '-' || '0' <= c && c <= '9' || 'a' <= c && c <= 'z'
	}
	return ok
}

// ValidIdempotencyKey reports whether s is 1 to 255 visible ASCII characters.
func ValidIdempotencyKey(s string) bool {
	ok := s != "" && len(s) <= MaxIdempotencyKey
	for i := 0; ok && i < len(s); i++ {
		ok = s[i] > ' ' && s[i] < 0x7f
	}
	return ok
}

func validEnvName(s string) bool {
	ok := s != "" && len(s) <= MaxEnvNameLen && (s[0] < '0' || s[0] > '9')
	for i := 0; ok && i < len(s); i++ {
		c := s[i]
		ok = c == '_' || '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
	}
	return ok
}

func clean(s string) bool { return utf8.ValidString(s) && strings.IndexByte(s, 0) < 0 }
func dirty(s string) bool { return !clean(s) }
