package edgetest

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/workerproto"
)

// Plain is the edge's part over plain HTTP. It hands assignments out, again
// where a heartbeat does not list them, and keeps all that it gets.
type Plain struct {
	t *testing.T

	// Fault is asked for every request, by path and number, and by default does
	// nothing. It must be safe for concurrent use.
	fault func(path string, n int) Fault

	mu       sync.Mutex
	news     chan struct{}
	requests map[string]int
	session  string
	sessions int
	hellos   []workerproto.Register
	beats    []workerproto.Heartbeat
	queue    []workerproto.Assignment
	handed   map[string]workerproto.Assignment
	missing  []string // leases handed over and not listed
	results  []workerproto.Result
	output   map[string]map[int64]string // by lease and seq
	repeats  int                         // chunks that came again
	cancel   []workerproto.Lease
	nudge    bool
	token    string
	tokens   []string
}

// Fault is what goes wrong with one request.
type Fault struct {
	Status int    // answered instead of doing anything
	Code   string // of the problem
	Drop   bool   // everything is done, and the answer lost
}

func newPlain(t *testing.T) *Plain {
	return &Plain{
		t: t, requests: map[string]int{}, news: make(chan struct{}), handed: map[string]workerproto.Assignment{},
		output: map[string]map[int64]string{}, fault: func(string, int) Fault { return Fault{} },
	}
}

// SetFault replaces what goes wrong.
func (p *Plain) SetFault(f func(path string, n int) Fault) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fault = f
}

// Run queues an assignment of a shell command.
func (p *Plain) Run(l workerproto.Lease, command string) {
	p.change(func() {
		p.queue = append(p.queue, workerproto.Assignment{Lease: l, LeaseSeconds: 60, Job: Shell(command)})
	})
}

// Cancel asks for the end of an attempt.
func (p *Plain) Cancel(l workerproto.Lease) {
	p.change(func() { p.cancel, p.nudge = append(p.cancel, l), true })
}

// Renew sends a token with the next heartbeat.
func (p *Plain) Renew(token string) { p.change(func() { p.token = token }) }

// Forget ends the session, as a restart does.
func (p *Plain) Forget() {
	p.change(func() {
		p.session, p.missing = "", nil
		clear(p.handed)
	})
}

func (p *Plain) change(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f()
	close(p.news)
	p.news = make(chan struct{})
}

// Hellos are all registrations so far.
func (p *Plain) Hellos() []workerproto.Register { return look(p, &p.hellos) }

// Beats are all heartbeats so far.
func (p *Plain) Beats() []workerproto.Heartbeat { return look(p, &p.beats) }

// Results are all results so far, repeats too.
func (p *Plain) Results() []workerproto.Result { return look(p, &p.results) }

// Tokens are those of all requests so far.
func (p *Plain) Tokens() []string { return look(p, &p.tokens) }

func look[T any](p *Plain, s *[]T) []T {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(*s)
}

// Requests counts the requests of a route.
func (p *Plain) Requests(path string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.requests[path]
}

// Output is what came of a lease, in order, and whether nothing is missing.
func (p *Plain) Output(l workerproto.Lease) (text string, whole bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	chunks := p.output[l.LeaseID]
	for seq := int64(1); seq <= int64(len(chunks)); seq++ {
		data, ok := chunks[seq]
		if !ok {
			return text, false
		}
		text += data
	}
	return text, true
}

