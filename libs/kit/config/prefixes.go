package config

import (
	"net/netip"
	"strings"
)

// Prefixes is a list of networks, such as the proxies whose X-Forwarded-For is believed.
type Prefixes []netip.Prefix

const errPrefixes = valueError("must be a comma-separated list of addresses or networks such as 10.0.0.0/8,192.168.1.7")

// Decode implements envconfig.Decoder. A bare address is a network of one; spaces around entries are ignored; an empty value is
// an empty list.
func (p *Prefixes) Decode(value string) error {
	var list Prefixes
	if strings.TrimSpace(value) != "" {
		for entry := range strings.SplitSeq(value, ",") {
			prefix, err := parsePrefix(strings.TrimSpace(entry))
			if err != nil {
				return errPrefixes
			}
			list = append(list, prefix)
		}
	}
	*p = list
	return nil
}

func parsePrefix(s string) (netip.Prefix, error) {
	if strings.Contains(s, "/") {
		prefix, err := netip.ParsePrefix(s)
		return prefix.Masked(), err
	}
	addr, err := netip.ParseAddr(s)
	if err != nil {
		return netip.Prefix{}, err
	}
	addr = addr.Unmap().WithZone("")
	return addr.Prefix(addr.BitLen())
}
