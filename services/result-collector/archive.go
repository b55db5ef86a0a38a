package collector

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/id"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/failpoint"
	"github.com/cmdexec/cmdexec/libs/store"
)

// A batch is stored in one transaction. Readers of a job that has just ended wait
// for the output in its result, hence the short wait; followers of a running one
// read the stream.
const (
	resultsWait = 10 * time.Millisecond
	logsWait    = 50 * time.Millisecond
	logsBytes   = 8 << 20
)

// archiveResults stores the output that rides inside results.
func (s *Service) archiveResults(ctx context.Context) error {
	return s.bus.ConsumeBatch(ctx, bus.ResultsArchive, bus.BatchOptions{MaxWait: resultsWait}, s.storeTails)
}

// storeTails stores what rides in results, and notes the manifest of each attempt
// whose output has to be compared with it later. It is safe to repeat. A result that cannot be read is left to `state`,
// which keeps it as a dead letter.
func (s *Service) storeTails(ctx context.Context, msgs []bus.Msg) error {
	var t tails
	for _, m := range msgs {
		if r, err := decodeResult(m.Data); err == nil {
			t.add(&r)
		}
	}
	return s.storeChunks(ctx, "results", t.chunks, t.manifests...)
}

// tails is what results have for the database.
type tails struct {
	chunks    []store.LogChunk
	manifests []store.LogManifest
}

func (t *tails) add(r *busmsg.Result) {
	for _, c := range r.Tail {
		t.chunks = append(t.chunks, store.LogChunk{JobID: r.JobID, Attempt: r.Attempt, Chunk: c})
	}
	if r.Manifest != nil && !whole(*r.Manifest, r.Tail) {
		t.manifests = append(t.manifests, store.LogManifest{JobID: r.JobID, Attempt: r.Attempt, Manifest: *r.Manifest})
	}
}

func (t *tails) empty() bool { return len(t.chunks)+len(t.manifests) == 0 }

// archiveLogs stores all other output.
func (s *Service) archiveLogs(ctx context.Context) error {
	return s.bus.ConsumeBatch(ctx, bus.LogsArchive, bus.BatchOptions{MaxMessages: 512, MaxBytes: logsBytes, MaxWait: logsWait}, s.storeLogs)
}

// storeLogs is safe to repeat. What comes late, for an attempt that was given up
// or a job that has ended, is stored too: worker and edge bound how much that is.
func (s *Service) storeLogs(ctx context.Context, msgs []bus.Msg) error {
	poison := map[int]error{}
	chunks := make([]store.LogChunk, 0, len(msgs))
	for i, m := range msgs {
		c, err := decodeChunk(m)
		if err != nil {
			poison[i] = err
			continue
		}
		chunks = append(chunks, c)
	}
	if err := s.storeChunks(ctx, "logs", chunks); err != nil {
		return err
	}
	if len(poison) > 0 {
		s.metrics.poison.WithLabelValues("logs").Add(float64(len(poison)))
		return &bus.BatchError{Poison: poison}
	}
	return nil
}

// decodeChunk reads and checks a message of LOGS. The chunk's data points into it.
func decodeChunk(m bus.Msg) (store.LogChunk, error) {
	lease, c, err := workerproto.DecodeChunk(m.Data)
	if err != nil {
		return store.LogChunk{}, err
	}
	if err := id.Check(id.Job, lease.JobID); err != nil {
		return store.LogChunk{}, fmt.Errorf("jobId: %w", err)
	}
	if !strings.HasSuffix(m.Subject, "."+lease.JobID) {
		return store.LogChunk{}, errors.New("the subject is another job's")
	}
	if lease.Attempt < 1 {
		return store.LogChunk{}, errors.New("attempt must be at least 1")
	}
	if err := c.Validate(); err != nil {
		return store.LogChunk{}, err
	}
	return store.LogChunk{JobID: lease.JobID, Attempt: lease.Attempt, Chunk: c}, nil
}

func (s *Service) storeChunks(ctx context.Context, from string, chunks []store.LogChunk, manifests ...store.LogManifest) error {
	if len(chunks)+len(manifests) == 0 {
		return nil
	}
	if err := s.store.AppendChunks(ctx, chunks, manifests...); err != nil {
		s.metrics.failures.WithLabelValues(from).Inc()
		return fmt.Errorf("store %d chunks of output: %w", len(chunks), err)
	}
	failpoint.At(failpoint.CollectorArchived)
	size := 0
	for i := range chunks {
		size += len(chunks[i].Data)
	}
	s.metrics.chunks.WithLabelValues(from).Add(float64(len(chunks)))
	s.metrics.bytes.WithLabelValues(from).Add(float64(size))
	return nil
}
