package natsim

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"
)

// api answers a request of the JetStream API.
func (s *Server) api(c *conn, call, reply string, data []byte) {
	answer := func(b []byte) { s.route(reply, "", "", nil, b) }
	read := func(into any) {
		if len(data) > 0 {
			if err := json.Unmarshal(data, into); err != nil {
				panic(fmt.Errorf("natsim: %s: %w", call, err))
			}
		}
	}
	verb, args, _ := cutVerb(call)
	name, rest, _ := strings.Cut(args, ".")
	st := s.streams[name]
	if st == nil && verb != "STREAM.CREATE" {
		answer(refusal(404, 10059, "stream not found"))
		return
	}
	switch verb {
	case "STREAM.CREATE", "STREAM.UPDATE":
		var cfg struct {
			Subjects []string `json:"subjects"`
		}
		read(&cfg)
		if st == nil {
			st = &stream{
				s: s, name: name, created: time.Now().UTC(), first: 1, last: map[string]uint64{},
				consumers: map[string]*consumer{}, graves: map[string]Message{},
			}
			s.streams[name] = st
		}
		st.config, st.subject = json.RawMessage(data), cfg.Subjects[0]
		answer(st.info())
	case "STREAM.INFO":
		answer(st.info())
	case "STREAM.PURGE":
		var req struct {
			Filter string `json:"filter"`
			Seq    uint64 `json:"seq"`
		}
		read(&req)
		n := st.purge(req.Filter, req.Seq)
		answer(fmt.Appendf(nil, `{"success":true,"purged":%d}`, n))
	case "STREAM.MSG.GET":
		var req struct {
			Last string `json:"last_by_subj"`
		}
		read(&req)
		m, ok := st.newest(req.Last)
		if !ok {
			answer(refusal(404, 10037, "no message found"))
			return
		}
		answer(fmt.Appendf(nil, `{"message":{"subject":%q,"seq":%d,"data":%q,"time":%q}}`,
			m.Subject, m.Seq, base64.StdEncoding.EncodeToString(m.Data), stamp(m.time)))
	case "DIRECT.GET":
		m, ok := st.newest(rest)
		if !ok {
			s.route(reply, "", "", []byte("NATS/1.0 404 Message Not Found\r\n\r\n"), nil)
			return
		}
		s.route(reply, "", "", fmt.Appendf(nil, "NATS/1.0\r\nNats-Stream: %s\r\nNats-Subject: %s\r\nNats-Sequence: %d\r\n\r\n", name, m.Subject, m.Seq), m.Data)
	case "CONSUMER.CREATE":
		consumerName, _, _ := strings.Cut(rest, ".")
		answer(st.create(consumerName, data))
	default:
		consumerName, _, _ := strings.Cut(rest, ".")
		cons := st.consumers[consumerName]
		if cons == nil {
			if verb == "CONSUMER.MSG.NEXT" {
				s.route(reply, "", "", []byte("NATS/1.0 409 Consumer Deleted\r\n\r\n"), nil)
				return
			}
			answer(refusal(404, 10014, "consumer not found"))
			return
		}
		switch verb {
		case "CONSUMER.INFO":
			answer(cons.info(""))
		case "CONSUMER.DELETE":
			delete(st.consumers, consumerName)
			answer([]byte(`{"success":true}`))
		case "CONSUMER.RESET":
			cons.next, cons.pending, cons.due = cons.floor()+1, map[uint64]*unacked{}, nil
			cons.pump()
			answer(cons.info(fmt.Sprintf(`"reset_seq":%d,`, cons.next)))
		case "CONSUMER.MSG.NEXT":
			var req struct {
				Batch     int           `json:"batch"`
				Expires   time.Duration `json:"expires"`
				Heartbeat time.Duration `json:"idle_heartbeat"`
			}
			read(&req)
			cons.ask(&pull{conn: c, inbox: reply, left: max(1, req.Batch), until: time.Now().Add(req.Expires), beat: req.Heartbeat, spoke: time.Now()})
		default:
			panic("natsim does not know $JS.API." + call)
		}
	}
}

// cutVerb splits an API subject into what is asked for and of what.
func cutVerb(call string) (verb, args string, ok bool) {
	for _, v := range []string{
		"STREAM.CREATE", "STREAM.UPDATE", "STREAM.INFO", "STREAM.PURGE", "STREAM.MSG.GET", "DIRECT.GET",
		"CONSUMER.CREATE", "CONSUMER.INFO", "CONSUMER.DELETE", "CONSUMER.RESET", "CONSUMER.MSG.NEXT",
	} {
		if args, ok = strings.CutPrefix(call, v+"."); ok {
			return v, args, true
		}
	}
	return call, "", false
}

