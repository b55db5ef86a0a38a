// Package bus is the adapter for NATS: the registry of live jobs, the streams of
// results and output, the buckets of workers and control, and the requests
// between services. It speaks core's words and hides the client library.
//
// # What callers may rely on
//
// A Conn keeps trying to connect and reconnects for ever. Everything that blocks
// takes a context. All types are safe for concurrent use.
//
// A write returns nil when the bus has it on disk, ErrUnavailable when it surely
// was not written, and ErrAmbiguous when it may have been. Registry.Transition
// resolves ambiguity itself, by reading what is there; other callers repeat the
// write, since every consumer is idempotent.
//
// Names of subjects, streams, buckets and consumers are in names.go and nowhere
// else; Apply creates them, Bind checks them.
package bus
