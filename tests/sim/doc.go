// Package sim runs the product without a network, hundreds of times, in
// time that testing/synctest fakes: the real services by their real
// constructors (two schedulers, edge, gateway, collector, persister), over the
// real libs/bus, over package natsim, which is a NATS server in memory. Only
// the ends are played: clients call the gateway's handler, workers the edge's,
// and the database is a map. So every compare-and-swap, watch, redelivery, lease
// and purge of a run is the product's own code, and not a copy of its logic.
//
// A seed decides what is submitted and canceled when, how long every
// message is on its way, what workers do (report late, twice, never, under
// a lease that they lost, or forge), and which processes and connections are
// killed, cut, stalled or stopped when, NATS included; purged keys may come
// back after its restart (ghosts). Then everything heals, and the seed fails when a
// promise of docs/reliability.md does not hold. The promises are judged from what
// nobody in the run can fake: every write to the registry, every start and stop of
// a command, every answer to a client, the database.
//
// Which goroutine of a process is first in one moment is the Go scheduler's, and
// ids are random. So a seed that fails fails again most times, not always: it is
// run alone by
//
//	go test -race ./tests/sim -args -seed 17
//
// It is a package of the module tests, since only that may import services, and
// their root packages at that: what they decide is reached through what they export.
package sim
