package cli

import (
	"errors"

	"github.com/spf13/cobra"

	"github.com/cmdexec/cmdexec/libs/kit/config"
	"github.com/cmdexec/cmdexec/libs/kit/lifecycle"
	"github.com/cmdexec/cmdexec/services/cmdexec/internal/up"
)

func (a *app) upCommand() *cobra.Command {
	cfg, envErr := config.Load[up.Config]()
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Run everything on this machine, in one process",
		Long: "Run everything on this machine, in one process: the API, an embedded NATS JetStream server, SQLite and one\n" +
			"local worker. Nothing has to be installed. Ctrl-C stops it; what was accepted goes on at the next start.\n\n" +
			"Each flag is also an environment variable (in brackets). Further variables: JWT_SECRET, WORKER_TOKEN_SECRET,\n" +
			"CPU_LIMIT, RAM_LIMIT, WARM_CONTAINERS, WARM_MEMORY, WARM_SECONDS, ADMIN_ADDR, LEASE_SECONDS, HEARTBEAT_SECONDS, LOG_LEVEL, LOG_FORMAT; and the limits, which are\n" +
			"off unless set: RATE_LIMIT_USER, RATE_LIMIT_IP, RATE_LIMIT_WORKER, REDIS_URL, MAX_QUEUED_PER_USER,\n" +
			"MAX_RUNNING_PER_USER, MAX_STREAMS_PER_USER, MAX_CONNECTIONS.",
		Args: cobra.NoArgs,
		RunE: does(func(cmd *cobra.Command, _ []string) error {
			if envErr != nil {
				return usage("%w", envErr)
			}
			ctx, stop := lifecycle.SignalContext(cmd.Context(), a.hardExit)
			defer stop()
			if err := up.Run(ctx, cfg, a.out, a.err); err != nil && !errors.Is(err, ctx.Err()) {
				return err
			}
			return nil
		}),
	}
	flags := cmd.Flags()
	flags.StringVar(&cfg.Listen, "listen", cfg.Listen, "address to listen on (LISTEN_ADDR)")
	flags.StringVar(&cfg.DataDir, "data-dir", cfg.DataDir, "folder of everything that is kept (DATA_DIR); default ~/.local/share/cmdexec")
	flags.StringVar(&cfg.Executor, "executor", cfg.Executor, "what the local worker runs: auto, process, docker or none (EXECUTOR)")
	flags.IntVar(&cfg.Slots, "slots", cfg.Slots, "most jobs at once on the local worker (SLOTS); default 4 for each core")
	flags.BoolVar(&cfg.Sample, "sample", cfg.Sample, "run one job at the start and show its output (SAMPLE)")
	return cmd
}
