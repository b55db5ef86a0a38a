// Command worker runs jobs on this machine for a Command Executor server.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"

	"github.com/cmdexec/cmdexec/libs/kit/config"
	"github.com/cmdexec/cmdexec/libs/kit/failpoint"
	"github.com/cmdexec/cmdexec/libs/kit/host"
	"github.com/cmdexec/cmdexec/libs/kit/httpkit"
	"github.com/cmdexec/cmdexec/libs/kit/lifecycle"
	"github.com/cmdexec/cmdexec/libs/kit/logging"
	"github.com/cmdexec/cmdexec/libs/kit/memory"
	"github.com/cmdexec/cmdexec/libs/kit/telemetry"
	"github.com/cmdexec/cmdexec/services/worker"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "worker:", err)
		os.Exit(1)
	}
}

const intro = "worker takes its settings from the environment, and --transport, which goes before TRANSPORT:"

// words takes the flags off the arguments.
func words(args []string) (transport string, rest []string, err error) {
	flags := flag.NewFlagSet("worker", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.StringVar(&transport, "transport", "", "")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return "", []string{"help"}, nil
	} else if err != nil {
		return "", nil, fmt.Errorf("%w; `help` prints the settings", err)
	}
	return transport, flags.Args(), nil
}

func run() error {
	transport, args, err := words(os.Args[1:])
	if err != nil {
		return err
	}
	done, err := host.Word(args, os.Stdout, intro, worker.Config{}, func() (string, error) {
		cfg, err := config.Load[worker.Config]()
		return cfg.AdminAddr, err
	})
	if done || err != nil {
		return err
	}
	if err := failpoint.Check(); err != nil {
		return err
	}
	ctx, stop := lifecycle.SignalContext(context.Background(), os.Exit)
	defer stop()
	cfg, err := config.Load[worker.Config]()
	if err != nil {
		return err
	}
	config.UseCores(int(cfg.Cores))
	cfg.Transport = cmp.Or(transport, cfg.Transport)
	logger, err := logging.New(os.Stderr, cfg.LogLevel, cfg.LogFormat)
	if err != nil {
		return err
	}
	metrics := telemetry.NewRegistry()
	service, err := worker.New(ctx, cfg, worker.Deps{Logger: logger, Metrics: metrics})
	if err != nil {
		return err
	}
	d := service.Describe()
	logger.Info("worker starts", "worker", d.WorkerID, "executors", d.Executors, "slots", d.Slots, "server", cfg.ServerURL)
	group := lifecycle.Group{StopEach: worker.StopTimeout, StopAll: worker.StopTimeout + lifecycle.DefaultStopEach}
	if cfg.AdminAddr != "off" {
		ln, err := httpkit.Listen(cfg.AdminAddr)
		if err != nil {
			return fmt.Errorf("ADMIN_ADDR: %w", err)
		}
		admin, err := httpkit.NewServer(ln, httpkit.Admin(service.Ready, metrics), logger, httpkit.ServerOptions{})
		if err != nil {
			return err
		}
		group.Add("admin", admin.Run)
	}
	group.Add("memory", memory.ReturnWhenQuiet)
	group.Add("worker", service.Run)
	return group.Run(ctx)
}
