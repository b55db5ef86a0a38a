package client

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"path"
	"strconv"
	"strings"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/api"
	"github.com/cmdexec/cmdexec/libs/core/job"
)

const (
	// silence is how long a stream may say nothing before it counts as broken.
	// The server says something every 15 seconds.
	silence = 45 * time.Second
	// maxEvent bounds one event: a whole job fits.
	maxEvent = 8 << 20
)

// Position is a place in a job's output: after the item with this seq of this
// attempt. The zero value is the beginning of the newest attempt.
type Position struct {
	Attempt int
	Seq     int64
}

func (p Position) String() string {
	return strconv.Itoa(p.Attempt) + "-" + strconv.FormatInt(p.Seq, 10)
}

// Item is one piece of output.
type Item struct {
	Attempt int
	api.LogItem
}

// Bytes is what the command printed.
func (i *Item) Bytes() []byte {
	if i.Data != "" {
		return []byte(i.Data)
	}
	return i.DataBase64
}

// Follow hands on a job's output from a position, as it comes, each piece once
// and in order, attempt after attempt, and returns the job when it has ended.
// A broken connection is resumed after the last piece that was seen.
func (c *Client) Follow(ctx context.Context, jobID string, from Position, handle func(Item)) (api.Job, error) {
	return c.outputOf(ctx, func(ctx context.Context) (*http.Response, error) {
		return c.openOutput(ctx, jobID, from)
	}, true, &from, handle)
}

func (c *Client) openOutput(ctx context.Context, jobID string, from Position) (*http.Response, error) {
	rq := request{method: http.MethodGet, path: jobPath(jobID, "/logs"), query: url.Values{"follow": {"true"}}, header: eventHeader()}
	if from.Attempt > 0 {
		rq.header.Set("Last-Event-Id", from.String())
	}
	return c.send(ctx, rq, nil)
}

func eventHeader() http.Header { return http.Header{"Accept": {"text/event-stream"}} }

// outputOf reads a stream of output events to its end.
func (c *Client) outputOf(ctx context.Context, open opener, again bool, at *Position, handle func(Item)) (api.Job, error) {
	var ended *api.Job
	err := c.resume(ctx, open, again, func(e event) (bool, error) {
		switch e.name {
		case "output":
			attempt, _, ok := strings.Cut(e.id, "-")
			item := Item{}
			var err error
			if item.Attempt, err = strconv.Atoi(attempt); err != nil || !ok {
				return false, errors.New("an output event has no usable id")
			}
			if err := json.Unmarshal(e.data, &item.LogItem); err != nil {
				return false, fmt.Errorf("read output event: %w", err)
			}
			*at = Position{Attempt: item.Attempt, Seq: item.Seq}
			handle(item)
		case "end":
			ended = &api.Job{}
			if err := json.Unmarshal(e.data, ended); err != nil {
				return false, fmt.Errorf("read end event: %w", err)
			}
			return true, nil
		}
		return false, nil
	})
	if err != nil {
		return api.Job{}, err
	}
	return *ended, nil
}

// Events hands on a job's states, the present one first, until it has ended. A
// state may be left out where the next one came at once. A broken connection is
// resumed; states that were seen are not repeated.
func (c *Client) Events(ctx context.Context, jobID string, handle func(api.StateEvent)) error {
	var seen uint64
	return c.resume(ctx, func(ctx context.Context) (*http.Response, error) {
		return c.send(ctx, request{method: http.MethodGet, path: jobPath(jobID, "/events"), header: eventHeader()}, nil)
	}, true, func(e event) (bool, error) {
		if e.name != "state" {
			return false, nil
		}
		var s api.StateEvent
		if err := json.Unmarshal(e.data, &s); err != nil {
			return false, fmt.Errorf("read state event: %w", err)
		}
		if s.Version > seen {
			seen = s.Version
			handle(s)
		}
		return s.Status.Terminal(), nil
	})
}

// WatchOptions are the choices of Watch. Zero fields do not filter.
type WatchOptions struct {
	Queue  string
	Labels map[string]string
	// From is where to go on: an Event's ID. Empty: from now on.
	From string
	// Ready, if not nil, is called when everything that happens from now on will be
	// handed on: once for each connection. With Gap in it, changes before it may be
	// missing: read the jobs that matter.
	Ready func(api.StreamPoint)
}

// Event is a state of a job and its place among all changes.
type Event struct {
	ID string
	api.StateEvent
}

// Watch hands on every change of the state of the caller's jobs (of an admin's
// all jobs) until ctx ends, with its error, or the connection is lost for longer
// than Options.ResumeFor. A broken connection is resumed: the newest state of each
// job that changed meanwhile comes then, but a job that has ended may have left
// the live jobs and is not heard of again: ask for those that you wait for. A
// state may come twice.
func (c *Client) Watch(ctx context.Context, o WatchOptions, handle func(Event)) error {
	q := url.Values{}
	set(q, "queue", o.Queue)
	for k, v := range o.Labels {
		q.Add("label", k+":"+v)
	}
	at := o.From
	open := func(ctx context.Context) (*http.Response, error) {
		header := eventHeader()
		if at != "" {
			header.Set("Last-Event-Id", at)
		}
		return c.send(ctx, request{method: http.MethodGet, path: "/api/jobs/events", query: q, header: header}, nil)
	}
	return c.resume(ctx, open, true, func(e event) (bool, error) {
		switch e.name {
		case "ready":
			var p api.StreamPoint
			if err := json.Unmarshal(e.data, &p); err != nil {
				return false, fmt.Errorf("read ready event: %w", err)
			}
			at = e.id
			if o.Ready != nil {
				o.Ready(p)
			}
		case "state":
			ev := Event{ID: e.id}
			if err := json.Unmarshal(e.data, &ev.StateEvent); err != nil {
				return false, fmt.Errorf("read state event: %w", err)
			}
			at = e.id
			handle(ev)
		}
		return false, nil // after an overflow the server ends the stream, and it is resumed
	})
}

