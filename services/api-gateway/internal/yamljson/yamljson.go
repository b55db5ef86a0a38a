// Package yamljson turns a YAML document into the JSON document that it means,
// so that everything after it has one form to check. It knows a small part of
// YAML, in which a text has one meaning: mappings, sequences and scalars.
//
// Refused are anchors, aliases and merge keys (by which a small text becomes a
// large one), tags (by which a text becomes something else than it looks like),
// keys that are not scalars, the same key twice, and a second document. Unquoted
// scalars are what they would be in JSON: true, false, null (also ~ and nothing),
// a number; everything else is a string. So yes, 0755, 1_000 and 2026-11-24 are
// strings, which YAML's versions do not agree about.
//
// No error of this package contains a value that was sent.
package yamljson

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// MaxDepth is how deeply collections may be nested.
const MaxDepth = 64

// Codes of an Error. They are part of the API.
const (
	CodeEmpty       = "empty_body"
	CodeEncoding    = "invalid_utf8"
	CodeBOM         = "byte_order_mark"
	CodeInvalid     = "invalid_yaml"
	CodeDocuments   = "trailing_data"
	CodeAlias       = "yaml_alias"
	CodeTag         = "yaml_tag"
	CodeKey         = "yaml_key"
	CodeDuplicate   = "duplicate_key"
	CodeTooDeep     = "too_deep"
	CodeNotAMapping = "not_an_object"
)

// Error says why a document was refused. Line counts from 1; 0 is unknown.
type Error struct {
	Code string
	Line int
}

func (e *Error) Error() string {
	if e.Line == 0 {
		return detail(e.Code)
	}
	return fmt.Sprintf("%s (line %d)", detail(e.Code), e.Line)
}

func detail(code string) string {
	switch code {
	case CodeEmpty:
		return "the body is empty"
	case CodeEncoding:
		return "the body is not valid UTF-8"
	case CodeBOM:
		return "the body starts with a byte order mark"
	case CodeDocuments:
		return "there is more than one YAML document"
	case CodeAlias:
		return "anchors, aliases and merge keys are not taken"
	case CodeTag:
		return "tags are not taken"
	case CodeKey:
		return "a key must be a plain word or a string"
	case CodeDuplicate:
		return "a mapping has the same key twice"
	case CodeTooDeep:
		return fmt.Sprintf("the YAML is nested more than %d levels deep", MaxDepth)
	case CodeNotAMapping:
		return "the body must be a mapping"
	default:
		return "the body is not valid YAML"
	}
}

// Convert returns the JSON object that data means. The error is an *Error. It
// takes memory in proportion to the length of data, some two hundred times that at
// most: bound the length, and how many run at once.
func Convert(data []byte) ([]byte, error) {
	switch {
	case !utf8.Valid(data):
		return nil, &Error{Code: CodeEncoding}
	case bytes.HasPrefix(data, []byte("\xef\xbb\xbf")):
		return nil, &Error{Code: CodeBOM}
	}
	root, err := parse(data)
	if err != nil {
		return nil, err
	}
	if root.Kind != yaml.MappingNode {
		if isNull(root) {
			return nil, &Error{Code: CodeEmpty}
		}
		return nil, &Error{Code: CodeNotAMapping, Line: root.Line}
	}
	w := writer{out: make([]byte, 0, len(data)+len(data)/4)}
	if err := w.value(root, 0); err != nil {
		return nil, err
	}
	return w.out, nil
}

// parse returns the root of the only document.
func parse(data []byte) (root *yaml.Node, err error) {
	defer func() {
		// The parser panics with errors of its own inside and catches those. Should
		// it ever have another one, the text is at fault, not the service.
		if v := recover(); v != nil {
			root, err = nil, &Error{Code: CodeInvalid}
		}
	}()
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var doc, more yaml.Node
	switch err := dec.Decode(&doc); {
	case errors.Is(err, io.EOF):
		return nil, &Error{Code: CodeEmpty}
	case err != nil:
		return nil, &Error{Code: CodeInvalid, Line: lineOf(err)}
	case doc.Kind != yaml.DocumentNode || len(doc.Content) != 1:
		return nil, &Error{Code: CodeInvalid}
	}
	switch err := dec.Decode(&more); {
	case errors.Is(err, io.EOF):
		return doc.Content[0], nil
	case err != nil:
		return nil, &Error{Code: CodeInvalid, Line: lineOf(err)}
	default:
		return nil, &Error{Code: CodeDocuments, Line: more.Line}
	}
}

