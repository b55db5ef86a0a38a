// Package redis holds the tests of rate limits that are shared by Redis, on real
// servers in processes of their own, which are killed, stopped and emptied.
package redis
