package gateway

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/fleet"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/kit/auth"
)

// schema is the part of JSON Schema that the document uses. A keyword that is
// not listed fails the test: the check would be blind to it.
type schema map[string]any

func (d *openAPI) check(s schema, v any, at string) error {
	if ref, ok := s["$ref"].(string); ok {
		name := strings.TrimPrefix(ref, "#/components/schemas/")
		target, ok := d.Components.Schemas[name]
		if !ok {
			return fmt.Errorf("%s: no schema %s", at, name)
		}
		return d.check(target, v, at)
	}
	for key := range s {
		if !slices.Contains([]string{
			"type", "properties", "required", "items", "enum", "oneOf", "additionalProperties", "minimum", "maximum", "minItems", "maxItems",
			"minLength", "description", "format", "examples", "contentEncoding", "nullable", "$schema",
		}, key) {
			return fmt.Errorf("%s: the keyword %s is not known to this test", at, key)
		}
	}
	if alternatives, ok := s["oneOf"].([]any); ok {
		fits := 0
		for _, a := range alternatives {
			if d.check(a.(map[string]any), v, at) == nil {
				fits++
			}
		}
		if fits != 1 {
			return fmt.Errorf("%s: fits %d of the alternatives", at, fits)
		}
		return nil
	}
	types := []any{s["type"]}
	if list, ok := s["type"].([]any); ok {
		types = list
	}
	if !slices.ContainsFunc(types, func(t any) bool { return t == nil || isType(t.(string), v) }) {
		return fmt.Errorf("%s: %T is not %v", at, v, types)
	}
	if enum, ok := s["enum"].([]any); ok && !slices.Contains(enum, v) {
		return fmt.Errorf("%s: %v is none of %v", at, v, enum)
	}
	switch v := v.(type) {
	case float64:
		if least, ok := s["minimum"].(float64); ok && v < least {
			return fmt.Errorf("%s: %v is too small", at, v)
		}
		if most, ok := s["maximum"].(float64); ok && v > most {
			return fmt.Errorf("%s: %v is too large", at, v)
		}
	case string:
		if s["format"] == "date-time" {
			if _, err := time.Parse(time.RFC3339Nano, v); err != nil {
				return fmt.Errorf("%s: %w", at, err)
			}
		}
	case []any:
		items, _ := s["items"].(map[string]any)
		for i, item := range v {
			if err := d.check(items, item, fmt.Sprintf("%s[%d]", at, i)); err != nil {
				return err
			}
		}
	case map[string]any:
		required, _ := s["required"].([]any)
		for _, name := range required {
			if _, ok := v[name.(string)]; !ok {
				return fmt.Errorf("%s: %s is missing", at, name)
			}
		}
		properties, _ := s["properties"].(map[string]any)
		more, open := s["additionalProperties"].(map[string]any)
		for name, value := range v {
			below, known := properties[name].(map[string]any)
			if !known {
				if !open {
					return fmt.Errorf("%s.%s is not in the document", at, name)
				}
				below = more
			}
			if err := d.check(below, value, at+"."+name); err != nil {
				return err
			}
		}
	}
	return nil
}

func isType(name string, v any) bool {
	switch v := v.(type) {
	case nil:
		return name == "null"
	case bool:
		return name == "boolean"
	case float64:
		return name == "number" || name == "integer" && v == math.Trunc(v)
	case string:
		return name == "string"
	case []any:
		return name == "array"
	default:
		return name == "object"
	}
}

type mediaTypes map[string]struct {
	Schema  schema
	Example any
}

type operation struct {
	OperationID string
	Tags        []string
	Security    []any
	Parameters  []struct {
		Name, In string
		Required bool
		Schema   schema
		Example  any
	}
	RequestBody struct{ Content mediaTypes }
	Responses   map[string]struct{ Content mediaTypes }
}

type openAPI struct {
	Paths      map[string]map[string]operation
	Components struct{ Schemas map[string]schema }
}

func (e *env) openAPI() *openAPI {
	e.Helper()
	var doc openAPI
	require.NoError(e, json.Unmarshal(e.do("GET", openAPIPath, "", "").body, &doc))
	return &doc
}

// works plays the scheduler and a worker: every job that waits is run at once.
func (e *env) works(ctx context.Context) (ran *atomic.Int64) {
	ran = &atomic.Int64{}
	done := make(chan struct{})
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			var ids []string
			_ = e.conn.Registry().Scan(ctx, func(entry bus.Entry) error {
				if entry.Record.State == job.Queued {
					ids = append(ids, entry.Record.ID)
				}
				return nil
			})
			for _, jobID := range ids {
				e.store.archive(jobID, 1, chunk(1, stdout, "hello\n"))
				for _, ev := range []job.Event{
					job.Assign{WorkerID: "w1", LeaseID: lease(1).LeaseID},
					job.Start{Fence: lease(1), StartedAt: time.Now()},
					ended(1, job.OutcomeSucceeded, 0, &job.Manifest{Chunks: 1, Bytes: 6}),
				} {
					if _, err := e.conn.Registry().Transition(ctx, jobID, ev); err != nil {
						break // canceled meanwhile
					}
				}
				ran.Add(1)
			}
			select {
			case <-ctx.Done():
			case <-time.After(5 * time.Millisecond):
			}
		}
	}()
	e.Cleanup(func() { cancel(); <-done })
	return ran
}

