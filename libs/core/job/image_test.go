package job

import (
	"strings"
	"testing"
)

func TestValidImage(t *testing.T) {
	const digest = "@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	for _, ref := range []string{
		"alpine", "alpine:3", "alpine:3.20", "library/alpine", "a/b/c/d:e", "a--b", "a__b", "a_b.c-d", "9",
		"alpine" + digest, "alpine:3" + digest, "localhost/a", "localhost:5000/a:b", "registry.example:443/a/b:c" + digest,
		"REGISTRY.example/a", "a:" + strings.Repeat("x", 128), "a:_X.y-z", "a:Latest", "xn--bcher-kva.example/a",
		"10.0.0.1:5000/a", "169.254.169.254:80/x", // well-formed: where a worker may pull from is the worker's policy
	} {
		if !ValidImage(ref) {
			t.Errorf("%q is refused", ref)
		}
	}
	for _, ref := range []string{
		"", " ", "a b", "Alpine", "ALPINE:3", "library/Alpine", "a\n", "a\x00", "ä", "аlpine" /* Cyrillic */, "a\u202eb",
		"..", "../a", "a/..", "a/../b", ".a", "a.", "-a", "a-", "_a", "a_", "a..b", "a___b", "a._b", "a.-b",
		"/a", "a/", "a//b", "http://a", "https://a/b", "docker://a", "file:///etc/passwd", "a?b", "a#b", "a\\b", "$(id)", "a;b", "a|b", "--privileged",
		"a:", "a:.x", "a:-x", "a:x:y", "a:x y", "a:" + strings.Repeat("x", 129), "a:ü",
		"host:port/a", "host:/a", ":5000/a", "host:123456/a", "host:1:2/a", ".example/a", "example./a", "a..example/b", "-a.example/b", "a_b.example/c",
		"[::1]:5000/a", "user@host/a", "user:pw@host.example/a",
		"@", "a@", "a@sha256", "a@sha256:", "a@sha256:0123", "a@sha512:" + digest[8:], "a@SHA256:" + digest[8:], digest,
		"a" + digest[:len(digest)-1], "a" + digest + "0", "a@sha256:" + strings.Repeat("A", 64), "a@sha256:" + strings.Repeat("g", 64), "a" + digest + digest, "a" + digest + ":x",
	} {
		if ValidImage(ref) {
			t.Errorf("%q is accepted", ref)
		}
	}
}
