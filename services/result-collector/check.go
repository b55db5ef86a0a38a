package collector

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"strings"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/job"
	"github.com/cmdexec/cmdexec/libs/core/workerproto"
	"github.com/cmdexec/cmdexec/libs/kit/lifecycle"
	"github.com/cmdexec/cmdexec/libs/store"
)

// Output that does not come whole inside its result is compared with its manifest
// once it has been quiet for settleWait: the rest is on its way in LOGS until then.
// The bounds keep what this reads from the database small beside what is written.
const (
	settleWait  = 10 * time.Second
	checkEvery  = 2 * time.Second // while little is due
	checkBatch  = 64              // attempts
	checkBytes  = 32 << 20        // output read in a second, on average
	checkErrors = 4               // of a batch; then the database is taken to be away
)

// tally adds up chunks in order of seq.
type tally struct {
	want        job.Manifest
	have, extra int64 // chunks up to the last one declared, and beyond
	bytes       int64
	sum         hash.Hash
}

func newTally(want job.Manifest) *tally { return &tally{want: want, sum: sha256.New()} }

// add takes chunks that differ in seq, in order.
func (t *tally) add(chunks []workerproto.Chunk) {
	for i := range chunks {
		if chunks[i].Seq <= t.want.Chunks {
			t.have++
		} else {
			t.extra++
		}
		t.bytes += int64(len(chunks[i].Data))
		t.sum.Write(chunks[i].Data)
	}
}

// verdict compares. A hash that was not declared is not compared.
func (t *tally) verdict() busmsg.LogVerdict {
	switch {
	case t.have < t.want.Chunks:
		return busmsg.LogIncomplete
	case t.extra > 0, t.bytes != t.want.Bytes,
		t.want.SHA256 != "" && !strings.EqualFold(t.want.SHA256, hex.EncodeToString(t.sum.Sum(nil))):
		return busmsg.LogDiffers
	}
	return busmsg.LogComplete
}

// whole reports whether a result holds all the output that it declares, so that
// nothing is left to compare.
func whole(m job.Manifest, tail []workerproto.Chunk) bool {
	if int64(len(tail)) != m.Chunks {
		return false
	}
	for i := range tail {
		if tail[i].Seq != int64(i)+1 {
			return false
		}
	}
	t := newTally(m)
	t.add(tail)
	return t.verdict() == busmsg.LogComplete
}

// checkLogs compares stored output with its manifests until ctx ends. What is due
// is in the database, so that a collector that starts goes on where another ended.
// Several do the same work, and one of them stores the verdict.
func (s *Service) checkLogs(ctx context.Context) error {
	for {
		more, err := s.checkDue(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			s.metrics.failures.WithLabelValues("checks").Inc()
			s.logger.Warn("output was not compared with its manifests, will try again", "err", err)
		}
		if !more && lifecycle.Sleep(ctx, checkEvery) != nil {
			return nil
		}
	}
}

// checkDue compares one batch. One attempt that cannot be read does not keep the
// others out.
func (s *Service) checkDue(ctx context.Context) (more bool, err error) {
	due, err := s.store.UncheckedLogs(ctx, s.now().Add(-settleWait), checkBatch)
	if err != nil {
		return false, err
	}
	failed := 0
	for i := range due {
		if one := s.check(ctx, due[i]); one != nil {
			err = fmt.Errorf("%s attempt %d: %w", due[i].JobID, due[i].Attempt, one)
			if failed++; failed == checkErrors || ctx.Err() != nil {
				break
			}
		}
	}
	return err == nil && len(due) == checkBatch, err
}

func (s *Service) check(ctx context.Context, m store.LogManifest) error {
	v, stored, err := s.compare(ctx, m)
	if err != nil {
		return err
	}
	taken, err := s.store.JudgeLogs(ctx, m, v)
	if err != nil || !taken {
		return err
	}
	s.metrics.checks.WithLabelValues(string(v)).Inc()
	if v.Bad() {
		s.logger.Warn("stored output is not what its manifest declares", "job", m.JobID, "attempt", m.Attempt, "verdict", string(v),
			"missingChunks", m.Chunks-stored.StoredChunks, "missingBytes", m.Bytes-stored.StoredBytes)
	}
	return nil
}

// compare reads what is stored, as far as it has to, at no more than checkBytes a
// second. What it returns of the output are the counts.
func (s *Service) compare(ctx context.Context, m store.LogManifest) (busmsg.LogVerdict, busmsg.Logs, error) {
	t, q := newTally(m.Manifest), busmsg.GetLogs{JobID: m.JobID, Attempt: m.Attempt, Limit: store.MaxLogLimit}
	for {
		page, err := s.store.Logs(ctx, q)
		if err != nil {
			return "", page, err
		}
		if page.StoredChunks < m.Chunks { // no need to read on
			return busmsg.LogIncomplete, page, nil
		}
		before := t.bytes
		t.add(page.Chunks)
		if !page.More || len(page.Chunks) == 0 {
			return t.verdict(), page, nil
		}
		q.After = page.Chunks[len(page.Chunks)-1].Seq
		if err := lifecycle.Sleep(ctx, time.Duration(t.bytes-before)*time.Second/checkBytes); err != nil {
			return "", page, err
		}
	}
}
