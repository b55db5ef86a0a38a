package clock

// Boot names the span within which readings of [System] by different processes
// of this machine can be compared: it changes with every start of the machine.
// Empty: they never can.
func Boot() string { return boot() }
