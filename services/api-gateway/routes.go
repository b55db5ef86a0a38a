package gateway

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"sync"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humachi"
	"github.com/go-chi/chi/v5"

	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/kit/httpkit"
	"github.com/cmdexec/cmdexec/services/api-gateway/internal/reference"
)

// openAPIPath is where the document of all other routes is served.
const openAPIPath = "/openapi.json"

// docsPath is where people read it.
const docsPath = "/docs"

// route declares one operation: what the document says of it, and what the
// guard demands.
type route struct {
	method, path string
	id, summary  string
	description  string
	tag          string
	access       access
	status       int               // of success; 200 if zero
	also         map[int]string    // further successes
	body         any               // a value of the body's type, nil for none
	rules        bodyRules         // of the body; maxBody if the limit is zero
	streams      map[string]string // further media types of the success, with descriptions
	waits        bool              // the handler waits or streams
	errors       []int             // beside those that every such route has
}

// routes builds the router, the handlers and the document.
func (s *Service) routes() (http.Handler, error) {
	router := chi.NewRouter()
	waits := map[string]bool{}
	router.Use(httpkit.RequestID, s.metrics.middleware(waits), httpkit.AccessLog(s.logger), httpkit.Recover(s.logger, nil), httpkit.SecurityHeaders)
	router.NotFound(s.limited(func(w http.ResponseWriter, r *http.Request) {
		httpkit.Write(w, r, httpkit.Problem{
			Status: http.StatusNotFound, Code: codeNotFound, Detail: "there is no such route", Hint: "see " + docsPath + " or " + openAPIPath,
		})
	}))
	router.MethodNotAllowed(s.limited(func(w http.ResponseWriter, r *http.Request) { methodNotAllowed(router, w, r) }))

	d := newDocument(humachi.NewAdapter(router))
	s.register(d, waits)
	d.describeWorkerRoutes()
	text, err := d.finish()
	if err != nil {
		return nil, fmt.Errorf("openapi document: %w", err)
	}
	page, err := reference.New(d.api.OpenAPI(), openAPIPath, d.ids)
	if err != nil {
		return nil, fmt.Errorf("reference page: %w", err)
	}
	for path, h := range map[string]http.HandlerFunc{
		openAPIPath: func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/openapi+json")
			_, _ = w.Write(text) // the client may be gone
		},
		docsPath: func(w http.ResponseWriter, _ *http.Request) {
			h := w.Header()
			h.Set("Content-Type", "text/html; charset=utf-8")
			h.Set("Content-Security-Policy", page.Policy)
			h.Set("Referrer-Policy", "no-referrer")
			h.Set("X-Frame-Options", "DENY")
			_, _ = w.Write(page.HTML)
		},
	} {
		router.Get(path, s.limited(h))
	}
	return router, nil
}

func methodNotAllowed(router chi.Routes, w http.ResponseWriter, r *http.Request) {
	var allowed []string
	for _, m := range []string{http.MethodGet, http.MethodPost} {
		if router.Match(chi.NewRouteContext(), m, r.URL.Path) {
			allowed = append(allowed, m)
		}
	}
	w.Header().Set("Allow", strings.Join(allowed, ", "))
	httpkit.Write(w, r, httpkit.Problem{
		Status: http.StatusMethodNotAllowed, Code: codeMethod, Detail: "this route does not have this method",
		Hint: "see Allow for those that it has",
	})
}

