package sqlitestore

import (
	"context"
	"database/sql"
	"encoding/base64"
	"errors"
	"fmt"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/store"
)

const (
	addChunkSQL = `INSERT INTO log_chunks (job_id, attempt, seq, offset, stream, time, data) VALUES (?,?,?,?,?,?,?)
ON CONFLICT (job_id, attempt, seq) DO NOTHING`
	countChunksSQL = `INSERT INTO log_attempts (job_id, attempt, chunks, bytes, stored_at) VALUES (?,?,?,?,?)
ON CONFLICT (job_id, attempt) DO UPDATE SET chunks = chunks + excluded.chunks, bytes = bytes + excluded.bytes, stored_at = excluded.stored_at,
	verdict = NULL`
	noteManifestSQL = `INSERT INTO log_attempts (job_id, attempt, chunks, bytes, stored_at, want_chunks, want_bytes, want_sha256, noted_at)
VALUES (?1,?2,0,0,?6,?3,?4,?5,?6)
ON CONFLICT (job_id, attempt) DO UPDATE SET stored_at = excluded.stored_at, noted_at = excluded.noted_at,
	want_chunks = excluded.want_chunks, want_bytes = excluded.want_bytes, want_sha256 = excluded.want_sha256
WHERE want_chunks IS NULL`
	getLogsSQL = `SELECT seq, offset, stream, time, data FROM log_chunks
WHERE job_id = ?1 AND attempt = ?2 AND seq > ?3 AND (?4 = '' OR stream = ?4) ORDER BY seq LIMIT ?5`
)

// chunkOverhead is what the JSON of a chunk has beside its data.
const chunkOverhead = 128

type attemptKey struct {
	jobID   string
	attempt int
}

// AppendChunks implements store.Store.
func (s *Store) AppendChunks(ctx context.Context, chunks []store.LogChunk, manifests ...store.LogManifest) error {
	for i := range chunks {
		c := &chunks[i]
		if c.JobID == "" || c.Attempt < 1 {
			return fmt.Errorf("%w: output needs a job and an attempt", store.ErrInvalid)
		}
		if err := c.Validate(); err != nil {
			return fmt.Errorf("%w: %w", store.ErrInvalid, err)
		}
	}
	for i := range manifests {
		if err := manifests[i].Validate(); err != nil {
			return err
		}
	}
	if len(chunks)+len(manifests) == 0 {
		return nil
	}
	return s.inTx(ctx, "store output", func(tx *sql.Tx) error {
		type sum struct{ chunks, bytes int64 }
		added := map[attemptKey]sum{}
		add := tx.StmtContext(ctx, s.addChunk)
		for i := range chunks {
			c := &chunks[i]
			n, err := exec(ctx, add, []any{c.JobID, c.Attempt, c.Seq, c.Offset, string(c.Stream), c.Time.UnixMilli(), c.Data})
			if err != nil {
				return err
			}
			if n == 1 {
				k := attemptKey{c.JobID, c.Attempt}
				t := added[k]
				added[k] = sum{t.chunks + 1, t.bytes + int64(len(c.Data))}
			}
		}
		count := tx.StmtContext(ctx, s.countChunks)
		now := time.Now().UnixMilli()
		for k, t := range added {
			if _, err := count.ExecContext(ctx, k.jobID, k.attempt, t.chunks, t.bytes, now); err != nil {
				return err
			}
		}
		for i := range manifests {
			m := &manifests[i]
			if _, err := tx.ExecContext(ctx, noteManifestSQL, m.JobID, m.Attempt, m.Chunks, m.Bytes, m.SHA256, now); err != nil {
				return err
			}
		}
		return nil
	})
}

// UncheckedLogs implements store.Store. What is seen is the number of chunks, which
// only grows while the row stays.
func (s *Store) UncheckedLogs(ctx context.Context, before time.Time, limit int) ([]store.LogManifest, error) {
	var out []store.LogManifest
	err := s.each(ctx, "read manifests", `SELECT job_id, attempt, want_chunks, want_bytes, want_sha256, chunks
FROM log_attempts INDEXED BY log_attempts_unchecked
WHERE want_chunks IS NOT NULL AND verdict IS NULL AND stored_at < ? ORDER BY stored_at LIMIT ?`, []any{before.UnixMilli(), max(limit, 0)},
		func(rows *sql.Rows) error {
			var m store.LogManifest
			if err := rows.Scan(&m.JobID, &m.Attempt, &m.Chunks, &m.Bytes, &m.SHA256, &m.Seen); err != nil {
				return err
			}
			out = append(out, m)
			return nil
		})
	return out, err
}

// JudgeLogs implements store.Store.
func (s *Store) JudgeLogs(ctx context.Context, m store.LogManifest, v busmsg.LogVerdict) (bool, error) {
	res, err := s.write.ExecContext(ctx, `UPDATE log_attempts SET verdict = ?
WHERE job_id = ? AND attempt = ? AND want_chunks IS NOT NULL AND verdict IS NULL AND chunks = ?`, string(v), m.JobID, m.Attempt, m.Seen)
	if err != nil {
		return false, fmt.Errorf("store a verdict: %w", err)
	}
	n, err := res.RowsAffected()
	return n == 1, err
}

