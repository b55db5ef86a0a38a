// Package lead is one term of a leading scheduler: the queue, the leases and
// the workers in memory, rebuilt from the registry, and everything that moves
// jobs forward.
//
// One goroutine, the loop, owns all state; the rest post functions to its
// mailbox. The loop does no I/O: registry writes and commands run on at most
// maxInFlight goroutines and post what came of them. Timers are entries of one
// heap; each is checked against the job as it is when it fires, so that none
// ever has to be taken out.
//
// # Which leases end
//
// A lease is renewed when a heartbeat or a hello of its worker lists it, and runs
// out LeaseTTL plus the job's stop grace after the last renewal, by the loop's own
// clock. A lease that its worker does not list ends early in two cases only,
// both of which need that nothing can be on its way to the worker any more:
//
//   - its worker said hello in a session newer than the one that the assignment
//     was delivered to;
//   - the session is not known here (an earlier leader delivered it, or the
//     command was not answered), and either the worker's session began more than
//     helloMargin after the assignment, or its heartbeats do not list it (see
//     unlistedAfter).
//
// An assignment is never sent later than sendWithin after it was decided, which
// is what the margins rest on. A lease that was delivered to the very session
// that does not list it is left to its clock.
package lead