// register is the list of all operations.
func (s *Service) register(d *document, waits map[string]bool) {
	o := &operations{s: s, d: d, waits: waits, examples: examples()}
	add(o, route{
		method: "POST", path: "/api/jobs/create", id: "createJob", tag: "jobs", summary: "Submit a job",
		description: "Answers when the job is stored durably. With an Idempotency-Key, repeating the request answers 200 with the job that the first one made.",
		status:      http.StatusCreated, also: map[int]string{200: "The job that an earlier request with this key created."},
		body: job.Spec{}, rules: bodyRules{yaml: true}, errors: []int{429},
	}, s.createJob)
	add(o, route{
		method: "GET", path: "/api/jobs/status", id: "jobStatus", tag: "jobs", summary: "Get a job, by query parameter",
	}, s.jobStatus)
	add(o, route{
		method: "POST", path: "/api/jobs/cancel", id: "cancelJob", tag: "jobs", summary: "Cancel a job",
		description: "Answers with the job: canceled where nothing ran, canceling while a worker stops it, unchanged where it had ended. May be repeated.",
		body:        api.CancelRequest{}, errors: []int{404},
	}, s.cancelJob)
	add(o, route{
		method: "POST", path: "/api/jobs/rerun", id: "rerunJob", tag: "jobs", summary: "Run a job again",
		description: "Creates a new job with the spec of another one, whatever became of that, and links it by rerunOf. The new job belongs to the caller. Idempotency-Key works as for createJob.",
		status:      http.StatusCreated, also: map[int]string{200: "The job that an earlier request with this key created."},
		body: api.RerunRequest{}, errors: []int{404, 429},
	}, s.rerunJob)
	add(o, route{
		method: "POST", path: "/api/jobs/batch", id: "createJobs", tag: "jobs", summary: "Submit many jobs",
		description: "1 to 1000 jobs, 8 MiB in all. Each stands for itself: it is created or refused as by createJob, whatever becomes of the others, " +
			"and `items` has one entry for each, in the order of the request. The answer is 200 whenever the jobs were looked at, also where some or all were refused: look at `failed`. " +
			"Only where nothing was created and every job was refused for one reason that passes (429 or 503), the whole call is answered with that. " +
			"An Idempotency-Key holds for the whole batch: repeating the call creates what is missing and returns the rest.",
		body: api.BatchRequest{}, rules: bodyRules{limit: maxBatchBody, parts: true}, waits: true, errors: []int{429},
	}, s.createJobs)
	add(o, route{
		method: "POST", path: "/api/jobs/cancel-batch", id: "cancelJobs", tag: "jobs", summary: "Cancel all jobs that match",
		description: "Cancels the caller's live jobs that match every filter that is given; at least one must be. Finds jobs that were created a moment ago, too. " +
			"One call cancels up to 1000 jobs and says with `more` that it should be sent again. Jobs that are being canceled already match only where `status` names `canceling`. May be repeated.",
		body: api.CancelBatchRequest{}, waits: true, errors: []int{403},
	}, s.cancelJobs)
	add(o, route{
		method: "GET", path: "/api/jobs", id: "listJobs", tag: "jobs", summary: "List jobs",
		description: "Newest first. Users see their own jobs, admins those of everybody.",
	}, s.listJobs)
	add(o, route{
		method: "GET", path: "/api/jobs/{jobId}", id: "getJob", tag: "jobs", summary: "Get a job", errors: []int{404},
	}, s.getJob)
	add(o, route{
		method: "GET", path: "/api/jobs/{jobId}/logs", id: "jobLogs", tag: "jobs", summary: "Read or follow a job's output",
		description: "JSON pages; with follow=true server-sent events `output` and, when the job has ended, `end`. The id of an event is attempt-seq: send it back as Last-Event-ID to go on after it.",
		streams: map[string]string{
			"text/plain": "The bytes, in order. By Accept or format=text; with follow=true as they come. The header or trailer Log-Complete says whether everything that was printed is there, " +
				"Log-Truncated-Bytes how much was not kept. Range is honoured once everything is stored: 206.",
			"text/event-stream": "With follow=true.",
		},
		waits: true, errors: []int{404, 416},
	}, s.jobLogs)
	add(o, route{
		method: "GET", path: "/api/jobs/{jobId}/events", id: "jobEvents", tag: "jobs", summary: "Follow a job's state",
		description: "Server-sent events `state`, the present one first; the stream ends after a terminal state.",
		waits:       true, errors: []int{404},
	}, s.jobEvents)
	add(o, route{
		method: "GET", path: "/api/jobs/events", id: "events", tag: "jobs", summary: "Follow the states of all jobs",
		description: "Server-sent events `state` for every change of the caller's jobs (admins: everybody's), until the client goes away or its token expires. " +
			"The event `ready` says that everything that happens from now on will be sent. With Last-Event-ID it comes after the newest state of each job that changed since; " +
			"states in between are left out, and jobs that ended while nobody listened may have left the live jobs: ask for those that you knew as live and hear nothing of. " +
			"With `gap` in its data nothing could be sent for the time before: list your jobs. A client that reads too slowly is sent `overflow` and cut off; it may go on with Last-Event-ID. A state may come twice: its version says so.",
		waits: true,
	}, s.allEvents)
	add(o, route{
		method: "GET", path: "/api/jobs/{jobId}/explain", id: "explainJob", tag: "jobs", summary: "Explain where a job is, and why", errors: []int{404},
	}, s.explainJob)
	add(o, route{
		method: "POST", path: "/api/execute", id: "execute", tag: "jobs", summary: "Submit a job and wait for its end",
		description: "Answers with exit code and output. With Accept: text/event-stream the output comes as it is printed, by events `output` and `end`.",
		body:        job.Spec{}, rules: bodyRules{yaml: true}, waits: true, streams: map[string]string{"text/event-stream": "With Accept: text/event-stream."},
		errors: []int{429, 504},
	}, s.execute)
	add(o, route{
		method: "GET", path: "/api/workers/list", id: "listWorkers", tag: "workers", summary: "List workers with their load",
	}, s.listWorkers)
	add(o, route{
		method: "POST", path: "/api/workers/drain", id: "drainWorker", tag: "workers", summary: "Take a worker out of service, or back in",
		access: accessAdmin, body: drainRequest{}, errors: []int{403, 404},
	}, s.drainWorker)
	add(o, route{
		method: "GET", path: "/api/health", id: "health", tag: "server", summary: "Whether the server answers", access: accessOpen,
	}, s.health)
	add(o, route{
		method: "GET", path: "/api/info", id: "info", tag: "server", summary: "Version and durability", access: accessOpen,
	}, s.info)
}

