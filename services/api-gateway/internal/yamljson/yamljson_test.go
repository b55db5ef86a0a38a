package yamljson

import (
	"encoding/json"
	"errors"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/kit/httpkit"
)

func TestConvert(t *testing.T) {
	for in, want := range map[string]string{
		"a: b":                                 `{"a":"b"}`,
		"{}":                                   `{}`,
		`{"a": [1, -2.5e3, true, null, "x"]}`:  `{"a":[1,-2.5e3,true,null,"x"]}`,
		"a:\nb: ~\nc: null\nd: ''":             `{"a":null,"b":null,"c":null,"d":""}`,
		"a: yes\nb: No\nc: True\nd: on":        `{"a":"yes","b":"No","c":"True","d":"on"}`,
		"a: 0755\nb: 0x1f\nc: 1_0\nd: +1":      `{"a":"0755","b":"0x1f","c":"1_0","d":"+1"}`,
		"a: .inf\nb: .nan\nc: 1:30\nd: -":      "",
		"a: .inf\nb: 1:30\nc: 2026-11-24":      `{"a":".inf","b":"1:30","c":"2026-11-24"}`,
		"a: '1'\nb: \"true\"\nc: |-\n  5":      `{"a":"1","b":"true","c":"5"}`,
		"a: |\n  x\n  y\nb: >-\n  x\n  y":      `{"a":"x\ny\n","b":"x y"}`,
		"- a":                                  "",
		"1: x\ntrue: y":                        `{"1":"x","true":"y"}`,
		"# a comment\na: b # another\n":        `{"a":"b"}`,
		"---\na: b\n...\n":                     `{"a":"b"}`,
		"%YAML 1.1\n---\na: b":                 `{"a":"b"}`,
		`a: "\u00e9\x41\t"`:                    `{"a":"éA\t"}`,
		"a: {b: {c: [d, {e: f}]}}":             `{"a":{"b":{"c":["d",{"e":"f"}]}}}`,
		"command: echo 'hi' && echo \"there\"": `{"command":"echo 'hi' && echo \"there\""}`,
	} {
		out, err := Convert([]byte(in))
		if want == "" {
			require.Error(t, err, in)
			continue
		}
		require.NoError(t, err, in)
		require.JSONEq(t, want, string(out), in)
		require.NoError(t, httpkit.CheckJSONObject(out), in)
	}
}

func TestConvertRefuses(t *testing.T) {
	for in, want := range map[string]Error{
		"":                    {CodeEmpty, 0},
		"# nothing":           {CodeEmpty, 0},
		"---\n...":            {CodeEmpty, 0},
		"null":                {CodeEmpty, 0},
		"canary":              {CodeNotAMapping, 1},
		"- canary":            {CodeNotAMapping, 1},
		"\xef\xbb\xbfa: b":    {CodeBOM, 0},
		"a: \xff":             {CodeEncoding, 0},
		"a: b\n---\nc: d":     {CodeDocuments, 2},
		"a: b\n---\n":         {CodeDocuments, 2},
		"a: b\n---\n: : :":    {CodeInvalid, 2},
		"a: &x 1":             {CodeAlias, 1},
		"a: &x 1\nb: *x":      {CodeAlias, 1},
		"&x a: 1":             {CodeAlias, 1},
		"a: {<<: {b: c}}":     {CodeAlias, 1},
		"a: 1\nb: !!str 5":    {CodeTag, 2},
		"a: !!binary aGk=":    {CodeTag, 1},
		"a: !canary 5":        {CodeTag, 1},
		"!!map {a: b}":        {CodeTag, 1},
		"!!str a: b":          {CodeTag, 1},
		"? [a]\n: b":          {CodeKey, 1},
		"{[a]: b}":            {CodeKey, 1},
		"a: 1\nb: 2\na: 3":    {CodeDuplicate, 3},
		"a: {b: 1, \"b\": 2}": {CodeDuplicate, 1},
		"1: a\n'1': b":        {CodeDuplicate, 2},
		"a: " + strings.Repeat("[", 65) + strings.Repeat("]", 65): {CodeTooDeep, 1},
		"a: canary\n b: c": {CodeInvalid, 2},
		"a: [canary":       {CodeInvalid, 1},
		"a: 'canary":       {CodeInvalid, 1},
		"a: \x00":          {CodeInvalid, 0},
		"a: \"\\ud800\"":   {CodeInvalid, 1},
		"\ta: b":           {CodeInvalid, 1},
	} {
		_, err := Convert([]byte(in))
		var e *Error
		require.ErrorAs(t, err, &e, in)
		require.Equal(t, want.Code, e.Code, "%q: %v", in, err)
		require.NotContains(t, err.Error(), "canary")
		if want.Line > 0 && e.Line > 0 {
			require.InDelta(t, want.Line, e.Line, 1, in)
		}
	}
}

