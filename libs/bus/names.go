package bus

import (
	"fmt"

	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/core/job"
)

// Streams. A bucket of key NATS tools may look into is a stream KV_<bucket>.
const (
	streamJobs    = "KV_jobs"
	streamWorkers = "KV_workers"
	streamControl = "KV_control"
	streamLeader  = "KV_leader"
	streamResults = "RESULTS"
	streamLogs    = "LOGS"
	streamDead    = "DEADLETTERS"
)

// Subjects. The keys of a bucket follow its prefix; <id> is always one token.
const (
	prefixJobs    = "$KV.jobs."
	prefixWorkers = "$KV.workers."
	prefixControl = "$KV.control."
	prefixLeader  = "$KV.leader."
	prefixResults = "cmdexec.results."
	prefixLogs    = "cmdexec.logs."
	prefixDead    = "cmdexec.dead."
	subjectBeats  = "cmdexec.beats"
)

// Keys of the control and leader buckets.
const (
	keySwept     = "swept"
	keyScheduler = "scheduler"
)

// metadataGeneration is where the registry's stream keeps its generation id.
const metadataGeneration = "cmdexec.generation"

// metadataSizes is where it keeps the byte limits of the others, for Restore.
const metadataSizes = "cmdexec.sizes"

// ConsumerName names a durable consumer, and with it its stream.
type ConsumerName string

// The durable consumers.
const (
	ResultsState   ConsumerName = "state"    // collector: results become states
	ResultsArchive ConsumerName = "archive"  // collector: output inside results is stored
	LogsArchive    ConsumerName = "logs"     // collector: output is stored
	JobsProjection ConsumerName = "database" // persister: records are stored; MaxAckPending 256
)

// stream returns the stream of a consumer, "" for a name that is none.
func (n ConsumerName) stream() string {
	switch n {
	case ResultsState, ResultsArchive:
		return streamResults
	case LogsArchive:
		return streamLogs
	case JobsProjection:
		return streamJobs
	default:
		return ""
	}
}

// jobKey is the registry key of a job: its group, then its id.
func jobKey(jobID string) (string, error) {
	if err := id.Check(id.Job, jobID); err != nil {
		return "", err
	}
	return id.Group(jobID) + "." + jobID, nil
}

// groupFilter matches the subjects of all jobs of a group.
func groupFilter(group string) (string, error) {
	if len(group) != id.GroupLen {
		return "", fmt.Errorf("%w: a group has %d characters", id.ErrInvalid, id.GroupLen)
	}
	// A group is the beginning of an id, so it is checked as one.
	whole := string(id.Job) + "-" + group + "0000000000000000000"[:id.ULIDLen-id.GroupLen]
	if err := id.Check(id.Job, whole); err != nil {
		return "", err
	}
	return prefixJobs + group + ".*", nil
}

func resultSubject(jobID string) (string, error) { return perJob(prefixResults, jobID) }
func logSubject(jobID string) (string, error)    { return perJob(prefixLogs, jobID) }

func perJob(prefix, jobID string) (string, error) {
	if err := id.Check(id.Job, jobID); err != nil {
		return "", err
	}
	return prefix + jobID, nil
}

func deadSubject(stream string, consumer ConsumerName) string {
	return prefixDead + stream + "." + string(consumer)
}

// commandSubject is where the edge that holds a worker's session listens.
func commandSubject(workerID string) (string, error) {
	if err := id.CheckWorker(workerID); err != nil {
		return "", err
	}
	return "cmdexec.worker." + workerID + ".command", nil
}

// Endpoint is a typed query: Req goes in, Resp comes out.
type Endpoint[Req, Resp any] struct {
	name string
}

// Name identifies the query, for logs and metrics.
func (e Endpoint[Req, Resp]) Name() string { return e.name }

func (e Endpoint[Req, Resp]) subject() string { return "cmdexec.query." + e.name }

// SettleResult has any collector make a result a state and store the output that
// rides in it. Its answer is the acknowledgement: both are on disk then.
var SettleResult = Endpoint[busmsg.Result, busmsg.Settled]{"settle"}

// The queries. The first four are answered by any persister, the others by the
// leading scheduler only.
var (
	QueryJob     = Endpoint[busmsg.GetJob, job.Record]{"job"}
	QueryJobs    = Endpoint[busmsg.ListJobs, busmsg.JobPage]{"jobs"}
	QueryStats   = Endpoint[struct{}, busmsg.Stats]{"stats"}
	QueryLogs    = Endpoint[busmsg.GetLogs, busmsg.Logs]{"logs"}
	QueryExplain = Endpoint[busmsg.Explain, busmsg.Explanation]{"explain"}
	QueryWorkers = Endpoint[busmsg.ListWorkers, busmsg.WorkerList]{"workers"}
	QueryOwner   = Endpoint[busmsg.OwnerCount, busmsg.OwnerCounts]{"owner"}
)