type operations struct {
	s        *Service
	d        *document
	waits    map[string]bool
	examples map[string]example
}

// add registers one operation. The input struct declares parameters only, all
// of string kinds: huma then refuses nothing by itself, and whatever is refused
// is refused in the form of this API.
func add[I, O any](o *operations, rt route, h func(ctx context.Context, c *call, in *I) (*O, error)) {
	g := &guard{s: o.s, access: rt.access}
	if rt.body != nil {
		g.body = &rt.rules
		g.body.limit = cmp.Or(g.body.limit, maxBody)
	}
	op := o.d.operation(rt)
	op.Middlewares = huma.Middlewares{g.middleware}
	huma.Register(o.d.api, op, func(ctx context.Context, in *I) (*O, error) {
		out, err := h(ctx, callFrom(ctx), in)
		if err != nil {
			return nil, failure{o.s.problemOf(ctx, err)}
		}
		return out, nil
	})
	g.params = o.d.describe(rt, o.examples[rt.id])
	if rt.waits {
		o.waits[rt.method+" "+rt.path] = true
	}
}

// document builds the OpenAPI document beside the routes.
type document struct {
	api  huma.API
	ids  []string // of the operations, in their order
	errs []error
}

func newDocument(adapter huma.Adapter) *document {
	registry := huma.NewMapRegistry("#/components/schemas/", schemaName)
	registry.RegisterTypeAlias(reflect.TypeFor[job.Command](), reflect.TypeFor[commandSchema]())
	registry.RegisterTypeAlias(reflect.TypeFor[job.State](), reflect.TypeFor[stateSchema]())
	json := huma.Format{Marshal: writeJSON, Unmarshal: json.Unmarshal}
	cfg := huma.Config{
		OpenAPI: &huma.OpenAPI{
			OpenAPI: "3.1.0",
			Info: &huma.Info{
				Title: "Command Executor", Version: api.Version,
				Description: "Runs shell commands on workers, and never loses one. Every error is an application/problem+json with a stable `code`. " +
					"The routes of workers are served by the worker edge; docs/protocol.md says how they work together.",
				License: &huma.License{Name: "MIT", Identifier: "MIT"},
			},
			Components: &huma.Components{
				Schemas: registry,
				SecuritySchemes: map[string]*huma.SecurityScheme{
					"bearer": {Type: "http", Scheme: "bearer", BearerFormat: "JWT", Description: "A token from: cmdexec token user"},
				},
			},
			Tags: []*huma.Tag{{Name: "jobs"}, {Name: "workers"}, {Name: "server"}, {Name: tagProtocol}},
		},
		Formats:       map[string]huma.Format{"application/json": json, "json": json},
		DefaultFormat: "application/json",
		// No OpenAPIPath: huma's handler builds the text on first use without a lock.
	}
	return &document{api: huma.NewAPI(cfg, adapter)}
}

