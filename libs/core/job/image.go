package job

import "strings"

// ValidImage reports whether ref is a container image reference in the form
// that registries use: [host[:port]/]path[/path...][:tag][@sha256:digest],
// lower-case path components separated by single '.', '_', '__' or dashes.
func ValidImage(ref string) bool {
	name := ref
	if rest, digest, ok := strings.Cut(ref, "@"); ok {
		hex, isSHA := strings.CutPrefix(digest, "sha256:")
		if !isSHA || len(hex) != 64 || strings.Trim(hex, "0123456789abcdef") != "" {
			return false
		}
		name = rest
	}
	if i := strings.LastIndexByte(name, ':'); i >= 0 && !strings.Contains(name[i:], "/") {
		if !validTag(name[i+1:]) {
			return false
		}
		name = name[:i]
	}
	parts := strings.Split(name, "/")
	if len(parts) > 1 && isRegistryHost(parts[0]) {
		if !validHost(parts[0]) {
			return false
		}
		parts = parts[1:]
	}
	for _, p := range parts {
		if !validComponent(p) {
			return false
		}
	}
	return true
}

// isRegistryHost follows Docker's rule: the first component is a host when it
// has a dot or a port, or is localhost.
func isRegistryHost(s string) bool { return strings.ContainsAny(s, ".:") || s == "localhost" }

func validHost(s string) bool {
	host, port, hasPort := strings.Cut(s, ":")
	if hasPort && (port == "" || len(port) > 5 || strings.Trim(port, "0123456789") != "") {
		return false
	}
	for _, label := range strings.Split(host, ".") {
		if label == "" || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for _, c := range []byte(label) {
			if c != '-' && !lowerOrDigit(c) && (c < 'A' || c > 'Z') {
				return false
			}
		}
	}
	return true
}

func validTag(s string) bool {
	if s == "" || len(s) > 128 || s[0] == '.' || s[0] == '-' {
		return false
	}
	for _, c := range []byte(s) {
		if c != '.' && c != '_' && c != '-' && !lowerOrDigit(c) && (c < 'A' || c > 'Z') {
			return false
		}
	}
	return true
}

func validComponent(s string) bool {
	if s == "" || !lowerOrDigit(s[0]) || !lowerOrDigit(s[len(s)-1]) {
		return false
	}
	run := ""
	for _, c := range []byte(s) {
		switch {
		case lowerOrDigit(c):
			if run != "" && run != "." && run != "_" && run != "__" && strings.Trim(run, "-") != "" {
				return false
			}
			run = ""
		case c == '.' || c == '_' || c == '-':
			run += string(c)
		default:
			return false
		}
	}
	return true
}

func lowerOrDigit(c byte) bool { return '0' <= c && c <= '9' || 'a' <= c && c <= 'z' }
