// Package mongostore keeps jobs and output in MongoDB.
//
// It relies on nothing that a transaction, a TTL index or a pipeline update would
// give: each write is one document, guarded by the record's own version or by a
// unique id, and may be repeated. Writes are acknowledged by a majority, from the
// journal.
package mongostore

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"

	"go.mongodb.org/mongo-driver/v2/bson"
	"go.mongodb.org/mongo-driver/v2/mongo"
	"go.mongodb.org/mongo-driver/v2/mongo/options"
	"go.mongodb.org/mongo-driver/v2/mongo/readpref"
	"go.mongodb.org/mongo-driver/v2/mongo/writeconcern"

	"github.com/cmdexec/cmdexec/libs/store"
	"github.com/cmdexec/cmdexec/libs/store/internal/blob"
)

const (
	defaultDatabase  = "cmdexec"
	maxPool          = 50
	selectionTimeout = 5 * time.Second
	callTimeout      = 10 * time.Second // of one call, where ctx does not end before
	bulkSize         = 1000
)

// ErrUnavailable is wrapped by Open when the address is fine and the server does
// not answer as it should: try again later.
var ErrUnavailable = errors.New("the database does not answer")

// Store is a database of jobs and output in MongoDB. It is safe for concurrent use.
type Store struct {
	client *mongo.Client
	jobs   *mongo.Collection
	chunks *mongo.Collection
	noted  *mongo.Collection // manifests
	meta   *mongo.Collection
	codec  blob.Codec
}

var _ store.Store = (*Store)(nil)

// Open connects to the database that a mongodb:// address names ("cmdexec" where
// it names none) and makes its indexes. It blocks until the database has answered,
// or a few seconds. Its errors never contain the address, which may hold a password.
func Open(ctx context.Context, uri string) (*Store, error) {
	name, err := databaseName(uri)
	if err != nil {
		return nil, err
	}
	concern := writeconcern.Majority()
	concern.Journal = ptr(true)
	// What the address says of times goes before what is good for most.
	opts := options.Client().SetTimeout(callTimeout).SetServerSelectionTimeout(selectionTimeout).SetMaxPoolSize(maxPool).
		ApplyURI(uri).SetAppName("cmdexec").SetWriteConcern(concern)
	client, err := mongo.Connect(opts)
	if err != nil {
		return nil, errors.New("MONGODB_URI cannot be used: it must be an address such as mongodb://user:password@host:27017/cmdexec")
	}
	db := client.Database(name)
	s := &Store{
		client: client, jobs: db.Collection("jobs"), chunks: db.Collection("log_chunks"),
		// A manifest decides whether a chunk has to take a verdict back: no read of it may be old.
		noted: db.Collection("log_manifests", options.Collection().SetReadPreference(readpref.Primary())), meta: db.Collection("meta"),
	}
	if err := s.prepare(ctx); err != nil {
		_ = client.Disconnect(context.WithoutCancel(ctx)) // it never worked
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return s, nil
}

func databaseName(uri string) (string, error) {
	u, err := url.Parse(uri)
	if err != nil || u.Scheme != "mongodb" && u.Scheme != "mongodb+srv" {
		return "", errors.New("MONGODB_URI must be an address such as mongodb://user:password@host:27017/cmdexec")
	}
	if name := strings.TrimPrefix(u.Path, "/"); name != "" {
		return name, nil
	}
	return defaultDatabase, nil
}

// prepare makes the indexes; making one that is there changes nothing.
func (s *Store) prepare(ctx context.Context) error {
	newest := func(first ...bson.E) mongo.IndexModel {
		return mongo.IndexModel{Keys: append(bson.D(first), bson.E{Key: "createdAt", Value: -1}, bson.E{Key: "_id", Value: -1})}
	}
	up := func(name string) bson.E { return bson.E{Key: name, Value: 1} }
	for _, of := range []struct {
		collection *mongo.Collection
		indexes    []mongo.IndexModel
	}{
		{s.jobs, []mongo.IndexModel{
			newest(), newest(up("owner")), newest(up("state")), newest(up("queue")), newest(up("labels")),
			{Keys: bson.D{up("finishedAt")}},
		}},
		{s.chunks, []mongo.IndexModel{
			{Keys: bson.D{up("jobId"), up("attempt"), up("seq"), up("length")}},
			{Keys: bson.D{up("storedAt"), up("jobId")}},
		}},
		{s.noted, []mongo.IndexModel{
			{Keys: bson.D{up("verdict"), up("storedAt")}},
			{Keys: bson.D{up("jobId")}},
			{Keys: bson.D{up("storedAt"), up("jobId")}},
		}},
	} {
		// One a command: FerretDB panics on a command with two that are there.
		for _, index := range of.indexes {
			if _, err := of.collection.Indexes().CreateOne(ctx, index); err != nil {
				return failed("make the indexes", err)
			}
		}
	}
	return nil
}

// Ping implements store.Store.
func (s *Store) Ping(ctx context.Context) error {
	return failed("reach the database", s.client.Ping(ctx, nil))
}

// Close implements store.Store.
func (s *Store) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	return failed("close the database", s.client.Disconnect(ctx))
}

// Generation implements store.Store.
func (s *Store) Generation(ctx context.Context) (string, error) {
	var doc struct {
		Generation string `bson:"generation"`
	}
	err := s.meta.FindOne(ctx, bson.D{{Key: "_id", Value: "registry"}}).Decode(&doc)
	if errors.Is(err, mongo.ErrNoDocuments) {
		return "", nil
	}
	return doc.Generation, failed("read the generation", err)
}

// SetGeneration implements store.Store.
func (s *Store) SetGeneration(ctx context.Context, generation string) error {
	_, err := s.meta.ReplaceOne(ctx, bson.D{{Key: "_id", Value: "registry"}},
		bson.D{{Key: "_id", Value: "registry"}, {Key: "generation", Value: generation}}, options.Replace().SetUpsert(true))
	return failed("set the generation", err)
}

func failed(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", what, err)
}

func ptr[T any](v T) *T { return &v }

func eq(key string, value any) bson.E { return bson.E{Key: key, Value: value} }

// op is a condition such as {$lt: value}.
func op(name string, value any) bson.D { return bson.D{{Key: name, Value: value}} }
