// Package scheduler decides which job runs where, and when a worker has lost one.
// Any number of schedulers may run; one leads and does the work.
//
// Consumes: the registry (follows it from its first record, and sweeps it every
// 30 s since a follower can go silent); the workers bucket, by watch; beats from
// edges (core request/reply): hellos, heartbeats and progress of workers.
//
// Publishes: registry transitions (assign, return, prepare, start, lost, give
// up, requeue, deadlines), each a compare-and-swap; commands to the edge that
// holds a worker's session: assign, cancel, drain.
//
// Answers, while it leads and its memory is rebuilt: explain, workers, counts per
// owner. A scheduler that does not lead answers nothing.
//
// Owns: nothing durable. Queue, leases and load are memory, rebuilt from the
// registry in each term. Leases are renewed here and nowhere else; a new leader
// counts each as renewed when it takes over.
//
// Order: priority, then turns between owners, then turns between an owner's
// queues, then creation. A job that no worker can take is passed over. A user of
// whose jobs MAX_RUNNING_PER_USER are with workers has no turn.
//
// On restart: the next leader takes over within about ten seconds, at once after
// a clean stop. Running jobs notice nothing.
//
// On duplicate delivery: records are taken in by revision, beats may be repeated,
// and every transition is refused by the registry when it does not apply.
//
// Two leaders at once: each write is a compare-and-swap, so one job gets one
// lease; the loser learns of it by the refusal.
//
// When the bus is away: nothing moves; afterwards every lease counts as renewed.
// When the NATS server was restarted, memory is rebuilt, and until the ghost
// guard is done only jobs created since are dispatched.
//
// Metrics: cmdexec_scheduler_decisions_total, _assignments_delivered_total,
// _assignments_returned_total{outcome}, _leases_lost_total{cause},
// _deadlines_total{which}, _stale_leases_total, _missed_changes_total,
// _write_failures_total, _queued_jobs, _live_jobs, _leases, _workers,
// _requests_in_flight, _loop_lag_seconds, _leading.
package scheduler
