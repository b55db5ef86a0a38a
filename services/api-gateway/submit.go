package gateway

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/kit/failpoint"
	"github.com/cmdexec/cmdexec/libs/kit/httpkit"
	"github.com/cmdexec/cmdexec/services/api-gateway/internal/strictjson"
)

// Bounds of what a request waits for. A client hears about a bus that is away
// within two seconds.
const (
	writeTimeout = 2 * time.Second
	queryTimeout = 2 * time.Second
	// keyLookupTimeout bounds the question to the database before a keyed create,
	// which goes ahead without an answer. The create follows within writeTimeout:
	// well before the 10 s after which a job that was just asked for could have
	// ended and left the registry.
	keyLookupTimeout = time.Second
)

type createInput struct {
	IdempotencyKey string `header:"Idempotency-Key" doc:"1 to 255 visible ASCII characters. The same key of the same user always means the same job."`
}

type createOutput struct {
	Status   int
	Location string `header:"Location" doc:"Where the job is."`
	Replayed string `header:"Idempotency-Replayed" doc:"true where an earlier request created the job."`
	Body     api.Job
}

func (s *Service) createJob(ctx context.Context, c *call, in *createInput) (*createOutput, error) {
	rec, created, err := s.submit(ctx, c, in.IdempotencyKey)
	if err != nil {
		return nil, err
	}
	return createdJob(rec, created), nil
}

func createdJob(rec *job.Record, created bool) *createOutput {
	out := &createOutput{Status: http.StatusCreated, Location: "/api/jobs/" + rec.ID, Body: api.FromRecord(rec)}
	if !created {
		out.Status, out.Replayed = http.StatusOK, "true"
	}
	return out
}

var rerunDecoder = strictjson.For[api.RerunRequest]()

// rerunJob creates a job like another one, wherever that is: in the registry, or
// in the database only. The new job is the caller's.
func (s *Service) rerunJob(ctx context.Context, c *call, in *createInput) (*createOutput, error) {
	req, err := rerunDecoder.Decode(c.body)
	if err != nil {
		return nil, fieldProblem(err)
	}
	if err := checkSubmitter(c, in.IdempotencyKey); err != nil {
		return nil, err
	}
	old, err := s.visible(ctx, c, req.JobID)
	if err != nil {
		return nil, err
	}
	// Again, since limits may have changed since that job was accepted.
	spec, errs := job.Normalise(old.Spec)
	if len(errs) > 0 {
		return nil, invalidJob(errs)
	}
	rec, created, err := s.store(ctx, c, spec, old.ID, in.IdempotencyKey)
	if err != nil {
		return nil, err
	}
	return createdJob(rec, created), nil
}

// submit creates the job of the call's body, or finds the one that the
// idempotency key made before (created is false then).
func (s *Service) submit(ctx context.Context, c *call, key string) (rec *job.Record, created bool, err error) {
	spec, problem := decodeSpec(c.body)
	if problem != nil {
		return nil, false, problem
	}
	if err := checkSubmitter(c, key); err != nil {
		return nil, false, err
	}
	return s.store(ctx, c, spec, "", key)
}

// checkSubmitter refuses callers who cannot own jobs, and keys that are none.
func checkSubmitter(c *call, key string) error {
	if len(c.user) > job.MaxOwnerLen {
		return &httpkit.Problem{
			Status: http.StatusUnprocessableEntity, Code: codeInvalidJob, Detail: "the name of this user is too long to own a job",
		}
	}
	if key != "" && !job.ValidIdempotencyKey(key) {
		return badKey()
	}
	return nil
}

// store creates a job of a normalised spec, for the caller, under a key if that
// is not empty. Rerunning is the job that it repeats, if it does.
func (s *Service) store(ctx context.Context, c *call, spec job.Spec, rerunning, key string) (rec *job.Record, created bool, err error) {
	if key == "" {
		return s.createUnkeyed(ctx, c, spec, rerunning)
	}
	return s.createKeyed(ctx, c, spec, rerunning, key)
}

var specDecoder = strictjson.For[job.Spec]()

func decodeSpec(body []byte) (job.Spec, *httpkit.Problem) {
	spec, err := specDecoder.Decode(body)
	if err != nil {
		return job.Spec{}, fieldProblem(err)
	}
	spec, errs := job.Normalise(spec)
	if len(errs) > 0 {
		return job.Spec{}, invalidJob(errs)
	}
	return spec, nil
}

