package gateway

import (
	"crypto/sha256"
	"encoding/base64"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestReferencePage: the page has every operation and type, leads nowhere that
// does not exist, and needs nothing that its policy forbids: nothing but its own
// style, by its hash.
func TestReferencePage(t *testing.T) {
	e := start(t, nil)
	a := e.do("GET", "/docs", "", "")
	require.Equal(t, 200, a.status)
	require.Equal(t, "text/html; charset=utf-8", a.header.Get("Content-Type"))
	page := string(a.body)

	policy := a.header.Get("Content-Security-Policy")
	require.True(t, strings.HasPrefix(policy, "default-src 'none'; style-src 'sha256-"), policy)
	require.NotContains(t, policy, "unsafe")
	styles := regexp.MustCompile(`(?s)<style>(.*?)</style>`).FindAllStringSubmatch(page, -1)
	require.Len(t, styles, 1)
	sum := sha256.Sum256([]byte(styles[0][1]))
	require.Contains(t, policy, "'sha256-"+base64.StdEncoding.EncodeToString(sum[:])+"'")
	for _, forbidden := range []string{"<script", "<img", "<link", "<iframe", "<form", " style=", " src=", "onclick", "url(", "@import", "http://", "https://", "javascript:"} {
		require.NotContains(t, page, forbidden)
	}

	ids := map[string]bool{}
	for _, m := range regexp.MustCompile(` id="([^"]+)"`).FindAllStringSubmatch(page, -1) {
		require.False(t, ids[m[1]], "%s is there twice", m[1])
		ids[m[1]] = true
	}
	for _, m := range regexp.MustCompile(`href="([^"]+)"`).FindAllStringSubmatch(page, -1) {
		if m[1] != openAPIPath {
			require.True(t, ids[strings.TrimPrefix(m[1], "#")], "a link leads to %s", m[1])
		}
	}
	doc := e.openAPI()
	for _, methods := range doc.Paths {
		for _, op := range methods {
			require.True(t, ids[op.OperationID], op.OperationID)
		}
	}
	for name := range doc.Components.Schemas {
		require.True(t, ids["type-"+name], name)
	}
}
