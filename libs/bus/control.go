package bus

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/id"
)

// SetSwept notes that terminal jobs which a crash brought back were purged in
// this life of the server.
func (c *Conn) SetSwept(ctx context.Context, serverID string) error {
	b := bucket{c: c, stream: streamControl, prefix: prefixControl}
	err := b.swap(ctx, keySwept, func([]byte) ([]byte, error) {
		return json.Marshal(sweptValue{ServerID: serverID})
	})
	if err != nil {
		return fmt.Errorf("note the sweep: %w", err)
	}
	return nil
}

type sweptValue struct {
	ServerID string `json:"serverId"`
}

// Swept returns the server id of the last SetSwept, "" when there was none.
func (c *Conn) Swept(ctx context.Context) (serverID string, err error) {
	b := bucket{c: c, stream: streamControl, prefix: prefixControl}
	s, err := b.leader(ctx, keySwept)
	if errors.Is(err, ErrNotFound) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("read the sweep: %w", err)
	}
	var v sweptValue
	if err := json.Unmarshal(s.data, &v); err != nil {
		return "", fmt.Errorf("read the sweep: %w: %w", ErrMalformed, err)
	}
	return v.ServerID, nil
}

const (
	leadRenew = 3 * time.Second
	leadLease = 10 * time.Second // without a renewal others take over
	leadYield = 8 * time.Second  // without a renewal the holder stops leading
	leadPoll  = time.Second
)

// leadValue is what the leader key holds.
type leadValue struct {
	Holder   string `json:"holder"` // empty: given up
	Term     string `json:"term"`   // of one leadership: tells own writes from others'
	ServerID string `json:"serverId"`
	Renewals int    `json:"renewals"`
}

// Lead campaigns for leadership until ctx ends and runs lead while it holds it;
// candidate must be unique. lead's context ends when leadership is lost or ctx
// ends; it must return soon then. After a loss Lead campaigns again. What lead
// returns by itself, nil or an error, ends Lead, after leadership was given up;
// else the error is ctx's.
//
// Two may believe to lead for moments: leading saves work and protects nothing.
func (c *Conn) Lead(ctx context.Context, candidate string, lead func(ctx context.Context) error) error {
	ctx, cancel := c.within(ctx)
	defer cancel()
	l := &leader{c: c, b: bucket{c: c, stream: streamLeader, prefix: prefixLeader}, candidate: candidate}
	for {
		if err := l.campaign(ctx); err != nil {
			return fmt.Errorf("lead: %w", err)
		}
		c.log.Info("leadership gained", "candidate", candidate)
		err, own := l.hold(ctx, lead)
		if own {
			return err
		}
		c.log.Warn("leadership lost", "candidate", candidate)
	}
}

type leader struct {
	c         *Conn
	b         bucket
	candidate string

	value    leadValue // while it leads
	revision uint64
	sentAt   time.Time // of the last renewal that succeeded, when it was sent
}

// campaign returns nil once the candidate leads, or ctx's error.
func (l *leader) campaign(ctx context.Context) error {
	var (
		watched uint64    // the revision that is waited out
		since   time.Time // when it was first seen
	)
	for {
		s, err := l.b.leader(ctx, keyScheduler)
		var have leadValue
		if err == nil {
			// An unreadable value is one that nobody renews.
			_ = json.Unmarshal(s.data, &have)
		}
		if err == nil || errors.Is(err, ErrNotFound) {
			if s.revision != watched {
				watched, since = s.revision, time.Now()
			}
			if l.mayTake(have, time.Since(since)) && l.take(ctx, s.revision) {
				return nil
			}
		}
		if !pause(ctx, leadPoll) {
			return ctx.Err()
		}
	}
}

func (l *leader) mayTake(have leadValue, unchanged time.Duration) bool {
	switch {
	case have.Holder == "" || unchanged >= leadLease:
		return true
	default:
		// Everything of an all-in-one dies with its embedded server, so a holder of an
		// earlier life of that server is gone. Elsewhere candidates are connected to
		// different servers, and their ids say nothing.
		return l.c.inProcess && have.ServerID != l.c.ServerID()
	}
}

func (l *leader) take(ctx context.Context, revision uint64) bool {
	value := leadValue{Holder: l.candidate, Term: id.New(id.Lease, time.Now()), ServerID: l.c.ServerID()}
	sent := time.Now()
	got, err := l.put(ctx, value, revision)
	if err != nil {
		return false
	}
	l.value, l.revision, l.sentAt = value, got, sent
	return true
}

// put writes the key and looks whether a write without an answer got through.
func (l *leader) put(ctx context.Context, value leadValue, expected uint64) (uint64, error) {
	data, err := json.Marshal(value)
	if err != nil {
		return 0, err
	}
	revision, err := l.b.write(ctx, keyScheduler, data, expected, replace)
	if err == nil || !errors.Is(err, errConflict) && !errors.Is(err, ErrAmbiguous) {
		return revision, err
	}
	s, readErr := l.b.leader(ctx, keyScheduler)
	if readErr != nil {
		return 0, readErr // not a conflict: nothing is known
	}
	var have leadValue
	if json.Unmarshal(s.data, &have) == nil && have.Term == value.Term {
		l.revision = s.revision
		if have.Renewals == value.Renewals {
			return s.revision, nil
		}
		return 0, fmt.Errorf("%w: refused for no reason", ErrUnavailable)
	}
	return 0, errConflict
}

// hold runs lead until it returns or leadership is lost. own reports whether Lead
// has to end with err.
func (l *leader) hold(ctx context.Context, lead func(context.Context) error) (err error, own bool) {
	leadCtx, stop := context.WithCancel(ctx)
	defer stop()
	done := make(chan error, 1)
	go func() { done <- lead(leadCtx) }()
	ticker := time.NewTicker(leadRenew)
	defer ticker.Stop()
	again := l.c.nextReconnect()
	for {
		select {
		case err := <-done:
			l.release()
			if ctx.Err() != nil && (err == nil || errors.Is(err, context.Canceled)) {
				err = ctx.Err()
			}
			return err, true
		case <-ticker.C:
		case <-again: // renew as soon as that is possible
			again = l.c.nextReconnect()
		}
		if l.renew(ctx) {
			continue
		}
		stop()
		if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
			return err, true
		}
		if ctx.Err() != nil {
			return ctx.Err(), true
		}
		return nil, false
	}
}

// renew reports whether the candidate still leads.
func (l *leader) renew(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, leadRenew)
	defer cancel()
	next := l.value
	next.Renewals++
	next.ServerID = l.c.ServerID()
	sent := time.Now()
	revision, err := l.put(ctx, next, l.revision)
	switch {
	case err == nil:
		l.value, l.revision, l.sentAt = next, revision, sent
		return true
	case errors.Is(err, errConflict):
		return false
	default:
		return time.Since(l.sentAt) < leadYield
	}
}

// release lets the next candidate take over at once. It does nothing when
// somebody else has.
func (l *leader) release() {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(l.c.life), time.Second)
	defer cancel()
	data, err := json.Marshal(leadValue{Term: l.value.Term})
	if err != nil {
		return
	}
	_, _ = l.b.write(ctx, keyScheduler, data, l.revision, replace)
}
