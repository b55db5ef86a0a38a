package config

import (
	"strconv"
	"strings"
	"time"
)

// Rate is how many events are let through per second or per minute. The zero value is off: no limit.
type Rate struct {
	Count int           // events per period; 0 is off
	Per   time.Duration // time.Second or time.Minute
}

// MaxRateCount is the largest count that a rate can have.
const MaxRateCount = 1_000_000

const errRate = valueError("must be a rate such as 20/s or 600/m (at most 1000000), or off")

// ParseRate reads "N/s", "N/m" or "off". Zero is refused: it would read as "nothing" to one person and "no limit" to another.
func ParseRate(s string) (Rate, error) {
	if s == "off" {
		return Rate{}, nil
	}
	count, unit, ok := strings.Cut(s, "/")
	if !ok || count == "" || strings.Trim(count, "0123456789") != "" {
		return Rate{}, errRate
	}
	n, err := strconv.Atoi(count)
	if err != nil || n < 1 || n > MaxRateCount {
		return Rate{}, errRate
	}
	switch unit {
	case "s":
		return Rate{Count: n, Per: time.Second}, nil
	case "m":
		return Rate{Count: n, Per: time.Minute}, nil
	}
	return Rate{}, errRate
}

// Decode implements envconfig.Decoder.
func (r *Rate) Decode(value string) error {
	v, err := ParseRate(value)
	if err != nil {
		return err
	}
	*r = v
	return nil
}

// Off reports whether nothing is limited.
func (r Rate) Off() bool { return r.Count <= 0 || r.Per <= 0 }

// String returns the form that ParseRate reads back.
func (r Rate) String() string {
	switch {
	case r.Off():
		return "off"
	case r.Per == time.Minute:
		return strconv.Itoa(r.Count) + "/m"
	case r.Per == time.Second:
		return strconv.Itoa(r.Count) + "/s"
	}
	return strconv.Itoa(r.Count) + "/" + r.Per.String()
}
