package httpkit

import (
	"bytes"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"mime"
	"net"
	"net/http"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// Limits of CheckJSON.
const (
	MaxJSONDepth = 64
	MaxJSONKeys  = 50_000
)

// Codes of a JSONError. They are part of the API: clients see them in problems.
const (
	JSONEmpty         = "empty_body"
	JSONBom           = "byte_order_mark"
	JSONInvalid       = "invalid_json"
	JSONInvalidUTF8   = "invalid_utf8"
	JSONTrailing      = "trailing_data"
	JSONDuplicateKey  = "duplicate_key"
	JSONTooDeep       = "too_deep"
	JSONTooManyKeys   = "too_many_keys"
	JSONNul           = "nul_in_string"
	JSONLoneSurrogate = "lone_surrogate"
	JSONNotObject     = "not_an_object"
)

// JSONError says why and where a document was refused, and nothing of what it contains.
type JSONError struct {
	Code   string
	Offset int // in bytes, from 0
	Line   int // from 1
	Column int // in bytes, from 1
}

func (e *JSONError) Error() string {
	if e.Code == JSONEmpty {
		return jsonDetail(e.Code)
	}
	return fmt.Sprintf("%s (line %d, column %d)", jsonDetail(e.Code), e.Line, e.Column)
}

func jsonDetail(code string) string {
	switch code {
	case JSONEmpty:
		return "the body is empty"
	case JSONBom:
		return "the body starts with a byte order mark"
	case JSONInvalidUTF8:
		return "the body is not valid UTF-8"
	case JSONTrailing:
		return "there is something after the JSON document"
	case JSONDuplicateKey:
		return "an object has the same key twice"
	case JSONTooDeep:
		return fmt.Sprintf("the JSON is nested more than %d levels deep", MaxJSONDepth)
	case JSONTooManyKeys:
		return fmt.Sprintf("the JSON has more than %d keys", MaxJSONKeys)
	case JSONNul:
		return "a string contains a NUL character"
	case JSONLoneSurrogate:
		return "a string contains half of a surrogate pair"
	case JSONNotObject:
		return "the body must be a JSON object"
	}
	return "the body is not valid JSON"
}

// CheckJSON refuses everything about which two JSON parsers could disagree, and everything that costs more to hold than to send, before a
// decoder sees it: invalid UTF-8, duplicate keys at any depth (compared after unescaping), lone surrogates, NUL, depth, number of keys,
// a second document. What it accepts, encoding/json accepts. The error is a *JSONError. One pass; memory grows with the number of keys
// of the objects that are open, not with the document.
func CheckJSON(data []byte) error {
	s := jsonScanner{data: data}
	code := s.document()
	if code == "" {
		return nil
	}
	pos := min(s.pos, len(data))
	before := data[:pos]
	return &JSONError{
		Code: code, Offset: pos,
		Line:   1 + bytes.Count(before, []byte{'\n'}),
		Column: pos - bytes.LastIndexByte(before, '\n'),
	}
}

// CheckJSONObject is CheckJSON for a document that must be an object.
func CheckJSONObject(data []byte) error {
	if err := CheckJSON(data); err != nil {
		return err
	}
	if trimmed := bytes.TrimLeft(data, " \t\r\n"); trimmed[0] != '{' {
		return &JSONError{Code: JSONNotObject, Line: 1, Column: 1}
	}
	return nil
}

// StrictJSON reads the request's body, at most limit bytes, checks it with CheckJSONObject and hands it on, so that the handler reads it from
// memory. Anything else is answered here: 413 too large, 415 not JSON or compressed, 408 too slow, 400 the rest. Put it on routes that
// take a JSON body.
func StrictJSON(limit int64) Middleware {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body, problem := readJSON(w, r, limit)
			if problem != nil {
				Write(w, r, *problem)
				return
			}
			r.Body = io.NopCloser(bytes.NewReader(body))
			r.ContentLength = int64(len(body))
			next.ServeHTTP(w, r)
		})
	}
}

