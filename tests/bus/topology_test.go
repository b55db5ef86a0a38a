package bus_test

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/natsd"
	"github.com/cmdexec/cmdexec/libs/natsd/natsdtest"
)

const golden = "testdata/topology.json"

// CMDEXEC_UPDATE_GOLDEN=1 rewrites the file.
func updateGolden() bool { return os.Getenv("CMDEXEC_UPDATE_GOLDEN") != "" }

// raw is a plain client, to look at the server past libs/bus.
func raw(t *testing.T, s *natsd.Server) jetstream.JetStream {
	nc, err := nats.Connect("", nats.InProcessServer(s))
	require.NoError(t, err)
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	require.NoError(t, err)
	return js
}

// topology describes every stream and consumer of a server: names and settings.
func topology(t *testing.T, js jetstream.JetStream) []byte {
	ctx := testContext(t)
	type described struct {
		Stream    map[string]any            `json:"stream"`
		Consumers map[string]map[string]any `json:"consumers,omitempty"`
	}
	plain := func(v any) map[string]any {
		data, err := json.Marshal(v)
		require.NoError(t, err)
		var m map[string]any
		require.NoError(t, json.Unmarshal(data, &m))
		return m
	}
	all := map[string]described{}
	streams := js.ListStreams(ctx)
	for info := range streams.Info() {
		config := plain(info.Config)
		if m, ok := config["metadata"].(map[string]any); ok {
			for k := range m {
				switch {
				case strings.HasPrefix(k, "_nats."):
					delete(m, k) // the server's own, by its version
				case k == "cmdexec.generation":
					require.NotEmpty(t, m[k])
					m[k] = "(an id)"
				}
			}
		}
		d := described{Stream: config, Consumers: map[string]map[string]any{}}
		s, err := js.Stream(ctx, info.Config.Name)
		require.NoError(t, err)
		consumers := s.ListConsumers(ctx)
		for c := range consumers.Info() {
			config := plain(c.Config)
			delete(config, "metadata")
			d.Consumers[c.Name] = config
		}
		require.NoError(t, consumers.Err())
		all[info.Config.Name] = d
	}
	require.NoError(t, streams.Err())
	out, err := json.MarshalIndent(all, "", "  ")
	require.NoError(t, err)
	return append(out, '\n')
}

// The names and settings on the server are a contract with every other version and
// with operators: a change of this golden file is a change of the topology.
func TestTopologyIsAsWritten(t *testing.T) {
	s := natsdtest.Start(t)
	c := connect(t, s)
	js := raw(t, s)
	bind(t, c, bus.Sizes{Jobs: 64 << 20, Results: 32 << 20, Logs: 48 << 20})
	got := topology(t, js)
	if updateGolden() {
		require.NoError(t, os.WriteFile(golden, got, 0o644))
	}
	want, err := os.ReadFile(golden)
	require.NoError(t, err)
	require.Equal(t, string(want), string(got))

	generation := c.Registry().Generation()
	e := create(t, c)
	require.NoError(t, bus.Apply(testContext(t), c, bus.Sizes{Jobs: 64 << 20, Results: 32 << 20, Logs: 48 << 20}))
	require.Equal(t, string(want), string(topology(t, js)), "applying again changes nothing")
	require.NoError(t, bus.Apply(testContext(t), c, bus.Sizes{Jobs: 8 << 20, Results: 8 << 20, Logs: 8 << 20}))
	require.Equal(t, string(want), string(topology(t, js)), "nothing shrinks")
	require.NoError(t, bus.Apply(testContext(t), c, bus.Sizes{Jobs: 96 << 20, Results: 32 << 20, Logs: 48 << 20}))
	require.Contains(t, string(topology(t, js)), `"max_bytes": 100663296`, "what grows, grows")
	require.NoError(t, c.Bind(testContext(t)))
	require.Equal(t, generation, c.Registry().Generation(), "still the same registry")
	got2, err := c.Registry().GetLatest(testContext(t), e.Record.ID)
	require.NoError(t, err)
	require.Equal(t, e, got2)
}

