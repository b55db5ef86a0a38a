// Package poll connects workers over plain HTTP: a session whose frames wait for
// the worker's next request. It checks tokens, limits and bodies, feeds what
// comes into a session, and answers when the bus or the leading scheduler has.
//
// # Assignments
//
// A worker takes work only while it asks for it: its free slots are passed on to
// the scheduler, and assignments taken, while a poll is open or was until a
// moment ago. What it then does not fetch is rejected in its name. A handed-over
// assignment that its next heartbeat does not list is handed over again, since
// the answer may have been lost; a worker ignores repeats by their lease. What
// is left of the lease shrinks meanwhile, so that the worker's clock for it,
// which starts with its poll, never runs out after the scheduler's.
//
// # Whose session
//
// A request belongs to the session that its header names, or to the newest of
// its worker. Where that is another edge's the answer says so, and the worker
// tries again; where there is none it says that the worker must register, which
// loses nothing.
package poll
