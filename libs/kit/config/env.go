package config

import "os"

// lookup tells an unset variable from an empty one.
func lookup(name string) (string, bool) { return os.LookupEnv(name) }
