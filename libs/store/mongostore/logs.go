package mongostore

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"go.mongodb.org/mongo-driver/v2/bson"
	"go.mongodb.org/mongo-driver/v2/mongo"
	"go.mongodb.org/mongo-driver/v2/mongo/options"

	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/store"
)

// chunkOverhead is what the JSON of a chunk has beside its data.
const chunkOverhead = 128

// chunkDocument is a chunk of output. Its id is its place, so that storing it
// again is refused by the database itself.
type chunkDocument struct {
	ID       string             `bson:"_id"`
	JobID    string             `bson:"jobId"`
	Attempt  int                `bson:"attempt"`
	Seq      int64              `bson:"seq"`
	Offset   int64              `bson:"offset"`
	Stream   workerproto.Stream `bson:"stream"`
	Time     int64              `bson:"time"` // milliseconds
	Length   int                `bson:"length"`
	Data     []byte             `bson:"data"`
	StoredAt int64              `bson:"storedAt"` // milliseconds
}

// AppendChunks implements store.Store. After an error some chunks may be stored,
// which does no harm: they are left as they are next time.
func (s *Store) AppendChunks(ctx context.Context, chunks []store.LogChunk, manifests ...store.LogManifest) error {
	docs := make([]any, 0, len(chunks))
	now := time.Now().UnixMilli()
	for i := range chunks {
		c := &chunks[i]
		if c.JobID == "" || c.Attempt < 1 {
			return fmt.Errorf("%w: output needs a job and an attempt", store.ErrInvalid)
		}
		if err := c.Validate(); err != nil {
			return fmt.Errorf("%w: %w", store.ErrInvalid, err)
		}
		docs = append(docs, &chunkDocument{
			ID:    attemptID(c.JobID, c.Attempt) + "/" + strconv.FormatInt(c.Seq, 10),
			JobID: c.JobID, Attempt: c.Attempt, Seq: c.Seq, Offset: c.Offset, Stream: c.Stream,
			Time: c.Time.UnixMilli(), Length: len(c.Data), Data: c.Data, StoredAt: now,
		})
	}
	for i := range manifests {
		if err := manifests[i].Validate(); err != nil {
			return err
		}
	}
	if err := insertNew(ctx, s.chunks, docs); err != nil {
		return failed("store output", err)
	}
	// Whoever compares these attempts now may have read them without the chunks, and
	// what was found before does not hold any more. Nearly always there is none.
	if err := s.takeBack(ctx, chunks, now); err != nil {
		return failed("take back verdicts", err)
	}
	return failed("note manifests", s.note(ctx, manifests, now))
}

// insertNew leaves what is there as it is.
func insertNew(ctx context.Context, into *mongo.Collection, docs []any) error {
	for part := range slices.Chunk(docs, bulkSize) {
		_, err := into.InsertMany(ctx, part, options.InsertMany().SetOrdered(false))
		if err != nil && !onlyDuplicates(err) {
			return err
		}
	}
	return nil
}

// onlyDuplicates reports whether the only thing wrong is that chunks were stored
// before.
func onlyDuplicates(err error) bool {
	var bulk mongo.BulkWriteException
	if !errors.As(err, &bulk) || bulk.WriteConcernError != nil {
		return false
	}
	return !slices.ContainsFunc(bulk.WriteErrors, func(e mongo.BulkWriteError) bool { return e.Code != codeDuplicateKey })
}

// Logs implements store.Store.
func (s *Store) Logs(ctx context.Context, q busmsg.GetLogs) (busmsg.Logs, error) {
	var out busmsg.Logs
	attempt := bson.D{eq("jobId", q.JobID), eq("attempt", q.Attempt)}
	// Before the page, so that whoever sees that all is stored has been given all.
	if err := s.count(ctx, attempt, &out); err != nil {
		return busmsg.Logs{}, failed("count output", err)
	}
	noted, err := s.manifest(ctx, q.JobID, q.Attempt)
	if err != nil {
		return busmsg.Logs{}, failed("read a verdict", err)
	}
	out.Verdict = noted.Verdict
	if out.StoredChunks == 0 {
		return out, nil
	}
	if err := s.page(ctx, attempt, q, &out); err != nil {
		return busmsg.Logs{}, failed("read output", err)
	}
	return out, nil
}

// count adds up an attempt's chunks by their length, which the index alone
// answers: most have one of a few lengths. (FerretDB sums one field of a group.)
func (s *Store) count(ctx context.Context, attempt bson.D, out *busmsg.Logs) error {
	cursor, err := s.chunks.Aggregate(ctx, mongo.Pipeline{
		{eq("$match", attempt)},
		{eq("$group", bson.D{eq("_id", "$length"), eq("chunks", op("$sum", 1))})},
	})
	if err != nil {
		return err
	}
	var groups []struct {
		Length int64 `bson:"_id"`
		Chunks int64 `bson:"chunks"`
	}
	if err := cursor.All(ctx, &groups); err != nil {
		return err
	}
	for _, g := range groups {
		out.StoredChunks += g.Chunks
		out.StoredBytes += g.Chunks * g.Length
	}
	return nil
}

func (s *Store) page(ctx context.Context, attempt bson.D, q busmsg.GetLogs, out *busmsg.Logs) error {
	limit := q.Limit
	if limit <= 0 {
		limit = store.DefaultLogLimit
	}
	limit = min(limit, store.MaxLogLimit)
	filter := append(slices.Clone(attempt), eq("seq", op("$gt", q.After)))
	if q.Stream != "" {
		filter = append(filter, eq("stream", q.Stream))
	}
	cursor, err := s.chunks.Find(ctx, filter, options.Find().SetSort(bson.D{eq("seq", 1)}).SetLimit(int64(limit)+1))
	if err != nil {
		return err
	}
	defer func() { _ = cursor.Close(context.WithoutCancel(ctx)) }() // read to its end, or given up
	data, size := 0, 0
	for cursor.Next(ctx) {
		var d chunkDocument
		if err := cursor.Decode(&d); err != nil {
			return err
		}
		data += len(d.Data)
		size += base64.StdEncoding.EncodedLen(len(d.Data)) + chunkOverhead
		full := len(out.Chunks) == limit || size > store.MaxPageBytes || q.MaxBytes > 0 && data > q.MaxBytes
		if full && len(out.Chunks) > 0 {
			out.More = true
			return nil
		}
		out.Chunks = append(out.Chunks, workerproto.Chunk{
			Seq: d.Seq, Offset: d.Offset, Stream: d.Stream, Time: time.UnixMilli(d.Time).UTC(), Data: d.Data,
		})
	}
	return cursor.Err()
}
