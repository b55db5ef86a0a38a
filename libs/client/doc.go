// Package client is the Go SDK of the public API. It needs the standard library
// and the types of libs/core only.
//
//	c, err := client.New("http://127.0.0.1:3000", token, client.Options{})
//	created, err := c.Create(ctx, job.Spec{Command: job.Command{Shell: "echo hello"}}, client.CreateOptions{})
//	ended, err := c.Follow(ctx, created.Job.JobID, client.Position{}, func(i client.Item) { os.Stdout.Write(i.Bytes()) })
//
// Every answer of the server that is not a success is an *Error with the
// server's problem document.
//
// Calls that may be repeated without harm are tried again, a few times and with
// growing pauses, when the server cannot be reached or says that it is away or
// busy. A create or an execute is repeated only under an idempotency key: without
// one, a repeat could make a second job.
//
// A Client is safe for concurrent use and starts no goroutine of its own.
package client
