package httpkit

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/stretchr/testify/require"
)

func jsonCode(err error) string {
	if je, ok := errors.AsType[*JSONError](err); ok {
		return je.Code
	}
	return ""
}

func manyKeysJSON(n int) string {
	var b strings.Builder
	b.WriteByte('{')
	for i := range n {
		if i > 0 {
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, `"k%d":%d`, i, i)
	}
	b.WriteByte('}')
	return b.String()
}

func nestedJSON(depth int) string { return strings.Repeat("[", depth) + strings.Repeat("]", depth) }

// jsonCases are documents with the code that they are refused with; empty is accepted.
func jsonCases() map[string]struct{ doc, code string } {
	return map[string]struct{ doc, code string }{
		"object":                     {`{"command":"echo hi","timeout":300,"env":{"A":"1"}}`, ""},
		"null":                       {`null`, ""},
		"list":                       {` [1, -0.5e+3, 0, 1E9, true, false, null, "x", {}, []] `, ""},
		"escapes":                    {`"\"\\\/\b\f\n\r\t\u00e9\u0001"`, ""},
		"surrogate pair":             {`"\ud83d\ude00\uD83D\uDE00"`, ""},
		"unicode":                    {"{\"é😀\":\"\u2028\ufffd\x7f\"}", ""},
		"BOM inside":                 {"\"\ufeff\"", ""},
		"same key in siblings":       {`[{"a":1},{"a":2}]`, ""},
		"same key in parent":         {`{"a":{"a":{"a":1}},"b":1}`, ""},
		"same key after a child":     {`{"x":{"a":1,"b":2},"a":1,"b":2}`, ""},
		"case differs":               {`{"a":1,"A":2}`, ""},
		"deepest":                    {nestedJSON(MaxJSONDepth), ""},
		"most keys":                  {manyKeysJSON(MaxJSONKeys), ""},
		"empty":                      {"", JSONEmpty},
		"blank":                      {" \r\n\t", JSONEmpty},
		"BOM":                        {"\xef\xbb\xbf{}", JSONBom},
		"UTF-16 BOM":                 {"\xff\xfe{\x00}\x00", JSONBom},
		"trailing garbage":           {`{} x`, JSONTrailing},
		"two documents":              {`{}{}`, JSONTrailing},
		"two documents on two lines": {"{}\n{}", JSONTrailing},
		"NUL after":                  {"{}\x00", JSONTrailing},
		"NUL before":                 {"\x00{}", JSONInvalid},
		"NaN":                        {`{"a":NaN}`, JSONInvalid},
		"Infinity":                   {`-Infinity`, JSONInvalid},
		"duplicate":                  {`{"a":1,"a":2}`, JSONDuplicateKey},
		"duplicate by escape":        {`{"a":1,"\u0061":2}`, JSONDuplicateKey},
		"duplicate by pair":          {`{"😀":1,"\ud83d\ude00":2}`, JSONDuplicateKey},
		"duplicate slash":            {`{"\/":1,"/":2}`, JSONDuplicateKey},
		"duplicate empty":            {`{"":1,"":2}`, JSONDuplicateKey},
		"duplicate deep":             {`{"a":[{"b":{"c":1,"d":{},"c":1}}]}`, JSONDuplicateKey},
		"duplicate after a child":    {`{"a":{"b":1},"a":1}`, JSONDuplicateKey},
		"duplicate among many":       {strings.TrimSuffix(manyKeysJSON(5000), "}") + `,"k7":1}`, JSONDuplicateKey},
		"duplicate escape of many":   {strings.TrimSuffix(manyKeysJSON(5000), "}") + `,"\u006b7":1}`, JSONDuplicateKey},
		"too deep":                   {nestedJSON(MaxJSONDepth + 1), JSONTooDeep},
		"far too deep":               {strings.Repeat("[", 1_000_000), JSONTooDeep},
		"deep objects":               {strings.Repeat(`{"a":`, 10_000) + "1" + strings.Repeat("}", 10_000), JSONTooDeep},
		"one key too many":           {manyKeysJSON(MaxJSONKeys + 1), JSONTooManyKeys},
		"many objects":               {"[" + strings.Repeat(`{"a":1},`, MaxJSONKeys+1) + "1]", JSONTooManyKeys},
		"invalid UTF-8":              {"\"\xff\"", JSONInvalidUTF8},
		"overlong UTF-8":             {"\"\xc0\x80\"", JSONInvalidUTF8},
		"surrogate in UTF-8":         {"\"\xed\xa0\x80\"", JSONInvalidUTF8},
		"cut UTF-8":                  {"\"\xe2\x82\"", JSONInvalidUTF8},
		"invalid UTF-8 in a key":     {"{\"\xff\":1}", JSONInvalidUTF8},
		"invalid UTF-8 outside":      {"{\xff}", JSONInvalidUTF8},
		"NUL escape":                 {`"a\u0000b"`, JSONNul},
		"NUL escape in a key":        {`{"\u0000":1}`, JSONNul},
		"raw NUL":                    {"\"\x00\"", JSONInvalid},
		"lone high":                  {`"\ud83d"`, JSONLoneSurrogate},
		"lone high then text":        {`"\ud83dabcdef"`, JSONLoneSurrogate},
		"lone low":                   {`"\ude00"`, JSONLoneSurrogate},
		"reversed pair":              {`"\ude00\ud83d"`, JSONLoneSurrogate},
		"high high":                  {`"\ud83d\ud83d\ude00"`, JSONLoneSurrogate},
		"line break in a string":     {"\"a\nb\"", JSONInvalid},
		"bad escape":                 {`"\x41"`, JSONInvalid},
		"short unicode escape":       {`"\u12"`, JSONInvalid},
		"bad unicode escape":         {`"\u12g4"`, JSONInvalid},
		"open string":                {`"abc`, JSONInvalid},
		"open escape":                {`"abc\`, JSONInvalid},
		"open object":                {`{"a":1`, JSONInvalid},
		"open list":                  {`[1,`, JSONInvalid},
		"trailing comma":             {`[1,]`, JSONInvalid},
		"trailing comma in object":   {`{"a":1,}`, JSONInvalid},
		"no colon":                   {`{"a" 1}`, JSONInvalid},
		"no value":                   {`{"a":}`, JSONInvalid},
		"number key":                 {`{1:1}`, JSONInvalid},
		"single quotes":              {`{'a':1}`, JSONInvalid},
		"comment":                    {`{}//`, JSONTrailing},
		"leading zero":               {`01`, JSONTrailing},
		"plus":                       {`+1`, JSONInvalid},
		"bare point":                 {`1.`, JSONInvalid},
		"bare exponent":              {`1e`, JSONInvalid},
		"bare minus":                 {`-`, JSONInvalid},
		"hex":                        {`0x10`, JSONTrailing},
		"cut literal":                {`tru`, JSONInvalid},
		"upper literal":              {`True`, JSONInvalid},
		"vertical tab":               {"\v{}", JSONInvalid},
		"no-break space":             {"\u00a0{}", JSONInvalid},
	}
}

func TestCheckJSON(t *testing.T) {
	for name, c := range jsonCases() {
		t.Run(name, func(t *testing.T) {
			err := CheckJSON([]byte(c.doc))
			if c.code == "" {
				require.NoError(t, err)
				require.True(t, json.Valid([]byte(c.doc)))
				return
			}
			require.Equal(t, c.code, jsonCode(err))
		})
	}
}

func TestCheckJSONPositions(t *testing.T) {
	for doc, want := range map[string]JSONError{
		`{"a":1,"a":2}`:           {JSONDuplicateKey, 7, 1, 8},
		"{\n  \"a\": 1,\n  x\n}":  {JSONInvalid, 14, 3, 3},
		"[\"\xff\"]":              {JSONInvalidUTF8, 2, 1, 3},
		`["ok\u0000"]`:            {JSONNul, 4, 1, 5},
		"{}\n  {}":                {JSONTrailing, 5, 2, 3},
		`{"password":"hunter2",,`: {JSONInvalid, 22, 1, 23},
		`{"a`:                     {JSONInvalid, 3, 1, 4},
		"":                        {JSONEmpty, 0, 1, 1},
	} {
		err := CheckJSON([]byte(doc))
		require.Equal(t, &want, err, "%q", doc)
		require.NotContains(t, err.Error(), "hunter2")
		require.NotContains(t, err.Error(), "\n")
	}
	require.EqualError(t, CheckJSON([]byte(`{"a":1,"a":2}`)), "an object has the same key twice (line 1, column 8)")
}

func TestCheckJSONObject(t *testing.T) {
	require.NoError(t, CheckJSONObject([]byte(" \n{}")))
	for _, doc := range []string{"null", "[]", "1", `"x"`, " true"} {
		require.Equal(t, JSONNotObject, jsonCode(CheckJSONObject([]byte(doc))), doc)
	}
	require.Equal(t, JSONEmpty, jsonCode(CheckJSONObject(nil)))
}

// The index takes over at manyKeys and grows; a duplicate of any key must be found on both sides of every such step.
func TestDuplicatesAreFoundInObjectsOfEverySize(t *testing.T) {
	for n := 1; n <= 260; n++ {
		doc := strings.TrimSuffix(manyKeysJSON(n), "}")
		require.NoError(t, CheckJSON([]byte(doc+`,"other":{"k0":1}}`)))
		for _, i := range []int{0, n / 2, n - 1} {
			require.Equal(t, JSONDuplicateKey, jsonCode(CheckJSON(fmt.Appendf(nil, `%s,"k%d":1}`, doc, i))), "%d of %d", i, n)
			require.Equal(t, JSONDuplicateKey, jsonCode(CheckJSON(fmt.Appendf(nil, `%s,"\u006b%d":1}`, doc, i))), "%d of %d", i, n)
			require.Equal(t, JSONDuplicateKey,
				jsonCode(CheckJSON(fmt.Appendf(nil, `{"\u006b%d":{"x":1,"\u0078y":2},%s}`, i, doc[1:]))), "%d of %d", i, n)
		}
	}
}

// duplicateKeys is the slow, obvious way to find a duplicate, to hold the scanner against.
func duplicateKeys(data []byte) bool {
	type frame struct {
		object, wantKey bool
		keys            map[string]bool
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber()
	var stack []*frame
	for {
		tok, err := dec.Token()
		if err != nil {
			return false
		}
		var top *frame
		if len(stack) > 0 {
			top = stack[len(stack)-1]
		}
		if d, ok := tok.(json.Delim); ok && (d == '}' || d == ']') {
			stack = stack[:len(stack)-1]
			continue
		}
		if top != nil && top.object {
			if top.wantKey {
				key := tok.(string)
				if top.keys[key] {
					return true
				}
				top.keys[key] = true
			}
			top.wantKey = !top.wantKey
			if !top.wantKey {
				continue
			}
		}
		if d, ok := tok.(json.Delim); ok {
			stack = append(stack, &frame{object: d == '{', wantKey: d == '{', keys: map[string]bool{}})
		}
	}
}

func FuzzCheckJSON(f *testing.F) {
	for _, c := range jsonCases() {
		if len(c.doc) < 10_000 {
			f.Add([]byte(c.doc))
		}
	}
	f.Add([]byte(strings.TrimSuffix(manyKeysJSON(40), "}") + `,"\u006b7":1}`))
	f.Add([]byte(manyKeysJSON(60)))
	f.Fuzz(func(t *testing.T, data []byte) {
		err := CheckJSON(data)
		valid := json.Valid(data)
		if err == nil {
			if !valid {
				t.Fatalf("accepted what encoding/json refuses: %q", data)
			}
			if duplicateKeys(data) {
				t.Fatalf("missed a duplicate key: %q", data)
			}
			var v any
			if err := json.Unmarshal(data, &v); err != nil && !strings.Contains(err.Error(), "cannot unmarshal number") {
				t.Fatalf("accepted what cannot be decoded: %q: %v", data, err)
			}
			return
		}
		je, ok := errors.AsType[*JSONError](err)
		if !ok || je.Offset < 0 || je.Offset > len(data) || je.Line < 1 || je.Column < 1 {
			t.Fatalf("error without a place: %#v", err)
		}
		switch je.Code {
		case JSONInvalid, JSONEmpty, JSONTrailing, JSONBom:
			if valid {
				t.Fatalf("refused valid JSON as %s: %q", je.Code, data)
			}
		case JSONDuplicateKey:
			if valid && !duplicateKeys(data) {
				t.Fatalf("there is no duplicate key: %q", data)
			}
		}
	})
}

func post(body io.Reader, headers ...string) *http.Request {
	r := httptest.NewRequest(http.MethodPost, "/", body)
	r.Header.Set("Content-Type", "application/json")
	for i := 0; i < len(headers); i += 2 {
		if headers[i+1] == "" {
			r.Header.Del(headers[i])
		} else {
			r.Header.Set(headers[i], headers[i+1])
		}
	}
	return r
}

func TestStrictJSON(t *testing.T) {
	const limit = 100
	fit := `{"a":"` + strings.Repeat("x", limit-8) + `"}`
	require.Len(t, fit, limit)
	endless := func(s string) io.Reader { return struct{ io.Reader }{strings.NewReader(s)} } // no Content-Length
	for name, c := range map[string]struct {
		request *http.Request
		status  int
		code    string
	}{
		"good":               {post(strings.NewReader(`{"a":1}`)), 200, ""},
		"charset":            {post(strings.NewReader(`{}`), "Content-Type", `Application/JSON; charset="UTF-8"`), 200, ""},
		"identity":           {post(strings.NewReader(`{}`), "Content-Encoding", "identity"), 200, ""},
		"limit":              {post(strings.NewReader(fit)), 200, ""},
		"limit, chunked":     {post(endless(fit)), 200, ""},
		"over":               {post(strings.NewReader(fit + " ")), 413, "body_too_large"},
		"over, chunked":      {post(endless(fit + " ")), 413, "body_too_large"},
		"empty":              {post(nil), 400, "empty_body"},
		"null":               {post(strings.NewReader("null")), 400, "not_an_object"},
		"list":               {post(strings.NewReader("[]")), 400, "not_an_object"},
		"duplicate":          {post(strings.NewReader(`{"a":1,"a":1}`)), 400, "duplicate_key"},
		"no type":            {post(strings.NewReader(`{}`), "Content-Type", ""), 415, "unsupported_media_type"},
		"form":               {post(strings.NewReader(`a=1`), "Content-Type", "application/x-www-form-urlencoded"), 415, "unsupported_media_type"},
		"text":               {post(strings.NewReader(`{}`), "Content-Type", "text/plain"), 415, "unsupported_media_type"},
		"other charset":      {post(strings.NewReader(`{}`), "Content-Type", "application/json; charset=utf-16"), 415, "unsupported_media_type"},
		"bad type":           {post(strings.NewReader(`{}`), "Content-Type", "application/json; ="), 415, "unsupported_media_type"},
		"gzip":               {post(strings.NewReader(`{}`), "Content-Encoding", "gzip"), 415, "unsupported_content_encoding"},
		"ends in the middle": {post(iotest.ErrReader(io.ErrUnexpectedEOF)), 400, "body_incomplete"},
	} {
		t.Run(name, func(t *testing.T) {
			var got []byte
			h := StrictJSON(limit)(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
				var err error
				got, err = io.ReadAll(r.Body)
				require.NoError(t, err)
				require.EqualValues(t, len(got), r.ContentLength)
			}))
			w := httptest.NewRecorder()
			h.ServeHTTP(w, c.request)
			require.Equal(t, c.status, w.Code, w.Body.String())
			if c.status == 200 {
				require.NotEmpty(t, got)
				return
			}
			require.Nil(t, got, "the handler must not run")
			require.Equal(t, c.code, decodeProblem(t, w).Code)
		})
	}
}

func benchmarkDocs() map[string][]byte {
	job := `{"command":["/bin/sh","-c","echo \"hello\" && sleep 1"],"containerImage":"alpine:3.20","timeout":300,"name":"build",` +
		`"labels":{"team":"a","env":"prod"},"env":{"A":"1","PATH":"/usr/bin"},"resources":{"cpu":1.5,"memoryMb":512,"pids":128},` +
		`"retry":{"maxAttempts":3,"backoffSeconds":2,"onExitCodes":[1,2,137]},"stop":{"signal":"SIGTERM","graceSeconds":10}}`
	return map[string][]byte{
		"job":     []byte(job),
		"jobs":    []byte("[" + strings.Repeat(job+",", 500) + job + "]"),
		"keys":    []byte(manyKeysJSON(20_000)),
		"text":    []byte(`{"stdin":"` + strings.Repeat("the quick brown fox ", 10_000) + `"}`),
		"unicode": []byte(`{"stdin":"` + strings.Repeat("zażółć gęślą jaźń ", 10_000) + `"}`),
		"escapes": []byte(`{"stdin":"` + strings.Repeat(`line\n\u00e9`, 10_000) + `"}`),
	}
}

func BenchmarkCheckJSON(b *testing.B) {
	for name, doc := range benchmarkDocs() {
		b.Run(name+"/check", func(b *testing.B) {
			b.SetBytes(int64(len(doc)))
			for b.Loop() {
				if err := CheckJSON(doc); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(name+"/json.Valid", func(b *testing.B) {
			b.SetBytes(int64(len(doc)))
			for b.Loop() {
				if !json.Valid(doc) {
					b.Fatal("invalid")
				}
			}
		})
	}
}
