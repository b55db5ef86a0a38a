package bus

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/cmdexec/cmdexec/libs/core/id"
)

// Default byte limits of the streams.
const (
	defaultJobs    = 4 << 30
	defaultResults = 1 << 30
	defaultLogs    = 4 << 30

	leastJobs    = 16 << 20
	leastResults = 4 << 20
	leastLogs    = 8 << 20

	workersBytes = 32 << 20
	controlBytes = 1 << 20
	leaderBytes  = 1 << 20
	deadBytes    = 32 << 20
	smallBytes   = workersBytes + controlBytes + leaderBytes + deadBytes

	deadAge = 30 * 24 * time.Hour

	// keyMessages is the per-subject limit of a bucket, which makes the stream one for
	// NATS tools. It is never reached: what it removed would come back after a crash.
	keyMessages = 8

	ackWait = 30 * time.Second

	clusterTimeout  = time.Minute // for servers to find each other and elect a leader
	applyRetryAfter = time.Second
)

// Sizes are the byte limits of the streams, and how many servers keep each of
// them. Zero fields get the defaults: 4 GiB, 1 GiB, 4 GiB, 1.
type Sizes struct {
	Jobs     int64 `json:"-"` // a setting of the stream that says the others
	Results  int64 `json:"results"`
	Logs     int64 `json:"logs"`
	Replicas int   `json:"-"`
}

// SizesWithin divides what a server may store in all, in bytes, among the
// streams. No stream gets more than its default, and none less than it needs to
// work at all.
func SizesWithin(total int64) Sizes {
	rest := max(0, total-smallBytes)
	s := Sizes{
		Jobs:    min(defaultJobs, max(leastJobs, rest/9*4)),
		Results: min(defaultResults, max(leastResults, rest/9)),
	}
	s.Logs = min(defaultLogs, max(leastLogs, rest-s.Jobs-s.Results))
	return s
}

func (s Sizes) orDefault() Sizes {
	if s.Jobs <= 0 {
		s.Jobs = defaultJobs
	}
	if s.Results <= 0 {
		s.Results = defaultResults
	}
	if s.Logs <= 0 {
		s.Logs = defaultLogs
	}
	if s.Replicas <= 0 {
		s.Replicas = 1
	}
	return s
}

// streams returns every stream as it has to be.
func (s Sizes) streams() []jetstream.StreamConfig {
	base := func(name, subject string, bytes int64, discard jetstream.DiscardPolicy) jetstream.StreamConfig {
		return jetstream.StreamConfig{
			Name: name, Subjects: []string{subject}, MaxBytes: bytes, Discard: discard, Replicas: s.Replicas,
			Retention: jetstream.LimitsPolicy, Storage: jetstream.FileStorage,
			MaxMsgs: -1, MaxMsgSize: -1, MaxMsgsPerSubject: -1, MaxConsumers: -1,
		}
	}
	kv := func(name, prefix string, bytes int64) jetstream.StreamConfig {
		c := base(name, prefix+">", bytes, jetstream.DiscardNew)
		c.MaxMsgsPerSubject = keyMessages
		c.AllowRollup, c.AllowDirect, c.DenyDelete = true, true, true
		return c
	}
	jobs := kv(streamJobs, prefixJobs, s.Jobs)
	jobs.AllowAtomicPublish = true
	logs := base(streamLogs, prefixLogs+"*", s.Logs, jetstream.DiscardNew)
	if s.Replicas == 1 {
		// Output is declared by a manifest, so that a loss is known. Replicas do not
		// wait for the disk anyway.
		logs.PersistMode = jetstream.AsyncPersistMode
	}
	dead := base(streamDead, prefixDead+">", deadBytes, jetstream.DiscardOld)
	dead.MaxAge = deadAge
	return []jetstream.StreamConfig{
		jobs,
		kv(streamWorkers, prefixWorkers, workersBytes),
		kv(streamControl, prefixControl, controlBytes),
		kv(streamLeader, prefixLeader, leaderBytes),
		base(streamResults, prefixResults+"*", s.Results, jetstream.DiscardNew),
		logs,
		dead,
	}
}