func readJSON(w http.ResponseWriter, r *http.Request, limit int64) ([]byte, *Problem) {
	if enc := r.Header.Values("Content-Encoding"); len(enc) > 1 || len(enc) == 1 && !strings.EqualFold(enc[0], "identity") {
		return nil, &Problem{
			Status: http.StatusUnsupportedMediaType, Code: "unsupported_content_encoding",
			Detail: "the body must not be compressed", Hint: "send it without Content-Encoding",
		}
	}
	if r.ContentLength > limit {
		w.Header().Set("Connection", "close") // the body is not read
		return nil, new(tooLarge(limit))
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, limit))
	if err != nil {
		return nil, readProblem(err, limit)
	}
	if len(body) > 0 && !isJSONType(r.Header.Values("Content-Type")) {
		return nil, &Problem{
			Status: http.StatusUnsupportedMediaType, Code: "unsupported_media_type",
			Detail: "the body must be JSON", Hint: "send Content-Type: application/json",
		}
	}
	if err := CheckJSONObject(body); err != nil {
		code := JSONInvalid
		if je, ok := errors.AsType[*JSONError](err); ok {
			code = je.Code
		}
		return nil, &Problem{Status: http.StatusBadRequest, Code: code, Detail: err.Error()}
	}
	return body, nil
}

func readProblem(err error, limit int64) *Problem {
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return new(tooLarge(limit))
	}
	if ne, ok := errors.AsType[net.Error](err); ok && ne.Timeout() {
		return &Problem{Status: http.StatusRequestTimeout, Code: "body_timeout", Detail: "the body did not arrive in time"}
	}
	return &Problem{Status: http.StatusBadRequest, Code: "body_incomplete", Detail: "the body ended too early or was malformed"}
}

// isJSONType accepts application/json and nothing but UTF-8.
func isJSONType(values []string) bool {
	if len(values) != 1 {
		return false
	}
	media, params, err := mime.ParseMediaType(values[0])
	if err != nil || media != "application/json" {
		return false
	}
	charset, ok := params["charset"]
	return !ok || strings.EqualFold(charset, "utf-8")
}

// jsonScanner walks one document. Its methods return a code, empty for success; pos is then where the trouble is.
type jsonScanner struct {
	data []byte
	pos  int
	keys int    // so far in the document
	open []span // keys of the objects around pos, innermost last
	own  []byte // keys that had escapes, without them
}

// span is where a key is: in data, or in own if from is negative (-1 is its start). It has no pointer, so that tens of thousands of keys are
// nothing to the garbage collector.
type span struct{ from, to int }

func (s *jsonScanner) key(k span) []byte {
	if k.from < 0 {
		return s.own[-1-k.from : k.to]
	}
	return s.data[k.from:k.to]
}

func (s *jsonScanner) document() string {
	for _, bom := range []string{"\xef\xbb\xbf", "\xfe\xff", "\xff\xfe"} {
		if bytes.HasPrefix(s.data, []byte(bom)) {
			return JSONBom
		}
	}
	if s.next() == 0 && s.pos == len(s.data) {
		return JSONEmpty
	}
	if code := s.value(0); code != "" {
		return code
	}
	s.next()
	if s.pos < len(s.data) {
		return JSONTrailing
	}
	return ""
}

// next skips white space and returns the byte at pos, 0 at the end. A NUL byte is not legal anywhere, so the two need no telling apart.
func (s *jsonScanner) next() byte {
	for s.pos < len(s.data) {
		switch c := s.data[s.pos]; c {
		case ' ', '\t', '\r', '\n':
			s.pos++
		default:
			return c
		}
	}
	return 0
}

func (s *jsonScanner) value(depth int) string {
	switch c := s.next(); c {
	case '{':
		if depth == MaxJSONDepth {
			return JSONTooDeep
		}
		return s.object(depth + 1)
	case '[':
		if depth == MaxJSONDepth {
			return JSONTooDeep
		}
		return s.array(depth + 1)
	case '"':
		_, code := s.str()
		return code
	case 't':
		return s.literal("true")
	case 'f':
		return s.literal("false")
	case 'n':
		return s.literal("null")
	default:
		if c == '-' || isDigit(c) {
			return s.number()
		}
		return s.illegal()
	}
}

