package check

import (
	"cmp"
	"slices"

	"github.com/cmdexec/cmdexec/tests/chaos/history"
)

// Flat is what a process used in the second and in the last quarter of a soak, as
// medians. The first quarter is for caches to fill.
type Flat struct {
	Service, What string
	Early, Late   int64 // bytes or a number
}

// What may be more in the last quarter than in the second before it counts as
// growth. Samples of a shorter time than leastSamples say nothing.
const (
	leastSamples   = 40
	growthFraction = 8 // one eighth of the early value, and
	growthMemory   = 8 << 20
	growthCount    = 16
)

func (c *checker) sample(s *history.Sample) {
	if c.samples == nil {
		c.samples = map[Flat][]int64{}
	}
	series := Flat{Service: s.Service, What: s.What}
	c.samples[series] = append(c.samples[series], s.Value)
}

// flat compares the quarters of every series.
func (c *checker) flat() {
	for series, values := range c.samples {
		n := len(values)
		if n < leastSamples {
			continue
		}
		series.Early, series.Late = median(values[n/4:n/2]), median(values[n-n/4:])
		c.v.Figures.Flat = append(c.v.Figures.Flat, series)
		allowed := series.Early/growthFraction + growthCount
		if series.What == "rss" {
			allowed = series.Early/growthFraction + growthMemory
		}
		if series.Late > series.Early+allowed {
			c.broken(I5Left, "", "%s of %s grew from %d to %d under a steady load", series.What, series.Service, series.Early, series.Late)
		}
	}
	slices.SortFunc(c.v.Figures.Flat, func(a, b Flat) int {
		return cmp.Or(cmp.Compare(a.Service, b.Service), cmp.Compare(a.What, b.What))
	})
}

func median(values []int64) int64 {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[len(sorted)/2]
}
