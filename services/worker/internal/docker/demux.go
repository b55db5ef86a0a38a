package docker

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

const copyBufferSize = 32 << 10

// demux copies the engine's multiplexed stream to the two writers until it
// ends. Memory is one buffer, whatever the frames' headers say: the library's
// stdcopy makes room for a whole frame, the size of which the engine names.
//
// It returns nil at an end between two frames. The writers must not fail.
func demux(r io.Reader, stdout, stderr io.Writer) error {
	writers := [3]io.Writer{1: stdout, 2: stderr} // 0 would be standard input
	return frames(r, nil, func(number byte, _ int64, data []byte, _ int64) {
		if w := writers[number]; w != nil && len(data) > 0 {
			_, _ = w.Write(data)
		}
	})
}

// frames reads a multiplexed stream and calls each with every piece of every
// frame of n bytes, and how many of these are left after it; once for an empty one.
// The frames are counted by m, unless that is nil.
func frames(r io.Reader, m *meter, each func(number byte, n int64, data []byte, left int64)) error {
	var header [8]byte
	buf := make([]byte, copyBufferSize)
	for {
		if _, err := io.ReadFull(r, header[:]); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return fmt.Errorf("read a frame of output: %w", err)
		}
		number, size := header[0], int64(binary.BigEndian.Uint32(header[4:]))
		if number == 3 { // the engine's own word to whoever is attached
			text, _ := io.ReadAll(io.LimitReader(r, min(size, 300)))
			return fmt.Errorf("the container engine says: %s", oneLine(string(text)))
		}
		if number > 3 || header[1]|header[2]|header[3] != 0 {
			return errors.New("the output of the container engine is not understood")
		}
		m.frame(number, size)
		if size == 0 {
			each(number, 0, nil, 0)
		}
		for left := size; left > 0; {
			n, err := r.Read(buf[:min(left, copyBufferSize)])
			left -= int64(n)
			if n > 0 {
				each(number, size, buf[:n], left)
			}
			if err != nil && left > 0 {
				return fmt.Errorf("read output: %w", errors.Join(err, io.ErrUnexpectedEOF))
			}
		}
	}
}
