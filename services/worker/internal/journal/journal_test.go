package journal

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

type words struct{ Text string }

func open(t *testing.T, dir string) (*Journal, []Left) {
	t.Helper()
	j, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	left, err := j.Left()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, l := range left {
			_ = l.Entry.Close()
		}
	})
	return j, left
}

func TestEntriesOutliveTheProcess(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "attempts")
	j, left := open(t, dir)
	if len(left) != 0 {
		t.Fatalf("a new journal has %d entries", len(left))
	}
	e, err := j.Create("lease-1/../x", words{"head"}, words{"a long first mark, which is longer than the next"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := j.Create("lease-1/../x", words{}, words{}); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a second entry of one name: %v", err)
	}
	if err := e.Mark(words{"second"}); err != nil {
		t.Fatal(err)
	}
	// The process is killed: nobody closes anything.
	_, left = open(t, dir)
	if len(left) != 1 || string(left[0].Head) != `{"Text":"head"}` || string(left[0].Mark) != `{"Text":"second"}` {
		t.Fatalf("left are %d: %+v", len(left), left)
	}
	if err := left[0].Entry.Mark(words{strings.Repeat("third ", 1000)}); err != nil {
		t.Fatal(err)
	}
	_, left = open(t, dir)
	if len(left) != 1 || len(left[0].Mark) < 6000 {
		t.Fatalf("left are %d: %+v", len(left), left)
	}
	for range 2 {
		if err := left[0].Entry.Remove(); err != nil {
			t.Error(err)
		}
	}
	if err := left[0].Entry.Mark(words{}); err == nil {
		t.Error("a removed entry takes a mark")
	}
	if _, left = open(t, dir); len(left) != 0 {
		t.Errorf("left are %d", len(left))
	}
	_ = e.Close()
}

func TestWhatCannotBeReadIsRemoved(t *testing.T) {
	dir := t.TempDir()
	j, _ := open(t, dir)
	e, err := j.Create("x", words{"head"}, words{"mark"})
	if err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(e.path)
	if err != nil {
		t.Fatal(err)
	}
	_ = e.Close()
	for n := range whole {
		damaged := append([]byte(nil), whole...)
		damaged[n] ^= 0x40
		for _, data := range [][]byte{whole[:n], damaged} {
			if err := os.WriteFile(e.path, data, 0o600); err != nil {
				t.Fatal(err)
			}
			if _, left := open(t, dir); len(left) != 0 {
				t.Errorf("byte %d: was believed", n)
			}
			if _, err := os.Stat(e.path); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("byte %d: is still there: %v", n, err)
			}
		}
	}
}

func FuzzRead(f *testing.F) {
	f.Add([]byte("\x02\x00\x00\x00\x00\x00\x00\x00{}"))
	f.Fuzz(func(t *testing.T, data []byte) {
		path := filepath.Join(t.TempDir(), "x"+suffix)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if l, err := read(path); err == nil {
			_ = l.Entry.Close()
		}
	})
}
