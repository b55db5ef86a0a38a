package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/cmdexec/cmdexec/tests/chaos/history"
	"github.com/cmdexec/cmdexec/tests/chaos/rig"
)

// clusterFaults are those of the suite cluster beside kills.
func clusterFaults() []entry {
	return []entry{
		{"leader-partitioned", "11", suiteCluster, false, func() fault { return &leaderPartitioned{mode: rig.Cut} }},
		{"leader-half-open", "11", suiteCluster, false, func() fault { return &leaderPartitioned{mode: rig.Hole} }},
	}
}

// told notes a figure of a fault, in the history and for whoever watches.
func (s *scene) told(e history.Fault, format string, args ...any) {
	e.Phase, e.Detail = history.Told, fmt.Sprintf(format, args...)
	s.w.Add(history.Event{Fault: &e})
	fmt.Fprintf(s.log, "  %s: %s\n", e.Name, e.Detail)
}

// leaderPartitioned takes the network between the NATS server that leads the
// registry and the two others, and gives it back. Clients reach all three, so that
// some are on the side that can decide nothing.
type leaderPartitioned struct {
	mode   rig.Mode
	leader int
}

func (f *leaderPartitioned) name() history.Fault {
	if f.mode == rig.Hole {
		return history.Fault{Name: "leader-half-open", Row: "11"}
	}
	return history.Fault{Name: "leader-partitioned", Row: "11"}
}

func (f *leaderPartitioned) inject(ctx context.Context, s *scene) error {
	if err := s.within(ctx, 30*time.Second, func() (err error) {
		f.leader, err = registryLeader(ctx, s.rig.NATSURL())
		return err
	}); err != nil {
		return err
	}
	e := f.name()
	e.Phase = history.Divided
	s.w.Add(history.Event{Fault: &e})
	s.rig.Isolate(f.leader, f.mode)
	began := time.Now()
	other := s.rig.ServerURL((f.leader + 1) % len(s.rig.NATS))
	if err := s.within(ctx, time.Minute, func() error {
		now, err := registryLeader(ctx, other)
		if err == nil && now == f.leader {
			err = fmt.Errorf("server %d leads the registry after it was cut off", now)
		}
		return err
	}); err != nil {
		return err
	}
	s.told(f.name(), "the registry had another leader after %.1fs", time.Since(began).Seconds())
	// Services that are connected to the one that was cut off stay with it.
	most := s.between(15*time.Second, 25*time.Second)
	hold, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	if _, err := s.load.canary(hold); err == nil {
		s.told(f.name(), "a new job had run %.1fs after the cut", time.Since(began).Seconds())
		wait(hold, most)
	} else if ctx.Err() == nil {
		s.told(f.name(), "no new job had run %.1fs after the cut", time.Since(began).Seconds())
	}
	return ctx.Err()
}

// heal is over when the server has heard of everything: until then it may tell
// what it knew before.
func (f *leaderPartitioned) heal(ctx context.Context, s *scene) error {
	s.rig.Isolate(f.leader, rig.Pass)
	began := time.Now()
	if err := s.within(ctx, time.Minute, func() error {
		cluster, err := registryCluster(ctx, s.rig.NATSURL())
		if err != nil {
			return err
		}
		for _, r := range cluster.Replicas {
			if !r.Current || r.Lag > 0 {
				return fmt.Errorf("server %s lacks %d changes of the registry", r.Name, r.Lag)
			}
		}
		return nil
	}); err != nil {
		return err
	}
	s.told(f.name(), "the server had caught up %.1fs after the heal", time.Since(began).Seconds())
	return nil
}

// registryLeader is the number of the server that leads the registry's stream.
func registryLeader(ctx context.Context, url string) (int, error) {
	cluster, err := registryCluster(ctx, url)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimPrefix(cluster.Leader, "n"))
}

// registryCluster says who keeps the registry's stream, where it has a leader.
func registryCluster(ctx context.Context, url string) (*jetstream.ClusterInfo, error) {
	nc, err := nats.Connect(url)
	if err != nil {
		return nil, err
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	stream, err := js.Stream(ctx, "KV_jobs")
	if err != nil {
		return nil, err
	}
	cluster := stream.CachedInfo().Cluster
	if cluster == nil || cluster.Leader == "" {
		return nil, errors.New("nobody leads the registry")
	}
	return cluster, nil
}
