package workerproto

import (
	"bytes"
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

func FuzzFrame(f *testing.F) {
	for _, fr := range frames(f) {
		data, err := Encode(fr.typ, fr.body)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	for _, s := range []string{
		``, `null`, `[]`, `{}`, `{"type":"hello"`, `{"type":"hello","type":"result"}`, `{"type":"a","Type":"b"}`, `{"type":"he\u006clo"}`, "{\"type\":\"\xff\"}", `{"type":"x"}y`,
		`{"type":"hello","running":[null],"cpuCores":1e309}`, `{"type":"result","exitCode":1.5}`, `{"type":"output","chunks":[{"data":"%"}]}`, strings.Repeat("[", 20000),
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		typ, err := TypeOf(data)
		if (err == nil) != (typ != "") || err != nil && !errors.Is(err, ErrFrame) {
			t.Fatalf("type %q, %v", typ, err)
		}
		if !utf8.ValidString(string(typ)) {
			t.Fatalf("the type %q is not text", typ)
		}
		// A space in front is still the same JSON, and takes the slow way. A frame
		// that says its type twice, or is no JSON at all, has no type to agree on.
		if json.Valid(data) && typeKeys(data) == 1 {
			slow, slowErr := TypeOf(append([]byte(" "), data...))
			if slow != typ || (slowErr == nil) != (err == nil) {
				t.Fatalf("fast %q, %v; slow %q, %v", typ, err, slow, slowErr)
			}
		}
		for _, body := range []any{
			new(Register), new(Heartbeat), new(Progress), new(Rejected), new(Output), new(Result), new(Welcome), new(Beat), new(Assign),
			new(Cancel), new(Drain), new(Ack), new(Stale), new(Token), new(Goaway),
		} {
			if err := Decode(data, body); err != nil {
				if !errors.Is(err, ErrFrame) {
					t.Fatalf("%v is not ErrFrame", err)
				}
				continue
			}
			switch b := body.(type) {
			case *Result:
				_, _ = b.Validate(), b.Event()
			case *Output:
				for i := range b.Chunks {
					_ = b.Chunks[i].Validate()
				}
			}
			// What was read can be written, and read again as the same.
			out, err := Encode("x", reflect.ValueOf(body).Elem().Interface())
			if err != nil {
				t.Fatal(err)
			}
			back := reflect.New(reflect.TypeOf(body).Elem()).Interface()
			if err := Decode(out, back); err != nil {
				t.Fatalf("%v in %s", err, out)
			}
			again, err := Encode("x", reflect.ValueOf(back).Elem().Interface())
			if err != nil || !bytes.Equal(again, out) {
				t.Fatalf("%v: %s then %s", err, out, again)
			}
		}
	})
}

// typeKeys counts the keys of the outermost object that encoding/json takes for "type".
func typeKeys(data []byte) int {
	dec := json.NewDecoder(bytes.NewReader(data))
	n, depth, key := 0, 0, false
	for {
		tok, err := dec.Token()
		if err != nil {
			return n
		}
		switch v := tok.(type) {
		case json.Delim:
			switch v {
			case '{', '[':
				depth++
				key = depth == 1
			default:
				depth--
				key = depth == 1
			}
			continue
		case string:
			if depth == 1 && key {
				if strings.EqualFold(v, "type") {
					n++
				}
				key = false
				continue
			}
		}
		key = depth == 1
	}
}

func FuzzChunkFrame(f *testing.F) {
	good, err := EncodeChunk(lease(), chunk())
	if err != nil {
		f.Fatal(err)
	}
	for _, data := range [][]byte{
		good, nil,
		{0, 0, 0, 0},
		{0, 0, 0, 2, '{', '}'},
		{0xff, 0xff, 0xff, 0xff},
		{0, 0, 0, 2, '{', '}', 'x'},
		good[:len(good)-1], good[:20],
		append([]byte{0, 0, 0, 24}, `{"seq":-1,"stream":"no"}`...),
	} {
		f.Add(data, "job-1", 1, "lease-1", int64(1), int64(0), "stdout")
	}
	f.Fuzz(func(t *testing.T, data []byte, jobID string, attempt int, leaseID string, seq, offset int64, stream string) {
		// As a frame from outside.
		l, c, err := DecodeChunk(data)
		switch {
		case err != nil && !errors.Is(err, ErrFrame):
			t.Fatalf("%v is not ErrFrame", err)
		case err == nil:
			_ = c.Validate()
			out, err := EncodeChunk(l, c)
			if err != nil {
				t.Fatal(err)
			}
			if len(out)-4-len(c.Data) <= maxChunkHeader { // escapes may have made it longer
				l2, c2, err := DecodeChunk(out)
				if err != nil || l2 != l || !c2.Time.Equal(c.Time) || c2.Seq != c.Seq || c2.Offset != c.Offset || c2.Stream != c.Stream || !bytes.Equal(c2.Data, c.Data) {
					t.Fatalf("%+v %+v comes back as %+v %+v, %v", l, c, l2, c2, err)
				}
			}
		}
		// As data of a chunk of our own.
		if !utf8.ValidString(jobID) || !utf8.ValidString(leaseID) || !utf8.ValidString(stream) || len(jobID)+len(leaseID)+len(stream) > 128 {
			return
		}
		want := Lease{JobID: jobID, Attempt: attempt, LeaseID: leaseID}
		wantChunk := Chunk{Seq: seq, Offset: offset, Stream: Stream(stream), Time: time.UnixMilli(1).UTC(), Data: data}
		out, err := EncodeChunk(want, wantChunk)
		if err != nil {
			t.Fatal(err)
		}
		l, c, err = DecodeChunk(out)
		if err != nil || l != want || !bytes.Equal(c.Data, data) || c.Seq != seq || c.Offset != offset || string(c.Stream) != stream || !c.Time.Equal(wantChunk.Time) {
			t.Fatalf("%+v comes back as %+v %+v, %v", want, l, c, err)
		}
	})
}
