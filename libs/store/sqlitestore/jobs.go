package sqlitestore

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/store"
)

// upsertRows is how many rows one statement writes: enough that parsing and
// binding cost less than the rows.
const upsertRows = 16

// upsertSQL never sets what does not change over a job's life: SQLite would
// write every index again. A row of another job under the same id was deleted
// before (replaceOlder).
func upsertSQL(rows int) string {
	return `INSERT INTO jobs (id, version, state, owner, queue, created_at, finished_at, summary, rest) VALUES ` +
		strings.Repeat("(?,?,?,?,?,?,?,?,?),", rows-1) + `(?,?,?,?,?,?,?,?,?)
ON CONFLICT (id) DO UPDATE SET version = excluded.version, state = excluded.state, finished_at = excluded.finished_at,
	summary = excluded.summary, rest = excluded.rest
WHERE excluded.version > jobs.version AND excluded.created_at >= jobs.created_at AND jobs.finished_at IS NULL`
}

const (
	replacedSQL = `SELECT summary FROM jobs WHERE id = ? AND created_at < ?`
	// A record that was refused as stale brings no labels either.
	addLabelSQL = `INSERT INTO labels (key, value, created_at, id)
SELECT ?1, ?2, ?3, ?4 WHERE EXISTS (SELECT 1 FROM jobs WHERE id = ?4 AND created_at = ?3) ON CONFLICT DO NOTHING`
	addOwnLabelSQL = `INSERT INTO owner_labels (key, value, created_at, id, owner)
SELECT ?1, ?2, created_at, id, owner FROM jobs WHERE id = ?4 AND created_at = ?3 ON CONFLICT DO NOTHING`
)

// row is an encoded record.
type row struct {
	rec  *job.Record
	args []any
}

// UpsertJobs implements store.Store.
func (s *Store) UpsertJobs(ctx context.Context, recs []job.Record) (store.Upserted, error) {
	newest := make(map[string]*job.Record, len(recs))
	for i := range recs {
		r := &recs[i]
		if have := newest[r.ID]; have == nil || newer(r, have) {
			newest[r.ID] = r
		}
	}
	var poison []store.Rejected
	rows := make([]row, 0, len(newest))
	for i := range recs { // in the order given, which is near that of the indexes
		r := &recs[i]
		if newest[r.ID] != r {
			continue
		}
		args, err := s.rowOf(r)
		if err != nil {
			poison = append(poison, store.Rejected{ID: r.ID, Err: err})
			continue
		}
		rows = append(rows, row{r, args})
	}
	if len(rows) == 0 {
		return store.Upserted{Stale: len(recs) - len(poison), Poison: poison}, nil
	}

	written := 0
	err := s.inTx(ctx, "store jobs", func(tx *sql.Tx) error {
		if err := s.replaceOlder(ctx, tx, rows); err != nil {
			return err
		}
		many, one := tx.StmtContext(ctx, s.upsertMany), tx.StmtContext(ctx, s.upsertOne)
		args := make([]any, 0, upsertRows*len(rows[0].args))
		for len(rows) > 0 {
			batch := rows[:min(upsertRows, len(rows))]
			if len(batch) == upsertRows {
				args = args[:0]
				for _, r := range batch {
					args = append(args, r.args...)
				}
				n, err := exec(ctx, many, args)
				if err != nil && !poisonous(err) {
					return err
				}
				if err == nil {
					written += n
					rows = rows[upsertRows:]
					continue
				}
			}
			for _, r := range batch {
				n, err := exec(ctx, one, r.args)
				if poisonous(err) {
					poison = append(poison, store.Rejected{ID: r.rec.ID, Err: err})
					continue
				}
				if err != nil {
					return err
				}
				written += n
			}
			rows = rows[len(batch):]
		}
		return s.addLabels(ctx, tx, newest)
	})
	if err != nil {
		return store.Upserted{}, err
	}
	return store.Upserted{Written: written, Stale: len(recs) - written - len(poison), Poison: poison}, nil
}

func newer(a, b *job.Record) bool {
	if at, bt := a.CreatedAt.UnixMilli(), b.CreatedAt.UnixMilli(); at != bt {
		return at > bt
	}
	if a.State.Terminal() != b.State.Terminal() {
		return a.State.Terminal()
	}
	return a.Version > b.Version
}

