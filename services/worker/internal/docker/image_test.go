package docker_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/docker/docker/api/types/image"
	"github.com/docker/docker/api/types/network"
	"github.com/docker/docker/api/types/volume"
	"github.com/docker/docker/client"

	"github.com/cmdexec/cmdexec/services/worker/internal/docker"
	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
)

var (
	networkInspectOptions = network.InspectOptions{}
	volumeListOptions     = volume.ListOptions{}
)

// importImage makes an image of a root folder's tar, and removes it in the end.
func importImage(t *testing.T, api *client.Client, ref string, root io.Reader, changes ...string) {
	t.Helper()
	done, err := api.ImageImport(t.Context(), image.ImportSource{Source: root, SourceName: "-"}, ref, image.ImportOptions{Changes: changes})
	if err != nil {
		t.Fatal(err)
	}
	defer done.Close()
	if _, err := io.Copy(io.Discard, done); err != nil {
		t.Fatal(err)
	}
	removeLater(t, api, ref)
}

func removeLater(t *testing.T, api *client.Client, ref string) {
	t.Cleanup(func() { _, _ = api.ImageRemove(context.Background(), ref, image.RemoveOptions{Force: true}) })
}

// registry serves one image under any name and tag, to those who know a
// password. The engine takes one on loopback without TLS.
type registry struct {
	host     string
	user     string // empty: everybody
	password string
	hold     chan struct{} // a manifest is served when it is closed; nil: at once

	blobs     map[string][]byte
	manifest  []byte
	mu        sync.Mutex
	manifests int // read
	asked     int // read, or only asked for their digest
	waiting   atomic.Int32
}

// newRegistry serves an image whose only file is /marker with that content,
// beside what busybox needs.
func newRegistry(t *testing.T, api *client.Client, marker string) *registry {
	t.Helper()
	if !strings.HasPrefix(engineHost(), "unix://") {
		t.Skip("requires docker: the engine is not on this machine and cannot reach a registry in this test")
	}
	busybox, _, err := api.CopyFromContainer(t.Context(), neverRun(t, api), "/bin")
	if err != nil {
		t.Fatal(err)
	}
	defer busybox.Close()
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	r := tar.NewReader(busybox)
	for {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(w, r); err != nil {
			t.Fatal(err)
		}
	}
	must(t, w.WriteHeader(&tar.Header{Name: "marker", Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(marker))}))
	_, err = w.Write([]byte(marker))
	must(t, err)
	must(t, w.Close())
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	_, err = z.Write(layer.Bytes())
	must(t, err)
	must(t, z.Close())

	reg := &registry{blobs: map[string][]byte{}}
	blob := func(mediaType string, content []byte) map[string]any {
		d := digest(content)
		reg.blobs[d] = content
		return map[string]any{"mediaType": mediaType, "size": len(content), "digest": d}
	}
	config := jsonOf(t, map[string]any{
		"architecture": "amd64", "os": "linux", "config": map[string]any{"Cmd": []string{"/bin/sh"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{digest(layer.Bytes())}},
	})
	reg.manifest = jsonOf(t, map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
		"config": blob("application/vnd.docker.container.image.v1+json", config),
		"layers": []any{blob("application/vnd.docker.image.rootfs.diff.tar.gzip", packed.Bytes())},
	})
	s := httptest.NewServer(reg)
	t.Cleanup(s.Close)
	reg.host = strings.TrimPrefix(s.URL, "http://")
	return reg
}