// illegal names what is wrong with the byte at pos, which no rule accepts.
func (s *jsonScanner) illegal() string {
	if s.pos < len(s.data) && s.data[s.pos] >= utf8.RuneSelf {
		if r, size := utf8.DecodeRune(s.data[s.pos:]); r == utf8.RuneError && size == 1 {
			return JSONInvalidUTF8
		}
	}
	return JSONInvalid
}

func (s *jsonScanner) array(depth int) string {
	s.pos++ // [
	if s.next() == ']' {
		s.pos++
		return ""
	}
	for {
		if code := s.value(depth); code != "" {
			return code
		}
		switch s.next() {
		case ',':
			s.pos++
		case ']':
			s.pos++
			return ""
		default:
			return s.illegal()
		}
	}
}

func (s *jsonScanner) object(depth int) string {
	s.pos++ // {
	if s.next() == '}' {
		s.pos++
		return ""
	}
	base := len(s.open)
	var index *keyIndex // once there are many keys
	for {
		if s.next() != '"' {
			return s.illegal()
		}
		start := s.pos
		escaped, code := s.str()
		if code != "" {
			return code
		}
		after := s.pos
		key := span{start + 1, after - 1}
		if escaped {
			from := len(s.own)
			s.own = unescape(s.own, s.key(key))
			key = span{-1 - from, len(s.own)}
		}
		s.pos = start // where errors about the key point
		if s.keys++; s.keys > MaxJSONKeys {
			return JSONTooManyKeys
		}
		s.open = append(s.open, key)
		if !s.distinct(s.open[base:], &index) {
			return JSONDuplicateKey
		}
		s.pos = after

		if s.next() != ':' {
			return s.illegal()
		}
		s.pos++
		if code := s.value(depth); code != "" {
			return code
		}
		switch s.next() {
		case ',':
			s.pos++
		case '}':
			s.pos++
			s.open = s.open[:base]
			return ""
		default:
			return s.illegal()
		}
	}
}

// manyKeys is where comparing with each key gets slower than an index.
const manyKeys = 16

// distinct reports whether the last of an object's keys differs from those before it, which are distinct. Large objects get an index.
func (s *jsonScanner) distinct(keys []span, index **keyIndex) bool {
	last := s.key(keys[len(keys)-1])
	if len(keys) <= manyKeys {
		for _, k := range keys[:len(keys)-1] {
			if bytes.Equal(s.key(k), last) {
				return false
			}
		}
		return true
	}
	if *index == nil {
		*index = &keyIndex{seed: maphash.MakeSeed(), slots: make([]keySlot, 4*manyKeys)}
		for i := range keys[:len(keys)-1] {
			s.add(*index, keys[:i+1])
		}
	}
	return s.add(*index, keys)
}

// keyIndex finds duplicates among the keys of one large object: a hash table of positions with linear probing. A map would copy every key
// and is several times slower. The seed is random, so that nobody can send keys that collide.
type keyIndex struct {
	seed  maphash.Seed
	slots []keySlot // a power of two, at most three quarters full
}

type keySlot struct {
	hash uint32
	key  int32 // position in the object's keys, plus 1; 0 is free
}

// add puts the last of keys in the index, and returns false if it is there already. Those before it are in the index.
func (s *jsonScanner) add(index *keyIndex, keys []span) bool {
	if 4*len(keys) > 3*len(index.slots) {
		index.grow()
	}
	last := s.key(keys[len(keys)-1])
	hash := uint32(maphash.Bytes(index.seed, last))
	mask := uint32(len(index.slots) - 1)
	i := hash & mask
	for ; index.slots[i].key != 0; i = (i + 1) & mask {
		if slot := index.slots[i]; slot.hash == hash && bytes.Equal(s.key(keys[slot.key-1]), last) {
			return false
		}
	}
	index.slots[i] = keySlot{hash: hash, key: int32(len(keys))} // at most MaxJSONKeys
	return true
}

func (x *keyIndex) grow() {
	old := x.slots
	x.slots = make([]keySlot, 2*len(old))
	mask := uint32(len(x.slots) - 1)
	for _, slot := range old {
		if slot.key == 0 {
			continue
		}
		i := slot.hash & mask
		for x.slots[i].key != 0 {
			i = (i + 1) & mask
		}
		x.slots[i] = slot
	}
}

