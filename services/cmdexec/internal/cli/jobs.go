package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/cmdexec/cmdexec/libs/client"
	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
)

func (a *app) statusCommand() *cobra.Command {
	return &cobra.Command{
		Use: "status JOB", Short: "Show a job", Args: cobra.ExactArgs(1),
		RunE: does(func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			j, err := c.Job(cmd.Context(), args[0])
			if err != nil {
				return fail(err)
			}
			return a.print(j, func(w io.Writer) { showJob(w, &j) })
		}),
	}
}

func showJob(w io.Writer, j *api.Job) {
	lines := [][]string{
		{"job", j.JobID},
		{"status", string(j.Status)},
		{"owner", j.Owner},
		{"command", cut(commandText(&j.Spec), 100)},
		{"created", at(&j.CreatedAt)},
		{"started", at(j.StartedAt)},
		{"finished", at(j.FinishedAt)},
	}
	add := func(name, value string) {
		if value != "" {
			lines = append(lines, []string{name, value})
		}
	}
	if j.ExitCode != nil {
		add("exit code", strconv.Itoa(*j.ExitCode))
	}
	if j.Reason != "" {
		add("reason", fmt.Sprintf("%s (%s)", j.Reason, j.ReasonClass))
	}
	add("message", j.Message)
	add("rerun of", j.RerunOf)
	add("signal", j.Signal)
	if j.DurationMs > 0 {
		add("ran", ran(j))
	}
	if j.Logs != nil {
		add("output", fmt.Sprintf("%d bytes, %d not kept", j.Logs.Bytes, j.Logs.TruncatedBytes))
	}
	if c := j.Cancel; c != nil {
		add("cancel", cancelText(c))
	}
	for _, t := range j.Attempts {
		add(fmt.Sprintf("attempt %d", t.Number), fmt.Sprintf("%s on %s, assigned %s%s", orDash(string(t.Outcome)), t.WorkerID,
			at(&t.AssignedAt), reasonOf(t)))
	}
	rows(w, lines...)
}

func cancelText(c *api.Cancel) string {
	return fmt.Sprintf("requested %s, delivered %s, signalled %s, exited %s, gone %s",
		at(&c.RequestedAt), at(c.DeliveredAt), at(c.SignalledAt), at(c.ExitedAt), at(c.GoneAt))
}

func reasonOf(t api.Attempt) string {
	if t.Reason == "" {
		return ""
	}
	return ", " + string(t.Reason)
}

func commandText(s *job.Spec) string {
	if s.Command.Argv != nil {
		return strings.Join(s.Command.Argv, " ")
	}
	return s.Command.Shell
}

func (a *app) logsCommand() *cobra.Command {
	var follow bool
	var stream string
	var attempt int
	cmd := &cobra.Command{
		Use: "logs JOB", Short: "Show a job's output", Args: cobra.ExactArgs(1),
		Long: "Show a job's output: its stdout here on stdout, its stderr on stderr. With -f it goes on until the job ends.",
		RunE: does(func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			if s := workerproto.Stream(stream); stream != "" && !s.Valid() {
				return usage("--stream must be stdout, stderr or system")
			}
			show := a.printer()
			if follow {
				_, err := c.Follow(cmd.Context(), args[0], client.Position{}, func(item client.Item) {
					if stream == "" || string(item.Stream) == stream {
						show(item)
					}
				})
				return fail(err)
			}
			return fail(a.pages(cmd, c, args[0], client.LogOptions{Stream: workerproto.Stream(stream), Attempt: attempt}, show))
		}),
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on until the job ends")
	cmd.Flags().StringVar(&stream, "stream", "", "stdout, stderr or system; default all")
	cmd.Flags().IntVar(&attempt, "attempt", 0, "number of the attempt; default the newest")
	return cmd
}

