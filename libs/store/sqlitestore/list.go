package sqlitestore

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/store"
)

// ListJobs implements store.Store: first the rows of the page, from an index,
// then their summaries until the page is full. Both see the same state of the
// database.
func (s *Store) ListJobs(ctx context.Context, q busmsg.ListJobs) ([]job.Record, bool, error) {
	limit := q.Limit
	if limit <= 0 {
		limit = store.DefaultListLimit
	}
	limit = min(limit, store.MaxListLimit)

	tx, err := s.read.BeginTx(ctx, nil)
	if err != nil {
		return nil, false, fmt.Errorf("list jobs: %w", err)
	}
	defer func() { _ = tx.Rollback() }() // it only reads
	rowids, err := pageRows(ctx, tx, q, limit+1)
	if err != nil {
		return nil, false, fmt.Errorf("list jobs: %w", err)
	}
	more := len(rowids) > limit
	rowids = rowids[:min(limit, len(rowids))]

	get := tx.StmtContext(ctx, s.getSummary)
	items := make([]job.Record, 0, len(rowids))
	size := 0
	for _, id := range rowids {
		var blob []byte
		if err := get.QueryRowContext(ctx, id).Scan(&blob); err != nil {
			return nil, false, fmt.Errorf("list jobs: %w", err)
		}
		r, n, err := s.codec.Summary(blob)
		if err != nil {
			return nil, false, err
		}
		if size += n + 1; size > store.MaxPageBytes && len(items) > 0 {
			return items, true, nil
		}
		items = append(items, r)
	}
	return items, more, nil
}

func pageRows(ctx context.Context, tx *sql.Tx, q busmsg.ListJobs, limit int) (ids []int64, err error) {
	lead, err := shortest(ctx, tx, q)
	if err != nil {
		return nil, err
	}
	query, args := pageQuery(q, lead, limit)
	rows, err := tx.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		var id, createdAt int64
		var jobID string
		if err := rows.Scan(&id, &createdAt, &jobID); err != nil {
			return nil, err
		}
		ids = append(ids, id)
	}
	return ids, rows.Err()
}

// lead is what a list with labels is read along: everything else is looked up for
// each entry of it.
type lead struct{ label string } // empty: the states

// countedUp is up to how many entries an index is counted to learn whether it is
// the shortest: where none is, enough of them match that any will do.
const countedUp = 2000

// shortest finds what has the fewest entries. A list without labels has nothing to choose.
func shortest(ctx context.Context, tx *sql.Tx, q busmsg.ListJobs) (best lead, err error) {
	if len(q.Labels) == 0 {
		return lead{}, nil
	}
	fewest := countedUp + 1
	keys := slices.Sorted(maps.Keys(q.Labels))
	best.label = keys[0]
	if len(keys) == 1 && len(q.States) == 0 {
		return best, nil
	}
	count := func(of lead, from string, args []any) error {
		var n int
		err := tx.QueryRowContext(ctx, "SELECT count(*) FROM (SELECT 1 FROM "+from+" LIMIT ?)", append(args, countedUp)...).Scan(&n)
		if err == nil && n < fewest {
			fewest, best = n, of
		}
		return err
	}
	for _, k := range keys {
		table, c := labelEntries(q, k)
		if err := count(lead{k}, table+" l WHERE "+c.String(), c.args); err != nil {
			return best, err
		}
	}
	if len(q.States) > 0 {
		var c condition
		index := c.owned(q.Owner)
		c.states("", q.States)
		c.position("", q)
		if err := count(lead{}, "jobs INDEXED BY "+index+" WHERE "+c.String(), c.args); err != nil {
			return best, err
		}
	}
	return best, nil
}

// condition is a conjunction under construction.
type condition struct {
	terms []string
	args  []any
}

func (c *condition) add(term string, args ...any) {
	c.terms = append(c.terms, term)
	c.args = append(c.args, args...)
}

func (c *condition) String() string { return strings.Join(c.terms, " AND ") }

