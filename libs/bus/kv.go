package bus

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/nats-io/nats.go"
)

// errConflict: the key's last revision is not the expected one.
var errConflict = errors.New("somebody else wrote this key")

// bucket is a stream used as a key-value bucket: a subject per key, whose last
// message is the value. Earlier ones are removed by a rollup or a purge, of which
// the server keeps tombstones, never by the limit of a subject, of which it keeps
// none: so they stay away after a crash. No markers are left.
type bucket struct {
	c      *Conn
	stream string
	prefix string // of subjects, before the key
}

// stored is the value of a key.
type stored struct {
	key      string
	data     []byte
	revision uint64
}

// Header names and JetStream API subjects.
const (
	headerRollup   = "Nats-Rollup"
	headerExpected = "Nats-Expected-Last-Subject-Sequence"
	headerStream   = "Nats-Expected-Stream"
	headerSequence = "Nats-Sequence"

	apiDirectGet = "$JS.API.DIRECT.GET."
	apiGet       = "$JS.API.STREAM.MSG.GET."
	apiPurge     = "$JS.API.STREAM.PURGE."
)

// JetStream's error codes that mean something here.
const (
	codeResources       = 10002 // account resources exceeded
	codeInsufficient    = 10023 // insufficient resources
	codeNoMessage       = 10037
	codeStorage         = 10047 // insufficient storage
	codeNoStream        = 10059
	codeWrongSequence   = 10071
	codeStoreFailed     = 10077 // with the reason as text
	codeWrongSequenceR3 = 10164
)

// apiError is how JetStream refuses.
type apiError struct {
	Code        int    `json:"code"`
	ErrCode     int    `json:"err_code"`
	Description string `json:"description"`
}

func (e *apiError) Error() string {
	return e.Description + " (" + strconv.Itoa(e.ErrCode) + ")"
}

// writeError says what a refusal means for a write.
func (e *apiError) writeError() error {
	switch e.ErrCode {
	case codeWrongSequence, codeWrongSequenceR3:
		return errConflict
	case codeResources, codeInsufficient, codeStorage:
		return fmt.Errorf("%w: %w", ErrFull, e)
	case codeStoreFailed:
		if strings.Contains(e.Description, "maximum") {
			return fmt.Errorf("%w: %w", ErrFull, e)
		}
		// The disk failed somewhere on the way.
		return fmt.Errorf("%w: %w", ErrAmbiguous, e)
	default:
		return fmt.Errorf("%w: %w", ErrUnavailable, e)
	}
}

// pubAck is JetStream's answer to a publish.
type pubAck struct {
	Stream string    `json:"stream"`
	Seq    uint64    `json:"seq"`
	Error  *apiError `json:"error"`
}

// acked returns the sequence of an answered publish.
func acked(msg *nats.Msg, err error) (uint64, error) {
	if errors.Is(err, ErrNoResponder) {
		return 0, fmt.Errorf("%w: no stream takes this subject", ErrUnavailable)
	}
	if err != nil {
		return 0, err
	}
	var ack pubAck
	if err := json.Unmarshal(msg.Data, &ack); err != nil {
		return 0, fmt.Errorf("%w: unreadable acknowledgement: %w", ErrAmbiguous, err)
	}
	if ack.Error != nil {
		return 0, ack.Error.writeError()
	}
	return ack.Seq, nil
}

// history says what becomes of a key's earlier values when it is written.
type history bool

const (
	replace history = true  // they are removed with it, which costs a second write to the disk
	keep    history = false // they stay until a later write or a purge removes them
)

// write stores a value if the key's last revision is the expected one (0: there is
// none) and returns the new revision. Errors: errConflict, ErrFull, ErrTooLarge,
// ErrUnavailable (nothing written), ErrAmbiguous.
func (b bucket) write(ctx context.Context, key string, data []byte, expected uint64, earlier history) (uint64, error) {
	header := nats.Header{
		headerStream:   {b.stream},
		headerExpected: {strconv.FormatUint(expected, 10)},
	}
	if earlier == replace {
		header[headerRollup] = []string{"sub"}
	}
	return acked(b.c.mux.request(ctx, b.prefix+key, header, data))
}