// ExecuteStream submits a job and hands on its output as it comes; it returns the
// job when it has ended. Without Leave, a client that goes away cancels the job,
// and so does a broken connection: the stream is resumed only with Leave.
func (c *Client) ExecuteStream(ctx context.Context, spec job.Spec, o ExecuteOptions, handle func(Item)) (api.Job, error) {
	payload, err := encode(spec)
	if err != nil {
		return api.Job{}, err
	}
	q := url.Values{}
	if o.Leave {
		q.Set("onDisconnect", "leave")
	}
	header := keyHeader(o.IdempotencyKey)
	header.Set("Accept", "text/event-stream")
	jobID := ""
	at := Position{}
	return c.outputOf(ctx, func(ctx context.Context) (*http.Response, error) {
		if jobID != "" {
			return c.openOutput(ctx, jobID, at)
		}
		resp, err := c.send(ctx, request{method: http.MethodPost, path: "/api/execute", query: q, header: header}, payload)
		if err == nil {
			jobID = path.Base(resp.Header.Get("Location"))
		}
		return resp, err
	}, o.Leave, &at, handle)
}

// opener opens a stream of events; ctx must be that of the request.
type opener func(ctx context.Context) (*http.Response, error)

// resume reads events until handle says that it is done, over as many
// connections as that takes if again is true, else over one.
func (c *Client) resume(ctx context.Context, open opener, again bool, handle func(event) (done bool, err error)) error {
	good := time.Now() // when the server was last heard
	connected := false
	for try := 1; ; try++ {
		heard, done, err := c.events(ctx, open, handle)
		if heard {
			good, try, connected = time.Now(), 1, true
		}
		switch {
		case done:
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case !passing(err), !connected && (!again || try >= c.o.Tries), connected && !again, time.Since(good) > c.o.ResumeFor:
			return err
		}
		if err := sleep(ctx, pause(try, err)); err != nil {
			return err
		}
	}
}

// events reads one connection. heard reports whether the server sent an event;
// the error says why the stream ended, also where it did so without a word.
func (c *Client) events(ctx context.Context, open opener, handle func(event) (bool, error)) (heard, done bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	watch := time.AfterFunc(silence, cancel)
	defer watch.Stop()
	resp, err := open(ctx)
	if err != nil {
		return false, false, err
	}
	defer func() { _ = resp.Body.Close() }()
	r := eventReader{r: bufio.NewReaderSize(resp.Body, 64<<10), heard: func() { heard = true; watch.Reset(silence) }}
	for {
		e, err := r.next()
		if err != nil {
			return heard, false, &transportError{fmt.Errorf("the stream broke: %w", err)}
		}
		if done, err := handle(e); done || err != nil {
			return heard, done, err
		}
	}
}

// event is one server-sent event.
type event struct {
	id, name string
	data     []byte
}

// eventReader reads a text/event-stream.
type eventReader struct {
	r     *bufio.Reader
	heard func() // called for each line
}

var errTooLong = errors.New("an event is too long")

// next returns the next event that has data. The error is io.ErrUnexpectedEOF
// where the stream ends.
func (r *eventReader) next() (event, error) {
	e := event{}
	hasData := false
	for {
		line, err := r.line()
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return event{}, err
		}
		r.heard()
		if len(line) == 0 {
			if hasData {
				return e, nil
			}
			e = event{}
			continue
		}
		field, value, _ := bytes.Cut(line, []byte{':'})
		value = bytes.TrimPrefix(value, []byte{' '})
		switch string(field) {
		case "id":
			e.id = string(value)
		case "event":
			e.name = string(value)
		case "data":
			if hasData {
				e.data = append(e.data, '\n')
			}
			e.data, hasData = append(e.data, value...), true
			if len(e.data) > maxEvent {
				return event{}, errTooLong
			}
		}
	}
}

// line returns the next line without its end.
func (r *eventReader) line() ([]byte, error) {
	var long []byte
	for {
		part, err := r.r.ReadSlice('\n')
		switch {
		case err == nil && long == nil:
			return trimEOL(part), nil
		case err == nil:
			return trimEOL(append(long, part...)), nil
		case errors.Is(err, bufio.ErrBufferFull):
			long = append(long, part...)
			if len(long) > maxEvent {
				return nil, errTooLong
			}
		default:
			return nil, err
		}
	}
}

func trimEOL(line []byte) []byte {
	return bytes.TrimSuffix(bytes.TrimSuffix(line, []byte{'\n'}), []byte{'\r'})
}
