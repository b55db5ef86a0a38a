// Package worker is the service that runs commands on one machine.
//
//	Consumes   assign, cancel, drain, beat, ack, stale, token and goaway frames from the edge.
//	Publishes  hello, heartbeat, accepted, preparing, started, rejected, output and result frames.
//	Transport  a WebSocket, or plain HTTP with the same bodies and a long poll; by default the one that can be had.
//	Owns       its data folder: worker id, renewed token, spool, journal and working folders of attempts. Never touches the bus or a database.
//	On restart goes on with containers of a life that was killed while their leases hold, kills and removes all else
//	           that it left on the machine before it takes work, and sends again every result that was not acknowledged.
//	           An attempt that is not gone on with is missing from the next hello, which ends its lease at once.
//	On duplicate delivery  an assignment whose lease is known, or was over lately, is ignored; acks, cancels and stales may be repeated.
//	Leases     a command is killed when its lease was not confirmed for 3/4 of the lease, counted from the sending of
//	           the last confirmed heartbeat by a clock that counts sleep.
//	Metrics    cmdexec_worker_slots, _slots_used, _connected.
package worker