func (p *Plain) serve(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	p.requests[r.URL.Path]++
	n := p.requests[r.URL.Path]
	p.tokens = append(p.tokens, r.Header.Get(workerproto.TokenHeader))
	fault := p.fault
	wrong := p.session == "" || r.Header.Get(workerproto.SessionHeader) != p.session
	p.mu.Unlock()
	f := fault(r.URL.Path, n)
	switch {
	case f.Status != 0:
		refuse(w, f.Status, f.Code)
		return
	case wrong && r.URL.Path != workerproto.PathRegister:
		refuse(w, http.StatusConflict, workerproto.CodeRegisterAgain)
		return
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	if f.Drop {
		w = &deaf{header: http.Header{}}
		defer panic(http.ErrAbortHandler) // the connection breaks
	}
	switch r.URL.Path {
	case workerproto.PathRegister:
		p.register(w, body)
	case workerproto.PathHeartbeat:
		p.heartbeat(w, body)
	case workerproto.PathGetJob:
		p.getJob(w, r)
	case workerproto.PathOutput:
		p.takeOutput(w, body)
	case workerproto.PathResult:
		p.takeResult(w, body)
	default:
		refuse(w, http.StatusNotFound, "not_found")
	}
}

// deaf is where lost answers go.
type deaf struct{ header http.Header }

func (d *deaf) Header() http.Header         { return d.header }
func (d *deaf) Write(b []byte) (int, error) { return len(b), nil }
func (d *deaf) WriteHeader(int)             {}

func refuse(w http.ResponseWriter, status int, code string) {
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(status)
	fmt.Fprintf(w, `{"code":%q,"detail":"the test wants it so"}`, code)
}

func answer(w http.ResponseWriter, body any) { _ = json.NewEncoder(w).Encode(body) }

func (p *Plain) decode(body []byte, into any) {
	if err := json.Unmarshal(body, into); err != nil {
		p.t.Errorf("the worker sent %q: %v", body, err)
	}
}

func (p *Plain) register(w http.ResponseWriter, body []byte) {
	var reg workerproto.Register
	p.decode(body, &reg)
	p.change(func() {
		p.hellos = append(p.hellos, reg)
		p.sessions++
		p.session = "session-" + strconv.Itoa(p.sessions)
		clear(p.handed)
		p.missing = nil
		w.Header().Set(workerproto.SessionHeader, p.session)
	})
	answer(w, workerproto.Welcome{HeartbeatSeconds: 1, LeaseSeconds: 60, Protocol: workerproto.Version})
}

func (p *Plain) heartbeat(w http.ResponseWriter, body []byte) {
	var hb workerproto.Heartbeat
	p.decode(body, &hb)
	beat := workerproto.Beat{ID: hb.ID}
	p.change(func() {
		p.beats = append(p.beats, hb)
		beat.Cancel, p.nudge = p.cancel, false
		beat.Token, p.token = p.token, ""
		for _, l := range hb.Running {
			beat.Confirmed = append(beat.Confirmed, l.LeaseID)
			delete(p.handed, l.LeaseID)
		}
		p.missing = nil
		for id := range p.handed {
			p.missing = append(p.missing, id)
		}
	})
	answer(w, beat)
}

func (p *Plain) getJob(w http.ResponseWriter, r *http.Request) {
	seconds, err := strconv.Atoi(r.URL.Query().Get("waitSeconds"))
	if err != nil || seconds < 1 {
		p.t.Errorf("a poll of %s", r.URL.RawQuery)
	}
	late := time.After(time.Duration(seconds) * time.Second)
	for over := false; ; {
		p.mu.Lock()
		var a *workerproto.Assignment
		if len(p.missing) > 0 {
			again := p.handed[p.missing[0]]
			a, p.missing = &again, p.missing[1:]
		} else if len(p.queue) > 0 {
			next := p.queue[0]
			a, p.queue = &next, p.queue[1:]
			p.handed[a.LeaseID] = next
		}
		nudge, news := p.nudge, p.news
		p.mu.Unlock()
		if nudge {
			w.Header().Set(workerproto.HeartbeatHeader, workerproto.HeartbeatNow)
		}
		if a != nil {
			answer(w, a)
			return
		}
		if nudge || over {
			w.WriteHeader(http.StatusNoContent)
			return
		}
		select {
		case <-news:
		case <-late:
			over = true
		case <-r.Context().Done():
			return
		}
	}
}

func (p *Plain) takeOutput(w http.ResponseWriter, body []byte) {
	var o workerproto.Output
	p.decode(body, &o)
	p.mu.Lock()
	chunks := p.output[o.LeaseID]
	if chunks == nil {
		chunks = map[int64]string{}
		p.output[o.LeaseID] = chunks
	}
	var reply workerproto.OutputReply
	for _, c := range o.Chunks {
		if old, ok := chunks[c.Seq]; ok {
			p.repeats++
			if old != string(c.Data) {
				p.t.Errorf("chunk %d came again as something else", c.Seq)
			}
		}
		chunks[c.Seq] = string(c.Data)
		reply.AckedSeq = c.Seq
	}
	p.mu.Unlock()
	answer(w, reply)
}

func (p *Plain) takeResult(w http.ResponseWriter, body []byte) {
	var res workerproto.Result
	p.decode(body, &res)
	p.change(func() {
		p.results = append(p.results, res)
		delete(p.handed, res.LeaseID)
		p.missing = slices.DeleteFunc(p.missing, func(id string) bool { return id == res.LeaseID })
	})
	answer(w, workerproto.ResultReply{Accepted: true})
}
