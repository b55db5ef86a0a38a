// Package e2e runs the product as its users do: `cmdexec up` and workers as
// separate processes, spoken to over HTTP and by the CLI. The scenarios know
// nothing of how the services are laid out; the harness starts them.
package e2e
