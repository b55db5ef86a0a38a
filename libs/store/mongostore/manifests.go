package mongostore

import (
	"context"
	"errors"
	"slices"
	"strconv"
	"time"

	"go.mongodb.org/mongo-driver/v2/bson"
	"go.mongodb.org/mongo-driver/v2/mongo"
	"go.mongodb.org/mongo-driver/v2/mongo/options"

	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/store"
)

// manifestDocument is what an attempt's output is compared with. Revision is
// raised by every chunk that arrives after it, before and after a verdict, so that
// a verdict on what was read before is refused.
type manifestDocument struct {
	ID       string            `bson:"_id"`
	JobID    string            `bson:"jobId"`
	Attempt  int               `bson:"attempt"`
	Chunks   int64             `bson:"chunks"`
	Bytes    int64             `bson:"bytes"`
	SHA256   string            `bson:"sha256"`
	NotedAt  int64             `bson:"notedAt"`  // milliseconds
	StoredAt int64             `bson:"storedAt"` // milliseconds, of the manifest or the newest chunk after it
	Revision int64             `bson:"revision"`
	Verdict  busmsg.LogVerdict `bson:"verdict"` // empty: not compared with what is stored now
}

func attemptID(jobID string, attempt int) string { return jobID + "/" + strconv.Itoa(attempt) }

// note keeps the first manifest of each attempt.
func (s *Store) note(ctx context.Context, manifests []store.LogManifest, now int64) error {
	docs := make([]any, len(manifests))
	for i := range manifests {
		m := &manifests[i]
		docs[i] = &manifestDocument{
			ID: attemptID(m.JobID, m.Attempt), JobID: m.JobID, Attempt: m.Attempt,
			Chunks: m.Chunks, Bytes: m.Bytes, SHA256: m.SHA256, NotedAt: now, StoredAt: now,
		}
	}
	return insertNew(ctx, s.noted, docs)
}

// oneMore raises the revision.
func oneMore() bson.E { return eq("$inc", bson.D{eq("revision", int64(1))}) }

// forgetManifests deletes the manifests of a job that were noted before the given
// time, and has the others compared again, since output was deleted.
func (s *Store) forgetManifests(ctx context.Context, jobID string, before int64) error {
	_, err := s.noted.DeleteMany(ctx, bson.D{eq("jobId", jobID), eq("notedAt", op("$lt", before))})
	if err != nil {
		return err
	}
	_, err = s.noted.UpdateMany(ctx, bson.D{eq("jobId", jobID)}, bson.D{eq("$set", bson.D{eq("verdict", "")}), oneMore()})
	return err
}

// takeBack has the output of attempts compared again. Chunks that were stored
// before count too: the call that stored them may have ended there.
func (s *Store) takeBack(ctx context.Context, chunks []store.LogChunk, now int64) error {
	ids := make([]string, len(chunks))
	for i := range chunks {
		ids[i] = attemptID(chunks[i].JobID, chunks[i].Attempt)
	}
	slices.Sort(ids)
	for part := range slices.Chunk(slices.Compact(ids), bulkSize) {
		these := bson.D{eq("_id", op("$in", part))}
		// A write that matches nothing would wait for a majority all the same.
		err := s.noted.FindOne(ctx, these, options.FindOne().SetProjection(bson.D{eq("_id", 1)})).Err()
		if errors.Is(err, mongo.ErrNoDocuments) {
			continue
		}
		if err != nil {
			return err
		}
		_, err = s.noted.UpdateMany(ctx, these, bson.D{
			eq("$set", bson.D{eq("verdict", ""), eq("storedAt", now)}), oneMore(),
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// manifest returns what was noted of an attempt; nothing where that is nothing.
func (s *Store) manifest(ctx context.Context, jobID string, attempt int) (manifestDocument, error) {
	var d manifestDocument
	err := s.noted.FindOne(ctx, bson.D{eq("_id", attemptID(jobID, attempt))}).Decode(&d)
	if errors.Is(err, mongo.ErrNoDocuments) {
		return d, nil
	}
	return d, err
}

// UncheckedLogs implements store.Store.
func (s *Store) UncheckedLogs(ctx context.Context, before time.Time, limit int) ([]store.LogManifest, error) {
	if limit <= 0 {
		return nil, nil
	}
	cursor, err := s.noted.Find(ctx, bson.D{eq("verdict", ""), eq("storedAt", op("$lt", before.UnixMilli()))},
		options.Find().SetSort(bson.D{eq("storedAt", 1)}).SetLimit(int64(limit)))
	if err != nil {
		return nil, failed("read manifests", err)
	}
	var docs []manifestDocument
	if err := cursor.All(ctx, &docs); err != nil {
		return nil, failed("read manifests", err)
	}
	out := make([]store.LogManifest, len(docs))
	for i, d := range docs {
		out[i] = store.LogManifest{
			JobID: d.JobID, Attempt: d.Attempt, Seen: d.Revision,
			Manifest: job.Manifest{Chunks: d.Chunks, Bytes: d.Bytes, SHA256: d.SHA256},
		}
	}
	return out, nil
}

// JudgeLogs implements store.Store.
func (s *Store) JudgeLogs(ctx context.Context, m store.LogManifest, v busmsg.LogVerdict) (bool, error) {
	res, err := s.noted.UpdateOne(ctx,
		bson.D{eq("_id", attemptID(m.JobID, m.Attempt)), eq("verdict", ""), eq("revision", m.Seen)},
		bson.D{eq("$set", bson.D{eq("verdict", v)})})
	if err != nil {
		return false, failed("store a verdict", err)
	}
	return res.ModifiedCount == 1, nil
}

// BadLogs implements store.Store.
func (s *Store) BadLogs(ctx context.Context, jobID string, attempt int) (bool, error) {
	d, err := s.manifest(ctx, jobID, attempt)
	return d.Verdict.Bad(), failed("read a verdict", err)
}
