package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/cmdexec/cmdexec/tests/chaos/history"
)

// bitsFlipped looks at what the NATS server does with a byte of the registry that
// is not what was written. It does so with copies of the store, so that the run
// goes on with the true one: nothing is promised here, and the answer is to be known.
type bitsFlipped struct{}

// flips is how many copies are damaged, in one place each.
const flips = 6

func (bitsFlipped) inject(ctx context.Context, s *scene) error {
	dir := filepath.Join(s.rig.Options.Dir, "flipped")
	// The server's own files are quiet while it is down.
	if err := s.rig.NATS[0].Kill(); err != nil {
		return err
	}
	err := copyTree(ctx, s.rig.StoreDirs()[0], filepath.Join(dir, "true"))
	if err := errors.Join(err, s.rig.NATS[0].Start()); err != nil {
		return err
	}
	e := history.Fault{Name: "bits-flipped", Row: "41"}
	whole, _, err := s.spare(ctx, filepath.Join(dir, "true"))
	if err != nil {
		return err
	}
	s.told(e, "the registry has %d keys", len(whole))
	for i := range flips {
		to := filepath.Join(dir, fmt.Sprintf("copy-%d", i))
		if err := copyTree(ctx, filepath.Join(dir, "true"), to); err != nil {
			return err
		}
		where, err := flip(to, s)
		if err != nil {
			return err
		}
		have, said, err := s.spare(ctx, to)
		if err != nil {
			s.told(e, "a byte of %s: the server does not start: %v", where, err)
			continue
		}
		missing, other := 0, 0
		for key, data := range whole {
			switch got, ok := have[key]; {
			case !ok:
				missing++
			case got != data:
				other++
			}
		}
		s.told(e, "a byte of %s: %d keys missing, %d with other data, %d of them all; the server says %q", where, missing, other, len(whole), said)
	}
	return os.RemoveAll(dir)
}

func (bitsFlipped) heal(ctx context.Context, s *scene) error {
	if err := s.rig.StartAll(); err != nil {
		return err
	}
	return s.rig.Ready(ctx)
}

// flip changes one byte of a block of the registry, and says where.
func flip(store string, s *scene) (string, error) {
	blocks, err := filepath.Glob(filepath.Join(store, "jetstream", "*", "streams", "KV_jobs", "msgs", "*.blk"))
	if err != nil {
		return "", err
	}
	for range 100 {
		if len(blocks) == 0 {
			break
		}
		block := blocks[s.rng.IntN(len(blocks))]
		data, err := os.ReadFile(block)
		if err != nil {
			return "", err
		}
		if len(data) == 0 {
			continue
		}
		at := s.rng.IntN(len(data))
		data[at] ^= 1 << s.rng.IntN(8)
		return fmt.Sprintf("%s at %d of %d", filepath.Base(block), at, len(data)), os.WriteFile(block, data, 0o600)
	}
	return "", errors.New("the registry has no block with data")
}

var complaint = regexp.MustCompile(`\[(?:WRN|ERR)\] (.*)`)

// spare starts a server of its own on a store, and returns what the registry has
// there, by subject, and what the server complained of.
func (s *scene) spare(ctx context.Context, store string) (map[string]string, string, error) {
	p, url, err := s.rig.SpareNATS(store)
	if err != nil {
		return nil, "", err
	}
	defer p.Kill() //nolint:errcheck // its store is thrown away
	all := map[string]string{}
	err = s.within(ctx, 20*time.Second, func() error {
		nc, err := nats.Connect(url)
		if err != nil {
			return err
		}
		defer nc.Close()
		js, err := jetstream.New(nc)
		if err != nil {
			return err
		}
		stream, err := js.Stream(ctx, "KV_jobs")
		if err != nil {
			return err
		}
		info, err := stream.Info(ctx, jetstream.WithSubjectFilter(">"))
		if err != nil {
			return err
		}
		for subject := range info.State.Subjects {
			m, err := stream.GetLastMsgForSubject(ctx, subject)
			if err == nil { // else it is not there
				all[subject] = string(m.Data)
			}
		}
		return nil
	})
	if err := errors.Join(err, p.Kill()); err != nil {
		return nil, "", err
	}
	log, err := os.ReadFile(p.Log())
	if err != nil {
		return nil, "", err
	}
	var said []string
	for _, m := range complaint.FindAllStringSubmatch(string(log), -1) {
		said = append(said, m[1])
	}
	return all, strings.Join(said, "; "), nil
}

func copyTree(ctx context.Context, from, to string) error {
	if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
		return err
	}
	if out, err := exec.CommandContext(ctx, "cp", "-r", from, to).CombinedOutput(); err != nil {
		return fmt.Errorf("copy %s: %w: %s", from, err, out)
	}
	return nil
}