// TestHostileDocuments: what is sent to be expensive is not, in time or memory.
func TestHostileDocuments(t *testing.T) {
	const size = 1 << 20
	fill := func(s string) string { return strings.Repeat(s, size/len(s)) }
	bomb := "z: &a0 x\n"
	for i := 0; i < 20; i++ {
		bomb += "a" + string(rune('a'+i)) + ": &b" + string(rune('a'+i)) + " [*a0,*a0,*a0,*a0,*a0,*a0,*a0,*a0]\n"
	}
	for name, doc := range map[string]string{
		"laughs":     bomb,
		"open":       "a: " + fill("["),
		"open maps":  "a: " + fill("{a: "),
		"flat":       "a: [" + fill("a,") + "]",
		"nothings":   "a:\n" + fill("-\n"),
		"dashes":     fill("- "),
		"questions":  fill("? "),
		"colons":     fill("a: "),
		"comments":   fill("#\n") + "a: b",
		"comments 2": "a: b\n" + fill("#c\n"),
		"comments 3": fill("#c\n\n") + fill("a:\n #x\n"),
		"documents":  fill("---\n"),
		"anchors":    fill("&a "),
		"quotes":     "a: '" + fill("''") + "'",
		"folds":      "a: >\n" + fill(" \n") + "  x",
		"tags":       fill("!a "),
		"keys":       "{" + fill("a: b,") + "}",
		"spaces":     "a:" + fill(" ") + "b",
		"tabs":       "a:" + fill("\t") + "b",
		"directives": fill("%A b\n"),
		"percent":    "a: !%" + fill("%41"),
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		began := time.Now()
		_, err := Convert([]byte(doc))
		took := time.Since(began)
		runtime.ReadMemStats(&after)
		t.Logf("%-11s %8s %5d MiB %v", name, took.Round(time.Millisecond), (after.TotalAlloc-before.TotalAlloc)>>20, err)
		require.Less(t, took, 20*time.Second, name)
		require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(1<<30), name)
	}
}

// FuzzConvert: no panic; what comes out is one strict JSON object; and what goes
// in as strict JSON comes out as the same JSON.
func FuzzConvert(f *testing.F) {
	for _, s := range []string{
		"command: echo hi\ntimeout: 5\nlabels: {a: b}\n", `{"command":["a","b"],"retry":{"maxAttempts":3}}`, "a: |\n  x\n", "a: &x 1\nb: *x",
		"a: !!str 1", "? a\n: b", "a: >-\n x\n\n y\n", "- a", "a: 'x''y'", "a: \"\\u00e9\"", "a: 1e5\nb: -0.0", "a: b\n---\n", "%YAML 1.2\n--- {}", "a:\n- b\n-\n  - c",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 1<<14 {
			return
		}
		out, err := Convert(data)
		if err != nil {
			var e *Error
			if !errors.As(err, &e) || e.Code == "" {
				t.Fatalf("an error of another kind: %v", err)
			}
			return
		}
		if err := httpkit.CheckJSONObject(out); err != nil {
			var e *httpkit.JSONError
			if !errors.As(err, &e) || e.Code != httpkit.JSONNul && e.Code != httpkit.JSONTooManyKeys {
				t.Fatalf("%q became %q: %v", data, out, err)
			}
			return
		}
		var v any
		if json.Unmarshal(out, &v) != nil {
			t.Fatalf("%q is no JSON", out)
		}
		again, err := Convert(out)
		if err != nil || strings.ContainsAny(string(out), "\u0085\u2028\u2029") {
			// These three are line breaks to YAML and characters to JSON.
			// What YAML does not take of JSON's strings is what it calls not printable.
			return
		}
		var w any
		if json.Unmarshal(again, &w) != nil {
			t.Fatalf("%q is no JSON", again)
		}
		a, _ := json.Marshal(v)
		b, _ := json.Marshal(w)
		if string(a) != string(b) {
			t.Fatalf("%q means %s, then %s", data, a, b)
		}
	})
}
