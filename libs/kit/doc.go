// Package kit holds what every service needs and no domain knows: configuration (config), start and stop (lifecycle),
// logs (logging), tokens (auth), HTTP (httpkit), rate limits (ratelimit), metrics (telemetry), memory that a quiet
// process gives back (memory), and the moments at which tests kill a program (failpoint).
//
// Nothing here imports another module of the project. Each subpackage stands alone, except that config.Rate is the
// rate that ratelimit enforces, that memory waits by lifecycle, and that host puts them together.
package kit
