package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/cmdexec/cmdexec/libs/client"
	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
)

// explainAfter is how long `run` waits in silence before it says why nothing happens.
const explainAfter = 2 * time.Second

// specFlags are the fields of a job as flags.
type specFlags struct {
	spec        job.Spec
	shell       string
	stdin       bool
	env         []string
	labels      []string
	constraints []string
	files       []string
	priority    int
	grace       int
	backoff     int
	key         string
}

func (f *specFlags) register(cmd *cobra.Command) {
	s, flags := &f.spec, cmd.Flags()
	flags.StringVarP(&f.shell, "command", "c", "", "shell text to run, in place of a program and its arguments")
	flags.StringVar(&s.ContainerImage, "image", "", "container image to run the command in")
	flags.StringVar(&s.Network, "network", "", "none (default) or bridge; containers only")
	flags.StringVar(&s.PullPolicy, "pull", "", "missing (default), always or never; containers only")
	flags.IntVar(&s.Timeout, "timeout", 0, "seconds that the command may run (default 300)")
	flags.StringVar(&s.Name, "name", "", "a name for people")
	flags.StringArrayVarP(&f.env, "env", "e", nil, "NAME=VALUE for the command; not secret; may be repeated")
	flags.StringArrayVarP(&f.labels, "label", "l", nil, "NAME=VALUE to find the job by; may be repeated")
	flags.StringArrayVar(&f.constraints, "require", nil, "NAME=VALUE label that the worker must have; may be repeated")
	flags.StringVarP(&s.WorkingDir, "workdir", "w", "", "working folder of the command")
	flags.StringVarP(&s.User, "user", "u", "", "user to run as")
	flags.BoolVarP(&f.stdin, "stdin", "i", false, "give what is read here on stdin to the command")
	flags.Float64Var(&s.Resources.CPU, "cpu", 0, "cores (default 1)")
	flags.Int64Var(&s.Resources.MemoryMB, "memory", 0, "MiB of memory (default 512)")
	flags.Int64Var(&s.Resources.PIDs, "pids", 0, "processes and threads (default 128)")
	flags.Int64Var(&s.Resources.TmpfsMB, "tmpfs", 0, "MiB of /tmp (default 64); containers only")
	flags.StringVar(&s.Constraints.OS, "require-os", "", "operating system of the worker, for example linux")
	flags.StringVar(&s.Constraints.Arch, "require-arch", "", "architecture of the worker, for example amd64")
	flags.StringArrayVar(&f.files, "file", nil, "PATH or PATH=LOCAL: a text file to write into the working folder; may be repeated")
	flags.StringVar(&s.Queue, "queue", "", "queue to wait in")
	flags.IntVar(&f.priority, "priority", job.DefaultPriority, "0 to 100, higher goes first")
	flags.IntVar(&s.Retry.MaxAttempts, "attempts", 0, "attempts that may fail (default 1)")
	flags.IntVar(&f.backoff, "backoff", job.DefaultBackoffSeconds, "seconds before the second attempt")
	flags.IntVar(&s.Retry.MaxBackoffSeconds, "max-backoff", 0, "most seconds between two attempts (default 300)")
	flags.IntSliceVar(&s.Retry.OnExitCodes, "on-exit-codes", nil, "try again only on these exit codes (default any failure)")
	flags.StringVar(&s.OnWorkerLost, "on-worker-lost", "", "requeue (default) or fail: not started again when it is unknown how it ended")
	flags.IntVar(&s.Timeouts.Queue, "queue-timeout", 0, "seconds that the job may wait")
	flags.IntVar(&s.Timeouts.Prepare, "prepare-timeout", 0, "seconds for pulling the image and writing files (default 300)")
	flags.IntVar(&s.Timeouts.Total, "total-timeout", 0, "seconds from now to the end, all attempts together")
	flags.Int64Var(&s.LogMaxBytes, "log-max-bytes", 0, "bytes of output kept; beyond that its head and tail (default 16777216)")
	flags.StringVar(&s.Stop.Signal, "stop-signal", "", "signal that asks the command to end (default SIGTERM)")
	flags.IntVar(&f.grace, "grace", job.DefaultGraceSeconds, "seconds between that signal and the kill")
	flags.StringVar(&f.key, "idempotency-key", "", "submitting again under the same key gives the same job")
}