// Settings that drifted are named by Bind and mended by Apply.
func TestBindSaysWhatIsMissing(t *testing.T) {
	s := natsdtest.Start(t)
	c := connect(t, s)
	js := raw(t, s)
	bindError := func() string {
		ctx, cancel := context.WithTimeout(testContext(t), 100*time.Millisecond)
		defer cancel()
		err := c.Bind(ctx)
		require.Error(t, err)
		return err.Error()
	}
	text := bindError()
	for _, name := range []string{"KV_jobs", "KV_workers", "KV_control", "KV_leader", "RESULTS", "LOGS", "DEADLETTERS"} {
		require.Contains(t, text, "stream "+name+" is missing")
	}
	require.ErrorContains(t, c.Ready(), "not bound")

	bind(t, c, smallSizes())
	ctx := testContext(t)
	require.NoError(t, js.DeleteConsumer(ctx, "RESULTS", "archive"))
	require.NoError(t, js.DeleteStream(ctx, "KV_leader"))
	info, err := js.Stream(ctx, "KV_jobs")
	require.NoError(t, err)
	config := info.CachedInfo().Config
	config.AllowDirect = false
	_, err = js.UpdateStream(ctx, config)
	require.NoError(t, err)
	text = bindError()
	require.Contains(t, text, "consumer archive of RESULTS is missing")
	require.Contains(t, text, "stream KV_leader is missing")
	require.Contains(t, text, "stream KV_jobs differs: allow_direct is false, not true")

	bind(t, c, smallSizes())
}

// What a power cut may take from a young server comes back with the sizes that it
// had. A registry that is missing does not: it would be an empty one.
func TestRestore(t *testing.T) {
	s := natsdtest.Start(t)
	c := connect(t, s)
	js := raw(t, s)
	ctx := testContext(t)
	made, err := c.Restore(ctx)
	require.NoError(t, err)
	require.Empty(t, made, "nothing was applied yet")

	bind(t, c, bus.Sizes{Jobs: 64 << 20, Results: 32 << 20, Logs: 48 << 20})
	require.NoError(t, bus.Apply(ctx, c, smallSizes()), "asks for less")
	want := string(topology(t, js))
	made, err = c.Restore(ctx)
	require.NoError(t, err)
	require.Empty(t, made)
	for _, stream := range []string{"LOGS", "RESULTS", "KV_workers", "KV_control", "KV_leader", "DEADLETTERS"} {
		require.NoError(t, js.DeleteStream(ctx, stream))
	}
	require.NoError(t, js.DeleteConsumer(ctx, "KV_jobs", string(bus.JobsProjection)))
	made, err = c.Restore(ctx)
	require.NoError(t, err)
	require.Subset(t, made, []string{"stream LOGS", "stream RESULTS", "consumer " + string(bus.JobsProjection) + " of KV_jobs", "consumer " + string(bus.LogsArchive) + " of LOGS"})
	require.Equal(t, want, string(topology(t, js)))

	require.NoError(t, js.DeleteStream(ctx, "KV_jobs"))
	made, err = c.Restore(ctx)
	require.NoError(t, err)
	require.Empty(t, made)
}

// Bind waits for what somebody else applies.
func TestBindWaits(t *testing.T) {
	s := natsdtest.Start(t)
	first, second := connect(t, s), connect(t, s)
	bound := make(chan error, 1)
	go func() { bound <- first.Bind(testContext(t)) }()
	require.NoError(t, bus.Apply(testContext(t), second, smallSizes()))
	require.NoError(t, <-bound)
	require.NoError(t, first.Ready())
}

// A consumer that is missing makes the connection unready, and handling goes on by
// itself when it is back.
func TestConsumerComesBack(t *testing.T) {
	s := natsdtest.Start(t)
	c := connect(t, s)
	js := raw(t, s)
	bind(t, c, smallSizes())
	var handled tally
	inBackground(t, func(ctx context.Context) error {
		return c.Consume(ctx, bus.ResultsState, bus.ConsumeOptions{}, func(_ context.Context, m bus.Msg) error {
			handled.add(m.Sequence)
			return nil
		})
	})
	publish(t, c, 1)
	eventually(t, func() bool { return handled.of(1) == 1 }, "handled")
	require.NoError(t, js.DeleteConsumer(testContext(t), "RESULTS", "state"))
	eventually(t, func() bool { return c.Ready() != nil }, "not ready without its consumer")
	require.ErrorContains(t, c.Ready(), "consumer state")
	publish(t, c, 1)
	require.NoError(t, bus.Apply(testContext(t), c, smallSizes()))
	eventually(t, func() bool { return handled.of(2) == 1 }, "handled after it is back")
	eventually(t, func() bool { return c.Ready() == nil }, "ready again")
}