// pageQuery chooses the index that yields a page in order. Indexes that begin
// with the state are read once for each state and merged: each part stops at
// the limit.
func pageQuery(q busmsg.ListJobs, by lead, limit int) (string, []any) {
	switch {
	case by.label != "":
		return labelQuery(q, by.label, limit)
	case q.Queue != "" && q.Queue != job.DefaultQueue && len(q.Labels) == 0:
		return queueQuery(q, limit)
	}
	states := distinct(q.States)
	if len(states) == 0 {
		states = job.States()
	}
	var parts []string
	var args []any
	for _, st := range states {
		var c condition
		index := c.owned(q.Owner)
		c.add("state = ?", string(st))
		c.position("", q)
		c.labels("jobs", q.Labels, "")
		if q.Queue != "" {
			c.add("queue = ?", q.Queue)
		}
		parts = append(parts, "SELECT * FROM (SELECT rowid AS r, created_at AS c, id AS i FROM jobs INDEXED BY "+index+
			" WHERE "+c.String()+" ORDER BY created_at DESC, id DESC LIMIT ?)")
		args = append(append(args, c.args...), limit)
	}
	return strings.Join(parts, " UNION ALL ") + " ORDER BY c DESC, i DESC LIMIT ?", append(args, limit)
}

// queueQuery reads a queue that is not the default one.
func queueQuery(q busmsg.ListJobs, limit int) (string, []any) {
	var c condition
	index := "jobs_queue"
	if q.Owner != "" {
		index = "jobs_owner_queue"
		c.add("owner = ?", q.Owner)
	}
	c.add("queue = ? AND queue <> 'default'", q.Queue)
	c.position("", q)
	c.states("", q.States)
	return "SELECT rowid, created_at, id FROM jobs INDEXED BY " + index + " WHERE " + c.String() +
		" ORDER BY created_at DESC, id DESC LIMIT ?", append(c.args, limit)
}

// labelQuery follows the entries of one label and looks everything else up.
func labelQuery(q busmsg.ListJobs, key string, limit int) (string, []any) {
	table, c := labelEntries(q, key)
	c.labels("l", q.Labels, key)
	if q.Queue != "" {
		c.add("j.queue = ?", q.Queue)
	}
	c.states("j.", q.States)
	// CROSS JOIN keeps SQLite from beginning with jobs.
	return "SELECT j.rowid, l.created_at, l.id FROM " + table + " l CROSS JOIN jobs j ON j.id = l.id AND j.created_at = l.created_at WHERE " +
		c.String() + " ORDER BY l.created_at DESC, l.id DESC LIMIT ?", append(c.args, limit)
}

// labelEntries are the entries of one label that a list may show: those of its
// owner where it has one.
func labelEntries(q busmsg.ListJobs, key string) (table string, c condition) {
	table = "labels"
	if q.Owner != "" {
		table = "owner_labels"
		c.add("l.owner = ?", q.Owner)
	}
	c.add("l.key = ? AND l.value = ?", key, q.Labels[key])
	c.position("l.", q)
	return table, c
}

// labels demands all labels but one of what has an id and a time in the table.
func (c *condition) labels(table string, labels map[string]string, but string) {
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		if k != but {
			c.add("EXISTS (SELECT 1 FROM labels o WHERE o.key = ? AND o.value = ? AND o.created_at = "+table+".created_at AND o.id = "+table+".id)", k, labels[k])
		}
	}
}

// owned demands the owner, where there is one, and names the index by states that
// has these jobs.
func (c *condition) owned(owner string) (index string) {
	if owner == "" {
		return "jobs_state"
	}
	c.add("owner = ?", owner)
	return "jobs_owner"
}

func (c *condition) states(table string, states []job.State) {
	if len(states) == 0 {
		return
	}
	args := make([]any, len(states))
	for i, st := range states {
		args[i] = string(st)
	}
	c.add(table+"state IN (?"+strings.Repeat(",?", len(states)-1)+")", args...)
}

// position limits the page in time. Until is a position too, before every id of
// its millisecond, so only the earlier of it and the cursor is asked for.
func (c *condition) position(table string, q busmsg.ListJobs) {
	if !q.Since.IsZero() {
		c.add(table+"created_at >= ?", ceilMilli(q.Since))
	}
	before, id, set := int64(0), "", false
	if !q.BeforeAt.IsZero() {
		before, id, set = q.BeforeAt.UnixMilli(), q.BeforeID, true
	}
	if !q.Until.IsZero() {
		if until := ceilMilli(q.Until); !set || until <= before {
			before, id, set = until, "", true
		}
	}
	if set {
		c.add("("+table+"created_at, "+table+"id) < (?, ?)", before, id)
	}
}

// ceilMilli is the first whole millisecond that is not before t: jobs are
// created at whole milliseconds.
func ceilMilli(t time.Time) int64 {
	ms := t.UnixMilli()
	if time.UnixMilli(ms).Before(t) {
		ms++
	}
	return ms
}

func distinct(states []job.State) []job.State {
	out := slices.Clone(states)
	slices.Sort(out)
	return slices.Compact(out)
}
