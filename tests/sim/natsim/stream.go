package natsim

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// stream is a stream.
type stream struct {
	s         *Server
	name      string
	subject   string
	config    json.RawMessage
	created   time.Time
	msgs      []Message         // in order of their sequence
	last      map[string]uint64 // by subject
	seq       uint64
	first     uint64
	consumers map[string]*consumer
	graves    map[string]Message // what a crash may bring back, by subject
}

func (st *stream) find(seq uint64) (int, bool) {
	return slices.BinarySearchFunc(st.msgs, seq, func(m Message, seq uint64) int {
		switch {
		case m.Seq < seq:
			return -1
		case m.Seq > seq:
			return 1
		}
		return 0
	})
}

func (st *stream) get(seq uint64) (Message, bool) {
	i, ok := st.find(seq)
	if !ok {
		return Message{}, false
	}
	return st.msgs[i], true
}

// newest is the newest message of a subject.
func (st *stream) newest(subject string) (Message, bool) { return st.get(st.last[subject]) }

// refusal is the JSON of an API error.
func refusal(code, errCode int, description string) []byte {
	return fmt.Appendf(nil, `{"error":{"code":%d,"err_code":%d,"description":%q}}`, code, errCode, description)
}

func (st *stream) publish(subject, reply string, head, data []byte) {
	answer := func(b []byte) {
		if reply != "" {
			st.s.route(reply, "", "", nil, b)
		}
	}
	if want := header(head, "Nats-Expected-Stream"); want != "" && want != st.name {
		answer(refusal(400, 10060, "expected stream does not match"))
		return
	}
	if want := header(head, "Nats-Expected-Last-Subject-Sequence"); want != "" {
		if n, err := strconv.ParseUint(want, 10, 64); err != nil || n != st.last[subject] {
			answer(refusal(400, 10071, fmt.Sprintf("wrong last sequence: %d", st.last[subject])))
			return
		}
	}
	st.seq++
	m := Message{Subject: subject, Seq: st.seq, Data: data, header: head, time: time.Now()}
	if old, ok := st.newest(subject); ok && header(head, "Nats-Rollup") == "sub" {
		st.remove(func(x Message) bool { return x.Subject == subject })
		st.graves[subject] = old
	}
	st.msgs = append(st.msgs, m)
	st.last[subject] = m.Seq
	if st.s.o.Stored != nil {
		st.s.o.Stored(st.name, m)
	}
	answer(fmt.Appendf(nil, `{"stream":%q,"seq":%d}`, st.name, m.Seq))
	st.pump()
}

func (st *stream) pump() {
	for _, name := range sorted(st.consumers) {
		st.consumers[name].pump()
	}
}

// remove takes messages out.
func (st *stream) remove(which func(Message) bool) (removed []Message) {
	st.msgs = slices.DeleteFunc(st.msgs, func(m Message) bool {
		if !which(m) {
			return false
		}
		removed = append(removed, m)
		return true
	})
	for _, m := range removed {
		if st.last[m.Subject] == m.Seq {
			delete(st.last, m.Subject)
		}
	}
	return removed
}

// purge removes what matches filter (all: "") before a sequence.
func (st *stream) purge(filter string, before uint64) int {
	removed := st.remove(func(m Message) bool {
		return m.Seq < before && (filter == "" || matches(filter, m.Subject))
	})
	for _, m := range removed {
		if st.s.o.Purged != nil {
			st.s.o.Purged(st.name, m)
		}
		if _, ok := st.graves[m.Subject]; !ok {
			st.graves[m.Subject] = m
		}
	}
	return len(removed)
}

// crash forgets what is kept in memory only.
func (st *stream) crash() {
	for name, c := range st.consumers {
		if !c.durable {
			delete(st.consumers, name)
			continue
		}
		c.waiting, c.lastActive = nil, time.Time{}
	}
}

// revive brings back purged messages, and has the messages delivered again that
// were not acknowledged in the life before.
func (st *stream) revive(back func(string, Message) bool) {
	for _, subject := range sorted(st.graves) {
		m := st.graves[subject]
		if _, live := st.last[subject]; live || back == nil || !back(st.name, m) {
			continue
		}
		i, _ := st.find(m.Seq)
		st.msgs = slices.Insert(st.msgs, i, m)
		st.last[subject] = m.Seq
	}
	st.graves = map[string]Message{}
	for _, name := range sorted(st.consumers) {
		c := st.consumers[name]
		for _, seq := range c.unacked() {
			c.expire(seq)
		}
	}
}

// consumer is a pull consumer.
type consumer struct {
	st         *stream
	name       string
	config     json.RawMessage
	durable    bool
	filter     string
	explicit   bool
	ackWait    time.Duration
	most       int // unacknowledged; 0: no limit
	created    time.Time
	next       uint64 // the first stream sequence that was not delivered
	lastUpTo   uint64 // up to here only the last message of a subject is delivered
	sent       uint64 // last consumer sequence
	pending    map[uint64]*unacked
	due        []uint64 // to be delivered again
	waiting    []*pull
	lastActive time.Time
}

// unacked is a delivered message that was not acknowledged.
type unacked struct {
	delivered int
	deadline  time.Time
	due       bool
}