// build makes the spec of a command line.
func (f *specFlags) build(args []string) (job.Spec, error) {
	s := f.spec
	switch {
	case f.shell != "" && len(args) > 0:
		return s, usage("either -c with a shell text, or a program after --, not both")
	case f.shell != "":
		s.Command.Shell = f.shell
	case len(args) == 0:
		return s, usage("what should run? for example: cmdexec run -- echo hello, or: cmdexec run -c 'echo $HOME'")
	default:
		s.Command.Argv = args
	}
	var err error
	if s.Env, err = pairs("--env", f.env); err != nil {
		return s, err
	}
	if s.Labels, err = pairs("--label", f.labels); err != nil {
		return s, err
	}
	if s.Constraints.Labels, err = pairs("--require", f.constraints); err != nil {
		return s, err
	}
	s.Priority, s.Stop.GraceSeconds, s.Retry.BackoffSeconds = &f.priority, &f.grace, &f.backoff
	for _, file := range f.files {
		name, local, ok := strings.Cut(file, "=")
		if !ok {
			name, local = path.Base(filepath.ToSlash(file)), file
		}
		data, err := readUpTo(local, job.MaxInputBytes)
		if err != nil {
			return s, usage("--file: %w", err)
		}
		s.Files = append(s.Files, job.File{Path: name, Content: string(data)})
	}
	if f.stdin {
		data, err := io.ReadAll(io.LimitReader(os.Stdin, job.MaxInputBytes+1))
		if err != nil {
			return s, fmt.Errorf("read stdin: %w", err)
		}
		s.Stdin = string(data)
	}
	if _, errs := job.Normalise(s); len(errs) > 0 {
		texts := make([]string, 0, len(errs))
		for _, e := range errs {
			texts = append(texts, e.Error())
		}
		return s, usage("%s", strings.Join(texts, "; "))
	}
	return s, nil
}

func pairs(flag string, values []string) (map[string]string, error) {
	if len(values) == 0 {
		return nil, nil
	}
	out := make(map[string]string, len(values))
	for _, v := range values {
		name, value, ok := strings.Cut(v, "=")
		if !ok || name == "" {
			return nil, usage("%s wants NAME=VALUE", flag)
		}
		out[name] = value
	}
	return out, nil
}

func (a *app) runCommand() *cobra.Command {
	var f specFlags
	cmd := &cobra.Command{
		Use:   "run [flags] -- PROGRAM [ARG...]",
		Short: "Run a command, show its output as it comes, and exit with its exit code",
		Long: "Run a command, show its output as it comes, and exit with its exit code: the job's own, 124 it timed out,\n" +
			"125 it could not run or there is no server, 130 it was canceled.\n" +
			"The first Ctrl-C asks for a cancel and waits for it, a second one detaches and leaves the job alone.",
		Example: "  cmdexec run -- echo hello\n  cmdexec run -c 'echo $((6*7))' --timeout 60",
		RunE: does(func(cmd *cobra.Command, args []string) error {
			spec, err := f.build(args)
			if err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			return a.run(cmd.Context(), c, spec, f.key)
		}),
	}
	f.register(cmd)
	return cmd
}

func (a *app) run(ctx context.Context, c *client.Client, spec job.Spec, key string) error {
	interrupts := make(chan os.Signal, 2)
	signal.Notify(interrupts, os.Interrupt, syscall.SIGTERM)
	defer signal.Stop(interrupts)
	ctx, detach := context.WithCancelCause(ctx)
	defer detach(nil)

	created, err := c.Create(ctx, spec, client.CreateOptions{IdempotencyKey: key})
	if err != nil {
		return fail(err)
	}
	jobID := created.Job.JobID
	quiet := make(chan struct{}) // closed at the first sign of life
	go a.onInterrupt(ctx, c, jobID, interrupts, detach)
	go a.explainSilence(ctx, c, jobID, quiet)

	show := a.printer()
	alive := false
	done, err := c.Follow(ctx, jobID, client.Position{}, func(item client.Item) {
		if !alive {
			alive = true
			close(quiet)
		}
		show(item)
	})
	if cause := context.Cause(ctx); errors.Is(cause, errDetached) {
		return &exitError{exitCanceled, fmt.Errorf("detached from %s; it goes on: cmdexec logs -f %s", jobID, jobID)}
	}
	if err != nil {
		return fail(fmt.Errorf("%w (job %s goes on)", err, jobID))
	}
	return exitOf(&done)
}

var errDetached = errors.New("detached")

// onInterrupt makes the first interrupt a cancel and the second a detach.
func (a *app) onInterrupt(ctx context.Context, c *client.Client, jobID string, interrupts <-chan os.Signal, detach context.CancelCauseFunc) {
	for n := 1; ; n++ {
		select {
		case <-interrupts:
		case <-ctx.Done():
			return
		}
		if n > 1 {
			detach(errDetached)
			return
		}
		fmt.Fprintf(a.err, "\ncmdexec: canceling %s; Ctrl-C again detaches\n", jobID)
		if _, err := c.Cancel(ctx, jobID); err != nil && ctx.Err() == nil {
			fmt.Fprintln(a.err, "cmdexec: the cancel was not taken:", err)
		}
	}
}

// explainSilence tells once why nothing happens.
func (a *app) explainSilence(ctx context.Context, c *client.Client, jobID string, quiet <-chan struct{}) {
	timer := time.NewTimer(explainAfter)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-quiet:
		return
	case <-ctx.Done():
		return
	}
	if ex, err := c.Explain(ctx, jobID); err == nil && (ex.Status == job.Queued || ex.Status == job.Retrying) {
		fmt.Fprintf(a.err, "cmdexec: %s: %s\n", jobID, ex.Summary)
	}
}

