package job

import "testing"

func TestFilesInEachOthersWay(t *testing.T) {
	for _, paths := range [][]string{{"a", "a/b"}, {"a/b", "a"}, {"a/b", "a/b"}, {"a/b/c", "a/b"}, {"x/./y", "x/y"}} {
		s := Spec{Command: Command{Shell: "true"}}
		for _, p := range paths {
			s.Files = append(s.Files, File{Path: p})
		}
		if _, errs := Normalise(s); len(errs) != 1 || errs[0].Field != "files[1].path" {
			t.Errorf("%v: %v", paths, errs)
		}
	}
	s := Spec{Command: Command{Shell: "true"}, Files: []File{{Path: "a/b"}, {Path: "a/c"}, {Path: "ab"}}}
	if _, errs := Normalise(s); len(errs) > 0 {
		t.Errorf("neighbours: %v", errs)
	}
}

func TestUserForms(t *testing.T) {
	for user, ok := range map[string]bool{"": true, "me": true, "1000": true, "1000:1000": true, "a:b:c": false, "a:": false, ":a": false, "-a": false, "a b": false} {
		_, errs := Normalise(Spec{Command: Command{Shell: "true"}, User: user})
		if (len(errs) == 0) != ok {
			t.Errorf("%q: %v", user, errs)
		}
	}
}