// A registry that is made anew has another generation, and followers start over.
func TestRegistryMadeAnew(t *testing.T) {
	s := natsdtest.Start(t)
	c := connect(t, s)
	js := raw(t, s)
	bind(t, c, smallSizes())
	generation := c.Registry().Generation()
	f := follow(t, c)
	for range 10 {
		create(t, c)
	}
	eventually(t, func() bool { f.mu.Lock(); defer f.mu.Unlock(); return len(f.entries) == 10 }, "followed")
	require.NoError(t, js.DeleteStream(testContext(t), "KV_jobs"))
	f.mu.Lock()
	f.entries = map[string]bus.Entry{}
	f.mu.Unlock()
	bind(t, c, smallSizes())
	eventually(t, func() bool { return c.Registry().Generation() != generation }, "another generation")
	e := create(t, c)
	f.sees(map[string]bus.Entry{e.Record.ID: e})
}

func TestSizesWithin(t *testing.T) {
	for _, total := range []int64{0, 100 << 20, 1 << 30, 5 << 30, 1 << 40} {
		sizes := bus.SizesWithin(total)
		sum := sizes.Jobs + sizes.Results + sizes.Logs
		require.Positive(t, sizes.Jobs)
		require.LessOrEqual(t, sum, int64(9<<30))
		if total >= 100<<20 {
			require.LessOrEqual(t, sum, total)
		}
	}
	require.Equal(t, bus.Sizes{Jobs: 4 << 30, Results: 1 << 30, Logs: 4 << 30}, bus.SizesWithin(1<<40))

	// What it gives fits on a small server, buckets included.
	s, err := natsd.Start(natsd.Options{StoreDir: t.TempDir(), MaxStore: 110 << 20})
	require.NoError(t, err)
	t.Cleanup(s.Shutdown)
	require.Equal(t, int64(110<<20), s.MaxStore())
	bind(t, connect(t, s), bus.SizesWithin(s.MaxStore()))

	s, err = natsd.Start(natsd.Options{StoreDir: t.TempDir(), MaxStore: 10 << 20})
	require.NoError(t, err)
	t.Cleanup(s.Shutdown)
	err = bus.Apply(testContext(t), connect(t, s), smallSizes())
	require.ErrorContains(t, err, "KV_jobs")
	require.True(t, bytes.Contains([]byte(err.Error()), []byte("insufficient storage")), err)
}

// The server forgets the consumer under a follower: the follower makes another one
// and misses nothing.
func TestFollowerWhoseConsumerIsGone(t *testing.T) {
	s := natsdtest.Start(t)
	c := connect(t, s)
	js := raw(t, s)
	bind(t, c, smallSizes())
	require.Equal(t, s.ID(), c.ServerID())
	require.Equal(t, s.Version(), c.ServerVersion())
	f := follow(t, c)
	want := map[string]bus.Entry{}
	for range 3 {
		e := create(t, c)
		want[e.Record.ID] = e
		f.sees(want)
		stream, err := js.Stream(testContext(t), "KV_jobs")
		require.NoError(t, err)
		gone := 0
		for info := range stream.ListConsumers(testContext(t)).Info() {
			if info.Config.Durable == "" {
				require.NoError(t, js.DeleteConsumer(testContext(t), "KV_jobs", info.Name))
				gone++
			}
		}
		require.Equal(t, 1, gone, "one follower has one consumer")
		e = create(t, c)
		want[e.Record.ID] = e
		f.sees(want)
	}
	require.GreaterOrEqual(t, c.Stats().Restarts, uint64(3))
}
