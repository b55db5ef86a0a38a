package job

import (
	"hash/fnv"
	"slices"
	"time"
)

// minInfraBackoff is the least wait after an infra failure: another worker may
// do better at once, a broken image registry will not.
const minInfraBackoff = time.Second

// retries reports whether a failure of the command's own is tried again.
func (r *Record) retries(o Outcome, exitCode *int) bool {
	if r.UserFailures >= r.Spec.Retry.MaxAttempts {
		return false
	}
	codes := r.Spec.Retry.OnExitCodes
	if len(codes) == 0 {
		return true
	}
	return o == OutcomeFailed && exitCode != nil && slices.Contains(codes, *exitCode)
}

// Backoff returns how long to wait after the given failure (from 1) of a job:
// base doubled each time up to the most, then between half and all of that.
// The jitter is a function of the job and the failure, so that every service
// computes the same.
func Backoff(jobID string, failure int, base, most time.Duration) time.Duration {
	d := min(base, most)
	for i := 1; i < failure && d < most; i++ {
		d = min(2*d, most)
	}
	h := fnv.New64a()
	_, _ = h.Write([]byte(jobID)) // never fails
	_, _ = h.Write([]byte{byte(failure >> 8), byte(failure)})
	half := d / 2
	if half <= 0 {
		return d
	}
	return d - half + time.Duration(h.Sum64()%uint64(half+1))
}

func (r *Record) backoff(class Class) time.Duration {
	base := time.Duration(valueOr(r.Spec.Retry.BackoffSeconds, DefaultBackoffSeconds)) * time.Second
	most := time.Duration(r.Spec.Retry.MaxBackoffSeconds) * time.Second
	if class == ClassInfra {
		return Backoff(r.ID, r.InfraFailures, max(base, minInfraBackoff), max(most, minInfraBackoff))
	}
	return Backoff(r.ID, r.UserFailures, base, most)
}