// fieldProblem reports what strictjson found.
func fieldProblem(err error) *httpkit.Problem {
	p := &httpkit.Problem{Status: http.StatusUnprocessableEntity, Hint: "see /openapi.json for the fields"}
	if unknown, ok := errors.AsType[*strictjson.UnknownFieldsError](err); ok {
		p.Code, p.Detail = codeUnknownField, "the body has fields that do not exist"
		for _, f := range unknown.Fields {
			p.Errors = append(p.Errors, httpkit.FieldError{Field: f, Code: codeUnknownField, Detail: "there is no such field"})
		}
		return p
	}
	p.Code, p.Detail = codeInvalidField, "a field has the wrong type"
	if fe, ok := errors.AsType[*strictjson.FieldError](err); ok {
		if fe.Field == "" {
			p.Detail = fe.Detail
			fe.Field = "command" // the only field that decodes itself
		}
		p.Errors = []httpkit.FieldError{{Field: fe.Field, Code: job.CodeInvalid, Detail: fe.Detail}}
	}
	return p
}

func (s *Service) createUnkeyed(ctx context.Context, c *call, spec job.Spec, rerunning string) (*job.Record, bool, error) {
	counted, p := s.quota.reserve(ctx, c.user)
	if p != nil {
		return nil, false, p
	}
	now := time.Now()
	rec := job.New(id.New(id.Job, now), c.user, spec, now).WithRerunOf(rerunning)
	_, err := s.create(ctx, &rec)
	counted(mayExist(err))
	switch {
	case err == nil:
	case errors.Is(err, bus.ErrAmbiguous), errors.Is(err, bus.ErrExists): // a fresh id exists only by our own write
		return nil, false, submitUnknown(rec.ID, "ask for that job; where it does not exist, submit again")
	default:
		return nil, false, err
	}
	s.metrics.created.Inc()
	return &rec, true, nil
}

func (s *Service) createKeyed(ctx context.Context, c *call, spec job.Spec, rerunning, key string) (*job.Record, bool, error) {
	rec := job.New(id.Keyed(c.user, key), c.user, spec, time.Now()).WithRerunOf(rerunning).WithIdempotency()

	// The database first: a job that ended and left the registry could be created again.
	lookup, cancel := context.WithTimeout(ctx, keyLookupTimeout)
	have, err := bus.Query(lookup, s.bus, bus.QueryJob, busmsg.GetJob{JobID: rec.ID})
	cancel()
	if err == nil {
		// The registry may know something newer.
		if live, err := s.record(ctx, rec.ID); err == nil {
			have = *live
		}
		return replay(&have, &rec)
	}
	counted, p := s.quota.reserve(ctx, c.user)
	if p != nil {
		return nil, false, p
	}
	live, err := s.create(ctx, &rec)
	counted(mayExist(err))
	switch {
	case err == nil:
	case errors.Is(err, bus.ErrExists):
		return replay(&live, &rec)
	case errors.Is(err, bus.ErrAmbiguous):
		return nil, false, submitUnknown(rec.ID, "send the same request again with the same key")
	default:
		return nil, false, err
	}
	s.metrics.created.Inc()
	return &rec, true, nil
}

// mayExist reports whether there may be a new job after a create that returned err.
func mayExist(err error) bool { return err == nil || errors.Is(err, bus.ErrAmbiguous) }

// replay answers a request whose key has been used, if it is the same request.
func replay(have, want *job.Record) (*job.Record, bool, error) {
	if have.Owner != want.Owner || have.SpecHash != want.SpecHash || have.RerunOf != want.RerunOf {
		return nil, false, &httpkit.Problem{
			Status: http.StatusUnprocessableEntity, Code: codeKeyReused,
			Detail: "this Idempotency-Key was used for another job", Hint: "use a new key for a new job", JobID: have.ID,
		}
	}
	return have, false, nil
}

// create writes a new record. With bus.ErrExists it returns the one that is
// there. An error that is not of bus is a problem for the client.
func (s *Service) create(ctx context.Context, rec *job.Record) (job.Record, error) {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	failpoint.At(failpoint.GatewayBeforeCreate)
	e, err := s.registry.Create(ctx, *rec)
	switch {
	case err == nil:
		failpoint.At(failpoint.GatewayAfterCreate)
	case errors.Is(err, bus.ErrQueueFull):
		err = &httpkit.Problem{
			Status: http.StatusServiceUnavailable, Code: codeQueueFull, Detail: "too many jobs are waiting or running",
			Hint: "submit again later", RetryAfter: 5 * time.Second,
		}
	case errors.Is(err, bus.ErrTooLarge):
		err = invalidJob([]job.FieldError{{Code: job.CodeTooLong, Detail: "the whole job is larger than the bus takes"}})
	}
	return e.Record, err
}

func submitUnknown(jobID, hint string) *httpkit.Problem {
	return &httpkit.Problem{
		Status: http.StatusServiceUnavailable, Code: codeSubmitUnknown, Detail: "it is not known whether the job was stored",
		Hint: hint, JobID: jobID, RetryAfter: retrySoon,
	}
}
