// Command chaosrunc stands between a container engine and runc in chaos runs. It
// adds one mount to each container, the folder of the run's journal, so that
// commands in containers note their starts and stops as all others do: a job
// cannot ask for a mount, and the product does not know of this one.
//
//	chaosrunc FOLDER MOUNT ARGUMENT...
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "chaosrunc:", err)
		os.Exit(1)
	}
}

// run becomes runc, and returns only when it cannot.
func run(args []string) error {
	if len(args) < 2 {
		return errors.New("usage: chaosrunc FOLDER MOUNT ARGUMENTS")
	}
	folder, mount, args := args[0], args[1], args[2:]
	if bundle := bundleOf(args); bundle != "" {
		if err := addMount(filepath.Join(bundle, "config.json"), folder, mount); err != nil {
			return err
		}
	}
	runc, err := exec.LookPath("runc")
	if err != nil {
		return err
	}
	return syscall.Exec(runc, append([]string{"runc"}, args...), os.Environ())
}

// bundleOf is the folder of the container that is to be created, "" where none is.
func bundleOf(args []string) string {
	create, bundle := false, ""
	for i, a := range args {
		switch {
		case a == "create" || a == "run":
			create = true
		case (a == "--bundle" || a == "-b") && i+1 < len(args):
			bundle = args[i+1]
		case strings.HasPrefix(a, "--bundle="):
			bundle = strings.TrimPrefix(a, "--bundle=")
		}
	}
	if !create {
		return ""
	}
	return bundle
}

func addMount(file, folder, mount string) error {
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var config map[string]json.RawMessage // what is not touched stays as it is
	if err := json.Unmarshal(data, &config); err != nil {
		return fmt.Errorf("read the container's configuration: %w", err)
	}
	var mounts []json.RawMessage
	if err := json.Unmarshal(config["mounts"], &mounts); err != nil {
		return fmt.Errorf("read the container's mounts: %w", err)
	}
	added, err := json.Marshal(map[string]any{
		"destination": mount, "type": "bind", "source": folder, "options": []string{"rbind", "rw", "nosuid", "nodev"},
	})
	if err != nil {
		return err
	}
	if config["mounts"], err = json.Marshal(append(mounts, added)); err != nil {
		return err
	}
	if data, err = json.Marshal(config); err != nil {
		return err
	}
	return os.WriteFile(file, data, 0o600)
}
