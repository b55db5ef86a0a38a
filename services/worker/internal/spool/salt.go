package spool

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
)

// loadSalt reads the spool's salt, or makes one.
func loadSalt(dir string) (salt, error) {
	path := filepath.Join(dir, "salt")
	data, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return salt{}, err
	}
	if len(data) != 8 {
		data = make([]byte, 8)
		_, _ = rand.Read(data) // never fails
		if err := writeSynced(path, data); err != nil {
			return salt{}, err
		}
	}
	return salt{binary.LittleEndian.Uint32(data), binary.LittleEndian.Uint32(data[4:])}, nil
}

// writeSynced replaces a file so that it survives loss of power.
func writeSynced(path string, data []byte) error {
	f, err := os.OpenFile(path+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(path+".new", path); err != nil {
		return err
	}
	return syncFolder(filepath.Dir(path))
}
