package executor_test

import (
	"errors"
	"fmt"
	"io/fs"
	"testing"

	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
)

func TestAsPrepareErrorKeepsReasonAndClass(t *testing.T) {
	err := fmt.Errorf("attempt 1: %w", executor.UserError("the working directory does not exist", fs.ErrNotExist))
	pe := executor.AsPrepareError(err)
	if pe.Class != executor.ClassUser || pe.Reason != "the working directory does not exist" {
		t.Fatalf("got class %q, reason %q", pe.Class, pe.Reason)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		t.Fatal("the cause is lost")
	}
}

func TestAsPrepareErrorTakesUnknownErrorsAsInfra(t *testing.T) {
	pe := executor.AsPrepareError(fs.ErrPermission)
	if pe.Class != executor.ClassInfra || !errors.Is(pe, fs.ErrPermission) {
		t.Fatalf("got %+v", pe)
	}
	if executor.AsPrepareError(nil) != nil {
		t.Fatal("nil became an error")
	}
}

func TestCPUShares(t *testing.T) {
	for cores, want := range map[float64]int64{0: 205, 1: 205, 0.5: 102, 4: 819, 0.001: 2, 1e9: 1 << 18} {
		s := executor.Spec{CPU: cores}
		if got := s.CPUShares(); got != want {
			t.Errorf("%g cores: %d shares, want %d", cores, got, want)
		}
	}
}
