package gateway

import (
	"fmt"
	"net/http"
	"reflect"

	"github.com/danielgtaylor/huma/v2"

	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/httpkit"
)

// The routes of workers are in the document, so that it has everything that is
// reached at one address, although the edge serves them: an ingress sends them
// there. docs/protocol.md says how they work together.
const (
	tagProtocol    = "worker protocol"
	securityWorker = "workerToken"
)

// workerRoute is a route of the edge.
type workerRoute struct {
	method, path, id     string
	summary, description string
	query                []string // parameters
	body, answer         any      // values of their types; nil for none
	none                 string   // what 204 means, where there is one
}

var workerRoutes = []workerRoute{
	{
		method: "GET", path: workerproto.PathConnect, id: "connectWorker", summary: "Connect a worker by WebSocket",
		description: "Subprotocol " + workerproto.Subprotocol + ". Everything that the other routes of workers do, over one socket.",
	},
	{
		method: "POST", path: workerproto.PathRegister, id: "registerWorker", summary: "Begin a session over plain HTTP",
		description: "The header " + workerproto.SessionHeader + " of the answer names the session; send it with what follows. running lists every lease that the worker still works on.",
		body:        workerproto.Register{}, answer: workerproto.Welcome{},
	},
	{
		method: "POST", path: workerproto.PathHeartbeat, id: "heartbeat", summary: "Renew leases",
		description: "The answer lists the leases that are confirmed and those that are not the worker's any more, cancels, and whether to take no new work.",
		body:        workerproto.Heartbeat{}, answer: workerproto.Beat{},
	},
	{
		method: "GET", path: workerproto.PathGetJob, id: "getAssignment", summary: "Wait for a job to run",
		description: "A long poll. The worker has free slots only while it polls; what its next heartbeat does not list is handed over again.",
		query:       []string{"workerId", "waitSeconds"}, answer: workerproto.Assignment{}, none: "There was none in time.",
	},
	{
		method: "POST", path: workerproto.PathOutput, id: "streamOutput", summary: "Report output",
		description: "ackedSeq is the last chunk that is stored; keep the others and send them again.",
		body:        workerproto.Output{}, answer: workerproto.OutputReply{},
	},
	{
		method: "GET", path: workerproto.PathCheckCancel, id: "checkCancel", summary: "Ask whether an attempt is to stop",
		query: []string{"workerId", "jobId", "attempt"}, answer: workerproto.CancelReply{},
	},
	{
		method: "POST", path: workerproto.PathResult, id: "submitResult", summary: "Report how an attempt ended",
		description: "May be repeated. A result is accepted only from the worker that holds the lease.",
		body:        workerproto.Result{}, answer: workerproto.ResultReply{},
	},
}

// schemaName keeps types of the worker protocol apart from those of the API.
func schemaName(t reflect.Type, hint string) string {
	name := huma.DefaultSchemaNamer(t, hint)
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	switch {
	case t == reflect.TypeFor[job.Cancel](): // api.Cancel is what users see of it
		return "StopReceipt"
	case t.PkgPath() == reflect.TypeFor[workerproto.Result]().PkgPath():
		return "Worker" + name
	default:
		return name
	}
}

// describeWorkerRoutes adds the routes that the edge serves.
func (d *document) describeWorkerRoutes() {
	doc := d.api.OpenAPI()
	doc.Components.SecuritySchemes[securityWorker] = &huma.SecurityScheme{
		Type: "apiKey", In: "header", Name: workerproto.TokenHeader, Description: "A token from: cmdexec token worker",
	}
	content := func(media string, v any) map[string]*huma.MediaType {
		return map[string]*huma.MediaType{media: {Schema: doc.Components.Schemas.Schema(reflect.TypeOf(v), true, "")}}
	}
	for _, rt := range workerRoutes {
		op := &huma.Operation{
			Method: rt.method, Path: rt.path, OperationID: rt.id, Summary: rt.summary, Description: rt.description, Tags: []string{tagProtocol},
			Security: []map[string][]string{{securityWorker: {}}}, Responses: map[string]*huma.Response{},
		}
		for _, name := range rt.query {
			op.Parameters = append(op.Parameters, &huma.Param{Name: name, In: "query", Schema: &huma.Schema{Type: huma.TypeString}})
		}
		if rt.body != nil {
			op.RequestBody = &huma.RequestBody{Required: true, Content: content("application/json", rt.body)}
		}
		if rt.answer == nil {
			op.Responses["101"] = &huma.Response{Description: "The connection is a WebSocket now."}
		} else {
			op.Responses["200"] = &huma.Response{Description: http.StatusText(http.StatusOK), Content: content("application/json", rt.answer)}
		}
		if rt.none != "" {
			op.Responses["204"] = &huma.Response{Description: rt.none}
		}
		codes := []int{400, 401, 429, 503}
		switch {
		case rt.answer == nil:
			codes = append(codes, http.StatusUpgradeRequired)
		case rt.path != workerproto.PathRegister:
			codes = append(codes, http.StatusForbidden, http.StatusConflict, http.StatusMisdirectedRequest)
		}
		if rt.body != nil {
			codes = append(codes, 413, 415)
		}
		for _, code := range codes {
			op.Responses[fmt.Sprint(code)] = &huma.Response{Description: http.StatusText(code), Content: content(httpkit.ProblemContentType, api.Problem{})}
		}
		doc.AddOperation(op)
		d.ids = append(d.ids, rt.id)
	}
}