func (d *document) operation(rt route) huma.Operation {
	op := huma.Operation{
		OperationID: rt.id, Method: rt.method, Path: rt.path, Summary: rt.summary, Description: rt.description,
		Tags: []string{rt.tag}, DefaultStatus: rt.status,
		SkipValidateParams: true, SkipValidateBody: true,
		Responses: map[string]*huma.Response{},
	}
	if rt.access != accessOpen {
		op.Security = []map[string][]string{{"bearer": {}}}
	}
	return op
}

// describe completes the document of an operation that huma has registered, and
// returns its query parameters.
func (d *document) describe(rt route, ex example) map[string]bool {
	registry := d.api.OpenAPI().Components.Schemas
	item := d.api.OpenAPI().Paths[rt.path]
	op := item.Get
	if rt.method == http.MethodPost {
		op = item.Post
	}
	// Set after registration: with it huma would read and decode the body by itself.
	if rt.body != nil {
		op.RequestBody = &huma.RequestBody{Required: true, Content: map[string]*huma.MediaType{
			"application/json": {Schema: registry.Schema(reflect.TypeOf(rt.body), true, "")},
		}}
		if rt.rules.yaml {
			op.RequestBody.Content["application/yaml"] = &huma.MediaType{Schema: registry.Schema(reflect.TypeOf(rt.body), true, "")}
		}
	}
	problems := map[int]bool{400: true, 503: true, 500: true}
	if rt.access != accessOpen {
		problems[401], problems[429] = true, true
	}
	if rt.body != nil {
		problems[413], problems[415], problems[422] = true, true, true
	}
	for _, code := range rt.errors {
		problems[code] = true
	}
	delete(op.Responses, "default")
	for code := range problems {
		op.Responses[fmt.Sprint(code)] = &huma.Response{Description: http.StatusText(code), Content: map[string]*huma.MediaType{
			httpkit.ProblemContentType: {Schema: registry.Schema(reflect.TypeFor[api.Problem](), true, ""), Example: exampleProblem(code)},
		}}
	}
	success := op.Responses[fmt.Sprint(max(rt.status, http.StatusOK))]
	for code, text := range rt.also {
		op.Responses[fmt.Sprint(code)] = &huma.Response{Description: text, Content: success.Content, Headers: success.Headers}
	}
	if success.Content == nil {
		success.Content = map[string]*huma.MediaType{}
	}
	switch rt.id { // handlers that write by themselves
	case "jobLogs":
		success.Content["application/json"] = &huma.MediaType{Schema: registry.Schema(reflect.TypeFor[api.Logs](), true, "")}
	case "createJobs":
		success.Content["application/json"] = &huma.MediaType{Schema: registry.Schema(reflect.TypeFor[api.BatchResult](), true, "")}
	case "cancelJobs":
		success.Content["application/json"] = &huma.MediaType{Schema: registry.Schema(reflect.TypeFor[api.CancelBatchResult](), true, "")}
	case "execute":
		success.Content["application/json"] = &huma.MediaType{Schema: registry.Schema(reflect.TypeFor[api.ExecuteResult](), true, "")}
	case "events":
		success.Content["text/event-stream"] = &huma.MediaType{Schema: &huma.Schema{
			Type: huma.TypeString, Description: "Events `state`, each with a StateEvent as data, and `ready` and `overflow` with a StreamPoint.",
		}}
		registry.Schema(reflect.TypeFor[api.StreamPoint](), true, "")
	case "jobEvents":
		success.Content["text/event-stream"] = &huma.MediaType{Schema: &huma.Schema{
			Type: huma.TypeString, Description: "Events `state`, each with a StateEvent as data.",
		}}
		registry.Schema(reflect.TypeFor[api.StateEvent](), true, "")
	}
	for media, text := range rt.streams {
		success.Content[media] = &huma.MediaType{Schema: &huma.Schema{Type: huma.TypeString, Description: text}}
	}
	if _, ok := rt.streams["text/event-stream"]; ok {
		registry.Schema(reflect.TypeFor[api.LogItem](), true, "")
		registry.Schema(reflect.TypeFor[api.Job](), true, "")
	}
	d.ids = append(d.ids, rt.id)
	if err := exemplify(op, fmt.Sprint(max(rt.status, http.StatusOK)), ex); err != nil {
		d.errs = append(d.errs, err)
	}
	params := map[string]bool{}
	for _, p := range op.Parameters {
		if p.In == "query" {
			params[p.Name] = p.Explode != nil && *p.Explode
		}
	}
	return params
}

