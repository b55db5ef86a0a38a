package docker

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/docker/docker/api/types/system"

	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
)

func frame(stream byte, payload string) string {
	header := [8]byte{stream}
	binary.BigEndian.PutUint32(header[4:], uint32(len(payload)))
	return string(header[:]) + payload
}

func TestDemux(t *testing.T) {
	long := strings.Repeat("x", 100_000)
	var out, errs bytes.Buffer
	in := frame(1, "a") + frame(2, "b") + frame(1, "") + frame(1, long)
	if err := demux(iotest.OneByteReader(strings.NewReader(in)), &out, &errs); err != nil || out.String() != "a"+long || errs.String() != "b" {
		t.Fatalf("%v %d %q", err, out.Len(), errs.String())
	}
	for name, bad := range map[string]string{
		"cut in a header":  frame(1, "a")[:5],
		"cut in a payload": frame(1, "abc")[:9],
		"unknown stream":   frame(9, "a"),
		"no frame at all":  "hello, this is no frame",
		"engine's word":    frame(3, "something failed"),
		"4 GiB announced":  "\x01\x00\x00\x00\xff\xff\xff\xffabc",
	} {
		out.Reset()
		if demux(strings.NewReader(bad), &out, &out) == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func FuzzDemux(f *testing.F) {
	f.Add([]byte(frame(1, "a") + frame(2, "b")))
	f.Add([]byte("\x01\x00\x00\x00\xff\xff\xff\xffabc"))
	f.Fuzz(func(t *testing.T, in []byte) {
		var out, errs bytes.Buffer
		_ = demux(bytes.NewReader(in), &out, &errs)
		if out.Len()+errs.Len() > len(in) {
			t.Fatal("more came out than went in")
		}
	})
}

func TestReadProgress(t *testing.T) {
	for in, want := range map[string]string{
		"":                                 "",
		"{\"status\":\"Pulling\"}\n\n{}\n": "",
		"{\"errorDetail\":{\"message\":\"no\\nway\"},\"error\":\"x\"}\n": "no way",
		"{\"error\":\"denied\"}": "denied",
		"<html>":                 "cannot be read",
		"{\"status\":\"" + strings.Repeat("x", 2<<20) + "\"}": "too long",
	} {
		err := readProgress(strings.NewReader(in))
		if (err == nil) != (want == "") || (err != nil && !strings.Contains(err.Error(), want)) {
			t.Errorf("%.40q: %v", in, err)
		}
	}
	cut := io.MultiReader(strings.NewReader("{}\n"), iotest.ErrReader(io.ErrUnexpectedEOF))
	if err := readProgress(cut); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a pull that was cut off: %v", err)
	}
}

func good() system.Info {
	info := system.Info{
		OSType: "linux", MemoryLimit: true, SwapLimit: true, CPUCfsPeriod: true, CPUCfsQuota: true, PidsLimit: true,
		SecurityOptions: []string{"name=seccomp,profile=builtin", "name=cgroupns"}, CgroupVersion: "2", NCPU: 4,
	}
	info.InitCommit.ID = "de40ad0"
	return info
}

// An engine that cannot isolate or limit is refused, in words for its owner.
func TestJudge(t *testing.T) {
	f, err := judge(good(), "")
	if err != nil || f.cgroupV1 || f.rootless || !f.init || f.cores != 4 {
		t.Fatalf("%+v %v", f, err)
	}
	for want, spoil := range map[string]func(*system.Info){
		"seccomp":         func(i *system.Info) { i.SecurityOptions = []string{"name=apparmor"} },
		"default profile": func(i *system.Info) { i.SecurityOptions = []string{"name=seccomp,profile=unconfined"} },
		"memory limits":   func(i *system.Info) { i.MemoryLimit = false },
		"swap limits":     func(i *system.Info) { i.SwapLimit = false },
		"CPU limits":      func(i *system.Info) { i.CPUCfsQuota = false },
		"process limits":  func(i *system.Info) { i.PidsLimit = false },
		"linux":           func(i *system.Info) { i.OSType = "windows" },
	} {
		info := good()
		spoil(&info)
		if _, err := judge(info, ""); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
	info := good()
	info.CgroupVersion, info.InitCommit.ID = "1", "N/A"
	info.SecurityOptions = append(info.SecurityOptions, "name=rootless")
	if f, err := judge(info, ""); err != nil || !f.cgroupV1 || f.init || !f.rootless {
		t.Errorf("%+v %v", f, err)
	}
}

// What an engine cannot do is left out; nothing else changes.
func TestHardeningByEngine(t *testing.T) {
	p, err := makePlan(executor.Spec{
		JobID: "job-1", Attempt: 1, LeaseID: "lease-1", Image: "x", Shell: "true", MemoryMB: 64, PIDs: 10,
	}, "worker-1", false)
	if err != nil {
		t.Fatal(err)
	}
	h := p.hardening(&imageFacts{}, facts{cgroupV1: false, init: false, rootless: true}, "runsc", owner{1, 1})
	if h.MemorySwappiness != nil || h.Init != nil || h.OomScoreAdj != 0 || *h.PidsLimit != 10 || h.Runtime != "runsc" {
		t.Errorf("%+v", h)
	}
	h = p.hardening(&imageFacts{}, facts{cgroupV1: true, init: true}, "", owner{1, 1})
	if h.MemorySwappiness == nil || *h.MemorySwappiness != 0 || !*h.Init || h.OomScoreAdj != oomScore || *h.PidsLimit != 11 {
		t.Errorf("%+v", h)
	}
}

// A body that never ends is cut off.
func TestBoundedBody(t *testing.T) {
	b := &boundedBody{io.NopCloser(zeros{}), 1000}
	if n, err := io.Copy(io.Discard, b); n != 1000 || !errors.Is(err, errTooLong) {
		t.Fatalf("%d %v", n, err)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }
