package mongostore

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"time"

	"go.mongodb.org/mongo-driver/v2/bson"
	"go.mongodb.org/mongo-driver/v2/mongo"
	"go.mongodb.org/mongo-driver/v2/mongo/options"

	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/store"
)

// document is a job. What lists show is in summary, inputs and long histories are
// in rest, so that lists do not read them.
type document struct {
	ID         string    `bson:"_id"`
	Version    int64     `bson:"version"`
	State      job.State `bson:"state"`
	Owner      string    `bson:"owner"`
	Queue      string    `bson:"queue"`
	Labels     []string  `bson:"labels,omitempty"` // "key=value": a key holds no '='
	CreatedAt  int64     `bson:"createdAt"`        // milliseconds
	FinishedAt *int64    `bson:"finishedAt,omitempty"`
	Summary    []byte    `bson:"summary"`
	Rest       []byte    `bson:"rest,omitempty"`
}

// maxBlobs bounds what a document carries. The server takes 16 MiB, and the driver
// gives up the whole bulk, without saying why, for one document that is larger.
const maxBlobs = 15 << 20

func (s *Store) documentOf(r *job.Record) (*document, error) {
	switch {
	case r.ID == "" || r.Version == 0 || r.Version > math.MaxInt64 || !r.State.Valid():
		return nil, fmt.Errorf("%w: a job needs an id, a version and a known state", store.ErrInvalid)
	case r.CreatedAt.IsZero():
		return nil, fmt.Errorf("%w: a job needs the time of its creation", store.ErrInvalid)
	}
	summary, rest, err := s.codec.Split(*r)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", store.ErrInvalid, err)
	}
	if size := len(summary) + len(rest); size > maxBlobs {
		return nil, fmt.Errorf("%w: a record of %d bytes is larger than a document may be", store.ErrInvalid, size)
	}
	d := &document{
		ID: r.ID, Version: int64(r.Version), State: r.State, Owner: r.Owner, Queue: r.Spec.Queue,
		CreatedAt: r.CreatedAt.UnixMilli(), Summary: summary, Rest: rest,
	}
	for _, k := range slices.Sorted(maps.Keys(r.Spec.Labels)) {
		d.Labels = append(d.Labels, label(k, r.Spec.Labels[k]))
	}
	if r.State.Terminal() {
		at := r.FinishedAt
		if at.IsZero() {
			at = r.StateAt
		}
		d.FinishedAt = ptr(at.UnixMilli())
	}
	return d, nil
}

func label(key, value string) string { return key + "=" + value }

// newerThan orders the records of one id: an end is the newest, else the version
// decides, unless the idempotency key was used again later, for another job.
func (d *document) newerThan(have *document) bool {
	if d.CreatedAt != have.CreatedAt {
		return d.CreatedAt > have.CreatedAt
	}
	if (d.FinishedAt == nil) != (have.FinishedAt == nil) {
		return d.FinishedAt != nil
	}
	return d.Version > have.Version
}

// older matches what d may replace, which is what d is newer than.
func (d *document) older() bson.D {
	return bson.D{eq("_id", d.ID), eq("$or", bson.A{
		bson.D{eq("createdAt", op("$lt", d.CreatedAt))},
		bson.D{eq("createdAt", d.CreatedAt), eq("version", op("$lt", d.Version)), eq("finishedAt", op("$exists", false))},
	})}
}

// UpsertJobs implements store.Store. The writes of a call are unordered and each
// stands for itself; after an error some of them may be done, which does no harm.
func (s *Store) UpsertJobs(ctx context.Context, recs []job.Record) (store.Upserted, error) {
	var out store.Upserted
	newest := make(map[string]*document, len(recs))
	for i := range recs {
		d, err := s.documentOf(&recs[i])
		if err != nil {
			out.Poison = append(out.Poison, store.Rejected{ID: recs[i].ID, Err: err})
			continue
		}
		if have := newest[d.ID]; have == nil || d.newerThan(have) {
			newest[d.ID] = d
		}
	}
	docs := slices.SortedFunc(maps.Values(newest), func(a, b *document) int { return strings.Compare(a.ID, b.ID) })
	for part := range slices.Chunk(docs, bulkSize) {
		done, err := s.upsert(ctx, part)
		if err != nil {
			return store.Upserted{}, failed("store jobs", err)
		}
		out.Written += done.written
		out.Poison = append(out.Poison, done.poison...)
	}
	out.Stale = len(recs) - out.Written - len(out.Poison)
	return out, nil
}

