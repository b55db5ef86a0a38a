// Package reference turns an OpenAPI document into a page for people. The page
// is made once, has no script, and loads nothing: its own style is named in its
// content security policy by its hash, and everything else is forbidden.
package reference

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	_ "embed" // the template and the style
	"encoding/base64"
	"encoding/json"
	"fmt"
	"html"
	"html/template"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/danielgtaylor/huma/v2"
)

//go:embed reference.html
var pageText string

//go:embed reference.css
var style string

// Page is the page and the policy that it must be served with.
type Page struct {
	HTML   []byte
	Policy string // for Content-Security-Policy
}

type view struct {
	Title, Version, Document string
	Description              template.HTML
	Style                    template.CSS
	Groups                   []group
	Schemas                  []schema
}

type group struct {
	Name       string
	Operations []operation
}

type operation struct {
	ID, Method, Class, Path, Summary string
	Description                      template.HTML
	Open                             bool // needs no token
	Parameters                       []field
	Body                             template.HTML
	Bodies                           []sample
	Curl                             string
	Answers                          []answer
	Problems                         []string
}

type field struct {
	Name          string
	Type, Meaning template.HTML
	Notes         string
}

type sample struct{ Media, Note, Text string }

type answer struct {
	Status, Text string
	Type         template.HTML
	Examples     []sample
}

type schema struct {
	Name        string
	Description template.HTML
	Fields      []field
}

// New makes the page of a document that is served at path. Operations are listed
// in the order of their ids.
func New(doc *huma.OpenAPI, path string, ids []string) (*Page, error) {
	t, err := template.New("reference").Parse(pageText)
	if err != nil {
		return nil, fmt.Errorf("parse the page's template: %w", err)
	}
	v := view{
		Title: doc.Info.Title, Version: doc.Info.Version, Document: path, Description: prose(doc.Info.Description), Style: template.CSS(style),
	}
	operations := map[string]*huma.Operation{}
	for _, item := range doc.Paths {
		for _, op := range []*huma.Operation{item.Get, item.Post} {
			if op != nil {
				operations[op.OperationID] = op
			}
		}
	}
	schemas := doc.Components.Schemas.Map()
	for _, tag := range doc.Tags {
		g := group{Name: tag.Name}
		for _, id := range ids {
			op := operations[id]
			if op == nil || !slices.Contains(op.Tags, tag.Name) {
				continue
			}
			o, err := operationOf(op)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", id, err)
			}
			g.Operations = append(g.Operations, o)
		}
		v.Groups = append(v.Groups, g)
	}
	for _, name := range slices.Sorted(maps.Keys(schemas)) {
		s := schemas[name]
		v.Schemas = append(v.Schemas, schema{Name: name, Description: prose(s.Description), Fields: fieldsOf(s)})
	}
	var page bytes.Buffer
	if err := t.Execute(&page, v); err != nil {
		return nil, fmt.Errorf("make the page: %w", err)
	}
	sum := sha256.Sum256([]byte(style))
	return &Page{
		HTML: page.Bytes(),
		Policy: "default-src 'none'; style-src 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) +
			"'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
	}, nil
}

func operationOf(op *huma.Operation) (operation, error) {
	o := operation{
		ID: op.OperationID, Method: op.Method, Class: strings.ToLower(op.Method), Path: op.Path, Summary: op.Summary,
		Description: prose(op.Description), Open: len(op.Security) == 0,
	}
	for _, p := range op.Parameters {
		notes := p.In
		if p.Required {
			notes += ", required"
		}
		o.Parameters = append(o.Parameters, field{
			Name: p.Name, Type: typeOf(p.Schema), Meaning: prose(cmp.Or(p.Description, p.Schema.Description)), Notes: join(notes, limits(p.Schema)),
		})
	}
	if op.RequestBody != nil {
		for _, media := range slices.Sorted(maps.Keys(op.RequestBody.Content)) {
			content := op.RequestBody.Content[media]
			o.Body = typeOf(content.Schema)
			text, err := pretty(content.Example)
			if err != nil {
				return o, err
			}
			o.Bodies = append(o.Bodies, sample{Media: media, Text: text})
		}
	}
	for _, code := range slices.Sorted(maps.Keys(op.Responses)) {
		response := op.Responses[code]
		if code >= "400" {
			o.Problems = append(o.Problems, code)
			continue
		}
		status, _ := strconv.Atoi(code)
		a := answer{Status: code, Text: http.StatusText(status)}
		for _, media := range slices.Sorted(maps.Keys(response.Content)) {
			content := response.Content[media]
			s := sample{Media: media}
			if media == "application/json" {
				a.Type = typeOf(content.Schema)
			} else if content.Schema != nil {
				s.Note = content.Schema.Description
			}
			var err error
			if s.Text, err = pretty(content.Example); err != nil {
				return o, err
			}
			a.Examples = append(a.Examples, s)
		}
		o.Answers = append(o.Answers, a)
	}
	var err error
	o.Curl, err = curl(op)
	return o, err
}