// consumers returns every durable consumer as it has to be, by stream.
func consumers() map[string][]jetstream.ConsumerConfig {
	durable := func(name ConsumerName, pending int) jetstream.ConsumerConfig {
		return jetstream.ConsumerConfig{
			Durable: string(name), DeliverPolicy: jetstream.DeliverAllPolicy, AckPolicy: jetstream.AckExplicitPolicy,
			// Poison is dead-lettered by Consume; a limit here would leave it behind.
			AckWait: ackWait, MaxDeliver: -1, MaxAckPending: pending, ReplayPolicy: jetstream.ReplayInstantPolicy,
		}
	}
	return map[string][]jetstream.ConsumerConfig{
		streamResults: {durable(ResultsState, 1024), durable(ResultsArchive, 1024)},
		streamLogs:    {durable(LogsArchive, 2048)},
		// Unacknowledged messages at the head of the registry make purges slow.
		streamJobs: {durable(JobsProjection, 256)},
	}
}

// metadata is what the registry's stream says beside its settings: its own
// generation, which stays, and the sizes of the other streams, which only grow.
func (s Sizes) metadata(have map[string]string) map[string]string {
	m := maps.Clone(have)
	if m == nil {
		m = map[string]string{}
	}
	if m[metadataGeneration] == "" {
		m[metadataGeneration] = id.New(id.Generation, time.Now())
	}
	before := noted(have)
	s.Results, s.Logs = max(s.Results, before.Results), max(s.Logs, before.Logs)
	data, err := json.Marshal(s)
	if err != nil {
		panic(err) // two numbers
	}
	m[metadataSizes] = string(data)
	return m
}

// noted are the sizes in metadata; zero where there are none.
func noted(metadata map[string]string) (s Sizes) {
	_ = json.Unmarshal([]byte(metadata[metadataSizes]), &s) // an earlier version's has none
	return s
}

// Apply creates the streams, buckets and consumers that are missing, brings
// settings in line that may be changed, and verifies every setting on read-back.
// A limit that is larger than asked for stays. Running it again changes nothing.
// A server that does not answer yet, or has no leader, is waited for, at most a minute.
func Apply(ctx context.Context, c *Conn, s Sizes) error {
	until := time.Now().Add(clusterTimeout)
	for {
		err := c.apply(ctx, s.orDefault())
		if !starting(err) || ctx.Err() != nil || time.Now().After(until) {
			return err
		}
		c.log.Warn("NATS does not take the streams yet, tried again", "err", err)
		if !pause(ctx, applyRetryAfter) {
			return err
		}
	}
}

// starting reports whether err is how servers answer, or do not, that have just
// started and, in a cluster, have no leader yet.
func starting(err error) bool {
	const noPeers, notAvailable, notLeader = 10005, 10008, 10009
	var answer *jetstream.APIError
	if errors.As(err, &answer) {
		return slices.Contains([]jetstream.ErrorCode{noPeers, notAvailable, notLeader}, answer.ErrorCode)
	}
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, nats.ErrTimeout)
}

func (c *Conn) apply(ctx context.Context, s Sizes) error {
	for _, want := range s.streams() {
		if err := c.applyStream(ctx, want, s); err != nil {
			return fmt.Errorf("apply stream %s: %w", want.Name, err)
		}
		for _, cons := range consumers()[want.Name] {
			if err := c.applyConsumer(ctx, want.Name, cons); err != nil {
				return fmt.Errorf("apply consumer %s of %s: %w", cons.Durable, want.Name, err)
			}
		}
	}
	return nil
}

