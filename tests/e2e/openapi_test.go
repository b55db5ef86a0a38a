package e2e

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"
)

// TestEveryRouteOfTheDocument asks an instance for each route without a token:
// gateway and edge together serve what the document has, and know who asks first.
func TestEveryRouteOfTheDocument(t *testing.T) {
	s := startSystem(t, upOptions{executor: "none"})
	resp, err := http.Get("http://" + s.addr + "/openapi.json")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var doc struct {
		Paths map[string]map[string]struct {
			Security []map[string][]string
		}
	}
	if err := json.NewDecoder(resp.Body).Decode(&doc); err != nil {
		t.Fatal(err)
	}
	if len(doc.Paths) < 20 {
		t.Errorf("the document has %d paths", len(doc.Paths))
	}
	for path, methods := range doc.Paths {
		for method, operation := range methods {
			want := http.StatusUnauthorized
			if len(operation.Security) == 0 {
				want = http.StatusOK
			}
			target := "http://" + s.addr + strings.ReplaceAll(path, "{jobId}", "job-01jd2xw8q3v5k7m9n1p3r5t7v9")
			req, err := http.NewRequestWithContext(t.Context(), strings.ToUpper(method), target, nil)
			if err != nil {
				t.Fatal(err)
			}
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if resp.StatusCode != want {
				t.Errorf("%s %s answers %d, want %d", method, path, resp.StatusCode, want)
			}
		}
	}
}
