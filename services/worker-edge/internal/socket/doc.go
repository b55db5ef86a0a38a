// Package socket connects workers over WebSockets: it checks tokens and limits
// before the upgrade, turns frames into the calls of a session, and writes what
// the session sends from a bounded queue.
//
// A connection has two goroutines, a reader and a writer, and keeps no large
// buffers while it is idle: message buffers come from a pool, and the buffers of
// the HTTP server are swapped for small ones at the upgrade.
package socket