// Restore makes streams and consumers again that are missing beside a registry
// that is there: after a power cut the server may have lost the description of a
// young stream, or a consumer's files. It returns the names of what it made. Where
// the registry itself is missing it does nothing: that is for Apply, and somebody's
// decision.
func (c *Conn) Restore(ctx context.Context) (made []string, err error) {
	registry, err := c.js.Stream(ctx, streamJobs)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("restore the topology: %w", err)
	}
	have := registry.CachedInfo().Config
	s := noted(have.Metadata)
	s.Replicas = have.Replicas
	s = s.orDefault()
	for _, want := range s.streams() {
		_, err := c.js.Stream(ctx, want.Name)
		if errors.Is(err, jetstream.ErrStreamNotFound) {
			if err = c.applyStream(ctx, want, s); err == nil {
				made = append(made, "stream "+want.Name)
			}
		}
		if err != nil {
			return made, fmt.Errorf("restore stream %s: %w", want.Name, err)
		}
		for _, cons := range consumers()[want.Name] {
			_, err := c.js.Consumer(ctx, want.Name, cons.Durable)
			if errors.Is(err, jetstream.ErrConsumerNotFound) {
				if err = c.applyConsumer(ctx, want.Name, cons); err == nil {
					made = append(made, "consumer "+cons.Durable+" of "+want.Name)
				}
			}
			if err != nil {
				return made, fmt.Errorf("restore consumer %s of %s: %w", cons.Durable, want.Name, err)
			}
		}
	}
	return made, nil
}

func (c *Conn) applyStream(ctx context.Context, want jetstream.StreamConfig, sizes Sizes) error {
	var have jetstream.StreamConfig
	s, err := c.js.Stream(ctx, want.Name)
	switch {
	case err == nil:
		have = s.CachedInfo().Config
	case errors.Is(err, jetstream.ErrStreamNotFound):
		create := want
		if want.Name == streamJobs {
			create.Metadata = sizes.metadata(nil)
		}
		if s, err = c.js.CreateStream(ctx, create); err != nil {
			// Somebody else may have made it at the same time.
			if s, err2 := c.js.Stream(ctx, want.Name); err2 == nil {
				return differs(streamDiff(want, s.CachedInfo().Config, true))
			}
			return err
		}
		have = s.CachedInfo().Config
	default:
		return err
	}
	want.Metadata = have.Metadata
	if want.Name == streamJobs {
		want.Metadata = sizes.metadata(have.Metadata)
	}
	want.MaxBytes = max(want.MaxBytes, have.MaxBytes)
	if !maps.Equal(want.Metadata, have.Metadata) || len(streamDiff(want, have, true)) > 0 {
		if _, err := c.js.UpdateStream(ctx, want); err != nil {
			return fmt.Errorf("change (%s): %w", strings.Join(streamDiff(want, have, true), ", "), err)
		}
	}
	if s, err = c.js.Stream(ctx, want.Name); err != nil {
		return fmt.Errorf("read back: %w", err)
	}
	return differs(streamDiff(want, s.CachedInfo().Config, true))
}

func (c *Conn) applyConsumer(ctx context.Context, stream string, want jetstream.ConsumerConfig) error {
	cons, err := c.js.Consumer(ctx, stream, want.Durable)
	switch {
	case errors.Is(err, jetstream.ErrConsumerNotFound):
		cons, err = c.js.CreateOrUpdateConsumer(ctx, stream, want)
	case err == nil && len(consumerDiff(want, cons.CachedInfo().Config)) > 0:
		cons, err = c.js.UpdateConsumer(ctx, stream, want)
	}
	if err != nil {
		return err
	}
	info, err := cons.Info(ctx)
	if err != nil {
		return fmt.Errorf("read back: %w", err)
	}
	return differs(consumerDiff(want, info.Config))
}

func differs(diff []string) error {
	if len(diff) == 0 {
		return nil
	}
	return fmt.Errorf("the server has other settings: %s", strings.Join(diff, ", "))
}

// check compares everything with what Apply makes, whatever the sizes, and
// returns what is missing or differs.
func (c *Conn) check(ctx context.Context) []string {
	var wrong []string
	for _, want := range (Sizes{}).orDefault().streams() {
		s, err := c.js.Stream(ctx, want.Name)
		if errors.Is(err, jetstream.ErrStreamNotFound) {
			wrong = append(wrong, "stream "+want.Name+" is missing")
			continue
		}
		if err != nil {
			return append(wrong, "stream "+want.Name+" cannot be read: "+err.Error())
		}
		have := s.CachedInfo().Config
		if diff := streamDiff(want, have, false); len(diff) > 0 {
			wrong = append(wrong, "stream "+want.Name+" differs: "+strings.Join(diff, ", "))
		}
		if want.Name == streamJobs && have.Metadata[metadataGeneration] == "" {
			wrong = append(wrong, "stream "+want.Name+" has no generation id")
		}
		for _, cons := range consumers()[want.Name] {
			got, err := c.js.Consumer(ctx, want.Name, cons.Durable)
			if errors.Is(err, jetstream.ErrConsumerNotFound) {
				wrong = append(wrong, "consumer "+cons.Durable+" of "+want.Name+" is missing")
				continue
			}
			if err != nil {
				return append(wrong, "consumer "+cons.Durable+" of "+want.Name+" cannot be read: "+err.Error())
			}
			if diff := consumerDiff(cons, got.CachedInfo().Config); len(diff) > 0 {
				wrong = append(wrong, "consumer "+cons.Durable+" of "+want.Name+" differs: "+strings.Join(diff, ", "))
			}
		}
	}
	return wrong
}

