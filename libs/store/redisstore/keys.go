package redisstore

import (
	"crypto/sha256"
	"encoding/hex"
)

// The names of everything that this project keeps in Redis.
const (
	limitPrefix = "cmdexec:limit:"
	longestKey  = 128 // bytes of a key of ours; a longer one is known by its hash
)

// limitKey is where a key of a rate limit is kept.
func limitKey(key string) string {
	if len(key) > longestKey {
		sum := sha256.Sum256([]byte(key))
		key = "sha256:" + hex.EncodeToString(sum[:])
	}
	return limitPrefix + key
}
