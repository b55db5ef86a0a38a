package cli

import (
	"fmt"
	"io"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
	"github.com/cmdexec/cmdexec/libs/kit/config"
	"github.com/cmdexec/cmdexec/libs/kit/logging"
	"github.com/cmdexec/cmdexec/services/cmdexec/internal/up"
)

func (a *app) tokenCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "token", Short: "Make tokens for users and workers",
		Long: "Make tokens, signed with JWT_SECRET or WORKER_TOKEN_SECRET where they are set, else with the secrets of the\n" +
			"local instance in its data folder. Whoever holds these secrets can be any user and any worker.",
	}
	var ttl time.Duration
	var dir string
	cmd.PersistentFlags().DurationVar(&ttl, "ttl", 24*time.Hour, "how long the token is good, at most 24h")
	cmd.PersistentFlags().StringVar(&dir, "data-dir", "", "data folder of the local instance (DATA_DIR); default that of the last cmdexec up")

	var name, role string
	user := &cobra.Command{
		Use: "user", Short: "Print a user's token", Args: cobra.NoArgs,
		RunE: does(func(*cobra.Command, []string) error {
			keys, err := up.Secrets(dir)
			if err != nil {
				return err
			}
			token, err := auth.MintUser([]byte(keys.JWT), name, auth.Role(role), ttl, time.Now())
			if err != nil {
				return usage("%w", err)
			}
			fmt.Fprintln(a.out, token)
			return nil
		}),
	}
	user.Flags().StringVar(&name, "name", up.LocalUser(), "name of the user")
	user.Flags().StringVar(&role, "role", "user", "user or admin")

	var workerID string
	worker := &cobra.Command{
		Use: "worker", Short: "Print a worker's token", Args: cobra.NoArgs,
		RunE: does(func(*cobra.Command, []string) error {
			if workerID == "" {
				workerID = id.New(id.Worker, time.Now())
			}
			if err := id.CheckWorker(workerID); err != nil {
				return usage("--id: %w", err)
			}
			keys, err := up.Secrets(dir)
			if err != nil {
				return err
			}
			token, err := auth.MintWorker([]byte(keys.Worker), workerID, ttl, time.Now())
			if err != nil {
				return usage("%w", err)
			}
			fmt.Fprintln(a.out, token)
			return nil
		}),
	}
	worker.Flags().StringVar(&workerID, "id", "", "id of the worker; default a new one")
	cmd.AddCommand(user, worker)
	return cmd
}

func (a *app) busCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "bus", Short: "Set up the NATS server of separate services"}
	cmd.AddCommand(&cobra.Command{
		Use: "apply", Short: "Create the streams, buckets and consumers, and check every setting", Args: cobra.NoArgs,
		Long: "Create the streams, buckets and consumers of NATS_URL, and check every setting. Running it again changes nothing.\n" +
			"With DURABILITY=replicated each is kept by three servers.",
		RunE: does(func(cmd *cobra.Command, _ []string) error {
			cfg, err := config.Load[bus.Settings]()
			if err != nil {
				return usage("%w", err)
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			logger, err := logging.New(a.err, "warn", "auto")
			if err != nil {
				return err
			}
			conn, err := bus.Dial(ctx, cfg, "cmdexec-bus-apply", logger)
			if err != nil {
				return &exitError{exitCannotRun, err}
			}
			defer conn.Close()
			var sizes bus.Sizes
			if bus.Durability(cfg.Durability) == bus.DurabilityReplicated {
				sizes.Replicas = bus.Replicas
			}
			if err := bus.Apply(ctx, conn, sizes); err != nil {
				return err
			}
			fmt.Fprintln(a.err, "The streams, buckets and consumers are as they should be.")
			return nil
		}),
	})
	return cmd
}

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version", Args: cobra.NoArgs,
		RunE: does(func(*cobra.Command, []string) error {
			v := struct {
				Version string `json:"version"`
				Commit  string `json:"commit"`
			}{api.Version, api.Commit}
			return a.print(v, func(w io.Writer) { fmt.Fprintf(w, "cmdexec %s (%s)\n", v.Version, v.Commit) })
		}),
	}
}
