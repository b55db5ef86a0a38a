package gateway

import (
	"context"
	"errors"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/kit/httpkit"
	"github.com/cmdexec/cmdexec/services/api-gateway/internal/strictjson"
)

// record finds a job: in the registry, else in the database. Its error is a
// problem for the client or one of bus. Only an answer of the database makes a
// job not exist.
func (s *Service) record(ctx context.Context, jobID string) (*job.Record, error) {
	ctx, cancel := context.WithTimeout(ctx, queryTimeout)
	defer cancel()
	e, err := s.registry.Get(ctx, jobID)
	if err == nil {
		return &e.Record, nil
	}
	if !errors.Is(err, bus.ErrNotFound) {
		return nil, err
	}
	rec, err := bus.Query(ctx, s.bus, bus.QueryJob, busmsg.GetJob{JobID: jobID})
	switch {
	case err == nil:
		return &rec, nil
	case isQueryCode(err, busmsg.CodeNotFound):
		return nil, jobNotFound()
	default:
		s.logger.DebugContext(ctx, "database not asked", "err", err)
		return nil, databaseAway()
	}
}

// visible is record for a caller: somebody else's job does not exist.
func (s *Service) visible(ctx context.Context, c *call, jobID string) (*job.Record, error) {
	if err := checkJobID(jobID); err != nil {
		return nil, err
	}
	rec, err := s.record(ctx, jobID)
	if err != nil {
		return nil, err
	}
	if !c.sees(rec.Owner) {
		return nil, jobNotFound()
	}
	return rec, nil
}

type jobOutput struct{ Body api.Job }

func (s *Service) getJob(ctx context.Context, c *call, in *jobPath) (*jobOutput, error) {
	rec, err := s.visible(ctx, c, in.JobID)
	if err != nil {
		return nil, err
	}
	return &jobOutput{Body: api.FromRecord(rec)}, nil
}

type statusInput struct {
	JobID string `query:"jobId" required:"true" doc:"The job's id."`
}

func (s *Service) jobStatus(ctx context.Context, c *call, in *statusInput) (*jobOutput, error) {
	return s.getJob(ctx, c, &jobPath{JobID: in.JobID})
}

var cancelDecoder = strictjson.For[api.CancelRequest]()

func (s *Service) cancelJob(ctx context.Context, c *call, _ *struct{}) (*jobOutput, error) {
	req, err := cancelDecoder.Decode(c.body)
	if err != nil {
		return nil, fieldProblem(err)
	}
	rec, err := s.visible(ctx, c, req.JobID)
	if err != nil {
		return nil, err
	}
	if !rec.State.Terminal() {
		if rec, err = s.cancel(ctx, rec.ID); err != nil {
			return nil, err
		}
	}
	return &jobOutput{Body: api.FromRecord(rec)}, nil
}

// cancel asks for the end of a job and returns it as it is then.
func (s *Service) cancel(ctx context.Context, jobID string) (*job.Record, error) {
	ctx, done := context.WithTimeout(ctx, writeTimeout)
	defer done()
	e, err := s.registry.Transition(ctx, jobID, job.CancelRequest{})
	switch {
	case err == nil, errors.Is(err, job.ErrTerminal), errors.Is(err, job.ErrUnchanged):
		return &e.Record, nil
	case errors.Is(err, bus.ErrNotFound): // it ended and left the registry
		return s.record(ctx, jobID)
	default:
		return nil, err
	}
}

// Limits of a list.
const (
	defaultPage = 50
	maxPage     = 500
	maxStates   = 16
	maxFilters  = job.MaxLabels
)

type listInput struct {
	Status []string `query:"status,explode" doc:"Only jobs with this status; may be repeated, or several with commas."`
	Queue  string   `query:"queue" doc:"Only jobs of this queue."`
	Label  []string `query:"label,explode" doc:"Only jobs with this label, as name:value; may be repeated, all must match."`
	Since  timeText `query:"since" doc:"Created at or after."`
	Until  timeText `query:"until" doc:"Created before."`
	Limit  pageText `query:"limit" doc:"Jobs per page, 50 if absent."`
	Cursor string   `query:"cursor" doc:"nextCursor of the page before, with the same filters."`
}

type listOutput struct{ Body api.JobList }

func (s *Service) listJobs(ctx context.Context, c *call, in *listInput) (*listOutput, error) {
	q, err := listQuery(c, in)
	if err != nil {
		return nil, err
	}
	if in.Cursor != "" {
		at, jobID, ok := s.cursors.open(in.Cursor, q)
		if !ok {
			return nil, &httpkit.Problem{
				Status: http.StatusBadRequest, Code: codeBadCursor, Detail: "this cursor does not belong to this list",
				Hint: "use nextCursor as it was given, with the same filters; or begin again without one",
			}
		}
		q.BeforeAt, q.BeforeID = at, jobID
	}
	ctx, cancel := context.WithTimeout(ctx, queryTimeout)
	defer cancel()
	page, err := bus.Query(ctx, s.bus, bus.QueryJobs, q)
	if err != nil {
		s.logger.DebugContext(ctx, "database not asked", "err", err)
		return nil, databaseAway()
	}
	out := &listOutput{Body: api.JobList{Items: make([]api.Job, 0, len(page.Items)), AsOf: page.AsOf}}
	for i := range page.Items {
		out.Body.Items = append(out.Body.Items, api.Summary(&page.Items[i]))
	}
	if n := len(page.Items); page.More && n > 0 {
		last := &page.Items[n-1]
		out.Body.NextCursor = s.cursors.seal(last.CreatedAt, last.ID, q)
	}
	return out, nil
}

