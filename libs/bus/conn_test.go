package bus

import (
	"strings"
	"testing"
)

func TestHosts(t *testing.T) {
	for address, want := range map[string]string{
		"nats://127.0.0.1:4222":                    "127.0.0.1:4222",
		"localhost:4222":                           "localhost:4222",
		"nats://u:canary@a:1, tls://b:2,wss://c/p": "a:1, b:2, c",
		"nats://[::1]:4222/":                       "[::1]:4222",
		"":                                         "",
		"nats//u:canary@x:y":                       "",
		"ws:/u:canary@%zz":                         "",
		"http://canary@x":                          "",
		"nats://u:canary@":                         "",
		"nats://a:1,,nats://b:1":                   "",
		"nats://u:canary@a:port":                   "",
	} {
		got, err := hosts(address)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q gives %q, %v", address, got, err)
		}
		if strings.Contains(got, "canary") || err != nil && strings.Contains(err.Error(), "canary") {
			t.Errorf("%q: %q, %v repeat a secret", address, got, err)
		}
	}
}