func (r *registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	user, password, _ := req.BasicAuth()
	if r.user != "" && (user != r.user || password != r.password) {
		w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	serve := func(content []byte, mediaType string) {
		w.Header().Set("Content-Type", mediaType)
		w.Header().Set("Docker-Content-Digest", digest(content))
		w.Header().Set("Content-Length", fmt.Sprint(len(content)))
		if req.Method == http.MethodGet {
			_, _ = w.Write(content)
		}
	}
	switch dir, name := filepath.Split(req.URL.Path); {
	case req.URL.Path == "/v2/":
	case strings.HasSuffix(dir, "/manifests/"):
		r.mu.Lock()
		r.asked++
		if req.Method == http.MethodGet {
			r.manifests++
		}
		r.mu.Unlock()
		if r.hold != nil {
			r.waiting.Add(1)
			select {
			case <-r.hold:
			case <-req.Context().Done():
			}
			r.waiting.Add(-1)
		}
		serve(r.manifest, "application/vnd.docker.distribution.manifest.v2+json")
	case strings.HasSuffix(dir, "/blobs/") && r.blobs[name] != nil:
		serve(r.blobs[name], "application/octet-stream")
	default:
		http.NotFound(w, req)
	}
}

func (r *registry) pulls() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.manifests
}

func (r *registry) requests() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.asked
}

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(sum[:])
}

func jsonOf(t *testing.T, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	must(t, err)
	return b
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// config is a folder with a Docker configuration.
func config(t *testing.T, content any) string {
	t.Helper()
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "config.json"), jsonOf(t, content), 0o600))
	return dir
}

func TestPullPolicies(t *testing.T) {
	api := engine(t)
	x := newExecutor(t)
	reg := newRegistry(t, api, "pulled")
	spec := shell("cat /marker")
	spec.Image = reg.host + "/some/image:1"
	removeLater(t, api, spec.Image)

	spec.PullPolicy = "never"
	if pe := refused(t, x, spec); pe.Class != executor.ClassUser || reg.pulls() != 0 {
		t.Fatalf("never: %+v, %d pulls", pe, reg.pulls())
	}
	spec.PullPolicy = "missing"
	for range 2 {
		spec.LeaseID += "x"
		r := run(t, x, spec)
		if r.out != "pulled" || r.ImageDigest != digest(reg.manifest) {
			t.Fatalf("digest of the manifest is %s: %s", digest(reg.manifest), r)
		}
	}
	first, asked := reg.pulls(), reg.requests()
	if first == 0 || first > 2 {
		t.Fatalf("%d manifests for one pull", first)
	}
	spec.PullPolicy, spec.LeaseID = "always", spec.LeaseID+"y"
	if r := run(t, x, spec); r.out != "pulled" || reg.requests() <= asked {
		t.Fatalf("always did not pull: %s", r)
	}
	// By its digest as well.
	spec.PullPolicy, spec.LeaseID = "missing", spec.LeaseID+"z"
	spec.Image = reg.host + "/some/image@" + digest(reg.manifest)
	if r := run(t, x, spec); r.out != "pulled" || r.ImageDigest != digest(reg.manifest) {
		t.Fatal(r)
	}
}

func TestFailedPull(t *testing.T) {
	api := engine(t)
	x := newExecutor(t)
	reg := newRegistry(t, api, "x")
	reg.user, reg.password = "u", "p"
	spec := shell("true")
	spec.Image = reg.host + "/private:1"
	pe := refused(t, x, spec)
	if pe.Code != executor.CodeImagePull || pe.Class != executor.ClassInfra || strings.Contains(pe.Reason, "\n") {
		t.Fatalf("got %+v", pe)
	}
	spec.Image = "127.0.0.1:1/nothing:1" // nobody listens
	if pe := refused(t, x, spec); pe.Code != executor.CodeImagePull {
		t.Fatalf("got %+v", pe)
	}
	reg.user = ""
	reg.blobs = nil // the manifest names what is not there
	spec.Image = reg.host + "/broken:1"
	if pe := refused(t, x, spec); pe.Code != executor.CodeImagePull {
		t.Fatalf("got %+v", pe)
	}
}

