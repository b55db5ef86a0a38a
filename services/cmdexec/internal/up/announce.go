package up

import (
	"context"
	"fmt"
	"io"
	"os/user"
	"slices"
	"strings"
	"time"

	"github.com/cmdexec/cmdexec/libs/client"
	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
	"github.com/cmdexec/cmdexec/libs/kit/lifecycle"
	cliContext "github.com/cmdexec/cmdexec/services/cmdexec/internal/context"
)

const (
	tokenLife  = 24 * time.Hour
	renewAfter = 12 * time.Hour
	readyWait  = 60 * time.Second
)

// announcer tells the person at the terminal what there is and what to do
// next, keeps the context file of the CLI fresh, and runs the sample job.
type announcer struct {
	*stack
	out io.Writer
}

func (a *announcer) run(ctx context.Context) error {
	token, err := a.saveContext()
	if err != nil {
		return err
	}
	if err := a.await(ctx); err != nil {
		return err
	}
	a.welcome()
	if a.cfg.Sample {
		a.sample(ctx, token)
	}
	for lifecycle.Sleep(ctx, renewAfter) == nil {
		if _, err := a.saveContext(); err != nil {
			a.log.Error("the token of the CLI was not renewed", "error", err)
		}
	}
	return nil
}

// LocalUser is the owner of what the person at this machine submits.
func LocalUser() string {
	if u, err := user.Current(); err == nil && u.Username != "" {
		return u.Username
	}
	return "local"
}

func (a *announcer) saveContext() (string, error) {
	token, err := auth.MintUser([]byte(a.keys.JWT), LocalUser(), auth.RoleAdmin, tokenLife, time.Now())
	if err != nil {
		return "", err
	}
	return token, cliContext.Save(cliContext.Context{Server: a.url(), Token: token, DataDir: a.dir})
}

// await waits until everything is ready, so that what is printed is true.
func (a *announcer) await(ctx context.Context) error {
	deadline := time.Now().Add(readyWait)
	for {
		err := a.ready()
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("not ready after %v: %w", readyWait, err)
		}
		if lifecycle.Sleep(ctx, readyPoll) != nil {
			return nil
		}
	}
}

func (a *announcer) say(format string, args ...any) { fmt.Fprintf(a.out, format+"\n", args...) }

func (a *announcer) welcome() {
	a.say("Command Executor %s listens on %s", api.Version, a.url())
	a.say("  data    %s (everything is kept there; acknowledged jobs survive a power cut)", a.dir)
	if a.worker == nil {
		a.say("  worker  none here, since --executor is none; connect one: see `cmdexec token worker --help`")
	} else {
		d := a.worker.Describe()
		a.say("  worker  %s runs %s jobs, %d at once, with %g cores and %.1f GiB in all", d.WorkerID,
			strings.Join(d.Executors, " and "), d.Slots, d.CPUCores, float64(d.TotalMemory)/(1<<30))
		if slices.Contains(d.Executors, job.ExecutorProcess) {
			a.say("          Process jobs run as this user (%s) on this machine, not in containers:", LocalUser())
			a.say("          `up` turns that on for its own worker; --executor docker or none turns it off.")
		}
		if !slices.Contains(d.Executors, job.ExecutorDocker) && a.cfg.Executor == "auto" {
			a.say("          Containers are not run: no Docker engine answers here.")
		}
	}
	a.say("")
	a.say("Try, in another terminal:")
	a.say("  %s run -- echo hello", self())
	a.say("  %s list", self())
	a.say(`  curl -s %s/api/execute -H "Authorization: Bearer $(%s token user)" \`, a.url(), self())
	a.say(`    -H 'Content-Type: application/json' -d '{"command": "echo hello from $(hostname)"}'`)
	a.say("")
}

// sample runs one job the way any user does: over HTTP, and from there over
// the worker's WebSocket.
func (a *announcer) sample(ctx context.Context, token string) {
	if a.worker == nil {
		a.say("No sample job, since there is no local worker.")
		return
	}
	if err := a.runSample(ctx, token); err != nil && ctx.Err() == nil {
		a.say("The sample job did not work: %v", err)
	}
}

func (a *announcer) runSample(ctx context.Context, token string) error {
	c, err := client.New(a.url(), token, client.Options{})
	if err != nil {
		return err
	}
	defer c.Close()
	began := time.Now()
	created, err := c.Create(ctx, job.Spec{
		Name:    "sample",
		Command: job.Command{Shell: `echo "Hello from job $CMDEXEC_JOB_ID on $(uname -sm)"`},
	}, client.CreateOptions{})
	if err != nil {
		return err
	}
	a.say("A sample job, %s:", created.Job.JobID)
	done, err := c.Follow(ctx, created.Job.JobID, client.Position{}, func(i client.Item) { a.say("  | %s", strings.TrimRight(string(i.Bytes()), "\n")) })
	if err != nil {
		return err
	}
	a.say("  %s after %v, all in all", done.Status, time.Since(began).Round(time.Millisecond))
	a.say("")
	a.say("Ctrl-C stops everything.")
	return nil
}

func (a *announcer) goodbye() {
	a.say("Stopped. Everything is in %s; `cmdexec up` goes on from there.", a.dir)
}