// upsert writes what is newer than what is stored. What it reads before it writes
// saves work; what counts is the filter of each write. A duplicate key means that
// the job is there and not older, or that somebody else created it at this moment:
// which of the two, a second try without upsert finds out.
func (s *Store) upsert(ctx context.Context, docs []*document) (bulkResult, error) {
	have, err := s.heads(ctx, docs)
	if err != nil {
		return bulkResult{}, err
	}
	writes := make([]write, 0, len(docs))
	for _, d := range docs {
		h := have[d.ID]
		if h == nil {
			writes = append(writes, write{d, insert})
			continue
		}
		if !d.newerThan(h) {
			continue
		}
		// The output of a job whose key was used again goes before the new job
		// takes its place, so that a call that is cut short and repeated finds it
		// still. Output that came after the new job's creation is the new job's.
		if h.CreatedAt < d.CreatedAt {
			if _, err := s.chunks.DeleteMany(ctx, bson.D{eq("jobId", d.ID), eq("time", op("$lt", d.CreatedAt))}); err != nil {
				return bulkResult{}, err
			}
			if err := s.forgetManifests(ctx, d.ID, d.CreatedAt); err != nil {
				return bulkResult{}, err
			}
		}
		writes = append(writes, write{d, upsert})
	}
	first, err := s.bulk(ctx, writes)
	if err != nil {
		return bulkResult{}, err
	}
	again := make([]write, len(first.taken))
	for i, d := range first.taken {
		again[i] = write{d, replace}
	}
	second, err := s.bulk(ctx, again)
	return bulkResult{written: first.written + second.written, poison: append(first.poison, second.poison...)}, err
}

// heads returns what is stored under the ids of docs, without what lists show and
// the rest.
func (s *Store) heads(ctx context.Context, docs []*document) (map[string]*document, error) {
	ids := make([]string, len(docs))
	for i, d := range docs {
		ids[i] = d.ID
	}
	cursor, err := s.jobs.Find(ctx, bson.D{eq("_id", op("$in", ids))},
		options.Find().SetProjection(bson.D{eq("version", 1), eq("createdAt", 1), eq("finishedAt", 1)}))
	if err != nil {
		return nil, err
	}
	var found []*document
	if err := cursor.All(ctx, &found); err != nil {
		return nil, err
	}
	have := make(map[string]*document, len(found))
	for _, d := range found {
		have[d.ID] = d
	}
	return have, nil
}

// write is a document and how it is written.
type write struct {
	doc *document
	how writeKind
}

type writeKind int

const (
	insert  writeKind = iota
	upsert            // in the place of an older one, or of none
	replace           // in the place of an older one
)

func (w write) model() mongo.WriteModel {
	if w.how == insert {
		return mongo.NewInsertOneModel().SetDocument(w.doc)
	}
	return mongo.NewReplaceOneModel().SetFilter(w.doc.older()).SetReplacement(w.doc).SetUpsert(w.how == upsert)
}

// bulkResult says what became of the documents of one bulk. Those that are in none
// of the three are stale.
type bulkResult struct {
	written int
	taken   []*document // the key exists
	poison  []store.Rejected
}

