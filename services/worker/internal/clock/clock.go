// Package clock measures time for leases. A lease ends by elapsed time on this
// machine, sleep included: a laptop that slept through its lease must not go
// on with a job that another worker has by now.
package clock

import "time"

// Clock tells the time since an arbitrary fixed moment. It never goes back and
// goes on while the machine sleeps. Implementations are safe for concurrent use.
type Clock interface {
	Now() time.Duration
}
