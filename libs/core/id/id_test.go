package id

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

var t0 = time.Date(2026, 1, 2, 3, 4, 5, 678e6, time.UTC)

func kinds() []Kind {
	return []Kind{Job, Worker, Lease, Session, Edge, Scheduler, Request, Generation}
}

// isToken is what NATS demands of one subject token, and of one part of a KV
// key: printable ASCII without dot, wildcard or space.
func isToken(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(c rune) bool {
		return c <= ' ' || c >= 0x7f || strings.ContainsRune(".*>", c)
	})
}

func TestNew(t *testing.T) {
	for _, k := range kinds() {
		seen := map[string]bool{}
		for range 100 {
			s := New(k, t0)
			if err := Check(k, s); err != nil || !isToken(s) || seen[s] || !strings.HasPrefix(s, string(k)+"-") || len(s) != len(k)+1+ULIDLen {
				t.Fatalf("%s: %q, %v", k, s, err)
			}
			if err := CheckWorker(s); err != nil {
				t.Fatalf("a generated id is none of the alphabet that workers may use: %v", err)
			}
			seen[s] = true
		}
		for _, other := range kinds() {
			if err := Check(other, New(k, t0)); (err == nil) != (k == other) {
				t.Errorf("a %s as %s: %v", k, other, err)
			}
		}
	}
}

func TestCheckRefuses(t *testing.T) {
	good := New(Job, t0)
	ulid := good[len("job-"):]
	if err := Check(Job, good); err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{
		"", "job", "job-", ulid, "job_" + ulid, "JOB-" + ulid, "worker-" + ulid, "job-job-" + ulid, " " + good, good + " ", good + "\n", good + "\x00",
		"job-" + ulid[1:], good + "0", "job-8" + ulid[1:], "job-z" + ulid[1:], "job-" + strings.ToUpper(ulid),
		"job-*", "job->", "job-" + strings.Repeat("*", ULIDLen), "job-" + strings.Repeat(".", ULIDLen), "job-0" + strings.Repeat(">", ULIDLen-1),
		"job-0" + strings.Repeat("i", ULIDLen-1), "job-0" + strings.Repeat("l", ULIDLen-1), "job-0" + strings.Repeat("o", ULIDLen-1), "job-0" + strings.Repeat("u", ULIDLen-1),
		"job-0" + strings.Repeat("é", (ULIDLen-1)/2) + "0", "job-%2e%2e", "../" + good, strings.Repeat("job-", 4096),
	} {
		err := Check(Job, s)
		if !errors.Is(err, ErrInvalid) {
			t.Errorf("%.40q: %v", s, err)
		} else if len(s) > 8 && strings.Contains(err.Error(), s) {
			t.Errorf("the value is in its error: %v", err)
		}
	}
}

func TestAlphabet(t *testing.T) {
	for c := range 256 {
		s := "job-0" + string([]byte{byte(c)}) + strings.Repeat("0", ULIDLen-2)
		want := strings.ContainsRune("0123456789abcdefghjkmnpqrstvwxyz", rune(c)) && c < 0x80
		if (Check(Job, s) == nil) != want {
			t.Errorf("byte %#x: allowed is %v", c, !want)
		}
	}
	if !slices.IsSorted([]byte(alphabet)) || len(alphabet) != 32 {
		t.Error("ids would not sort as their clocks do")
	}
}

func TestCheckWorker(t *testing.T) {
	for _, s := range []string{"a", "0", "rack-7-a", "a--b", strings.Repeat("a", MaxWorkerLen), New(Worker, t0)} {
		if err := CheckWorker(s); err != nil {
			t.Errorf("%q: %v", s, err)
		}
	}
	for _, s := range []string{"", "-", "-a", "a-", "A", "a.b", "a*", ">", "a b", "a_b", "ä", "a\n", "a\x00", "a/b", strings.Repeat("a", MaxWorkerLen+1)} {
		if err := CheckWorker(s); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %v", s, err)
		}
	}
}

func TestKeyed(t *testing.T) {
	a := Keyed("ann", "key")
	if err := Check(Job, a); err != nil {
		t.Fatal(err)
	}
	if a != Keyed("ann", "key") {
		t.Error("the same owner and key give two ids")
	}
	// Pinned: two releases must agree on it, else a replay runs the job again.
	if want := "job-6xpm4nzjbevz6x1fr1kjcxp13k"; a != want {
		t.Errorf("got %s, want %s", a, want)
	}
	seen := map[string]string{}
	for _, p := range [][2]string{
		{"ann", "key"},
		{"bob", "key"},
		{"ann", "kez"},
		{"annk", "ey"},
		{"an", "nkey"},
		{"", "annkey"},
		{"annkey", ""},
		{"ann\x00", "key"},
		{"ann", "\x00key"},
		{"key", "ann"},
		{"", ""},
	} {
		s := Keyed(p[0], p[1])
		if err := Check(Job, s); err != nil {
			t.Errorf("%q: %v", p, err)
		}
		if other, dup := seen[s]; dup {
			t.Errorf("%q and %s share an id", p, other)
		}
		seen[s] = fmt.Sprintf("%q", p)
	}
	for i := range 10_000 {
		if err := Check(Job, Keyed("ann", fmt.Sprint(i))); err != nil {
			t.Fatal(err)
		}
	}
}