func (s *Store) rowOf(r *job.Record) ([]any, error) {
	switch {
	case r.ID == "" || r.Version == 0 || r.Version > math.MaxInt64 || !r.State.Valid():
		return nil, fmt.Errorf("%w: a job needs an id, a version and a known state", store.ErrInvalid)
	case r.CreatedAt.IsZero():
		return nil, fmt.Errorf("%w: a job needs the time of its creation", store.ErrInvalid)
	}
	summary, tail, err := s.codec.Split(*r)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", store.ErrInvalid, err)
	}
	var finished, tailArg any
	if r.State.Terminal() {
		at := r.FinishedAt
		if at.IsZero() {
			at = r.StateAt
		}
		finished = at.UnixMilli()
	}
	if tail != nil {
		tailArg = tail
	}
	return []any{r.ID, int64(r.Version), string(r.State), r.Owner, r.Spec.Queue, r.CreatedAt.UnixMilli(), finished, summary, tailArg}, nil
}

func exec(ctx context.Context, stmt *sql.Stmt, args []any) (int, error) {
	res, err := stmt.ExecContext(ctx, args...)
	if err != nil {
		return 0, err
	}
	n, err := res.RowsAffected()
	return int(n), err
}

// replaceOlder deletes jobs whose id, the same idempotency key, was used again
// later. Output that came after the new job's creation is the new job's.
func (s *Store) replaceOlder(ctx context.Context, tx *sql.Tx, rows []row) error {
	for _, r := range rows {
		if !r.rec.Keyed {
			continue
		}
		created := r.rec.CreatedAt.UnixMilli()
		var summary []byte
		err := tx.StmtContext(ctx, s.replaced).QueryRowContext(ctx, r.rec.ID, created).Scan(&summary)
		if errors.Is(err, sql.ErrNoRows) {
			continue
		}
		if err != nil {
			return err
		}
		if err := s.deleteJob(ctx, tx, r.rec.ID, summary, created); err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) addLabels(ctx context.Context, tx *sql.Tx, recs map[string]*job.Record) error {
	for _, r := range recs {
		for k, v := range r.Spec.Labels {
			for _, add := range [...]*sql.Stmt{s.addLabel, s.addOwnLabel} {
				if _, err := tx.StmtContext(ctx, add).ExecContext(ctx, k, v, r.CreatedAt.UnixMilli(), r.ID); err != nil && !poisonous(err) {
					return err
				}
			}
		}
	}
	return nil
}

// deleteJob deletes a job with its labels and the output that was produced
// before the given time.
func (s *Store) deleteJob(ctx context.Context, tx *sql.Tx, id string, summary []byte, outputBefore int64) error {
	// A summary that cannot be read leaves its labels behind, which find nothing.
	if r, _, err := s.codec.Summary(summary); err == nil {
		for k, v := range r.Spec.Labels {
			if _, err := tx.ExecContext(ctx, "DELETE FROM labels WHERE key = ? AND value = ? AND created_at = ? AND id = ?",
				k, v, r.CreatedAt.UnixMilli(), id); err != nil {
				return err
			}
			if _, err := tx.ExecContext(ctx, "DELETE FROM owner_labels WHERE owner = ? AND key = ? AND value = ? AND created_at = ? AND id = ?",
				r.Owner, k, v, r.CreatedAt.UnixMilli(), id); err != nil {
				return err
			}
		}
	}
	if err := deleteLogs(ctx, tx, id, outputBefore); err != nil {
		return err
	}
	_, err := tx.ExecContext(ctx, "DELETE FROM jobs WHERE id = ?", id)
	return err
}

// Job implements store.Store.
func (s *Store) Job(ctx context.Context, id string) (job.Record, error) {
	var summary, tail []byte
	err := s.getJob.QueryRowContext(ctx, id).Scan(&summary, &tail)
	if errors.Is(err, sql.ErrNoRows) {
		return job.Record{}, store.ErrNotFound
	}
	if err != nil {
		return job.Record{}, fmt.Errorf("read a job: %w", err)
	}
	return s.codec.Join(summary, tail)
}

// Stats implements store.Store.
func (s *Store) Stats(ctx context.Context) (map[job.State]int64, error) {
	out := map[job.State]int64{}
	err := s.each(ctx, "count jobs", "SELECT state, count(*) FROM jobs INDEXED BY jobs_state GROUP BY state", nil,
		func(rows *sql.Rows) error {
			var state string
			var n int64
			if err := rows.Scan(&state, &n); err != nil {
				return err
			}
			out[job.State(state)] = n
			return nil
		})
	return out, err
}

// maxIDs is how many ids one statement asks for.
const maxIDs = 500

// TerminalVersions implements store.Store.
func (s *Store) TerminalVersions(ctx context.Context, ids []string) (map[string]uint64, error) {
	out := make(map[string]uint64, len(ids))
	for len(ids) > 0 {
		n := min(maxIDs, len(ids))
		args := make([]any, n)
		for i, id := range ids[:n] {
			args[i] = id
		}
		ids = ids[n:]
		err := s.each(ctx, "read versions",
			"SELECT id, version FROM jobs WHERE finished_at IS NOT NULL AND id IN (?"+strings.Repeat(",?", n-1)+")", args,
			func(rows *sql.Rows) error {
				var id string
				var version int64
				if err := rows.Scan(&id, &version); err != nil {
					return err
				}
				out[id] = uint64(version)
				return nil
			})
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

// each runs a query on a reader and calls f for each row.
func (s *Store) each(ctx context.Context, what, query string, args []any, f func(*sql.Rows) error) error {
	rows, err := s.read.QueryContext(ctx, query, args...)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	defer rows.Close()
	for rows.Next() {
		if err := f(rows); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
	}
	if err := rows.Err(); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// resetBatch bounds one transaction of ResetNonTerminal.
const resetBatch = 200

// ResetNonTerminal implements store.Store, in batches: what was reset before an
// error stays so, and is not found again.
func (s *Store) ResetNonTerminal(ctx context.Context, now time.Time) (int, error) {
	total := 0
	for {
		recs, err := s.liveJobs(ctx, resetBatch)
		if err != nil || len(recs) == 0 {
			return total, err
		}
		ended := recs[:0]
		for _, r := range recs {
			if next, changed := job.Reset(r, now); changed {
				ended = append(ended, next)
			}
		}
		up, err := s.UpsertJobs(ctx, ended)
		if err != nil {
			return total, err
		}
		total += up.Written
		if up.Written == 0 {
			return total, fmt.Errorf("reset jobs of a lost registry: %d jobs cannot be written", len(recs))
		}
	}
}

func (s *Store) liveJobs(ctx context.Context, limit int) ([]job.Record, error) {
	var recs []job.Record
	states, args := liveStates()
	err := s.each(ctx, "read live jobs",
		"SELECT summary, rest FROM jobs INDEXED BY jobs_state WHERE state IN ("+states+") LIMIT ?", append(args, limit),
		func(rows *sql.Rows) error {
			var summary, tail []byte
			if err := rows.Scan(&summary, &tail); err != nil {
				return err
			}
			r, err := s.codec.Join(summary, tail)
			if err != nil {
				return err
			}
			recs = append(recs, r)
			return nil
		})
	return recs, err
}

func liveStates() (placeholders string, args []any) {
	for _, st := range job.States() {
		if !st.Terminal() {
			args = append(args, string(st))
		}
	}
	return "?" + strings.Repeat(",?", len(args)-1), args
}

// deleteBytes bounds the output that one transaction of DeleteFinished deletes.
const deleteBytes = 256 << 20

// DeleteFinished implements store.Store.
func (s *Store) DeleteFinished(ctx context.Context, before time.Time, limit int) (int, error) {
	deleted := 0
	err := s.inTx(ctx, "delete old jobs", func(tx *sql.Tx) error {
		type old struct {
			id      string
			summary []byte
			bytes   int64
		}
		rows, err := tx.QueryContext(ctx, `SELECT id, summary, (SELECT coalesce(sum(bytes), 0) FROM log_attempts WHERE job_id = jobs.id)
FROM jobs INDEXED BY jobs_finished WHERE finished_at < ? ORDER BY finished_at LIMIT ?`, before.UnixMilli(), limit)
		if err != nil {
			return err
		}
		defer rows.Close()
		var olds []old
		for total := int64(0); total < deleteBytes && rows.Next(); {
			var o old
			if err := rows.Scan(&o.id, &o.summary, &o.bytes); err != nil {
				return err
			}
			total += o.bytes
			olds = append(olds, o)
		}
		if err := rows.Err(); err != nil {
			return err
		}
		if err := rows.Close(); err != nil {
			return err
		}
		for _, o := range olds {
			if err := s.deleteJob(ctx, tx, o.id, o.summary, math.MaxInt64); err != nil {
				return err
			}
		}
		deleted = len(olds)
		return deleteOrphans(ctx, tx, before.UnixMilli(), limit-deleted)
	})
	if err != nil {
		return 0, err
	}
	return deleted, nil
}
