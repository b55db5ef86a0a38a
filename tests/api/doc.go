// Package api runs the examples of docs/api.md against a real server.
package api
