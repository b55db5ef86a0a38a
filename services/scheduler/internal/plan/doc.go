// Package plan decides which waiting job goes to which worker. It is pure: no
// I/O, no clock of its own, no goroutine; the caller passes now. It is not safe
// for concurrent use.
//
// # Order
//
// A higher priority goes first. Within a priority owners take turns, one job
// each; within an owner its named queues take turns; within a queue the job
// that was created first goes first. A job that no worker can take now is passed
// over: it neither blocks others nor costs its owner the turn. An owner of whose
// jobs as many run as may has no turn until one of them ends.
//
// # Cost
//
// Jobs that ask for the same (executor, constraints, cpu, memory) share a shape.
// A shape that fits nowhere is parked as a whole and looked at again only when
// a worker that can take it gains room, so the cost of a decision depends on
// the number of shapes and workers, not on the number of jobs.
//
// # Placement
//
// Of the workers that fit, the one whose fullest resource (slots, cpu, memory)
// stays emptiest gets the job; ties go to the one with more free cpu, then to
// the lower id. What is reserved is the sum over the jobs placed there.
package plan