// setting compares one field.
func setting[T comparable](diff *[]string, name string, want, have T) {
	if want != have {
		*diff = append(*diff, fmt.Sprintf("%s is %v, not %v", name, have, want))
	}
}

// streamDiff names the settings in which have is not what is wanted. Sized also
// looks at what a deployment chooses: bytes (at least) and replicas.
func streamDiff(want, have jetstream.StreamConfig, sized bool) []string {
	var d []string
	if !slices.Equal(want.Subjects, have.Subjects) {
		d = append(d, fmt.Sprintf("subjects is %v, not %v", have.Subjects, want.Subjects))
	}
	setting(&d, "retention", want.Retention, have.Retention)
	setting(&d, "storage", want.Storage, have.Storage)
	setting(&d, "discard", want.Discard, have.Discard)
	setting(&d, "discard_new_per_subject", want.DiscardNewPerSubject, have.DiscardNewPerSubject)
	setting(&d, "max_msgs", want.MaxMsgs, have.MaxMsgs)
	setting(&d, "max_msgs_per_subject", want.MaxMsgsPerSubject, have.MaxMsgsPerSubject)
	setting(&d, "max_msg_size", want.MaxMsgSize, have.MaxMsgSize)
	setting(&d, "max_age", want.MaxAge, have.MaxAge)
	setting(&d, "max_consumers", want.MaxConsumers, have.MaxConsumers)
	setting(&d, "allow_direct", want.AllowDirect, have.AllowDirect)
	setting(&d, "allow_rollup_hdrs", want.AllowRollup, have.AllowRollup)
	setting(&d, "allow_atomic", want.AllowAtomicPublish, have.AllowAtomicPublish)
	setting(&d, "allow_msg_ttl", want.AllowMsgTTL, have.AllowMsgTTL)
	setting(&d, "deny_delete", want.DenyDelete, have.DenyDelete)
	setting(&d, "deny_purge", want.DenyPurge, have.DenyPurge)
	setting(&d, "compression", want.Compression, have.Compression)
	setting(&d, "no_ack", want.NoAck, have.NoAck)
	setting(&d, "sealed", want.Sealed, have.Sealed)
	if sized {
		setting(&d, "replicas", want.Replicas, have.Replicas)
		setting(&d, "persist_mode", want.PersistMode, have.PersistMode)
		if have.MaxBytes < want.MaxBytes {
			d = append(d, fmt.Sprintf("max_bytes is %d, not %d", have.MaxBytes, want.MaxBytes))
		}
	} else if have.MaxBytes <= 0 {
		d = append(d, "max_bytes is not limited")
	}
	return d
}

func consumerDiff(want, have jetstream.ConsumerConfig) []string {
	var d []string
	setting(&d, "deliver_policy", want.DeliverPolicy, have.DeliverPolicy)
	setting(&d, "ack_policy", want.AckPolicy, have.AckPolicy)
	setting(&d, "ack_wait", want.AckWait, have.AckWait)
	setting(&d, "max_deliver", want.MaxDeliver, have.MaxDeliver)
	setting(&d, "max_ack_pending", want.MaxAckPending, have.MaxAckPending)
	setting(&d, "replay_policy", want.ReplayPolicy, have.ReplayPolicy)
	setting(&d, "filter_subject", want.FilterSubject, have.FilterSubject)
	setting(&d, "filter_subjects", len(want.FilterSubjects), len(have.FilterSubjects))
	setting(&d, "headers_only", want.HeadersOnly, have.HeadersOnly)
	return d
}
