// Package persister follows the registry into the database, answers what the
// database knows, and takes ended jobs out of the registry. Any number of
// persisters may run.
//
// Consumes: the registry's stream by the durable consumer `database`, in
// batches. Each batch becomes one bulk upsert of the newest version of each job,
// guarded by the record's version, and is acknowledged after it is durable.
//
// Answers: QueryJob, QueryJobs, QueryStats, QueryLogs, as one of all persisters.
// asOf is the time up to which the database has seen the registry.
//
// Publishes: purges of the registry, each bounded by a sequence. An ended job
// leaves it when it is durably stored and its grace is over (5 s; 10 min with an
// idempotency key): few of them one by one; many by the group that shares the
// beginning of their ids, in one purge up to just below the first key of the
// group that must stay, as found by a scan right before. Dead letters for
// records that cannot be decoded or stored.
//
// Owns: the jobs of the database (their output is the collector's), their
// retention (JOB_RETENTION_DAYS), and the mark that this life of the NATS server
// was swept. What waits for its purge is memory, rebuilt by a sweep of the
// registry at start, every five minutes and after failures, which also stores
// ended jobs that the database lacks.
//
// On restart: the consumer goes on where it was; what was stored and not
// acknowledged is stored again, which changes nothing.
//
// On a restart of the NATS server: jobs that a crash brought back (live in the
// registry, ended in the database) are purged, then schedulers are told by
// SetSwept that old jobs are safe to dispatch. When the registry is another one
// (its generation differs), jobs that are live only in the database end as
// failed, registry_reset, before anything else is stored.
//
// On duplicate delivery: the version guard makes it a stale write.
//
// When the database is away: batches are tried again until they succeed, the
// registry keeps everything, and queries fail as unavailable.
//
// Metrics: cmdexec_persister_records_total{result}, _batch_seconds,
// _purged_jobs_total{how}, _ghosts_total, _waiting_jobs, _repaired_jobs_total,
// _reset_jobs_total, _expired_jobs_total, _upkeep_failures_total{what}.
package persister
