// Package strictjson decodes request bodies without guessing: a key must be
// written exactly as the struct says, and an unknown one is reported with its
// full path. encoding/json would match keys without regard to case and report
// the first unknown one without its place.
//
// No error of this package contains a value that was sent.
package strictjson

import (
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strconv"
	"strings"
)

// MaxReported bounds how many unknown fields one error lists.
const MaxReported = 16

// UnknownFieldsError lists the paths of fields that do not exist.
type UnknownFieldsError struct{ Fields []string }

func (e *UnknownFieldsError) Error() string {
	return "unknown fields: " + strings.Join(e.Fields, ", ")
}

// Unknown returns the error of one unknown field, with its name if that may be
// said.
func Unknown(name string) *UnknownFieldsError {
	return &UnknownFieldsError{Fields: []string{presentable(name)}}
}

// FieldError says that one field has the wrong type. Field is empty where the
// place is not known.
type FieldError struct {
	Field  string
	Detail string
}

func (e *FieldError) Error() string { return e.Field + ": " + e.Detail }

// Decoder decodes documents into values of one struct type. It is immutable
// and safe for concurrent use.
type Decoder[T any] struct{ root *node }

// For returns a decoder for T, which must be a struct.
func For[T any]() *Decoder[T] {
	return &Decoder[T]{root: build(reflect.TypeFor[T](), map[reflect.Type]*node{})}
}

// Decode reads data into a T. The data must be one valid JSON object without
// duplicate keys: httpkit.CheckJSONObject has said so. The error is an
// *UnknownFieldsError or a *FieldError.
func (d *Decoder[T]) Decode(data []byte) (T, error) {
	var v T
	w := walker{data: data}
	w.value(d.root)
	if len(w.unknown) > 0 {
		return v, &UnknownFieldsError{Fields: w.unknown}
	}
	if err := json.Unmarshal(data, &v); err != nil {
		return v, explain(err)
	}
	return v, nil
}

// explain drops what encoding/json says of the value.
func explain(err error) error {
	var typeErr *json.UnmarshalTypeError
	if !errors.As(err, &typeErr) {
		// From an UnmarshalJSON method of ours, whose texts are constant.
		return &FieldError{Detail: err.Error()}
	}
	return &FieldError{Field: typeErr.Field, Detail: "must be " + describe(typeErr.Type)}
}

func describe(t reflect.Type) string {
	if t == nil {
		return "of another type"
	}
	switch t.Kind() {
	case reflect.Bool:
		return "true or false"
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64,
		reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return "a whole number"
	case reflect.Float32, reflect.Float64:
		return "a number"
	case reflect.String:
		return "a string"
	case reflect.Slice, reflect.Array:
		return "an array"
	case reflect.Map, reflect.Struct:
		return "an object"
	default:
		return "of another type"
	}
}

// node says which keys the objects at one place may have.
type node struct {
	fields map[string]*node // of a struct
	elem   *node            // of a map's values or a slice's elements
}

var unmarshalerType = reflect.TypeFor[json.Unmarshaler]()

// build returns nil for a type below which every key is allowed.
func build(t reflect.Type, seen map[reflect.Type]*node) *node {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if reflect.PointerTo(t).Implements(unmarshalerType) {
		return nil
	}
	switch t.Kind() {
	case reflect.Slice, reflect.Map:
		if elem := build(t.Elem(), seen); elem != nil {
			return &node{elem: elem}
		}
		return nil
	case reflect.Struct:
	default:
		return nil
	}
	if n := seen[t]; n != nil {
		return n
	}
	n := &node{fields: map[string]*node{}}
	seen[t] = n
	for _, f := range reflect.VisibleFields(t) {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if !f.IsExported() || name == "-" || f.Anonymous && name == "" {
			continue
		}
		if name == "" {
			name = f.Name
		}
		n.fields[name] = build(f.Type, seen)
	}
	return n
}

// walker goes over a document that is known to be valid.
type walker struct {
	data    []byte
	pos     int
	path    []string
	unknown []string
}

func (w *walker) space() {
	for w.pos < len(w.data) {
		switch w.data[w.pos] {
		case ' ', '\t', '\r', '\n':
			w.pos++
		default:
			return
		}
	}
}

func (w *walker) value(n *node) {
	w.space()
	if w.pos >= len(w.data) {
		return
	}
	switch w.data[w.pos] {
	case '{':
		w.object(n)
	case '[':
		w.array(n)
	case '"':
		w.str()
	default:
		for w.pos < len(w.data) && strings.IndexByte(",]} \t\r\n", w.data[w.pos]) < 0 {
			w.pos++
		}
	}
}

func (w *walker) object(n *node) {
	w.pos++
	for {
		w.space()
		if w.pos >= len(w.data) || w.data[w.pos] == '}' {
			w.pos++
			return
		}
		if w.data[w.pos] == ',' {
			w.pos++
			continue
		}
		key, escaped := w.str()
		w.space()
		w.pos++ // colon
		var below *node
		if n != nil {
			name := string(key)
			if escaped {
				_ = json.Unmarshal([]byte(`"`+name+`"`), &name) // cannot fail: the document is valid
			}
			w.path = append(w.path, name)
			switch {
			case n.fields != nil:
				var ok bool
				if below, ok = n.fields[name]; !ok {
					w.report()
				}
			default:
				below = n.elem
			}
			w.value(below)
			w.path = w.path[:len(w.path)-1]
			continue
		}
		w.value(nil)
	}
}

func (w *walker) array(n *node) {
	w.pos++
	var below *node
	if n != nil {
		below = n.elem
	}
	for i := 0; ; i++ {
		w.space()
		if w.pos >= len(w.data) || w.data[w.pos] == ']' {
			w.pos++
			return
		}
		if w.data[w.pos] == ',' {
			w.pos++
			i--
			continue
		}
		if below == nil {
			w.value(nil)
			continue
		}
		w.path = append(w.path, "["+strconv.Itoa(i)+"]")
		w.value(below)
		w.path = w.path[:len(w.path)-1]
	}
}

// str skips a string and returns what is between its quotes.
func (w *walker) str() (inside []byte, escaped bool) {
	start := w.pos + 1
	for i := start; i < len(w.data); i++ {
		switch w.data[i] {
		case '\\':
			escaped = true
			i++
		case '"':
			w.pos = i + 1
			return w.data[start:i], escaped
		}
	}
	w.pos = len(w.data)
	return nil, false
}

func (w *walker) report() {
	if len(w.unknown) >= MaxReported {
		return
	}
	var b strings.Builder
	for i, part := range w.path {
		if i > 0 && part[:min(1, len(part))] != "[" {
			b.WriteByte('.')
		}
		b.WriteString(presentable(part))
	}
	w.unknown = append(w.unknown, b.String())
}

// presentable keeps names that could be those of a field, and nothing else of
// what was sent.
func presentable(name string) string {
	const most = 64
	ok := name != "" && len(name) <= most
	for i := 0; ok && i < len(name); i++ {
		c := name[i]
		ok = c == '_' || c == '-' || c == '[' || c == ']' || '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
	}
	if !ok {
		return fmt.Sprintf("(a name of %d bytes)", len(name))
	}
	return name
}
