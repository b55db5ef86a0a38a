// Package config reads settings from environment variables into tagged structs.
//
//	type Config struct {
//		NatsURL string        `envconfig:"NATS_URL" default:"nats://127.0.0.1:4222" desc:"address of NATS"`
//		Secret  config.Secret `envconfig:"JWT_SECRET" required:"true" desc:"signs user tokens"`
//	}
//	cfg, err := config.Load[Config]()
//
// It is the only place of the project that reads the environment. An error is one line that names the variable and says
// what is expected; the value of a secret is never part of it.
package config

import (
	"encoding"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/kelseyhightower/envconfig"
)

// Load returns a T filled from the environment: defaults first, then variables. T must be a struct.
func Load[T any]() (T, error) {
	var cfg T
	err := LoadInto(&cfg)
	return cfg, err
}

// LoadInto fills the struct that ptr points at. Fields without a default keep the value they had when their variable is
// not set. The error names the first variable that cannot be used.
func LoadInto(ptr any) error {
	vars, err := variables(ptr)
	if err != nil {
		return err
	}
	for _, v := range vars {
		if v.required && v.unset() {
			return v.errorf("is required and not set%s", v.about())
		}
	}
	if err := envconfig.Process("", ptr); err != nil {
		return explain(err, vars)
	}
	return nil
}

// Usage writes a table of all variables of cfg (a struct or a pointer to one) with their defaults and descriptions.
func Usage(w io.Writer, cfg any) error {
	if t := reflect.TypeOf(cfg); t != nil && t.Kind() == reflect.Struct {
		cfg = reflect.New(t).Interface()
	}
	vars, err := variables(cfg)
	if err != nil {
		return err
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "NAME\tDEFAULT\tDESCRIPTION")
	for _, v := range vars {
		def := v.def
		switch {
		case def != "" && v.secret:
			def = redacted
		case def == "" && v.required:
			def = "(required)"
		case def == "":
			def = "-"
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\n", v.name, def, v.desc)
	}
	return tw.Flush()
}

// variable is one setting, as its struct field declares it.
type variable struct {
	name     string // as people set it
	key      string // as envconfig names it in errors; differs from name inside nested structs
	typ      reflect.Type
	def      string
	desc     string
	required bool
	secret   bool
}

func (v variable) errorf(format string, args ...any) error {
	return fmt.Errorf("%s %s", v.name, fmt.Sprintf(format, args...))
}

func (v variable) about() string {
	if v.desc == "" {
		return ""
	}
	return " (" + v.desc + ")"
}

func (v variable) unset() bool {
	if v.def != "" {
		return false
	}
	value, ok := lookup(v.key)
	if !ok {
		value, ok = lookup(v.name)
	}
	// An empty required variable is a mistake in a compose or unit file, never a choice.
	return !ok || value == ""
}

// variables lists the settings of a struct in declaration order, by the same rules as envconfig.
func variables(ptr any) ([]variable, error) {
	t := reflect.TypeOf(ptr)
	if t == nil || t.Kind() != reflect.Pointer || t.Elem().Kind() != reflect.Struct {
		return nil, errors.New("config: a pointer to a struct is needed")
	}
	return structVariables(t.Elem(), ""), nil
}

func structVariables(t reflect.Type, prefix string) []variable {
	var vars []variable
	for f := range t.Fields() {
		if !f.IsExported() || isTrue(f.Tag.Get("ignored")) {
			continue
		}
		alt := strings.ToUpper(f.Tag.Get("envconfig"))
		key := alt
		if key == "" {
			key = strings.ToUpper(f.Name)
		}
		if prefix != "" {
			key = prefix + "_" + key
		}
		ft := f.Type
		for ft.Kind() == reflect.Pointer {
			ft = ft.Elem()
		}
		if ft.Kind() == reflect.Struct && !decodesItself(ft) {
			inner := key
			if f.Anonymous {
				inner = prefix
			}
			vars = append(vars, structVariables(ft, inner)...)
			continue
		}
		name := alt
		if name == "" {
			name = key
		}
		vars = append(vars, variable{
			name: name, key: key, typ: ft,
			def: f.Tag.Get("default"), desc: f.Tag.Get("desc"),
			required: isTrue(f.Tag.Get("required")),
			secret:   ft == reflect.TypeFor[Secret]() || isTrue(f.Tag.Get("secret")) || secretName(name),
		})
	}
	return vars
}

func decodesItself(t reflect.Type) bool {
	p := reflect.PointerTo(t)
	for _, i := range []reflect.Type{
		reflect.TypeFor[envconfig.Decoder](), reflect.TypeFor[envconfig.Setter](),
		reflect.TypeFor[encoding.TextUnmarshaler](), reflect.TypeFor[encoding.BinaryUnmarshaler](),
	} {
		if p.Implements(i) {
			return true
		}
	}
	return false
}

// secretName guards variables that hold a secret in a plain string.
func secretName(name string) bool {
	for _, word := range []string{"SECRET", "TOKEN", "PASSWORD", "CREDS", "PRIVATE_KEY"} {
		if strings.HasSuffix(name, word) {
			return true
		}
	}
	return false
}

func isTrue(s string) bool {
	b, _ := strconv.ParseBool(s)
	return b
}

// explain turns envconfig's error, which quotes the value twice and names Go types, into one line for a person.
func explain(err error, vars []variable) error {
	parse, ok := errors.AsType[*envconfig.ParseError](err)
	if !ok {
		return fmt.Errorf("config: %w", err)
	}
	v := variable{name: parse.KeyName, secret: true}
	for _, known := range vars {
		if known.key == parse.KeyName {
			v = known
		}
	}
	expected := expectation(v.typ)
	if expected == "" {
		// Only types that decode themselves get here; their messages name what is expected. Those of other packages may
		// quote what they were given.
		if isOwn(parse.Err) || !v.secret {
			expected = parse.Err.Error()
		} else {
			expected = "cannot be used"
		}
	}
	if v.secret {
		return v.errorf("%s", expected)
	}
	return v.errorf("%s, not %s", expected, quote(parse.Value))
}

// expectation says in words what a plain Go type accepts; empty for a type that decodes itself.
func expectation(t reflect.Type) string {
	switch {
	case t == nil || decodesItself(t):
		return ""
	case t == reflect.TypeFor[time.Duration]():
		return "must be a duration such as 10s or 5m"
	}
	switch t.Kind() {
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		return fmt.Sprintf("must be a whole number of at most %d bits", t.Bits())
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return fmt.Sprintf("must be a whole number, not negative, of at most %d bits", t.Bits())
	case reflect.Bool:
		return "must be true or false"
	case reflect.Float32, reflect.Float64:
		return "must be a number"
	case reflect.Slice:
		return "must be a comma-separated list of usable values"
	case reflect.Map:
		return "must be a comma-separated list of key:value pairs"
	}
	return ""
}

// quote bounds what a mistake can put on the screen. A value that looks like a URL with a password is not shown.
func quote(value string) string {
	if strings.Contains(value, "@") {
		return "what was given"
	}
	const most = 64
	if len(value) > most {
		value = strings.ToValidUTF8(value[:most], "") + "..."
	}
	return strconv.Quote(value)
}
