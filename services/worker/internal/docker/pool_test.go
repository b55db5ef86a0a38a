package docker

import (
	"fmt"
	"testing"
	"time"
)

// sim is a pool whose containers are made and removed in no time, and its clock.
type sim struct {
	*pool
	now time.Time
}

func newSim(limits Warm) *sim {
	p := newPool(&Executor{}, limits)
	p.begun = true // nothing runs by itself
	return &sim{p, time.Now()}
}

func of(image string, memoryMB int64) shape { return shape{image: image, memoryMB: memoryMB} }

// asks notes shapes, a second apart, without taking anything.
func (s *sim) asks(shapes ...shape) {
	for _, sh := range shapes {
		s.now = s.now.Add(time.Second)
		s.ask(sh, &imageFacts{}, s.now)
	}
}

// settle does what the pool wants until it wants nothing, and says what is there.
func (s *sim) settle(t *testing.T) string {
	t.Helper()
	for range 100 {
		st := s.next(s.now)
		switch {
		case st.drop != nil:
		case st.make != nil:
			s.idle = append(s.idle, &warm{shape: *st.make})
		default:
			found := map[string]int{}
			for _, w := range s.idle {
				found[w.shape.image]++
			}
			return fmt.Sprint(found)
		}
	}
	t.Fatal("the pool never comes to rest")
	return ""
}

func TestPoolDecides(t *testing.T) {
	a, b, c := of("a", 512), of("b", 512), of("c", 512)
	limits := Warm{Containers: 2, MemoryMB: 1024, Age: time.Minute}
	for name, test := range map[string]struct {
		limits Warm
		asked  []shape
		want   string
	}{
		"nothing":                         {limits, nil, "map[]"},
		"once is not enough":              {limits, []shape{a, b}, "map[]"},
		"twice":                           {limits, []shape{a, a}, "map[a:2]"},
		"two share":                       {limits, []shape{a, a, b, b}, "map[a:1 b:1]"},
		"the latest of many":              {limits, []shape{a, a, b, b, c, c}, "map[b:1 c:1]"},
		"memory":                          {Warm{2, 1000, time.Minute, nil}, []shape{a, a}, "map[a:1]"},
		"no room at all":                  {Warm{2, 500, time.Minute, nil}, []shape{of("a", 100), of("a", 100)}, "map[a:2]"},
		"a smaller one where one is left": {Warm{3, 600, time.Minute, nil}, []shape{a, a, of("s", 80), of("s", 80)}, "map[a:1 s:1]"},
	} {
		s := newSim(test.limits)
		s.asks(test.asked...)
		if got := s.settle(t); got != test.want {
			t.Errorf("%s: %s, want %s", name, got, test.want)
		}
	}
}

// Who is there stays, as long as the other does not come more often.
func TestPoolDoesNotThrash(t *testing.T) {
	a, b := of("a", 512), of("b", 512)
	s := newSim(Warm{Containers: 1, MemoryMB: 512, Age: time.Minute})
	s.asks(a, a)
	if got := s.settle(t); got != "map[a:1]" {
		t.Fatal(got)
	}
	for range 5 {
		s.asks(b, a)
		if got := s.settle(t); got != "map[a:1]" {
			t.Fatalf("two that take turns: %s", got)
		}
	}
	s.asks(b, b)
	if got := s.settle(t); got != "map[b:1]" {
		t.Fatalf("the other came twice: %s", got)
	}
}

func TestPoolWaitsForJobsAndForgets(t *testing.T) {
	a := of("a", 512)
	s := newSim(Warm{Containers: 2, MemoryMB: 1024, Age: time.Minute})
	s.begin()
	s.asks(a, a)
	if got := s.settle(t); got != "map[]" {
		t.Fatalf("while an attempt is prepared: %s", got)
	}
	s.end()
	s.now = s.quietAt.Add(-time.Millisecond)
	if st := s.next(s.now); st.make != nil || !st.look.Equal(s.quietAt) {
		t.Fatalf("just after: %+v", st)
	}
	s.now = s.quietAt
	if got := s.settle(t); got != "map[a:2]" {
		t.Fatal(got)
	}
	over := s.shapes[a].asked.Add(time.Minute)
	if st := s.next(s.now); !st.look.Equal(over) {
		t.Fatalf("looks again %v, it is over %v", st.look, over)
	}
	s.now = over
	if got := s.settle(t); got != "map[]" {
		t.Fatalf("after its age: %s", got)
	}
	if st := s.next(s.now); !st.empty || !st.look.IsZero() {
		t.Fatalf("an empty pool: %+v", st)
	}
	s.asks(a, a)
	s.settle(t)
	s.keep(false)
	if got := s.settle(t); got != "map[]" {
		t.Fatalf("when it is to keep nothing: %s", got)
	}
}

// A worker that is never quiet gets a container in each second all the same, but not
// while the pool rests.
func TestPoolOfABusyWorker(t *testing.T) {
	a := of("a", 512)
	s := newSim(Warm{Containers: 2, MemoryMB: 1024, Age: time.Minute})
	s.begin()
	s.asks(a, a)
	for _, want := range []string{"map[]", "map[a:1]", "map[a:2]"} {
		if got := s.settle(t); got != want {
			t.Fatalf("%s, want %s", got, want)
		}
		s.now = s.now.Add(patience)
	}
	s.idle = nil
	s.settle(t)
	s.quietAt, s.dueAt = s.now.Add(restFor), time.Time{} // it has failed
	for s.now.Before(s.quietAt.Add(patience)) {
		if got := s.settle(t); got != "map[]" {
			t.Fatalf("while it rests: %s", got)
		}
		s.now = s.now.Add(patience / 2)
	}
	if got := s.settle(t); got != "map[a:1]" {
		t.Fatalf("afterwards: %s", got)
	}
}

func TestPoolForgetsShapes(t *testing.T) {
	s := newSim(Warm{Containers: 2, MemoryMB: 1024, Age: time.Hour})
	for i := range 3 * maxShapes {
		s.asks(of(fmt.Sprint(i), 1))
	}
	if len(s.shapes) > maxShapes || s.shapes[of(fmt.Sprint(3*maxShapes-1), 1)] == nil {
		t.Fatalf("%d shapes", len(s.shapes))
	}
}

func TestMarkFilter(t *testing.T) {
	mark := "0123456789abcdef"
	for _, c := range []struct{ in, out, says string }{
		{"", "", ""},
		{"hello", "hello", ""},
		{"0123", "0123", ""},
		{"0123456789abcdeX and more", "0123456789abcdeX and more", ""},
		{mark + "no room\n", "", "no room"},
		{"x" + mark, "x" + mark, ""},
	} {
		for _, size := range []int{1, 5, 100} {
			var out testWriter
			f := &markFilter{w: &out, mark: []byte(mark)}
			for rest := c.in; rest != ""; {
				n := min(size, len(rest))
				_, _ = f.Write([]byte(rest[:n]))
				rest = rest[n:]
			}
			err := f.failure()
			if string(out) != c.out || (err == nil) != (c.says == "") {
				t.Errorf("%q by %d: %q, %v", c.in, size, out, err)
			}
		}
	}
}

type testWriter []byte

func (w *testWriter) Write(p []byte) (int, error) {
	*w = append(*w, p...)
	return len(p), nil
}
