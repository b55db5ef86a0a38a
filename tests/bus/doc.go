// Package bus holds the tests of libs/bus and libs/natsd together: on embedded
// servers, and on servers in processes of their own, which are killed.
package bus