// pages shows what is stored.
func (a *app) pages(cmd *cobra.Command, c *client.Client, jobID string, o client.LogOptions, show func(client.Item)) error {
	if a.format != "table" {
		page, err := c.Logs(cmd.Context(), jobID, o)
		if err != nil {
			return err
		}
		return a.print(page, nil)
	}
	for {
		page, err := c.Logs(cmd.Context(), jobID, o)
		if err != nil {
			return err
		}
		for _, item := range page.Items {
			show(client.Item{LogItem: item})
		}
		if page.EOF && page.TruncatedBytes > 0 {
			fmt.Fprintf(a.err, "cmdexec: %d bytes of this output were not kept\n", page.TruncatedBytes)
		}
		if page.EOF || page.NextAfter == o.After {
			return nil
		}
		o.After = page.NextAfter
	}
}

func (a *app) cancelCommand() *cobra.Command {
	var statuses, labels []string
	var filter api.CancelBatchRequest
	var since, until string
	cmd := &cobra.Command{
		Use: "cancel [JOB...] [filters]", Short: "Cancel jobs",
		Long:    "Cancel jobs, by their ids or by filters: all of your jobs that have not ended and match every filter.",
		Example: "  cmdexec cancel job-01jd2xw8q3v5k7m9n1p3r5t7v9\n  cmdexec cancel --label team=blue --status queued",
		RunE: does(func(cmd *cobra.Command, args []string) error {
			filtered := len(statuses)+len(labels) > 0 || filter.Queue != "" || filter.Owner != "" || since != "" || until != ""
			if filtered == (len(args) > 0) {
				return usage("name the jobs, or give filters: --status, --queue, --label, --since, --until, --owner")
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			if filtered {
				for _, s := range statuses {
					filter.Status = append(filter.Status, job.State(s))
				}
				if filter.Labels, err = pairs("--label", labels); err != nil {
					return err
				}
				if filter.Since, err = moment("--since", since); err != nil {
					return err
				}
				if filter.Until, err = moment("--until", until); err != nil {
					return err
				}
				return a.cancelMatching(cmd, c, filter)
			}
			for _, jobID := range args {
				j, err := c.Cancel(cmd.Context(), jobID)
				if err != nil {
					return fail(err)
				}
				if err := a.print(j, func(w io.Writer) { fmt.Fprintf(w, "%s %s\n", j.JobID, j.Status) }); err != nil {
					return err
				}
			}
			return nil
		}),
	}
	flags := cmd.Flags()
	flags.StringSliceVar(&statuses, "status", nil, "only jobs with these statuses")
	flags.StringVar(&filter.Queue, "queue", "", "only jobs of this queue")
	flags.StringArrayVarP(&labels, "label", "l", nil, "NAME=VALUE that the job must have; may be repeated")
	flags.StringVar(&since, "since", "", "only jobs created at or after this time, or so long ago: 2026-11-24T08:00:00Z or 15m")
	flags.StringVar(&until, "until", "", "only jobs created before this time, or so long ago")
	flags.StringVar(&filter.Owner, "owner", "", "whose jobs; admins only")
	return cmd
}

// moment reads a time, or a duration that has passed since.
func moment(flag, text string) (*time.Time, error) {
	if text == "" {
		return nil, nil
	}
	if d, err := time.ParseDuration(text); err == nil && d >= 0 {
		t := time.Now().Add(-d)
		return &t, nil
	}
	t, err := time.Parse(time.RFC3339, text)
	if err != nil {
		return nil, usage("%s wants a time such as 2026-11-24T08:00:00Z, or a duration such as 15m", flag)
	}
	return &t, nil
}

// cancelMatching cancels until no further job matches. Jobs of one call that could
// not be canceled end it: the next call would meet them again.
func (a *app) cancelMatching(cmd *cobra.Command, c *client.Client, filter api.CancelBatchRequest) error {
	for {
		r, err := c.CancelBatch(cmd.Context(), filter)
		if err != nil {
			return fail(err)
		}
		if err := a.print(r, func(w io.Writer) {
			for _, item := range r.Items {
				fmt.Fprintf(w, "%s %s\n", item.JobID, item.Status)
			}
		}); err != nil {
			return err
		}
		for _, f := range r.Failed {
			fmt.Fprintf(a.err, "cmdexec: %s: %s (%s)\n", f.JobID, f.Problem.Detail, f.Problem.Code)
		}
		switch {
		case len(r.Failed) > 0:
			return &exitError{exitFailure, fmt.Errorf("%d jobs could not be canceled", len(r.Failed))}
		case !r.More:
			if r.Matched == 0 {
				fmt.Fprintln(a.err, "No job that has not ended matches.")
			}
			return nil
		}
	}
}

func (a *app) rerunCommand() *cobra.Command {
	var key string
	cmd := &cobra.Command{
		Use: "rerun JOB", Short: "Run a job again, as a new job, and print the new id", Args: cobra.ExactArgs(1),
		RunE: does(func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			created, err := c.Rerun(cmd.Context(), args[0], client.CreateOptions{IdempotencyKey: key})
			if err != nil {
				return fail(err)
			}
			return a.printID(&created)
		}),
	}
	cmd.Flags().StringVar(&key, "idempotency-key", "", "running it again under the same key gives the same job")
	return cmd
}

