// Package id makes and checks the identifiers of jobs, workers, leases and
// sessions: a kind, a dash, and a lower-case ULID ("job-01jd...").
//
// Every identifier is one legal NATS subject token and one legal KV key token
// by construction. Whatever comes from outside must pass Check (or one of the
// kind-specific functions) before it gets near a subject, a key or a query.
package id

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"time"
)

// Kind is the prefix of an identifier.
type Kind string

// The kinds of identifier.
const (
	Job        Kind = "job"
	Worker     Kind = "worker"
	Lease      Kind = "lease"
	Session    Kind = "session"
	Edge       Kind = "edge"
	Scheduler  Kind = "scheduler"
	Request    Kind = "req"
	Generation Kind = "generation"
)

// ULIDLen is the length of the text form of a ULID.
const ULIDLen = 26

// GroupLen is how many leading ULID characters name a job's registry group:
// 35 bits less the two that are always zero leave out the low 15 bits of the
// millisecond clock, so a group spans 32,768 ms.
const GroupLen = 7

// MaxWorkerLen bounds an id that a worker brings itself.
const MaxWorkerLen = 63

const alphabet = "0123456789abcdefghjkmnpqrstvwxyz" // Crockford base 32, lower case

// ErrInvalid is wrapped by every error of this package. Its text never
// contains the offending value.
var ErrInvalid = errors.New("invalid identifier")

// New returns a fresh identifier of the given kind whose time part is now.
// It panics only when the operating system has no randomness, as crypto/rand does.
func New(k Kind, now time.Time) string {
	var b [16]byte
	putTime(&b, now)
	_, _ = rand.Read(b[6:]) // never fails: crypto/rand ends the program instead
	return string(k) + "-" + encode(b)
}

// Keyed returns the job id that belongs to an owner's idempotency key: the
// first 128 bits of SHA-256 over a domain, the owner and the key. The same
// owner and key always give the same id, so creating the registry key is
// itself the deduplication.
func Keyed(owner, key string) string {
	h := sha256.New()
	h.Write([]byte("cmdexec/idempotency/v1\x00"))
	var n [8]byte
	binary.BigEndian.PutUint64(n[:], uint64(len(owner)))
	h.Write(n[:])
	h.Write([]byte(owner))
	h.Write([]byte(key))
	var b [16]byte
	copy(b[:], h.Sum(nil))
	return string(Job) + "-" + encode(b)
}

// Check reports whether s is an identifier of kind k made by this package.
func Check(k Kind, s string) error {
	rest, ok := strings.CutPrefix(s, string(k)+"-")
	if !ok || len(rest) != ULIDLen || rest[0] > '7' {
		return fmt.Errorf("%w: want %q followed by %d lower-case letters and digits", ErrInvalid, string(k)+"-", ULIDLen)
	}
	for i := range len(rest) {
		if strings.IndexByte(alphabet, rest[i]) < 0 {
			return fmt.Errorf("%w: want %q followed by %d lower-case letters and digits", ErrInvalid, string(k)+"-", ULIDLen)
		}
	}
	return nil
}

// CheckWorker accepts generated worker ids and ids that a worker brings
// itself: 1 to 63 lower-case letters, digits and inner dashes.
func CheckWorker(s string) error {
	ok := s != "" && len(s) <= MaxWorkerLen && s[0] != '-' && s[len(s)-1] != '-'
	for i := 0; ok && i < len(s); i++ {
		c := s[i]
		ok = c == '-' || '0' <= c && c <= '9' || 'a' <= c && c <= 'z'
	}
	if !ok {
		return fmt.Errorf("%w: a worker id is 1 to %d lower-case letters, digits and inner dashes", ErrInvalid, MaxWorkerLen)
	}
	return nil
}

// Group returns the registry group of a valid job id: the first seven
// characters of its ULID. It returns "" for anything shorter.
func Group(jobID string) string {
	const prefix = len(Job) + 1
	if len(jobID) < prefix+GroupLen {
		return ""
	}
	return jobID[prefix : prefix+GroupLen]
}

// Time returns the millisecond clock inside an identifier made by New. For a
// keyed job id it is meaningless.
func Time(s string) (time.Time, error) {
	i := strings.LastIndexByte(s, '-')
	if len(s)-i-1 != ULIDLen {
		return time.Time{}, ErrInvalid
	}
	var ms uint64
	for _, c := range []byte(s[i+1 : i+11]) {
		v := strings.IndexByte(alphabet, c)
		if v < 0 {
			return time.Time{}, ErrInvalid
		}
		ms = ms<<5 | uint64(v)
	}
	return time.UnixMilli(int64(ms)).UTC(), nil
}

func putTime(b *[16]byte, now time.Time) {
	ms := uint64(now.UnixMilli())
	b[0], b[1], b[2] = byte(ms>>40), byte(ms>>32), byte(ms>>24)
	b[3], b[4], b[5] = byte(ms>>16), byte(ms>>8), byte(ms)
}

// encode writes 128 bits as 26 characters of 5 bits, two zero bits first.
func encode(b [16]byte) string {
	hi, lo := binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])
	var out [ULIDLen]byte
	for i := ULIDLen - 1; i >= 0; i-- {
		out[i] = alphabet[lo&31]
		lo = lo>>5 | hi<<59
		hi >>= 5
	}
	return string(out[:])
}
