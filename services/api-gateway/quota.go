package gateway

import (
	"context"
	"net/http"
	"sync"
	"time"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/kit/httpkit"
)

const (
	quotaFresh   = time.Second            // how long a count is used
	quotaTimeout = 250 * time.Millisecond // for asking; a create does not wait longer for it
	quotaOwners  = 10_000                 // counts kept
)

// quota limits how many jobs of one owner may wait. It asks the scheduler at
// most once a second per owner and adds what this gateway has let through since,
// so that the limit is passed only by what other gateways create within that
// second. Where nobody can count, everything is allowed: the registry has a limit
// of its own. Safe for concurrent use.
type quota struct {
	most  int // 0: no limit
	count func(ctx context.Context, owner string) (int, error)

	mu     sync.Mutex
	owners map[string]*ownerCount
}

type ownerCount struct {
	at      time.Time     // of the last answer, or of no answer
	known   bool          // there was an answer
	queued  int           // the answer
	since   int           // let through that the answer may not count
	during  int           // the same for the answer that is being waited for
	pending int           // let through, and not yet known to be created
	asked   chan struct{} // closed with the answer; nil while nobody asks
}

func newQuota(most int, count func(context.Context, string) (int, error)) *quota {
	return &quota{most: most, count: count, owners: map[string]*ownerCount{}}
}

// reserve counts a job of owner before it is created, or returns the problem of
// an owner who has too many waiting. done must follow once, and says whether the
// job may exist. It blocks for quotaTimeout at most.
func (q *quota) reserve(ctx context.Context, owner string) (done func(exists bool), problem *httpkit.Problem) {
	if q.most == 0 {
		return func(bool) {}, nil
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	o := q.owners[owner]
	if o == nil {
		q.makeRoom()
		o = &ownerCount{}
		q.owners[owner] = o
	}
	switch {
	case o.asked == nil && time.Since(o.at) >= quotaFresh:
		q.refresh(ctx, owner, o)
	case o.asked != nil && !o.known:
		asked := o.asked
		q.mu.Unlock()
		<-asked // by quotaTimeout
		q.mu.Lock()
	}
	if o.known && o.queued+o.since >= q.most {
		return nil, &httpkit.Problem{
			Status: http.StatusTooManyRequests, Code: codeTooManyQueued, Detail: "too many of your jobs are waiting",
			Hint: "submit again when some have started", RetryAfter: 5 * time.Second,
		}
	}
	o.since++
	o.during++
	o.pending++
	return func(exists bool) {
		q.mu.Lock()
		defer q.mu.Unlock()
		o.pending--
		if !exists {
			o.since--
			o.during--
		}
	}, nil
}

// refresh asks anew. It unlocks q.mu while it waits.
func (q *quota) refresh(ctx context.Context, owner string, o *ownerCount) {
	o.asked = make(chan struct{})
	o.during = o.pending // the answer may be older than they are
	q.mu.Unlock()
	queued, err := q.ask(ctx, owner)
	q.mu.Lock()
	o.at, o.known, o.queued, o.since = time.Now(), err == nil, queued, o.during
	close(o.asked)
	o.asked = nil
}

func (q *quota) ask(ctx context.Context, owner string) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, quotaTimeout)
	defer cancel()
	return q.count(ctx, owner)
}

// makeRoom forgets counts that are not used any more, or all where every one is:
// they are asked for again.
func (q *quota) makeRoom() {
	if len(q.owners) < quotaOwners {
		return
	}
	for owner, o := range q.owners {
		if time.Since(o.at) >= quotaFresh && o.asked == nil && o.pending == 0 {
			delete(q.owners, owner)
		}
	}
	if len(q.owners) >= quotaOwners {
		clear(q.owners)
	}
}

func (s *Service) countQueued(ctx context.Context, owner string) (int, error) {
	counts, err := bus.Query(ctx, s.bus, bus.QueryOwner, busmsg.OwnerCount{Owner: owner})
	return counts.Queued, err
}