func (a *app) eventsCommand() *cobra.Command {
	var labels []string
	var o client.WatchOptions
	cmd := &cobra.Command{
		Use: "events [JOB]", Short: "Show the states of a job, or of all jobs, as they change", Args: cobra.MaximumNArgs(1),
		Long: "Show the states of a job, the present one first, until it has ended; or, without JOB, every change of your jobs until\n" +
			"Ctrl-C. -o json writes one JSON object for each.",
		RunE: does(func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			if o.Labels, err = pairs("--label", labels); err != nil {
				return err
			}
			lines := json.NewEncoder(a.out)
			show := func(e api.StateEvent) {
				if a.format == "json" {
					_ = lines.Encode(e) // a closed pipe ends the program by its signal
					return
				}
				fmt.Fprintf(a.out, "%s  %s  %-9s  attempt %d  %s\n", at(&e.At), e.JobID, e.Status, e.Attempt, e.Reason)
			}
			if len(args) == 1 {
				return fail(c.Events(cmd.Context(), args[0], show))
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			o.Ready = func(p api.StreamPoint) {
				if p.Gap {
					fmt.Fprintln(a.err, "cmdexec: changes before this may be missing: `cmdexec list` shows where the jobs are")
				}
			}
			err = c.Watch(ctx, o, func(e client.Event) { show(e.StateEvent) })
			if ctx.Err() != nil {
				return nil
			}
			return fail(err)
		}),
	}
	cmd.Flags().StringVar(&o.Queue, "queue", "", "only jobs of this queue")
	cmd.Flags().StringArrayVarP(&labels, "label", "l", nil, "NAME=VALUE that the job must have; may be repeated")
	return cmd
}

func (a *app) listCommand() *cobra.Command {
	var statuses, labels []string
	var o client.ListOptions
	cmd := &cobra.Command{
		Use: "list", Short: "List jobs, newest first", Args: cobra.NoArgs,
		RunE: does(func(cmd *cobra.Command, _ []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			for _, s := range statuses {
				if !job.State(s).Valid() {
					return usage("--status: there is no such status")
				}
				o.Status = append(o.Status, job.State(s))
			}
			if o.Labels, err = pairs("--label", labels); err != nil {
				return err
			}
			page, err := c.List(cmd.Context(), o)
			if err != nil {
				return fail(err)
			}
			return a.print(page, func(w io.Writer) { a.showList(w, &page) })
		}),
	}
	cmd.Flags().StringSliceVar(&statuses, "status", nil, "only these statuses")
	cmd.Flags().StringVar(&o.Queue, "queue", "", "only this queue")
	cmd.Flags().StringArrayVarP(&labels, "label", "l", nil, "NAME=VALUE that the job must have; may be repeated")
	cmd.Flags().IntVar(&o.Limit, "limit", 20, "how many")
	return cmd
}

