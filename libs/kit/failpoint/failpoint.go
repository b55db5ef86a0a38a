// Package failpoint names the moments between two steps at which a program must
// be able to die, and lets a test kill it exactly there.
//
// A program passes such a moment by At. That is an empty function, of which
// nothing is left in a binary, unless the program was built with the tag
// failpoint; then the environment variable FAILPOINT says what happens where:
//
//	FAILPOINT=gateway.afterCreate:kill@3,edge.logged:sleep=500ms%10
//
// An entry is a name, an action, and when. Actions: kill (the process kills
// itself; kill=20ms does so that long after, and goes on meanwhile), sleep=500ms,
// panic. When: @3 the third time that the program comes there and no other, %10
// each time with that probability in percent, neither for each time.
//
// Programs are started so by tests/chaos, from bin/failpoint. `make build` and
// the images have none of this; tests/arch holds that.
package failpoint

// Name is a moment. Each is passed at one place of the code (tests/arch).
type Name string

// The moments, by program. What was done last before, and what comes next:
const (
	GatewayBeforeCreate Name = "gateway.beforeCreate" // a job was accepted; it is written to the registry
	GatewayAfterCreate  Name = "gateway.afterCreate"  // the registry has it; the client is answered

	SchedulerDecided  Name = "scheduler.decided"  // a job has its worker, in memory; the assignment is written
	SchedulerAssigned Name = "scheduler.assigned" // the registry has it; the worker is told
	SchedulerPushed   Name = "scheduler.pushed"   // the edge has answered; that is taken in

	EdgeDelivered Name = "edge.delivered" // the worker has an assignment; the scheduler is told
	EdgeLogged    Name = "edge.logged"    // output is published; the worker is told
	EdgeReported  Name = "edge.reported"  // a result is published; the worker is told

	WorkerStarted Name = "worker.started" // a command runs; that is reported
	WorkerEnded   Name = "worker.ended"   // it has ended; its result goes into the spool
	WorkerSpooled Name = "worker.spooled" // there it is; the attempt is cleaned up, and the result sent
	WorkerAcked   Name = "worker.acked"   // the edge has it; it leaves the spool

	CollectorSettled  Name = "collector.settled"  // a result is in the registry; its message is acknowledged
	CollectorArchived Name = "collector.archived" // output is in the database; its messages are acknowledged

	PersisterStored      Name = "persister.stored"      // jobs are in the database; their messages are acknowledged
	PersisterBeforePurge Name = "persister.beforePurge" // an ended job was stored; it leaves the registry
)

// Names lists all of them.
func Names() []Name {
	return []Name{
		GatewayBeforeCreate, GatewayAfterCreate,
		SchedulerDecided, SchedulerAssigned, SchedulerPushed,
		EdgeDelivered, EdgeLogged, EdgeReported,
		WorkerStarted, WorkerEnded, WorkerSpooled, WorkerAcked,
		CollectorSettled, CollectorArchived,
		PersisterStored, PersisterBeforePurge,
	}
}
