package spool

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"time"
)

// A frame is a header of twelve bytes, little-endian: the length of the body,
// its CRC-32C, and the CRC-32C of these eight bytes, both sums mixed with the
// spool's salt. So a damaged body can be skipped by its length, and after a
// damaged header the next frame can be found; and since nobody else knows the
// salt, what is found is never something that a command wrote into its output to
// look like a frame. The body is the kind, the key with its length, and what the
// kind needs.
const (
	headerSize = 12
	maxRecord  = 32 << 20
	maxKey     = 1 << 10
)

const (
	kindChunk byte = iota + 1
	kindResult
	kindNote
)

type record struct {
	kind  byte
	key   Key
	chunk Chunk
	blob  []byte
	note  note
}

// salt makes frames unforgeable for whoever does not know it.
type salt [2]uint32

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func beginFrame(buf []byte, kind byte, key Key) []byte {
	buf = append(buf, make([]byte, headerSize)...)
	buf = append(buf, kind)
	buf = binary.AppendUvarint(buf, uint64(len(key)))
	return append(buf, key...)
}

func (s salt) endFrame(buf []byte, start int) []byte {
	head, body := buf[start:start+headerSize], buf[start+headerSize:]
	binary.LittleEndian.PutUint32(head, uint32(len(body)))
	binary.LittleEndian.PutUint32(head[4:], crc32.Checksum(body, castagnoli)^s[0])
	binary.LittleEndian.PutUint32(head[8:], crc32.Checksum(head[:8], castagnoli)^s[1])
	return buf
}

func (s salt) appendChunk(buf []byte, key Key, c Chunk) []byte {
	start := len(buf)
	buf = beginFrame(buf, kindChunk, key)
	buf = binary.AppendVarint(buf, c.Seq)
	buf = binary.AppendVarint(buf, c.Offset)
	buf = binary.AppendVarint(buf, c.Time.UnixNano())
	buf = binary.AppendUvarint(buf, uint64(len(c.Stream)))
	buf = append(buf, c.Stream...)
	buf = append(buf, c.Data...)
	return s.endFrame(buf, start)
}

func (s salt) appendResult(buf []byte, key Key, blob []byte) []byte {
	start := len(buf)
	return s.endFrame(append(beginFrame(buf, kindResult, key), blob...), start)
}

func (s salt) appendNote(buf []byte, key Key, n note) []byte {
	start := len(buf)
	buf = beginFrame(buf, kindNote, key)
	buf = binary.AppendVarint(buf, n.seq)
	var flags byte
	if n.result {
		flags |= 1
	}
	if n.drop {
		flags |= 2
	}
	return s.endFrame(append(buf, flags), start)
}

// nextFrame reads the frame at the start of data and gives its body and size. A
// nil body means that there is no whole and sound frame; the size is then that
// of the damaged frame, where its header is sound and says so, else 0.
func (s salt) nextFrame(data []byte) (body []byte, size int64) {
	if len(data) < headerSize {
		return nil, 0
	}
	if crc32.Checksum(data[:8], castagnoli)^s[1] != binary.LittleEndian.Uint32(data[8:]) {
		return nil, 0
	}
	n := binary.LittleEndian.Uint32(data)
	if n > maxRecord || int(n) > len(data)-headerSize {
		return nil, 0
	}
	size = headerSize + int64(n)
	body = data[headerSize:size]
	if crc32.Checksum(body, castagnoli)^s[0] != binary.LittleEndian.Uint32(data[4:]) {
		return nil, size
	}
	return body, size
}

// scan calls each for every sound record in data. It returns where the last one
// ends, and how many bytes before that belong to none.
func (s salt) scan(data []byte, each func(r record, off, size int64)) (end, skipped int64) {
	var off int64
	for off < int64(len(data)) {
		body, size := s.nextFrame(data[off:])
		if body == nil {
			// Look for the next one. A frame whose body alone is damaged still says
			// where that is.
			off += max(size, 1)
			continue
		}
		skipped += off - end
		if r, err := decode(body); err == nil {
			each(r, off, size)
		} else {
			skipped += size
		}
		off += size
		end = off
	}
	return end, skipped
}

var errFormat = errors.New("record cannot be decoded")

// decode reads a body. The record's data points into it.
func decode(body []byte) (record, error) {
	d := decoder{rest: body}
	r := record{kind: d.byte()}
	r.key = Key(d.bytes(d.length()))
	switch r.kind {
	case kindChunk:
		r.chunk.Seq = d.varint()
		r.chunk.Offset = d.varint()
		r.chunk.Time = time.Unix(0, d.varint()).UTC()
		r.chunk.Stream = string(d.bytes(d.length()))
		r.chunk.Data = d.rest
	case kindResult:
		r.blob = d.rest
	case kindNote:
		r.note.seq = d.varint()
		flags := d.byte()
		r.note.result, r.note.drop = flags&1 != 0, flags&2 != 0
	default:
		d.bad = true
	}
	if d.bad {
		return record{}, errFormat
	}
	return r, nil
}

// decoder reads fields one after the other; after a bad one everything is zero.
type decoder struct {
	rest []byte
	bad  bool
}

func (d *decoder) byte() byte {
	if b := d.bytes(1); len(b) == 1 {
		return b[0]
	}
	return 0
}

func (d *decoder) bytes(n int) []byte {
	if d.bad || n < 0 || n > len(d.rest) {
		d.bad = true
		return nil
	}
	b := d.rest[:n]
	d.rest = d.rest[n:]
	return b
}

func (d *decoder) varint() int64 {
	v, n := binary.Varint(d.rest)
	if d.bad || n <= 0 {
		d.bad = true
		return 0
	}
	d.rest = d.rest[n:]
	return v
}

func (d *decoder) length() int {
	v, n := binary.Uvarint(d.rest)
	if d.bad || n <= 0 || v > uint64(len(d.rest)) {
		d.bad = true
		return 0
	}
	d.rest = d.rest[n:]
	return int(v)
}
