// Package job is the domain: what a user may ask for (Spec), what the registry
// keeps about it (Record), and the one table that says how a job moves from
// state to state (Apply). It is pure: values and the current time go in,
// values come out. It does no I/O and imports only the standard library.
//
// Nobody outside this package assigns a State. A service that wants a job to
// change builds an Event and hands it to the registry of libs/bus, which calls
// Apply inside a compare-and-swap.
package job