// finish returns the document as JSON.
func (d *document) finish() ([]byte, error) {
	if err := errors.Join(d.errs...); err != nil {
		return nil, err
	}
	schemas := d.api.OpenAPI().Components.Schemas.Map()
	// huma registers its own error type, which this API never sends.
	delete(schemas, "ErrorModel")
	delete(schemas, "ErrorDetail")
	for _, s := range schemas {
		notNullable(s)
	}
	return json.Marshal(d.api.OpenAPI())
}

// notNullable corrects huma's default for slices: here they are left out or
// empty, never null.
func notNullable(s *huma.Schema) {
	if s == nil {
		return
	}
	if s.Type == huma.TypeArray {
		s.Nullable = false
	}
	notNullable(s.Items)
	for _, p := range s.Properties {
		notNullable(p)
	}
	if more, ok := s.AdditionalProperties.(*huma.Schema); ok {
		notNullable(more)
	}
}

// commandSchema stands for job.Command in the document.
type commandSchema struct{}

// Schema describes the two forms of a command.
func (commandSchema) Schema(huma.Registry) *huma.Schema {
	least := 1
	return &huma.Schema{
		Description: "A string is run by /bin/sh -c; an array is run as it is, without a shell.",
		OneOf: []*huma.Schema{
			{Type: huma.TypeString, MinLength: &least},
			{Type: huma.TypeArray, MinItems: &least, Items: &huma.Schema{Type: huma.TypeString}},
		},
		Examples: []any{"echo hello", []string{"echo", "hello"}},
	}
}

// stateSchema stands for job.State in the document.
type stateSchema struct{}

// Schema lists the states.
func (stateSchema) Schema(huma.Registry) *huma.Schema {
	s := &huma.Schema{Type: huma.TypeString}
	for _, state := range job.States() {
		s.Enum = append(s.Enum, string(state))
	}
	return s
}

// jobPath is the input of the routes of one job.
type jobPath struct {
	JobID string `path:"jobId" doc:"The job's id." example:"job-01jd2xw8q3v5k7m9n1p3r5t7v9"`
}

// checkJobID keeps whatever is no job id away from subjects, keys and queries.
// The router hands the fixed names beside {jobId} to these handlers when they
// are asked for with GET; they are not ids, and routes of their own.
func checkJobID(jobID string) error {
	switch jobID {
	case "create", "cancel", "rerun", "batch", "cancel-batch":
		return &httpkit.Problem{Status: http.StatusMethodNotAllowed, Code: codeMethod, Detail: "this route does not have this method", Hint: "use POST"}
	case "get-job", "submit-result", "stream-output", "check-cancel":
		return &httpkit.Problem{Status: http.StatusNotFound, Code: codeNotFound, Detail: "this route is for workers and is not served here"}
	}
	if id.Check(id.Job, jobID) != nil {
		return &httpkit.Problem{
			Status: http.StatusBadRequest, Code: codeBadJobID, Detail: "this is not a job id",
			Hint:   "a job id is job- followed by 26 lower-case letters and digits",
			Errors: []httpkit.FieldError{{Field: "jobId", Code: job.CodeInvalid}},
		}
	}
	return nil
}

var buffers = sync.Pool{New: func() any { return new(jsonBuffer) }}

type jsonBuffer struct{ data []byte }

func (b *jsonBuffer) Write(p []byte) (int, error) {
	b.data = append(b.data, p...)
	return len(p), nil
}

// writeJSON sends v in one write, and takes a client that is gone for granted.
func writeJSON(w io.Writer, v any) error {
	b := buffers.Get().(*jsonBuffer)
	defer func() {
		if cap(b.data) <= 1<<20 {
			b.data = b.data[:0]
			buffers.Put(b)
		}
	}()
	enc := json.NewEncoder(b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return fmt.Errorf("encode response: %w", err)
	}
	_, _ = w.Write(b.data)
	return nil
}

// accepts reports whether the request's Accept header names the media type.
// Preferences by q are not weighed: the two streaming forms are asked for by name.
func accepts(accept, media string) bool {
	return slices.ContainsFunc(strings.Split(accept, ","), func(part string) bool {
		name, _, _ := strings.Cut(part, ";")
		return strings.EqualFold(strings.TrimSpace(name), media)
	})
}