// printer writes output where it belongs, and says when an attempt follows another.
func (a *app) printer() func(client.Item) {
	attempt := 0
	return func(item client.Item) {
		if attempt != 0 && item.Attempt != attempt {
			fmt.Fprintf(a.err, "cmdexec: attempt %d\n", item.Attempt)
		}
		attempt = item.Attempt
		w := a.out
		if item.Stream != workerproto.Stdout {
			w = a.err
		}
		_, _ = w.Write(item.Bytes()) // a closed pipe ends the program by its signal
	}
}

// exitOf turns the end of a job into the end of this program.
func exitOf(j *api.Job) error {
	switch j.Status {
	case job.Succeeded:
		return nil
	case job.TimedOut:
		return &exitError{exitTimedOut, fmt.Errorf("%s timed out (%s)", j.JobID, j.Reason)}
	case job.Canceled:
		return &exitError{exitCanceled, fmt.Errorf("%s was canceled", j.JobID)}
	}
	switch {
	case j.Reason == job.ReasonExitCode && j.ExitCode != nil:
		return &exitError{code: *j.ExitCode}
	case j.Signal != "" && j.ReasonClass == job.ClassUser:
		return &exitError{128 + signalNumber(j.Signal), fmt.Errorf("%s died of %s%s", j.JobID, j.Signal, because(j))}
	}
	return &exitError{exitCannotRun, fmt.Errorf("%s %s: %s%s", j.JobID, j.Status, j.Reason, because(j))}
}

func because(j *api.Job) string {
	if j.Message == "" {
		return ""
	}
	return ": " + j.Message
}

func signalNumber(name string) int {
	for n := syscall.Signal(1); n < 65; n++ {
		if signalName(n) == name {
			return int(n)
		}
	}
	return 0
}

func (a *app) submitCommand() *cobra.Command {
	var f specFlags
	var file string
	cmd := &cobra.Command{
		Use:   "submit [flags] -- PROGRAM [ARG...]",
		Short: "Submit a command and print the job's id",
		Long: "Submit a command and print the job's id. With -f the whole job is read from a file, JSON or YAML, with the fields of\n" +
			"the API; - is stdin.",
		Example: "  cmdexec submit -- echo hello\n  cmdexec submit -f job.yaml",
		RunE: does(func(cmd *cobra.Command, args []string) error {
			if file != "" {
				return a.submitFile(cmd, args, file, f.key)
			}
			spec, err := f.build(args)
			if err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			created, err := c.Create(cmd.Context(), spec, client.CreateOptions{IdempotencyKey: f.key})
			if err != nil {
				return fail(err)
			}
			return a.printID(&created)
		}),
	}
	f.register(cmd)
	cmd.Flags().StringVarP(&file, "job-file", "f", "", "read the job from this file; only --idempotency-key may be given beside it")
	return cmd
}

func (a *app) submitFile(cmd *cobra.Command, args []string, file, key string) error {
	other := ""
	cmd.Flags().Visit(func(f *pflag.Flag) {
		if cmd.InheritedFlags().Lookup(f.Name) == nil && f.Name != "job-file" && f.Name != "idempotency-key" {
			other = "--" + f.Name
		}
	})
	switch {
	case len(args) > 0:
		return usage("either a file with the job, or a program after --, not both")
	case other != "":
		return usage("%s cannot be given beside -f: write it into the file", other)
	}
	doc, err := readUpTo(file, 1<<20)
	if err != nil {
		return usage("-f: %w", err)
	}
	media := client.MediaYAML
	if strings.HasPrefix(strings.TrimSpace(string(doc)), "{") && !strings.HasSuffix(file, ".yaml") && !strings.HasSuffix(file, ".yml") {
		media = client.MediaJSON
	}
	c, err := a.client()
	if err != nil {
		return err
	}
	created, err := c.CreateDocument(cmd.Context(), media, doc, client.CreateOptions{IdempotencyKey: key})
	if err != nil {
		return fail(err)
	}
	return a.printID(&created)
}

func (a *app) printID(created *client.Created) error {
	return a.print(created.Job, func(w io.Writer) { fmt.Fprintln(w, created.Job.JobID) })
}

// readUpTo reads a file, or stdin for "-", that has at most so many bytes.
func readUpTo(name string, most int64) ([]byte, error) {
	in := os.Stdin
	if name != "-" {
		file, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		defer func() { _ = file.Close() }()
		in = file
	}
	data, err := io.ReadAll(io.LimitReader(in, most+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("read %s: %w", name, err)
	case int64(len(data)) > most:
		return nil, fmt.Errorf("%s has more than %d bytes", name, most)
	}
	return data, nil
}