func TestRegistryCredentials(t *testing.T) {
	api := engine(t)
	reg := newRegistry(t, api, "private")
	reg.user, reg.password = "owner", "pa:ss"
	helpers := t.TempDir()
	must(t, os.WriteFile(filepath.Join(helpers, "docker-credential-test"), []byte(fmt.Sprintf(`#!/bin/sh
[ "$1" = get ] && read -r server || true
[ "$server" = %s ] || { echo "credentials not found in native keychain"; exit 1; }
echo '{"ServerURL":"%s","Username":"owner","Secret":"pa:ss"}'
`, reg.host, reg.host)), 0o755))
	t.Setenv("PATH", helpers+":"+os.Getenv("PATH"))
	auth := map[string]any{"auth": base64.StdEncoding.EncodeToString([]byte("owner:pa:ss"))}
	for name, content := range map[string]any{
		"auths":              map[string]any{"auths": map[string]any{reg.host: auth}},
		"auths as a URL":     map[string]any{"auths": map[string]any{"https://" + reg.host + "/v2/": auth}},
		"credsStore":         map[string]any{"credsStore": "test"},
		"credHelpers":        map[string]any{"credHelpers": map[string]any{reg.host: "test"}, "credsStore": "not-installed"},
		"store knows it not": map[string]any{"credHelpers": map[string]any{"other": "test"}, "auths": map[string]any{reg.host: auth}},
	} {
		x := newExecutor(t, func(o *docker.Options) { o.ConfigDir = config(t, content) })
		spec := shell("cat /marker")
		spec.Image, spec.PullPolicy = reg.host+"/private:1", "always"
		removeLater(t, api, spec.Image)
		if r := run(t, x, spec); r.out != "private" {
			t.Errorf("%s: %s", name, r)
		}
	}
	for name, content := range map[string]any{
		"none":                map[string]any{},
		"wrong":               map[string]any{"auths": map[string]any{reg.host: map[string]any{"username": "owner", "password": "wrong-secret"}}},
		"not base64":          map[string]any{"auths": map[string]any{reg.host: map[string]any{"auth": "wrong-secret"}}},
		"no such helper":      map[string]any{"credsStore": "not-installed"},
		"impossible helper":   map[string]any{"credsStore": "../x"},
		"not a configuration": "wrong-secret",
	} {
		x := newExecutor(t, func(o *docker.Options) { o.ConfigDir = config(t, content); o.Host = engineHost() })
		spec := shell("true")
		spec.Image, spec.PullPolicy = reg.host+"/private:1", "always"
		pe := refused(t, x, spec)
		if pe.Code != executor.CodeImagePull || strings.Contains(pe.Error(), "wrong-secret") {
			t.Errorf("%s: %+v", name, pe)
		}
	}
}

// Many attempts that miss the same image share one pull, each with its own
// patience; the pull ends when nobody waits for it any more.
func TestPullIsShared(t *testing.T) {
	api := engine(t)
	x := newExecutor(t)
	reg := newRegistry(t, api, "shared")
	reg.hold = make(chan struct{})
	ref := reg.host + "/shared:1"
	removeLater(t, api, ref)
	var all sync.WaitGroup
	for range 6 {
		all.Go(func() {
			spec := shell("cat /marker")
			spec.Image = ref
			if r := run(t, x, spec); r.out != "shared" {
				t.Error(r)
			}
		})
	}
	impatient := shell("true")
	impatient.Image, impatient.PrepareTimeout = ref, 500*time.Millisecond
	pe := refused(t, x, impatient)
	if pe.Code != executor.CodePrepareTimeout || pe.Class != executor.ClassInfra {
		t.Fatalf("got %+v", pe)
	}
	eventually(t, func() bool { return reg.waiting.Load() > 0 }, "nobody pulls")
	close(reg.hold)
	all.Wait()
	if n := reg.pulls(); n > 2 {
		t.Fatalf("%d manifests for one pull", n)
	}

	// One that nobody waits for any more is given up, and not joined by the next.
	reg.hold = make(chan struct{})
	alone := shell("cat /marker")
	alone.Image, alone.PrepareTimeout = reg.host+"/alone:1", 500*time.Millisecond
	removeLater(t, api, alone.Image)
	if pe := refused(t, x, alone); pe.Code != executor.CodePrepareTimeout {
		t.Fatalf("got %+v", pe)
	}
	close(reg.hold)
	alone.PrepareTimeout = time.Minute
	if r := run(t, x, alone); r.out != "shared" {
		t.Fatal(r)
	}
}
