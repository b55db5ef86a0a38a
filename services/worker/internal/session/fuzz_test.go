package session

import (
	"net/http"
	"testing"
)

func FuzzRefusal(f *testing.F) {
	for _, s := range []string{``, `{}`, `null`, `{"code":"replaced","detail":"x"}`, `{"code":7}`, `<html>502 Bad Gateway</html>`, `{"code":"register_again"`} {
		f.Add(409, "application/problem+json", "1", []byte(s))
		f.Add(502, "text/html", "-5", []byte(s))
	}
	f.Add(503, "application/json", "99999999999999999999", []byte(`{}`))
	f.Fuzz(func(t *testing.T, status int, contentType, retryAfter string, body []byte) {
		r := newRefusal(&http.Response{StatusCode: status, Header: http.Header{"Content-Type": {contentType}, "Retry-After": {retryAfter}}}, body)
		if r.after < 0 || r.after > maxAway {
			t.Errorf("to wait for %v", r.after)
		}
		if r.Error() == "" {
			t.Error("no text")
		}
		_ = meaning(r)
	})
}