// str scans the string at pos and says whether it has escapes.
func (s *jsonScanner) str() (escaped bool, code string) {
	data, i := s.data, s.pos+1
	defer func() { s.pos = i }()
	for i < len(data) {
		c := data[i]
		switch {
		case c == '"':
			i++
			return escaped, ""
		case c == '\\':
			escaped = true
			n, code := escapeLength(data[i:])
			if code != "" {
				return escaped, code
			}
			i += n
		case c < ' ':
			return escaped, JSONInvalid
		case c < utf8.RuneSelf:
			i++
		default:
			r, size := utf8.DecodeRune(data[i:])
			if r == utf8.RuneError && size == 1 {
				return escaped, JSONInvalidUTF8
			}
			i += size
		}
	}
	return escaped, JSONInvalid
}

// escapeLength returns how many bytes the escape at the start of b takes; a surrogate pair is one.
func escapeLength(b []byte) (int, string) {
	if len(b) < 2 {
		return 0, JSONInvalid
	}
	switch b[1] {
	case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
		return 2, ""
	case 'u':
	default:
		return 0, JSONInvalid
	}
	r, ok := hex4(b)
	switch {
	case !ok:
		return 0, JSONInvalid
	case r == 0:
		return 0, JSONNul
	case !utf16.IsSurrogate(r):
		return 6, ""
	}
	low, ok := hex4(b[6:])
	if !ok || utf16.DecodeRune(r, low) == utf8.RuneError {
		return 0, JSONLoneSurrogate
	}
	return 12, ""
}

// hex4 reads \uXXXX.
func hex4(b []byte) (rune, bool) {
	if len(b) < 6 || b[0] != '\\' || b[1] != 'u' {
		return 0, false
	}
	var r rune
	for _, c := range b[2:6] {
		switch {
		case isDigit(c):
			c -= '0'
		case c >= 'a' && c <= 'f':
			c -= 'a' - 10
		case c >= 'A' && c <= 'F':
			c -= 'A' - 10
		default:
			return 0, false
		}
		r = r<<4 | rune(c)
	}
	return r, true
}

// unescape appends the inside of a string that str has accepted, decoded, to out.
func unescape(out, b []byte) []byte {
	for len(b) > 0 {
		if b[0] != '\\' {
			out = append(out, b[0])
			b = b[1:]
			continue
		}
		n, _ := escapeLength(b)
		switch b[1] {
		case 'b':
			out = append(out, '\b')
		case 'f':
			out = append(out, '\f')
		case 'n':
			out = append(out, '\n')
		case 'r':
			out = append(out, '\r')
		case 't':
			out = append(out, '\t')
		case 'u':
			r, _ := hex4(b)
			if n == 12 {
				low, _ := hex4(b[6:])
				r = utf16.DecodeRune(r, low)
			}
			out = utf8.AppendRune(out, r)
		default:
			out = append(out, b[1])
		}
		b = b[n:]
	}
	return out
}

func (s *jsonScanner) literal(word string) string {
	for i := range len(word) {
		if s.pos == len(s.data) || s.data[s.pos] != word[i] {
			return s.illegal()
		}
		s.pos++
	}
	return ""
}

func (s *jsonScanner) number() string {
	if s.at() == '-' {
		s.pos++
	}
	switch c := s.at(); {
	case c == '0':
		s.pos++
	case isDigit(c):
		s.digits()
	default:
		return s.illegal()
	}
	if s.at() == '.' {
		s.pos++
		if !s.digits() {
			return s.illegal()
		}
	}
	if c := s.at(); c == 'e' || c == 'E' {
		s.pos++
		if c := s.at(); c == '+' || c == '-' {
			s.pos++
		}
		if !s.digits() {
			return s.illegal()
		}
	}
	return ""
}

// at returns the byte at pos, 0 at the end.
func (s *jsonScanner) at() byte {
	if s.pos < len(s.data) {
		return s.data[s.pos]
	}
	return 0
}

func (s *jsonScanner) digits() bool {
	start := s.pos
	for isDigit(s.at()) {
		s.pos++
	}
	return s.pos > start
}

func isDigit(c byte) bool { return c >= '0' && c <= '9' }
