// Package core holds libs/core/job to its promises over random and exhaustive
// sequences of events. It is a package of the module tests, so that libs/core
// itself needs nothing but the standard library.
package core
