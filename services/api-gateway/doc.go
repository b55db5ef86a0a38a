// Package gateway is the service that users talk to: the public REST API with
// its server-sent events, and the OpenAPI document that describes it.
//
//	Consumes   HTTP requests of users. The registry (one shared follower, only
//	           while somebody waits). The LOGS stream (one ordered consumer per
//	           live log follower).
//	Asks       The persister (one job, lists, stored output) and the leading
//	           scheduler (explain, workers, jobs per owner), by query.
//	Publishes  Creates of jobs and cancel requests, both by compare-and-swap in
//	           the registry; the drain flag of workers.
//	Owns       Nothing. It has no state that outlives a request, so any number
//	           of gateways may run and any of them may serve any request.
//
// A create is answered 201 only after the registry has acknowledged it. Where
// the outcome is not known the answer is 503 with the job's id, never a false
// success. A job that the caller may not see is answered as one that does not
// exist. Reading a job that neither the registry has nor the database can be
// asked for is 503, never 404.
//
// On restart: requests that wait (execute, events, followed logs) are cut;
// clients resume them by Last-Event-ID or by asking again. Jobs are not touched.
//
// On duplicate delivery: a create under an Idempotency-Key makes one job
// whatever is repeated; a cancel is idempotent.
//
// Metrics: cmdexec_gateway_requests_total{route,code},
// cmdexec_gateway_request_seconds{route}, cmdexec_gateway_jobs_created_total,
// cmdexec_gateway_streams (open streams and waiting calls).
//
// Limits: requests by address and by user, which gateways may share in a store
// (Deps.Limiter); queued jobs and open streams by user; connections, headers,
// bodies.
package gateway
