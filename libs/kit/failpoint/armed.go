//go:build failpoint

package failpoint

import (
	"sync"

	"github.com/cmdexec/cmdexec/libs/kit/config"
)

type settings struct {
	Points string `envconfig:"FAILPOINT" desc:"what happens at which failpoint, e.g. gateway.afterCreate:kill@3"`
}

// armed belongs to the process, as what it does to it.
var armed = sync.OnceValues(func() (plan, error) {
	cfg, err := config.Load[settings]()
	if err != nil {
		return nil, err
	}
	return parse(cfg.Points)
})

// At does what FAILPOINT says for this moment. It panics where that cannot be read.
func At(n Name) {
	p, err := armed()
	if err != nil {
		panic(err)
	}
	p.at(n)
}

// Check returns an error when FAILPOINT cannot be used.
func Check() error {
	_, err := armed()
	return err
}
