package handover

import (
	"bytes"
	"reflect"
	"slices"
	"testing"
)

func sample() (*Order, [][]byte) {
	return &Order{
		Mark: [MarkSize]byte{1, 15: 9}, Argv: []string{"/bin/sh", "-c", "", "a\nb"}, Env: []string{"A=1", "B="}, Dir: "/work/a",
		Folders: []string{"a", "a/b"}, Files: []File{{"a/f", 0o755, 3}, {"g", 0o600, 0}}, Stdin: true,
	}, [][]byte{[]byte("xyz"), nil}
}

func decode(t *testing.T, order []byte) (*Order, []byte) {
	t.Helper()
	n, err := HeadSize(order[:PreambleSize])
	if err != nil {
		t.Fatal(err)
	}
	o, err := DecodeHead(order[PreambleSize : PreambleSize+n])
	if err != nil {
		t.Fatal(err)
	}
	return o, order[PreambleSize+n:]
}

func TestOrder(t *testing.T) {
	want, contents := sample()
	got, rest := decode(t, want.Encode(contents))
	if !reflect.DeepEqual(got, want) || string(rest) != "xyz" {
		t.Fatalf("%+v %q", got, rest)
	}
	least := &Order{Argv: []string{"true"}, Dir: "/work"}
	if got, rest := decode(t, least.Encode(nil)); !reflect.DeepEqual(got, least) || len(rest) != 0 {
		t.Fatalf("%+v %q", got, rest)
	}
}

// Nothing is run of an order that is cut, has something behind it, or is of
// another kind.
func TestOrderThatIsNotUnderstood(t *testing.T) {
	o, _ := sample()
	order := o.Encode(nil)
	head := order[PreambleSize:]
	for n := range head {
		if _, err := DecodeHead(head[:n]); err == nil {
			t.Fatalf("a head of %d bytes was understood", n)
		}
	}
	if _, err := DecodeHead(append(slices.Clone(head), 0)); err == nil {
		t.Fatal("a head with something behind it was understood")
	}
	for _, bad := range [][]byte{nil, order[:PreambleSize-1], []byte("cmdexec\x02\x00\x00\x00\x01"), []byte("cmdexec\x01\xff\xff\xff\xff")} {
		if _, err := HeadSize(bad); err == nil {
			t.Fatalf("%q was understood", bad)
		}
	}
}

func FuzzDecodeHead(f *testing.F) {
	o, _ := sample()
	f.Add(o.Encode(nil)[PreambleSize:])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, head []byte) {
		o, err := DecodeHead(head)
		if err != nil {
			return
		}
		if again := o.Encode(nil)[PreambleSize:]; !bytes.Equal(again, head) {
			t.Fatalf("%q became %q", head, again)
		}
	})
}