// TestExamples runs each example of the document against the gateway, as it
// stands there but for the names of the job and the worker. What comes back is
// what the document says, and so are the examples of what comes back.
func TestExamples(t *testing.T) {
	e := start(t, nil)
	require.NoError(t, e.conn.Workers().Put(t.Context(), fleet.Worker{ID: "worker-1", OS: "linux", Arch: "amd64", Slots: 1}))
	e.sched.set(func(s *scheduler) {
		s.workers = []busmsg.WorkerState{{Worker: fleet.Worker{ID: "worker-1", OS: "linux", Arch: "amd64", Slots: 1}, Status: fleet.StatusIdle, FreeSlots: 1}}
	})
	ran := e.works(t.Context())
	jobID := e.create("root")
	eventually(t, "the job ended", func() bool { return ran.Load() > 0 })
	rec, err := e.conn.Registry().GetLatest(t.Context(), jobID)
	require.NoError(t, err)
	e.store.put(rec.Record)
	root := token(t, "root", auth.RoleAdmin)
	doc := e.openAPI()
	real := func(text string) string {
		return strings.NewReplacer(exampleJob, jobID, exampleWorker, "worker-1").Replace(text)
	}
	ids := map[string]bool{}
	examples := 0
	for path, methods := range doc.Paths {
		for method, op := range methods {
			require.False(t, ids[op.OperationID], "two operations are called %s", op.OperationID)
			if slices.Contains(op.Tags, tagProtocol) {
				continue // the edge's
			}
			ids[op.OperationID] = true
			target, query := path, url.Values{}
			for _, p := range op.Parameters {
				require.True(t, !p.Required || p.Example != nil || p.In == "header", "%s: the example lacks %s", op.OperationID, p.Name)
				switch example := p.Example.(type) {
				case nil:
				case []any:
					for _, one := range example {
						query.Add(p.Name, fmt.Sprint(one))
					}
				default:
					if p.In == "path" {
						target = strings.ReplaceAll(target, "{"+p.Name+"}", real(fmt.Sprint(example)))
					} else {
						query.Set(p.Name, real(fmt.Sprint(example)))
					}
				}
			}
			require.NotContains(t, target, "{")
			if len(query) > 0 {
				target += "?" + query.Encode()
			}
			tok := root
			if len(op.Security) == 0 {
				tok = ""
			}
			success := ""
			for code, answer := range op.Responses {
				if code < "400" && (success == "" || code > success) {
					success = code // the newer one of 200 and 201: nothing was replayed
				}
				for media, content := range answer.Content {
					require.NotNil(t, content.Example, "%s %s %s", op.OperationID, code, media)
					if strings.HasSuffix(media, "json") {
						require.NoError(t, doc.check(content.Schema, content.Example, op.OperationID+" "+code))
					}
				}
			}
			bodies := map[string]string{"": ""}
			for media, content := range op.RequestBody.Content {
				require.NotNil(t, content.Example, "%s: %s", op.OperationID, media)
				delete(bodies, "")
				if text, ok := content.Example.(string); ok {
					bodies[media] = text
					continue
				}
				require.NoError(t, doc.check(content.Schema, content.Example, op.OperationID))
				text, err := json.Marshal(content.Example)
				require.NoError(t, err)
				bodies[media] = string(text)
			}
			for bodyMedia, body := range bodies {
				for media, content := range op.Responses[success].Content {
					examples++
					e.runExample(doc, op, strings.ToUpper(method), target, tok, bodyMedia, real(body), success, media, content.Schema)
				}
			}
		}
	}
	require.Greater(t, examples, 20)
}

func (e *env) runExample(doc *openAPI, op operation, method, target, tok, bodyMedia, body, success, media string, want schema) {
	e.Helper()
	name := fmt.Sprintf("%s %s -> %s", method, target, media)
	if op.OperationID == "jobLogs" && media == "text/event-stream" {
		target += "&follow=true"
		target = strings.Replace(target, "logs&", "logs?", 1)
	}
	req, err := http.NewRequestWithContext(e.Context(), method, e.base+target, strings.NewReader(body))
	require.NoError(e, err)
	if tok != "" {
		req.Header.Set("Authorization", "Bearer "+tok)
	}
	if bodyMedia != "" {
		req.Header.Set("Content-Type", bodyMedia)
	}
	req.Header.Set("Accept", media)
	resp, err := e.http.Do(req)
	require.NoError(e, err, name)
	defer func() { _ = resp.Body.Close() }()
	got, _, _ := strings.Cut(resp.Header.Get("Content-Type"), ";")
	if fmt.Sprint(resp.StatusCode) != success || got != media {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
		e.Fatalf("%s: %d %s %s", name, resp.StatusCode, got, text)
	}
	if op.OperationID == "events" { // does not end
		lines := bufio.NewScanner(resp.Body)
		require.True(e, lines.Scan() && strings.HasPrefix(lines.Text(), "id: ") && lines.Scan(), name)
		require.Equal(e, "event: ready", lines.Text())
		return
	}
	text, err := io.ReadAll(resp.Body)
	require.NoError(e, err, name)
	switch media {
	case "application/json":
		var v any
		require.NoError(e, json.Unmarshal(text, &v), name)
		require.NoError(e, doc.check(want, v, name))
	case "text/event-stream":
		require.Contains(e, string(text), "event: ", name)
	default:
		require.Equal(e, "hello\n", string(text), name)
	}
}
