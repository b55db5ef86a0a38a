package poll

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/httpkit"
	"github.com/cmdexec/cmdexec/services/worker-edge/internal/session"
)

// writeTimeout bounds the writing of an answer, after whatever it waited for.
const writeTimeout = 10 * time.Second

// decode reads the body, which was checked to be a JSON object, or answers the
// request. Fields that are not known are ignored.
func (q *request) decode(into any) bool {
	body, err := io.ReadAll(q.r.Body) // from memory
	if err == nil {
		err = workerproto.Decode(body, into)
	}
	if err != nil {
		q.refuse(invalid(strings.ToValidUTF8(err.Error(), "")))
		return false
	}
	return true
}

// own checks a worker id that a request names, or answers the request. It is
// 403 and not 422: the request is well formed and another token would make it right.
// Nothing is given away by it, since the token names its own worker.
func (q *request) own(workerID string, needed bool) bool {
	if workerID == q.claims.Subject || workerID == "" && !needed {
		return true
	}
	q.refuse(httpkit.Problem{
		Status: http.StatusForbidden, Code: "other_worker", Detail: "the token is another worker's: workerId must be the token's subject",
		Errors: []httpkit.FieldError{{Field: "workerId", Code: "other_worker"}},
	})
	return false
}

func (q *request) waitSeconds() (time.Duration, bool) {
	d, err := parseWait(q.r.URL.RawQuery)
	if err != nil {
		q.refuse(parameter("waitSeconds", err.Error()))
	}
	return d, err == nil
}

// parseWait reads how long a poll waits from a query.
func parseWait(query string) (time.Duration, error) {
	values, err := url.ParseQuery(query)
	if err != nil {
		return 0, errors.New("the query is malformed")
	}
	if !values.Has("waitSeconds") {
		return workerproto.DefaultPoll, nil
	}
	n, err := strconv.ParseUint(values.Get("waitSeconds"), 10, 16)
	if err != nil || time.Duration(n)*time.Second > workerproto.MaxPoll {
		return 0, errors.New("waitSeconds must be a whole number from 0 to " + strconv.Itoa(int(workerproto.MaxPoll/time.Second)))
	}
	return time.Duration(n) * time.Second, nil
}

func (q *request) attempt() (jobID string, attempt int, ok bool) {
	jobID, attempt, err := parseAttempt(q.r.URL.RawQuery)
	if err != nil {
		q.refuse(parameter("jobId", err.Error()))
	}
	return jobID, attempt, err == nil
}

// parseAttempt reads which attempt a query names.
func parseAttempt(query string) (jobID string, attempt int, err error) {
	values, err := url.ParseQuery(query)
	if err != nil {
		return "", 0, errors.New("the query is malformed")
	}
	jobID = values.Get("jobId")
	n, err := strconv.ParseUint(values.Get("attempt"), 10, 31)
	if err != nil || n < 1 || id.Check(id.Job, jobID) != nil {
		return "", 0, errors.New("jobId and attempt must name an attempt")
	}
	return jobID, int(n), nil
}

// refuse answers with a problem.
func (q *request) refuse(p httpkit.Problem) {
	q.soon()
	q.h.gate.Refuse(q.w, q.r, p)
}

// failed answers with why the session did not take something. The session goes
// on: another request of the worker has nothing to do with this one.
func (q *request) failed(err error) {
	v, ok := errors.AsType[*session.Violation](err)
	switch {
	case errors.Is(err, session.ErrNotOpen):
		q.refuse(stopping())
	case !ok: // the session has ended
		_, end, _ := q.state(func() bool { return false })
		if end == nil {
			end = &closing{}
		}
		q.ended(end)
	case v.Code == workerproto.CloseSlowDown:
		q.refuse(httpkit.Problem{Status: http.StatusTooManyRequests, Code: "slow_down", Detail: v.Reason, RetryAfter: time.Second})
	case v.Code == workerproto.CloseOverloaded:
		q.refuse(httpkit.Problem{Status: http.StatusServiceUnavailable, Code: "overloaded", Detail: v.Reason, RetryAfter: time.Second})
	default:
		q.refuse(invalid(v.Reason))
	}
}

// ended answers a request of a session that is over.
func (q *request) ended(end *closing) {
	switch end.code {
	case workerproto.CloseReplaced:
		q.refuse(replaced(end.after))
	default:
		q.refuse(registerAgain(end.after))
	}
}

func registerAgain(after time.Duration) httpkit.Problem {
	return httpkit.Problem{
		Status: http.StatusConflict, Code: workerproto.CodeRegisterAgain, Detail: "this worker has no session", RetryAfter: after,
		Hint: "register, and list in running what the worker still has: nothing is lost",
	}
}

func replaced(after time.Duration) httpkit.Problem {
	return httpkit.Problem{
		Status: http.StatusConflict, Code: workerproto.CodeReplaced, Detail: "a newer session of this worker took over", RetryAfter: after,
		Hint: "give each worker its own id",
	}
}

func unavailable(detail string) httpkit.Problem {
	return httpkit.Problem{Status: http.StatusServiceUnavailable, Code: "unavailable", Detail: detail, RetryAfter: time.Second}
}

func stopping() httpkit.Problem { return unavailable("the edge is starting or stopping") }

func invalid(detail string) httpkit.Problem {
	return httpkit.Problem{Status: http.StatusUnprocessableEntity, Code: "invalid_report", Detail: detail}
}

func parameter(field, detail string) httpkit.Problem {
	return httpkit.Problem{
		Status: http.StatusUnprocessableEntity, Code: "invalid_parameter", Detail: detail,
		Errors: []httpkit.FieldError{{Field: field, Code: "invalid", Detail: detail}},
	}
}

// longLived lets the request take longer than the server's own timeouts, which
// have bounded the reading of its body.
func (q *request) longLived() { _ = httpkit.LongLived(q.w) } // a writer that cannot has no timeouts

// soon bounds the writing that follows.
func (q *request) soon() {
	_ = http.NewResponseController(q.w).SetWriteDeadline(time.Now().Add(writeTimeout)) // see longLived
}

func (q *request) answer200(body any) {
	data, err := json.Marshal(body)
	if err != nil { // numbers and strings
		panic(err)
	}
	_ = q.write(data) // the worker asks again
}

// write answers with JSON. Without an error the answer is in the kernel's hands.
func (q *request) write(data []byte) error {
	q.soon()
	h := q.w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(data)))
	if _, err := q.w.Write(data); err != nil {
		return err
	}
	return http.NewResponseController(q.w).Flush()
}