func (a *app) showList(w io.Writer, page *api.JobList) {
	if len(page.Items) == 0 {
		fmt.Fprintln(a.err, "No jobs. Try: cmdexec run -- echo hello")
		return
	}
	lines := [][]string{{"JOB", "STATUS", "AGE", "RAN", "CODE", "COMMAND"}}
	for i := range page.Items {
		j := &page.Items[i]
		code := "-"
		if j.ExitCode != nil {
			code = strconv.Itoa(*j.ExitCode)
		}
		lines = append(lines, []string{j.JobID, string(j.Status), ago(j.CreatedAt), ran(j), code, cut(first(j.Name, commandText(&j.Spec)), 60)})
	}
	rows(w, lines...)
	if page.NextCursor != "" {
		fmt.Fprintln(a.err, "There are more: --limit shows up to 500.")
	}
}

// ran is how long a job's command ran, "-" where none has ended.
func ran(j *api.Job) string {
	if j.DurationMs == 0 {
		return "-"
	}
	return (time.Duration(j.DurationMs) * time.Millisecond).String()
}

func (a *app) explainCommand() *cobra.Command {
	return &cobra.Command{
		Use: "explain JOB", Short: "Say why a job is where it is", Args: cobra.ExactArgs(1),
		RunE: does(func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			ex, err := c.Explain(cmd.Context(), args[0])
			if err != nil {
				return fail(err)
			}
			return a.print(ex, func(w io.Writer) {
				fmt.Fprintln(w, ex.Summary)
				for _, b := range ex.BlockedBy {
					fmt.Fprintf(w, "  %d worker(s): %s\n", b.Workers, b.Reason)
				}
				if c := ex.Cancel; c != nil {
					fmt.Fprintln(w, "  cancel: "+cancelText(c))
				}
			})
		}),
	}
}

func (a *app) workersCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "workers", Short: "List workers with their load", Args: cobra.NoArgs,
		RunE: does(func(cmd *cobra.Command, _ []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			list, err := c.Workers(cmd.Context())
			if err != nil {
				return fail(err)
			}
			return a.print(list, func(w io.Writer) {
				if len(list.Items) == 0 {
					fmt.Fprintln(a.err, "No workers are connected.")
					return
				}
				lines := [][]string{{"WORKER", "STATUS", "SLOTS", "RUNNING", "CPU", "RAM", "EXECUTORS", "SEEN", "HOST"}}
				for i := range list.Items {
					v := &list.Items[i]
					lines = append(lines, []string{
						v.WorkerID, string(v.Status), fmt.Sprintf("%d/%d", v.FreeSlots, v.Slots), strconv.Itoa(v.Running),
						fmt.Sprintf("%.0f%%", v.CPUUsage), fmt.Sprintf("%.0f MiB", v.RAMUsage), strings.Join(v.Executors, ","),
						ago(v.LastSeenAt), fmt.Sprintf("%s (%s/%s)", orDash(v.Hostname), v.OS, v.Arch),
					})
				}
				rows(w, lines...)
			})
		}),
	}
	cmd.AddCommand(a.drainCommand())
	return cmd
}

func (a *app) drainCommand() *cobra.Command {
	var undo bool
	cmd := &cobra.Command{
		Use: "drain WORKER", Short: "Take a worker out of service: it ends what it runs and gets no more (admins only)", Args: cobra.ExactArgs(1),
		RunE: does(func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			return fail(c.Drain(cmd.Context(), args[0], !undo))
		}),
	}
	cmd.Flags().BoolVar(&undo, "undo", false, "put it back into service")
	return cmd
}
