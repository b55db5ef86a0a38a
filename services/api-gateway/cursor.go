package gateway

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"strings"
	"time"

	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/id"
)

// cursorKey signs the positions of lists, so that a client can neither make up
// one nor carry one over to another user or other filters. It is derived from
// the token secret: all gateways of a deployment have the same.
type cursorKey [sha256.Size]byte

func newCursorKey(secret string) cursorKey {
	m := hmac.New(sha256.New, []byte(secret))
	m.Write([]byte("cmdexec/cursor/v1"))
	return cursorKey(m.Sum(nil))
}

const cursorMAC = 16

// seal writes the position after (at, jobID) in the list of q.
func (k *cursorKey) seal(at time.Time, jobID string, q busmsg.ListJobs) string {
	payload := binary.BigEndian.AppendUint64(nil, uint64(at.UnixMilli()))
	payload = append(payload, jobID...)
	return base64.RawURLEncoding.EncodeToString(append(payload, k.mac(payload, q)...))
}

// open reads a position back; ok is false unless it was sealed for q.
func (k *cursorKey) open(cursor string, q busmsg.ListJobs) (at time.Time, jobID string, ok bool) {
	data, err := base64.RawURLEncoding.Strict().DecodeString(cursor)
	if err != nil || strings.ContainsAny(cursor, "\r\n") || // the decoder skips line breaks
		len(data) < 8+cursorMAC || len(data) > 256 {
		return time.Time{}, "", false
	}
	payload, mac := data[:len(data)-cursorMAC], data[len(data)-cursorMAC:]
	if !hmac.Equal(mac, k.mac(payload, q)) {
		return time.Time{}, "", false
	}
	jobID = string(payload[8:])
	if id.Check(id.Job, jobID) != nil {
		return time.Time{}, "", false
	}
	return time.UnixMilli(int64(binary.BigEndian.Uint64(payload))).UTC(), jobID, true
}

func (k *cursorKey) mac(payload []byte, q busmsg.ListJobs) []byte {
	q.BeforeAt, q.BeforeID, q.Limit = time.Time{}, "", 0 // the position itself; and pages may change their length
	filters, err := json.Marshal(q)                      // maps are written in order of their keys
	if err != nil {
		panic("gateway: filters always marshal: " + err.Error()) // strings and times only
	}
	m := hmac.New(sha256.New, k[:])
	m.Write(binary.BigEndian.AppendUint32(nil, uint32(len(payload))))
	m.Write(payload)
	m.Write(filters)
	return m.Sum(nil)[:cursorMAC]
}
