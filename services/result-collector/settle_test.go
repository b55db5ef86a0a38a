package collector_test

import (
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cmdexec/cmdexec/libs/bus"
	"github.com/cmdexec/cmdexec/libs/core/busmsg"
	"github.com/cmdexec/cmdexec/libs/core/job"
)

// settle asks as an edge does. The collector may still be subscribing.
func (r *rig) settle(res busmsg.Result) error {
	var err error
	r.eventually("a collector answers", func() bool {
		_, err = bus.Query(r.t.Context(), r.conn, bus.SettleResult, res)
		return !errors.Is(err, bus.ErrNoResponder)
	})
	return err
}

func TestSettledByRequest(t *testing.T) {
	r := newRig(t)
	c := r.start(r.db)
	var wg sync.WaitGroup
	for i := range 50 {
		e := r.assigned()
		wg.Go(func() {
			res := result(e)
			want := ""
			if i%2 == 0 {
				want = fmt.Sprintf("job %d", i)
				res = result(e, chunk(1, want))
			}
			if err := r.settle(res); err != nil {
				t.Errorf("job %d: %v", i, err)
				return
			}
			if got := r.get(e).Record.State; got != job.Succeeded {
				t.Errorf("job %d is %s when the request is answered", i, got)
			}
			if text, _ := r.output(e); text != want {
				t.Errorf("job %d printed %q when the request is answered", i, text)
			}
			if err := r.settle(res); err != nil {
				t.Errorf("a repeat of job %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	require.EqualValues(t, 50, c.results(t, "applied"))
	require.EqualValues(t, 50, c.results(t, "terminal"))
	require.Zero(t, r.pending(bus.ResultsState))
}

// What cannot be stored is not answered, and comes by RESULTS.
func TestSettledByRequestWhileTheDatabaseIsAway(t *testing.T) {
	r := newRig(t)
	db := &faulty{Store: r.db}
	db.down.Store(true)
	c := r.start(db)
	silent, printing := r.assigned(), r.assigned()
	require.NoError(t, r.settle(result(silent)), "nothing has to be stored")
	res := result(printing, chunk(1, "kept"))
	require.Error(t, r.settle(res))
	require.Equal(t, job.Succeeded, r.get(printing).Record.State, "the database is not on the way of states")
	r.publish(res)
	db.down.Store(false)
	r.settled()
	text, _ := r.output(printing)
	require.Equal(t, "kept", text)
	require.EqualValues(t, 2, c.results(t, "applied"))
}

func TestSettleRefusesWhatIsNoResult(t *testing.T) {
	r := newRig(t)
	r.start(r.db)
	e := r.assigned()
	for name, spoil := range map[string]func(*busmsg.Result){
		"no job":        func(res *busmsg.Result) { res.JobID = "job-*" },
		"no attempt":    func(res *busmsg.Result) { res.Attempt = 0 },
		"no outcome":    func(res *busmsg.Result) { res.Outcome = "" },
		"another lease": func(res *busmsg.Result) { res.LeaseID = "lease-of-somebody" },
	} {
		res := result(e)
		spoil(&res)
		err := r.settle(res)
		if name == "another lease" {
			require.NoError(t, err, "stale, which is an answer")
		} else {
			require.Error(t, err, name)
		}
		require.Equal(t, job.Assigned, r.get(e).Record.State, name)
	}
}
