// Package context is the file in which `cmdexec up` leaves its address and a
// token, so that the CLI of the same user finds them by itself.
package context

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// Context says which server to talk to, and as whom.
type Context struct {
	Server  string `json:"server"`
	Token   string `json:"token"`
	DataDir string `json:"dataDir,omitempty"` // of that server, which is here: where its secrets are
}

// File is the path of the context file: context.json in $XDG_CONFIG_HOME/cmdexec,
// or in ~/.config/cmdexec.
func File() (string, error) {
	dir, err := os.UserConfigDir()
	if err != nil {
		return "", errors.New("no home folder to look for the context file in: set CMDEXEC_SERVER and CMDEXEC_TOKEN")
	}
	return filepath.Join(dir, "cmdexec", "context.json"), nil
}

// Load reads the context file. A missing file is an empty context.
func Load() (Context, error) {
	file, err := File()
	if err != nil {
		return Context{}, nil //nolint:nilerr // nowhere to look is the same as nothing there
	}
	data, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return Context{}, nil
	}
	if err != nil {
		return Context{}, fmt.Errorf("read the context file: %w", err)
	}
	var c Context
	if err := json.Unmarshal(data, &c); err != nil {
		return Context{}, fmt.Errorf("the context file %s is damaged: remove it, `cmdexec up` writes a new one", file)
	}
	return c, nil
}

// Save writes the context file, readable by its owner only, in one step.
func Save(c Context) error {
	file, err := File()
	if err != nil {
		return err
	}
	data, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return fmt.Errorf("encode the context: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return fmt.Errorf("make the context folder: %w", err)
	}
	return WriteFile(file, append(data, '\n'))
}

// WriteFile replaces a file in one step, with mode 0600.
func WriteFile(file string, data []byte) error {
	tmp, err := os.CreateTemp(filepath.Dir(file), ".new-*")
	if err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	defer os.Remove(tmp.Name()) //nolint:errcheck // gone after the rename
	_, err = tmp.Write(data)
	if err := errors.Join(err, tmp.Sync(), tmp.Close()); err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	if err := os.Rename(tmp.Name(), file); err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	return nil
}
