// Package session is what the edge knows and does for one connected worker,
// apart from how the worker is connected: registering it, its beats, the
// commands for it, its output and its results. A transport feeds a Session with
// decoded messages and implements Peer for what goes back.
//
// # A session's life
//
// Hub.Open checks the hello and makes the Session; a goroutine of its own then
// puts the registration into the workers bucket, makes sure that no older
// session still takes the worker's commands, subscribes to them, and says hello
// to the leading scheduler. Each step is repeated for as long as the session
// lives, so a worker that comes before the scheduler does just waits. The
// welcome goes out only when the leader has answered the hello; frames for the
// worker queue behind it.
//
// When a session closes it first stops taking commands, so that "nobody
// listens" is a definitive answer for the scheduler, then reports the end in a
// beat, then marks the worker offline unless a newer session has registered.
//
// # Whose lease
//
// Output is published only under leases that this session was assigned, or that
// its hello listed and the leader has since confirmed. Until then it waits and
// is not acknowledged. Output and progress under any other lease are answered
// stale.
package session
