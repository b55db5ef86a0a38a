package strictjson

import (
	"encoding/json"
	"errors"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/core/job"
)

type inner struct {
	A int            `json:"a"`
	M map[string]int `json:"m"`
}

type embedded struct {
	E string `json:"e"`
}

type doc struct {
	embedded
	Name  string           `json:"name"`
	In    inner            `json:"in"`
	Ptr   *inner           `json:"ptr"`
	List  []inner          `json:"list"`
	ByKey map[string]inner `json:"byKey"`
	Float float64          `json:"float"`
	Skip  string           `json:"-"`
	Plain string
}

func TestUnknownFields(t *testing.T) {
	for name, c := range map[string]struct {
		in   string
		want []string
	}{
		"none":           {in: `{"name":"x","e":"y","in":{"a":1,"m":{"any":1}},"ptr":{"a":2},"list":[{"a":1},{}],"byKey":{"k":{"a":1}},"Plain":"p"}`},
		"top":            {in: `{"nam":"x"}`, want: []string{"nam"}},
		"case":           {in: `{"Name":"x"}`, want: []string{"Name"}},
		"dash":           {in: `{"Skip":"x","-":1}`, want: []string{"Skip", "-"}},
		"nested":         {in: `{"in":{"b":1}}`, want: []string{"in.b"}},
		"pointer":        {in: `{"ptr":{"b":{"c":1}}}`, want: []string{"ptr.b"}},
		"list":           {in: `{"list":[{}, {"a":1,"x":[1,{"y":2}]} ]}`, want: []string{"list[1].x"}},
		"map of structs": {in: `{"byKey":{"k":{"z":1}}}`, want: []string{"byKey.k.z"}},
		"several":        {in: ` { "x" : null , "in" : { "y" : "}" } , "name" : "\"," } `, want: []string{"x", "in.y"}},
		"escaped key":    {in: `{"n\u0061me":"x","n\u0062":1}`, want: []string{"nb"}},
		"not presentable": {
			in: `{"sk canary/1":1,"":2}`, want: []string{"(a name of 11 bytes)", "(a name of 0 bytes)"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := For[doc]().Decode([]byte(c.in))
			if c.want == nil {
				require.NoError(t, err)
				return
			}
			var unknown *UnknownFieldsError
			require.ErrorAs(t, err, &unknown)
			require.Equal(t, c.want, unknown.Fields)
		})
	}
}

func TestWrongTypes(t *testing.T) {
	for in, want := range map[string]FieldError{
		`{"name":5}`:                        {"name", "must be a string"},
		`{"in":[]}`:                         {"in", "must be an object"},
		`{"in":{"a":"4242canary"}}`:         {"in.a", "must be a whole number"},
		`{"in":{"a":4242.5}}`:               {"in.a", "must be a whole number"},
		`{"in":{"a":42420000000000000000}}`: {"in.a", "must be a whole number"},
		`{"list":{}}`:                       {"list", "must be an array"},
		`{"list":[{"a":true}]}`:             {"list.a", "must be a whole number"},
		`{"float":"4242"}`:                  {"float", "must be a number"},
	} {
		_, err := For[doc]().Decode([]byte(in))
		var fe *FieldError
		require.ErrorAs(t, err, &fe, in)
		require.Equal(t, want, *fe, in)
		require.NotContains(t, err.Error(), "4242")
	}
}

func TestSpec(t *testing.T) {
	d := For[job.Spec]()
	s, err := d.Decode([]byte(`{"command":["echo","a"],"env":{"ANY":"x"},"retry":{"maxAttempts":2},"files":[{"path":"p","content":"c"}],"webhook":{"url":"u"}}`))
	require.NoError(t, err)
	require.Equal(t, []string{"echo", "a"}, s.Command.Argv)
	require.Equal(t, 2, s.Retry.MaxAttempts)
	_, err = d.Decode([]byte(`{"command":{"canary":1}}`))
	var fe *FieldError
	require.ErrorAs(t, err, &fe)
	require.NotContains(t, err.Error(), "canary")
	for _, bad := range []string{`{"owner":"x"}`, `{"state":"x"}`, `{"attempt":1}`, `{"jobId":"x"}`, `{"role":"admin"}`} {
		_, err = d.Decode([]byte(bad))
		var unknown *UnknownFieldsError
		require.ErrorAs(t, err, &unknown, "nobody can set %s", bad)
	}
}

// FuzzDecode: whatever valid JSON comes, Decode accepts no more than
// encoding/json with unknown fields disallowed, and never panics.
func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"name":"x","list":[{"a":1}]}`))
	f.Add([]byte(`{"in":{"m":{"a":1}},"x":[[{"y":"\\\""}]]}`))
	d := For[doc]()
	f.Fuzz(func(t *testing.T, data []byte) {
		if !json.Valid(data) {
			return
		}
		_, err := d.Decode(data)
		var unknown *UnknownFieldsError
		if errors.As(err, &unknown) && len(unknown.Fields) > MaxReported {
			t.Fatal("too many fields reported")
		}
		var plain doc
		if err == nil && json.Unmarshal(data, &plain) != nil {
			t.Fatal("accepted what encoding/json refuses")
		}
	})
}