func (s *Store) bulk(ctx context.Context, writes []write) (bulkResult, error) {
	if len(writes) == 0 {
		return bulkResult{}, nil
	}
	models := make([]mongo.WriteModel, len(writes))
	for i, w := range writes {
		models[i] = w.model()
	}
	res, err := s.jobs.BulkWrite(ctx, models, options.BulkWrite().SetOrdered(false))
	var refused mongo.BulkWriteException
	if err != nil && (!errors.As(err, &refused) || refused.WriteConcernError != nil) {
		return bulkResult{}, err
	}
	out := bulkResult{written: int(res.InsertedCount + res.MatchedCount + res.UpsertedCount)}
	if n := len(refused.WriteErrors); n > 0 && len(writes) > 1 && out.written+n != len(writes) {
		// The server (FerretDB is one) stopped at an error, or does not say what it
		// did. Nothing may count as written, or as stale, that was not tried.
		return s.oneByOne(ctx, writes)
	}
	for _, e := range refused.WriteErrors {
		if e.Index < 0 || e.Index >= len(writes) {
			return bulkResult{}, err
		}
		switch d := writes[e.Index].doc; {
		case e.Code == codeDuplicateKey:
			out.taken = append(out.taken, d)
		case poisonous(e.Code):
			out.poison = append(out.poison, store.Rejected{ID: d.ID, Err: fmt.Errorf("%w: %w", store.ErrInvalid, e)})
		default:
			return bulkResult{}, err
		}
	}
	return out, nil
}

// oneByOne writes each document by itself. Those that a bulk has written before
// count as stale.
func (s *Store) oneByOne(ctx context.Context, writes []write) (bulkResult, error) {
	var out bulkResult
	for i := range writes {
		one, err := s.bulk(ctx, writes[i:i+1])
		if err != nil {
			return bulkResult{}, err
		}
		out.written += one.written
		out.taken = append(out.taken, one.taken...)
		out.poison = append(out.poison, one.poison...)
	}
	return out, nil
}

const codeDuplicateKey = 11000

// poisonous says that the document is at fault and not the server: no repetition
// helps.
func poisonous(code int) bool {
	switch code {
	case 2, // BadValue
		9,     // FailedToParse
		14,    // TypeMismatch
		22,    // InvalidBSON
		121,   // DocumentValidationFailure, by a rule of the operator's
		10334, // BSONObjectTooLarge
		17280, // KeyTooLong, of servers before 4.2
		17419: // the document would grow beyond the largest size
		return true
	default:
		return false
	}
}

// Job implements store.Store.
func (s *Store) Job(ctx context.Context, id string) (job.Record, error) {
	var d document
	err := s.jobs.FindOne(ctx, bson.D{eq("_id", id)}).Decode(&d)
	if errors.Is(err, mongo.ErrNoDocuments) {
		return job.Record{}, store.ErrNotFound
	}
	if err != nil {
		return job.Record{}, failed("read a job", err)
	}
	return s.codec.Join(d.Summary, d.Rest)
}

// ListJobs implements store.Store.
func (s *Store) ListJobs(ctx context.Context, q busmsg.ListJobs) ([]job.Record, bool, error) {
	limit := q.Limit
	if limit <= 0 {
		limit = store.DefaultListLimit
	}
	limit = min(limit, store.MaxListLimit)
	cursor, err := s.jobs.Find(ctx, pageFilter(q), options.Find().
		SetSort(bson.D{eq("createdAt", -1), eq("_id", -1)}).SetLimit(int64(limit)+1).SetProjection(bson.D{eq("summary", 1)}))
	if err != nil {
		return nil, false, failed("list jobs", err)
	}
	defer func() { _ = cursor.Close(context.WithoutCancel(ctx)) }() // read to its end, or given up
	var items []job.Record
	size := 0
	for cursor.Next(ctx) {
		if len(items) == limit {
			return items, true, nil
		}
		var d document
		if err := cursor.Decode(&d); err != nil {
			return nil, false, failed("list jobs", err)
		}
		r, n, err := s.codec.Summary(d.Summary)
		if err != nil {
			return nil, false, err
		}
		if size += n + 1; size > store.MaxPageBytes && len(items) > 0 {
			return items, true, nil
		}
		items = append(items, r)
	}
	return items, false, failed("list jobs", cursor.Err())
}