func TestTime(t *testing.T) {
	for _, at := range []time.Time{time.UnixMilli(0), t0, time.UnixMilli(1), time.UnixMilli(1<<48 - 1)} {
		for _, k := range kinds() {
			got, err := Time(New(k, at))
			if err != nil || !got.Equal(at) || got.Location() != time.UTC {
				t.Errorf("%s at %v: %v, %v", k, at, got, err)
			}
		}
	}
	got, err := Time(New(Job, t0.Add(999*time.Microsecond)))
	if err != nil || !got.Equal(t0) {
		t.Errorf("got %v, %v: want whole milliseconds", got, err)
	}
	for _, s := range []string{"", "job", "job-", "job-0", "job-" + strings.Repeat("!", ULIDLen), "job-" + strings.Repeat("I", ULIDLen)} {
		if _, err := Time(s); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %v", s, err)
		}
	}
}

func TestOrderIsByTime(t *testing.T) {
	last := ""
	at := t0
	for i := range 2000 {
		s := New(Job, at)
		if s <= last {
			t.Fatalf("%s, made at %v, does not sort after %s", s, at, last)
		}
		last = s
		at = at.Add(time.Duration(1+i%50*1000) * time.Millisecond)
	}
}

func TestGroup(t *testing.T) {
	const span = 1 << 15 // milliseconds
	start := time.UnixMilli(t0.UnixMilli() / span * span)
	first := Group(New(Job, start))
	if len(first) != GroupLen || !isToken(first) || !strings.HasPrefix(New(Job, start), "job-"+first) {
		t.Fatalf("group %q", first)
	}
	if g := Group(New(Job, start.Add((span-1)*time.Millisecond))); g != first {
		t.Errorf("the last millisecond of a group is in %s, not in %s", g, first)
	}
	if g := Group(New(Job, start.Add(span*time.Millisecond))); g <= first {
		t.Errorf("the next group is %s, after %s", g, first)
	}
	for _, s := range []string{"", "job", "job-", "job-012345"} {
		if g := Group(s); g != "" {
			t.Errorf("Group(%q) is %q", s, g)
		}
	}
}

func FuzzJobID(f *testing.F) {
	for _, s := range []string{
		"", New(Job, t0), Keyed("a", "b"), "job-*", "job->", "job-" + strings.Repeat("z", ULIDLen), "job-7" + strings.Repeat("z", ULIDLen-1),
		"job-0" + strings.Repeat(".", ULIDLen-1), "job-01JD0000000000000000000000", "job-01jd\x00", "worker-01jd0000000000000000000000",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		at, timeErr := Time(s)
		group := Group(s)
		err := Check(Job, s)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Fatalf("%v is not ErrInvalid", err)
			}
			return
		}
		if !isToken(s) || !isToken(group) || len(s) != len("job-")+ULIDLen || !strings.HasPrefix(s[len("job-"):], group) {
			t.Fatalf("%q, with group %q, was accepted", s, group)
		}
		if timeErr != nil {
			t.Fatal(timeErr)
		}
		// The time part says all that the first ten characters say.
		var b [16]byte
		putTime(&b, at)
		if got := encode(b)[:10]; got != s[4:14] {
			t.Fatalf("%q has time %v, which is written %s", s, at, got)
		}
		if CheckWorker(s) != nil {
			t.Fatalf("%q has a character that a worker id may not have", s)
		}
	})
}

func FuzzWorkerID(f *testing.F) {
	for _, s := range []string{"", "a", "-a", "a-", "a.b", "a*", ">", strings.Repeat("a", MaxWorkerLen), strings.Repeat("a", MaxWorkerLen+1), "Worker", "ä", "w\x00"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		err := CheckWorker(s)
		if err != nil && !errors.Is(err, ErrInvalid) {
			t.Fatalf("%v is not ErrInvalid", err)
		}
		if err == nil && (!isToken(s) || len(s) > MaxWorkerLen || strings.ToLower(s) != s) {
			t.Fatalf("%q was accepted", s)
		}
	})
}