// BadLogs implements store.Store.
func (s *Store) BadLogs(ctx context.Context, jobID string, attempt int) (bool, error) {
	var v sql.NullString
	err := s.read.QueryRowContext(ctx, "SELECT verdict FROM log_attempts WHERE job_id = ? AND attempt = ?", jobID, attempt).Scan(&v)
	if err != nil && !errors.Is(err, sql.ErrNoRows) {
		return false, fmt.Errorf("read a verdict: %w", err)
	}
	return busmsg.LogVerdict(v.String).Bad(), nil
}

// Logs implements store.Store.
func (s *Store) Logs(ctx context.Context, q busmsg.GetLogs) (busmsg.Logs, error) {
	limit := q.Limit
	if limit <= 0 {
		limit = store.DefaultLogLimit
	}
	limit = min(limit, store.MaxLogLimit)
	var out busmsg.Logs
	if err := s.page(ctx, q, limit, &out); err != nil {
		return busmsg.Logs{}, fmt.Errorf("read output: %w", err)
	}
	return out, nil
}

func (s *Store) page(ctx context.Context, q busmsg.GetLogs, limit int, out *busmsg.Logs) error {
	tx, err := s.read.BeginTx(ctx, nil) // the counts are of the same moment as the page
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }() // it only reads
	err = tx.QueryRowContext(ctx, "SELECT chunks, bytes, coalesce(verdict, '') FROM log_attempts WHERE job_id = ? AND attempt = ?", q.JobID, q.Attempt).
		Scan(&out.StoredChunks, &out.StoredBytes, &out.Verdict)
	if errors.Is(err, sql.ErrNoRows) {
		return nil
	}
	if err != nil {
		return err
	}
	rows, err := tx.StmtContext(ctx, s.getLogs).QueryContext(ctx, q.JobID, q.Attempt, q.After, string(q.Stream), limit+1)
	if err != nil {
		return err
	}
	defer rows.Close()
	data, size := 0, 0
	for rows.Next() {
		var c workerproto.Chunk
		var stream string
		var ms int64
		if err := rows.Scan(&c.Seq, &c.Offset, &stream, &ms, &c.Data); err != nil {
			return err
		}
		c.Stream, c.Time = workerproto.Stream(stream), time.UnixMilli(ms).UTC()
		data += len(c.Data)
		size += base64.StdEncoding.EncodedLen(len(c.Data)) + chunkOverhead
		full := len(out.Chunks) == limit || size > store.MaxPageBytes || q.MaxBytes > 0 && data > q.MaxBytes
		if full && len(out.Chunks) > 0 {
			out.More = true
			break
		}
		out.Chunks = append(out.Chunks, c)
	}
	return errors.Join(rows.Err(), rows.Close())
}

// deleteLogs deletes the output of a job that was produced before the given time,
// and manifests that were noted before.
func deleteLogs(ctx context.Context, tx *sql.Tx, jobID string, before int64) error {
	if _, err := tx.ExecContext(ctx, "DELETE FROM log_chunks WHERE job_id = ? AND time < ?", jobID, before); err != nil {
		return err
	}
	if _, err := tx.ExecContext(ctx, "DELETE FROM log_attempts WHERE job_id = ? AND coalesce(noted_at < ?, 1)", jobID, before); err != nil {
		return err
	}
	if _, err := tx.ExecContext(ctx, "UPDATE log_attempts SET chunks = 0, bytes = 0, verdict = NULL WHERE job_id = ?", jobID); err != nil {
		return err
	}
	_, err := tx.ExecContext(ctx, `INSERT INTO log_attempts (job_id, attempt, chunks, bytes, stored_at)
SELECT job_id, attempt, count(*), sum(length(data)), max(time) FROM log_chunks WHERE job_id = ? GROUP BY job_id, attempt
ON CONFLICT (job_id, attempt) DO UPDATE SET chunks = excluded.chunks, bytes = excluded.bytes`, jobID)
	return err
}

// deleteOrphans deletes output that arrived for jobs that are not there, once
// it is as old as jobs get.
func deleteOrphans(ctx context.Context, tx *sql.Tx, before int64, limit int) error {
	if limit <= 0 {
		return nil // jobs first
	}
	rows, err := tx.QueryContext(ctx, `SELECT DISTINCT job_id FROM log_attempts
WHERE stored_at < ? AND NOT EXISTS (SELECT 1 FROM jobs WHERE id = job_id) LIMIT ?`, before, limit)
	if err != nil {
		return err
	}
	defer rows.Close()
	var ids []string
	for rows.Next() {
		var id string
		if err := rows.Scan(&id); err != nil {
			return err
		}
		ids = append(ids, id)
	}
	if err := errors.Join(rows.Err(), rows.Close()); err != nil {
		return err
	}
	for _, id := range ids {
		if err := deleteLogs(ctx, tx, id, 1<<62); err != nil {
			return err
		}
	}
	return nil
}