// pull is a request for messages.
type pull struct {
	conn  *conn
	inbox string
	left  int
	until time.Time
	beat  time.Duration
	spoke time.Time
}

func (c *consumer) unacked() []uint64 {
	seqs := make([]uint64, 0, len(c.pending))
	for seq := range c.pending {
		seqs = append(seqs, seq)
	}
	slices.Sort(seqs)
	return seqs
}

// matches reports whether the consumer gets a message: of what was there before a
// consumer of the last ones, only those.
func (c *consumer) matches(m Message) bool {
	return (c.filter == "" || matches(c.filter, m.Subject)) && (m.Seq > c.lastUpTo || c.st.last[m.Subject] == m.Seq)
}

func (c *consumer) numPending() (n int) {
	i, _ := c.st.find(c.next)
	for _, m := range c.st.msgs[i:] {
		if c.matches(m) {
			n++
		}
	}
	return n
}

// floor is the sequence up to which everything is acknowledged.
func (c *consumer) floor() uint64 {
	if seqs := c.unacked(); len(seqs) > 0 {
		return seqs[0] - 1
	}
	return c.next - 1
}

// pump delivers as long as somebody waits and there is something.
func (c *consumer) pump() {
	for len(c.waiting) > 0 {
		p := c.waiting[0]
		m, n, ok := c.choose()
		if !ok {
			return
		}
		c.sent++
		reply := fmt.Sprintf("$JS.ACK.%s.%s.%d.%d.%d.%d.%d", c.st.name, c.name, n, m.Seq, c.sent, m.time.UnixNano(), c.numPending())
		c.lastActive, p.spoke = time.Now(), time.Now()
		if p.left--; p.left == 0 {
			c.waiting = c.waiting[1:]
		}
		if c.st.s.route(p.inbox, m.Subject, reply, m.header, m.Data) == 0 {
			// Nobody is there any more.
			c.waiting = slices.DeleteFunc(c.waiting, func(x *pull) bool { return x == p })
			if u := c.pending[m.Seq]; u != nil {
				c.expire(m.Seq)
			}
		}
	}
}

// choose takes the message that is to be delivered next.
func (c *consumer) choose() (m Message, delivered int, ok bool) {
	for len(c.due) > 0 {
		seq := c.due[0]
		c.due = c.due[1:]
		u := c.pending[seq]
		if u == nil || !u.due {
			continue
		}
		m, ok := c.st.get(seq)
		if !ok {
			delete(c.pending, seq) // it was purged
			continue
		}
		u.due = false
		u.delivered++
		c.watch(seq, u)
		return m, u.delivered, true
	}
	if c.explicit && c.most > 0 && len(c.pending) >= c.most {
		return Message{}, 0, false
	}
	i, _ := c.st.find(c.next)
	for _, m := range c.st.msgs[i:] {
		c.next = m.Seq + 1
		if !c.matches(m) {
			continue
		}
		if c.explicit {
			u := &unacked{delivered: 1}
			c.pending[m.Seq] = u
			c.watch(m.Seq, u)
		}
		return m, 1, true
	}
	return Message{}, 0, false
}

// watch has a message delivered again when it is not acknowledged in time.
func (c *consumer) watch(seq uint64, u *unacked) {
	u.deadline = time.Now().Add(c.ackWait)
	c.st.s.after(c.ackWait, func() {
		if c.pending[seq] == u && !u.due && !time.Now().Before(u.deadline) {
			c.expire(seq)
			c.pump()
		}
	})
}

// expire puts a message among those that are delivered again.
func (c *consumer) expire(seq uint64) {
	if u := c.pending[seq]; u != nil && !u.due {
		u.due = true
		c.due = append(c.due, seq)
	}
}

// ack handles an acknowledgement of any kind.
func (s *Server) ack(subject string, data []byte) {
	p := strings.Split(subject, ".")
	if len(p) != 9 {
		panic(errShape)
	}
	st := s.streams[p[2]]
	if st == nil || st.consumers[p[3]] == nil {
		return
	}
	c := st.consumers[p[3]]
	seq, err := strconv.ParseUint(p[5], 10, 64)
	if err != nil {
		panic(errShape)
	}
	u := c.pending[seq]
	if u == nil {
		return
	}
	word, rest, _ := strings.Cut(string(data), " ")
	switch word {
	case "+WPI":
		if !u.due {
			c.watch(seq, u)
		}
	case "-NAK":
		var o struct {
			Delay time.Duration `json:"delay"`
		}
		if rest != "" {
			if err := json.Unmarshal([]byte(rest), &o); err != nil {
				panic(err)
			}
		}
		c.later(seq, u, o.Delay)
	default: // +ACK, +TERM
		if s.o.Again != nil {
			if d, again := s.o.Again(st.name, c.name); again {
				c.later(seq, u, d)
				return
			}
		}
		delete(c.pending, seq)
		c.pump()
	}
}

// later delivers a message again after d.
func (c *consumer) later(seq uint64, u *unacked, d time.Duration) {
	u.deadline = time.Now().Add(d + time.Hour) // not by its time
	c.st.s.after(d, func() {
		if c.pending[seq] == u {
			c.expire(seq)
			c.pump()
		}
	})
}