// listQuery reads the filters. What a user asks for is always limited to the
// user's own jobs.
func listQuery(c *call, in *listInput) (busmsg.ListJobs, error) {
	q := busmsg.ListJobs{Queue: in.Queue, Limit: defaultPage}
	if !c.admin {
		q.Owner = c.user
	}
	for _, list := range in.Status {
		for word := range strings.SplitSeq(list, ",") {
			if word == "" {
				continue
			}
			if !job.State(word).Valid() {
				return q, badParameter("status", "one of "+stateWords())
			}
			q.States = append(q.States, job.State(word))
		}
	}
	if len(q.States) > maxStates {
		return q, badParameter("status", "at most 16")
	}
	if in.Queue != "" && !job.ValidQueue(in.Queue) {
		return q, badParameter("queue", "lower-case letters, digits, '_' and '-'")
	}
	if len(in.Label) > maxFilters {
		return q, badParameter("label", "at most "+strconv.Itoa(maxFilters))
	}
	for _, l := range in.Label {
		name, value, ok := strings.Cut(l, ":")
		if !ok || !job.ValidLabelKey(name) || len(value) > job.MaxLabelValueLen {
			return q, badParameter("label", "written as name:value")
		}
		if q.Labels == nil {
			q.Labels = map[string]string{}
		}
		if have, twice := q.Labels[name]; twice && have != value {
			return q, badParameter("label", "two values of one label cannot both match")
		}
		q.Labels[name] = value
	}
	var err error
	if q.Since, err = in.Since.time("since"); err != nil {
		return q, err
	}
	if q.Until, err = in.Until.time("until"); err != nil {
		return q, err
	}
	if in.Limit != "" {
		n, err := strconv.Atoi(string(in.Limit))
		if err != nil || n < 1 || n > maxPage {
			return q, badParameter("limit", "from 1 to "+strconv.Itoa(maxPage))
		}
		q.Limit = n
	}
	return q, nil
}

func stateWords() string {
	var words []string
	for _, s := range job.States() {
		words = append(words, string(s))
	}
	return strings.Join(words, ", ")
}

// The kinds of parameters. All are strings to huma, which so refuses none of
// them in words of its own; the document says what they are.
type (
	timeText string // RFC 3339
	pageText string // 1 to maxPage
	intText  string // a whole number, not negative
	boolText string // true or false
)

// Schema describes a time.
func (timeText) Schema(huma.Registry) *huma.Schema {
	return &huma.Schema{Type: huma.TypeString, Format: "date-time"}
}

// Schema describes the length of a page.
func (pageText) Schema(huma.Registry) *huma.Schema {
	least, most := 1.0, float64(maxPage)
	return &huma.Schema{Type: huma.TypeInteger, Minimum: &least, Maximum: &most}
}

// Schema describes a count.
func (intText) Schema(huma.Registry) *huma.Schema {
	least := 0.0
	return &huma.Schema{Type: huma.TypeInteger, Format: "int64", Minimum: &least}
}

// Schema describes a switch.
func (boolText) Schema(huma.Registry) *huma.Schema { return &huma.Schema{Type: huma.TypeBoolean} }

func (t timeText) time(name string) (time.Time, error) {
	if t == "" {
		return time.Time{}, nil
	}
	at, err := time.Parse(time.RFC3339, string(t))
	if err != nil {
		return time.Time{}, badParameter(name, "a time such as 2026-11-24T08:00:00Z")
	}
	return at.UTC(), nil
}

func (t intText) int(name string) (int64, error) {
	if t == "" {
		return 0, nil
	}
	n, err := strconv.ParseInt(string(t), 10, 64)
	if err != nil || n < 0 {
		return 0, badParameter(name, "a whole number, not negative")
	}
	return n, nil
}

func (t boolText) bool(name string) (bool, error) {
	switch t {
	case "", "false":
		return false, nil
	case "true":
		return true, nil
	default:
		return false, badParameter(name, "true or false")
	}
}

type healthOutput struct{ Body api.Health }

func (s *Service) health(context.Context, *call, *struct{}) (*healthOutput, error) {
	return &healthOutput{Body: api.Health{Status: "ok"}}, nil
}

type infoOutput struct{ Body api.Info }

func (s *Service) info(context.Context, *call, *struct{}) (*infoOutput, error) {
	return &infoOutput{Body: api.Info{
		Version: api.Version, Commit: api.Commit, Durability: s.durability(), NATSServer: s.bus.ServerVersion(),
		UptimeSeconds: int64(time.Since(s.started) / time.Second),
	}}, nil
}
