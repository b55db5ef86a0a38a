// Package journal keeps on disk what a later process of this worker needs to go
// on with a command that outlives the process that started it. It knows nothing
// of what its entries mean.
//
// An entry is a small file: a head, which is written once, and behind it a mark,
// which is written over in place whenever something has changed. A process that
// is killed loses nothing of it, since each is one write into the kernel's
// cache. Loss of power may lose or tear it, and nothing is ever flushed: no
// command outlives that.
package journal

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
)

const (
	suffix = ".attempt"
	// frameHeader is the length of what follows and its CRC-32C.
	frameHeader = 8
	maxFile     = 1 << 20
)

// Journal is a folder of entries. It is safe for concurrent use. Only one
// process may have it; the caller sees to that.
type Journal struct{ dir string }

// Entry is what is kept of one command. It is safe for concurrent use.
type Entry struct {
	path string
	at   int64 // of the mark

	mu   sync.Mutex
	file *os.File // nil: removed
}

// Left is an entry of an earlier process.
type Left struct {
	Head, Mark []byte // JSON
	Entry      *Entry
}

// Open opens the journal in dir, which is made where it is missing.
func Open(dir string) (*Journal, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open journal: %w", err)
	}
	return &Journal{dir: dir}, nil
}

// Empty reports whether there is certainly no entry.
func (j *Journal) Empty() bool {
	names, err := filepath.Glob(filepath.Join(j.dir, "*"+suffix))
	return err == nil && len(names) == 0
}

// Left reads the entries of earlier processes. Those that cannot be read are
// removed: nothing can be done with them. Call it before Create, once.
func (j *Journal) Left() ([]Left, error) {
	names, err := os.ReadDir(j.dir)
	if err != nil {
		return nil, fmt.Errorf("read journal: %w", err)
	}
	var left []Left
	for _, name := range names {
		if !strings.HasSuffix(name.Name(), suffix) {
			continue
		}
		path := filepath.Join(j.dir, name.Name())
		l, err := read(path)
		if err == nil {
			left = append(left, l)
		} else if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("remove an entry of the journal that cannot be read: %w", err)
		}
	}
	return left, nil
}

func read(path string) (Left, error) {
	if info, err := os.Stat(path); err != nil || info.Size() > maxFile {
		return Left{}, errors.Join(err, errTorn)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return Left{}, err
	}
	head, rest, err := frame(data)
	if err != nil {
		return Left{}, err
	}
	mark, _, err := frame(rest)
	if err != nil {
		return Left{}, err
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return Left{}, err
	}
	return Left{Head: head, Mark: mark, Entry: &Entry{path: path, file: f, at: int64(len(data) - len(rest))}}, nil
}

var (
	errTorn    = errors.New("the entry is not whole")
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
)

// frame takes one frame off data. What is behind the mark is left of a longer
// one.
func frame(data []byte) (body, rest []byte, err error) {
	if len(data) < frameHeader {
		return nil, nil, errTorn
	}
	n := int(binary.LittleEndian.Uint32(data))
	if n < 0 || n > len(data)-frameHeader {
		return nil, nil, errTorn
	}
	body, rest = data[frameHeader:frameHeader+n], data[frameHeader+n:]
	if crc32.Checksum(body, castagnoli) != binary.LittleEndian.Uint32(data[4:]) {
		return nil, nil, errTorn
	}
	return body, rest, nil
}

func appendFrame(buf *bytes.Buffer, v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return err
	}
	var head [frameHeader]byte
	binary.LittleEndian.PutUint32(head[:], uint32(len(body)))
	binary.LittleEndian.PutUint32(head[4:], crc32.Checksum(body, castagnoli))
	buf.Write(head[:])
	buf.Write(body)
	return nil
}

// Create makes the entry of this name with a head and a first mark, both of
// which are kept as JSON. The name may be any string; there must be no entry of
// that name.
func (j *Journal) Create(name string, head, mark any) (*Entry, error) {
	var buf bytes.Buffer
	if err := appendFrame(&buf, head); err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	at := int64(buf.Len())
	if err := appendFrame(&buf, mark); err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	sum := sha256.Sum256([]byte(name))
	path := filepath.Join(j.dir, hex.EncodeToString(sum[:16])+suffix)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	e := &Entry{path: path, file: f, at: at}
	if _, err := f.Write(buf.Bytes()); err != nil {
		return nil, errors.Join(fmt.Errorf("journal: %w", err), e.Remove())
	}
	return e, nil
}

// Mark replaces the mark. After an error the entry is removed: what it says
// would not be true any more.
func (e *Entry) Mark(mark any) error {
	var buf bytes.Buffer
	err := appendFrame(&buf, mark)
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.file == nil {
		return fmt.Errorf("journal: %w", fs.ErrClosed)
	}
	if err == nil {
		_, err = e.file.WriteAt(buf.Bytes(), e.at)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("journal: %w", err), e.remove())
	}
	return nil
}

// Remove removes the entry. Removing it twice is harmless.
func (e *Entry) Remove() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.remove()
}

func (e *Entry) remove() error {
	if e.file == nil {
		return nil
	}
	// Emptied first: where it cannot be removed it is at least not believed.
	err := errors.Join(e.file.Truncate(0), e.file.Close())
	e.file = nil
	if rmErr := os.Remove(e.path); rmErr != nil && !errors.Is(rmErr, fs.ErrNotExist) {
		return fmt.Errorf("journal: %w", errors.Join(rmErr, err))
	}
	return nil
}

// Close lets go of the entry and leaves it on the disk, for a later process.
func (e *Entry) Close() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.file == nil {
		return nil
	}
	err := e.file.Close()
	e.file = nil
	return err
}
