package natsd

import (
	"fmt"
	"log/slog"
	"sync"
)

// logAdapter writes the server's log to slog. What the server calls fatal does
// not end the process: Start reports it.
type logAdapter struct {
	log *slog.Logger

	mu    sync.Mutex
	fatal string
}

func (a *logAdapter) fatalText() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.fatal
}

// Noticef is debug here: the server's notices are its banner and its life cycle,
// which its host reports in its own words.
func (a *logAdapter) Noticef(format string, v ...any) {
	a.log.Debug("nats server notice", "text", fmt.Sprintf(format, v...))
}

func (a *logAdapter) Warnf(format string, v ...any) {
	a.log.Warn("nats server warning", "text", fmt.Sprintf(format, v...))
}

func (a *logAdapter) Errorf(format string, v ...any) {
	a.log.Error("nats server error", "text", fmt.Sprintf(format, v...))
}

func (a *logAdapter) Fatalf(format string, v ...any) {
	text := fmt.Sprintf(format, v...)
	a.mu.Lock()
	if a.fatal == "" {
		a.fatal = text
	}
	a.mu.Unlock()
}

func (a *logAdapter) Debugf(string, ...any) {}
func (a *logAdapter) Tracef(string, ...any) {}
