package poll

import (
	"testing"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
)

func FuzzQuery(f *testing.F) {
	for _, s := range []string{
		"", "workerId=worker-1&waitSeconds=20", "waitSeconds=30", "waitSeconds=31", "waitSeconds=-1", "waitSeconds=+1", "waitSeconds=0x1", "waitSeconds=1&waitSeconds=99",
		"waitSeconds=%zz", "waitSeconds=1e3", "waitSeconds=18446744073709551616", ";", "jobId=job-01jdbq5p6mh7v9w0x1y2z3a4b5&attempt=1", "jobId=job.>&attempt=1",
		"jobId=job-01jdbq5p6mh7v9w0x1y2z3a4b5&attempt=0", "jobId=job-01jdbq5p6mh7v9w0x1y2z3a4b5&attempt=2147483648",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, query string) {
		if d, err := parseWait(query); err == nil && (d < 0 || d > workerproto.MaxPoll || d%time.Second != 0) {
			t.Errorf("a poll waits for %v", d)
		}
		jobID, attempt, err := parseAttempt(query)
		if err == nil && (id.Check(id.Job, jobID) != nil || attempt < 1) {
			t.Errorf("attempt %d of %q", attempt, jobID)
		}
	})
}