func pageFilter(q busmsg.ListJobs) bson.D {
	filter := bson.D{}
	if q.Owner != "" {
		filter = append(filter, eq("owner", q.Owner))
	}
	if q.Queue != "" {
		filter = append(filter, eq("queue", q.Queue))
	}
	if len(q.States) > 0 {
		filter = append(filter, eq("state", op("$in", q.States)))
	}
	var conditions bson.A
	for _, k := range slices.Sorted(maps.Keys(q.Labels)) {
		conditions = append(conditions, bson.D{eq("labels", label(k, q.Labels[k]))})
	}
	if !q.Since.IsZero() {
		conditions = append(conditions, bson.D{eq("createdAt", op("$gte", ceilMilli(q.Since)))})
	}
	if !q.Until.IsZero() {
		conditions = append(conditions, bson.D{eq("createdAt", op("$lt", ceilMilli(q.Until)))})
	}
	if !q.BeforeAt.IsZero() {
		at := q.BeforeAt.UnixMilli()
		conditions = append(conditions, bson.D{eq("$or", bson.A{
			bson.D{eq("createdAt", op("$lt", at))},
			bson.D{eq("createdAt", at), eq("_id", op("$lt", q.BeforeID))},
		})})
	}
	if len(conditions) > 0 {
		filter = append(filter, eq("$and", conditions))
	}
	return filter
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

// Stats implements store.Store.
func (s *Store) Stats(ctx context.Context) (map[job.State]int64, error) {
	cursor, err := s.jobs.Aggregate(ctx, mongo.Pipeline{
		{eq("$group", bson.D{eq("_id", "$state"), eq("n", op("$sum", 1))})},
	})
	if err != nil {
		return nil, failed("count jobs", err)
	}
	var rows []struct {
		State job.State `bson:"_id"`
		N     int64     `bson:"n"`
	}
	if err := cursor.All(ctx, &rows); err != nil {
		return nil, failed("count jobs", err)
	}
	out := map[job.State]int64{}
	for _, r := range rows {
		out[r.State] = r.N
	}
	return out, nil
}

// TerminalVersions implements store.Store.
func (s *Store) TerminalVersions(ctx context.Context, ids []string) (map[string]uint64, error) {
	out := make(map[string]uint64, len(ids))
	for part := range slices.Chunk(ids, bulkSize) {
		cursor, err := s.jobs.Find(ctx, bson.D{eq("_id", op("$in", part)), eq("finishedAt", op("$exists", true))},
			options.Find().SetProjection(bson.D{eq("version", 1)}))
		if err != nil {
			return nil, failed("read versions", err)
		}
		var docs []document
		if err := cursor.All(ctx, &docs); err != nil {
			return nil, failed("read versions", err)
		}
		for _, d := range docs {
			out[d.ID] = uint64(d.Version)
		}
	}
	return out, nil
}

// resetBatch bounds what one round of ResetNonTerminal holds in memory: records
// can be as large as the registry allows.
const resetBatch = 50

// ResetNonTerminal implements store.Store, in batches: what was reset before an
// error stays so, and is not found again.
func (s *Store) ResetNonTerminal(ctx context.Context, now time.Time) (int, error) {
	var live []job.State
	for _, st := range job.States() {
		if !st.Terminal() {
			live = append(live, st)
		}
	}
	total := 0
	for {
		cursor, err := s.jobs.Find(ctx, bson.D{eq("state", op("$in", live))}, options.Find().SetLimit(resetBatch))
		if err != nil {
			return total, failed("read live jobs", err)
		}
		var docs []document
		if err := cursor.All(ctx, &docs); err != nil {
			return total, failed("read live jobs", err)
		}
		if len(docs) == 0 {
			return total, nil
		}
		ended := make([]job.Record, 0, len(docs))
		for _, d := range docs {
			r, err := s.codec.Join(d.Summary, d.Rest)
			if err != nil {
				return total, err
			}
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
			return total, fmt.Errorf("reset jobs of a lost registry: %d jobs cannot be written", len(docs))
		}
	}
}

// deleteBatch is of how many jobs one command deletes the output, of up to some
// 16 MiB each, so that none takes as long as a call may.
const deleteBatch = 20

// DeleteFinished implements store.Store. Output goes before its job, so that what
// an error leaves is found again.
func (s *Store) DeleteFinished(ctx context.Context, before time.Time, limit int) (int, error) {
	if limit <= 0 {
		return 0, nil
	}
	cursor, err := s.jobs.Find(ctx, bson.D{eq("finishedAt", op("$lt", before.UnixMilli()))},
		options.Find().SetSort(bson.D{eq("finishedAt", 1)}).SetLimit(int64(limit)).SetProjection(bson.D{eq("_id", 1)}))
	if err != nil {
		return 0, failed("find old jobs", err)
	}
	var docs []document
	if err := cursor.All(ctx, &docs); err != nil {
		return 0, failed("find old jobs", err)
	}
	for part := range slices.Chunk(docs, deleteBatch) {
		ids := make([]string, len(part))
		for i, d := range part {
			ids[i] = d.ID
		}
		if err := s.deleteOutput(ctx, ids); err != nil {
			return 0, failed("delete old output", err)
		}
		// A job that took the place of one of these meanwhile stays.
		if _, err := s.jobs.DeleteMany(ctx, bson.D{eq("_id", op("$in", ids)), eq("finishedAt", op("$lt", before.UnixMilli()))}); err != nil {
			return 0, failed("delete old jobs", err)
		}
	}
	if len(docs) == limit {
		return limit, nil // jobs first
	}
	for _, of := range []*mongo.Collection{s.chunks, s.noted} {
		if err := s.deleteOrphans(ctx, of, before.UnixMilli(), limit-len(docs)); err != nil {
			return len(docs), failed("delete output without a job", err)
		}
	}
	return len(docs), nil
}

// deleteOutput deletes what the jobs printed, and what they declared of it.
func (s *Store) deleteOutput(ctx context.Context, jobIDs []string) error {
	for _, of := range []*mongo.Collection{s.chunks, s.noted} {
		if _, err := of.DeleteMany(ctx, bson.D{eq("jobId", op("$in", jobIDs))}); err != nil {
			return err
		}
	}
	return nil
}

// deleteOrphans deletes output that arrived for jobs that are not there, once what
// the collection has of them is as old as jobs get, of at most limit jobs.
func (s *Store) deleteOrphans(ctx context.Context, of *mongo.Collection, before int64, limit int) error {
	// All the ids, and not the first few: those of jobs that are there would hide the others.
	cursor, err := of.Aggregate(ctx, mongo.Pipeline{
		{eq("$match", bson.D{eq("storedAt", op("$lt", before))})},
		{eq("$group", bson.D{eq("_id", "$jobId")})},
	})
	if err != nil {
		return err
	}
	defer func() { _ = cursor.Close(context.WithoutCancel(ctx)) }() // read to its end, or given up
	more := true
	for more && limit > 0 {
		ids := make([]string, 0, bulkSize)
		for len(ids) < bulkSize && more {
			if more = cursor.Next(ctx); !more {
				break
			}
			var d document
			if err := cursor.Decode(&d); err != nil {
				return err
			}
			ids = append(ids, d.ID)
		}
		orphans, err := s.unknown(ctx, ids)
		if err != nil {
			return err
		}
		orphans = orphans[:min(limit, len(orphans))]
		limit -= len(orphans)
		for part := range slices.Chunk(orphans, deleteBatch) {
			if err := s.deleteOutput(ctx, part); err != nil {
				return err
			}
		}
	}
	return cursor.Err()
}

// unknown returns the ids that no job has.
func (s *Store) unknown(ctx context.Context, ids []string) ([]string, error) {
	if len(ids) == 0 {
		return nil, nil
	}
	cursor, err := s.jobs.Find(ctx, bson.D{eq("_id", op("$in", ids))}, options.Find().SetProjection(bson.D{eq("_id", 1)}))
	if err != nil {
		return nil, err
	}
	var docs []document
	if err := cursor.All(ctx, &docs); err != nil {
		return nil, err
	}
	known := make(map[string]bool, len(docs))
	for _, d := range docs {
		known[d.ID] = true
	}
	return slices.DeleteFunc(ids, func(id string) bool { return known[id] }), nil
}
