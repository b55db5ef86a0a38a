package arch

import (
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var (
	fence      = regexp.MustCompile("(?ms)^[ \t]*```.*?^[ \t]*```[ \t]*$")
	inlineCode = regexp.MustCompile("`[^`\n]*`")
	link       = regexp.MustCompile(`!?\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)`)
	reference  = regexp.MustCompile(`(?m)^\s*\[[^\]]+\]:\s+<?(\S+?)>?\s*$`)
	makeUse    = regexp.MustCompile("(?m)(?:^|[`;&(]|\\$)[ \t]*(?:[A-Z_]+=\\S+ )*make ((?:[a-z][a-z0-9-]*[ \t]*)+)")
	makeTarget = regexp.MustCompile(`(?m)^([a-z][a-z0-9-]*):`)
)

// documents returns the markdown files that people read, relative to root.
func documents(t *testing.T, root string) []string {
	t.Helper()
	var docs []string
	top, err := filepath.Glob(filepath.Join(root, "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	docs = append(docs, top...)
	for _, dir := range []string{"docs", "deploy", "k8s", "libs", "services", "tests"} {
		err := filepath.WalkDir(filepath.Join(root, dir), func(p string, d fs.DirEntry, err error) error {
			if err != nil {
				return nil // the folder is not there
			}
			if d.IsDir() && (d.Name() == "testdata" || d.Name() == "node_modules") {
				return fs.SkipDir
			}
			if strings.HasSuffix(p, ".md") {
				docs = append(docs, p)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return docs
}

func TestDocumentLinks(t *testing.T) {
	root := load(t).root
	docs := documents(t, root)
	links := 0
	for _, doc := range docs {
		text, err := os.ReadFile(doc)
		if err != nil {
			t.Error(err)
			continue
		}
		rel, err := filepath.Rel(root, doc)
		if err != nil {
			t.Fatal(err)
		}
		prose := inlineCode.ReplaceAllString(fence.ReplaceAllString(string(text), ""), "")
		for _, m := range append(link.FindAllStringSubmatch(prose, -1), reference.FindAllStringSubmatch(prose, -1)...) {
			u, err := url.Parse(m[1])
			if err != nil {
				t.Errorf("%s: link %q: %v", rel, m[1], err)
				continue
			}
			if u.Scheme != "" || u.Host != "" || u.Path == "" {
				continue // another site, or a heading of the same page
			}
			links++
			target := filepath.Join(filepath.Dir(doc), filepath.FromSlash(u.Path))
			if strings.HasPrefix(u.Path, "/") {
				target = filepath.Join(root, filepath.FromSlash(u.Path))
			}
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s: link %q leads nowhere", rel, m[1])
			}
		}
	}
	t.Logf("%d relative links in %d documents", links, len(docs))
}

func TestMakeTargetsInDocumentsExist(t *testing.T) {
	root := load(t).root
	makefile, err := os.ReadFile(filepath.Join(root, "Makefile"))
	if err != nil {
		t.Fatal(err)
	}
	targets := map[string]bool{}
	for _, m := range makeTarget.FindAllStringSubmatch(string(makefile), -1) {
		targets[m[1]] = true
	}
	named := map[string]bool{}
	for _, doc := range documents(t, root) {
		text, err := os.ReadFile(doc)
		if err != nil {
			t.Error(err)
			continue
		}
		for _, m := range makeUse.FindAllStringSubmatch(codeOf(string(text)), -1) {
			for _, target := range strings.Fields(m[1]) {
				named[target] = true
				if !targets[target] {
					t.Errorf("%s names `make %s`, which the Makefile does not have", strings.TrimPrefix(doc, root+"/"), target)
				}
			}
		}
	}
	t.Logf("%d make targets, %d of them named in documents", len(targets), len(named))
}

// codeOf returns the fenced blocks and the inline code of a document, which is
// where commands are; "make sure" in prose is none. Comments of shell lines go.
func codeOf(text string) string {
	var b strings.Builder
	for _, block := range fence.FindAllString(text, -1) {
		for line := range strings.Lines(block) {
			code, _, _ := strings.Cut(line, " #")
			b.WriteString(strings.TrimRight(code, "\n") + "\n")
		}
	}
	for _, code := range inlineCode.FindAllString(fence.ReplaceAllString(text, ""), -1) {
		b.WriteString(strings.Trim(code, "`") + "\n")
	}
	return b.String()
}
