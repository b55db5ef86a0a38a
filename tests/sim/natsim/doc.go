// Package natsim is a NATS server in memory that exists for one test: it speaks
// the client protocol and the part of JetStream that libs/bus uses, over
// connections that are function calls, and does everything on one goroutine by a
// clock that testing/synctest may fake.
//
// Each connection has two links, to the server and back. What is sent over a link
// arrives in order, after a delay that Options decides; nothing else is delayed. So
// a test can stretch, stall, cut and kill any connection between any two steps, and
// restart the server.
//
// It is stricter than nats-server where that finds more (a message that was
// acknowledged may be delivered once more), and knows nothing of accounts,
// clusters, atomic batches, limits, mirrors and push consumers.
package natsim
