package config

import (
	"math"
	"strconv"
	"strings"
)

// Bytes is an amount of memory or disk in bytes, never negative when parsed.
type Bytes int64

// valueError is a message of this package's own types. It never contains the value.
type valueError string

func (e valueError) Error() string { return string(e) }

func isOwn(err error) bool {
	_, ok := err.(valueError)
	return ok
}

const (
	errBytes      = valueError("must be a size such as 8Gi, 512Mi, 1G or a plain number of bytes")
	errBytesLarge = valueError("must be a size of less than 8Ei")
)

// byteUnits is ordered so that String finds the shortest exact form: binary before decimal, large before small.
var byteUnits = [...]struct {
	suffix string
	size   int64
}{
	{"Pi", 1 << 50},
	{"Ti", 1 << 40},
	{"Gi", 1 << 30},
	{"Mi", 1 << 20},
	{"Ki", 1 << 10},
	{"P", 1e15},
	{"T", 1e12},
	{"G", 1e9},
	{"M", 1e6},
	{"k", 1e3},
	{"K", 1e3},
}

// ParseBytes reads a whole number with an optional unit: Ki to Pi are powers of 1024, K (or k) to P powers of 1000; a B may
// follow the unit. Lower-case units other than k are refused, because half the world means 1024 by them.
func ParseBytes(s string) (Bytes, error) {
	digits := len(s) - len(strings.TrimLeft(s, "0123456789"))
	if digits == 0 {
		return 0, errBytes
	}
	size, ok := unitSize(s[digits:])
	if !ok {
		return 0, errBytes
	}
	n, err := strconv.ParseInt(s[:digits], 10, 64)
	if err != nil || n > math.MaxInt64/size {
		return 0, errBytesLarge
	}
	return Bytes(n * size), nil
}

func unitSize(suffix string) (int64, bool) {
	if suffix == "" || suffix == "B" {
		return 1, true
	}
	suffix = strings.TrimSuffix(suffix, "B")
	for _, u := range byteUnits {
		if suffix == u.suffix {
			return u.size, true
		}
	}
	return 0, false
}

// Decode implements envconfig.Decoder.
func (b *Bytes) Decode(value string) error {
	v, err := ParseBytes(value)
	if err != nil {
		return err
	}
	*b = v
	return nil
}

// String returns the shortest exact form; ParseBytes reads it back.
func (b Bytes) String() string {
	if b > 0 {
		for _, u := range byteUnits {
			if int64(b)%u.size == 0 {
				return strconv.FormatInt(int64(b)/u.size, 10) + u.suffix
			}
		}
	}
	return strconv.FormatInt(int64(b), 10)
}