// curl is how the example of an operation is sent from a shell.
func curl(op *huma.Operation) (string, error) {
	path, query := op.Path, []string{}
	for _, p := range op.Parameters {
		if p.Example == nil {
			continue
		}
		values, ok := p.Example.([]string)
		if !ok {
			values = []string{fmt.Sprint(p.Example)}
		}
		for _, value := range values {
			if p.In == "path" {
				path = strings.ReplaceAll(path, "{"+p.Name+"}", value)
			} else {
				query = append(query, p.Name+"="+value)
			}
		}
	}
	if len(query) > 0 {
		path += "?" + strings.Join(query, "&")
	}
	text := `curl -s "$SERVER` + path + `"`
	if len(op.Security) > 0 {
		text += ` -H "Authorization: Bearer $TOKEN"`
	}
	if op.RequestBody != nil {
		data, err := json.Marshal(op.RequestBody.Content["application/json"].Example)
		if err != nil {
			return "", err
		}
		text += " \\\n  -H 'Content-Type: application/json' -d '" + strings.ReplaceAll(string(data), "'", `'\''`) + "'"
	}
	return text, nil
}

func fieldsOf(s *huma.Schema) []field {
	var out []field
	for _, name := range slices.Sorted(maps.Keys(s.Properties)) {
		p := s.Properties[name]
		notes := ""
		if slices.Contains(s.Required, name) {
			notes = "always there"
		}
		out = append(out, field{Name: name, Type: typeOf(p), Meaning: prose(p.Description), Notes: join(notes, limits(p))})
	}
	return out
}

// typeOf says what a value is, with a link where that has a name.
func typeOf(s *huma.Schema) template.HTML {
	switch {
	case s == nil:
		return "anything"
	case s.Ref != "":
		name := html.EscapeString(s.Ref[strings.LastIndexByte(s.Ref, '/')+1:])
		return template.HTML(`<a href="#type-` + name + `">` + name + `</a>`) // of names in our code, escaped
	case len(s.OneOf) > 0:
		var parts []string
		for _, one := range s.OneOf {
			parts = append(parts, string(typeOf(one)))
		}
		return template.HTML(strings.Join(parts, " or "))
	case s.Type == huma.TypeArray:
		return "array of " + typeOf(s.Items)
	}
	if more, ok := s.AdditionalProperties.(*huma.Schema); ok {
		return "map of " + typeOf(more)
	}
	text := s.Type
	if s.Format == "date-time" {
		text = "time"
	}
	return template.HTML(html.EscapeString(text))
}

// limits says which values a type may have.
func limits(s *huma.Schema) string {
	var parts []string
	if len(s.Enum) > 0 {
		var words []string
		for _, e := range s.Enum {
			words = append(words, fmt.Sprint(e))
		}
		parts = append(parts, strings.Join(words, " | "))
	}
	switch {
	case s.Minimum != nil && s.Maximum != nil:
		parts = append(parts, fmt.Sprintf("%s to %s", number(*s.Minimum), number(*s.Maximum)))
	case s.Minimum != nil:
		parts = append(parts, "from "+number(*s.Minimum))
	}
	if s.MaxItems != nil {
		parts = append(parts, fmt.Sprintf("at most %d", *s.MaxItems))
	}
	return strings.Join(parts, ", ")
}

func number(f float64) string { return strconv.FormatFloat(f, 'f', -1, 64) }

func join(a, b string) string {
	if a != "" && b != "" {
		return a + "; " + b
	}
	return a + b
}

// prose escapes text and sets what is between backquotes as code.
func prose(text string) template.HTML {
	var b strings.Builder
	for i, part := range strings.Split(html.EscapeString(text), "`") {
		if i%2 == 1 {
			part = "<code>" + part + "</code>"
		}
		b.WriteString(part)
	}
	return template.HTML(b.String())
}

// pretty writes an example as people read it.
func pretty(example any) (string, error) {
	if text, ok := example.(string); ok {
		return strings.TrimRight(text, "\n"), nil
	}
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(example); err != nil {
		return "", err
	}
	return strings.TrimSpace(b.String()), nil
}