// stamp is a time as JSON has it.
func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339Nano) }

func (st *stream) info() []byte {
	size := 0
	for _, m := range st.msgs {
		size += len(m.Data) + len(m.Subject) + len(m.header)
	}
	first := st.seq + 1
	if len(st.msgs) > 0 {
		first = st.msgs[0].Seq
	}
	return fmt.Appendf(nil, `{"created":%q,"state":{"messages":%d,"bytes":%d,"first_seq":%d,"last_seq":%d,"consumer_count":%d},"config":%s}`,
		stamp(st.created), len(st.msgs), size, first, st.seq, len(st.consumers), st.config)
}

func (st *stream) create(name string, data []byte) []byte {
	var req struct {
		Config json.RawMessage `json:"config"`
	}
	var cfg struct {
		Durable string        `json:"durable_name"`
		Filter  string        `json:"filter_subject"`
		Ack     string        `json:"ack_policy"`
		Wait    time.Duration `json:"ack_wait"`
		Most    int           `json:"max_ack_pending"`
		From    string        `json:"deliver_policy"`
		Start   uint64        `json:"opt_start_seq"`
	}
	if err := json.Unmarshal(data, &req); err != nil {
		panic(err)
	}
	if err := json.Unmarshal(req.Config, &cfg); err != nil {
		panic(err)
	}
	c := &consumer{
		st: st, name: name, config: req.Config, durable: cfg.Durable != "", filter: cfg.Filter, explicit: cfg.Ack == "explicit",
		ackWait: cfg.Wait, most: cfg.Most, created: time.Now().UTC(), next: 1, pending: map[uint64]*unacked{},
	}
	switch cfg.From {
	case "by_start_sequence":
		c.next = cfg.Start
	case "last_per_subject":
		c.lastUpTo = st.seq
	}
	st.consumers[c.name] = c
	return c.info("")
}

// info describes a consumer; more are further members of the answer.
func (c *consumer) info(more string) []byte {
	active := ""
	if !c.lastActive.IsZero() {
		active = fmt.Sprintf(`,"last_active":%q`, stamp(c.lastActive))
	}
	return fmt.Appendf(nil, `{%s"stream_name":%q,"name":%q,"created":%q,"delivered":{"consumer_seq":%d,"stream_seq":%d%s},`+
		`"ack_floor":{"consumer_seq":%d,"stream_seq":%d},"num_ack_pending":%d,"num_redelivered":0,"num_waiting":%d,"num_pending":%d,"config":%s}`,
		more, c.st.name, c.name, stamp(c.created), c.sent, c.next-1, active,
		c.sent, c.floor(), len(c.pending), len(c.waiting), c.numPending(), c.config)
}

// ask adds a request for messages, which ends at its time.
func (c *consumer) ask(p *pull) {
	s := c.st.s
	c.waiting = append(c.waiting, p)
	s.after(time.Until(p.until), func() {
		if slices.Contains(c.waiting, p) {
			c.waiting = slices.DeleteFunc(c.waiting, func(x *pull) bool { return x == p })
			s.route(p.inbox, "", "", fmt.Appendf(nil, "NATS/1.0 408 Request Timeout\r\nNats-Pending-Messages: %d\r\nNats-Pending-Bytes: 0\r\n\r\n", p.left), nil)
		}
	})
	if p.beat > 0 {
		s.after(p.beat, func() { c.beat(p) })
	}
	c.pump()
}

// beat says that a request is still known when nothing was delivered for it.
func (c *consumer) beat(p *pull) {
	if !slices.Contains(c.waiting, p) {
		return
	}
	s := c.st.s
	now := time.Now()
	if idle := now.Sub(p.spoke); idle < p.beat {
		s.after(p.beat-idle, func() { c.beat(p) })
		return
	}
	p.spoke = now
	if s.route(p.inbox, "", "", []byte("NATS/1.0 100 Idle Heartbeat\r\n\r\n"), nil) == 0 {
		c.waiting = slices.DeleteFunc(c.waiting, func(x *pull) bool { return x == p })
		return
	}
	s.after(p.beat, func() { c.beat(p) })
}
