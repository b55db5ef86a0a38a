// Package handover is what a worker tells the program that waits in a warm
// container: which command it is to become. The worker writes an order to the
// program's standard input, and what follows it there is the command's own.
//
// An order is a preamble of eight bytes, the length of its head, the head, and the
// contents of its files one after the other. Numbers are big-endian and of four
// bytes, texts and lists are counted.
package handover

import (
	"errors"
)

// Order is what differs between jobs of one shape.
type Order struct {
	// Mark begins what the program says on standard error when it fails; the
	// command cannot know it.
	Mark    [MarkSize]byte
	Argv    []string
	Env     []string // put over what the container has
	Dir     string   // absolute; where the command starts
	Folders []string // below Root, parents first; made
	Files   []File   // below Root
	Stdin   bool     // what follows the order is the command's input; else it has none
}

// File is one file of an order.
type File struct {
	Path string
	Mode uint32 // permission bits
	Size int
}

const (
	// Root is the folder that files and folders are made in.
	Root = "/work"
	// Failed is the exit code of a program that did not become the command.
	Failed = 125
	// MarkSize is the size of Order.Mark.
	MarkSize = 16
	// PreambleSize is how much is read first.
	PreambleSize = 8 + 4
	// MaxHead is the largest head, far above what the system lets a command have.
	MaxHead = 4 << 20
)

const magic = "cmdexec\x01"

// Encode makes the order. contents are those of its files, in their order.
func (o *Order) Encode(contents [][]byte) []byte {
	head := append([]byte(nil), o.Mark[:]...)
	head = appendList(head, o.Argv)
	head = appendList(head, o.Env)
	head = appendText(head, o.Dir)
	head = appendList(head, o.Folders)
	head = appendNumber(head, len(o.Files))
	for _, f := range o.Files {
		head = appendNumber(appendNumber(appendText(head, f.Path), int(f.Mode)), f.Size)
	}
	stdin := 0
	if o.Stdin {
		stdin = 1
	}
	head = appendNumber(head, stdin)
	order := append(appendNumber([]byte(magic), len(head)), head...)
	for _, c := range contents {
		order = append(order, c...)
	}
	return order
}

func appendNumber(b []byte, n int) []byte {
	return append(b, byte(n>>24), byte(n>>16), byte(n>>8), byte(n))
}

func appendText(b []byte, s string) []byte { return append(appendNumber(b, len(s)), s...) }

func appendList(b []byte, list []string) []byte {
	b = appendNumber(b, len(list))
	for _, s := range list {
		b = appendText(b, s)
	}
	return b
}

// ErrOrder means that an order is not understood.
var ErrOrder = errors.New("the order is not understood")

// HeadSize reads a preamble.
func HeadSize(preamble []byte) (int, error) {
	if len(preamble) != PreambleSize || string(preamble[:len(magic)]) != magic {
		return 0, ErrOrder
	}
	rest := reader{b: preamble[len(magic):]}
	n := rest.number()
	if n > MaxHead {
		return 0, ErrOrder
	}
	return n, nil
}

// DecodeHead reads a head.
func DecodeHead(head []byte) (*Order, error) {
	r := reader{b: head}
	var o Order
	copy(o.Mark[:], r.take(MarkSize))
	o.Argv, o.Env, o.Dir, o.Folders = r.list(), r.list(), r.text(), r.list()
	for n := r.number(); n > 0 && !r.bad; n-- {
		o.Files = append(o.Files, File{Path: r.text(), Mode: uint32(r.number()), Size: r.number()})
	}
	stdin := r.number()
	o.Stdin = stdin == 1
	if r.bad || len(r.b) > 0 || stdin > 1 || len(o.Argv) == 0 {
		return nil, ErrOrder
	}
	return &o, nil
}

// reader takes pieces off the front; after the first that is not there it is bad.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) take(n int) []byte {
	if r.bad || n > len(r.b) {
		r.bad = true
		return nil
	}
	piece := r.b[:n]
	r.b = r.b[n:]
	return piece
}

func (r *reader) number() int {
	b := r.take(4)
	if b == nil {
		return 0
	}
	return int(b[0])<<24 | int(b[1])<<16 | int(b[2])<<8 | int(b[3])
}

func (r *reader) text() string { return string(r.take(r.number())) }

func (r *reader) list() []string {
	var list []string
	for n := r.number(); n > 0 && !r.bad; n-- {
		list = append(list, r.text())
	}
	return list
}
