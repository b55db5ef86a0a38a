package rig

import (
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
)

const mostPage = 4 << 20

func copyLimited(to io.Writer, from io.Reader) (int64, error) {
	return io.Copy(to, io.LimitReader(from, mostPage))
}

// Metric sums the series of a metric of a service; 0 where it has none.
func (s *Service) Metric(ctx context.Context, name string) (float64, error) {
	text, err := s.page(ctx, "/metrics")
	if err != nil {
		return 0, err
	}
	sum := 0.0
	for line := range strings.Lines(text) {
		series, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if base, _, _ := strings.Cut(series, "{"); base != name {
			continue
		}
		n, err := strconv.ParseFloat(value, 64)
		if err != nil {
			return 0, fmt.Errorf("metric %s: %w", name, err)
		}
		sum += n
	}
	return sum, nil
}

// Files counts the open files of a process.
func (p *Process) Files() int64 {
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.PID()))
	if err != nil {
		return 0
	}
	return int64(len(entries))
}

// Memory is the resident memory of a process, in bytes.
func (p *Process) Memory() int64 {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", p.PID()))
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(data))
	if len(fields) < 2 {
		return 0
	}
	pages, _ := strconv.ParseInt(fields[1], 10, 64)
	return pages * int64(os.Getpagesize())
}
