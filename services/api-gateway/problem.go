package gateway

import (
	"context"
	"errors"
	"net/http"
	"strconv"
	"time"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/kit/httpkit"
)

// Codes of problems. They are part of the API.
const (
	codeBadJSON          = "bad_json"
	codeBadYAML          = "bad_yaml"
	codeUnknownField     = "unknown_field"
	codeUnsupportedField = "unsupported_field"
	codeInvalidField     = "invalid_field"
	codeInvalidJob       = "invalid_job"
	codeBadParameter     = "bad_parameter"
	codeUnknownParameter = "unknown_parameter"
	codeBadJobID         = "bad_job_id"
	codeBadWorkerID      = "bad_worker_id"
	codeBadRange         = "range_not_satisfiable"
	codeBadCursor        = "bad_cursor"
	codeBadKey           = "bad_idempotency_key"
	codeKeyReused        = "idempotency_key_reused"
	codeUnauthorized     = "unauthorized"
	codeAdminOnly        = "admin_only"
	codeNotFound         = "not_found"
	codeMethod           = "method_not_allowed"
	codeJobNotFound      = "job_not_found"
	codeAttemptNotFound  = "attempt_not_found"
	codeWorkerNotFound   = "worker_not_found"
	codeRateLimited      = "rate_limited"
	codeTooManyQueued    = "too_many_queued"
	codeTooManyStreams   = "too_many_streams"
	codeQueueFull        = "queue_full"
	codeSubmitUnknown    = "submit_unknown"
	codeBusAway          = "bus_unavailable"
	codeDatabaseAway     = "database_unavailable"
	codeSchedulerAway    = "scheduler_unavailable"
	codeStopping         = "stopping"
	codeBusy             = "busy"
	codeWaitTimeout      = "wait_timeout"
	codeInternal         = "internal_error"
)

// retrySoon is what clients are told to wait while something is away.
const retrySoon = time.Second

// failure is a problem as huma wants an error: with headers of its own.
type failure struct{ *httpkit.Problem }

// GetHeaders returns the headers that belong to the problem.
func (f failure) GetHeaders() http.Header {
	h := http.Header{}
	if f.RetryAfter > 0 {
		h.Set("Retry-After", strconv.FormatInt(int64((f.RetryAfter+time.Second-1)/time.Second), 10))
	}
	return h
}

// problemOf is the one place where errors become answers. What it does not
// know is logged and answered as a 500 that says nothing.
func (s *Service) problemOf(ctx context.Context, err error) *httpkit.Problem {
	if p, ok := errors.AsType[*httpkit.Problem](err); ok {
		clone := *p
		return clone.Fill(httpkit.RequestIDFrom(ctx))
	}
	p := &httpkit.Problem{}
	switch {
	case errors.Is(err, bus.ErrAmbiguous):
		*p = busAway()
		p.Detail, p.Hint = "the message bus did not answer", "try again; whether something was changed is not known"
	case errors.Is(err, bus.ErrUnavailable), errors.Is(err, bus.ErrNoResponder), errors.Is(err, context.DeadlineExceeded):
		*p = busAway()
	case errors.Is(err, context.Canceled):
		// The client is gone, or the server stops: nobody reads this.
		*p = httpkit.Problem{Status: http.StatusServiceUnavailable, Code: codeStopping, Detail: "the request was interrupted", RetryAfter: retrySoon}
	default:
		s.logger.ErrorContext(ctx, "request failed", "err", err, "requestId", httpkit.RequestIDFrom(ctx))
		*p = httpkit.Problem{
			Status: http.StatusInternalServerError, Code: codeInternal, Detail: "the server made a mistake",
			Hint: "report it with the request id",
		}
	}
	return p.Fill(httpkit.RequestIDFrom(ctx))
}

func busAway() httpkit.Problem {
	return httpkit.Problem{
		Status: http.StatusServiceUnavailable, Code: codeBusAway, Detail: "the message bus cannot be reached",
		Hint: "try again; nothing was changed", RetryAfter: retrySoon,
	}
}

func databaseAway() *httpkit.Problem {
	return &httpkit.Problem{
		Status: http.StatusServiceUnavailable, Code: codeDatabaseAway,
		Detail: "the service that reads the database does not answer", Hint: "try again", RetryAfter: retrySoon,
	}
}

func schedulerAway() *httpkit.Problem {
	return &httpkit.Problem{
		Status: http.StatusServiceUnavailable, Code: codeSchedulerAway,
		Detail: "no scheduler answers", Hint: "try again", RetryAfter: retrySoon,
	}
}

func jobNotFound() *httpkit.Problem {
	return &httpkit.Problem{
		Status: http.StatusNotFound, Code: codeJobNotFound, Detail: "there is no such job, or it is not yours",
		Hint: "GET /api/jobs lists your jobs",
	}
}

func badParameter(name, detail string) *httpkit.Problem {
	return &httpkit.Problem{
		Status: http.StatusBadRequest, Code: codeBadParameter, Detail: "a parameter cannot be used",
		Errors: []httpkit.FieldError{{Field: name, Code: job.CodeInvalid, Detail: detail}},
	}
}

func adminOnly() *httpkit.Problem {
	return &httpkit.Problem{Status: http.StatusForbidden, Code: codeAdminOnly, Detail: "this needs the role admin"}
}

// invalidJob reports what Normalise found.
func invalidJob(errs []job.FieldError) *httpkit.Problem {
	p := &httpkit.Problem{
		Status: http.StatusUnprocessableEntity, Code: codeInvalidJob, Detail: "the job cannot be accepted as it is",
		Hint: "see errors for the fields",
	}
	for _, e := range errs {
		if e.Code == job.CodeUnsupportedField {
			p.Code, p.Detail = codeUnsupportedField, "the job uses something that does not exist yet"
		}
		p.Errors = append(p.Errors, httpkit.FieldError(e))
	}
	return p
}

// isQueryCode reports whether the other side of a query refused with code.
func isQueryCode(err error, code string) bool {
	q, ok := errors.AsType[*busmsg.QueryError](err)
	return ok && q.Code == code
}
