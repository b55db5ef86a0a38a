// Package arch tests what the compiler cannot: which module may import which,
// who owns a third-party package, and the rules that keep state, names and
// process control in their one place. Every failure says why the rule exists.
//
// The tests parse the sources of all modules of the workspace, including files
// of other platforms, and need no type information.
package arch
