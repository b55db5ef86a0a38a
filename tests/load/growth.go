package main

import (
	"context"
	"flag"
	"fmt"
	"time"

	"github.com/cmdexec/cmdexec/libs/kit/lifecycle"
)

// growthLoad is how many jobs the row growth runs.
type growthLoad struct{ jobs int }

func (g *growthLoad) flags() {
	flag.IntVar(&g.jobs, "growth", 20_000, "of the row growth: jobs between the first and the last look at the memory, in rounds of -jobs; 100,000 take some minutes")
}

const (
	growthFirst = 1000
	growthLooks = 5
	growthSoon  = 5 * time.Second
	growthRest  = 45 * time.Second // what purges, caches and the return of memory take
)

// growth measures what jobs that have ended leave behind in memory.
func growth(ctx context.Context, p plan) error {
	for _, form := range p.forms {
		start, err := starter(form)
		if err != nil {
			return err
		}
		if err := grows(ctx, p, form, start); err != nil {
			return fmt.Errorf("%s: %w", form, err)
		}
	}
	return nil
}

func grows(ctx context.Context, p plan, form string, start func(context.Context, plan) (*deployment, error)) error {
	d, err := start(ctx, p)
	if err != nil {
		return err
	}
	defer d.stop()
	c := newClient(d.url, d.token)
	fresh, err := d.usage()
	if err != nil {
		return err
	}
	if _, err := c.throughput(ctx, warm, p.clients); err != nil {
		return fmt.Errorf("warm up: %w", err)
	}
	_, base, err := d.rested(ctx)
	if err != nil {
		return err
	}
	fmt.Printf("\ngrowth, %s: %s\n", form, d.what)
	row(fmt.Sprintf("resident memory: fresh / %v after %d jobs", growthRest, warm), "%8.1f / %.1f MB", mb(fresh.rss), mb(base))
	done := 0
	for _, until := range growthSteps(p.growth.jobs) {
		rate, err := c.rounds(ctx, until-done, p.jobs, p.clients)
		if err != nil {
			return err
		}
		done = until
		soon, now, err := d.rested(ctx)
		if err != nil {
			return err
		}
		row(fmt.Sprintf("  after %d more", done), "%8.1f MB   %+.1f MB   %.1f MB after %v   %.0f jobs/s", mb(now), mb(now-base), mb(soon), growthSoon, rate)
	}
	return nil
}

// rounds runs jobs so that at most so many wait at a time: what a long queue needs
// is another matter. It returns how many were completed a second.
func (c *client) rounds(ctx context.Context, jobs, most, clients int) (float64, error) {
	began := time.Now()
	for left := jobs; left > 0; left -= most {
		if _, err := c.throughput(ctx, min(most, left), clients); err != nil {
			return 0, err
		}
	}
	return float64(jobs) / time.Since(began).Seconds(), nil
}

// growthSteps are the counts of jobs after which the memory is looked at.
func growthSteps(jobs int) []int {
	steps := []int{min(growthFirst, jobs)}
	for i := range growthLooks {
		if n := jobs * (i + 1) / growthLooks; n > steps[len(steps)-1] {
			steps = append(steps, n)
		}
	}
	return steps
}

// rested is the resident memory soon after jobs, and when everything has come to rest.
func (d *deployment) rested(ctx context.Context) (soon, rested int64, err error) {
	if err := lifecycle.Sleep(ctx, growthSoon); err != nil {
		return 0, 0, err
	}
	u, err := d.usage()
	if err != nil {
		return 0, 0, err
	}
	if err := lifecycle.Sleep(ctx, growthRest-growthSoon); err != nil {
		return 0, 0, err
	}
	later, err := d.usage()
	return u.rss, later.rss, err
}
