package rig

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// echo is a server that sends back what it gets.
func echo(t *testing.T) *Proxy {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_, _ = io.Copy(c, c) // until the peer goes away
			}()
		}
	}()
	p, err := NewProxy(func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", ln.Addr().String())
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.Close()
		_ = ln.Close()
	})
	return p
}

func dial(t *testing.T, p *Proxy) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", p.Addr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// answered sends a byte and waits for it to come back.
func answered(c net.Conn, within time.Duration) error {
	if _, err := c.Write([]byte("x")); err != nil {
		return err
	}
	_ = c.SetReadDeadline(time.Now().Add(within))
	_, err := io.ReadFull(c, make([]byte, 1))
	return err
}

func TestProxy(t *testing.T) {
	p := echo(t)
	c := dial(t, p)
	if err := answered(c, time.Minute); err != nil {
		t.Fatalf("passing: %v", err)
	}
	p.Set(Hole)
	if err := answered(c, 200*time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("in the hole: %v", err)
	}
	p.Set(Pass)
	_ = c.SetReadDeadline(time.Now().Add(time.Minute))
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Fatalf("what fell into the hole while it was open must come: %v", err)
	}
	p.Set(Cut)
	if err := answered(c, time.Minute); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("a cut connection: %v", err)
	}
	if c, err := net.Dial("tcp", p.Addr()); err == nil {
		if err := answered(c, time.Minute); err == nil {
			t.Fatal("a new connection passes the cut")
		}
		_ = c.Close()
	}
	p.Set(Drip)
	slow := dial(t, p)
	began := time.Now()
	if _, err := slow.Write(make([]byte, 500)); err != nil {
		t.Fatal(err)
	}
	_ = slow.SetReadDeadline(time.Now().Add(time.Minute))
	if _, err := io.ReadFull(slow, make([]byte, 500)); err != nil || time.Since(began) < 300*time.Millisecond {
		t.Fatalf("dripping: %v after %v", err, time.Since(began))
	}
}
