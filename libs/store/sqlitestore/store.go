// Package sqlitestore keeps jobs and their output in one SQLite file: for the
// all-in-one, and for services on one host that share the file.
//
// The file is in WAL mode with synchronous FULL, so that a write that was
// acknowledged survives a power cut. One connection writes, a pool reads and is
// never blocked by the writer; other processes that use the same file are
// waited for up to busyTimeout.
package sqlitestore

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"modernc.org/sqlite"
	lib "modernc.org/sqlite/lib"

	"github.com/cmdexec/cmdexec/libs/store"
	"github.com/cmdexec/cmdexec/libs/store/internal/blob"
)

const (
	busyTimeout = 5 * time.Second
	openTimeout = 30 * time.Second // for a file that others are opening or hold
	openPause   = 20 * time.Millisecond
	readers     = 4
)

// Store implements store.Store.
type Store struct {
	write *sql.DB // one connection; a transaction takes the write lock when it begins
	read  *sql.DB
	codec blob.Codec

	upsertMany, upsertOne       *sql.Stmt
	replaced                    *sql.Stmt
	addLabel, addOwnLabel       *sql.Stmt
	addChunk, countChunks       *sql.Stmt
	getJob, getSummary, getLogs *sql.Stmt
}

var _ store.Store = (*Store)(nil)

// Open opens the database file, making it and its folder when they do not
// exist, and brings the schema up to date. It waits up to openTimeout for others
// that use the file: SQLite itself does not wait where a new file becomes a WAL
// file. The error is one line that names the file. Close releases it.
func Open(ctx context.Context, path string) (*Store, error) {
	until := time.Now().Add(openTimeout)
	for {
		s, err := open(ctx, path)
		if err == nil {
			return s, nil
		}
		if !busy(err) || time.Now().After(until) || !pause(ctx, openPause) {
			return nil, fmt.Errorf("cannot open the database %s: %w", path, plainError(err))
		}
	}
}

// pause returns false when ctx ends first.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// busy says that others hold the file.
func busy(err error) bool {
	e, ok := errors.AsType[*sqlite.Error](err)
	return ok && (e.Code()&0xff == lib.SQLITE_BUSY || e.Code()&0xff == lib.SQLITE_LOCKED)
}

func open(ctx context.Context, path string) (*Store, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	if err := touch(abs); err != nil {
		return nil, err
	}
	s := &Store{}
	if s.write, err = connect(abs, "immediate",
		"journal_mode(WAL)", "synchronous(FULL)", "cache_size(-4000)", "journal_size_limit(67108864)"); err != nil {
		return nil, err
	}
	s.write.SetMaxOpenConns(1)
	if s.read, err = connect(abs, "deferred", "query_only(1)"); err != nil {
		return nil, errors.Join(err, s.write.Close())
	}
	s.read.SetMaxOpenConns(readers)
	s.read.SetMaxIdleConns(readers)
	if err := migrate(ctx, s.write); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	if err := s.prepare(ctx); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// touch finds out what keeps the file from being written, which SQLite's own
// errors do not say.
func touch(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	// The journal lies beside the file.
	probe, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+"-probe-*")
	if err != nil {
		return err
	}
	return errors.Join(probe.Close(), os.Remove(probe.Name()))
}

// plainError leaves out of a file error what the caller says already.
func plainError(err error) error {
	if pe, ok := errors.AsType[*os.PathError](err); ok && pe == err {
		return pe.Err
	}
	return err
}

// connect returns a pool of connections, none of which is opened yet.
func connect(path, txlock string, pragmas ...string) (*sql.DB, error) {
	q := url.Values{"_txlock": {txlock}, "_pragma": pragmas}
	q.Set("_busy_timeout", strconv.FormatInt(busyTimeout.Milliseconds(), 10))
	path = filepath.ToSlash(path)
	if path[0] != '/' { // a drive letter
		path = "/" + path
	}
	c, err := sqlite.NewConnector((&url.URL{Scheme: "file", Path: path, RawQuery: q.Encode()}).String())
	if err != nil {
		return nil, err
	}
	return sql.OpenDB(c), nil
}

func (s *Store) prepare(ctx context.Context) error {
	for _, p := range [...]struct {
		stmt **sql.Stmt
		db   *sql.DB
		text string
	}{
		{&s.upsertMany, s.write, upsertSQL(upsertRows)},
		{&s.upsertOne, s.write, upsertSQL(1)},
		{&s.replaced, s.write, replacedSQL},
		{&s.addLabel, s.write, addLabelSQL},
		{&s.addOwnLabel, s.write, addOwnLabelSQL},
		{&s.addChunk, s.write, addChunkSQL},
		{&s.countChunks, s.write, countChunksSQL},
		{&s.getJob, s.read, "SELECT summary, rest FROM jobs WHERE id = ?"},
		{&s.getSummary, s.read, "SELECT summary FROM jobs WHERE rowid = ?"},
		{&s.getLogs, s.read, getLogsSQL},
	} {
		stmt, err := p.db.PrepareContext(ctx, p.text)
		if err != nil {
			return err
		}
		*p.stmt = stmt
	}
	return nil
}

// Ping reads the file.
func (s *Store) Ping(ctx context.Context) error {
	var n int
	if err := s.read.QueryRowContext(ctx, "SELECT count(*) FROM meta").Scan(&n); err != nil {
		return fmt.Errorf("read the database: %w", err)
	}
	return nil
}

// Close waits for what is running and closes the file.
func (s *Store) Close() error {
	// The readers first: the last connection to close folds the journal into the file.
	return errors.Join(s.read.Close(), s.write.Close())
}

// inTx runs f in a write transaction.
func (s *Store) inTx(ctx context.Context, what string, f func(tx *sql.Tx) error) error {
	tx, err := s.write.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	defer func() { _ = tx.Rollback() }() // no effect after Commit
	if err := f(tx); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	if err := tx.Commit(); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// poisonous says that the row is at fault and not the database: no repetition
// helps.
func poisonous(err error) bool {
	e, ok := errors.AsType[*sqlite.Error](err)
	if !ok {
		return false
	}
	switch e.Code() & 0xff {
	case lib.SQLITE_CONSTRAINT, lib.SQLITE_TOOBIG, lib.SQLITE_MISMATCH:
		return true
	default:
		return false
	}
}

// Generation returns the registry generation that was set last.
func (s *Store) Generation(ctx context.Context) (string, error) {
	var g string
	err := s.read.QueryRowContext(ctx, "SELECT value FROM meta WHERE key = 'generation'").Scan(&g)
	if err != nil && !errors.Is(err, sql.ErrNoRows) {
		return "", fmt.Errorf("read the generation: %w", err)
	}
	return g, nil
}

// SetGeneration stores the registry generation.
func (s *Store) SetGeneration(ctx context.Context, generation string) error {
	_, err := s.write.ExecContext(ctx,
		"INSERT INTO meta (key, value) VALUES ('generation', ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value", generation)
	if err != nil {
		return fmt.Errorf("store the generation: %w", err)
	}
	return nil
}
