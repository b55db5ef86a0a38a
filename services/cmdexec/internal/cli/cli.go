// Package cli is the command line. Data goes to stdout, everything meant for a
// person's eyes only goes to stderr, and the exit code says what happened.
package cli

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/joho/godotenv"
	"github.com/spf13/cobra"

	"github.com/cmdexec/cmdexec/libs/client"
	"github.com/cmdexec/cmdexec/libs/kit/config"
	"github.com/cmdexec/cmdexec/services/cmdexec/internal/context"
)

// Exit codes beside the job's own.
const (
	exitFailure   = 1
	exitUsage     = 2
	exitTimedOut  = 124
	exitCannotRun = 125 // could not run, or no server
	exitCanceled  = 130
)

// exitError ends the program with a code. An empty text prints nothing.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return ""
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// app is what the commands share.
type app struct {
	out, err io.Writer
	hardExit func(int)

	server string // --server
	token  string // --token
	format string // -o
}

// environment is what the CLI takes from outside its flags.
type environment struct {
	Server string        `envconfig:"CMDEXEC_SERVER"`
	Token  config.Secret `envconfig:"CMDEXEC_TOKEN"`
}

// Main runs the command line and returns the exit code.
func Main(args []string, hardExit func(code int)) int {
	a := &app{out: os.Stdout, err: os.Stderr, hardExit: hardExit}
	if err := godotenv.Load(); err != nil && !errors.Is(err, fs.ErrNotExist) {
		fmt.Fprintln(a.err, "cmdexec: .env in this folder cannot be read:", err)
		return exitUsage
	}
	root := a.root()
	root.SetArgs(args)
	err := root.Execute()
	if err == nil {
		return 0
	}
	var exit *exitError
	if !errors.As(err, &exit) { // cobra's own: unknown command, flag or argument
		fmt.Fprintf(a.err, "cmdexec: %v\nTry `cmdexec --help`.\n", err)
		return exitUsage
	}
	if text := exit.Error(); text != "" {
		fmt.Fprintln(a.err, "cmdexec:", text)
	}
	return exit.code
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "cmdexec",
		Short: "Run commands on machines that you have",
		Long: "Run commands on machines that you have.\n\n" +
			"`cmdexec up` starts everything on this machine; the other commands then find it by themselves.\n" +
			"Another server: --server and --token, or CMDEXEC_SERVER and CMDEXEC_TOKEN.",
		SilenceErrors: true, SilenceUsage: true,
	}
	root.CompletionOptions.HiddenDefaultCmd = true
	flags := root.PersistentFlags()
	flags.StringVar(&a.server, "server", "", "address of the server (CMDEXEC_SERVER)")
	flags.StringVar(&a.token, "token", "", "token of the user (CMDEXEC_TOKEN)")
	flags.StringVarP(&a.format, "output", "o", "table", "table, json or yaml")
	root.AddCommand(
		a.upCommand(), a.runCommand(), a.submitCommand(), a.statusCommand(), a.logsCommand(), a.cancelCommand(), a.rerunCommand(), a.eventsCommand(),
		a.listCommand(), a.explainCommand(), a.workersCommand(), a.tokenCommand(), a.busCommand(), a.versionCommand(),
	)
	return root
}

// does wraps what a command does: its errors end with a code of ours, so that
// only cobra's own count as wrong usage.
func does(f func(cmd *cobra.Command, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		err := f(cmd, args)
		var exit *exitError
		if err == nil || errors.As(err, &exit) {
			return err
		}
		return &exitError{exitFailure, err}
	}
}

func usage(format string, args ...any) error {
	return &exitError{exitUsage, fmt.Errorf(format, args...)}
}

// client connects to the server that the flags, the environment or the context
// file name, in this order.
func (a *app) client() (*client.Client, error) {
	env, err := config.Load[environment]()
	if err != nil {
		return nil, usage("%w", err)
	}
	local, err := context.Load()
	if err != nil {
		return nil, err
	}
	server := first(a.server, env.Server, local.Server)
	if server == "" {
		return nil, &exitError{exitCannotRun, errors.New("no server: start one with `cmdexec up`, or name one with --server")}
	}
	token := first(a.token, env.Token.Reveal())
	if token == "" && server == local.Server {
		token = local.Token
	}
	c, err := client.New(server, token, client.Options{
		UserAgent: "cmdexec",
		Token: func() string {
			// `up` renews the token of its context file while it runs.
			if fresh, err := context.Load(); err == nil && token == local.Token && fresh.Server == server {
				return fresh.Token
			}
			return token
		},
	})
	if err != nil {
		return nil, usage("--server: %w", err)
	}
	return c, nil
}

func first(values ...string) string {
	for _, v := range values {
		if v != "" {
			return v
		}
	}
	return ""
}

// fail explains an error of the client.
func fail(err error) error {
	var exit *exitError
	if err == nil || errors.As(err, &exit) {
		return err
	}
	var answer *client.Error
	if !errors.As(err, &answer) {
		return &exitError{exitCannotRun, fmt.Errorf("%w: is the server running? `cmdexec up` starts one here", err)}
	}
	code := exitFailure
	switch answer.Problem.Status {
	case 400, 413, 415, 422:
		code = exitUsage
	case 401, 429, 500, 502, 503, 504:
		code = exitCannotRun
	}
	if answer.Problem.Hint != "" {
		err = fmt.Errorf("%w\n%s", err, answer.Problem.Hint)
	}
	return &exitError{code, err}
}