// lineOf takes the line out of an error of the parser, and nothing else: its
// texts may quote the document.
func lineOf(err error) int {
	rest, ok := strings.CutPrefix(err.Error(), "yaml: line ")
	if !ok {
		return 0
	}
	number, _, _ := strings.Cut(rest, ":")
	n, err := strconv.Atoi(number)
	if err != nil {
		return 0
	}
	return n
}

type writer struct{ out []byte }

func (w *writer) value(n *yaml.Node, depth int) error {
	switch {
	case n.Kind == yaml.AliasNode || n.Anchor != "":
		return &Error{Code: CodeAlias, Line: n.Line}
	case n.Style&yaml.TaggedStyle != 0:
		return &Error{Code: CodeTag, Line: n.Line}
	case depth >= MaxDepth && n.Kind != yaml.ScalarNode:
		return &Error{Code: CodeTooDeep, Line: n.Line}
	}
	switch n.Kind {
	case yaml.ScalarNode:
		return w.scalar(n)
	case yaml.SequenceNode:
		w.out = append(w.out, '[')
		for i, item := range n.Content {
			if i > 0 {
				w.out = append(w.out, ',')
			}
			if err := w.value(item, depth+1); err != nil {
				return err
			}
		}
		w.out = append(w.out, ']')
		return nil
	case yaml.MappingNode:
		return w.mapping(n, depth)
	default:
		return &Error{Code: CodeInvalid, Line: n.Line}
	}
}

func (w *writer) mapping(n *yaml.Node, depth int) error {
	seen := make(map[string]bool, len(n.Content)/2)
	w.out = append(w.out, '{')
	for i := 0; i+1 < len(n.Content); i += 2 {
		key := n.Content[i]
		switch {
		case key.Kind == yaml.AliasNode || key.Anchor != "" || key.Value == "<<" && plain(key):
			return &Error{Code: CodeAlias, Line: key.Line}
		case key.Style&yaml.TaggedStyle != 0:
			return &Error{Code: CodeTag, Line: key.Line}
		case key.Kind != yaml.ScalarNode:
			return &Error{Code: CodeKey, Line: key.Line}
		case seen[key.Value]:
			return &Error{Code: CodeDuplicate, Line: key.Line}
		}
		seen[key.Value] = true
		if i > 0 {
			w.out = append(w.out, ',')
		}
		if err := w.text(key); err != nil {
			return err
		}
		w.out = append(w.out, ':')
		if err := w.value(n.Content[i+1], depth+1); err != nil {
			return err
		}
	}
	w.out = append(w.out, '}')
	return nil
}

func plain(n *yaml.Node) bool {
	return n.Style&(yaml.SingleQuotedStyle|yaml.DoubleQuotedStyle|yaml.LiteralStyle|yaml.FoldedStyle) == 0
}

func isNull(n *yaml.Node) bool {
	return n.Kind == yaml.ScalarNode && plain(n) && (n.Value == "" || n.Value == "~" || n.Value == "null")
}

func (w *writer) scalar(n *yaml.Node) error {
	switch {
	case isNull(n):
		w.out = append(w.out, "null"...)
	case plain(n) && (n.Value == "true" || n.Value == "false" || isNumber(n.Value)):
		w.out = append(w.out, n.Value...)
	default:
		return w.text(n)
	}
	return nil
}

func (w *writer) text(n *yaml.Node) error {
	text, err := json.Marshal(n.Value)
	if err != nil || !utf8.ValidString(n.Value) {
		return &Error{Code: CodeEncoding, Line: n.Line}
	}
	w.out = append(w.out, text...)
	return nil
}

// isNumber reports whether s is a number of JSON.
func isNumber(s string) bool {
	if s == "" || s[0] != '-' && (s[0] < '0' || s[0] > '9') {
		return false
	}
	return json.Valid([]byte(s)) // of what begins like this, only numbers are
}
