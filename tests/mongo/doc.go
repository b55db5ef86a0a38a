// Package mongo holds the MongoDB store to the conformance suite: against
// FerretDB, which speaks the wire protocol and is started in the test's own
// process, and against a real server where MONGODB_URI names one. It is a module
// of its own, because FerretDB brings many dependencies that nothing else needs.
package mongo
