// Package collector turns workers' results into states, and keeps output. Any
// number of collectors may run.
//
// Answers: `settle`, by which edges hand over results. A result is proposed to the
// registry, the output in it is stored, and then the edge has its answer: nothing of
// it goes through RESULTS. Where no answer comes the edge publishes there.
//
// Consumes: RESULTS twice, by the durable consumers `state` and `archive`, and
// LOGS by `logs`. `state` proposes each result to the registry and acknowledges:
// a compare-and-swap, nothing else, since every job waits for it; the database
// is not on this path. `archive` stores the output that rides inside results,
// `logs` all other output, both in batches, acknowledged when durable.
//
// Output that a result holds as a whole is compared with the result's manifest
// (chunks, bytes, hash) before it is stored. Of other attempts the manifest is noted
// in the same write as the chunks, and `check` compares what is stored with it some
// ten seconds later, and again when more arrives. The verdict is in the database.
//
// Publishes: the registry transition `result`; dead letters for what cannot be
// decoded; purges of RESULTS and LOGS, each second, up to what all consumers
// have acknowledged.
//
// Owns: output in the database. (Its retention goes with the job's, by the persister.)
//
// On restart: the consumers go on where they were, and `check` with what has no verdict.
//
// On duplicate delivery: the state table refuses a result that was reported, or
// whose lease is not current (ErrTerminal, ErrStale); a job that is not in the
// registry has ended. Each is counted and acknowledged. Output is stored once
// for each job, attempt and seq; a manifest and its verdict once for each attempt.
//
// When the database is away: output waits in its streams, states go on. When the
// bus is away: everything waits.
//
// Metrics: cmdexec_collector_results_total{result}, _result_seconds (from the
// edge's receipt to the registry's answer), _chunks_total{from},
// _chunk_bytes_total{from}, _poison_total{from},
// _store_failures_total{from}, _log_checks_total{verdict}, _trim_failures_total.
package collector
