package config_test

import (
	"bytes"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/kit/config"
)

type nested struct {
	Addr string `envconfig:"KT_ADDR" default:":3000" desc:"where to listen"`
}

type settings struct {
	nested   // unexported: not a setting
	Nested   nested
	URL      string          `envconfig:"KT_URL" default:"nats://127.0.0.1:4222" desc:"address of NATS"`
	Wait     time.Duration   `envconfig:"KT_WAIT" default:"5s" desc:"how long"`
	Slots    int             `envconfig:"KT_SLOTS" default:"4" desc:"jobs at once"`
	Small    uint8           `envconfig:"KT_SMALL"`
	On       bool            `envconfig:"KT_ON"`
	Ratio    float64         `envconfig:"KT_RATIO"`
	List     []string        `envconfig:"KT_LIST"`
	Numbers  []int           `envconfig:"KT_NUMBERS"`
	RAM      config.Bytes    `envconfig:"KT_RAM" default:"8Gi" desc:"memory offered"`
	Rate     config.Rate     `envconfig:"KT_RATE" default:"off"`
	Proxies  config.Prefixes `envconfig:"KT_PROXIES"`
	Key      config.Secret   `envconfig:"KT_KEY" desc:"signs"`
	PlainPIN int             `envconfig:"KT_PIN" secret:"true" default:"1234"`
	MyToken  int             `envconfig:"KT_TOKEN"`
	Ignored  string          `ignored:"true"`
}

func TestLoadTakesDefaultsAndVariables(t *testing.T) {
	t.Setenv("KT_SLOTS", "9")
	t.Setenv("KT_LIST", "a,b")
	t.Setenv("KT_PROXIES", " 10.1.2.3/8, 192.168.1.7 ,::1")
	t.Setenv("KT_KEY", "hush")
	t.Setenv("KT_ADDR", ":9")
	t.Setenv("KT_RATE", "20/s")
	cfg, err := config.Load[settings]()
	require.NoError(t, err)
	require.Equal(t, "nats://127.0.0.1:4222", cfg.URL)
	require.Equal(t, 5*time.Second, cfg.Wait)
	require.Equal(t, 9, cfg.Slots)
	require.Equal(t, []string{"a", "b"}, cfg.List)
	require.Equal(t, config.Bytes(8<<30), cfg.RAM)
	require.Equal(t, config.Rate{Count: 20, Per: time.Second}, cfg.Rate)
	require.Equal(t, "hush", cfg.Key.Reveal())
	require.Equal(t, ":9", cfg.Nested.Addr)
	require.Equal(t, config.Prefixes{
		netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("192.168.1.7/32"), netip.MustParsePrefix("::1/128"),
	}, cfg.Proxies)
}

func TestLoadErrorsAreOneLineThatNamesTheVariable(t *testing.T) {
	for name, c := range map[string]struct{ key, value, want string }{
		"duration":         {"KT_WAIT", "soon", `KT_WAIT must be a duration such as 10s or 5m, not "soon"`},
		"int":              {"KT_SLOTS", "many", `KT_SLOTS must be a whole number of at most 64 bits, not "many"`},
		"int set to empty": {"KT_SLOTS", "", `KT_SLOTS must be a whole number of at most 64 bits, not ""`},
		"uint8":            {"KT_SMALL", "256", `KT_SMALL must be a whole number, not negative, of at most 8 bits, not "256"`},
		"bool":             {"KT_ON", "maybe", `KT_ON must be true or false, not "maybe"`},
		"float":            {"KT_RATIO", "half", `KT_RATIO must be a number, not "half"`},
		"list":             {"KT_NUMBERS", "1,x", `KT_NUMBERS must be a comma-separated list of usable values, not "1,x"`},
		"bytes":            {"KT_RAM", "8 apples", `KT_RAM must be a size such as 8Gi, 512Mi, 1G or a plain number of bytes, not "8 apples"`},
		"bytes too large":  {"KT_RAM", "9999999Pi", `KT_RAM must be a size of less than 8Ei, not "9999999Pi"`},
		"rate":             {"KT_RATE", "fast", `KT_RATE must be a rate such as 20/s or 600/m (at most 1000000), or off, not "fast"`},
		"prefixes": {"KT_PROXIES", "10.0.0.0/40", `KT_PROXIES must be a comma-separated list of addresses or networks such as ` +
			`10.0.0.0/8,192.168.1.7, not "10.0.0.0/40"`},
		"secret by tag":  {"KT_PIN", "hunter2", "KT_PIN must be a whole number of at most 64 bits"},
		"secret by name": {"KT_TOKEN", "hunter2", "KT_TOKEN must be a whole number of at most 64 bits"},
		"url password":   {"KT_SLOTS", "nats://u:hunter2@h", "KT_SLOTS must be a whole number of at most 64 bits, not what was given"},
		"long value":     {"KT_ON", strings.Repeat("x", 500), `KT_ON must be true or false, not "` + strings.Repeat("x", 64) + `..."`},
		"line break":     {"KT_ON", "a\nb", `KT_ON must be true or false, not "a\nb"`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv(c.key, c.value)
			_, err := config.Load[settings]()
			require.EqualError(t, err, c.want)
			require.NotContains(t, err.Error(), "hunter2")
			require.NotContains(t, err.Error(), "\n")
		})
	}
}

func TestRequired(t *testing.T) {
	type req struct {
		Key config.Secret `envconfig:"KT_REQ" required:"true" desc:"signs user tokens"`
	}
	_, err := config.Load[req]()
	require.EqualError(t, err, "KT_REQ is required and not set (signs user tokens)")
	t.Setenv("KT_REQ", "")
	_, err = config.Load[req]()
	require.EqualError(t, err, "KT_REQ is required and not set (signs user tokens)")
	t.Setenv("KT_REQ", "v")
	cfg, err := config.Load[req]()
	require.NoError(t, err)
	require.Equal(t, "v", cfg.Key.Reveal())
}

func TestLoadIntoKeepsWhatIsNotSet(t *testing.T) {
	cfg := settings{On: true, Ratio: 0.5}
	require.NoError(t, config.LoadInto(&cfg))
	require.True(t, cfg.On)
	require.Equal(t, 0.5, cfg.Ratio)
	require.Error(t, config.LoadInto(cfg), "a value cannot be filled")
	require.Error(t, config.LoadInto(nil))
}

func TestUsageListsEveryVariableAndNoSecret(t *testing.T) {
	for _, cfg := range []any{settings{}, &settings{}} {
		var out bytes.Buffer
		require.NoError(t, config.Usage(&out, cfg))
		lines := strings.Split(strings.TrimSpace(out.String()), "\n")
		require.Equal(t, []string{"NAME", "DEFAULT", "DESCRIPTION"}, strings.Fields(lines[0]))
		require.Equal(t, []string{"KT_ADDR", ":3000", "where", "to", "listen"}, strings.Fields(lines[1]))
		require.Contains(t, out.String(), "KT_RAM")
		require.Contains(t, out.String(), "[redacted]")
		require.NotContains(t, out.String(), "1234")
		require.NotContains(t, out.String(), "Ignored")
		require.Len(t, lines, 16)
	}
	require.Error(t, config.Usage(&bytes.Buffer{}, 7))
}
