package sqlitestore

import (
	"context"
	"database/sql"
	"fmt"
)

// migrations are applied in order; PRAGMA user_version counts those that were.
// A published one is never changed.
//
// jobs: the record is in summary; inputs and long histories, which lists do not
// show, are apart in rest (else NULL), so that lists do not read them. See
// package blob. Lists of an owner merge jobs_owner state by state, other lists jobs_state, which saves an
// index without the state; nearly every job is in the default queue, so only
// the others are indexed by queue.
//
// log_attempts counts what log_chunks holds, so that reading a page of a long
// log does not count it again. It has the manifest, where there was a need to note
// one, and then also of attempts without a chunk; stored_at is the time of the newest
// chunk or of the manifest, whichever came later. log_chunks has a rowid: without, each chunk of
// about a kilobyte takes a page of its own (4.7 KB of disk and 85 us for a chunk
// of 1000 bytes, where this takes 1.4 KB and 35 us), for 30 bytes less a chunk.
var migrations = [...]string{`
CREATE TABLE jobs (
	id          TEXT    NOT NULL UNIQUE CHECK (id <> ''),
	version     INTEGER NOT NULL CHECK (version > 0),
	state       TEXT    NOT NULL CHECK (state <> ''),
	owner       TEXT    NOT NULL,
	queue       TEXT    NOT NULL,
	created_at  INTEGER NOT NULL, -- Unix milliseconds, as all times
	finished_at INTEGER,          -- NULL until the state is terminal
	summary     BLOB    NOT NULL,
	rest        BLOB
);
CREATE INDEX jobs_state    ON jobs (state, created_at, id);
CREATE INDEX jobs_owner    ON jobs (owner, state, created_at, id);
CREATE INDEX jobs_queue    ON jobs (queue, created_at, id) WHERE queue <> 'default';
CREATE INDEX jobs_finished ON jobs (finished_at) WHERE finished_at IS NOT NULL;

CREATE TABLE labels (
	key        TEXT    NOT NULL,
	value      TEXT    NOT NULL,
	created_at INTEGER NOT NULL,
	id         TEXT    NOT NULL,
	PRIMARY KEY (key, value, created_at, id)
) WITHOUT ROWID;

CREATE TABLE log_chunks (
	job_id  TEXT    NOT NULL,
	attempt INTEGER NOT NULL,
	seq     INTEGER NOT NULL,
	offset  INTEGER NOT NULL,
	stream  TEXT    NOT NULL,
	time    INTEGER NOT NULL,
	data    BLOB    NOT NULL,
	PRIMARY KEY (job_id, attempt, seq)
);

CREATE TABLE log_attempts (
	job_id    TEXT    NOT NULL,
	attempt   INTEGER NOT NULL,
	chunks    INTEGER NOT NULL,
	bytes     INTEGER NOT NULL,
	stored_at INTEGER NOT NULL, -- of the newest chunk, by the clock of the database's host
	PRIMARY KEY (job_id, attempt)
) WITHOUT ROWID;

CREATE TABLE meta (
	key   TEXT PRIMARY KEY,
	value TEXT NOT NULL
) WITHOUT ROWID;
`, `
ALTER TABLE log_attempts ADD COLUMN want_chunks INTEGER; -- of the manifest; NULL: none was noted
ALTER TABLE log_attempts ADD COLUMN want_bytes  INTEGER;
ALTER TABLE log_attempts ADD COLUMN want_sha256 TEXT;
ALTER TABLE log_attempts ADD COLUMN noted_at    INTEGER;
ALTER TABLE log_attempts ADD COLUMN verdict     TEXT;    -- NULL: not compared with what is stored now
CREATE INDEX log_attempts_unchecked ON log_attempts (stored_at) WHERE want_chunks IS NOT NULL AND verdict IS NULL;
`, `
CREATE INDEX jobs_owner_queue ON jobs (owner, queue, created_at, id) WHERE queue <> 'default';

-- The labels of each owner's jobs: who has few jobs must not read past everybody's.
CREATE TABLE owner_labels (
	owner      TEXT    NOT NULL,
	key        TEXT    NOT NULL,
	value      TEXT    NOT NULL,
	created_at INTEGER NOT NULL,
	id         TEXT    NOT NULL,
	PRIMARY KEY (owner, key, value, created_at, id)
) WITHOUT ROWID;
INSERT INTO owner_labels SELECT j.owner, l.key, l.value, l.created_at, l.id
FROM labels l JOIN jobs j ON j.id = l.id AND j.created_at = l.created_at;
`}

// migrate brings the schema up to date in one transaction.
func migrate(ctx context.Context, db *sql.DB) error {
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }() // no effect after Commit
	var version int
	if err := tx.QueryRowContext(ctx, "PRAGMA user_version").Scan(&version); err != nil {
		return err
	}
	if version > len(migrations) {
		return fmt.Errorf("it was written by a newer version of this program (schema %d, known up to %d)", version, len(migrations))
	}
	for i := version; i < len(migrations); i++ {
		if _, err := tx.ExecContext(ctx, migrations[i]); err != nil {
			return fmt.Errorf("migrate the schema to version %d: %w", i+1, err)
		}
	}
	if version < len(migrations) {
		if _, err := tx.ExecContext(ctx, fmt.Sprintf("PRAGMA user_version = %d", len(migrations))); err != nil {
			return err
		}
	}
	return tx.Commit()
}
