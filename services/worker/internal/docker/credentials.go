package docker

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/docker/docker/api/types/registry"
)

// helperTimeout bounds a credential helper, which may ask a keychain.
const helperTimeout = 20 * time.Second

// dockerHub is what Docker Hub is called in a configuration.
const dockerHub = "https://index.docker.io/v1/"

// credentials are the owner's, read anew for every pull: they may be renewed.
// They reach the engine only, and no error or log holds any.
type credentials struct{ dir string }

type authEntry struct {
	Auth          string `json:"auth"`
	Username      string `json:"username"`
	Password      string `json:"password"`
	IdentityToken string `json:"identitytoken"`
}

type dockerConfig struct {
	Auths       map[string]authEntry `json:"auths"`
	CredsStore  string               `json:"credsStore"`
	CredHelpers map[string]string    `json:"credHelpers"`
}

// header gives the X-Registry-Auth of a registry; without credentials that of
// nobody, with which a public image can be pulled.
func (c *credentials) header(ctx context.Context, domain string) (string, error) {
	auth := registry.AuthConfig{}
	if c.dir != "" {
		var config dockerConfig
		if err := readConfigJSON(filepath.Join(c.dir, "config.json"), &config); err != nil {
			return "", err
		}
		var err error
		if auth, err = config.lookup(ctx, domain); err != nil {
			return "", err
		}
	}
	return registry.EncodeAuthConfig(auth)
}

func (c *dockerConfig) lookup(ctx context.Context, domain string) (registry.AuthConfig, error) {
	key := domain
	if domain == "docker.io" {
		key = dockerHub
	}
	helper := c.CredsStore
	if own, ok := c.CredHelpers[domain]; ok {
		helper = own
	} else if own, ok := c.CredHelpers[key]; ok {
		helper = own
	}
	if helper != "" {
		auth, err := askHelper(ctx, helper, key)
		if err != nil || auth != (registry.AuthConfig{}) {
			return auth, err
		}
	}
	for server, entry := range c.Auths {
		if server == key || registryHost(server) == registryHost(key) {
			return entry.config(server)
		}
	}
	return registry.AuthConfig{}, nil
}

func (a authEntry) config(server string) (registry.AuthConfig, error) {
	auth := registry.AuthConfig{
		ServerAddress: server, Username: a.Username, Password: a.Password, IdentityToken: a.IdentityToken,
	}
	if a.Auth != "" {
		plain, err := base64.StdEncoding.DecodeString(a.Auth)
		user, password, ok := strings.Cut(string(plain), ":")
		if err != nil || !ok {
			return registry.AuthConfig{}, fmt.Errorf("the credentials of %s in the docker configuration are not valid", registryHost(server))
		}
		auth.Username, auth.Password = user, strings.Trim(password, "\x00")
	}
	return auth, nil
}

// registryHost is the host of a key of auths, which may be written as a URL.
func registryHost(key string) string {
	if _, rest, ok := strings.Cut(key, "://"); ok {
		key = rest
	}
	host, _, _ := strings.Cut(key, "/")
	return host
}

var helperName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*$`)

// askHelper runs docker-credential-NAME get. A helper that knows nothing of
// the registry is no error.
func askHelper(ctx context.Context, name, server string) (registry.AuthConfig, error) {
	none := registry.AuthConfig{}
	if !helperName.MatchString(name) {
		return none, errors.New("the docker configuration names an impossible credential helper")
	}
	ctx, cancel := context.WithTimeout(ctx, helperTimeout)
	defer cancel()
	program := "docker-credential-" + name
	cmd := exec.CommandContext(ctx, program, "get")
	cmd.Stdin = strings.NewReader(server)
	cmd.WaitDelay = time.Second // a grandchild may hold the pipe
	out := &cappedBuffer{most: 64 << 10}
	cmd.Stdout = out
	err := cmd.Run()
	if ctx.Err() != nil {
		return none, fmt.Errorf("%s did not answer in time", program)
	}
	if errors.Is(err, exec.ErrNotFound) {
		return none, fmt.Errorf("%s, which the docker configuration names, is not installed", program)
	}
	if err != nil {
		// By convention it says so on standard output.
		if strings.Contains(out.kept.String(), "credentials not found") {
			return none, nil
		}
		return none, fmt.Errorf("%s failed: %w", program, err)
	}
	var answer struct{ Username, Secret string }
	if json.Unmarshal(out.kept.Bytes(), &answer) != nil {
		return none, fmt.Errorf("%s gave no valid answer", program)
	}
	if answer.Username == "<token>" {
		return registry.AuthConfig{ServerAddress: server, IdentityToken: answer.Secret}, nil
	}
	return registry.AuthConfig{ServerAddress: server, Username: answer.Username, Password: answer.Secret}, nil
}

// cappedBuffer keeps the beginning of what is written to it. The buffer is not
// embedded, since io.Copy would write past the cap by its ReadFrom.
type cappedBuffer struct {
	kept bytes.Buffer
	most int
}

func (b *cappedBuffer) Write(p []byte) (int, error) {
	if room := b.most - b.kept.Len(); room > 0 {
		b.kept.Write(p[:min(len(p), room)])
	}
	return len(p), nil
}