// direct reads a key from any replica: fast, and possibly not the newest value.
// ErrNotFound, ErrUnavailable.
func (b bucket) direct(ctx context.Context, key string) (stored, error) {
	msg, err := b.c.mux.request(ctx, apiDirectGet+b.stream+"."+b.prefix+key, nil, nil)
	if err != nil {
		return stored{}, readError(err)
	}
	if status := msg.Header.Get("Status"); status != "" {
		if status == "404" {
			return stored{}, ErrNotFound
		}
		return stored{}, fmt.Errorf("%w: direct get answered %s", ErrUnavailable, status)
	}
	revision, err := strconv.ParseUint(msg.Header.Get(headerSequence), 10, 64)
	if err != nil {
		return stored{}, fmt.Errorf("%w: direct get without a sequence", ErrUnavailable)
	}
	return stored{key: key, data: msg.Data, revision: revision}, nil
}

// leader reads a key where it is written. ErrNotFound is certain. ErrUnavailable.
func (b bucket) leader(ctx context.Context, key string) (stored, error) {
	body, err := json.Marshal(struct {
		LastBySubject string `json:"last_by_subj"`
	}{b.prefix + key})
	if err != nil {
		return stored{}, err
	}
	msg, err := b.c.mux.request(ctx, apiGet+b.stream, nil, body)
	if err != nil {
		return stored{}, readError(err)
	}
	var out struct {
		Error   *apiError `json:"error"`
		Message struct {
			Seq  uint64 `json:"seq"`
			Data string `json:"data"`
		} `json:"message"`
	}
	if err := json.Unmarshal(msg.Data, &out); err != nil {
		return stored{}, fmt.Errorf("%w: unreadable answer: %w", ErrUnavailable, err)
	}
	if out.Error != nil {
		if out.Error.ErrCode == codeNoMessage {
			return stored{}, ErrNotFound
		}
		return stored{}, fmt.Errorf("%w: %w", ErrUnavailable, out.Error)
	}
	data, err := base64.StdEncoding.DecodeString(out.Message.Data)
	if err != nil {
		return stored{}, fmt.Errorf("%w: unreadable answer: %w", ErrUnavailable, err)
	}
	return stored{key: key, data: data, revision: out.Message.Seq}, nil
}

// readError: a read that was not answered has no ambiguity.
func readError(err error) error {
	if errors.Is(err, ErrUnavailable) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrUnavailable, unambiguous(err))
}

// unambiguous drops ErrAmbiguous from what errors.Is finds, and keeps the text and
// an ended context.
func unambiguous(err error) error {
	for _, ctxErr := range []error{context.Canceled, context.DeadlineExceeded} {
		if errors.Is(err, ctxErr) {
			return ctxErr
		}
	}
	if errors.Is(err, ErrAmbiguous) {
		return errors.New("no answer")
	}
	return err
}

// purge removes the messages of the subjects that match filter (all: ""), up to
// and including a sequence. It leaves no marker.
func (c *Conn) purge(ctx context.Context, stream, filter string, upTo uint64) error {
	body, err := json.Marshal(struct {
		Filter   string `json:"filter,omitempty"`
		Sequence uint64 `json:"seq"`
	}{filter, upTo + 1})
	if err != nil {
		return err
	}
	msg, err := c.mux.request(ctx, apiPurge+stream, nil, body)
	if err != nil {
		return fmt.Errorf("purge %s: %w", stream, readError(err))
	}
	var out struct {
		Error *apiError `json:"error"`
	}
	if err := json.Unmarshal(msg.Data, &out); err != nil {
		return fmt.Errorf("purge %s: %w: unreadable answer", stream, ErrUnavailable)
	}
	if out.Error != nil {
		return fmt.Errorf("purge %s: %w: %w", stream, ErrUnavailable, out.Error)
	}
	return nil
}
