// Package edge is the worker edge: workers connect to it, and it passes between
// them and the bus. It holds sessions and nothing else.
//
// Consumes: commands for the workers connected here (core request/reply, one
// subject per worker); the workers bucket, by watch, to notice a worker that
// came to another edge.
//
// Publishes: results to RESULTS, output to LOGS, beats to the leading scheduler
// (one request at a time for all workers), registrations into the workers
// bucket.
//
// Owns: nothing durable. A session's lease table and what is in flight die with
// the session; the worker has it all until it is acknowledged.
//
// Serves: GET /api/workers/connect (WebSocket, subprotocol cmdexec.v1). For
// workers over plain HTTP: POST /api/workers/register and heartbeat, GET
// /api/jobs/get-job (long poll) and check-cancel, POST /api/jobs/stream-output
// and submit-result.
//
// Promises: output and results are acknowledged when the bus has them, a
// heartbeat when the leading scheduler has answered it, a welcome when it has
// answered the hello. An assignment is delivered once it is in the queue of a
// socket that will be written or closed; refused, or with nobody listening, the
// worker never sees it. Over plain HTTP it is taken only while the worker polls,
// handed over until the worker lists it, and rejected if it is not fetched. Of
// two sessions of one worker the newest stays, whatever their transports.
//
// On restart: workers connect again and send again what was not acknowledged.
//
// On duplicate delivery: a repeated chunk is acknowledged, not stored again
// within a session; a repeated result is stored again, since its consumers are
// idempotent. Workers tolerate repeated frames.
//
// When the bus is away: nothing is acknowledged, publishes are tried again for
// as long as the session lives, workers spool. When nobody leads: heartbeats are
// not answered and the workers' own clocks run. When the registry was lost and
// made anew: workers are asked to come again, since registrations went with it.
//
// Metrics: cmdexec_edge_sessions, _sessions_closed_total{code},
// _connections_refused_total{code}, _frames_total{type}, _requests_total{route},
// _requests_refused_total{code}, _repeated_assignments_total, _beats_total{outcome},
// _assignments_total{outcome}, _output_bytes_total, _results_total,
// _stale_total, _publish_errors_total{kind}, _inflight_bytes.
package edge
